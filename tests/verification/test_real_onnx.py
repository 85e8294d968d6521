"""Real networks on whole test sets, exported in every ONNX profile: the verdicts.

``LSQUANT_TEST_DATA=... PYTHONPATH=tests python tests/verification/test_real_onnx.py [runtime ...]`` prints the table of
docs/deployment.md, for ONNX Runtime unless others are named; ``--images N`` looks at fewer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import lsquant
from helpers.real_deployment import data, unpacked
from helpers.real_nets import real_net
from lsquant import QuantSpec, Recipe

CASES = [("ResNet-20", 4), ("ResNet-20", 2), ("ResNet-8", 8), ("ResNet-8", 4), ("MobileNetV1", 8)]
PROFILES = ("exact", "small", "qdq")


def calibrated(name: str, bits: int, folder: Path, cifar: Path, limit: int | None) -> tuple[nn.Module, tuple]:
    """(a network with all layers at these bits, nothing trained; test images in batches)."""
    calibration, images, _, size = data(name, folder, cifar)
    model = real_net(name, folder)
    lsquant.prepare(model, Recipe(QuantSpec(bits, granularity="channel"), bits))
    lsquant.calibrate(model, calibration.split(size), weights="mse")
    return model.eval(), images[:limit].split(size)


def verdicts(
    name: str, bits: int, folder: Path, cifar: Path, place: Path, runtimes: tuple[str, ...], limit: int | None
) -> Iterator[tuple[str, int, lsquant.Verdict]]:
    """(profile, bytes of the file, verdict) for every profile and runtime."""
    model, batches = calibrated(name, bits, folder, cifar, limit)
    for profile in PROFILES:
        path = lsquant.export_onnx(model, place / f"{profile}.onnx", batches[0][:2], profile=profile)
        for runtime in runtimes:
            yield profile, path.stat().st_size, lsquant.verify(model, path, batches, runtime=runtime)


@pytest.mark.slow
@pytest.mark.parametrize("name,bits", CASES)
def test_whole_test_sets(name: str, bits: int, data_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    cifar = unpacked(data_folder, tmp_path) if name != "MobileNetV1" else tmp_path
    sizes = {}
    for profile, size, verdict in verdicts(name, bits, data_folder, cifar, tmp_path, ("onnxruntime",), None):
        sizes[profile] = size
        assert verdict.samples == (500 if name == "MobileNetV1" else 10_000)
        for each in (verdict, verdict.plain):
            assert each is not None
            assert all(check.compared > 0 for check in each.checks)
            assert each.reaches("weights" if profile == "qdq" else "outputs"), str(each)
    if bits <= 4:
        assert sizes["small"] < sizes["exact"] * (0.45 if bits == 2 else 0.65)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runtimes", nargs="*", default=("onnxruntime",))
    parser.add_argument("--images", type=int)
    parser.add_argument("--networks", nargs="+", default=[f"{name}/{bits}" for name, bits in CASES])
    a = parser.parse_args()
    folder = Path(os.environ["LSQUANT_TEST_DATA"])
    print("| network, bits, images | profile | bytes | runtime | level | codes that differ | outputs that differ |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        cifar = unpacked(folder, Path(place))
        for case in a.networks:
            name, _, bits = case.partition("/")
            for profile, size, v in verdicts(name, int(bits), folder, cifar, Path(place), a.runtimes, a.images):
                codes, outputs = (f"{c.mismatches:,} of {c.compared:,} (by {c.largest:.2g})" for c in v.checks[-2:])
                start = f"{name}, {bits}/{bits}, {v.samples:,}"
                print(
                    f"| {start} | `{profile}` | {size:,} | {v.runtime} | `{v.level}` | {codes} | {outputs} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
