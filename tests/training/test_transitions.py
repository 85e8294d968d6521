"""TransitionRate: traces counted by hand, codes counted by the oracle, what skips, decays, accumulates and resumes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsquant
import oracle
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.training import CosineSchedule, TransitionRate, fit, param_groups
from lsquant.training.seeds import generator

pytestmark = pytest.mark.filterwarnings("ignore:TransitionRate. first=0.5:UserWarning")  # few weights: many change
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups),
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups),
    "adamw": lambda groups: torch.optim.AdamW(groups),
}


def ten() -> nn.Sequential:
    """Ten weights of 0.4 at 2 bits and step 1: codes 0, and 1 from 0.5 on; and a layer of 8 bits."""
    model = nn.Sequential(nn.Linear(10, 1, bias=False), nn.Linear(1, 2, bias=False))
    lsquant.prepare(model, Recipe(2, None, rules=[Rule("1", weight=8)]))
    with torch.no_grad():
        model[0].weight.fill_(0.4)
        model[0].weight_quantizer.step.fill_(1.0)
        model[0].weight_quantizer.initial_step.fill_(1.0)
    return model


def push(model: nn.Module, up: list[int]) -> None:
    """A gradient of -1 for these weights, 0 for the others, and 1 for everything else."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    gradient = torch.zeros(10)
    gradient[up] = -1.0
    model[0].weight.grad = gradient.reshape(1, 10)


def controlled(model: nn.Module, kind: str = "sgd", lr: float = 0.2, decay: float = 0.0, **options: Any) -> Any:
    optimizer = OPTIMIZERS[kind](param_groups(model, lr, decay, low_bit=True))
    return optimizer, TransitionRate(model, optimizer, 0.5, **{"steps": 4, "gain": 0.1, "smoothing": 0.5, **options})


# ---- the equations ----


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_trace_counted_by_hand(kind):
    """2, 3, 0 and 5 of ten weights change code.

    K = 0.5 K + 0.5 k:  0.1, 0.2, 0.1, 0.3.   R = 0.5 (1 + cos(pi t / 4)) / 2:  0.5, 0.42678, 0.25, 0.07322.
    U = U + 0.1 (R - K):  0.2 + 0.04 = 0.24,  + 0.0226777 = 0.2626777,  + 0.015 = 0.2776777,  - 0.0226777 = 0.255.
    """
    model = ten()
    optimizer, control = controlled(model, kind)
    assert (control.rate, control.target, control.lr, control.weights) == (0.0, 0.5, 0.2, 10)
    found = []
    for up in ([0, 1], [2, 3, 4], [], [5, 6, 7, 8, 9]):
        push(model, up)
        optimizer.step()
        found.append([control.rate, control.lr])
    wanted = [[0.1, 0.24], [0.2, 0.2626777], [0.1, 0.2776777], [0.3, 0.255]]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-7)
    assert [row[0] for row in control.trace] == [0, 1, 2, 3]
    np.testing.assert_allclose([row[2] for row in control.trace], [0.5, 0.4267767, 0.25, 0.0732233], atol=1e-7)
    np.testing.assert_allclose([[row[1], row[3]] for row in control.trace], wanted, atol=1e-7)
    assert control.target == 0.0
    assert control.done == 4


def test_the_update_and_the_decay_go_by_u():
    """w - U (g + 0.5 w) by hand: 0.4 - 0.2 * (-1 + 0.2) = 0.56, then with U = 0.2 + 0.1 * (0.5 - 0.05) = 0.245
    (one weight of ten changed) 0.56 - 0.245 * 0.28 = 0.4914."""
    model = ten()
    optimizer, control = controlled(model, decay=0.5)
    other = model[1].weight.detach().clone()
    push(model, [0])
    optimizer.step()
    assert model[0].weight[0, 0].item() == pytest.approx(0.56, abs=1e-6)
    assert control.lr == pytest.approx(0.245)
    push(model, [])
    optimizer.step()
    assert model[0].weight[0, 0].item() == pytest.approx(0.4914, abs=1e-6)
    once = other - 0.2 * (1 + 0.5 * other)
    torch.testing.assert_close(model[1].weight.detach(), once - 0.2 * (1 + 0.5 * once))


