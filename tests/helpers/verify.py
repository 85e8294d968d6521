"""A trained network and its exported file, and ways to damage the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe

onnx = pytest.importorskip("onnx")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.mid = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(torch.relu(self.mid(x)).flatten(2).amax(2))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(5)
    model, x = Net(), torch.randn(40, 2, 6, 6)
    lsquant.prepare(model, Recipe(QuantSpec(4, granularity="channel"), 4))
    lsquant.calibrate(model, [x])
    return model.eval(), x


@pytest.fixture(scope="module")
def exported(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, x = trained
    return lsquant.export_onnx(model, tmp_path_factory.mktemp("export") / "m.onnx", x[:2])


def damage(exported: Path, path: Path, change: Callable[[dict[str, Any], Any], None]) -> Path:
    """A copy of the file with something changed: change(name -> array, model)."""
    model = onnx.load(exported)
    arrays = {t.name: onnx.numpy_helper.to_array(t).copy() for t in model.graph.initializer}
    change(arrays, model)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(arrays[tensor.name], tensor.name))
    onnx.save(model, path)
    return path


def one_code(arrays: dict[str, Any], model: Any) -> None:
    arrays["mid.weight"].flat[7] ^= 1
