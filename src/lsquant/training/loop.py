"""The training loop. A run that is killed at any point and resumed ends with the bits of one that was not."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lsquant._util.batches import run_batch
from lsquant._util.entry import Entry, shown
from lsquant._util.errors import DamagedFile, LsquantError, UsageError
from lsquant.fusion import FusedNetwork
from lsquant.training.distillation import classification_loss, hits
from lsquant.training.facts import quantizer_facts
from lsquant.training.log import Log
from lsquant.training.oscillation import EVERY, Oscillation
from lsquant.training.progress import ProgressBar, message
from lsquant.training.schedule import CosineSchedule
from lsquant.training.seeds import rng_state, set_rng_state
from lsquant.training.state import (
    check_model_part,
    check_optimizer_part,
    load_model_state,
    load_state,
    model_state,
    save_state,
)  # fmt: skip
from lsquant.training.transitions import TransitionRate, unwrapped

Loss = Callable[[Any, Any, Any], torch.Tensor]


class Stateful(Protocol):
    """What else must survive a restart: a loss scaler, an average of weights."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass
class TrainProgress:
    """Hold training progress; also `fit`'s result.

    epoch: epochs done
    step: iterations done in the present epoch
    log_position: bytes of the log
    seconds: time spent training, over all restarts
    row: the last epoch's row of the log
    loss_sum, right, norm_sum, targets, samples, epoch_seconds: sums over the present epoch: loss, right answers,
        gradient norms, targets, samples, time
    """

    epoch: int = 0
    step: int = 0
    log_position: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    row: dict[str, Any] = field(default_factory=dict)
    right: float = 0.0
    norm_sum: float = 0.0
    targets: int = 0
    samples: int = 0
    epoch_seconds: float = 0.0


