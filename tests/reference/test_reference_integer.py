"""The arithmetic of integer-only networks: against NumPy loops, and against what ONNX Runtime's operators compute."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import oracle
from lsquant import reference_integer as ri
from lsquant._util.errors import UsageError

RNG = np.random.default_rng


def f32(rng: np.random.Generator, low: float, high: float, size: int | None = None) -> Any:
    """Log-spaced float32 numbers."""
    return np.float32(np.exp(rng.uniform(math.log(low), math.log(high), size)))


def tensor(x: object) -> torch.Tensor:
    return torch.from_numpy(np.atleast_1d(np.asarray(x)))


@pytest.mark.parametrize("seed", range(20))
def test_folding_and_layers_equal_the_oracle(seed: int) -> None:
    rng = RNG(seed)
    channels, per_channel = int(rng.integers(1, 9)), bool(seed % 2)
    s_w = f32(rng, 1e-4, 1, channels if per_channel else 1)
    alpha = f32(rng, 1e-3, 10, channels) * rng.choice(np.array([-1, 1, 1, 0], np.float32), channels)
    beta = np.float32(rng.normal(size=channels))
    bias = np.float32(rng.normal(size=channels)) if seed % 3 else None
    s_x, s_y = f32(rng, 1e-3, 1), f32(rng, 1e-3, 1)
    step, shift = ri.fold_batch_norm(
        tensor(s_w), tensor(alpha), tensor(beta), tensor(s_x), tensor(s_y), None if bias is None else tensor(bias)
    )
    wanted_step, wanted_shift = oracle.folded(s_w, alpha, beta, s_x, s_y, bias)
    assert step.numpy().tobytes() == wanted_step.tobytes()
    assert shift.tolist() == wanted_shift
    acc = rng.integers(-40000, 40000, (50, channels))
    b = np.clip(shift.numpy(), -(2**20), 2**20)
    z, (low, high) = int(rng.integers(0, 9)), [(0, 255), (-128, 127), (0, 15)][seed % 3]
    m = ri.multiplier(tensor(s_x), step, tensor(s_y))
    assert m.numpy().tobytes() == np.float32(np.float32(s_x * wanted_step) / s_y).tobytes()
    u = ri.scaled(tensor(acc), tensor(b), m).numpy()
    assert u.tobytes() == np.float32((acc + b).astype(np.float32) * m.numpy()).tobytes()
    got = ri.requantize(ri.scaled(tensor(acc), tensor(b), m), z, low, high)
    assert got.tolist() == oracle.integer_layer(acc, b, s_x, step.numpy(), s_y, z, low, high).tolist()


def test_codes_go_half_to_even_and_keep_a_relu() -> None:
    u = torch.tensor([-7.0, -0.5, 0.5, 1.5, 2.5, 300.0])
    assert ri.requantize(u, 0, 0, 255).tolist() == [0, 0, 0, 2, 2, 255]
    assert ri.requantize(u, 10, 10, 255).tolist() == [10, 10, 10, 12, 12, 255]  # ReLU: lo = z_y
    inside, step = ri.requantize_terms(torch.tensor([-1.0, 0.0, 0.75, 3.0, 4.0]), 0, 0, 3)
    assert inside.tolist() == [0, 0, 1, 0, 0]
    assert step.tolist() == [0, 0, 0.25, 3, 3]


def test_int32_is_judged_by_the_largest_possible_sum() -> None:
    codes, bias = torch.full((3, 2), 127), torch.tensor([0, 2**31 - 1 - 254 * 255, -(2**31) + 254 * 255])
    assert ri.fits_int32(codes, bias, 255).tolist() == [True, True, False]


@pytest.mark.parametrize("seed", range(10))
def test_additions_equal_exact_rationals(seed: int) -> None:
    rng = RNG(seed)
    s, z, (za, zb) = float(f32(rng, 1e-3, 1)), int(rng.integers(0, 256)), rng.integers(0, 256, 2).tolist()
    s_y = ri.safe_output_step(s, float(np.float32(s * rng.uniform(0.7, 3))), 510)
    a, b = (rng.integers(0, 256, 400) for _ in range(2))
    got = ri.add(tensor(a), tensor(b), (za, zb), ri.sum_codes(s, s_y, 510), z, 0, 255)
    assert got.tolist() == oracle.integer_add(a, b, za, zb, s, s_y, z, 0, 255).tolist()


def test_a_tie_of_an_addition_goes_to_the_even_code() -> None:
    assert ri.sum_codes(1.0, 2.0, 5).tolist() == [-2, -2, -2, -1, 0, 0, 0, 1, 2, 2, 2]


@pytest.mark.parametrize("seed", range(30))
def test_no_sum_comes_close_to_a_tie(seed: int) -> None:
    rng = RNG(seed)
    s = float(f32(rng, 1e-6, 1e3))
    wished = s * float(2.0 ** rng.integers(-2, 3)) if seed % 2 else float(np.float32(s * rng.uniform(0.3, 4)))
    s_y = ri.safe_output_step(s, wished, 510)
    assert s_y >= wished
    assert s_y == float(np.float32(s_y))
    assert min(oracle.distance_to_tie(n, s, s_y) for n in range(1, 511)) > 2.0**-13
    assert s_y / wished < 1.01


def test_a_step_that_is_none_is_refused() -> None:
    for step in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="must be positive and finite"):
            ri.safe_output_step(step, 1.0, 510)


@pytest.mark.parametrize("seed", range(10))
def test_averages_readers_and_tables_equal_the_oracle(seed: int) -> None:
    rng = RNG(seed)
    q, z_x, z = rng.integers(0, 256, (3, 4, 49)), int(rng.integers(0, 256)), int(rng.integers(0, 16))
    s, s_y = (float(f32(rng, 1e-3, 1)) for _ in range(2))
    got = ri.average(tensor(q), z_x, s, s_y, z, 0, 255)
    assert got[..., 0].tolist() == oracle.integer_average(q, z_x, s, s_y, z, 0, 255).tolist()
    got = ri.read(tensor(q), z_x, s, s_y, z, 0, 15)
    assert got.tolist() == oracle.integer_reader(q, z_x, s, s_y, z, 0, 15).tolist()
    table = ri.function_table(torch.nn.functional.silu, (0, 255), z_x, s, (0, 255), z, s_y)
    wanted = oracle.integer_table(lambda v: v / (1 + math.exp(-v)), 0, 255, z_x, s, s_y, z, 0, 255)
    assert np.abs(table.numpy() - wanted).max() <= 1
    assert (table.numpy() != wanted).mean() < 0.01


@pytest.mark.parametrize("seed", range(10))
def test_products_equal_exact_rationals(seed: int) -> None:
    rng = RNG(seed)
    (s_a, s_b, s_y), (za, zb, z) = f32(rng, 1e-3, 1, 3), rng.integers(0, 256, 3).tolist()
    s_y = np.float32(s_y * 10)
    a, b = rng.integers(0, 256, (3, 4, 50)), rng.integers(0, 256, (3, 4, 1))
    ratio = Fraction(float(s_a)) * Fraction(float(s_b)) / Fraction(float(s_y))
    got = ri.multiply(tensor(a), tensor(b), (za, zb), ratio, z, 0, 255)
    assert got.tolist() == oracle.integer_multiply(a, b, za, zb, s_a, s_b, s_y, z, 0, 255).tolist()


def test_ties_of_products_are_seen() -> None:
    """7 * 3 * 0.5 = 10.5 is one; a quotient 2^-22 of itself away from one, too; above the codes none counts."""
    every = ri.products(7, 3)
    assert every.tolist() == sorted({float(i * j) for i in range(1, 8) for j in range(1, 4)})
    assert ri.near_a_product_tie(every, 0.5, 255)
    assert not ri.near_a_product_tie(every[every % 2 == 0], 0.5, 255)
    assert not ri.near_a_product_tie(every[every == 21], 0.5, 9)
    for distance, near in ((2.0**-22, True), (2.0**-20, False)):
        assert ri.near_a_product_tie(every[every == 21], 0.5 * (1 + distance), 255) is near


@pytest.mark.parametrize("seed", range(10))
def test_averages_over_windows_equal_the_oracle(seed: int) -> None:
    rng = RNG(seed)
    q, z_x, z = rng.integers(0, 256, (2, 3, 7, 8)), int(rng.integers(0, 256)), int(rng.integers(0, 16))
    (s, s_y), kernel, stride = f32(rng, 1e-2, 1, 2), int(rng.integers(1, 4)), int(rng.integers(1, 3))
    sums = torch.conv2d(tensor(q).double() - z_x, torch.ones(3, 1, kernel, kernel).double(), stride=stride, groups=3)
    got = ri.average_windows(sums, kernel**2, float(s), float(s_y), z, 0, 255)
    assert got.tolist() == oracle.integer_average_windows(q, kernel, stride, z_x, s, s_y, z, 0, 255).tolist()


# ---- what the runtime computes ----


def run(nodes: list, constants: dict[str, Any], x: dict[str, np.ndarray], domain: bool = False) -> np.ndarray:
    """The output of a graph of uint8 tensors in ONNX Runtime."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, value.shape) for name, value in x.items()]
    output = helper.make_tensor_value_info(
        "y", TensorProto.UINT8, [f"d{i}" for i in range(next(iter(x.values())).ndim)]
    )
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, [output], initializers)
    opsets = [helper.make_opsetid("", 13), *([helper.make_opsetid("com.microsoft", 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, x)[0])


@pytest.mark.parametrize("seed", range(8))
def test_onnx_runtime_computes_layers_like_this(seed: int) -> None:
    rng = RNG(seed)
    n, c, o, k = 2, int(rng.integers(1, 20)), int(rng.integers(1, 20)), int(rng.choice([1, 3]))
    x, w = rng.integers(0, 256, (n, c, 7, 7), np.uint8), rng.integers(-63, 64, (o, c, k, k)).astype(np.int8)
    s_x, z_x, z_y = f32(rng, 1e-3, 1), int(rng.integers(0, 256)), int(rng.integers(0, 256))
    s_w = f32(rng, 1e-3, 1e-2, o) * rng.choice(np.array([-1, 1], np.float32), o)
    s_y = np.float32(s_x * 0.005 * 100 * math.sqrt(c) * k * rng.uniform(0.5, 2))  # outputs of some hundred codes
    b = rng.integers(-5000, 5000, o).astype(np.int32)
    constants = {"s_x": s_x, "z_x": np.uint8(z_x), "w": w, "s_w": s_w, "z_w": np.zeros(o, np.int8)}
    constants |= {"s_y": s_y, "z_y": np.uint8(z_y), "b": b}
    names = ["x", "s_x", "z_x", "w", "s_w", "z_w", "s_y", "z_y", "b"]
    node = helper.make_node("QLinearConv", names, ["y"], pads=[k // 2] * 4)
    got = run([node], constants, {"x": x})
    acc = torch.conv2d(tensor(x).double() - z_x, tensor(w).double(), padding=k // 2).to(torch.int64)
    m = ri.multiplier(tensor(s_x), tensor(s_w), tensor(s_y))
    wanted = ri.requantize(ri.scaled(acc, tensor(b), m), z_y, 0, 255)
    assert (got != wanted.numpy()).sum() == 0
    assert len(np.unique(got)) > 5


@pytest.mark.parametrize("seed", range(8))
def test_onnx_runtime_adds_like_this(seed: int) -> None:
    rng = RNG(seed)
    s = f32(rng, 1e-3, 1)
    s_y = np.float32(ri.safe_output_step(float(s), float(s * np.float32(rng.uniform(0.8, 2.2))), 510))
    za, zb, z = rng.integers(0, 256, 3).tolist()
    a, b = (v.astype(np.uint8).reshape(-1) for v in np.meshgrid(np.arange(256), np.arange(256)))
    constants = {"s": s, "za": np.uint8(za), "zb": np.uint8(zb), "s_y": s_y, "z": np.uint8(z)}
    node = helper.make_node(
        "QLinearAdd", ["a", "s", "za", "b", "s", "zb", "s_y", "z"], ["y"], domain="com.microsoft"
    )  # fmt: skip
    got = run([node], constants, {"a": a, "b": b}, domain=True)
    wanted = ri.add(tensor(a), tensor(b), (za, zb), ri.sum_codes(float(s), float(s_y), 510), z, 0, 255)
    assert (got != wanted.numpy()).sum() == 0


@pytest.mark.parametrize("seed", range(8))
def test_onnx_runtime_multiplies_like_this(seed: int) -> None:
    """All products of two codes, also of a tensor and a number for each channel."""
    rng = RNG(seed)
    (s_a, s_b), (za, zb, z) = f32(rng, 1e-3, 1, 2), rng.integers(0, 256, 3).tolist()
    s_y = torch.tensor(s_a * s_b * np.float32(rng.uniform(5, 256)))
    every = ri.products(255, 255)
    while ri.near_a_product_tie(every, float(s_a) * float(s_b) / float(s_y), 255):
        s_y = ri.raised(s_y)
    a, b = (v.astype(np.uint8).reshape(-1) for v in np.meshgrid(np.arange(256), np.arange(256)))
    constants = {"s_a": s_a, "za": np.uint8(za), "s_b": s_b, "zb": np.uint8(zb), "s_y": s_y.numpy(), "z": np.uint8(z)}
    names = ["a", "s_a", "za", "b", "s_b", "zb", "s_y", "z"]
    node = helper.make_node("QLinearMul", names, ["y"], domain="com.microsoft")
    ratio = Fraction(float(s_a)) * Fraction(float(s_b)) / Fraction(float(s_y))
    wide, by_channel = (
        np.tile(np.arange(256, dtype=np.uint8), (1, 256, 1)),
        np.arange(256, dtype=np.uint8)[None, :, None],
    )
    for x, y in ((a, b), (wide, by_channel)):
        got = run([node], constants, {"a": x, "b": y}, domain=True)
        wanted = ri.multiply(tensor(x), tensor(y), (za, zb), ratio, z, 0, 255)
        assert (got != wanted.numpy()).sum() == 0
    assert len(np.unique(got)) > 5


@pytest.mark.parametrize("seed", range(8))
def test_onnx_runtime_averages_like_this(seed: int) -> None:
    rng = RNG(seed)
    x = rng.integers(0, 256, (3, 16, 5 + seed, 7), np.uint8)
    s, s_y, z_x, z = f32(rng, 1e-2, 1), f32(rng, 1e-2, 1), int(rng.integers(0, 256)), int(rng.integers(0, 256))
    constants = {"s": s, "z_x": np.uint8(z_x), "s_y": s_y, "z": np.uint8(z)}
    node = helper.make_node(
        "QLinearGlobalAveragePool", ["x", "s", "z_x", "s_y", "z"], ["y"], domain="com.microsoft", channels_last=0
    )
    got = run([node], constants, {"x": x}, domain=True)
    wanted = ri.average(tensor(x), z_x, float(s), float(s_y), z, 0, 255)
    assert (got != wanted.numpy()).sum() == 0


@pytest.mark.parametrize("seed", range(8))
def test_onnx_runtime_reads_with_fewer_bits_like_this(seed: int) -> None:
    rng = RNG(seed)
    x, s, s_n, z = np.arange(256, dtype=np.uint8), f32(rng, 1e-3, 1), f32(rng, 1e-2, 10), int(rng.integers(0, 256))
    constants = {"s": s, "z": np.uint8(z), "s_n": s_n, "zero": np.uint8(0), "top": np.uint8(15)}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["v"]),
        helper.make_node("QuantizeLinear", ["v", "s_n", "zero"], ["q"]),
        helper.make_node("Min", ["q", "top"], ["y"]),
    ]
    got = run(nodes, constants, {"x": x})
    assert got.tolist() == ri.read(tensor(x), z, float(s), float(s_n), 0, 0, 15).tolist()
