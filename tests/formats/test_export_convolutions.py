"""Convolutions of every kind in every ONNX profile, in one file each, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule
from lsquant.formats.onnx import exact, load_onnx
from lsquant.formats.onnx.reader import initializers

onnxruntime = pytest.importorskip("onnxruntime")

SHAPES = {1: (6, 9), 2: (6, 5, 7), 3: (6, 3, 2, 4)}


class Many(nn.Module):
    """Layers side by side on 6 channels in one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.ModuleDict(
            {
                "same": nn.Conv1d(6, 4, 3, padding="same", groups=2),
                "strided": nn.Conv1d(6, 4, 3, 2, 1, padding_mode="reflect", bias=False),
                "up": nn.ConvTranspose1d(6, 4, 4, 3, 2, dilation=2),
            }
        )
        self.two = nn.ModuleDict(
            {
                "depthwise": nn.Conv2d(6, 6, 3, padding=1, groups=6),
                "grouped": nn.Conv2d(6, 4, (3, 2), (1, 2), groups=2),
                "up": nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2),
                "up_depthwise": nn.ConvTranspose2d(6, 6, 2, 2, groups=6),
                "cropped": nn.ConvTranspose2d(6, 4, (3, 2), (2, 1), (3, 0), dilation=(1, 2), bias=False),
                "sized": nn.ConvTranspose2d(6, 4, 3, 2),
            }
        )
        self.three = nn.ModuleDict(
            {"plain": nn.Conv3d(6, 4, (1, 2, 3), padding=(0, 1, 1)), "up": nn.ConvTranspose3d(6, 4, 2, 2, groups=2)}
        )

    def forward(self, x1: Tensor, x2: Tensor, x3: Tensor) -> list[Tensor]:
        found = [layer(x1) for layer in self.one.values()]
        found += [layer(x2, [12, 15]) if name == "sized" else layer(x2) for name, layer in self.two.items()]
        return found + [layer(x3) for layer in self.three.values()]


def inputs(batch: int) -> dict[str, Tensor]:
    return {f"x{n}": torch.randn(batch, *shape) for n, shape in SHAPES.items()}


def ready(weight: Any, activation: Any, rules: Any = ()) -> nn.Module:
    model, example = Many(), inputs(4)
    lsquant.prepare(model, Recipe(weight, activation, rules=rules), example)
    if activation is not None:
        lsquant.calibrate(model, [example])
    return model.eval()


def largest(verdict: lsquant.Verdict) -> float:
    return verdict.checks[-1].largest