def fit(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
    schedule: CosineSchedule | None = None,
    loss: Loss = classification_loss,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    teacher: nn.Module | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    autocast: str | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, Any]] | None = None,
    observe: Callable[[nn.Module], dict[str, dict[str, Any]]] = quantizer_facts,
    after_step: Callable[[int], None] | None = None,
    extras: Mapping[str, Stateful] | None = None,
    transition: TransitionRate | None = None,
    oscillation_every: int = EVERY,
    log: str | os.PathLike[str] | Log | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    label: str = "train",
    quiet: bool = False,
) -> TrainProgress:
    """Train `model` in place for `epochs` epochs of `steps_per_epoch` iterations, and return the progress.

    batches: `batches(epoch)` gives the batches of an epoch, counted from 0, the same ones whenever it is called with
        that number (shuffle by a generator seeded with the seed and the epoch; draws from the global generators are
        repeated as well)
    schedule: sets the learning rates before every step
    loss: `loss(output, batch, teacher_output)` gives a scalar; `teacher_output` is None without a teacher
    forward: `forward(model, batch)` gives the output; by default see `calibrate`
    teacher: a network in eval mode, which is not trained
    clip_norm: largest norm of the gradient of all parameters together
    accumulate: cut every batch into so many parts, whose gradients are added: memory for one part, and the same step
        for a loss that is the mean over samples of equal weight, and a network without BatchNorm
    autocast: "bfloat16": the type of the forward passes of model and teacher
    evaluate: `evaluate(model)` gives metrics for the log at the end of an epoch
    observe: `observe(model)` (of a `FusedNetwork` the model in it) gives facts by quantizer, between backward and step
        in an epoch's last iteration
    after_step: `after_step(iteration)` is called after every optimizer step
    extras: other things to checkpoint, by name
    transition: sets the learning rate of the low-bit weights, after `schedule`; K, R and U join the log and the bar
    oscillation_every: iterations between two looks of `Oscillation`, whose shares join the facts
    log: a JSON-lines file or a `Log`; one row an epoch: loss, learning rates, metrics, facts; the accuracy in training
        where batch[1] is class numbers; the mean norm of the gradient before it is clipped; `seconds`, without
        `evaluate`, and samples per second
    checkpoint: a file, replaced at the end of every epoch
    checkpoint_every: iterations between two more checkpoints
    resume: go on from the checkpoint if it exists, and cut the log back to it; a complete run is only loaded. The bits
        are the same if machine, versions and number of threads are
    label: of the phase, in the log and in messages
    quiet: no progress on stderr

    Raises: UsageError if the checkpoint is of another run; DamagedFile; DiskFull (the last checkpoint stays);
    LsquantError if the loss is not finite (the last checkpoint stays).
    """
    if epochs < 0 or steps_per_epoch < 1:
        raise UsageError(f"epochs={epochs}, steps_per_epoch={steps_per_epoch}: at least 0 and 1 are needed")
    _require_parts(model, accumulate, autocast)
    rows, extras = log if isinstance(log, Log) else Log(log), dict(extras or {})
    if transition is not None:
        if transition.optimizer is not unwrapped(optimizer):
            raise UsageError("fit: transition acts on another optimizer; make it with the one that fit gets")
        if transition.steps != epochs * steps_per_epoch:
            raise UsageError(
                f"fit: transition was made for steps={transition.steps}; this training has {epochs * steps_per_epoch}"
            )
        extras["transition"] = transition
    prepared = model.model if isinstance(model, FusedNetwork) else model
    oscillation = Oscillation(prepared, oscillation_every)
    run = {"label": label, "epochs": epochs, "steps_per_epoch": steps_per_epoch}
    epoch_rng, at = rng_state(), TrainProgress(log_position=rows.position)
    if resume and checkpoint is not None and Path(checkpoint).exists():
        state = load_state(checkpoint)
        at = _restore(state, run, model, optimizer, extras, str(checkpoint), quiet)
        if at.epoch >= epochs:
            message(f"{label}: all {epochs} epochs are done", quiet)
            return at
        message(f"{label}: goes on after {at.epoch} epochs and {at.step} iterations of the next", quiet)
        epoch_rng = state["epoch_rng"]
        if isinstance(state.get("oscillation"), dict):  # checkpoints of earlier versions have none
            oscillation.load_state_dict(state["oscillation"])
        rows.cut(at.log_position)

    if teacher is not None:
        teacher.eval()
    model.train()
    began = time.monotonic() - at.seconds

    def write_checkpoint() -> None:
        if checkpoint is None:
            return
        at.log_position, at.seconds = rows.position, time.monotonic() - began
        state = {"run": run, "at": asdict(at), "rng": rng_state(), "epoch_rng": epoch_rng}
        state |= {"threads": torch.get_num_threads(), "model": model_state(model), "optimizer": optimizer.state_dict()}
        state["oscillation"] = oscillation.state_dict()
        save_state(checkpoint, state | {"extras": {name: extra.state_dict() for name, extra in extras.items()}})

    while at.epoch < epochs:
        start = [at.loss_sum, at.right, at.norm_sum]
        sums = torch.tensor(start, dtype=torch.float64, device=next(model.parameters()).device)
        clock = time.monotonic() - at.epoch_seconds
        facts: dict[str, dict[str, Any]] = {}
        rest = islice(_rest(batches, at, epoch_rng), steps_per_epoch - at.step)
        bar = ProgressBar(rest, steps_per_epoch, f"{label} {at.epoch + 1}/{epochs}", quiet, start=at.step)
        for batch in bar:
            iteration = at.epoch * steps_per_epoch + at.step
            if schedule is not None:
                schedule.apply(optimizer, iteration)
            optimizer.zero_grad(set_to_none=True)
            value: Any = 0.0
            for part, share in parts_of(batch, accumulate):
                teacher_output = None
                with autocast_to(autocast, sums.device):
                    if teacher is not None:
                        with torch.no_grad():
                            teacher_output = run_batch(teacher, part, forward)
                    output = run_batch(model, part, forward)
                    one = loss(output, part, teacher_output)
                (one if share == 1.0 else one * share).backward()
                value = value + (one.detach() if share == 1.0 else one.detach() * share)
                right, targets = hits(logits_of(output), part)
                sums[1] += right
                at.targets += targets
                at.samples += samples_in(output)
            at.step += 1
            if at.step == steps_per_epoch:
                facts = observe(prepared)
            if clip_norm is not None:
                sums[2] += torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            oscillation.look()
            if after_step is not None:
                after_step(iteration)
            sums[0] += value
            seconds = time.monotonic() - clock
            bar.note(partial(_note, sums, at, optimizer.param_groups[0]["lr"], transition, seconds))
            if checkpoint_every and (iteration + 1) % checkpoint_every == 0 and at.step < steps_per_epoch:
                _read(sums, clock, label, at)
                write_checkpoint()
        if at.step != steps_per_epoch:
            raise UsageError(f"batches({at.epoch}) gave {at.step} batches instead of steps_per_epoch={steps_per_epoch}")
        _read(sums, clock, label, at)
        row = _row(label, at, steps_per_epoch, optimizer, clip_norm is not None)
        for name, share in oscillation.shares().items():
            facts[name] = facts.get(name, {}) | {"oscillation": share}
        row |= {} if transition is None else transition.numbers()
        row = _joined(row, facts, evaluate and evaluate(model))
        at = TrainProgress(epoch=at.epoch + 1, row=row)
        rows.append(row)
        epoch_rng = rng_state()
        write_checkpoint()
    at.log_position, at.seconds = rows.position, time.monotonic() - began
    return at


