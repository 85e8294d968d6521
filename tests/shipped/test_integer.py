"""The integer model: what it holds, that its outputs are the trained ones, and that it goes into files."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers import layers, layers_more
from helpers.engines import assert_same
from helpers.layers import ready
from helpers.layers_more import KINDS, LAYERS, made
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.shipped import FrozenQuantizer
from lsquant.verification.verdict import different

CHANNEL = QuantSpec(4, granularity="channel")
OFFSET = QuantSpec(4, offset=True)
GROUP = QuantSpec(3, granularity="group", group_size=4)
LAST = Rule("last", None, None)
engines = pytest.mark.parametrize("engine", ["eager", "cpp"])


@torch.no_grad()
def run(model: nn.Module, *inputs: Any) -> Tensor:
    return model(*inputs)


def assert_equal_bits(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert got.unique().numel() > 2
    assert not different(got.float().numpy(), want.float().numpy()).any()


# ---- every layer that trains ----


@engines
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_equal_the_oracle(name: str, kind: str, engine: str) -> None:
    """Convolutions of one and three dimensions, transposed ones, transformers' Conv1D."""
    layer, x = made(name, kind)
    assert_same(run(lsquant.to_integer(layer), x), layers_more.expected(layer, x))


MORE: dict[str, tuple[Any, tuple[int, ...], Any, Any]] = {
    "linear": (lambda: nn.Linear(12, 5), (3, 12), 4, 4),
    "linear, groups": (lambda: nn.Linear(12, 5), (2, 3, 12), GROUP, 5),
    "linear, LSQ+, groups": (lambda: nn.Linear(12, 5, bias=False), (7, 12), GROUP, QuantSpec(3, offset=True)),
    "linear, unsigned weights": (lambda: nn.Linear(12, 5), (7, 12), QuantSpec(5, signed=False), 8),
    "linear, 8 bits": (lambda: nn.Linear(300, 5), (7, 300), 8, 8),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6), CHANNEL, 4),
    "conv, depthwise": (lambda: nn.Conv2d(4, 8, 3, 2, 1, groups=4), (2, 4, 5, 6), CHANNEL, 8),
    "conv, same, circular": (lambda: nn.Conv2d(4, 6, 2, padding="same", padding_mode="circular"), (2, 4, 5, 6), 2, 3),
}  # fmt: skip


@engines
@pytest.mark.parametrize("name", MORE)
def test_more_layers_equal_the_oracle(name: str, engine: str) -> None:
    make, shape, weight, activation = MORE[name]
    x = torch.randn(shape) + 0.2
    layer = ready(make(), x, weight, activation)
    assert_same(run(lsquant.to_integer(layer), x), layers.expected(layer, x))


# what is compared with the trained layer: floating point takes part, or groups of a convolution
IN_FLOAT: dict[str, tuple[Any, tuple[int, ...], Any, Any]] = {
    "weights only": (lambda: nn.Linear(12, 5), (3, 12), GROUP, None),
    "input only": (lambda: nn.Linear(12, 5), (3, 12), None, 4),
    "conv, weights only": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6), CHANNEL, None),
    "conv, input only": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same"), (2, 4, 5, 6), None, OFFSET),
    "conv, groups": (lambda: nn.Conv2d(4, 6, 2), (2, 4, 5, 6), GROUP, 4),
    "transposed, weights only": (lambda: nn.ConvTranspose2d(4, 6, 3, 2), (2, 4, 5, 6), CHANNEL, None),
    "Conv1D, weights only": (lambda: layers_more.conv1d_of_transformers(5, 12), (3, 12), CHANNEL, None),
}  # fmt: skip


@engines
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*IN_FLOAT, "linear", "conv"])
def test_types(name: str, dtype: torch.dtype, engine: str) -> None:
    make, shape, weight, activation = {**MORE, **IN_FLOAT}[name]
    x = torch.randn(shape).to(dtype)
    layer = ready(make().to(dtype), x, weight, activation).eval()
    want = run(layer, x)
    assert want.dtype == dtype
    assert_equal_bits(run(lsquant.to_integer(layer), x), want)
    if len(shape) == 4:
        assert_equal_bits(run(lsquant.to_integer(layer), x[0]), run(layer, x[0]))
        last = x.contiguous(memory_format=torch.channels_last)
        assert_equal_bits(run(lsquant.to_integer(layer), last), run(layer, last))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [QuantSpec(4), CHANNEL, GROUP, QuantSpec(8, signed=False)], ids=str)
