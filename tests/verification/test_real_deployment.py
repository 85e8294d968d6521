"""Real networks on whole test sets: the integer model and the packed file give the trained outputs, bit for bit.

``LSQUANT_TEST_DATA=... python tests/real_deployment.py`` prints the table of docs/integer-model.md.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import lsquant
from helpers.real_deployment import data, unpacked
from helpers.real_nets import real_net
from lsquant import QuantSpec, Recipe
from lsquant.verification.verdict import different

CASES = [(name, bits) for name in ("ResNet-20", "ResNet-8") for bits in (8, 4, 3, 2)] + [("MobileNetV1", 8)]
TARGETS = ("integer model", "packed file")


@dataclass
class Comparison:
    """One network over its test set: outputs against the trained ones, and verdicts over a part of it.

    values: different outputs, counted batch by batch: a network that gives one value would compare well.
    """

    samples: int
    compared: int = 0
    values: int = 0
    right: int = 0
    mismatches: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TARGETS, 0))
    verdicts: dict[str, Any] = field(default_factory=dict)


def compared(name: str, bits: int, folder: Path, cifar: Path, place: Path, part: int = 8) -> Comparison:
    """Calibrated, all layers at these bits, nothing trained.  part: batches that the verdicts are about."""
    calibration, images, labels, size = data(name, folder, cifar)
    model = real_net(name, folder)
    lsquant.prepare(model, Recipe(QuantSpec(bits, granularity="channel"), bits))
    lsquant.calibrate(model, calibration.split(size), weights="mse")
    model.eval()
    path, integers = lsquant.export_packed(model, place / "p"), lsquant.to_integer(model)
    twins = (integers, lsquant.load_packed(real_net(name, folder), path).eval())
    batches, found = images.split(size), Comparison(len(images))
    with torch.no_grad():
        for x, y in zip(batches, labels.split(size), strict=True):
            want = model(x)
            found.right += int((want.argmax(1) == y).sum())
            found.compared += want.numel()
            found.values += want.unique().numel()
            for target, twin in zip(TARGETS, twins, strict=True):
                found.mismatches[target] += int(different(twin(x).numpy(), want.numpy()).sum())
    for target, what in zip(TARGETS, (integers, path), strict=True):
        found.verdicts[target] = lsquant.verify(model, what, batches[:part])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name,bits", CASES)
def test_whole_test_sets(name: str, bits: int, data_folder: Path, tmp_path: Path) -> None:
    cifar = unpacked(data_folder, tmp_path) if name != "MobileNetV1" else tmp_path
    found = compared(name, bits, data_folder, cifar, tmp_path)
    assert found.mismatches == dict.fromkeys(TARGETS, 0)
    assert found.samples == (500 if name == "MobileNetV1" else 10_000)
    assert found.compared == found.samples * (1000 if name == "MobileNetV1" else 10)
    assert found.values > 100
    for target, verdict in found.verdicts.items():
        assert verdict.exact, f"{target}:\n{verdict}"
        assert all(check.compared > 0 for check in verdict.checks)
    if bits == 8:
        assert found.right / found.samples > {"ResNet-20": 0.91, "ResNet-8": 0.86, "MobileNetV1": 0.6}[name]


if __name__ == "__main__":
    torch.set_num_threads(1)
    source = Path(os.environ["LSQUANT_TEST_DATA"])
    with tempfile.TemporaryDirectory() as scratch:
        binary = unpacked(source, Path(scratch))
        wanted = sys.argv[1:] or [f"{name}/{bits}" for name, bits in CASES]
        for network, b in [case for case in CASES if f"{case[0]}/{case[1]}" in wanted]:
            found = compared(network, b, source, binary, Path(scratch))
            for target, verdict in found.verdicts.items():
                cells = [network, b, f"{found.right / found.samples:.1%}", target, f"{found.samples:,}"]
                cells += [f"{found.compared:,}", found.mismatches[target], verdict.level, verdict.samples]
                cells += [f"{verdict.checks[3].compared:,}", verdict.checks[3].mismatches]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