def test_u_is_never_negative():
    model = ten()
    optimizer, control = controlled(model, gain=100.0)
    control.rate = 1.2
    push(model, [])
    optimizer.step()
    assert control.lr == 0.0
    before = model[0].weight.detach().clone()
    push(model, [0, 1, 2])
    optimizer.step()
    assert torch.equal(before, model[0].weight)


def test_u_comes_after_the_scheduler():
    model = ten()
    optimizer, _ = controlled(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.1)
    rates = []
    for up in ([0, 1], [2, 3, 4]):
        push(model, up)
        seen = model[0].weight.detach().clone()
        optimizer.step()
        rates.append((model[0].weight - seen)[0, up[0]].item())
        schedule.step()
    assert rates == pytest.approx([0.2, 0.24], abs=1e-6)
    groups = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert groups["weights"] == groups["steps"] == pytest.approx(0.02)


def test_defaults_follow_the_length_of_the_schedule():
    for steps, gain, smoothing in ((80_000, 0.2, 0.99), (4_000, 4.0, 0.99), (400, 40.0, 0.9), (10, 40.0, 0.0)):
        _, control = controlled(ten(), steps=steps, gain=None, smoothing=None)
        assert (control.gain, control.smoothing) == (pytest.approx(gain), pytest.approx(smoothing))


def test_the_trace_has_at_most_400_rows():
    model = ten()
    _, control = controlled(model, steps=1001)
    for _ in range(1001):
        control._count(0)
    with pytest.warns(UserWarning, match="more optimizer steps than steps=1001"):
        control._count(0)
    for _ in range(400):
        control._count(0)
    assert len(control.trace) <= 400
    assert [row[0] for row in control.trace[:3]] == [0, 3, 6]
    assert control.trace[-1][0] >= 990
    assert control.target == 0.0


# ---- what is counted ----


