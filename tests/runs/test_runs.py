"""A run takes its optimizer and its loss from a task that brings them, and needs no task that is known by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lsquant
from lsquant._util.errors import UsageError
from lsquant._util.tensors import write_tensors
from lsquant.runs import Run, Settings, read_run, run_training, training
from lsquant.training.seeds import generator
from lsquant.training.state import load_state, save_state

RECIPE = lsquant.Recipe(4, 4)
SETTINGS = Settings(batch_size=16, float_epochs=4, epochs=3, lr=0.01, float_lr=0.1, calibration_batches=2, threads=1)


class Plain:
    """y = |x| W, measured by its squared error: nothing of it is a classification. It brings no loss of its own."""

    name = "regression"
    settings = SETTINGS

    def __init__(self) -> None:
        self.options: dict[str, Any] = {"shape": (3, 2), "note": None}  # TOML gives back a list, and no None
        self.made: list[tuple[str, type]] = []

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

    def example_input(self) -> Tensor:
        return torch.ones(1, 3)

    def batches(self, split: str, *, batch_size: int, seed: int = 0, epoch: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        draw = generator(split, seed, epoch)
        weight = torch.tensor([[1.0, -1.0], [0.5, 2.0], [-2.0, 0.25]])
        for _ in range(self.steps_per_epoch(batch_size)):
            x = torch.randn(batch_size, 3, generator=draw)
            yield x, x.abs() @ weight

    def steps_per_epoch(self, batch_size: int) -> int:
        return 12

    def metric(self, model: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            x, y = next(iter(self.batches("test", batch_size=256)))
            return {"squared_error": float((model(x) - y).square().mean())}


class Regression(Plain):
    """The same with its loss and its optimizers."""

    def make_loss(self, settings: Settings) -> Any:
        return lambda output, batch, teacher_output: (output - batch[1]).square().mean()

    def make_optimizer(self, model: nn.Module, settings: Settings, phase: str) -> torch.optim.Optimizer:
        lr = settings.float_lr if phase == "float" else settings.lr
        groups = lsquant.param_groups(model, lr, low_bit=phase == "lsq" and settings.transition_rate is not None)
        optimizer = torch.optim.AdamW(groups) if phase == "float" else torch.optim.RMSprop(groups)
        self.made.append((phase, type(optimizer)))
        return optimizer


def run_of(path: Path, **changes: Any) -> Run:
    return Run(path, Regression(), RECIPE, replace(SETTINGS, **changes))


def test_a_task_brings_its_optimizer_and_its_loss(tmp_path):
    run: Any = run_of(tmp_path / "a", progressive=(8,))
    metrics = run_training(run, quiet=True)
    assert run.task.made == [("float", torch.optim.AdamW), ("lsq-8", torch.optim.RMSprop), ("lsq", torch.optim.RMSprop)]
    untrained = run.task.metric(run.task.model())["squared_error"]
    assert metrics["float"]["squared_error"] < 0.5 * untrained
    assert metrics["lsq"]["squared_error"] < 0.5 * untrained


def test_the_default_loss_wants_class_numbers(tmp_path):
    """So what trains the regression above is its own loss."""
    with pytest.raises(ValueError, match="match target batch_size"):
        run_training(replace(run_of(tmp_path / "a"), task=Plain()), quiet=True)


def test_a_transition_rate_needs_the_low_bit_group_of_the_tasks_optimizer(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="the optimizer is a RMSprop; it is for SGD, Adam and AdamW"):
        run_training(run_of(tmp_path / "a", transition_rate=0.01), quiet=True)
    low_bit = lambda self, model, settings, phase: torch.optim.AdamW(lsquant.param_groups(model, 0.01, low_bit=True))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Regression, "make_optimizer", low_bit)
        run_training(run_of(tmp_path / "a", transition_rate=0.01), overwrite=True, quiet=True)
    plain = lambda self, model, settings, phase: torch.optim.SGD(lsquant.param_groups(model, 0.01))  # noqa: E731
    monkeypatch.setattr(Regression, "make_optimizer", plain)
    with pytest.raises(UsageError, match="no group 'low_bit'"):
        run_training(run_of(tmp_path / "b", transition_rate=0.01), quiet=True)


class Stop(BaseException):
    """Stands in for a kill."""


def test_a_run_of_a_task_that_no_table_knows_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole = run_of(tmp_path / "whole")
    run_training(whole, quiet=True)
    cut = run_of(tmp_path / "cut")
    fit = training.fit

    def stop_in_the_last_phase(*args: Any, label: str, **options: Any) -> Any:
        if label == "lsq":
            raise Stop
        return fit(*args, label=label, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit", stop_in_the_last_phase)
        with pytest.raises(Stop):
            run_training(cut, quiet=True)
    assert not cut.file("model.safetensors").exists()
    run_training(run_of(cut.path), resume=True, quiet=True)
    assert cut.file("model.safetensors").read_bytes() == whole.file("model.safetensors").read_bytes()
    assert load_file(cut.file("model.safetensors"))


def test_what_differs_from_the_stored_run_is_named(tmp_path):
    run = run_of(tmp_path / "a")
    run_training(run, quiet=True)
    stored = read_run(run.path)
    assert (stored.task_name, stored.options, stored.recipe, stored.settings) == (
        "regression",
        {"shape": [3, 2]},
        RECIPE,
        SETTINGS,
    )
    other = run_of(run.path, lr=0.5)
    other.task.options["shape"] = (3, 5)
    with pytest.raises(UsageError, match=r"lr was 0\.01, not 0\.5; options was .*\[3, 2\].*, not .*\[3, 5\]"):
        run_training(other, resume=True, quiet=True)
    other = run_of(run.path)
    other.task.name = "classification"
    with pytest.raises(UsageError, match="task was 'regression', not 'classification'"):
        run_training(other, resume=True, quiet=True)


def without_bounds(value: Any) -> Any:
    """What an earlier version wrote: the same without the bounds of quantizers."""
    if isinstance(value, dict):
        return {key: without_bounds(part) for key, part in value.items() if not str(key).endswith(".bounds")}
    return value


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_of_an_earlier_version_goes_on_to_the_same_bits(ema, tmp_path, monkeypatch):
    whole = run_of(tmp_path / "whole", ema=ema)
    run_training(whole, quiet=True)
    cut = run_of(tmp_path / "cut", ema=ema)

    def stop_at_the_end(self: Any, what: str, network: nn.Module, words: str) -> None:
        measure(self, what, network, words)
        if what == "rounded":
            return
        if what in ("raw", "lsq"):
            raise Stop

    measure = training._Training._measure
    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "_measure", stop_at_the_end)
        with pytest.raises(Stop):
            run_training(cut, quiet=True, checkpoint_every=2)
    checkpoint = cut.file("last/lsq.safetensors")
    state = load_state(checkpoint)
    old = without_bounds(state)
    assert len(old["model"]["state"]) < len(state["model"]["state"])
    save_state(checkpoint, old)
    run_training(run_of(cut.path, ema=ema), resume=True, quiet=True)
    assert cut.file("model.safetensors").read_bytes() == whole.file("model.safetensors").read_bytes()
    model = cut.model()
    tensors = {k: v for k, v in load_file(cut.file("model.safetensors")).items() if not k.endswith(".bounds")}
    write_tensors(
        tmp_path / "old.safetensors", tensors, lsquant.checkpoint.read_metadata(cut.file("model.safetensors"))
    )
    again = lsquant.load(cut.task.model(), tmp_path / "old.safetensors")
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())


@pytest.mark.parametrize("damage", ["deleted", "cut"])
def test_a_finished_run_that_lost_its_model_makes_it_again(damage, tmp_path, capsys):
    run = run_of(tmp_path / "a")
    metrics = run_training(run, quiet=True)
    path = run.file("model.safetensors")
    whole = path.read_bytes()
    path.unlink() if damage == "deleted" else path.write_bytes(whole[: len(whole) // 2])
    again = run_training(run_of(run.path), resume=True)
    assert path.read_bytes() == whole
    assert {**again, "seconds": 0} == {**metrics, "seconds": 0}
    assert "it is made again from the checkpoints in" in capsys.readouterr().err
    run_training(run_of(run.path), resume=True)
    assert "is complete: nothing is left to train" in capsys.readouterr().err
