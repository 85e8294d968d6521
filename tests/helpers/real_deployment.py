"""The real data, unpacked, for whole test sets."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lsquant.tasks.cifar_data import read_cifar10


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