def test_embedding(spec: QuantSpec, dtype: torch.dtype) -> None:
    model, tokens = nn.Sequential(nn.Embedding(9, 8, padding_idx=2)).to(dtype), torch.randint(9, (3, 4))
    lsquant.prepare(model, Recipe(spec, None))
    frozen = lsquant.to_integer(model)
    assert frozen[0].codes.shape == (9, 8)  # type: ignore[union-attr]
    for indices in (tokens, tokens[0, 0], tokens[:0]):
        got, want = run(frozen, indices), run(model.eval(), indices)
        assert got.shape == want.shape
        assert got.dtype == want.dtype == dtype
        assert torch.equal(got, want)


WEIGHTS = {
    "linear": lambda: nn.Linear(3, 2), "conv": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), "embedding": lambda: nn.Embedding(5, 3),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_can_be_read_as_the_float_layers(name: str, dtype: torch.dtype) -> None:
    """transformers' models cast their input to the type of a weight.  Codes times step, in the layer's own layout."""
    model = nn.Sequential(WEIGHTS[name]()).to(dtype)
    lsquant.prepare(model, Recipe(CHANNEL, None))
    layer = copy.deepcopy(lsquant.to_integer(model)[0])
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight, model[0].dequantized_weight().to(dtype))
    assert not [key for key in layer.state_dict() if key in ("weight", "like")]
    assert layer.to(torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("granularity", ["channel", "group"])
@pytest.mark.parametrize("groups", [1, 4])
def test_weights_alone_round_as_the_trained_layer_in_channels_last(granularity: Any, groups: int) -> None:
    """PyTorch's float convolution rounds by the memory format of the weight; found by the fuzzer."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups))
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    size = 3 if granularity == "group" else None
    lsquant.prepare(model, Recipe(QuantSpec(6, granularity=granularity, group_size=size)))
    for seed in range(10):
        x = torch.randn(3, 4, 9, 7, generator=torch.Generator().manual_seed(seed))
        assert_equal_bits(run(lsquant.to_integer(model), x), run(model.eval(), x))


def test_weights_alone_of_a_transposed_convolution_in_channels_last() -> None:
    """With groups its weight has a dimension of 1, whose stride PyTorch reads as a memory format."""
    torch.manual_seed(1345)
    model = nn.Sequential(nn.ConvTranspose2d(4, 2, (3, 2), groups=2, bias=False))
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    lsquant.prepare(model, Recipe(QuantSpec(4)))
    frozen = lsquant.to_integer(model)
    for seed in range(20):
        x = torch.randn(3, 8, 2, 2, generator=torch.Generator().manual_seed(seed))[:, ::2]
        assert_equal_bits(run(frozen, x), run(model.eval(), x))


def test_output_size_of_a_transposed_convolution() -> None:
    layer, x = made("transposed2d", "LSQ+, channel")
    frozen = lsquant.to_integer(layer)
    assert run(frozen, x).shape == (2, 6, 10, 8)
    assert_same(run(frozen, x, [9, 8]), layers_more.expected(layer, x, (0, 1)))
    with pytest.raises(UsageError, match="out of reach"):
        frozen(x, [11, 8])


# ---- a network ----


class Network(nn.Module):
    """Convolution with BatchNorm, a lone quantizer, a residual; the last layer shares a weight with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twin, self.pool = nn.Conv2d(4, 4, 1), nn.AvgPool2d(2)
        self.lone = lsquant.Quantizer(QuantSpec(5), count=4)
        self.embed, self.head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
        self.head.weight = self.embed.weight
        self.last = nn.Linear(10, 3)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5, 0.1]))
            self.norm.running_mean.normal_()  # type: ignore[union-attr]

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        y = self.lone(self.pool(y + self.twin(y)))
        return self.last(self.head(y.flatten(1) + self.embed(tokens)))


