"""The engines: which one serves, how the C++ one is built, and its layers over codes against float64 and threads."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
import oracle
from helpers import quantizer_only
from helpers.engines import DEVICE, ENGINES, assert_same
from helpers.layers import array, expected, ready
from lsquant import QuantSpec, kernels, ops
from lsquant.kernels.cpp import build

needs_cpp = pytest.mark.skipif(bool(kernels.why_not("cpp")), reason="the C++ engine cannot be built here")


# ---------------------------------------------------------------------------------------------- the choice


def test_a_forced_engine_serves_until_it_is_let_go() -> None:
    with lsquant.use_engine("eager"):
        assert kernels.engine_for("cpu").name == "eager"
        with lsquant.use_engine(None):
            assert kernels.engine_for("cpu").name == ("eager" if kernels.why_not("cpp") else "cpp")
        assert kernels.engine_for("cpu").name == "eager"


def test_an_unknown_engine_is_an_error_that_names_the_engines() -> None:
    with pytest.raises(lsquant.UsageError, match=r"fast.*eager, cpp"):
        lsquant.use_engine("fast")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    env.pop("LSQUANT_ENGINE", None) if "LSQUANT_ENGINE" not in environment else None
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


USE = """
import torch, lsquant
for _ in range(2): print(lsquant.fake_quantize(torch.tensor([0.8]), torch.tensor([0.5]), 0, 3, 1.0))
"""


def test_without_a_compiler_the_eager_engine_serves_and_says_so_once(tmp_path: Path) -> None:
    done = run(USE, LSQUANT_CACHE=str(tmp_path), PATH="", CXX="")
    assert done.stdout == "tensor([1.])\n" * 2
    assert done.stderr.count("engine cpp is off") == 1
    assert "no C++ compiler" in done.stderr


def test_a_forced_engine_that_cannot_run_is_an_error(tmp_path: Path) -> None:
    done = run(USE, LSQUANT_CACHE=str(tmp_path), PATH="", CXX="", LSQUANT_ENGINE="cpp")
    assert done.returncode != 0
    assert "UsageError" in done.stderr
    assert "no C++ compiler" in done.stderr


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho 'products.cpp:1: error: out of ideas' >&2\nexit 1\n")
    broken.chmod(0o755)
    done = run(USE, LSQUANT_CACHE=str(tmp_path / "cache"), CXX=str(broken))
    assert done.stdout == "tensor([1.])\n" * 2
    assert "out of ideas" in done.stderr
    assert not list((tmp_path / "cache").glob("*.so"))


def test_env_says_which_engine_is_forced() -> None:
    done = run("from lsquant.cli.main import main; main(['env'])", LSQUANT_ENGINE="eager")
    assert any(line.split() == ["engine_forced", "eager"] for line in done.stdout.splitlines())


def test_the_sanitized_engine_is_another_file_and_is_built_with_the_sanitizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no compiler")
    commands, files = [], []
    monkeypatch.setenv("LSQUANT_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", lambda command, folder, built: commands.append(build.sanitizer_flags()))
    for value in ("", "0", "1"):
        monkeypatch.setenv("LSQUANT_SANITIZE", value)
        files.append(build.library())
    assert files[0] == files[1] != files[2]
    assert commands[:2] == [(), ()]
    assert commands[2][0].startswith("-fsanitize=address,undefined")
    assert "-fno-sanitize-recover=all" in commands[2]


@needs_cpp
@pytest.mark.slow
def test_processes_that_start_together_build_once(tmp_path: Path) -> None:
    env = {**os.environ, "LSQUANT_CACHE": str(tmp_path)}
    both = [subprocess.Popen([sys.executable, "-c", USE], env=env, stdout=-1, stderr=-1, text=True) for _ in range(2)]
    said = [p.communicate() for p in both]
    assert [out for out, _ in said] == ["tensor([1.])\n" * 2] * 2
    assert sum("building" in error for _, error in said) == 1
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not list(tmp_path.glob("build-*"))


@needs_cpp
def test_denormals_survive_the_engine() -> None:
    lsquant.fake_quantize(torch.ones(4), torch.ones(1), -8, 7, 1.0)
    assert (torch.tensor([1e-40]) * torch.ones(1)).item() > 0


# ---------------------------------------------------------------------------------------------- layers over codes

# batch, channels, size, outputs, kernel, stride, padding, dilation: odd numbers, one pixel, more images than threads
GEOMETRIES = [
    (2, 16, 8, 16, (3, 3), 1, 1, 1), (3, 3, 9, 20, (3, 3), 2, 1, 1), (1, 5, 7, 33, (3, 1), 1, 2, 2),
    (2, 24, 5, 16, (1, 1), 1, 0, 1), (4, 7, 6, 5, (2, 3), 1, 0, 1), (17, 4, 6, 8, (3, 3), 2, 1, 1),
    (2, 1, 9, 17, (5, 5), 3, 2, 1), (1, 10, 1, 40, (1, 1), 1, 0, 1),
]  # fmt: skip
# bits and sign of the input, bits of the weight: with saturating pairs (8/8, 8/7) and the shortest chains
GRIDS = [(4, False, 4), (2, False, 2), (8, True, 8), (8, False, 8), (3, True, 5), (8, False, 7), (5, True, 2)]


def bounds(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def codes(v: Tensor, step: Tensor, low: int, high: int, z: float = 0.0) -> Tensor:
    return (torch.clamp(torch.round(v / step) + z, low, high) - z).double()


@needs_cpp
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_convolutions_are_the_exact_sum_rounded_once(geometry: tuple, grid: tuple) -> None:
    n, c, size, out, kernel, stride, padding, dilation = geometry
    signed, (low, high), (w_low, w_high) = grid[1], bounds(grid[0], grid[1]), bounds(grid[2], True)
    for layout, channel, bias, offset in itertools.product((0, 1), (0, 1), (0, 1), (0, 1) if not signed else (0,)):
        x, w = torch.randn(n, c, size, size), torch.randn(out, c, *kernel)
        x[0, 0, 0, 0], w[0] = 1e9, -1e9  # the extreme codes
        x = x.contiguous(memory_format=torch.channels_last) if layout else x
        s, sw = torch.tensor([2.0 / high]), torch.rand(out if channel else 1) * 0.1 + 1.0 / w_high
        b = torch.randn(out) if bias else None
        z = float(torch.clamp(torch.round(torch.tensor(0.7) / s), low, high)) if offset else 0.0
        grids = ops.Grid(s, low, high, 1.0, torch.tensor([-0.7]) if offset else None), ops.Grid(sw, w_low, w_high, 1.0)
        conv = ops.Conv([stride] * 2, [padding] * 2, [dilation] * 2)
        with lsquant.use_engine("cpp"):
            y = ops.convolution(x, w, b, *grids, conv)
        rows = sw.reshape(-1, 1, 1, 1)
        acc = F.conv2d(codes(x, s, low, high, z), codes(w, rows, w_low, w_high), None, stride, padding, dilation)
        wanted = acc.float() * (s * sw).reshape(-1, 1, 1)
        wanted = wanted if b is None else wanted + b.reshape(-1, 1, 1)
        assert torch.equal(y, wanted)
        if layout and c > 1 and size > 1:
            assert y.is_contiguous(memory_format=torch.channels_last)


@needs_cpp
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 3), (100, 64, 48), (33, 130, 17), (2, 3, 1030)], ids=str)
def test_linear_layers_are_the_exact_sum_rounded_once(shape: tuple, grid: tuple) -> None:
    rows, inputs, out = shape
    (low, high), (w_low, w_high) = bounds(grid[0], grid[1]), bounds(grid[2], True)
    x, w, b = torch.randn(rows, inputs), torch.randn(out, inputs), torch.randn(out)
    s, sw = torch.tensor([2.0 / high]), torch.rand(out) * 0.1 + 1.0 / w_high
    with lsquant.use_engine("cpp"):
        y = ops.linear(x, w, b, ops.Grid(s, low, high, 1.0), ops.Grid(sw, w_low, w_high, 1.0))
    acc = codes(x, s, low, high) @ codes(w, sw[:, None], w_low, w_high).t()
    assert torch.equal(y, acc.float() * (s * sw) + b)


@needs_cpp
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_gradient_of_a_convolutions_weight(geometry: tuple, layout: torch.memory_format) -> None:
    n, c, size, out, kernel, stride, padding, dilation = geometry
    x = torch.randn(n, c, size, size).contiguous(memory_format=layout)
    w = (torch.rand(out, c, *kernel) * 0.8 - 0.4).requires_grad_()  # all inside: its gradient is not masked
    s, sw = torch.tensor([0.3]), torch.tensor([0.1])
    conv = ops.Conv([stride] * 2, [padding] * 2, [dilation] * 2)
    with lsquant.use_engine("cpp"):
        y = ops.convolution(x, w, None, ops.Grid(s, -8, 7, 1.0), ops.Grid(sw, -8, 7, 1.0), conv)
        up = torch.randn(y.shape)
        (got,) = torch.autograd.grad(y, w, up)
    w64 = w.detach().double().requires_grad_()
    F.conv2d(codes(x, s, -8, 7) * s.double(), w64, None, stride, padding, dilation).backward(up.double())
    assert w64.grad is not None
    assert (got.double() - w64.grad).abs().max() <= 1e-5 * w64.grad.abs().max() * 4


# batch, channels, size, outputs, padding: odd sizes, a panel that is not full, fewer images than threads
@needs_cpp
@pytest.mark.parametrize(
    "shape", [(2, 32, 8, 32, 1), (3, 33, 7, 40, 1), (1, 50, 5, 32, 0), (2, 32, 6, 48, 2), (70, 64, 4, 64, 1)], ids=str
)
def test_the_gradient_of_a_convolutions_input(shape: tuple) -> None:
    n, c, size, out, padding = shape
    last = torch.channels_last
    x = (torch.rand(n, c, size, size + 1) * 0.8 - 0.4).contiguous(memory_format=last).requires_grad_()  # all inside
    w = torch.randn(out, c, 3, 3).contiguous(memory_format=last)
    s, sw = torch.tensor([0.1]), torch.tensor([0.3])
    conv = ops.Conv([1, 1], [padding] * 2, [1, 1])
    with lsquant.use_engine("cpp"):
        y = ops.convolution(x, w, None, ops.Grid(s, -8, 7, 1.0), ops.Grid(sw, -8, 7, 1.0), conv)
        up = torch.randn(y.shape).contiguous(memory_format=last)
        assert kernels.engine_for().input_gradient(up, x, w, conv) is not None, "the fused one is what is tested"
        (got,) = torch.autograd.grad(y, x, up)
    x64 = x.detach().double().requires_grad_()
    F.conv2d(x64, codes(w, sw, -8, 7) * sw.double(), None, 1, padding).backward(up.double())
    assert x64.grad is not None
    assert got.is_contiguous(memory_format=last)
    assert (got.double() - x64.grad).abs().max() <= 1e-6 * x64.grad.abs().max() * 8


@pytest.mark.parametrize("engine", ["eager", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (3, 16, 6, 6), (70, 128, 2, 2), (2, 7, 5), (2, 3, 4, 5, 6), (0, 4, 2, 2)])
def test_batch_norm_in_eval_mode_rounds_twice(shape: tuple, dtype: torch.dtype, engine: str) -> None:
    x, alpha, beta = torch.randn(shape).to(dtype), torch.randn(shape[1]), torch.randn(shape[1])
    place = (-1, *[1] * (len(shape) - 2))
    a, b = (t.numpy().reshape(place) for t in (alpha, beta))
    product = x.float().numpy() * a  # NumPy rounds every operation by itself
    wanted = torch.from_numpy(product + b).to(dtype)
    layouts = [x, x.transpose(0, -1).contiguous().transpose(0, -1)]
    if x.dim() == 4:
        layouts.append(x.contiguous(memory_format=torch.channels_last))
    with lsquant.use_engine(engine):
        for given in layouts:
            y = ops.scale_shift(given, alpha, beta)
            assert y.dtype == dtype
            assert y.stride() == torch.empty_like(given).stride()
            assert_same(y, wanted)


@needs_cpp
def test_layers_have_the_same_bits_for_any_number_of_threads() -> None:
    x = torch.randn(9, 20, 14, 14).contiguous(memory_format=torch.channels_last)
    w, s, sw = torch.randn(40, 20, 3, 3), torch.tensor([0.3]), torch.tensor([0.1])
    up = torch.randn(9, 40, 14, 14).contiguous(memory_format=torch.channels_last)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with lsquant.use_engine("cpp"):
                grids = ops.Grid(s, -8, 7, 1.0), ops.Grid(sw, -8, 7, 1.0)
                y = ops.convolution(x, w, None, *grids, ops.Conv([1, 1], [1, 1], [1, 1]))
            numbers = (x, s, None, -8, 7, [3, 3], [1, 1], [1, 1], [1, 1])
            of_x = torch.ops.lsquant_cpp.input_gradient(up, w, list(x.shape), [1, 1])
            found.append((y, torch.ops.lsquant_cpp.weight_gradient(up, *numbers), of_x))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---------------------------------------------------------------------------------------------- every engine

LAYERS = {
    "linear": (nn.Linear(24, 16), (5, 24)),
    "convolution": (nn.Conv2d(3, 8, 3, padding=1, stride=2), (2, 3, 9, 9)),
    "grouped convolution": (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    "transposed convolution": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5, 5)),
    "wide convolution": (nn.Conv2d(32, 32, 3, padding=1, bias=False), (2, 32, 6, 6)),
}


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "reference"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_layers_give_the_same_outputs_and_gradients_over_every_engine(
    layer: str, granularity: str, engine: str
) -> None:
    source, shape = LAYERS[layer]
    device = DEVICE if engine == "triton" else "cpu"
    found = []
    for name in ("reference", engine):
        torch.manual_seed(1)
        x = torch.randn(shape)
        weight = QuantSpec(4, signed=True, granularity=granularity)
        model = nn.Sequential(copy.deepcopy(source))
        lsquant.prepare(model, lsquant.Recipe(weight, QuantSpec(4, offset=True)))
        lsquant.calibrate(model, [x])
        with lsquant.use_engine("eager") if name == "reference" else contextlib.nullcontext():
            at = "cpu" if name == "reference" else device
            x = x.to(at).contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
            x.requires_grad_()
            y = model.to(at)(x)
            up = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(at)
            leaves = [x, *model.parameters()]
            found.append([t.cpu() for t in (y.detach(), *torch.autograd.grad(y, leaves, up))])
    (wanted, *gradients), (got, *others) = found
    assert_same(got, wanted)
    for a, b in zip(gradients, others, strict=True):
        assert b.shape == a.shape
        loose = 1e-5 if a.dim() > 1 else 1e-4  # sums of steps cancel
        assert (b - a).abs().max() <= loose * a.abs().max()


def test_an_engine_says_itself_what_it_leaves_to_the_defaults() -> None:
    mine, x, one = quantizer_only.ENGINE, torch.ones(2, 3, 4, 4), torch.ones(1)
    grid, conv = kernels.Grid(one, -8, 7), kernels.Conv([1, 1], [0, 0], [1, 1])
    assert mine.fake_quantize(x, grid) is None
    assert mine.linear(x, grid, torch.ones(5, 4), grid, None) is None
    assert mine.convolution(x, grid, torch.ones(5, 3, 3, 3), grid, None, conv) is None
    assert mine.weight_gradient(torch.ones(2, 5, 2, 2), x, grid, [3, 3], conv) is None
    assert mine.input_gradient(torch.ones(2, 5, 2, 2), x, torch.ones(5, 3, 3, 3), conv) is None
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (kernels.Engine,), {})()


# ---------------------------------------------------------------------------------------------- float64


@pytest.mark.parametrize("engine", ["eager", "cpp"])
def test_float64_is_quantized_in_float32(engine: str) -> None:
    x = torch.randn(3, 40, dtype=torch.float64).requires_grad_()
    step, upstream = torch.tensor([0.3], requires_grad=True), torch.randn(3, 40, dtype=torch.float64)
    y = lsquant.fake_quantize(x, step, -8, 7, 0.5)
    of_x, of_step = torch.autograd.grad(y, [x, step], upstream)
    case = (array(x), array(step), -8, 7)
    assert_same(y.detach(), torch.tensor(oracle.fake_quantize(*case)).double())
    assert_same(of_x, torch.tensor(oracle.element_gradient(array(upstream), *case)).double())
    assert of_step.item() == pytest.approx(oracle.step_gradient(array(upstream), *case, 0.5)[0][0], rel=1e-5)


@pytest.mark.parametrize("engine", ["eager", "cpp"])
def test_a_model_in_float64(engine: str) -> None:
    """Outputs and gradients are the oracle's for the values rounded to float32."""
    conv, head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 25, 4)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = ready(nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head).double(), x)
    layers, y = (model[0], model[3]), model(x)
    hidden = expected(layers[0], x).double()
    inputs = (x, hidden.relu().flatten(1))
    assert_same(model[0](x).detach(), hidden)
    assert_same(y.detach(), expected(layers[1], inputs[1]).double())

    y.square().sum().backward()
    cases = [[(array(v), array(q.step), q.q_min, q.q_max) for v, q in ((x, layer.input_quantizer),
             (layer.weight, layer.weight_quantizer))] for x, layer in zip(inputs, layers, strict=True)]  # fmt: skip
    hats = [[torch.tensor(oracle.fake_quantize(*case)).double() for case in pair] for pair in cases]
    up = 2 * y.detach()
    of_hidden = torch.tensor(oracle.element_gradient(up @ hats[1][1], *cases[1][0])).reshape(hidden.shape)
    hats[0][1].requires_grad_()
    F.conv2d(hats[0][0], hats[0][1], padding=1).backward(of_hidden * (hidden > 0))
    for layer, case, of_hat in zip(layers, cases, (hats[0][1].grad, up.t() @ hats[1][0]), strict=True):
        wanted = torch.tensor(oracle.element_gradient(of_hat, *case[1])).double()
        assert wanted.abs().max() > 0.1
        assert (layer.weight.grad - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        assert {q.step.grad.dtype for q in layer.own_quantizers()} == {torch.float32}
