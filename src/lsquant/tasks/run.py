"""A task from nothing to a trained low-bit network: float first, then the requested bits, measured on the way."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsquant import checkpoint
from lsquant._util.errors import UsageError
from lsquant._util.files import read_json, write_json
from lsquant._util.tensors import read_tensors
from lsquant.calibration import calibrate
from lsquant.convert import prepare
from lsquant.formats import load_packed
from lsquant.nn import quantized_layers, quantizers
from lsquant.recipe import Recipe
from lsquant.tasks.directory import FORMAT, START, TEACHER, Run, check_teacher, is_run, open_run, sha256, start_run
from lsquant.tasks.protocol import Settings, Task
from lsquant.training import (
    CosineSchedule,
    Fitted,
    Log,
    TransitionRate,
    WeightAverage,
    classification_loss,
    clip_rates,
    fit,
    load_state,
    param_groups,
    reestimate_batchnorm,
    save_state,
    widened,
)  # fmt: skip
from lsquant.training.batchnorm import batchnorms
from lsquant.training.groups import is_low_bit
from lsquant.training.progress import message
from lsquant.training.seeds import seed_everything
from lsquant.training.state import FORMAT as CHECKPOINT
from lsquant.training.state import load_model_state, model_state

LAST = "lsq"  # the phase at the recipe's own bits
SAMPLE = 32  # training samples that clip rates are taken from: less than 0.5 % of an epoch's time for ResNet-20


def run_training(
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int | None = None,
    tensorboard: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the task of `run` in the directory `run.path` and return the content of metrics.json.

    "float": the float network; "teacher": the one of `run.teacher`; "rounded": the float network at the recipe's bits,
    calibrated but not trained; "start": the network of `run.start`, which goes without the two others if the run has no
    `init`; "lsq": trained with learned steps, with `ema` or `bn_batches` after these; "raw": then the weights as the
    optimizer left them; each with the task's metrics. The same seed gives the same numbers ("seconds" apart).
    A checkpoint is written at the end of every epoch and every `checkpoint_every` iterations; `resume=True` goes on
    from the last one, wherever the run was killed, and ends with the same bits. `tensorboard`: write the numbers of the
    log to `run.path`/tensorboard as well.

    Raises: UsageError if `run.path` exists, without `resume` or `overwrite`; see `fit` for the rest.
    """
    run = _with_hash(run, resume)
    log = Log(run.file("log.jsonl"), run.file("tensorboard") if tensorboard else None)
    if not (resume and run.path.exists()):
        _try_out(run)
    start_run(run, resume=resume, overwrite=overwrite)
    if run.file("metrics.json").is_file():
        message(f"{run.path} is complete: nothing is left to train", quiet)
        return read_json(run.file("metrics.json"))
    before = torch.get_num_threads()
    torch.set_num_threads(run.settings.threads or before)
    try:
        return _train(run, log, checkpoint_every, quiet)
    finally:
        torch.set_num_threads(before)


def _try_out(run: Run) -> None:
    """Meet a wrong checkpoint or recipe, or missing data, before anything is written or trained."""
    run.task.steps_per_epoch(run.settings.batch_size)
    model = run.task.model()
    if run.init is not None:
        load_float(model, run.init)
    if run.teacher is not None:
        load_teacher(run.task, run.teacher)
    if run.settings.bn_batches and not batchnorms(model):
        raise UsageError("bn_batches: this network has no BatchNorm that keeps running statistics; leave it out")
    for bits in run.settings.progressive:
        if widened(run.recipe, bits) == run.recipe:
            raise UsageError(f"progressive={run.settings.progressive}: the recipe has no quantizer below {bits} bits")
    prepare(model, run.recipe, example_inputs=run.task.example_input())
    if run.settings.transition_rate is not None and not any(is_low_bit(layer) for _, layer in quantized_layers(model)):
        raise UsageError("transition_rate: the recipe has no quantizer of weights below 8 bits; leave it out")
    if run.start is not None:
        if run.settings.progressive:
            raise UsageError("start and progressive: the network of the file has low bits already; give one of the two")
        if run.settings.distill and run.init is None:
            raise UsageError("start: no float network to distill from; give it by init (--init FILE), or --no-distill")
        load_start(model, run.start)


def _with_hash(run: Run, resume: bool) -> Run:
    """With the SHA-256 of its teacher; of a run that is there the teacher's own file is needed no more."""
    if run.teacher is None or run.teacher_sha256 is not None:
        return run
    if resume and is_run(run.path) and not Path(run.teacher).is_file():
        return replace(run, teacher_sha256=open_run(run.path).teacher_sha256)
    return replace(run, teacher_sha256=sha256(run.teacher))


