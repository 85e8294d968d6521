"""What quantization shifts on average is taken back: means of outputs, layer by layer; everything else stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from lsquant import Recipe, UsageError


class Net(nn.Module):
    """A convolution with BatchNorm, one with a bias, one with neither, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b, self.c = nn.Conv2d(6, 5, 3, groups=1), nn.Conv2d(5, 4, 1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.norm(self.a(x)))))))
        return self.head(x.mean((2, 3)))


def made() -> tuple[Any, list[torch.Tensor]]:
    torch.manual_seed(0)
    model, batches = Net(), [torch.rand(16, 3, 8, 8) for _ in range(3)]
    for x in batches:
        model(x)
    lsquant.prepare(model.eval(), Recipe(2, 4), example_inputs=batches[0])
    lsquant.calibrate(model, batches)
    return model, batches


def output_means(model: Any, batches: list[torch.Tensor], name: str) -> torch.Tensor:
    outputs: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, a, y: outputs.append(y.detach()))
    with torch.no_grad():
        for x in batches:
            model(x)
    hook.remove()
    return torch.cat(outputs).movedim(1, 0).flatten(1).double().mean(1)


def test_means_are_those_of_the_float_model() -> None:
    model, batches = made()
    with lsquant.disabled(model):
        wanted = {name: output_means(model, batches, name) for name in ("norm", "b", "c", "head")}
    before = {name: (output_means(model, batches, name) - wanted[name]).abs().max() for name in wanted}
    state = copy.deepcopy(model.state_dict())
    found = lsquant.correct_bias(model, batches)
    after = {name: (output_means(model, batches, name) - wanted[name]).abs().max() for name in wanted}
    assert list(found) == ["a", "b", "head"]
    assert all(value > 0.01 for value in found.values())
    for name in ("norm", "b", "head"):
        assert after[name] < 1e-5 < 0.01 < before[name], name
    assert after["c"] > 1e-3  # nothing can be corrected there
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {"norm.running_mean", "b.bias", "head.bias"}


def test_layers_called_twice_or_behind_a_shared_norm_are_left(tmp_path: Any) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
            self.end = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(self.a(x))
            return self.end(self.norm(self.norm(self.b(x))))

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 4)
    lsquant.prepare(model, Recipe(3, 3), example_inputs=x)
    lsquant.calibrate(model, [x])
    assert list(lsquant.correct_bias(model, [x])) == ["end"]


def test_an_integer_only_network_comes_closer(tmp_path: Any) -> None:
    model, batches = made()
    lsquant.revert(model)
    lsquant.trace(model, batches[0])
    lsquant.prepare(model, Recipe(3, 8, joins=8), example_inputs=batches[0])
    lsquant.calibrate(model, batches, weights="mse", importance=True)
    with lsquant.disabled(model), torch.no_grad():
        wanted = torch.cat([model(x) for x in batches])

    def error() -> float:
        with torch.no_grad():
            return (torch.cat([lsquant.fuse(model)(x) for x in batches]) - wanted).square().mean().item()

    before = error()
    lsquant.correct_bias(model, batches)
    assert error() < 0.5 * before
    network = lsquant.fuse(model)
    program = lsquant.export_program(network, tmp_path / "p")
    assert lsquant.verify(network, program, batches).exact


def test_what_is_refused_changes_nothing() -> None:
    model, batches = made()
    state = copy.deepcopy(model.state_dict())

    def failing(m: nn.Module, x: torch.Tensor) -> Any:
        failing.calls += 1  # type: ignore[attr-defined]
        if failing.calls > 10:  # type: ignore[attr-defined]
            raise RuntimeError("the data ends here")
        return m(x)

    failing.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="the data ends here"):
        lsquant.correct_bias(model, batches, forward=failing)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with pytest.raises(UsageError, match="has no quantized layer"):
        lsquant.correct_bias(nn.Linear(2, 2), batches)
    fresh = Net()
    lsquant.prepare(fresh, Recipe(4, 8))
    with pytest.raises(UsageError, match="has no step yet"):
        lsquant.correct_bias(fresh, batches)
    with pytest.raises(UsageError, match="no batches were given"):
        lsquant.correct_bias(model, [])
