"""``check``: every finding has a planted illness; healthy models have none."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant import Quantizer, QuantSpec, Recipe, Rule, check
from lsquant._util.errors import UsageError
from lsquant.diagnostics.checks import CODES, SEVERITIES


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        return self.head(self.pool(F.relu(self.conv(x))).flatten(1))


class Encoder(nn.Module):
    """A pre-norm transformer encoder block whose products are all layers, over tied embeddings."""

    def __init__(self, activation: Any = F.gelu) -> None:
        super().__init__()
        self.activation = activation
        self.embed, self.qkv, self.out = nn.Embedding(32, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, 8)).transpose(1, 3).unbind(2)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(self.activation(self.up(self.norm2(x)))))


def images(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Standardised pixels, and the brightest quarter as the label."""
    found = []
    for _ in range(count):
        label = torch.randint(4, (32,))
        x = torch.randn(32, 1, 8, 8)
        x.view(32, 4, 16)[torch.arange(32), label] += 2.0
        found.append((x, label))
    return found


def tokens(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Random tokens; the label is the token doubled."""
    return [(t := torch.randint(32, (8, 12)), 2 * t % 32) for _ in range(count)]


def trained(model: nn.Module, data: list, preset: str, steps: int = 12) -> tuple[nn.Module, Any]:
    """Float first, then prepared, calibrated and trained with param_groups."""
    _train(model, torch.optim.Adam(model.parameters(), lr=1e-2), data, 30)
    lsquant.prepare(model, Recipe.preset(preset), data[0])
    lsquant.calibrate(model, data)
    optimizer = torch.optim.SGD(lsquant.param_groups(model, 1e-3, 1e-4), momentum=0.9)
    _train(model, optimizer, data, steps)
    return model, optimizer


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list, steps: int) -> None:
    for i in range(steps):
        x, y = data[i % len(data)]
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
        optimizer.step()


@pytest.fixture
def cnn() -> tuple[nn.Module, Any, list]:
    """A healthy small network at 4 bits, its optimizer and its data."""
    data = images()
    return *trained(Cnn(), data, "w4a4", steps=4), data


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(lsquant.param_groups(model, 0.01, 1e-4), momentum=0.9, **options)


def codes(findings: list[lsquant.Finding]) -> set[tuple[str, str]]:
    return {(f.code, f.where) for f in findings}


# ---- healthy ----


@pytest.mark.parametrize("preset", ["w2a2", "w3a3", "w4a4", "w8a8", "w4"])
def test_a_healthy_cnn_has_no_findings(preset):
    data = images()
    model, optimizer = trained(Cnn(), data, preset)
    assert check(model, optimizer, data) == []
    model.train()
    assert check(model, [optimizer]) == check(model) == []
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("activation", [F.gelu, F.relu, F.silu])
@pytest.mark.parametrize("preset", ["w2a2", "w4a4", "w8a8", "w4g8"])
def test_a_healthy_transformer_has_no_findings(preset, activation):
    data = tokens()
    model, optimizer = trained(Encoder(activation), data, preset)
    assert [str(f) for f in check(model, optimizer, data)] == []


def test_pixels_of_few_values_are_no_finding():
    """8-bit inputs that take 17 values, as the digits, lose nothing: the step may leave most codes unused."""
    data = [(torch.randint(17, (64, 1, 8, 8)) / 16.0, torch.randint(4, (64,))) for _ in range(2)]
    model, optimizer = trained(Cnn(), data, "w2a2", steps=4)
    with torch.no_grad():
        model.stem.input_quantizer.step.fill_(1 / 16)  # codes 0 to 16 of 255
    assert check(model, optimizer, data) == []


def test_schedule_at_its_end_is_no_finding(cnn):
    """A learning rate of 0 everywhere is the end, or the start, of a schedule."""
    model, optimizer, _ = cnn
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    assert check(model, optimizer) == []


def test_a_frozen_weight_is_no_finding(cnn):
    model = cnn[0]
    model.stem.weight.requires_grad_(False)
    assert check(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)) == []


def test_nothing_is_changed(cnn):
    model, optimizer, data = cnn
    before, hooks = copy.deepcopy(model.state_dict()), [len(m._forward_hooks) for m in model.modules()]
    guarded = [int(q.guarded) for q in model.modules() if isinstance(q, Quantizer)]
    check(model, optimizer, data)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert guarded == [int(q.guarded) for q in model.modules() if isinstance(q, Quantizer)]


# ---- the model ----


def test_not_prepared():
    (finding,) = check(Cnn(), batches=images())
    assert (finding.code, finding.severity) == ("not_prepared", "error")
    assert "lsquant.prepare" in finding.remedy


def test_unset_steps_and_the_rest_is_still_looked_at(cnn):
    model, optimizer, data = cnn
    model.conv.input_quantizer.forget()
    with torch.no_grad():
        model.head.input_quantizer.step.mul_(1e-2)
    found = check(model, optimizer, data)
    assert codes(found) == {("step_unset", "conv.input_quantizer"), ("clipped", "head.input_quantizer")}
    assert found[0].severity == "error"  # errors first
    assert model.conv.input_quantizer.enabled


def test_prepared_but_not_calibrated():
    model = Cnn()
    lsquant.prepare(model, Recipe.preset("w4a4"))
    assert codes(check(model, batches=images())) == {
        ("step_unset", f"{name}.input_quantizer") for name in ("stem", "conv", "head")
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_step_not_finite(cnn, bad):
    model, optimizer, data = cnn
    with torch.no_grad():
        model.conv.weight_quantizer.step.fill_(bad)
    assert codes(check(model, optimizer, data)) == {("step_not_finite", "conv.weight_quantizer")}


def test_step_below_guard(cnn):
    model, optimizer, _ = cnn
    with torch.no_grad():
        model.conv.weight_quantizer.step.fill_(-0.1)
    (finding,) = check(model, optimizer)
    assert (finding.code, finding.where) == ("step_below_guard", "conv.weight_quantizer")
    assert finding.evidence["below"] == finding.evidence["steps"] == 1


def test_guarded_often(cnn):
    model, optimizer, data = cnn
    quantizer = model.conv.input_quantizer
    kept = quantizer.step.detach().clone()
    with torch.no_grad():
        quantizer.step.fill_(-1e-3)
    for _ in range(11):
        model.train()(data[0][0])
    with torch.no_grad():
        quantizer.step.copy_(kept)
    (finding,) = check(model, optimizer)
    assert (finding.code, finding.where) == ("guarded_often", "conv.input_quantizer")
    assert finding.evidence["guarded"] == 11


def test_switched_off(cnn):
    model, optimizer, data = cnn
    with lsquant.disabled(model, "head"):
        found = codes(check(model, optimizer, data))
        assert found == {("switched_off", f"head.{kind}_quantizer") for kind in ("weight", "input")}
    assert check(model, optimizer, data) == []


def test_tied_after_prepare():
    model, data = Encoder(), tokens()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    lsquant.prepare(model, Recipe.preset("w4a4"), data[0])
    lsquant.calibrate(model, data)
    assert check(model, batches=data) == []
    model.head.weight = model.embed.weight
    assert ("tied_twice", "head") in codes(check(model, sgd(model), data))


class Own(nn.Linear):
    """A user's own kind of linear layer."""


@pytest.mark.parametrize(
    "layer, reason",
    [
        (nn.MultiheadAttention(16, 2, batch_first=True), "uses its weights"),
        (nn.LSTM(16, 16, batch_first=True), "uses its weights"),
        (Own(16, 16), "subclass of Linear"),
        (nn.Bilinear(16, 16, 16), "not supported"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_that_stay_float(layer, reason):
    model = nn.Sequential(nn.Linear(16, 16), layer)
    lsquant.prepare(model, Recipe.preset("w4"))
    (finding,) = check(model)
    assert (finding.code, finding.where, finding.severity) == ("stays_float", "1", "warning")
    assert reason in finding.message
    assert finding.evidence["share"] > 0.1


def test_a_small_layer_that_stays_float_is_a_note():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), Own(64, 2))
    lsquant.prepare(model, Recipe.preset("w4"))
    assert [f.severity for f in check(model)] == ["note"]


def test_a_layer_that_the_recipe_leaves_float_is_no_finding():
    model, data = Cnn(), images()
    lsquant.prepare(model, Recipe.preset("w4a4", skip=["stem"]), data[0])
    lsquant.calibrate(model, data)
    assert check(model, sgd(model), data) == []


# ---- the optimizer ----


def test_optimizer_built_before_prepare():
    model, data = Cnn(), images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lsquant.prepare(model, Recipe.preset("w4a4"))
    lsquant.calibrate(model, data)
    found = check(model, optimizer)
    assert {f.code for f in found} == {"step_missing"}
    assert len(found) == 6
    assert "after prepare" in found[0].remedy


def test_a_missing_offset():
    spec = QuantSpec(4, offset=True)
    model, data = Cnn(), images()
    lsquant.prepare(model, Recipe(weight=4, activation=spec))
    lsquant.calibrate(model, data)
    left_out = model.conv.input_quantizer.offset
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not left_out], lr=0.1)
    assert codes(check(model, optimizer)) == {("step_missing", "conv.input_quantizer.offset")}


