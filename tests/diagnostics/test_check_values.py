"""`check`: what batches show, clipped values, unused levels, bypassed layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from helpers.checked import Cnn, codes, images, tokens, trained, trained_cnn
from lsquant import Quantizer, QuantSpec, Recipe, Rule, check


@pytest.fixture
def cnn() -> tuple[nn.Module, Any, list]:
    return trained_cnn()


@pytest.mark.parametrize("preset", ["w2a2", "w4a4"])
@pytest.mark.parametrize("kind", ["weight_quantizer", "input_quantizer"])
def test_clip_rate(preset, kind):
    data = images()
    model, optimizer = trained(Cnn(), data, preset, steps=0)
    with torch.no_grad():
        getattr(model.conv, kind).step.mul_(0.02)
    (finding,) = check(model, optimizer, data)
    assert (finding.code, finding.where) == ("clipped", f"conv.{kind}")
    assert finding.evidence["clip_low"] + finding.evidence["clip_high"] > 0.2
    x = model.conv.weight.detach()
    if kind == "weight_quantizer":
        quotient = x / model.conv.weight_quantizer.step.detach()
        assert finding.evidence["clip_low"] == float((quotient < model.conv.weight_quantizer.q_min).double().mean())


CASES = [("weight_quantizer", "w2a2"), ("weight_quantizer", "w4a4")]
CASES += [("input_quantizer", preset) for preset in ("w2a2", "w4a4", "w8a8")]


@pytest.mark.parametrize("kind, preset", CASES)
def test_unused_levels(kind, preset):
    data = images(6)
    model, optimizer = trained(Cnn(), data, preset, steps=0)
    with torch.no_grad():
        getattr(model.conv, kind).step.mul_(6.0)
    found = check(model, optimizer, data)
    assert ("unused_levels", f"conv.{kind}") in codes(found)
    (finding,) = [f for f in found if f.where == f"conv.{kind}"]
    assert finding.evidence["highest"] <= finding.evidence["levels"] / 2


def test_the_papers_rule_at_8_bits_uses_few_levels_and_is_no_finding():
    model = nn.Linear(64, 128)
    lsquant.prepare(model, Recipe(8, 8))
    lsquant.calibrate(model, [torch.randn(64, 64)])
    assert int(model.integer_weight()[0].max()) < 32
    assert check(model) == check(model, batches=[torch.randn(2, 64)]) == []
    with torch.no_grad():
        model.weight_quantizer.step.mul_(2.5)
    assert codes(check(model, batches=[torch.randn(2, 64)])) == {("unused_levels", "weight_quantizer")}


def test_unused_levels_with_an_offset():
    model, data = Cnn(), images()
    lsquant.prepare(model, Recipe(weight=4, activation=QuantSpec(4, offset=True)))
    lsquant.calibrate(model, data)
    assert check(model, batches=data) == []
    with torch.no_grad():
        model.stem.input_quantizer.step.mul_(4.0)
    assert codes(check(model, batches=data)) == {("unused_levels", "stem.input_quantizer")}


def test_signed_in_vain():
    model, data = Cnn(), images()
    lsquant.prepare(model, Recipe(weight=4, activation=4, rules=[Rule("conv", 4, QuantSpec(4, signed=True))]))
    lsquant.calibrate(model, data)
    assert codes(check(model, batches=data)) == {("signed_in_vain", "conv.input_quantizer")}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite(cnn, bad):
    model, optimizer, data = cnn
    data[0][0][0, 0, 0, 0] = bad
    found = check(model, optimizer, data)
    assert codes(found) >= {("values_not_finite", "stem.input_quantizer")}
    assert {f.code for f in found} == {"values_not_finite"}


def test_weights_that_are_not_finite(cnn):
    model, optimizer, data = cnn
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    assert codes(check(model, optimizer, data)) == {
        ("values_not_finite", "conv.weight_quantizer"),
        ("values_not_finite", "head.input_quantizer"),
    }


def test_few_values_say_nothing():
    model = nn.Linear(4, 2)
    lsquant.prepare(model, Recipe(weight=None, activation=8))
    lsquant.calibrate(model, [torch.randn(2, 4)])
    with torch.no_grad():
        model.input_quantizer.step.mul_(20)
    assert check(model, batches=[torch.randn(2, 4)]) == []
    assert codes(check(model, batches=[torch.randn(2000, 4)])) == {("unused_levels", "input_quantizer")}


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.both, self.direct = True, False

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.body.weight.to(x.dtype), self.body.bias) if self.direct else self.body(x)
        return torch.cat([self.a(x), self.b(x)], -1) if self.both else self.a(x)


def two_heads() -> tuple[TwoHeads, list[Tensor]]:
    model, data = TwoHeads(), [torch.randn(64, 8) for _ in range(2)]
    lsquant.prepare(model, Recipe.preset("w4a4"))
    lsquant.calibrate(model, data)
    return model, data


def test_a_layer_that_no_batch_reaches():
    model, data = two_heads()
    assert check(model, batches=data) == []
    model.both = False
    assert codes(check(model, batches=data)) == {("not_reached", "b")}


def test_a_layer_that_a_tied_one_stands_in_for_is_no_finding():
    """As T5's ``shared`` embedding, which only lends its weight."""

    class Lends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.embed = nn.Embedding(32, 16), nn.Embedding(32, 16)
            self.embed.weight = self.shared.weight

        def forward(self, t: Tensor) -> Tensor:
            return self.embed(t)

    model = Lends()
    lsquant.prepare(model, Recipe.preset("w4"))
    assert check(model, batches=tokens()) == []
    model.forward = lambda t: t * 1.0
    assert codes(check(model, batches=tokens())) == {("not_reached", "shared"), ("not_reached", "embed")}


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function:DeprecationWarning")  # of torch.compile itself
def test_a_compiled_model():
    model, data = two_heads()
    compiled = torch.compile(model, backend="eager")
    compiled(data[0])
    assert check(compiled, batches=data) == []
    model.both = False
    assert {f.code for f in check(compiled, batches=data)} == {"not_reached"}


