"""Parts of a low-bit run: averages of weights, BatchNorm statistics estimated anew, wider recipes, what is logged."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.logs import untimed
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.training import (
    WeightAverage,
    fit,
    load_state,
    param_groups,
    reestimate_batchnorm,
    save_state,
    widened,
)  # fmt: skip
from lsquant.training.seeds import generator

# ---- averages of weights ----


def ramp(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(value)


def test_an_average_literal():
    """d_1 = 2/11, d_2 = 3/12, d_3 = min(0.3, 4/13) = 0.3."""
    model = nn.Linear(1, 1, bias=False)
    ramp(model, 1.0)
    average = WeightAverage(model, 0.3)
    expected = 1.0
    for value, decay in ((2.0, 2 / 11), (4.0, 3 / 12), (-1.0, 0.3)):
        ramp(model, value)
        average.update()
        expected = decay * expected + (1 - decay) * value
        assert average.average["weight"].item() == pytest.approx(expected, rel=1e-6)


def test_swapped_is_the_average_inside_and_the_same_bits_outside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).to(torch.bfloat16)
    average = WeightAverage(model, 0.5)
    for _ in range(3):
        model(torch.randn(8, 3, dtype=torch.bfloat16)).sum().backward()
        with torch.no_grad():
            model[0].weight += 0.1
        average.update()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert average.average["0.weight"].dtype == torch.float32
    with average.swapped() as inside:
        assert inside is model
        for name, t in model.state_dict().items():
            if not t.is_floating_point():
                assert t == 3  # num_batches_tracked
            else:
                assert torch.equal(t, average.average[name].to(torch.bfloat16)), name
        assert not torch.equal(model[0].weight, before["0.weight"])
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ZeroDivisionError), average.swapped():
        raise ZeroDivisionError
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    average.apply()
    assert torch.equal(model[0].weight, average.average["0.weight"].to(torch.bfloat16))


def test_an_average_of_steps_and_its_state(tmp_path):
    model = lsq_net()
    average = WeightAverage(model, 0.9)
    assert {"0.weight_quantizer.step", "0.weight", "1.running_var"} <= set(average.average)
    assert not [name for name in average.average if name.endswith(("guarded", "signed", "count"))]
    with torch.no_grad():
        model[0].weight_quantizer.step.mul_(3.0)
    average.update()
    save_state(tmp_path / "a.safetensors", average.state_dict())
    other = WeightAverage(lsq_net(), 0.9)
    other.load_state_dict(load_state(tmp_path / "a.safetensors"))
    for a in (average, other):
        a.update()
    assert other.updates == average.updates == 2
    name = "0.weight_quantizer.step"
    assert average.average[name] != other.average[name]  # one model's step is three times the other's
    assert (average.average[name] - other.average[name]).item() == pytest.approx(
        (1 - 3 / 12) * (model[0].weight_quantizer.step - other.live[name]).item(), rel=1e-5
    )
    with pytest.raises(UsageError, match="another model"):
        WeightAverage(nn.Linear(2, 2)).load_state_dict(average.state_dict())
    with pytest.raises(UsageError, match=r"decay=1\.0"):
        WeightAverage(model, 1.0)


# ---- BatchNorm ----


def lsq_net() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 4), nn.BatchNorm1d(4)
    )
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [torch.randn(64, 3, generator=generator("calibration"))])
    return model


def test_reestimated_statistics_are_means_over_batches():
    """Against means and variances of what the layers are fed, the second BatchNorm behind the first one's batches."""
    model = lsq_net()
    batches = [3.0 + 2.0 * torch.randn(n, 3, generator=generator("batch", n)) for n in (16, 16, 32)]
    first, second = [], []
    with torch.no_grad():
        for x in batches:
            v = model[0](x)
            first.append((v.mean(0), v.var(0)))
            h = (v - v.mean(0)) / torch.sqrt(v.var(0, unbiased=False) + 1e-5)  # gamma 1, beta 0
            v = model[4](torch.relu(h))
            second.append((v.mean(0), v.var(0)))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    model[3].eval()
    reestimate_batchnorm(model, batches)
    for norm, found in ((model[1], first), (model[5], second)):
        means, variances = (torch.stack(t).mean(0) for t in zip(*found, strict=True))
        assert torch.allclose(norm.running_mean, means, rtol=1e-4, atol=1e-5)
        assert torch.allclose(norm.running_var, variances, rtol=1e-4, atol=1e-5)
        assert norm.momentum == 0.1
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in model] == [True, True, True, False, True, True]
    assert not any(q.guarded for _, q in lsquant.quantizers(model))


