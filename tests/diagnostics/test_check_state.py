"""`check`: what Python or the recipe know otherwise than the buffers; few-valued weights; steps without a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lsquant
from helpers.checked import codes, only
from lsquant import QuantSpec, Recipe, check, quantizer
from lsquant.integrations.distributed import synchronize


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def calibrated(recipe: Recipe, x: torch.Tensor) -> nn.Sequential:
    model = net()
    lsquant.prepare(model, recipe)
    lsquant.calibrate(model, [x])
    return model


def signed_and_unsigned() -> tuple[nn.Sequential, nn.Sequential]:
    x = torch.randn(64, 8)
    return calibrated(Recipe(4, 4), x), calibrated(Recipe(4, 4), x.abs())


# ---- mirrors ----


def test_a_write_that_nothing_shows_is_found_as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(quantizer, "CPU_IS_READ_ALWAYS", False)
    signed, model = signed_and_unsigned()
    model(torch.rand(3, 8))
    for mine, theirs in zip(model.state_dict().values(), signed.state_dict().values(), strict=True):
        mine.data.copy_(theirs)  # as a broadcast does
    found = only(check(model), "stale_state", "0.input_quantizer")
    assert "sign False instead of True" in found.message
    assert (found.severity, "synchronize(model)" in found.remedy) == ("error", True)
    model[2].weight_quantizer.count.data.fill_(7)
    assert (
        "N 64 instead of 7"
        in only(
            [f for f in check(model) if f.where == "2.weight_quantizer"], "stale_state", "2.weight_quantizer"
        ).message
    )
    synchronize(model)
    assert check(model) == []
    x = torch.randn(3, 8)
    model[2].weight_quantizer.count.data.fill_(64)
    assert torch.equal(model(x), signed(x))


@pytest.mark.parametrize("how", ["copied", "through data"])
def test_eager_code_on_a_cpu_reads_what_was_written(how):
    """Nothing is stale there: the next forward pass sees it."""
    signed, model = signed_and_unsigned()
    with torch.no_grad():
        for mine, theirs in zip(model.state_dict().values(), signed.state_dict().values(), strict=True):
            (mine.data if how == "through data" else mine).copy_(theirs)
    assert check(model) == []
    x = torch.randn(3, 8)
    assert torch.equal(model(x), signed(x))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("how", ["compile", "in place"])
def test_compiled_code_that_has_the_sign_of_before_is_found(how):
    torch._dynamo.reset()
    signed, model = signed_and_unsigned()
    x = torch.randn(3, 8)
    if how == "compile":
        called = looked_at = torch.compile(model, backend="aot_eager")
    else:
        model.compile(backend="aot_eager")
        called = looked_at = model
    called(x)
    with torch.no_grad():
        for mine, theirs in zip(model.state_dict().values(), signed.state_dict().values(), strict=True):
            mine.copy_(theirs)
    assert not torch.equal(called(x), signed(x))  # as the documentation says
    assert ("stale_state", "0.input_quantizer") in {
        (f.code, f.where.removeprefix("_orig_mod.")) for f in check(looked_at)
    }
    synchronize(model)
    assert torch.equal(called(x), signed(x))
    assert check(looked_at) == []


def test_a_state_of_other_bits_that_was_copied_is_found():
    x = torch.randn(64, 8)
    two, model = calibrated(Recipe(2, 2), x), calibrated(Recipe(4, 4), x)
    with torch.no_grad():
        for mine, theirs in zip(model.state_dict().values(), two.state_dict().values(), strict=True):
            mine.copy_(theirs)
    found = [f for f in check(model) if f.code == "other_bounds"]
    assert {f.where for f in found} == {name for name, _ in lsquant.quantizers(model)}
    first = only([f for f in found if f.where == "0.weight_quantizer"], "other_bounds", "0.weight_quantizer")
    assert "from codes -2 to 1, it has -8 to 7 (4 bit" in first.message
    assert {f.code for f in check(two)} == set()


def test_a_model_without_values_has_one_finding():
    with torch.device("meta"):
        model = net()
    lsquant.prepare(model, Recipe(4, 4))
    (found,) = check(model)
    assert (found.code, found.severity) == ("on_meta", "error")
    assert "'0.weight' the first" in found.message


# ---- weights of few values ----


class Boxes(nn.Module):
    """The box decoder of detectors: a fixed 1x1 convolution, an expectation over bins."""

    def __init__(self, bins: int = 16) -> None:
        super().__init__()
        self.stem, self.decode = nn.Conv2d(3, bins, 3, padding=1), nn.Conv2d(bins, 1, 1, bias=False)
        self.decode.weight = nn.Parameter(torch.arange(float(bins)).reshape(1, bins, 1, 1), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.stem(x).softmax(1))


@pytest.mark.parametrize("recipe", [Recipe(8, 8), Recipe(QuantSpec(5), 8), Recipe(QuantSpec(8, granularity="channel"))])
def test_frozen_integers_are_represented_exactly(recipe):
    model, x = Boxes(), torch.randn(2, 3, 5, 5)
    lsquant.prepare(model, recipe)
    lsquant.calibrate(model, [x])
    assert torch.equal(model.decode.dequantized_weight(), torch.arange(16.0).reshape(1, 16, 1, 1))
    assert check(model, batches=[x]) == []


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 1e-3, 7e8])
@pytest.mark.parametrize("weights", ["paper", "mse"])
def test_multiples_of_any_number_that_a_step_holds(scale, weights):
    """Trainable ones by least squared error, frozen ones by either rule: every value as it was."""
    multiples = torch.tensor([[-8, -3, 0, 1, 2, 7, 5, -1], [0, 1, 0, 0, 1, 0, 0, 0]]).float() * torch.tensor(scale)
    layer = nn.Linear(8, 2)
    layer.weight = nn.Parameter(multiples.clone(), requires_grad=weights == "mse")
    lsquant.prepare(layer, Recipe(QuantSpec(4), 4))
    lsquant.calibrate(layer, [torch.randn(4, 8)], weights=weights)
    shipped, step, _ = layer.integer_weight()
    assert ((shipped.numpy().astype("float32") * step.numpy()) == multiples.numpy()).all()
    assert torch.equal(layer.dequantized_weight(), multiples)
    assert check(layer) == []


def test_one_hot_weights_with_a_step_per_channel_or_tensor():
    for granularity in ("tensor", "channel"):
        layer = nn.Linear(16, 16)
        layer.weight = nn.Parameter(torch.eye(16), requires_grad=False)
        lsquant.prepare(layer, Recipe(QuantSpec(2, granularity=granularity), None))
        assert torch.equal(layer.dequantized_weight(), torch.eye(16))


def test_frozen_weights_of_many_values_keep_the_papers_step():
    layer = nn.Linear(64, 64).requires_grad_(False)
    lsquant.prepare(layer, Recipe(QuantSpec(4), 8))
    want = 2 * layer.weight.abs().mean() / 7**0.5
    assert layer.weight_quantizer.step.item() == pytest.approx(want.item(), rel=1e-6)


def test_integers_that_a_trained_step_merges_are_found():
    model, x = Boxes(), torch.randn(2, 3, 5, 5)
    model.decode.requires_grad_(True)
    lsquant.prepare(model, Recipe(8, 8))
    lsquant.calibrate(model, [x])
    found = only(check(model), "few_values", "decode.weight_quantizer")
    assert "its 16 weights are integers" in found.message
    assert "a step represents them exactly" in found.message
    assert "weights='mse'" in found.remedy
    lsquant.calibrate(model, [x], weights="mse")
    assert check(model) == []
    assert torch.equal(model.decode.dequantized_weight(), torch.arange(16.0).reshape(1, 16, 1, 1))


def test_integers_that_no_step_can_represent_are_found():
    model, x = Boxes(), torch.randn(2, 3, 5, 5)
    lsquant.prepare(model, Recipe(4, 8))  # -8 to 7 for 0 to 15
    lsquant.calibrate(model, [x])
    found = only(check(model), "few_values", "decode.weight_quantizer")
    assert "no step represents them at 4 bits" in found.message
    assert "skip=" in found.remedy


def test_few_values_that_are_no_integers_are_found():
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([-0.71, 0.13, 0.5])[torch.randint(3, (16, 16))])
    lsquant.prepare(layer, Recipe(QuantSpec(2), None))
    found = only(check(layer), "few_values", "weight_quantizer")
    assert "3 different values" in found.message
    with torch.no_grad():
        layer.weight.add_(torch.randn(16, 16) * 0.01)  # as after a training step
    assert "few_values" not in {f.code for f in check(layer)}


# ---- values on levels: their step has no gradient ----


def test_a_step_whose_values_lie_on_levels_is_no_finding():
    model, pixels = net(), [torch.randint(0, 17, (64, 8)) / 16 for _ in range(2)]
    lsquant.prepare(model, Recipe(4, 8))
    with torch.no_grad():
        model[0].input_quantizer.initialize(pixels[0])
        model[0].input_quantizer.step.fill_(1 / 64)  # codes 0, 4, ... 64 of 255
        model[0].input_quantizer.initial_step.fill_(1 / 64)
    lsquant.calibrate(model, pixels)
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.05), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(pixels[0]).square().mean().backward()
        assert model[0].input_quantizer.step.grad.item() == 0.0
        optimizer.step()
    assert codes(check(model, optimizer, pixels)) == set()
    assert codes(check(model, optimizer)) == {("step_unmoved", "0.input_quantizer")}  # without values nobody knows
    other = [x + 0.001 for x in pixels]
    assert ("step_unmoved", "0.input_quantizer") in codes(check(model, optimizer, other))


def test_a_step_whose_values_reach_the_outermost_level_has_a_gradient():
    """There equality is outside: the finding stays."""
    model, pixels = net(), [torch.randint(0, 16, (64, 8)).float()]
    lsquant.prepare(model, Recipe(8, 4))
    lsquant.calibrate(model, pixels)
    assert model[0].input_quantizer.step.item() == 1.0
    model[0].input_quantizer.step.requires_grad_(True)
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.05), momentum=0.9)
    model(pixels[0]).square().mean().backward()
    assert model[0].input_quantizer.step.grad.item() != 0.0
    model[0].input_quantizer.step.grad = None  # as if something cut it off
    optimizer.step()
    assert ("step_unmoved", "0.input_quantizer") in codes(check(model, optimizer, pixels))


def test_weights_that_are_not_finite_are_found():
    model = calibrated(Recipe(4, 4), torch.randn(64, 8))
    with torch.no_grad():
        model[0].weight[1, 2] = torch.nan
    assert [(f.severity, f.where, f.evidence["bad"]) for f in check(model) if f.code == "weights_not_finite"] == [
        ("error", "0", 1)
    ]


def test_a_guessed_order_is_found_where_nothing_is_calibrated():
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body, self.stem = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.stem(x)))

    model, x = Reversed(), torch.randn(64, 8)
    lsquant.prepare(model, Recipe.preset("w4"))
    found = [
        (f.severity, f.where, f.evidence["really"]) for f in check(model, batches=[x]) if f.code == "order_assumed"
    ]
    assert found == [("error", "head", "stem"), ("error", "stem", "head")]
    lsquant.prepare(model, Recipe.preset("w4"), example_inputs=x)
    assert "order_assumed" not in {f.code for f in check(model, batches=[x])}
