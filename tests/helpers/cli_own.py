"""A user's own module with model, data and task, and the command line called on them."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest

from lsquant.cli import main

MODULE = """
    import torch
    from torch import nn

    def build():
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 4)

        def forward(self, image):
            return self.fc(image)

    def batches():
        g = torch.Generator().manual_seed(7)
        for _ in range(3):
            yield torch.randn(16, 1, 8, 8, generator=g), torch.zeros(16)

    def mappings():
        return [{"image": torch.randn(16, 8, generator=torch.Generator().manual_seed(i))} for i in range(3)]

    def needs(width):
        return build()

    def gives_data():
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 1, 8, 8)), 4)

    model = build()
    number = 3
    def three(): return 3
"""

TASK = """
    from dataclasses import dataclass
    import torch
    from torch import nn
    from torch.nn import functional as F
    from lsquant.tasks import Settings

    @dataclass
    class Points:
        name = "points"
        options = {"width": 8}
        settings = Settings(float_epochs=30, epochs=2, batch_size=32, float_lr=0.1)

        def model(self):
            return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def example_input(self):
            return self._data("test")[0][:1]

        def _data(self, split, seed=0):
            x = torch.randn(96, 4, generator=torch.Generator().manual_seed(seed + 1000 * (split == "test")))
            return x, (x[:, 0] > 0).long()

        def batches(self, split, *, batch_size, seed=0, epoch=0):
            x, y = self._data(split)
            return [(a, b) for a, b in zip(x.split(batch_size), y.split(batch_size))]

        def steps_per_epoch(self, batch_size):
            return -(-96 // batch_size)

        def metric(self, model):
            x, y = self._data("test")
            with torch.no_grad():
                return {"accuracy": 100.0 * float((model(x).argmax(-1) == y).double().mean())}

    task = Points()

    def make():
        return Points()

    half = nn.Linear(2, 2)
"""


@pytest.fixture
def own(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package of the user's and a task file; what is imported is forgotten afterwards."""
    package = in_tmp / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "network.py").write_text(textwrap.dedent(MODULE))
    (package / "broken.py").write_text("import a_package_that_is_not_there\n")
    (in_tmp / "points.py").write_text(textwrap.dedent(TASK))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    before = set(sys.modules)
    yield in_tmp
    for name in set(sys.modules) - before:
        if name.split(".")[0] in {"mine", "points", "network"}:
            del sys.modules[name]


CNN = ["--model", "mine.network:build", "--data", "mine.network:batches"]


def run(*arguments: str, code: int = 0) -> None:
    assert main([str(a) for a in arguments]) == code


def result(capsys: pytest.CaptureFixture, *arguments: str, code: int = 0) -> dict:
    capsys.readouterr()
    run(*arguments, "--json", code=code)
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def calibrated(own: Path, capsys: pytest.CaptureFixture) -> Path:
    """model.safetensors of the CNN, made by the command."""
    run("calibrate", *CNN, "--bits", "4", "--out", "model.safetensors", "--quiet")
    capsys.readouterr()
    return own / "model.safetensors"