def network(seed: int = 0, positive: bool = True) -> tuple[Network, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model, x = Network(), (torch.randn(6, 3, 4, 4), torch.randint(10, (6,)))
    image = x[0].abs() if positive else x[0]
    lsquant.prepare(model, Recipe(CHANNEL, 4, rules=[LAST, Rule("twin", 3, 8)]))
    lsquant.calibrate(model, [(image, x[1])], forward=lambda m, batch: m(*batch))
    return model, (image, x[1])


def test_what_it_holds() -> None:
    model, _ = network()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    frozen = lsquant.to_integer(model)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert frozen.training is False
    state = frozen.state_dict()
    assert state["conv.weight_quantizer.codes"].dtype == torch.int8
    assert sorted(name for name in state if name.startswith("conv.")) == [
        "conv.bias", "conv.input_quantizer.bounds", "conv.input_quantizer.step", "conv.weight_quantizer.bounds",
        "conv.weight_quantizer.codes", "conv.weight_quantizer.step",
    ]  # fmt: skip
    assert {n for n, p in frozen.named_parameters()} == {"last.weight", "last.bias"}
    floats = {n: t.numel() for n, t in state.items() if t.is_floating_point() and not n.endswith(".step")}
    assert floats == {
        "last.weight": 30,
        "last.bias": 3,
        "conv.bias": 4,
        "twin.bias": 4,
        "norm.alpha": 4,
        "norm.beta": 4,
    }
    codes, step, _ = model.conv.integer_weight()  # type: ignore[operator]
    assert torch.equal(state["conv.weight_quantizer.codes"], codes)
    assert torch.equal(state["conv.weight_quantizer.step"], step)
    assert frozen.head.weight_quantizer is frozen.embed.weight_quantizer  # type: ignore[union-attr]
    assert not any(isinstance(m, (lsquant.Quantizer, lsquant.nn.QuantizedLayer)) for m in frozen.modules())
    assert isinstance(frozen.lone, FrozenQuantizer)
    assert "codes [4, 3, 3, 3]" in str(frozen)
    assert frozen.conv.stride == (1, 1)  # type: ignore[union-attr]


@engines
def test_a_network_equals_the_trained_one(engine: str) -> None:
    model, x = network()
    assert_equal_bits(run(lsquant.to_integer(model), *x), run(model.eval(), *x))
    packed = copy.deepcopy(model)
    model.half()
    assert_equal_bits(run(lsquant.to_integer(model), x[0].half(), x[1]), run(model, x[0].half(), x[1]))
    with torch.autocast("cpu"):
        assert_equal_bits(run(lsquant.to_integer(packed), *x), run(packed, *x))


def test_an_integer_model_of_a_packed_file(tmp_path: Path) -> None:
    model, x = network()
    lsquant.export_packed(model, tmp_path / "p")
    frozen = lsquant.to_integer(lsquant.load_packed(Network(), tmp_path / "p"))
    assert_equal_bits(run(frozen, *x), run(model.eval(), *x))


def test_state_dicts_go_through_files() -> None:
    """Into an integer model made from other weights, with signs decided otherwise and other bits."""
    model, x = network()
    other, _ = network(1, positive=False)
    assert lsquant.prepare(
        other, Recipe(QuantSpec(6, granularity="channel"), 4, rules=[Rule("last", None, None), Rule("twin", 2, 4)])
    )
    lsquant.calibrate(other, [x], forward=lambda m, batch: m(*batch))
    target, want = lsquant.to_integer(other), run(lsquant.to_integer(model), *x)
    assert not torch.equal(run(target, *x), want)
    buffer = io.BytesIO()
    torch.save(lsquant.to_integer(model).state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer))
    assert_equal_bits(run(target, *x), want)
    buffer = io.BytesIO()
    torch.save(target, buffer)
    buffer.seek(0)
    assert_equal_bits(run(torch.load(buffer, weights_only=False), *x), want)


def test_unsigned_codes_into_signed_ones() -> None:
    """200 is no int8."""
    x, models = torch.randn(4, 6), []
    for signed in (False, True):
        layer = nn.Linear(6, 3)
        layer.weight.data.abs_()
        models.append(ready(layer, x, QuantSpec(8, signed=signed), 4))
        models[-1].weight_quantizer.step.data.mul_(0.05)
    want, target = run(lsquant.to_integer(models[0]), x), lsquant.to_integer(models[1])
    state = lsquant.to_integer(models[0]).state_dict()
    assert int(state["weight_quantizer.codes"].max()) > 127
    target.load_state_dict(state)
    assert_equal_bits(run(target, x), want)