def test_a_weight_used_without_calling_the_layer():
    model, data = two_heads()
    model.direct = True
    (finding,) = check(model, batches=data)
    assert (finding.code, finding.where, finding.severity) == ("bypassed", "body", "error")
    assert finding.evidence == {"function": "linear", "calls": 0}


def test_a_tied_weight_used_without_a_layer():
    """Logits by ``x @ embedding.weight.T`` use the float weight though the embedding itself is called."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(32, 16)

        def forward(self, t: Tensor) -> Tensor:
            return self.embed(t) @ self.embed.weight.t()

    model = Tied()
    lsquant.prepare(model, Recipe.preset("w4"))
    assert codes(check(model, batches=tokens())) == {("bypassed", "embed")}


def test_a_fast_path_that_calls_no_layer():
    class Block(nn.TransformerEncoderLayer):
        """A subclass keeps torch's eval-mode fast path, which uses the float weights."""

    model, x = Block(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(4, 5, 16)
    lsquant.prepare(model, Recipe.preset("w4"))
    found = {f.code: f for f in check(model)}
    assert set(found) == {"bypassed", "stays_float"}  # the attention stays float
    assert found["bypassed"].evidence == {"layers": ["linear1", "linear2"]}
    with torch.no_grad(), lsquant.disabled(model):
        off = model.eval()(x)
    with torch.no_grad():
        assert torch.equal(model(x), off)  # so it is: switching the quantizers makes no difference

    torchs_own = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    lsquant.prepare(torchs_own, Recipe.preset("w4"))
    assert {f.code for f in check(torchs_own, batches=[x])} == {"stays_float"}


def test_a_stand_alone_quantizer():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer, self.unused = (Quantizer(QuantSpec(4, signed=True), count=8) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.quantizer(x)

    model, x = Net(), torch.randn(64, 8)
    model.quantizer.initialize(x)
    model.unused.initialize(x)
    assert codes(check(model, batches=[x])) == {("not_reached", "unused")}
    assert ("unused_levels", "quantizer") in codes(check(model, batches=[x / 8]))


def test_forward_mappings_and_wrapped_models(cnn):
    model, _, data = cnn
    assert check(model, batches=[{"x": x} for x, _ in data]) == []
    assert check(model, batches=[{"image": x} for x, _ in data], forward=lambda m, b: m(b["image"])) == []
    with torch.no_grad():
        model.conv.input_quantizer.step.mul_(0.02)
    found = check(nn.Sequential(model), batches=data)
    assert codes(found) == {("clipped", "0.conv.input_quantizer")}
    found = check(nn.DataParallel(model), batches=data)
    assert codes(found) == {("clipped", "conv.input_quantizer")}  # the names of the model inside


def test_max_batches():
    model, data = two_heads()

    def stream():
        yield from data
        raise AssertionError("asked for one batch too many")

    assert check(model, batches=stream(), max_batches=2) == []