def test_as_many_batches_as_asked_for_and_layers_that_none_reaches():
    model = nn.ModuleDict({"used": nn.BatchNorm1d(2), "unused": nn.BatchNorm1d(2)})
    model["unused"].running_mean.fill_(5.0)
    batches = [torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.zeros(2, 2), torch.full((2, 2), 99.0)]
    reestimate_batchnorm(model, batches, max_batches=2, forward=lambda m, x: m["used"](x))
    assert model["used"].running_mean.tolist() == [1.0, 2.0]
    assert model["used"].running_var.tolist() == [1.0, 4.0]
    assert model["unused"].running_mean.tolist() == [5.0, 5.0]


def test_after_an_error_statistics_are_what_they_were():
    model = lsq_net().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for batches, error in (([torch.ones(8, 3), torch.ones(8, 7)], UsageError), ([], UsageError)):
        with pytest.raises(error):
            reestimate_batchnorm(model, batches)
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m.training for m in model.modules())
    assert model[1].momentum == 0.1
    with pytest.raises(UsageError, match="no BatchNorm"):
        reestimate_batchnorm(nn.Linear(2, 2), [torch.ones(1, 2)])


# ---- more bits ----


def test_a_widened_recipe_literal():
    narrow = QuantSpec(2, narrow=True, granularity="channel")
    rules = [Rule("a", weight=3), Rule("b", None, 6), Rule("c", narrow)]
    recipe = Recipe(2, None, rules, [Rule("first", 8, 8)])
    wide = Recipe(
        4, None, [Rule("a", weight=4), Rule("b", None, 6), Rule("c", QuantSpec(4, narrow=True, granularity="channel"))],
        [Rule("first", 8, 8)],
    )  # fmt: skip
    assert widened(recipe, 4) == wide
    assert widened(recipe, 2) == recipe
    assert widened(Recipe.preset("w2a2"), 8) == Recipe.preset("w8a8")


# ---- what the loop logs ----


def test_accuracy_and_gradient_norm_in_training(tmp_path):
    """One batch again and again, learning rate 0: what can be computed beside it."""
    torch.manual_seed(1)
    model = nn.Linear(3, 4)
    x, y = torch.randn(10, 3), torch.randint(0, 4, (10,))
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    norm = sum(p.grad.square().sum() for p in model.parameters()).sqrt().item()
    right = sum(int(row.argmax()) == int(label) for row, label in zip(model(x), y, strict=True))
    options = {"epochs": 2, "steps_per_epoch": 3, "log": tmp_path / "log.jsonl", "quiet": True}
    optimizer = torch.optim.SGD(param_groups(model, 0.0))
    fit(model, lambda epoch: [(x, y)] * 3, optimizer, clip_norm=1e-3, **options)
    for row in untimed(tmp_path / "log.jsonl"):
        assert row["train_accuracy"] == 10.0 * right
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert 0 < right < 10


def test_batches_without_classes_have_no_accuracy():
    model = nn.Linear(3, 4)
    x = torch.randn(10, 3)
    for batch in ((x, torch.randn(10, 4)), (x, torch.zeros(10, 4, dtype=torch.long)), {"input": x}):
        done = fit(
            model, lambda epoch, batch=batch: [batch], torch.optim.SGD(param_groups(model, 0.0)), epochs=1,
            steps_per_epoch=1, loss=lambda output, batch, _: output.square().mean(), quiet=True,
        )  # fmt: skip
        assert "train_accuracy" not in done.row
        assert "grad_norm" not in done.row


def test_the_time_of_an_epoch_is_that_of_training_over_all_restarts(tmp_path, monkeypatch):
    """A batch takes 2 seconds, evaluation 50; killed in the middle of the epoch, after a checkpoint."""
    now, state = [100.0], {}
    monkeypatch.setattr("lsquant.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))

    def batches(epoch):
        for number in range(4):
            if number >= state["done"]:  # what was done before is drawn again, but not trained
                now[0] += 2.0
            yield torch.ones(5, 3), torch.zeros(5, dtype=torch.long)

    def evaluate(model):
        now[0] += 50.0
        return {}

    def after_step(iteration):
        if iteration == state["stop"]:
            now[0] += 1000.0
            raise KeyboardInterrupt

    options = {"epochs": 1, "steps_per_epoch": 4, "evaluate": evaluate, "after_step": after_step, "quiet": True}
    for now_state in ({"done": 0, "stop": 2}, {"done": 2, "stop": None}):
        state.update(now_state)
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(param_groups(model, 0.1))
        with contextlib.suppress(KeyboardInterrupt):
            done = fit(
                model, batches, optimizer, checkpoint=tmp_path / "c.safetensors", checkpoint_every=2, resume=True,
                **options,
            )  # fmt: skip
    assert done.row["seconds"] == 8.0
    assert done.row["samples_per_second"] == 2.5
