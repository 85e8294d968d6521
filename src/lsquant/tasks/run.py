"""A task from nothing to a trained low-bit network: float first, then the requested bits, measured on the way."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from lsquant import checkpoint
from lsquant._util.errors import UsageError
from lsquant._util.files import read_json, write_json
from lsquant._util.tensors import read_tensors
from lsquant.calibration import calibrate
from lsquant.convert import prepare
from lsquant.tasks.directory import FORMAT, Run, open_run, start_run
from lsquant.training import CosineSchedule, Fitted, Log, clip_rates, fit, load_state, param_groups, save_state
from lsquant.training.progress import message
from lsquant.training.seeds import seed_everything
from lsquant.training.state import load_model_state, model_state


def run_training(
    run: Run, *, resume: bool = False, overwrite: bool = False, checkpoint_every: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Train the task of `run` in the directory `run.path` and return the content of metrics.json.

    "float": the float network; "rounded": the same at the recipe's bits, calibrated but not trained; "lsq": trained
    with learned steps; each with the task's metrics. The same seed gives the same numbers ("seconds" apart).
    A checkpoint is written at the end of every epoch and every `checkpoint_every` iterations; `resume=True` goes on
    from the last one, wherever the run was killed, and ends with the same bits.

    Raises: UsageError if `run.path` exists, without `resume` or `overwrite`; see `fit` for the rest.
    """
    if not (resume and run.path.exists()):
        _try_out(run)
    start_run(run, resume=resume, overwrite=overwrite)
    if run.file("metrics.json").is_file():
        return read_json(run.file("metrics.json"))
    before = torch.get_num_threads()
    torch.set_num_threads(run.settings.threads or before)
    try:
        return _train(run, checkpoint_every, quiet)
    finally:
        torch.set_num_threads(before)


def _try_out(run: Run) -> None:
    """Meet a wrong checkpoint or recipe before anything is written or trained."""
    model = run.task.model()
    if run.init is not None:
        load_float(model, run.init)
    prepare(model, run.recipe, example_inputs=run.task.example_input())


def _train(run: Run, checkpoint_every: int | None, quiet: bool) -> dict[str, Any]:
    task, settings, example = run.task, run.settings, run.task.example_input()
    log, seconds = Log(run.file("log.jsonl")), {}

    seed_everything(settings.seed, task.name, "float")
    model = task.model()
    if run.init is None:
        done = _phase(run, model, "float", settings.float_epochs, settings.float_lr, checkpoint_every, quiet)
    else:
        done = _from_checkpoint(run, model)
    seconds["float"] = done.seconds
    results = {"float": task.metric(model)}
    _say("float", results["float"], quiet)
    teacher = copy.deepcopy(model).eval().requires_grad_(False) if settings.distill else None

    seed_everything(settings.seed, task.name, "lsq")
    prepare(model, run.recipe, example_inputs=example)
    batches = task.batches("calibration", batch_size=settings.batch_size, seed=settings.seed)
    calibrate(model, batches, max_batches=settings.calibration_batches)
    results["rounded"] = task.metric(model)
    _say("rounded to these bits without training", results["rounded"], quiet)

    if not run.file("last/lsq.safetensors").exists():
        log.cut(done.log_position)
    done = _phase(run, model, "lsq", settings.epochs, settings.lr, checkpoint_every, quiet, teacher)
    seconds["lsq"] = done.seconds
    results["lsq"] = task.metric(model)
    _say("with learned steps", results["lsq"], quiet)

    checkpoint.save(model.eval(), run.file("model.safetensors"), {"task": task.name})
    metrics = {"format": FORMAT, "task": task.name, "seed": settings.seed, **results, "seconds": seconds}
    write_json(run.file("metrics.json"), metrics)
    return metrics


def resume_training(
    path: str | os.PathLike[str], *, checkpoint_every: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Go on with the run in the directory `path` with the settings it was started with."""
    return run_training(open_run(path), resume=True, checkpoint_every=checkpoint_every, quiet=quiet)


def load_float(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a float checkpoint (.safetensors, the keys of `model`) into `model`.

    Raises: MissingFile; DamagedFile; UsageError for another architecture; each names the file.
    """
    tensors = read_tensors(path)[1]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UsageError(f"{path} is the checkpoint of another architecture: {error}") from error
    return model


def _from_checkpoint(run: Run, model: nn.Module) -> Fitted:
    """The float network of `run.init`, copied into the run, so that resuming needs that file no more."""
    copied = run.file("last/float.safetensors")
    if copied.exists():
        load_model_state(model, load_state(copied)["model"])
    else:
        load_float(model, run.init or "")
        save_state(copied, {"model": model_state(model)})
    return Fitted()


def _phase(
    run: Run,
    model: nn.Module,
    label: str,
    epochs: int,
    lr: float,
    checkpoint_every: int | None,
    quiet: bool,
    teacher: nn.Module | None = None,
) -> Fitted:
    task, settings = run.task, run.settings
    low_bit = label != "float"
    groups = param_groups(
        model,
        lr,
        settings.weight_decay if low_bit else settings.float_weight_decay,
        step_lr=settings.step_lr if low_bit else None,
        weight_decay_by_bits=settings.weight_decay_by_bits,
    )
    steps = task.steps_per_epoch(settings.batch_size)

    def evaluate(network: nn.Module) -> dict[str, Any]:
        sample = task.batches("calibration", batch_size=settings.batch_size, seed=settings.seed)
        return {**task.metric(network), "quantizers": clip_rates(network, sample, max_batches=1)}

    return fit(
        model,
        lambda epoch: task.batches("train", batch_size=settings.batch_size, seed=settings.seed, epoch=epoch),
        torch.optim.SGD(groups, momentum=settings.momentum),
        epochs=epochs,
        steps_per_epoch=steps,
        schedule=CosineSchedule(max(1, epochs * steps), min(settings.warmup, max(0, epochs * steps - 1))),
        teacher=teacher,
        clip_norm=settings.clip_norm if low_bit else None,
        evaluate=evaluate,
        log=run.file("log.jsonl"),
        checkpoint=run.file(f"last/{label}.safetensors"),
        checkpoint_every=checkpoint_every,
        resume=True,
        label=label,
        quiet=quiet,
    )


def _say(what: str, metrics: dict[str, float], quiet: bool) -> None:
    message(f"{what}: {', '.join(f'{name} {value:.4g}' for name, value in metrics.items())}", quiet)
