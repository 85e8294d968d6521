"""Real networks on whole test sets: the integer model and the packed file give the trained outputs, bit for bit.

``LSQUANT_TEST_DATA=... python tests/test_real_deployment.py`` prints the table of docs/integer-model.md.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lsquant
from lsquant import QuantSpec, Recipe
from lsquant.tasks.cifar_data import read_cifar10
from lsquant.verification.verdict import different
from real_nets import real_net

CASES = [(name, bits) for name in ("ResNet-20", "ResNet-8") for bits in (8, 4, 3, 2)] + [("MobileNetV1", 8)]
TARGETS = ("integer model", "packed file")


def unpacked(folder: Path, place: Path) -> Path:
    """CIFAR-10 in the official binary version."""
    subprocess.run([sys.executable, str(folder / "unpack_cifar10.py"), str(place)], check=True, capture_output=True)
    return place


def jpegs(folder: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    """(images (count, 3, 224, 224), ``pixels / 127.5 - 1``, the centre of each; labels)."""
    image = pytest.importorskip("PIL.Image")
    rows = json.loads((folder / "imagenet_small" / f"{name}.json").read_text())[:count]
    images = torch.empty(len(rows), 3, 224, 224)
    with zipfile.ZipFile(folder / "imagenet_small" / f"{name}.zip") as archive:
        members = {Path(member).name: member for member in archive.namelist()}
        for i, row in enumerate(rows):
            picture = image.open(io.BytesIO(archive.read(members[row["file"]]))).convert("RGB")
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            top, left = ((n - 224) // 2 for n in pixels.shape[1:])
            images[i] = pixels[:, top : top + 224, left : left + 224] / 127.5 - 1
    return images, torch.tensor([row["label"] for row in rows])


def data(name: str, folder: Path, cifar: Path) -> tuple[Tensor, Tensor, Tensor, int]:
    """(images to calibrate on, test images, their labels, how many at a time)."""
    if name == "MobileNetV1":
        calibration, _ = jpegs(folder, "imagenet_sample1000_short256", 32)
        return calibration, *jpegs(folder, "imagenette224_ilsvrc_val500", 500), 4
    parts = read_cifar10(cifar)
    train, (test, labels) = parts["train"][0][:256].float(), parts["test"]
    if name == "ResNet-8":
        return train, test.float(), labels, 50
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (train / 255 - mean) / std, (test.float() / 255 - mean) / std, labels, 50


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