def test_steps_decayed(cnn):
    model = cnn[0]
    found = check(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert {f.code for f in found} == {"step_decayed"}
    assert len(found) == 6
    assert found[0].evidence == {"weight_decay": 0.01}


def test_steps_frozen(cnn):
    model = cnn[0]
    groups = lsquant.param_groups(model, 0.1, step_lr=0.0)
    assert {f.code for f in check(model, torch.optim.SGD(groups, lr=0.1))} == {"step_frozen"}
    model.conv.weight_quantizer.step.requires_grad_(False)
    assert codes(check(model, sgd(model))) == {("step_frozen", "conv.weight_quantizer.step")}


def test_parameter_created_anew(cnn):
    model, optimizer, _ = cnn
    quantizer = model.conv.weight_quantizer
    quantizer.step = nn.Parameter(quantizer.step.detach().clone())
    assert codes(check(model, optimizer)) == {
        ("stale_parameters", "optimizer"),
        ("step_missing", "conv.weight_quantizer.step"),
    }


def test_weight_replaced(cnn):
    model, optimizer, _ = cnn
    model.conv.weight = nn.Parameter(model.conv.weight.detach().clone())
    found = check(model, optimizer)
    assert codes(found) == {("stale_parameters", "optimizer"), ("weight_missing", "conv.weight")}
    assert [f.severity for f in found] == ["error", "warning"]
    assert found[0].evidence["shapes"] == [(8, 8, 3, 3)]


def test_weight_missing(cnn):
    model = cnn[0]
    steps = lsquant.param_groups(model, 0.1)[2:]
    found = check(model, torch.optim.SGD(steps, lr=0.1))
    assert codes(found) == {("weight_missing", f"{n}.weight") for n in ("stem", "conv", "head")}


def test_parameters_of_another_module_are_a_note(cnn):
    model, optimizer, _ = cnn
    optimizer.add_param_group({"params": list(nn.Linear(2, 2).parameters())})
    (finding,) = check(model, optimizer)
    assert (finding.code, finding.severity) == ("stale_parameters", "note")


# ---- batches ----


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
    lsquant.prepare(model, Recipe.preset("w8"))
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


def test_max_batches():
    model, data = two_heads()

    def stream():
        yield from data
        raise AssertionError("asked for one batch too many")

    assert check(model, batches=stream(), max_batches=2) == []


# ---- what a finding is ----


def test_wrong_arguments(cnn):
    model = cnn[0]
    with pytest.raises(UsageError, match="an nn"):
        check("model")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="give a torch optimizer"):
        check(model, model.parameters())
    with pytest.raises(UsageError, match="no batches"):
        check(model, batches=[])
    with pytest.raises(UsageError, match="not an iterable of batches"):
        check(model, batches=torch.randn(2, 1, 8, 8))


def test_an_error_in_the_model_leaves_it_as_it_was(cnn):
    model = cnn[0]
    model.conv.input_quantizer.forget()
    with pytest.raises(UsageError, match="'stem': the input has 3"):
        check(model, batches=[torch.randn(2, 3, 8, 8)])
    assert model.conv.input_quantizer.enabled
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_finding_prints_in_two_lines_and_is_frozen():
    (finding,) = check(Cnn())
    first, second = str(finding).split("\n")
    assert first.startswith("error: (root): ")
    assert first.endswith("[not_prepared]")
    assert second.strip().startswith("remedy: ")
    with pytest.raises(dataclasses.FrozenInstanceError):
        finding.code = "other"  # type: ignore[misc]
    assert len({finding, finding}) == 1


def test_every_code_is_planted_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert {severity for severity, _ in CODES.values()} <= set(SEVERITIES)
    for code in CODES:
        assert f'"{code}"' in source, f"no test plants {code}"