def test_steps_keep_their_type() -> None:
    model, _ = network()
    frozen = lsquant.to_integer(model).to(torch.bfloat16)
    for name, t in frozen.state_dict().items():
        kinds = {
            "step": torch.float32,
            "alpha": torch.float32,
            "beta": torch.float32,
            "codes": torch.int8,
            "bounds": torch.int32,
        }
        assert t.dtype == kinds.get(name.rpartition(".")[2], torch.bfloat16 if t.is_floating_point() else t.dtype), name


def test_it_compiles_without_a_break() -> None:
    model, x = network()
    compiled = torch.compile(lsquant.to_integer(model), backend="eager", fullgraph=True)
    assert_equal_bits(run(compiled, *x), run(model.eval(), *x))


# ---- the verdict ----


def test_verdict() -> None:
    model, x = network()
    frozen: Any = lsquant.to_integer(model)

    def judged(twin: nn.Module) -> Any:
        return lsquant.verify(model, twin, [x, x], forward=lambda m, batch: m(*batch))

    verdict = judged(frozen)
    assert verdict.exact, verdict
    assert (verdict.profile, verdict.layers, verdict.batches, verdict.samples) == ("integer", 5, 2, 12)
    assert all(check.compared > 0 for check in verdict.checks)
    assert "profile integer) in PyTorch" in str(verdict)
    moved = copy.deepcopy(frozen)
    moved.conv.bias[0] += 1.0
    assert judged(moved).level == "weights"
    assert judged(moved).checks[2].worst == "conv"
    moved = copy.deepcopy(frozen)
    moved.twin.codes[0, 0] += 1
    assert judged(moved).level == "none"
    assert (judged(moved).checks[0].worst, judged(moved).checks[0].mismatches) == ("twin.weight_quantizer", 1)
    moved = copy.deepcopy(frozen)
    moved.lone.step *= 2.0
    assert judged(moved).checks[0].worst == "lone"
    with pytest.raises(UsageError, match="is not this model's integer model: 'conv' is only in one"):
        judged(nn.Linear(3, 3))


# ---- what is refused ----


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no quantized layer; call lsquant\.prepare"):
        lsquant.to_integer(nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(4, 3))
    lsquant.prepare(model, Recipe(4, 4))
    with pytest.raises(UsageError, match=r"0\.input_quantizer.*no step yet; run lsquant\.calibrate"):
        lsquant.to_integer(model)
    lsquant.calibrate(model, [torch.randn(5, 4)])
    with pytest.raises(UsageError, match="an integer model already"):
        lsquant.to_integer(lsquant.to_integer(model))
    with lsquant.disabled(model, "0.weight_quantizer"), pytest.raises(UsageError, match=r"0\.weight.*switched off"):
        lsquant.to_integer(model)
    broken = copy.deepcopy(model)
    broken[0].weight.data[0, 0] = float("nan")  # type: ignore[operator]
    with pytest.raises(UsageError, match=r"0\.weight_quantizer.*NaN"):
        lsquant.to_integer(broken)
    broken = copy.deepcopy(model)
    broken[0].input_quantizer.step.data.fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"0\.input_quantizer: a step is inf"):
        lsquant.to_integer(broken)
    embedding = nn.Sequential(nn.Embedding(4, 4, max_norm=1.0))
    lsquant.prepare(embedding, Recipe(4, None))
    with pytest.raises(UsageError, match="0: an Embedding with max_norm"):
        lsquant.to_integer(embedding)

    class Own(lsquant.nn.QuantLinear):
        float_type = nn.Bilinear

    model[0].__class__ = Own
    with pytest.raises(UsageError, match=r"0: Bilinear has no integer form; leave it in floating point: skip=\['0'\]"):
        lsquant.to_integer(model)


def test_a_batchnorm_without_statistics() -> None:
    """Taken off after ``prepare``: it normalizes by its batch, as before, in the integer model too."""
    x = torch.randn(4, 2, 7, 7)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3))
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [x])
    norm = model[1]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    assert torch.equal(lsquant.to_integer(model)(x), model.eval()(x))