@pytest.mark.parametrize(
    ("profile", "operator"),
    [("exact", "Conv"), ("exact", "ConvInteger"), ("small", "Conv"), ("small", "ConvInteger"), ("qdq", "Conv")],
)
def test_both_sides_quantized(profile: str, operator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps per channel and per tensor, LSQ+, 2 to 8 bits; the same file for other batch sizes."""
    if operator == "ConvInteger":
        monkeypatch.setattr(exact, "FLOAT_SUMS", 0)
    rules = [Rule("two.*", QuantSpec(2, granularity="channel"), QuantSpec(3, offset=True)), Rule("three.*", 8, 8)]
    model = ready(QuantSpec(4), QuantSpec(4, offset=True), rules)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", inputs(1), profile=profile)
    verdict = lsquant.verify(model, path, [inputs(3), inputs(1)])
    assert verdict.layers == 11
    assert all(check.compared > 0 for check in verdict.checks)
    if profile == "qdq":
        assert verdict.reaches("weights"), str(verdict)
        assert largest(verdict) < 1e-4
        operators = {node.name: node.op_type for node in load_onnx(path)[0].graph.node}
        assert operators["two.up/ConvTranspose"] == "ConvTranspose"
    else:
        assert verdict.exact, str(verdict)
        assert verdict.plain is not None
        assert verdict.plain.exact, str(verdict.plain)
    if profile == "exact":
        facts = {fact.layer: fact for fact in load_onnx(path)[1]["layers"]}
        assert facts["two.up"].layout == "reversed"
        stored = initializers(load_onnx(path)[0])["two.up.weight"]  # (out, in / groups, *kernel), reversed
        codes = model.two["up"].integer_weight()[0].numpy()  # (in, out / groups, *kernel)
        assert int(stored[3, 2, 0, 1]) - 2 * (operator == "ConvInteger") == codes[5, 1, 2, 1]  # there code - q_min
    operators = {node.op_type for node in load_onnx(path)[0].graph.node}
    assert {"Conv", "ConvInteger"} & operators == {operator}


@pytest.mark.parametrize(("channels", "operator"), [(518, "Conv"), (519, "ConvInteger")])
def test_float32_adds_up_only_what_it_holds(channels: int, operator: str, tmp_path: Path) -> None:
    """8/8 bits, 1x1: 127 * 255 * 518 = 16,775,430 is below 2^24 = 16,777,216, with another channel it is above."""
    model = nn.Sequential(nn.Conv2d(channels, 4, 1, bias=False))
    x = torch.full((2, channels, 3, 3), 255.0)
    x[0, 7] = 254.0  # an even sum becomes an odd one
    x[1] -= torch.randint(0, 2, (channels, 3, 3))
    lsquant.prepare(model, Recipe(8, 8), x)
    lsquant.calibrate(model, [x])
    layer: Any = model[0]
    with torch.no_grad():
        layer.weight.fill_(127.0)
        layer.weight[1:] = torch.randint(-127, 128, (3, channels, 1, 1)).float()
        layer.weight_quantizer.step.fill_(1.0)
        layer.input_quantizer.step.fill_(1.0)
    assert (layer.input_quantizer.q_min, layer.input_quantizer.q_max) == (0, 255)
    path = lsquant.export_onnx(model.eval(), tmp_path / "m.onnx", x)
    assert {node.op_type for node in load_onnx(path)[0].graph.node} & {"Conv", "ConvInteger"} == {operator}
    want = np.einsum("oi,nihw->nohw", layer.weight[:, :, 0, 0].detach().numpy().astype(np.int64), x.long().numpy())
    assert want.max() > 2**23.9
    session = lsquant.onnx_session(path)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert (got == want.astype(np.float32)).all()
    verdict = lsquant.verify(model, path, [x])
    assert verdict.exact, str(verdict)


def test_an_integer_sum_has_no_negative_zero(tmp_path: Path) -> None:
    """Zeros times negative weights are -0.0 in floating point; the trained sum is an integer, 0.  Any optimization."""
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.Conv2d(16, 16, 3, groups=16, bias=False))
    x = torch.rand(2, 16, 6, 6)
    lsquant.prepare(model, Recipe(4, 4), x)
    lsquant.calibrate(model, [x])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(-layer.weight.abs())  # type: ignore[operator, arg-type]
        want = model.eval()(torch.zeros(2, 16, 6, 6)).numpy()
    assert not np.signbit(want).any()
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    assert {node.op_type for node in load_onnx(path)[0].graph.node} & {"Conv", "ConvInteger"} == {"Conv"}
    levels = onnxruntime.GraphOptimizationLevel
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL):
        session = lsquant.onnx_session(path, graph_optimization_level=level)
        (got,) = session.run(None, {session.get_inputs()[0].name: np.zeros((2, 16, 6, 6), np.float32)})
        assert not got.any()
        assert not np.signbit(got).any()


@pytest.mark.parametrize("profile", ["exact", "small", "qdq"])
def test_one_side_quantized(profile: str, tmp_path: Path) -> None:
    """Weights alone are shipped as they are and multiplied in floating point; inputs alone likewise."""
    rules = [Rule("two.up*", None, 4), Rule("three.up", QuantSpec(5, granularity="channel"), None)]
    model = ready(QuantSpec(3, granularity="channel"), None, rules)
    example = inputs(4)
    lsquant.calibrate(model, [example])
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", example, profile=profile)
    verdict = lsquant.verify(model, path, [inputs(3)])
    assert verdict.reaches("weights"), str(verdict)
    assert largest(verdict) < 1e-5
    names = {name: np.dtype(value.dtype).name for name, value in initializers(load_onnx(path)[0]).items()}
    assert names["one.up.weight"] == ("int4" if profile == "small" else "int8")
    assert names["two.up.weight"] == "float32"


class Longer(nn.Module):
    """Transposed convolutions whose output padding is a stride or more, which a dilation allows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [
                nn.ConvTranspose1d(6, 4, 3, 1, padding=1, output_padding=1, dilation=2),
                nn.ConvTranspose1d(6, 4, 1, 2, output_padding=2, dilation=3),
                nn.ConvTranspose1d(6, 4, 2, 1, padding=1, output_padding=3, dilation=4, groups=2, bias=False),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize(
    ("profile", "activation"), [("exact", None), ("exact", 6), ("small", None), ("qdq", 6), ("qdq", None)]
)
def test_an_output_padding_of_a_stride_and_more(profile: str, activation: Any, tmp_path: Path) -> None:
    """ONNX Runtime refuses such a ConvTranspose when it is run; found by the fuzzer."""
    model, x, path = Longer(), torch.randn(3, 6, 5), tmp_path / "longer.onnx"
    lsquant.prepare(model, Recipe(6, activation))
    if activation is not None:
        lsquant.calibrate(model, [x])
    lsquant.export_onnx(model.eval(), path, x, profile=profile)
    session = onnxruntime.InferenceSession(path)
    x = torch.randn(2, 6, 5)
    with torch.no_grad():
        wanted = model(x)
    for got, want in zip(session.run(None, {session.get_inputs()[0].name: x.numpy()}), wanted, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-5)