def _train(run: Run, log: Log, checkpoint_every: int | None, quiet: bool) -> dict[str, Any]:
    task, settings, done = run.task, run.settings, Fitted()
    results: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    phase = partial(_phase, run, log, checkpoint_every=checkpoint_every, quiet=quiet)

    def measure(what: str, network: nn.Module, words: str) -> None:
        results[what] = task.metric(network)
        message(f"{words}: {', '.join(f'{name} {value:.4g}' for name, value in results[what].items())}", quiet)

    seed_everything(settings.seed, task.name, "float")
    model = task.model()
    has_float = run.init is not None or run.start is None
    if run.init is not None:
        _from_checkpoint(run, model)
    elif run.trains_float:
        done = phase(model, "float", settings.float_epochs, done)
    seconds["float"] = done.seconds
    if has_float:
        measure("float", model, "float")
    teacher = None
    if run.teacher is not None:
        check_teacher(run, run.file(TEACHER))
        teacher = load_teacher(task, run.file(TEACHER))
        measure("teacher", teacher, "the teacher")
    elif settings.distill:
        teacher = copy.deepcopy(model).eval().requires_grad_(False)

    seed_everything(settings.seed, task.name, "lsq")
    _quantize(run, model, run.recipe)
    if has_float:
        measure("rounded", model, "rounded to these bits without training")
    for bits in settings.progressive:
        _quantize(run, model, widened(run.recipe, bits))
        done = phase(model, f"lsq-{bits}", settings.progressive_epochs, done, teacher)
        seconds[f"lsq-{bits}"] = done.seconds
    if settings.progressive:
        _quantize(run, model, run.recipe)
    if run.start is not None:
        if not load_start(model, run.file(START)):
            _quantize(run, model, run.recipe)
        measure("start", model, "as it starts")
    average = None if settings.ema is None else WeightAverage(model, settings.ema)
    done = phase(model, LAST, settings.last_epochs, done, teacher, average)
    seconds[LAST] = done.seconds
    if average is not None or settings.bn_batches:
        measure("raw", model, "with learned steps, as the optimizer left it")
    if average is not None:
        average.apply()
    if settings.bn_batches:
        seed_everything(settings.seed, task.name, "bn")
        batches = task.batches("train", batch_size=settings.batch_size, seed=settings.seed, epoch=settings.epochs)
        reestimate_batchnorm(model, batches, max_batches=settings.bn_batches)
    measure(LAST, model, "with learned steps")

    checkpoint.save(model.eval(), run.file("model.safetensors"), {"task": task.name})
    metrics = {"format": FORMAT, "task": task.name, "seed": settings.seed, **results, "seconds": seconds}
    write_json(run.file("metrics.json"), metrics)
    return metrics


def _quantize(run: Run, model: nn.Module, recipe: Recipe) -> None:
    """Prepare and calibrate; weight steps whose bits change are set by `weight_init` ("paper" is what prepare does)."""
    task, settings = run.task, run.settings
    before = {quantizer: quantizer.requested for _, quantizer in quantizers(model)}
    prepare(model, recipe, example_inputs=task.example_input())
    for _, layer in quantized_layers(model) if settings.weight_init != "paper" else ():
        quantizer = layer.weight_quantizer
        if quantizer is not None and before.get(quantizer) != quantizer.requested:
            before[quantizer] = quantizer.requested
            quantizer.initialize(layer.rows(), settings.weight_init)
    batches = task.batches("calibration", batch_size=settings.batch_size, seed=settings.seed)
    calibrate(model, batches, max_batches=settings.calibration_batches, method=settings.activation_init)


