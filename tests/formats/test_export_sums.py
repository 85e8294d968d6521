"""Integer sums of exported files stay within int32, and within 16 bits where processors add pairs of products there.

Sums are compared with Python's integers, and the operators of each file are looked at one by one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe
from lsquant._util.errors import UsageError

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def run(path: Path, x: Tensor, level: str = "ORT_ENABLE_ALL") -> np.ndarray:
    """The output of a file in a session with no option but its optimisation level."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def ones(layer: nn.Module, x: Tensor, activation: Any = 8, groups: int | None = None) -> nn.Module:
    """A layer of 8 bits whose weights, but for a few, and inputs are all at the highest code, with the step 2^-7."""
    torch.manual_seed(0)
    with torch.no_grad():
        weight: Any = layer.weight
        weight.fill_(127 / 128)
        weight.view(-1)[::97] = -0.5
    model = nn.Sequential(layer)
    weights = QuantSpec(8, granularity="group", group_size=groups) if groups else 8
    lsquant.prepare(model, Recipe(weights, activation))
    lsquant.calibrate(model, [x[:1]])
    for _, quantizer in lsquant.quantizers(model):
        quantizer.step.data.fill_(2**-7)
        quantizer.initial_step.fill_(2**-7)
    return model.eval()


def exact_linear(model: Any, x: Tensor, group: int | None = None) -> np.ndarray:
    """``sum q_x q_w`` in int64, rounded to float32 once, and scaled by 2^-14, group by group in float32."""
    layer = model[0]
    q_x = (layer.input_quantizer.codes(x).to(torch.int64) - _zero(layer)).numpy()
    q_w = layer.integer_weight()[0].to(torch.int64).numpy()
    size = group or q_x.shape[-1]
    total: Any = np.float32(0)
    for a in range(0, q_x.shape[-1], size):
        sums = q_x[..., a : a + size] @ q_w[:, a : a + size].T
        total = total + sums.astype(np.float32) * np.float32(2**-14)
    return total


def _zero(layer: Any) -> int:
    zero = layer.input_quantizer.zero_point()
    return 0 if zero is None else int(zero)


def integer_operators(path: Path) -> list[tuple[str, int]]:
    """Each integer operator of a file, and the bound of its sums: that of all terms around both zero points."""
    graph = onnx.load(path).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    found = []
    for node in graph.node:
        if node.op_type not in ("MatMulInteger", "ConvInteger"):
            continue
        weight, x_zero, w_zero = (arrays[name].astype(np.int64) for name in node.input[1:4])
        terms = np.abs(weight) + np.abs(w_zero)
        sums = terms.sum(0) if node.op_type == "MatMulInteger" else terms.reshape(len(terms), -1).sum(1)
        highest = 255 if arrays[node.input[2]].dtype == np.uint8 else 128
        assert node.input[0] in makers
        found.append((node.op_type, int(sums.max()) * (highest + int(np.abs(x_zero)))))
    return found


SIGNED = QuantSpec(8, signed=True)
SHIFTED = QuantSpec(8, offset=True)


@pytest.mark.parametrize(
    "terms, activation, parts", [(70_000, 8, 4), (70_000, SIGNED, 5), (16_000, 8, 1), (26_000, 8, 2)]
)
def test_linear_sums_beyond_int32(terms: int, activation: Any, parts: int, tmp_path: Path) -> None:
    x = torch.rand(3, terms)
    x[1] = 255 / 128 if activation == 8 else 127 / 128
    x[2] *= -1 if activation is SIGNED else 1
    model = ones(nn.Linear(terms, 2, bias=False), x, activation)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    for level in LEVELS:
        assert np.array_equal(run(path, x, level), exact_linear(model, x)), level
    operators = integer_operators(path)
    assert len(operators) == parts
    assert all(bound < 2**31 for _, bound in operators)
    if terms == 70_000 and activation == 8:
        codes = model[0].input_quantizer.codes(x).to(torch.int64) @ model[0].integer_weight()[0].to(torch.int64).T  # type: ignore[operator, union-attr]
        assert int(codes.max()) > 2**31, "the test is of no use"


def test_the_trained_layer_and_the_integer_model_have_the_same_sums() -> None:
    x = torch.full((2, 70_000), 255 / 128)
    model = ones(nn.Linear(70_000, 2), x)
    expected = exact_linear(model, x) + model[0].bias.detach().numpy()  # type: ignore[union-attr, operator]
    for engine in ("eager", "cpp"):
        lsquant.use_engine(engine)
        try:
            with torch.no_grad():
                assert np.array_equal(model(x).numpy(), expected)
                assert np.array_equal(lsquant.to_integer(model)(x).numpy(), expected)
        finally:
            lsquant.use_engine(None)


