"""`prepare` and `revert`: all or nothing, whatever is raised, wherever; lazy layers; weights in two layouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.convert import W4A4, Tied, images, net, ready
from helpers.interrupts import anatomy, assert_as_before, everywhere_inside
from lsquant import Recipe, Rule, UsageError, convert
from lsquant.nn import quantized_layers

MIXED = Recipe(3, 5, [Rule("0", weight=8), Rule("5", activation=None)])


def hooked() -> nn.Module:
    model = net()
    model[0].register_forward_hook(lambda *_: None)
    model[1].eval()
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))


STARTS: dict[str, Callable[[], nn.Module]] = {
    "float": hooked,
    "prepared": lambda: ready(hooked(), W4A4, images()),
    "tied": lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 4), Tied()),
}


@pytest.mark.parametrize("example", [None, images()], ids=["", "example"])
@pytest.mark.parametrize("start", STARTS)
def test_an_error_anywhere_in_prepare_leaves_the_model(start: str, example: Any) -> None:
    recipe = W4A4 if start == "tied" else MIXED
    everywhere_inside(STARTS[start], lambda m: lsquant.prepare(m, recipe, example_inputs=example, steps="rescale"), 40)


def test_an_error_anywhere_in_revert_leaves_the_model() -> None:
    everywhere_inside(STARTS["prepared"], lsquant.revert, 20)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("error", [KeyboardInterrupt, StopIteration, ValueError])
def test_an_error_at_each_layer(index: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after the conversion of each layer, and before the rows are made."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    before, real, calls = anatomy(model), convert._convert, []

    def failing(*args: Any) -> None:
        real(*args)
        calls.append(args)
        if len(calls) == index:
            raise error

    monkeypatch.setattr(convert, "_convert", failing)
    if index == 0:
        monkeypatch.setattr(convert, "_rows", lambda *_: [][1])
    with pytest.raises(IndexError if index == 0 else error):
        lsquant.prepare(model, Recipe(4, 8))
    assert len(calls) == (index or 3)
    assert_as_before(model, before)


def test_a_failing_example_leaves_the_model() -> None:
    model = hooked()
    before = anatomy(model)
    with pytest.raises(RuntimeError):
        lsquant.prepare(model, W4A4, example_inputs=torch.randn(3, 5, 4, 4))
    assert_as_before(model, before)


# ---- lazy layers ----


def test_lazy_layers_are_given_their_shape_by_the_example() -> None:
    model, x = lazy(), images()
    changes = lsquant.prepare(model, W4A4, example_inputs=x)
    assert [(c.name, c.kind, c.weights) for c in changes] == [("0", "Conv2d", 72), ("3", "Linear", 48)]
    assert changes.weight_share == 1.0
    lsquant.calibrate(model, [x])
    assert lsquant.check(model.eval(), None, [x]) == []
    model(x).sum().backward()


def test_lazy_layers_without_an_example() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    types = [type(m) for m in model.modules()]
    with pytest.raises(UsageError, match=r"'2' is a LazyLinear and has no weight yet: run a batch first, model\("):
        lsquant.prepare(model, W4A4)
    assert [type(m) for m in model.modules()] == types
    model(images())
    assert [c.kind for c in lsquant.prepare(model, W4A4)] == ["Conv2d", "Linear"]


def test_lazy_layers_are_lazy_again_where_prepare_fails() -> None:
    """The batch has given them a shape; the rule is found wrong afterwards."""
    model, x = lazy(), images()
    before = {name: type(p) for name, p in model.named_parameters()}
    with pytest.raises(UsageError, match="matches no layer"):
        lsquant.prepare(model, Recipe(4, 4, [Rule("none", weight=8)]), example_inputs=x)
    assert {name: type(p) for name, p in model.named_parameters()} == before
    assert [type(m).__name__ for m in model] == ["LazyConv2d", "LazyBatchNorm2d", "Flatten", "LazyLinear"]
    model(x)  # another shape now than torch would have refused before
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Flatten, nn.Linear]
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.shape == (4, 2, 3, 3)


def test_a_lazy_layer_that_the_example_does_not_reach() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(UsageError, match=r"'spare' is a LazyLinear .*, and example_inputs did not reach it"):
        lsquant.prepare(Spare(), W4A4, example_inputs=torch.randn(2, 4))


# ---- one weight in two layouts ----


class Autoencoder(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


@pytest.mark.parametrize(
    "first, second",
    [
        (lambda: nn.Conv2d(8, 8, 3), lambda: nn.ConvTranspose2d(8, 8, 3)),
        (lambda: nn.ConvTranspose1d(8, 8, 3), lambda: nn.Conv1d(8, 8, 3)),
        (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2), lambda: nn.ConvTranspose2d(8, 4, 3, groups=1)),
    ],
)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_two_layouts_are_refused_with_both_names(first: Any, second: Any, granularity: Any) -> None:
    model = Autoencoder(first(), second())
    before = anatomy(model)
    recipe = Recipe(lsquant.QuantSpec(4, granularity=granularity), 8)
    with pytest.raises(UsageError, match=r"'first' \(.*\) and 'second' \(.*\) share one weight in different layouts"):
        lsquant.prepare(model, recipe)
    assert_as_before(model, before)
    lsquant.prepare(nn.Sequential(model, nn.Linear(8, 4)), Recipe(4, 8, [Rule("0.*", None, None)]))
    assert not list(quantized_layers(model))


def test_one_layout_twice_is_shared() -> None:
    model = Autoencoder(nn.ConvTranspose2d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3))
    x = torch.randn(2, 8, 3, 3)
    lsquant.prepare(model, Recipe(lsquant.QuantSpec(4, granularity="channel"), 8))
    lsquant.calibrate(model, [x])
    assert model.first.weight_quantizer is model.second.weight_quantizer
    assert torch.equal(lsquant.to_integer(model)(x), model.eval()(x))


# ---- rules for what stays float ----


def test_a_rule_for_a_block_that_stays_float() -> None:
    model = nn.ModuleDict({"att": nn.MultiheadAttention(8, 2), "rnn": nn.LSTM(4, 4), "head": nn.Linear(8, 4)})
    for name, kind in (("att", "MultiheadAttention"), ("rnn", "LSTM")):
        says = rf"the rule for '{name}' has no effect, {name} stays float: {kind} computes with its weights directly"
        with pytest.raises(UsageError, match=says):
            lsquant.prepare(model, Recipe(4, 4, [Rule(name, weight=8)]))
    lsquant.prepare(model, Recipe(4, 4, [Rule("att", None, None)]))


# ---- parametrized after prepare ----


@pytest.mark.parametrize("call", [lsquant.revert, lambda m: lsquant.prepare(m, W4A4)])
def test_layers_that_torch_gave_another_class(call: Any) -> None:
    model = ready(net(), W4A4, images())
    nn.utils.parametrizations.weight_norm(model[5])
    before = anatomy(model)
    with pytest.raises(UsageError, match=r"'5' was parametrized after prepare; .*remove_parametrizations"):
        call(model)
    assert_as_before(model, before)
    nn.utils.parametrize.remove_parametrizations(model[5], "weight")
    call(model)