class Several(nn.Module):
    """A shared weight, a transposed convolution, steps per tensor, channel and group, first and last layer 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3)
        self.grow = nn.ConvTranspose2d(4, 6, 3)
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.three = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grow(F.relu(self.stem(x))).mean((2, 3))
        return self.head(self.three(F.relu(self.two(F.relu(self.one(x))))))


LOW = ("grow", "one", "three")


def several() -> Several:
    torch.manual_seed(3)
    model = Several()
    rules = [
        Rule("grow", weight=QuantSpec(3, granularity="channel")),
        Rule("three", weight=QuantSpec(2, granularity="group", group_size=3)),
    ]
    lsquant.prepare(model, Recipe.preset("w2a4", rules=rules), example_inputs=torch.zeros(1, 2, 5, 5))
    lsquant.calibrate(model, [(torch.randn(8, 2, 5, 5),)])
    return model


def oracle_codes(model: Several) -> dict[str, np.ndarray]:
    found = {}
    for name in LOW:
        layer = getattr(model, name)
        q = layer.weight_quantizer
        rows, step = layer.rows().detach().numpy(), q.step.detach().numpy()
        found[name] = oracle.codes(rows, step, q.q_min, q.q_max, axis=q.axis, group_size=q.spec.group_size).astype(int)
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("fix_steps", [True, False])
def test_counts_are_those_of_the_oracle(fix_steps, autocast, seed):
    model = several()
    optimizer = torch.optim.SGD(param_groups(model, 0.05, low_bit=True), momentum=0.9)
    control = TransitionRate(model, optimizer, 0.05, steps=8, fix_steps=fix_steps)
    assert control.weights == 4 * 6 * 9 + 36 + 36
    steps = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("quantizer.step")}
    rate, total = 0.0, 0
    for _ in range(6):
        before = oracle_codes(model)
        optimizer.zero_grad()
        for _ in range(2):  # accumulated: one step
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(torch.randn(4, 2, 5, 5)), torch.randint(3, (4,)))
            loss.backward()
        optimizer.step()
        after = oracle_codes(model)
        changed = sum(int((before[name] != after[name]).sum()) for name in LOW)
        total += changed
        rate = control.smoothing * rate + (1 - control.smoothing) * changed / control.weights
        assert control.rate == pytest.approx(rate, abs=1e-12)
    assert control.done == 6
    assert total > 5
    moved = {n for n, before in steps.items() if not torch.equal(before, model.get_parameter(n))}
    low = {f"{name}.weight_quantizer.step" for name in LOW}
    assert moved == steps.keys() - low if fix_steps else moved == set(steps)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_loss_scaler_skips_does_not_count(fused):
    model = ten()
    optimizer = torch.optim.Adam(param_groups(model, 0.2, low_bit=True), fused=fused)
    control = TransitionRate(model, optimizer, 0.5, steps=4, gain=0.1, smoothing=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x = torch.ones(1, 10)
    seen = []
    for bad in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(model(x).sum() * (math.inf if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        seen.append(control.done)
    assert seen == [1, 1, 2]


def test_a_closure_is_one_step_and_its_steps_stay_fixed():
    model = ten()
    optimizer, control = controlled(model)
    before = model[0].weight_quantizer.step.detach().clone()

    def closure() -> torch.Tensor:
        push(model, [0, 1])
        return torch.zeros(())

    optimizer.step(closure)
    assert (control.done, control.rate) == (1, pytest.approx(0.1))
    assert torch.equal(before, model[0].weight_quantizer.step)


def test_close_lets_go():
    model = ten()
    optimizer, control = controlled(model)
    control.close()
    push(model, [0, 1])
    optimizer.step()
    assert (control.done, control.rate) == (0, 0.0)


def test_a_tensor_as_learning_rate_stays_with_its_own_groups():
    model = several()
    optimizer = torch.optim.Adam(param_groups(model, torch.tensor(0.01), low_bit=True), foreach=False)
    control = TransitionRate(model, optimizer, 0.05, steps=8, gain=0.5)
    for x, y in batches(0):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
    assert rates.pop("low_bit") == pytest.approx(control.trace[-2][3])
    assert rates == dict.fromkeys(rates, pytest.approx(0.01))


def test_groups_are_found_under_other_names():
    """A state dict brings the names of its own groups, and U as a learning rate where no scheduler was."""
    model = ten()
    optimizer, control = controlled(model)
    push(model, [0, 1])
    optimizer.step()
    saved, state = optimizer.state_dict(), control.state_dict()
    saved["param_groups"][-1]["name"] = "other"
    again = ten()
    optimizer = OPTIMIZERS["sgd"](param_groups(again, 0.2, low_bit=True))
    resumed = TransitionRate(again, optimizer, 0.5, steps=4, gain=0.1, smoothing=0.5)
    optimizer.load_state_dict(saved)
    resumed.load_state_dict(state)
    push(again, [3])
    before = again[0].weight.detach().clone()
    optimizer.step()
    assert (again[0].weight - before)[0, 3].item() == pytest.approx(0.24, abs=1e-6)
    third = OPTIMIZERS["sgd"](param_groups(ten(), 0.2, low_bit=True))
    saved["param_groups"][-1]["name"] = "low_bit"
    third.load_state_dict(saved)  # before: the first learning rate is in the state
    assert [group["initial_lr"] for group in third.param_groups if group["name"] == "low_bit"] == [0.2]


def test_what_changes_behind_its_back_is_refused():
    model = several()
    optimizer = torch.optim.SGD(param_groups(model, 0.1, low_bit=True))
    control = TransitionRate(model, optimizer, steps=10)
    with pytest.raises(UsageError, match=r"has one already; call its close\(\)"):
        TransitionRate(model, optimizer, steps=10)
    other = torch.optim.SGD(param_groups(model, 0.1, low_bit=True))
    with pytest.raises(UsageError, match="another optimizer"):
        fit(model, batches, other, epochs=1, steps_per_epoch=5, transition=control, quiet=True)
    with pytest.raises(UsageError, match="made for steps=10; this training has 5"):
        fit(model, batches, optimizer, epochs=1, steps_per_epoch=5, transition=control, quiet=True)
    lsquant.prepare(model, Recipe(QuantSpec(2, granularity="channel"), 4))
    with pytest.raises(UsageError, match="prepared anew"):
        optimizer.step()
    control.close()
    optimizer.step()


def test_nan_has_no_code_and_frozen_weights_do_not_count():
    for fix_steps in (True, False):
        model = ten()
        optimizer, control = controlled(model, fix_steps=fix_steps)
        push(model, [0])
        model[0].weight.grad[0, 1] = math.nan
        optimizer.step()
        assert control.rate == pytest.approx(0.05)
    model = several()
    model.three.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(param_groups(model, 0.1, low_bit=True))
    assert TransitionRate(model, optimizer, steps=10).weights == 4 * 6 * 9 + 36


# ---- groups ----


def test_the_group_of_low_bits_is_there_when_asked_for():
    model = several()
    plain = {g["name"]: g for g in param_groups(model, 0.1, 1e-4)}
    assert list(plain) == ["weights", "no_decay", "steps"]
    asked = {g["name"]: g for g in param_groups(model, 0.1, 1e-4, low_bit=True)}
    assert list(asked) == ["weights", "no_decay", "steps", "low_bit"]
    assert {id(p) for p in asked["low_bit"]["params"]} == {id(getattr(model, name).weight) for name in LOW}
    assert {id(p) for p in asked["weights"]["params"]} == {id(model.stem.weight), id(model.head.weight)}
    assert asked["low_bit"]["weight_decay"] == 1e-4
    by_bits = {g["name"]: g for g in param_groups(model, 0.1, 1e-4, low_bit=True, weight_decay_by_bits=True)}
    assert {n: g["weight_decay"] for n, g in by_bits.items() if g["weight_decay"]} == {
        "weights": 1e-4, "low_bit/3bit": 0.5e-4, "low_bit/2bit": 0.25e-4,
    }  # fmt: skip
    assert sum(len(g["params"]) for g in by_bits.values()) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(list(by_bits.values()))
    assert TransitionRate(model, optimizer, steps=10).weights == 4 * 6 * 9 + 36 + 36


def test_steps_learn_relative_to_their_size():
    model = ten()
    with torch.no_grad():
        for layer, step in ((model[0], 0.26), (model[1], 0.011)):
            layer.weight_quantizer.initial_step.fill_(step)  # wherever the step is by now
    groups = {g["name"]: g for g in param_groups(model, 0.1, 1e-2, relative_step_lr=0.003)}
    assert {n: g["lr"] for n, g in groups.items() if n.startswith("steps")} == {
        "steps/0.weight_quantizer": pytest.approx(0.003 * 0.26),
        "steps/1.weight_quantizer": pytest.approx(0.003 * 0.011),
    }
    assert [g["weight_decay"] for n, g in groups.items() if n.startswith("steps")] == [0.0] * 2
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))
    unset = several()
    unset.stem.input_quantizer.forget()
    with pytest.warns(UserWarning, match=r"'stem.input_quantizer' is not set \(1 are not\).*calibrate first"):
        assert param_groups(unset, 0.1, relative_step_lr=0.003)  # a checkpoint that is loaded later brings the rates
    with pytest.raises(UsageError, match=r"step_lr.*relative_step_lr.*not both"):
        param_groups(model, 0.1, step_lr=0.1, relative_step_lr=0.1)


# ---- refusals ----


def test_what_is_refused():
    model = several()
    plain = torch.optim.SGD(param_groups(model, 0.1))
    good = torch.optim.SGD(param_groups(model, 0.1, low_bit=True))
    for first in (0.0, 1.0, -0.1):
        with pytest.raises(UsageError, match="first="):
            TransitionRate(model, good, first, steps=10)
    with pytest.warns(UserWarning, match=r"first=0\.2 lets 20% of the weights change code.*0\.002 is usual"):
        TransitionRate(model, good, 0.2, steps=10).close()
    for name, value in (("steps", 0), ("steps", 2.5), ("gain", 0.0), ("gain", math.inf), ("smoothing", 1.0)):
        with pytest.raises(UsageError, match=f"{name}="):
            TransitionRate(model, good, **{"steps": 10, name: value})
    with pytest.raises(UsageError, match=r"no group 'low_bit'.*low_bit=True"):
        TransitionRate(model, plain, steps=10)
    eight = nn.Sequential(nn.Linear(2, 2))
    lsquant.prepare(eight, Recipe(8, None))
    with pytest.raises(UsageError, match="has fewer than 8 bits, so there is nothing"):
        TransitionRate(eight, torch.optim.SGD(param_groups(eight, 0.1, low_bit=True)), steps=10)
    with pytest.raises(UsageError, match=r"4 of the 4|not in the optimizer's group"):
        TransitionRate(several(), good, steps=10)
    for kind in (torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adagrad):
        with pytest.raises(UsageError, match=rf"the optimizer is a {kind.__name__}; it is for SGD, Adam and AdamW"):
            TransitionRate(model, kind(param_groups(model, 0.1, low_bit=True)), steps=10)

    class Mine(torch.optim.AdamW):
        pass

    TransitionRate(model, Mine(param_groups(model, 0.1, low_bit=True)), steps=10)
    with pytest.raises(UsageError, match="give a torch optimizer"):
        TransitionRate(model, "sgd", steps=10)  # type: ignore[arg-type]
    cut = param_groups(model, 0.1, low_bit=True)
    cut[-1]["params"].pop()
    with pytest.raises(UsageError, match=r"the weight of layer '.*' is not in the optimizer's group"):
        TransitionRate(model, torch.optim.SGD(cut), steps=10)
    more = param_groups(model, 0.1, low_bit=True)
    more[-1]["params"].append(nn.Parameter(torch.zeros(3, 3)))
    with pytest.raises(UsageError, match=r"1 of the 4 weights .* are not the model's"):
        TransitionRate(model, torch.optim.SGD(more), steps=10)
    still = torch.optim.SGD(param_groups(model, 0.0, low_bit=True))
    with pytest.raises(UsageError, match="one learning rate above 0"):
        TransitionRate(model, still, steps=10)


def test_the_state_of_another_schedule_is_refused():
    model = ten()
    _, control = controlled(model)
    state = control.state_dict()
    for name, value in (("first", 0.4), ("steps", 5), ("gain", 0.2), ("smoothing", 0.25), ("fix_steps", False)):
        with pytest.raises(UsageError, match=f"{name}="):
            control.load_state_dict(state | {name: value})


# ---- in the loop ----


def batches(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = generator("transitions", epoch)
    return [(torch.randn(4, 2, 5, 5, generator=draw), torch.randint(3, (4,), generator=draw)) for _ in range(5)]


class Stop(Exception):
    pass


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(kind, tmp_path):
    def run(name: str, stop: int | None = None) -> tuple[Several, TransitionRate, list[dict]]:
        model = several()
        optimizer = OPTIMIZERS[kind](param_groups(model, 0.5 if kind == "momentum" else 0.01, 1e-3, low_bit=True))
        control = TransitionRate(model, optimizer, 0.05, steps=20, gain=0.2, smoothing=0.8)

        def after(iteration: int) -> None:
            if iteration == stop:
                raise Stop

        try:
            fit(
                model, batches, optimizer, epochs=4, steps_per_epoch=5, schedule=CosineSchedule(20), after_step=after,
                transition=control, log=tmp_path / f"{name}.jsonl", checkpoint=tmp_path / f"{name}.safetensors",
                checkpoint_every=2, resume=True, quiet=True,
            )  # fmt: skip
        except Stop:
            return run(name)
        return model, control, [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    whole, control, rows = run("whole")
    again, resumed, rows_again = run("stopped", 12)
    assert control.state_dict() == resumed.state_dict()
    assert control.done == 20
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    keys = ("transition_rate", "transition_target", "transition_lr", "lr", "loss")
    assert [[row[k] for k in keys] for row in rows] == [[row[k] for k in keys] for row in rows_again]
    assert rows[-1]["transition_target"] == 0.0
    assert rows[0]["transition_target"] == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)) / 2)
    assert all(row["transition_rate"] > 0 for row in rows)
    assert rows[-1]["transition_lr"] == control.lr


def test_the_bar_says_where_the_rate_is(capfd):
    model = several()
    optimizer = torch.optim.SGD(param_groups(model, 0.05, low_bit=True))
    control = TransitionRate(model, optimizer, 0.05, steps=5)
    fit(model, batches, optimizer, epochs=1, steps_per_epoch=5, transition=control)
    assert f"transitions {control.rate:.2g} (target 0), low-bit lr {control.lr:.3g}" in capfd.readouterr().err
