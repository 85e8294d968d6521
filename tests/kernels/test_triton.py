"""The Triton engine beside the shared table of cases: its choice, tiles, compiled kernels and linear layers.

No test here needs a GPU: kernels are compiled for one and read, and run by Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

import lsquant
from helpers.engines import DEVICE
from lsquant import kernels, ops
from lsquant.kernels import Grid, triton

needs_triton = pytest.mark.skipif(bool(kernels.why_not("triton")), reason=kernels.why_not("triton"))


def run(code: str, **environment: str) -> str:
    env = {**os.environ, "TRITON_INTERPRET": "0", **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------- the choice


OFF = """
import sys
import lsquant
from lsquant import kernels

sys.modules["triton"] = None
print(kernels.why_not("triton"))
del sys.modules["triton"]
print(kernels.why_not("triton"))
try:
    lsquant.use_engine("triton")
except lsquant.UsageError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@needs_triton
def test_it_says_why_it_is_off() -> None:
    missing, alone, forced = run(OFF).splitlines()
    assert missing.startswith("Triton, which comes with PyTorch for CUDA, is not installed")
    assert alone == "there is no CUDA device"
    assert "use_engine('triton')" in forced
    assert alone in forced


@needs_triton
def test_a_tensor_that_it_cannot_reach_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton._arithmetic(), "INTERPRETED", False)
    with pytest.raises(lsquant.UsageError, match="on cpu"):
        triton.ENGINE.quantize(torch.ones(3), Grid(torch.ones(1), -8, 7))


# ---------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("steps", [1, 3, 64, 130])
@pytest.mark.parametrize("inner", [1, 3, 31, 32, 300, 70000])
@pytest.mark.parametrize("outer", [1, 2, 257, 100000])
def test_tiles_cover_the_elements_and_no_chain_is_longer_than_256(outer: int, steps: int, inner: int) -> None:
    x = torch.empty(outer, steps, inner, device="meta")
    m = triton._matrix(x, Grid(torch.empty(steps, device="meta"), -8, 7, axis=1))
    (rows, columns), (down, across) = m.tile, m.tiles
    assert m.count == outer * steps * inner <= m.rows * m.columns < m.count + 128
    assert rows * down >= m.rows
    assert columns * across >= m.columns
    assert (rows if m.by == "column" else columns) <= 256
    assert rows * columns <= 2048
    assert {bin(n).count("1") for n in (rows, columns)} == {1}


@needs_triton
def test_tiles_are_added_in_float64() -> None:
    """Terms 2^30, 300 ones each in a part of its own, -2^30: float32 sums would lose the ones."""
    up = torch.zeros(302, 128)
    up[:, 5] = torch.tensor([2.0**30, *[1.0] * 300, -(2.0**30)])
    x, step = torch.full((302, 128), 9.0, device=DEVICE), torch.ones(1, device=DEVICE)
    with np.errstate(all="ignore"):
        _, of_step, _ = triton.ENGINE.quantize_backward(up.to(DEVICE), x, Grid(step, -2, 1))
    assert of_step.item() == 300.0