def _require_parts(model: nn.Module, accumulate: Any, autocast: Any) -> None:
    """Raise UsageError for arguments that ``fit`` cannot do."""
    if type(accumulate) is not int or accumulate < 1:
        raise UsageError(f"fit: accumulate={shown(accumulate)}; a whole number from 1")
    if autocast not in (None, "bfloat16"):
        raise UsageError(f"fit: autocast={shown(autocast)}; 'bfloat16' or None")
    if accumulate > 1:
        norms = (n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
        if (name := next(norms, None)) is not None and not isinstance(model, FusedNetwork):
            raise UsageError(
                f"fit: accumulate={accumulate}: {name} normalizes over the batch, so parts are another step"
            )


def logits_of(output: Any) -> Any:
    """Return the logits in what a model of transformers returns; anything else itself."""
    return getattr(output, "logits", output)


def samples_in(output: Any) -> int:
    """Return the samples of an output, 0 where it does not say."""
    output = logits_of(output)
    return len(output) if isinstance(output, torch.Tensor) and output.ndim else 0


def parts_of(batch: Any, count: int) -> Iterator[tuple[Any, float]]:
    """Cut a batch into parts along its first dimension.  Yields each with its share of the samples.

    batch: a tensor, or a tuple, list or mapping of tensors of one length.

    Raises: UsageError for a batch that cannot be cut.
    """
    if count == 1:
        yield batch, 1.0
        return
    listed = batch if isinstance(batch, (tuple, list)) else [batch]
    values: dict[Any, Any] = dict(batch) if isinstance(batch, Mapping) else dict(enumerate(listed))
    sizes = {len(t) for t in values.values() if isinstance(t, torch.Tensor) and t.ndim}
    if len(sizes) != 1 or not all(isinstance(t, torch.Tensor) and t.ndim for t in values.values()):
        raise UsageError("accumulate: a batch has to be a tensor, or a tuple or mapping of tensors of one length")
    size = sizes.pop()
    if not size:
        raise UsageError("accumulate: an empty batch")
    for at in torch.arange(size).tensor_split(min(count, size)):
        cut = {name: t[at[0] : at[-1] + 1] for name, t in values.items()}
        yield _like(batch, cut), len(at) / size


def _like(batch: Any, cut: dict[Any, torch.Tensor]) -> Any:
    """Return parts in the form of the batch."""
    if isinstance(batch, Mapping):
        return cut
    values = list(cut.values())
    if isinstance(batch, torch.Tensor):
        return values[0]
    if isinstance(batch, list):
        return values
    return type(batch)(*values) if hasattr(batch, "_fields") else tuple(values)


def autocast_to(dtype: str | None, device: torch.device) -> Any:
    """Return the context in which forward passes run in a type; None: as they are."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=getattr(torch, dtype))


def _rest(batches: Callable[[int], Iterable[Any]], at: TrainProgress, epoch_rng: dict[str, Any]) -> Iterable[Any]:
    """Return the batches of the present epoch that are still to come.

    After a restart within an epoch its first batches are drawn again from the generators' state at its beginning, and
    dropped; then the generators go on where the checkpoint was made.
    """
    if at.step == 0:
        return batches(at.epoch)
    now = rng_state()
    set_rng_state(epoch_rng)
    rest = iter(batches(at.epoch))
    for _ in islice(rest, at.step):
        pass
    set_rng_state(now)
    return rest


def _note(sums: torch.Tensor, at: TrainProgress, lr: float, transition: TransitionRate | None, seconds: float) -> str:
    """Format what the bar shows: means over the epoch so far, learning rates, the accuracy after the epoch before."""
    loss, right, _ = sums.tolist()
    parts = [f"loss {loss / at.step:.4f}"]
    parts += [f"accuracy {100.0 * right / at.targets:.2f} %"] if at.targets else []
    parts += [f"{at.targets / max(seconds, 1e-9):,.0f} tokens/s"] if at.targets > at.samples > 0 else []
    tested = at.row.get("accuracy")
    parts += [f"tested {tested:.2f} % after epoch {at.epoch}"] if isinstance(tested, float) else []
    parts += [f"lr {lr:.3g}"]
    if transition is not None:
        parts += [f"transitions {transition.rate:.2g} (target {transition.target:.2g}), low-bit lr {transition.lr:.3g}"]
    return "  ".join(parts)


def _read(sums: torch.Tensor, clock: float, label: str, at: TrainProgress) -> None:
    """Copy the sums of the epoch from the device. Raises: LsquantError if the loss is not finite."""
    at.loss_sum, at.right, at.norm_sum = sums.tolist()
    at.epoch_seconds = time.monotonic() - clock
    if not math.isfinite(at.loss_sum):
        raise LsquantError(
            f"the loss of {label} is not finite in epoch {at.epoch + 1}: lower the learning rate, or set clip_norm; "
            "the last checkpoint is unchanged"
        )


def _row(label: str, at: TrainProgress, steps: int, optimizer: torch.optim.Optimizer, clipped: bool) -> dict[str, Any]:
    """Return the row of the log of the epoch that ends, without metrics."""
    groups, epoch = optimizer.param_groups, at.epoch + 1
    row: dict[str, Any] = {"phase": label, "epoch": epoch, "iteration": epoch * steps, "loss": at.loss_sum / steps}
    if at.targets:
        row["train_accuracy"] = 100.0 * at.right / at.targets
    if clipped:
        row["grad_norm"] = at.norm_sum / steps
    row["lr"] = groups[0]["lr"]
    for group in groups:
        if str(group.get("name", "")).startswith("steps") and group["params"]:
            row["step_lr"] = max(group["lr"], row.get("step_lr", 0.0))
    row["seconds"] = round(at.epoch_seconds, 3)
    if at.samples:
        row["samples_per_second"] = round(at.samples / max(at.epoch_seconds, 1e-9), 1)
    if at.targets > at.samples > 0:  # several a sample: tokens
        row["targets_per_second"] = round(at.targets / max(at.epoch_seconds, 1e-9), 1)
    return row


def _joined(row: dict[str, Any], facts: dict[str, dict[str, Any]], metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Join a row, facts and metrics; the metrics' own "quantizers" (clip rates) join the facts by name."""
    metrics = dict(metrics or {})
    for name, more in metrics.pop("quantizers", {}).items():
        facts[name] = facts.get(name, {}) | dict(more)
    return row | metrics | ({"quantizers": facts} if facts else {})


def _restore(
    state: dict[str, Any],
    run: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    extras: dict[str, Stateful],
    path: str,
    quiet: bool,
) -> TrainProgress:
    """Put back what a checkpoint holds. Raises: UsageError if it is of another run or optimizer."""
    parts = Entry(state, path).parts("run", "at", "rng", "epoch_rng", "threads", "model", "optimizer", "extras")
    old, kept = parts["run"].parts(), parts["extras"].table()
    said = {key: old[key].value if key in old else None for key in run}
    wrong = [key for key, value in run.items() if type(said[key]) is not type(value) or said[key] != value]
    different = [f"{key} {shown(said[key])}, not {run[key]!r}" for key in wrong]
    if different or set(kept) != set(extras):
        raise UsageError(f"{path} is the checkpoint of another run: {'; '.join(different) or sorted(kept)}")
    at, threads = _progress(parts["at"], run), parts["threads"].integer(1, 1 << 20)
    for value in kept.values():
        value.table()
    load_model_state(model, check_model_part(parts["model"]))
    check_optimizer_part(parts["optimizer"], optimizer)
    try:
        optimizer.load_state_dict(state["optimizer"])
    except ValueError as error:
        raise UsageError(f"{path} is the checkpoint of another optimizer: {error}") from error
    for name, extra in extras.items():
        try:
            extra.load_state_dict(state["extras"][name])
        except DamagedFile as error:
            raise DamagedFile(f"{path}: extras.{name}: {error}") from error
    set_rng_state(state["epoch_rng"], path, "epoch_rng")
    set_rng_state(state["rng"], path, "rng")
    if threads != torch.get_num_threads():
        message(
            f"{path} was made with {threads} threads, now there are {torch.get_num_threads()}: "
            "the run goes on, but not with the same bits",
            quiet,
        )
    return at


def _progress(entry: Entry, run: dict[str, Any]) -> TrainProgress:
    """Return how far a checkpoint is."""
    found = entry.record(("epoch", "step"), [f.name for f in fields(TrainProgress)])
    at: dict[str, Any] = {
        "epoch": found["epoch"].integer(0, run["epochs"]),
        "step": found["step"].integer(0, run["steps_per_epoch"]),
    }
    for name in {"log_position", "targets", "samples"} & found.keys():
        at[name] = found[name].integer(0, 2**62)
    for name in {"seconds", "loss_sum", "right", "norm_sum", "epoch_seconds"} & found.keys():
        at[name] = found[name].number()
    if "row" in found:
        found["row"].table()
        at["row"] = found["row"].value
    return TrainProgress(**at)