@pytest.mark.parametrize("profile", ["exact", "small"])
def test_groups_beyond_int32(profile: str, tmp_path: Path) -> None:
    x = torch.full((2, 60_000), 1.9)
    model = ones(nn.Linear(60_000, 2, bias=False), x, groups=30_000)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
    assert np.array_equal(run(path, x), exact_linear(model, x, 30_000))
    operators = integer_operators(path)
    assert len(operators) == 4
    assert all(bound < 2**31 for _, bound in operators)
    assert lsquant.verify(model, path, [x]).exact


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(40_000, 2, 2, bias=False),
        nn.Conv2d(36_000, 4, (2, 2), groups=2, bias=False),
        nn.ConvTranspose1d(40_000, 2, 2, stride=1, bias=False),
    ],
    ids=["one group", "two groups", "transposed"],
)
@pytest.mark.parametrize("activation", [8, SHIFTED], ids=["unsigned", "LSQ+"])
def test_convolution_sums_beyond_int32(layer: Any, activation: Any, tmp_path: Path) -> None:
    x = torch.rand(2, layer.in_channels, *[3] * len(layer.kernel_size)) * 0.1 + 1.85
    model = ones(layer, x, activation)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    q_x = model[0].input_quantizer.codes(x).to(torch.float64) - _zero(model[0])  # type: ignore[union-attr, operator]
    q_w = torch.round(layer.weight.detach().to(torch.float64) * 128)
    functions = {nn.Conv1d: nn.functional.conv1d, nn.Conv2d: nn.functional.conv2d}
    if isinstance(layer, nn.ConvTranspose1d):
        sums = nn.functional.conv_transpose1d(q_x, q_w)
    else:
        sums = next(f for kind, f in functions.items() if isinstance(layer, kind))(q_x, q_w, groups=layer.groups)
    assert float(sums.max()) > (2**31 if activation == 8 else 2**30)
    for level in LEVELS:
        assert np.array_equal(run(path, x, level), sums.to(torch.float32).numpy() * np.float32(2**-14))
    operators = integer_operators(path)
    assert len(operators) >= 2
    assert all(bound < 2**31 for _, bound in operators)
    assert lsquant.verify(model, path, [x]).exact


def test_one_channel_that_cannot_be_split_is_refused(tmp_path: Path) -> None:
    x = torch.full((2, 1, 70_000), 1.9)
    model = ones(nn.Conv1d(1, 1, 70_000, bias=False), x)
    with pytest.raises(UsageError, match=r"the sums of layer '0' can reach [0-9,]+, beyond int32.*one input channel"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)


def operators_when_optimised(path: Path, folder: Path) -> list[str]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


@pytest.mark.parametrize("terms, fused", [(140_000, False), (64, True)])
def test_qdq_is_not_fused_to_an_integer_operator_whose_sums_leave_int32(
    terms: int, fused: bool, tmp_path: Path
) -> None:
    x = torch.full((2, 3, terms), 1.99)
    model = ones(nn.Linear(terms, 2, bias=False), x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="qdq")
    expected = exact_linear(model, x)
    assert np.abs(run(path, x) / expected - 1).max() < 1e-5
    integer = [name for name in operators_when_optimised(path, tmp_path) if "Integer" in name or "QLinear" in name]
    assert bool(integer) == fused
    assert lsquant.verify(model, path, [x]).reaches("weights")


# ---- pairs of products in 16 bits, on x86 without VNNI ----


@pytest.mark.parametrize("profile", ["exact", "small"])
@pytest.mark.parametrize("bits", [2, 6, 7, 8])
def test_no_pair_of_products_leaves_16_bits(bits: int, profile: str, tmp_path: Path) -> None:
    """``vpmaddubsw`` adds two products of an unsigned and a signed byte in int16: at most 255 * (|w| + |w'|)."""
    layers = [nn.Linear(40, 8), nn.ReLU(), nn.Linear(8, 4)]
    model, x = nn.Sequential(*layers), torch.randn(4, 40)
    lsquant.prepare(model, Recipe(bits, 8))
    lsquant.calibrate(model, [x])
    graph = onnx.load(lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    seen = 0
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            assert arrays[node.input[2]].dtype == np.uint8
            seen += 1
            if (w_zero := arrays[node.input[3]]).dtype == np.int8:
                lowest = -(2 ** (bits - 1))
                assert w_zero == 0
                assert 255 * 2 * abs(lowest) <= 2**15, "a pair of products saturates"
    assert seen == 2


# ---- weights alone ----


CHANNEL, GROUP = QuantSpec(8, granularity="channel"), QuantSpec(4, granularity="group", group_size=16)


@pytest.mark.parametrize("profile", ["exact", "small", "qdq"])
@pytest.mark.parametrize("weights", [8, CHANNEL, 4, 2, GROUP], ids=str)
def test_weights_alone_are_not_multiplied_with_rounded_inputs(profile: str, weights: Any, tmp_path: Path) -> None:
    """ONNX Runtime fuses DequantizeLinear and MatMul to MatMulNBits, which rounds the input: errors of 1e-2."""
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 33)).eval()
    lsquant.prepare(model, Recipe(weights, None))
    for x in (torch.randn(5, 64), torch.randn(2, 5, 64)):
        path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
        want: Any = x.double()
        for layer in (model[0], model[2]):
            codes, step, _ = layer.integer_weight()  # type: ignore[operator]
            rows = codes.double().reshape(step.numel(), -1) * step.double().reshape(-1, 1)
            want = want @ rows.reshape(codes.shape).T + layer.bias.double()  # type: ignore[union-attr, operator]
            want = (want.relu() if layer is model[0] else want).detach()
        for level in LEVELS:
            worst = np.abs(run(path, x, level) - want.numpy()).max()
            assert worst < 2e-5 * float(want.abs().max()), level
        assert not any("NBits" in name for name in operators_when_optimised(path, tmp_path))
