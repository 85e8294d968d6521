"""``sensitivity``: a planted bad layer ranks first; values equal an independent computation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant import Recipe, sensitivity
from lsquant._util.errors import UsageError


def network() -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """A network at 8 bits and batches whose targets are the float network's outputs: each quantizer does harm."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    data = []
    for _ in range(3):
        x = torch.randn(32, 8)
        data.append((x, model(x).detach()))
    lsquant.prepare(model, Recipe(weight=8, activation=8))
    lsquant.calibrate(model, data)
    return model, data


def error(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(output, batch[1])


NAMES = [f"{i}.{kind}_quantizer" for i in (0, 2, 4) for kind in ("weight", "input")]


@pytest.mark.parametrize("bad", NAMES)
@pytest.mark.parametrize("factor", [0.02, 60.0])
def test_a_bad_step_ranks_first(bad, factor):
    model, data = network()
    with torch.no_grad():
        model.get_submodule(bad).step.mul_(factor)
    found = sensitivity(model, data, error, higher_is_better=False)
    assert found[0].name == bad
    assert found[0].gain > 0
    assert {s.name for s in found} == set(NAMES)
    assert [s.gain for s in found] == sorted((s.gain for s in found), reverse=True)
    up = sensitivity(model, data, lambda y, b: -error(y, b))
    assert [s.name for s in up] == [s.name for s in found]


def test_values_equal_an_independent_computation():
    model, data = network()
    found = {s.name: s for s in sensitivity(model, data, error, higher_is_better=False)}

    def mean() -> float:
        with torch.no_grad():
            return sum(float(error(model(x), (x, y))) for x, y in data) / len(data)

    base = mean()
    for name, item in found.items():
        with lsquant.disabled(model, name):
            without = mean()
        assert item.base == pytest.approx(base, rel=1e-6)
        assert item.without == pytest.approx(without, rel=1e-6)
        assert item.gain == item.base - item.without
    assert found["0.weight_quantizer"].spec == str(model[0].weight_quantizer.spec)


def test_the_model_is_left_as_it_was():
    model, data = network()
    model.train()
    model[2].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    seen = []

    def metric(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append((any(m.training for m in model.modules()), output.requires_grad))
        return error(output, batch)

    sensitivity(model, data, metric)
    assert set(seen) == {(False, False)}
    assert len(seen) == 3 * (6 + 1)
    assert modes == [m.training for m in model.modules()]
    assert all(m.enabled for m in model.modules() if isinstance(m, lsquant.Quantizer))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_error_in_the_metric_restores_everything():
    model, data = network()
    model.train()
    calls = []

    def metric(output: Tensor, batch: tuple[Tensor, Tensor]) -> float:
        calls.append(1)
        if len(calls) == 5:
            raise KeyError("label")
        return 0.0

    with pytest.raises(KeyError):
        sensitivity(model, data, metric)
    assert all(m.training for m in model.modules())
    assert all(m.enabled for m in model.modules() if isinstance(m, lsquant.Quantizer))


def test_generators_max_batches_and_forward():
    model, data = network()
    once = sensitivity(model, iter(data), error)
    assert once == sensitivity(model, data, error)
    assert sensitivity(model, data, error, max_batches=1) == sensitivity(model, data[:1], error)
    rows = [{"image": x, "target": y} for x, y in data]
    named = sensitivity(model, rows, lambda y, b: error(y, (y, b["target"])), forward=lambda m, b: m(b["image"]))
    assert named == once


def test_quantizers_that_are_off_are_left_out():
    model, data = network()
    with lsquant.disabled(model, "2"):
        found = sensitivity(model, data, error)
    assert {s.name for s in found} == {n for n in NAMES if n[0] != "2"}


def test_a_nan_ranks_last():
    model, data = network()

    def metric(output: Tensor, batch: tuple[Tensor, Tensor]) -> float:
        return float("nan") if not model[0].weight_quantizer.enabled else float(error(output, batch))

    assert sensitivity(model, data, metric)[-1].name == "0.weight_quantizer"


def test_wrong_use():
    model, data = network()
    with pytest.raises(UsageError, match="no quantizer that is on"):
        sensitivity(nn.Linear(2, 2), data, error)
    with pytest.raises(UsageError, match="gave a NoneType, not a number"):
        sensitivity(model, data, lambda y, b: None)
    with pytest.raises(UsageError, match="gave a Tensor, not a number"):
        sensitivity(model, data, lambda y, b: y)
    with pytest.raises(UsageError, match="NaN with all quantizers on"):
        sensitivity(model, data, lambda y, b: float("nan"))
    with pytest.raises(UsageError, match="no batches"):
        sensitivity(model, [], error)


def test_it_prints():
    model, data = network()
    line = str(sensitivity(model, data, error)[0])
    assert "weight_quantizer: " in line or "input_quantizer: " in line
    assert "gain " in line


def test_a_compiled_model_is_not_compiled_again():
    model, data = network()
    compiled = torch.compile(model, backend="eager")
    found = sensitivity(compiled, data, error)
    assert [s.name.removeprefix("_orig_mod.") for s in found] == [s.name for s in sensitivity(model, data, error)]