@needs_triton
@pytest.mark.parametrize("shape", [(64, 48), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_memory_is_reused_on_demand(shape: tuple, dtype: torch.dtype) -> None:
    x, up = torch.randn(shape, device=DEVICE), torch.randn(shape, device=DEVICE).to(dtype)
    args = (x.to(dtype), Grid(torch.tensor([0.2], device=DEVICE), -8, 7, 0.1))
    with np.errstate(all="ignore"):
        kept = triton.ENGINE.quantize_backward(up, *args)
        again = triton.ENGINE.quantize_backward(up.clone(), *args)
        mine = up.clone()
        reused = triton.ENGINE.quantize_backward(mine, *args, reuse=True)
        float_up = triton.ENGINE.quantize_backward(up.float(), *args, reuse=True)  # as the matrix products give it
    assert reused[0].data_ptr() == mine.data_ptr() != kept[0].data_ptr()
    for other in (again, reused, float_up):
        assert torch.equal(kept[0], other[0])
        assert torch.equal(kept[1], other[1])


# ---------------------------------------------------------------------------------------------- the compiler

# compiles kernels for a GPU that need not be there and prints what the assembler is given
COMPILE = """
import json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lsquant.kernels.triton import arithmetic

def ptx(name, constants, **types):
    kernel = getattr(arithmetic, name)
    types = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"enable_fp_fusion": False}).asm["ptx"]

numbers = dict.fromkeys(("fixed", "q_min", "q_max", "shift"), "fp32")
floats = dict.fromkeys(("step", "zero", "sums", "bad", "scale"), "*fp32")
found = {}
for by, of in (("tensor", "fp32"), ("row", "fp16"), ("column", "bf16")):
    tile = {"BY": by, "ROWS": 8, "COLUMNS": 128}
    data = dict.fromkeys(("x", "y", "up", "grad"), "*" + of)
    found["forward " + by] = ptx("forward", {**tile, "bad": None}, **numbers, **floats, **data)
    flags = {"LEARNED": True, "IN_PLACE": by == "row"}
    found["backward " + by] = ptx("backward", {**tile, **flags}, **numbers, **floats, **data)
found["codes"] = ptx("forward", tile | {"zero": None}, **numbers, **floats, x="*fp32", y="*i8")
types = {**floats, "sums": "*i32", "more": "*i32", "bias": "*fp32", "y": "*fp32"}
found["finish"] = ptx("finish", {"ROWS": 8, "COLUMNS": 128}, **types)
json.dump(found, sys.stdout)
"""


@needs_triton
def test_compiled_kernels_divide_and_round_as_written() -> None:
    """True divisions, the two additions that round, each operation rounded once, denormals kept, no atomics."""
    found = json.loads(run(COMPILE))
    assert len(found) == 8
    for name, text in found.items():
        for never in ("fma.", ".ftz", ".approx", "div.full", "rcp", "atom", "red.global"):
            assert never not in text, f"{name}: {never}"
        assert "mul.f32" not in text, f"{name}: a product without a rounding may be contracted"
        assert "add.f32" not in text, f"{name}: a sum without a rounding may be contracted"
        assert "mul.rn.f32" in text or name == "codes"
        if name != "finish":
            assert text.count("div.rn.f32") == 8
            assert min(text.count("0f4B400000"), text.count("0fCB400000")) >= 8, f"{name}: 1.5 * 2^23"


@needs_triton
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_kernels_are_launched_without_contraction(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *args, **options: asked.append((grid, options["enable_fp_fusion"]))

    monkeypatch.setattr(triton._arithmetic(), name, Kernel())
    x, step = torch.ones(5000, device=DEVICE), torch.ones(1, device=DEVICE)
    if name == "forward":
        triton.ENGINE.quantize(x, Grid(step, -8, 7))
    else:
        triton.ENGINE.quantize_backward(x, x, Grid(step, -8, 7))
    assert asked == [((3,), False)]


# torch.compile traces for a GPU that is not there; what it would compile is printed
TRACE = """
import torch, torch.utils._triton
torch.utils._triton.has_triton = lambda: True
import torch._dynamo
from torch._subclasses import FakeTensorMode
import lsquant
from lsquant import kernels, ops
from lsquant.kernels import triton
triton.TritonEngine.why_not = lambda self: ""
kernels.choice._forced = None  # whatever the suite runs under

def show(graph, inputs):
    print([str(node.target) for node in graph.graph.nodes])
    return graph.forward

with FakeTensorMode(allow_non_fake_inputs=True):
    x, s = torch.empty(6, 40, device="cuda"), torch.empty(6, device="cuda")
    for f in (lambda x, s: lsquant.fake_quantize(x, s, -8, 7, 0.1, axis=0, offset=-s).relu(),
              lambda x, s: ops.quantize._backward(x, x, s, -8, 7, 0.1, 0, None, 0, None, s)):
        for dynamic in (False, True):
            torch._dynamo.reset()
            torch.compile(f, fullgraph=True, dynamic=dynamic, backend=show)(x, s)
    torch._dynamo.reset()
    kernels.choice._forced = "eager"
    torch.compile(lambda x, s: lsquant.fake_quantize(x, s, -8, 7, 0.1, axis=0), fullgraph=True, backend=show)(x, s)
"""


@needs_triton
def test_the_compiler_sees_the_kernels() -> None:
    *shown, eager = run(TRACE).splitlines()
    assert len(shown) == 4
    for graph in shown:
        assert graph.count("triton_kernel_wrapper") == 1
        assert "lsquant" not in graph
    assert "triton_kernel_wrapper" not in eager
    assert eager.count("lsquant") == 1


# ---------------------------------------------------------------------------------------------- linear layers


def codes(v: Tensor, step: Tensor, low: int, high: int, z: float = 0.0) -> Tensor:
    return (torch.clamp(torch.round(v / step) + z, low, high) - z).double()


# without instructions for bytes a CPU's integer product saturates for 8-bit weights: the weights here have 7
GRIDS = [(0, 15, -8, 7), (-8, 7, -64, 63), (0, 255, -64, 63), (-128, 127, -4, 3)]


@needs_triton
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("channel", [False, True])
def test_linear_layers_are_the_exact_sum_rounded_once(
    grid: tuple, offset: bool, channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "_fits", lambda *args: True)
    low, high, w_low, w_high = grid
    for dtype, bias in ((torch.float32, True), (torch.bfloat16, False)):
        x, w = torch.randn(3, 7, 136).to(dtype), torch.randn(24, 136)
        x[0, 0, 0], w[0] = 1e9, -1e9  # the extreme codes
        s, sw = torch.tensor([3.0 / high]), torch.rand(24 if channel else 1) * 0.1 + 1.0 / w_high
        b, beta = torch.randn(24) if bias else None, torch.tensor([-0.7]) if offset else None
        z = 0.0 if beta is None else float(torch.clamp(torch.round(-beta / s), low, high))
        moved = [None if t is None else t.to(DEVICE) for t in (x, w, b, s, beta, sw)]
        with np.errstate(all="ignore"):
            x_grid, w_grid = Grid(moved[3], low, high, offset=moved[4]), Grid(moved[5], w_low, w_high)
            y = triton.ENGINE.linear(moved[0], x_grid, moved[1], w_grid, moved[2])
        assert y is not None
        acc = codes(x.float(), s, low, high, z) @ codes(w, sw[:, None], w_low, w_high).t()
        wanted = acc.float() * (s * sw)
        assert torch.equal(y.cpu(), wanted if b is None else wanted + b)


@needs_triton
def test_what_is_not_finite_poisons_the_outputs_that_it_feeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_fits", lambda *args: True)
    x, w, s = torch.randn(20, 304), torch.randn(16, 304), torch.full((16,), 0.1)
    x[3, 290], x[5, 1], w[7, 150], s[9] = torch.nan, -torch.inf, torch.inf, torch.nan
    x, w, s, step = (t.to(DEVICE) for t in (x, w, s, torch.tensor([0.1])))
    with np.errstate(all="ignore"):
        y = triton.ENGINE.linear(x, Grid(step, -8, 7), w, Grid(s, -8, 7), torch.zeros(16, device=DEVICE))
    bad = torch.zeros(20, 16, dtype=torch.bool)
    bad[[3, 5]], bad[:, [7, 9]] = True, True
    assert y is not None
    assert torch.equal(y.isnan().cpu(), bad)


def test_products_it_cannot_take_are_left_to_floating_point() -> None:
    def fits(rows: int = 32, inputs: int = 64, out: int = 16, cuda: bool = True, x=(0, 255), w=(-128, 127)) -> bool:
        given = SimpleNamespace(is_cuda=cuda, numel=lambda: rows * inputs)
        weight, step = torch.empty(out, inputs, device="meta"), torch.ones(1)
        return triton._fits(given, Grid(step, *x), weight, Grid(step, *w))  # type: ignore[arg-type]

    assert fits()
    assert fits(inputs=32768)
    assert not fits(cuda=False)  # a CPU's integer product may saturate
    assert not fits(rows=16)
    assert not fits(inputs=60)
    assert not fits(out=20)
    assert not fits(inputs=65536)  # int32
    assert not fits(w=(0, 255))
    assert not fits(inputs=0)
    assert not fits(out=0)


@needs_triton
def test_a_layer_of_modules_through_the_engine() -> None:
    """Forward and backward of the layers with the quantizer from this engine, products in floating point over codes."""
    x, w = torch.randn(9, 24), torch.randn(16, 24)
    grids = ops.Grid(torch.tensor([0.3]), -8, 7, 0.5), ops.Grid(torch.rand(16) * 0.1 + 0.1, -8, 7, 0.5)
    found = []
    for name in ("eager", "triton"):
        leaves = [t.clone().requires_grad_() for t in (x, w, grids[0].step, grids[1].step)]
        with lsquant.use_engine(name), np.errstate(all="ignore"):
            put = [t.to(DEVICE if name == "triton" else "cpu") for t in leaves]
            y = ops.linear(put[0], put[1], None, grids[0]._replace(step=put[2]), grids[1]._replace(step=put[3]))
            found.append([y.cpu(), *torch.autograd.grad(y.sum() * 0.5, leaves)])
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