def resume_training(
    path: str | os.PathLike[str], *, checkpoint_every: int | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Go on with the run in the directory `path` with the settings it was started with."""
    return run_training(open_run(path), resume=True, checkpoint_every=checkpoint_every, quiet=quiet)


def load_float(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a float checkpoint (.safetensors, the keys of `model`, or all of them behind "module.") into `model`.

    Raises: MissingFile; DamagedFile; UsageError for another architecture; each names the file.
    """
    tensors = _float_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        found = _difference(model.state_dict(), tensors)
        raise UsageError(f"{path} is the checkpoint of another architecture: {found}") from error
    return model


def _difference(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """In one line, what a float checkpoint has otherwise than the model."""
    if any("quantizer" in name for name in found):
        return "it has quantizers, lsquant wrote it; a float checkpoint is wanted here"
    other = [n for n in wanted if n in found and wanted[n].shape != found[n].shape]
    kinds = {"it lacks": sorted(wanted.keys() - found.keys()), "the model lacks": sorted(found.keys() - wanted.keys())}
    says = [f"{kind} {names[0]} (and {len(names) - 1} more)" for kind, names in kinds.items() if names]
    says += [f"{other[0]} is {tuple(found[other[0]].shape)}, not {tuple(wanted[other[0]].shape)}"] if other else []
    return "; ".join(says)


def load_start(model: nn.Module, path: str | os.PathLike[str]) -> bool:
    """Load a file of ``export_packed`` or ``save`` into the prepared `model`; whether it has the model's recipe.

    The model then has the file's.  A packed file has codes and no float weights: code * step, the same function.
    Raises: MissingFile; DamagedFile; UsageError for another file or architecture, naming the file.
    """
    if Path(path).is_dir():
        raise UsageError(f"start: {path} is a folder; of a run give its model.safetensors")
    wanted = {name: quantizer.requested for name, quantizer in quantizers(model)}
    load = reader(path)
    (checkpoint.load if load is load_float else load)(model, path)  # which refuses a float checkpoint
    found = {name: quantizer.spec for name, quantizer in quantizers(model)}
    return wanted.keys() == found.keys() and all(wanted[n].decide(bool(s.signed)) == s for n, s in found.items())


def reader(path: str | os.PathLike[str]) -> Callable[[nn.Module, str | os.PathLike[str]], nn.Module]:
    """Which of ``load_packed``, ``lsquant.load`` and ``load_float`` reads the file, by its metadata."""
    written = read_tensors(path, with_tensors=False)[0]
    known = {"lsquant.packed": load_packed, "lsquant.format": checkpoint.load}
    return next((load for key, load in known.items() if key in written), load_float)


def load_teacher(task: Task, path: str | os.PathLike[str]) -> nn.Module:
    """The float network in `path`, in eval mode, without gradients: of the task's `architectures` the one that fits.

    Raises: MissingFile; DamagedFile; UsageError naming the file and the architectures if none fits.
    """
    known = getattr(task, "architectures", dict)()
    shapes = {name: tensor.shape for name, tensor in _float_tensors(path).items()}
    fitting = []
    for name, build in known.items():
        with torch.device("meta"):
            state = build().state_dict()
        # checkpoints of old PyTorch do not count batches
        wanted = {key: t.shape for key, t in state.items() if key in shapes or not key.endswith("num_batches_tracked")}
        fitting += [name] if wanted == shapes else []
    if known and not fitting:
        raise UsageError(f"teacher {path}: its tensors fit none of {', '.join(known)}")
    network = known[fitting[0]]() if fitting else task.model()
    return load_float(network, path).eval().requires_grad_(False)


def _float_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    metadata, tensors, _ = read_tensors(path)
    if metadata.get("format") == CHECKPOINT:  # last/float.safetensors of a run
        tensors = load_state(path)["model"]["state"]
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _from_checkpoint(run: Run, model: nn.Module) -> None:
    """The float network of `run.init`, copied into the run, so that resuming needs that file no more."""
    copied = run.file("last/float.safetensors")
    if copied.exists():
        load_model_state(model, load_state(copied)["model"])
    else:
        load_float(model, run.init or "")
        save_state(copied, {"model": model_state(model)})


def _phase(
    run: Run,
    log: Log,
    model: nn.Module,
    label: str,
    epochs: int,
    before: Fitted,
    teacher: nn.Module | None = None,
    average: WeightAverage | None = None,
    *,
    checkpoint_every: int | None,
    quiet: bool,
) -> Fitted:
    """Train for some epochs, after what `before` says; "float" is the phase of that name, all others have low bits."""
    if not epochs:
        return replace(before, seconds=0.0)
    task, settings = run.task, run.settings
    low_bit = label != "float"
    optimizer = _low_bit_optimizer(model, settings, label) if low_bit else _float_optimizer(model, settings)
    steps = task.steps_per_epoch(settings.batch_size)
    transition = None
    if label == LAST and settings.transition_rate is not None:
        transition = TransitionRate(model, optimizer, settings.transition_rate, steps=epochs * steps)
    last = run.file(f"last/{label}.safetensors")
    if not last.exists():
        log.cut(before.log_position)  # a row may have been written without its checkpoint

    def evaluate(network: nn.Module) -> dict[str, Any]:
        sample = task.batches("calibration", batch_size=min(SAMPLE, settings.batch_size), seed=settings.seed)
        with nullcontext() if average is None else average.swapped():
            return {**task.metric(network), "quantizers": clip_rates(network, sample, max_batches=1)}

    return fit(
        model,
        lambda epoch: task.batches("train", batch_size=settings.batch_size, seed=settings.seed, epoch=epoch),
        optimizer,
        epochs=epochs,
        steps_per_epoch=steps,
        schedule=CosineSchedule(max(1, epochs * steps), min(settings.warmup, max(0, epochs * steps - 1))),
        loss=partial(classification_loss, temperature=settings.distill_temperature, weight=settings.distill_weight),
        teacher=teacher,
        clip_norm=settings.clip_norm if low_bit else None,
        evaluate=evaluate,
        after_step=None if average is None else lambda iteration: average.update(),
        extras={} if average is None else {"average": average},
        transition=transition,
        log=log,
        checkpoint=last,
        checkpoint_every=checkpoint_every,
        resume=True,
        label=label,
        quiet=quiet,
    )


def _float_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    groups = param_groups(model, settings.float_lr, settings.float_weight_decay)
    return torch.optim.SGD(groups, momentum=settings.momentum)


def _low_bit_optimizer(model: nn.Module, settings: Settings, label: str) -> torch.optim.Optimizer:
    """Of the phases with low bits; the last one has a group "low_bit" where transition rates are scheduled."""
    relative = settings.optimizer != "sgd" and settings.step_lr is None
    groups = param_groups(
        model,
        settings.lr,
        settings.weight_decay,
        step_lr=settings.step_lr,
        relative_step_lr=3.0 * settings.lr if relative else None,
        weight_decay_by_bits=settings.weight_decay_by_bits,
        low_bit=label == LAST and settings.transition_rate is not None,
    )
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimizer](groups)
