"""Random forwards of sums, products, slices, views and in-place functions on tensors with several names."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsquant
from helpers.traceable import run
from lsquant import UsageError

STATEMENTS = [
    "{new} = {a} + {b}",
    "{new} = {a} * {b}",
    "{new} = {a}",
    "{new} = self.conv({a})",
    "{new} = self.act({a})",
    "{a} += {b}",
    "{a} *= 0.5",
    "{a}.add_({b})",
    "{a}.mul_({b})",
    "F.relu({a}, inplace=True)",
    "{new} = {a}.relu_()",
    "{a}.clamp_(-0.5, 0.5)",
    "{new} = F.hardswish({a}) - {b}.mean((2, 3), keepdim=True)",
    "{new} = torch.cat([{a}[:, :2], {b}[:, 2:]], 1)",
    "p, r = {a}.chunk(2, 1); {new} = torch.cat((r, p), 1)",
    "p = {a}[:, 1:3]; p += {b}[:, :2]",
    "p = {a}.view({a}.shape[0], -1); F.relu_(p)",
    "p = {a}.flatten(1); {new} = p.reshape({b}.shape)",
    "{a}[:, 1] = {b}[:, 2]",
    "{a}[..., 1:] += {b}[..., :-1]",
    "{new} = {a}[:, [1, 0, 3, 2]].clamp(max=1)",
    "{new} = F.dropout({a}, 0.3, self.training)",
    "{new} = ({a} if {a}.shape[1] == 4 else {b}).sigmoid()",
]


def forward_of(seed: int) -> str:
    """The source of a forward, with an argument x of four channels; every variable has its shape."""
    draw = random.Random(seed)
    names, lines = ["v0"], ["v0 = self.conv(x)"]
    for i in range(1, draw.randint(4, 9)):
        statement = draw.choice(STATEMENTS)
        a, b = draw.choice([*names[-3:]] * 4 + ["x"]), draw.choice(["x", *names])
        lines.append(statement.format(new=f"v{i}", a=a, b=b))
        if "{new}" in statement:
            names.append(f"v{i}")
    lines.append(f"return {names[-1]} + {draw.choice(names)}, {draw.choice(names)} * 1.0, self.conv(v0)")
    return "def forward(self, x):\n    " + "\n    ".join(lines) + "\n"


def network(seed: int, inplace: bool) -> nn.Module:
    space: dict[str, Any] = {"torch": torch, "F": F}
    exec(forward_of(seed), space)
    model = type("Random", (nn.Module,), {"forward": space["forward"]})()
    model.conv, model.act = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace)
    return model


def attempt(model: nn.Module, x: torch.Tensor, training: bool) -> dict[str, torch.Tensor] | None:
    """The run; None where autograd refuses it, for a tensor that it needs was changed in place."""
    try:
        return run(model, x, training)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None


def refusal(model: nn.Module, x: torch.Tensor) -> str | None:
    """What trace says where it refuses a network; None where it is traced."""
    try:
        lsquant.trace(model, x)
    except UsageError as error:
        return str(error)
    return None


SEEDS = [*range(70), 259, 261, 336, 530, 667, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(70, 600))]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_bits_or_an_error_in_advance(seed):
    """What is traced computes the same; what is not says so before anything is compared."""
    model = network(seed, seed % 2 == 0)
    kind = type(model)
    plain = kind()
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.conv, plain.act = copy.deepcopy(model.conv), copy.deepcopy(model.act)
    x, more = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 5, 5)
    if (message := refusal(model, x)) is not None:
        assert "gives other outputs" not in message, forward_of(seed)
        assert "in place" in message, forward_of(seed)
        assert not lsquant.trace(model, x, strict=False).untraced, forward_of(seed)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            one, two = attempt(model, more, training), attempt(plain, more, training)
        if two is not None:
            assert one is not None
            assert list(one) == list(two)
            for name in two:
                assert torch.equal(one[name], two[name]), f"{name}, training={training}\n{forward_of(seed)}"


def test_most_of_them_are_traced():
    """The test above is no test of errors only."""
    refused = [refusal(network(seed, seed % 2 == 0), torch.randn(2, 4, 5, 5)) for seed in range(40)]
    assert refused.count(None) >= 15
