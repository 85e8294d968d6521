"""What export_onnx refuses, and that a refusal or a full disk costs nothing."""

from __future__ import annotations

import builtins
import errno
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.export_onnx import Small, ready, small, tiny
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import DiskFull, MissingExtra, MissingFile, UsageError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("profile, words", [("fast", "unknown"), ("exat", "unknown")])
def test_profiles_that_are_not_there(profile: str, words: str, tmp_path: Path) -> None:
    model, x = tiny()
    with pytest.raises(UsageError, match=rf"{words}; choose from 'exact', 'qdq'"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
    assert not list(tmp_path.iterdir())


def test_group_wise_convolution_has_no_exact_form(tmp_path: Path) -> None:
    model, x = small(rules=[Rule("conv2", QuantSpec(4, granularity="group", group_size=9))])
    with pytest.raises(UsageError, match="conv2: a convolution with group-wise"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="qdq")
    verdict = lsquant.verify(model, path, [x])
    assert verdict.level == "weights"
    assert verdict.checks[-1].largest < 1e-5


def test_what_is_not_ready_is_named(tmp_path: Path) -> None:
    model, x = Small(), torch.randn(2, 3, 6, 6)
    with pytest.raises(UsageError, match="no quantized layer"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    lsquant.prepare(model, Recipe(4, 4))
    with pytest.raises(UsageError, match=r"conv1\.input_quantizer.*calibrate"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    lsquant.calibrate(model, [x])
    with lsquant.disabled(model, "conv2*"), pytest.raises(UsageError, match=r"conv2\..*switched off"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    with pytest.raises(UsageError, match="float32"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x.double())
    with pytest.raises(UsageError, match="empty batch"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", ())
    with pytest.raises(MissingFile, match="folder"):
        lsquant.export_onnx(model, tmp_path / "nowhere" / "m.onnx", x)
    assert not list(tmp_path.iterdir())


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(2, -1, 4))


def test_a_model_of_fixed_batch_size_says_so(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    model = ready(FixedBatch(), Recipe(4, 4), x)
    with pytest.raises(UsageError, match="failed on a batch"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", torch.randn(3, 5))
    with pytest.raises(UsageError, match=re.escape("torch cannot trace this model with a dynamic batch dimension")):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny()
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskFull, match="no space"):
        lsquant.export_onnx(model, path, x)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny()
    real = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module.split(".")[0] == name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(module, *args, **kwargs)

    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    for loaded in [m for m in sys.modules if m.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr("importlib.import_module", lambda module: without(module) and sys.modules[module])
    reading = name == "onnxruntime"
    with pytest.raises(MissingExtra, match=r"lsquant\[onnx\]"):
        lsquant.onnx_session(path) if reading else lsquant.export_onnx(model, path, x)


class Averaged(nn.Module):
    """An average with a divisor of its own, as a module or as a function, behind a layer with float inputs."""

    def __init__(self, as_module: bool, ceil: bool = False):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 1), nn.AvgPool2d(2, ceil_mode=ceil, divisor_override=3)
        self.as_module = as_module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return self.pool(y) if self.as_module else nn.functional.avg_pool2d(y, 2, divisor_override=3)


def test_a_divisor_that_torchs_exporter_leaves_out(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6)
    for recipe in (Recipe(4, None), Recipe(4, 4)):
        model = ready(Averaged(True), recipe, x).eval()
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)
        session = lsquant.onnx_session(tmp_path / "m.onnx")
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(found, model(x).detach())
    for odd in (Averaged(False), Averaged(True, ceil=True)):
        model = ready(odd, Recipe(4, None), x).eval()
        with pytest.raises(UsageError, match=r"leaves out divisor_override=3 of avg_pool2d; use nn.AvgPool2d"):
            lsquant.export_onnx(model, tmp_path / "n.onnx", x)


def test_a_window_that_begins_beyond_the_input_is_named(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4)
    model = nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.MaxPool1d(1, 3, ceil_mode=True), nn.ReLU6())
    with pytest.raises(UsageError, match=r"it has '1' with ceil_mode=True: PyTorch and ONNX count windows"):
        lsquant.export_onnx(ready(model, Recipe(4, 4), x[..., :3]).eval(), tmp_path / "m.onnx", x[..., :3])


def test_half_precision_behind_token_ids_is_refused(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 3)), torch.randint(0, 8, (5, 2))
    lsquant.prepare(model, Recipe(4, 4, [Rule("0", None, None)]))
    lsquant.calibrate(model, [x])
    lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    with pytest.raises(UsageError, match=r"0.weight is of type torch.float16; give a float32 model"):
        lsquant.export_onnx(model.half(), tmp_path / "n.onnx", x)


def test_an_output_padding_that_onnx_runtime_refuses(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 4, 4)
    layers = [nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 2, (1, 1), output_padding=(0, 1), dilation=(1, 2))]
    model = ready(nn.Sequential(*layers), Recipe(4, 4, [Rule("1", None, None)]), x).eval()
    with pytest.raises(UsageError, match=r"1: ONNX Runtime refuses a transposed convolution whose output_padding"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    quantized = ready(nn.Sequential(*layers), Recipe(4, 4), x).eval()
    lsquant.export_onnx(quantized, tmp_path / "m.onnx", x)
    assert lsquant.verify(quantized, tmp_path / "m.onnx", [x]).exact
