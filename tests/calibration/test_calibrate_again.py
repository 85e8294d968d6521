"""calibrate on a model that has steps already: learned ones stay, unless again=True asks for them by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import lsquant
import oracle
from lsquant import Quantizer, QuantSpec, Recipe, UsageError
from lsquant.nn import quantizers


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    lsquant.prepare(model, Recipe.preset("w2a2"))
    return model


def learned() -> tuple[nn.Sequential, torch.Tensor]:
    """Calibrated, and trained until every step has moved."""
    model, x = net(), torch.randn(64, 8)
    lsquant.calibrate(model, [x])
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.05))
    target = torch.randint(4, (64,))
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
    assert not any(torch.equal(q.step, q.initial_step) for _, q in quantizers(model))
    return model, x


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("weights", [None, "mse", "paper"])
def test_learned_steps_stay_and_a_warning_says_so(weights):
    model, x = learned()
    before = state(model)
    with pytest.warns(UserWarning, match="every step is set already .* again=True"):
        lsquant.calibrate(model, [x * 3], weights=weights)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_again_sets_the_inputs_and_with_a_rule_the_weights():
    model, x = learned()
    before = state(model)
    lsquant.calibrate(model, [x * 3], again=True)
    first = model[0].input_quantizer
    best, _ = oracle.best_squared_error((x * 3).numpy(), first.q_min, first.q_max)
    assert oracle.squared_error((x * 3).numpy(), first.step.item(), first.q_min, first.q_max) <= 1.001 * best
    assert torch.equal(first.initial_step, first.step)
    weight = "2.weight_quantizer.step"
    assert torch.equal(model.state_dict()[weight], before[weight])
    lsquant.calibrate(model, [x * 3], weights="paper", again=True)
    want = oracle.initial_step(model[2].weight.detach().numpy(), 1)
    assert model.state_dict()[weight].item() == pytest.approx(want.item(), rel=1e-6)


def test_only_what_is_not_set_is_set():
    """After a change of bits of one layer the others keep what they learned."""
    model, x = learned()
    before = state(model)
    lsquant.prepare(model, Recipe.preset("w2a2", rules=[lsquant.Rule("2", 4, 4)]), steps="recalibrate")
    assert not model[2].input_quantizer.is_initialized
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lsquant.calibrate(model, [x])
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed
    assert {name.rpartition(".")[0] for name in changed} == {"2.weight_quantizer", "2.input_quantizer"}
    assert model[2].input_quantizer.q_max == 15


def test_a_rule_for_weights_touches_those_that_no_training_moved():
    model, x = net(), torch.randn(64, 8)
    lsquant.calibrate(model, [x])
    with torch.no_grad():
        model[2].weight_quantizer.step.mul_(1.25)
    before = state(model)
    lsquant.calibrate(model, [x], weights="mse")
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert {name.rpartition(".")[0] for name in changed} == {"0.weight_quantizer", "4.weight_quantizer"}


def test_a_quantizer_of_ones_own_that_is_set_stays():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.steps = nn.Linear(4, 4), Quantizer(QuantSpec(4), count=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.steps(self.linear(x))

    model = Own()
    model.steps.initialize(torch.tensor([-1.0, 2.0]))
    lsquant.prepare(model, Recipe(4, 4))
    step = model.steps.step.clone()
    lsquant.calibrate(model, [torch.randn(9, 4)])
    assert torch.equal(model.steps.step, step)
    lsquant.calibrate(model, [torch.randn(9, 4)], again=True)
    assert not torch.equal(model.steps.step, step)


def test_weights_alone_need_no_warning():
    model = nn.Sequential(nn.Linear(4, 4))
    lsquant.prepare(model, Recipe(4, None))
    lsquant.calibrate(model, [torch.randn(2, 4)])


# ---- empty batches ----


class Experts(nn.Module):
    """Each row goes through one of two layers, which one its first value says."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.low(x[x[:, 0] < 0]), self.high(x[x[:, 0] >= 0])])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_empty_batch_among_others_changes_nothing(place):
    x, found = torch.randn(6, 3, 9, 9), []
    for empty in (False, True):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 3)
        lsquant.prepare(conv, Recipe(4, 4))
        batches = [x[:2], x[2:]]
        if empty:
            batches.insert(place, torch.empty(0, 3, 5, 5))
        lsquant.calibrate(conv, batches)
        found.append(state(conv))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())
    assert found[1]["input_quantizer.count"] == 3 * 9 * 9


def test_a_layer_that_gets_no_rows_in_one_batch():
    model, x = Experts(), torch.randn(40, 3)
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [x[x[:, 0] < 0], x[x[:, 0] >= 0]])
    for name, rows in (("low", x[x[:, 0] < 0]), ("high", x[x[:, 0] >= 0])):
        q = getattr(model, name).input_quantizer
        best, _ = oracle.best_squared_error(rows.numpy(), q.q_min, q.q_max)
        assert oracle.squared_error(rows.numpy(), q.step.item(), q.q_min, q.q_max) <= 1.001 * best
    other = Experts()
    lsquant.prepare(other, Recipe(4, 4))
    with pytest.raises(UsageError, match="'high' was not reached by any batch with values"):
        lsquant.calibrate(other, [x[x[:, 0] < 0]])
