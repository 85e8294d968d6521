"""An own CNN in an own training loop: handwritten digits in floating point, then at 2 bits with learned steps.

    pip install lsquant[digits]
    python examples/own_cnn.py

Everything below the line "with lsquant" is what quantization adds; `fit` is the same loop both times.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (n, 1, 8, 8) in 0 .. 1 and labels (n,): every fifth digit is kept for the test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16  # pyright: ignore
    labels = torch.from_numpy(digits.target)  # pyright: ignore
    test = torch.arange(len(labels)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def network() -> nn.Module:
    """(batch, 1, 8, 8) to (batch, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def batches(images: Tensor, labels: Tensor, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    for rows in torch.randperm(len(labels)).split(size):
        yield images[rows], labels[rows]


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, epochs: int) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for x, y in batches(images, labels):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(out: str = ".", epochs: int = 5) -> dict[str, float]:
    """Train, quantize, train again, save and export into the folder ``out``; returns the accuracies."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = data()
    model = network()
    fit(model, torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=1e-4), images, labels, epochs)
    result = {"float32": accuracy(model, test_images, test_labels)}

    # ---- with lsquant ----
    changes = lsquant.prepare(model, lsquant.Recipe.preset("w2a2"), example_inputs=images[:1])
    lsquant.calibrate(model, [images[:256]])
    print(changes)
    result["2 bits, not trained"] = accuracy(model, test_images, test_labels)

    groups = lsquant.param_groups(model, lr=0.02, weight_decay=2.5e-5)
    fit(model, torch.optim.SGD(groups, momentum=0.9), images, labels, epochs)
    result["2 bits, learned steps"] = accuracy(model, test_images, test_labels)

    lsquant.save(model, Path(out) / "own_cnn.safetensors")
    for name, value in result.items():
        print(f"{name:24} {value:.1%}")
    try:
        lsquant.export_onnx(model, Path(out) / "own_cnn.onnx", test_images[:1])
    except ImportError as missing:
        print(missing)
    else:
        print(lsquant.verify(model, Path(out) / "own_cnn.onnx", [test_images]))
    return result


if __name__ == "__main__":
    main(*sys.argv[1:2])
