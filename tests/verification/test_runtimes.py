"""verify in other runtimes: OpenVINO, and onnxruntime-web in a headless Chromium."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.verify import damage, one_code
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import LsquantError, MissingExtra, MissingFile, UsageError
from lsquant.cli.main import main
from lsquant.verification.runtimes.web import BROWSERS, Browser, message, parsed

pytest.importorskip("onnxruntime")
needs_browser = pytest.mark.skipif(
    not os.environ.get("LSQUANT_NODE_MODULES") or not any(map(shutil.which, BROWSERS)),
    reason="needs Chromium, and LSQUANT_NODE_MODULES: the folder that `npm install onnxruntime-web` made",
)


class Mixed(nn.Module):
    """Depthwise, transposed and linear layers, BatchNorm, residual addition and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.up = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ConvTranspose2d(8, 8, 2, 2)
        self.pool, self.fc = nn.AvgPool2d(3), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.up(torch.relu(self.depthwise(x) + x)))
        return self.fc(self.pool(x).flatten(1))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(3)
    model, x = Mixed(), torch.randn(12, 3, 6, 6)
    low = [Rule("depthwise", 2, QuantSpec(3, offset=True)), Rule("stem", 8, 8), Rule("fc", 8, 8)]
    lsquant.prepare(model, Recipe(QuantSpec(4, granularity="channel"), 4, low), x)
    lsquant.calibrate(model, [x])
    return model.eval(), x


@needs_browser
@pytest.mark.parametrize("profile", ["exact", "small"])
def test_the_browser_gives_the_same_verdict(profile: str, trained: Any, tmp_path: Path) -> None:
    model, x = trained
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
    verdict = lsquant.verify(model, path, [x, x[:1]], runtime="onnxruntime-web")
    assert verdict.exact, str(verdict)
    assert verdict.runtime.startswith("onnxruntime-web ")
    assert (verdict.batches, verdict.samples, verdict.layers) == (2, 13, 4)
    assert all(check.compared > 0 for check in verdict.checks)
    broken = damage(path, tmp_path / "d.onnx", lambda arrays, m: one_code({"mid.weight": arrays["stem.weight"]}, m))
    verdict = lsquant.verify(model, broken, [x], runtime="onnxruntime-web")
    assert verdict.level == "none"
    assert verdict.checks[2].worst == "stem"


@needs_browser
def test_a_file_that_the_browser_refuses(trained: Any) -> None:
    with Browser() as browser, pytest.raises(LsquantError, match="onnxruntime-web refuses the model: "):
        browser.open(b"nothing", {})


@pytest.mark.parametrize("profile", ["exact", "qdq"])
def test_openvino(profile: str, trained: Any, tmp_path: Path) -> None:
    """It fuses multiplications and additions: codes are as trained but for ties, outputs but for the last bits."""
    if os.environ.get("LSQUANT_SANITIZE"):
        pytest.skip("OpenVINO loads its libraries in a way that AddressSanitizer forbids (RTLD_DEEPBIND)")
    pytest.importorskip("openvino")
    model, x = trained
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
    verdict = lsquant.verify(model, path, [x, x[:1]], runtime="openvino")
    assert verdict.runtime.startswith("OpenVINO ")
    assert verdict.session["INFERENCE_PRECISION_HINT"] == "f32"
    assert verdict.plain is not None
    assert verdict.plain.session == {}
    assert verdict.reaches("weights"), str(verdict)
    _, codes, outputs, *_ = verdict.checks
    assert codes.compared > 0
    assert codes.mismatches <= 1e-3 * codes.compared, str(verdict)
    assert outputs.largest < 1e-3 if profile == "exact" else outputs.compared > 0, str(verdict)
    broken = damage(path, tmp_path / "d.onnx", lambda arrays, m: one_code({"mid.weight": arrays["stem.weight"]}, m))
    assert lsquant.verify(model, broken, [x], runtime="openvino").level == "none"


def test_what_is_missing_is_named(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = trained
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    with pytest.raises(UsageError, match="'tensorrt' is unknown; choose from onnxruntime, openvino, onnxruntime-web"):
        lsquant.verify(model, path, [x], runtime="tensorrt")
    monkeypatch.delenv("LSQUANT_NODE_MODULES", raising=False)
    with pytest.raises(MissingExtra, match=r"npm install onnxruntime-web.*LSQUANT_NODE_MODULES"):
        lsquant.verify(model, path, [x], runtime="onnxruntime-web")
    with pytest.raises(MissingFile, match=r"has no ort\.wasm\.min\.mjs"):
        lsquant.verify(model, path, [x], runtime="onnxruntime-web", node_modules=tmp_path)
    dist = tmp_path / "onnxruntime-web" / "dist"
    dist.mkdir(parents=True)
    (dist / "ort.wasm.min.mjs").touch()
    (dist.parent / "package.json").write_text('{"version": "0"}')
    monkeypatch.setenv("LSQUANT_CHROMIUM", "no-such-browser")
    with pytest.raises(MissingExtra, match="no browser no-such-browser"):
        lsquant.verify(model, path, [x], runtime="onnxruntime-web", node_modules=tmp_path)
    monkeypatch.setenv("LSQUANT_CHROMIUM", "false")  # a program that ends at once
    with pytest.raises(LsquantError, match=r"false ended while running onnxruntime-web"):
        lsquant.verify(model, path, [x], runtime="onnxruntime-web", node_modules=tmp_path)
    lsquant.save(model, tmp_path / "m.safetensors")
    (tmp_path / "own.py").write_text("from test_runtimes import Mixed as build\ndef data():\n    return []\n")
    own = ["--model", f"{tmp_path / 'own.py'}:build", "--data", f"{tmp_path / 'own.py'}:data"]
    (tmp_path / "m.packed.safetensors").touch()
    code = main(["verify", str(tmp_path / "m.safetensors"), *own, "--profile", "packed", "--runtime", "openvino"])
    assert code == 2
    assert "does not run files of profile packed" in capsys.readouterr().err


def test_messages() -> None:
    arrays = [np.arange(5, dtype=np.uint8), np.float32([[1.5, -0.0]]), np.zeros((2, 0), np.int64), np.int8([-3])]
    header, back = parsed(message({"do": "ä"}, arrays))
    assert header["do"] == "ä"
    for a, b in zip(arrays, back, strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    assert len(message({}, arrays)) % 8 == 0
