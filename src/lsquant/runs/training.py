"""Train a run: the float network first, then the requested bits, measured on the way."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lsquant import checkpoint
from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant._util.files import write_json
from lsquant.calibration import calibrate
from lsquant.convert import prepare
from lsquant.fusion import FusedNetwork, fuse
from lsquant.nn import quantized_layers, quantizers
from lsquant.recipe import Recipe
from lsquant.runs.defaults import FLOAT, FOLD, LAST, make_loss, make_optimizer
from lsquant.runs.directory import FORMAT, START, TEACHER, Run, check_teacher, is_run, read_run, sha256, start_run
from lsquant.runs.log_reader import read_metrics
from lsquant.runs.network_files import load_float, load_start, load_teacher
from lsquant.training import (
    CosineSchedule,
    Log,
    TrainProgress,
    TransitionRate,
    WeightAverage,
    clip_rates,
    fit,
    reestimate_batchnorm,
    save_state,
    widened,
)  # fmt: skip
from lsquant.training.batchnorm import batchnorms
from lsquant.training.groups import is_low_bit
from lsquant.training.progress import message
from lsquant.training.seeds import seed_everything
from lsquant.training.state import load_model_part, load_model_state, model_state

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

    The results, each with the task's metrics:

    float: the float network; not with `run.start` alone
    teacher: the network of `run.teacher`
    rounded: the float network at the recipe's bits, calibrated but not trained; not with `run.start` alone
    start: the network of `run.start`
    raw: trained with learned steps, as the optimizer left it; where `ema` or `bn_batches` change it afterwards
    lsq: trained with learned steps, as it is kept
    folded: its integer-only form, for a recipe with joins; where it is not trained in this form, this is `fused`
    fused: the integer-only form as it is kept

    The same seed gives the same numbers ("seconds" apart).

    resume: go on from the last checkpoint, wherever the run was killed; it ends with the bits of one that was not
    overwrite: delete a run that is there
    checkpoint_every: iterations between two checkpoints, beside those at the end of every epoch
    tensorboard: write the numbers of the log to `run.path`/tensorboard as well
    quiet: no progress on stderr

    Raises: UsageError if `run.path` exists, without `resume` or `overwrite`, or another process trains in it; what
    `fit` raises.
    """
    run = _with_teacher_hash(run, resume)
    log = Log(run.file("log.jsonl"), run.file("tensorboard") if tensorboard else None)
    if not (resume and run.path.exists()):
        _check_inputs(run)
    before = torch.get_num_threads()
    with start_run(run, resume=resume, overwrite=overwrite):
        if run.file("metrics.json").is_file():
            metrics = read_metrics(run.file("metrics.json"))
            if _has_model(run, quiet):
                message(f"{run.path} is complete: nothing is left to train", quiet)
                return metrics
        torch.set_num_threads(run.settings.threads or before)
        try:
            return _Training(run, log, checkpoint_every, quiet).train()
        finally:
            torch.set_num_threads(before)


def _has_model(run: Run, quiet: bool) -> bool:
    """Tell whether the run's model.safetensors is there and sound; else it is made again from the last checkpoints."""
    path = run.file("model.safetensors")
    try:
        checkpoint.check_file(path)
    except (MissingFile, DamagedFile) as error:
        message(f"{error}; it is made again from the checkpoints in {run.path / 'last'}", quiet)
        return False
    return True


def _with_teacher_hash(run: Run, resume: bool) -> Run:
    """Return the run with the SHA-256 of its teacher; a run that is resumed does not need the teacher's own file."""
    if run.teacher is None or run.teacher_sha256 is not None:
        return run
    if resume and is_run(run.path) and not Path(run.teacher).is_file():
        return replace(run, teacher_sha256=read_run(run.path).teacher_sha256)
    return replace(run, teacher_sha256=sha256(run.teacher))


def _check_inputs(run: Run) -> None:
    """Raise the errors of a wrong checkpoint or recipe, or of missing data, before anything is written or trained."""
    settings = run.settings
    run.task.steps_per_epoch(settings.batch_size)
    model = run.float_model()
    if run.init is not None:
        load_float(model, run.init)
    if run.teacher is not None:
        load_teacher(run.task, run.teacher)
    if settings.bn_batches and not batchnorms(model):
        raise UsageError("bn_batches: this network has no BatchNorm that keeps running statistics; leave it out")
    if settings.fold_epochs and run.recipe.joins is None:
        raise UsageError(
            f"fold_epochs={settings.fold_epochs}: the recipe has no joins, so there is no integer-only form "
            "(--integer-only, or Recipe(..., joins=8))"
        )
    for bits in settings.progressive:
        if widened(run.recipe, bits) == run.recipe:
            raise UsageError(f"progressive={settings.progressive}: the recipe has no quantizer below {bits} bits")
    prepare(model, run.recipe, example_inputs=run.task.example_input())
    if settings.transition_rate is not None and not any(is_low_bit(layer) for _, layer in quantized_layers(model)):
        raise UsageError("transition_rate: the recipe has no quantizer of weights below 8 bits; leave it out")
    if run.start is not None:
        if settings.progressive:
            raise UsageError("start and progressive: the network of the file has low bits already; give one of the two")
        if settings.distill and run.init is None:
            raise UsageError("start: no float network to distill from; give it by init (--init FILE), or --no-distill")
        load_start(model, run.start)


@dataclass
class _Training:
    """Train one run from its beginning or its last checkpoint.

    progress: that of the phase trained last
    results: metrics by the name of the result
    seconds: time spent training by phase
    """

    run: Run
    log: Log
    checkpoint_every: int | None
    quiet: bool
    progress: TrainProgress = field(default_factory=TrainProgress)
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def train(self) -> dict[str, Any]:
        """Train all phases; write model.safetensors and metrics.json, and return the latter's content."""
        run, settings = self.run, self.run.settings
        model = self._float_network()
        has_float = run.init is not None or run.start is None
        if has_float:
            self._measure("float", model, "float")
        teacher = self._teacher(model)

        seed_everything(settings.seed, run.task.name, "lsq")
        self._quantize(model, run.recipe)
        if has_float:
            self._measure("rounded", model, "rounded to these bits without training")
        for bits in settings.progressive:
            self._quantize(model, widened(run.recipe, bits))
            self._phase(model, f"lsq-{bits}", settings.progressive_epochs, teacher)
        if settings.progressive:
            self._quantize(model, run.recipe)
        if run.start is not None:
            if not load_start(model, run.file(START)):
                self._quantize(model, run.recipe)
            self._measure("start", model, "as it starts")
        self._last_phase(model, teacher)
        if run.recipe.joins is not None:
            self._fold(model, teacher)

        checkpoint.save(model.eval(), run.file("model.safetensors"), {"task": run.task.name})
        metrics = {
            "format": FORMAT,
            "task": run.task.name,
            "seed": settings.seed,
            **self.results,
            "seconds": self.seconds,
        }
        write_json(run.file("metrics.json"), metrics)
        return metrics

    def _float_network(self) -> nn.Module:
        """Return the float network: of `init`, or trained, or fresh where the run has neither."""
        run, settings = self.run, self.run.settings
        seed_everything(settings.seed, run.task.name, "float")
        model = run.float_model()
        if run.init is not None:
            self._load_init(model, run.init)
        elif run.trains_float:
            self._phase(model, FLOAT, settings.float_epochs)
        self.seconds.setdefault(FLOAT, 0.0)
        return model

    def _load_init(self, model: nn.Module, init: str) -> None:
        """Load `init`, and copy it into the run, so that resuming does not need that file."""
        copied = self.run.file("last/float.safetensors")
        if copied.exists():
            load_model_state(model, load_model_part(copied))
        else:
            load_float(model, init)
            save_state(copied, {"model": model_state(model)})

    def _teacher(self, model: nn.Module) -> nn.Module | None:
        """Return what the low-bit phases distill from: `run.teacher`, or a copy of the float network, or nothing."""
        run = self.run
        if run.teacher is not None:
            check_teacher(run, run.file(TEACHER))
            teacher = load_teacher(run.task, run.file(TEACHER))
            self._measure("teacher", teacher, "the teacher")
            return teacher
        if run.settings.distill:
            return copy.deepcopy(model).eval().requires_grad_(False)
        return None

    def _last_phase(self, model: nn.Module, teacher: nn.Module | None) -> None:
        """Train at the recipe's own bits; then average the weights and estimate BatchNorm anew, as the settings say."""
        task, settings = self.run.task, self.run.settings
        average = None if settings.ema is None else WeightAverage(model, settings.ema)
        self._phase(model, LAST, settings.last_epochs, teacher, average)
        if average is not None or settings.bn_batches:
            self._measure("raw", model, "with learned steps, as the optimizer left it")
        if average is not None:
            average.apply()
        if settings.bn_batches:
            seed_everything(settings.seed, task.name, "bn")
            batches = task.batches("train", batch_size=settings.batch_size, seed=settings.seed, epoch=settings.epochs)
            reestimate_batchnorm(model, batches, max_batches=settings.bn_batches)
        self._measure(LAST, model, "with learned steps")

    def _fold(self, model: nn.Module, teacher: nn.Module | None) -> None:
        """Train on in the integer-only form, as the settings say."""
        network = fuse(model)
        if self.run.settings.fold_epochs:
            self._measure("folded", network, "integer-only, not trained in this form")
            self._phase(network, FOLD, self.run.settings.fold_epochs, teacher)
        self._measure("fused", network, "integer-only")

    def _measure(self, what: str, network: nn.Module, words: str) -> None:
        self.results[what] = self.run.task.metric(network)
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in self.results[what].items())
        message(f"{words}: {numbers}", self.quiet)

    def _quantize(self, model: nn.Module, recipe: Recipe) -> None:
        """Prepare and calibrate; weight steps whose bits change are set by `weight_init` ("paper": as prepare does)."""
        task, settings = self.run.task, self.run.settings
        before = {quantizer: quantizer.requested for _, quantizer in quantizers(model)}
        prepare(model, recipe, example_inputs=task.example_input())
        if settings.weight_init != "paper":
            for _, layer in quantized_layers(model):
                quantizer = layer.weight_quantizer
                if quantizer is not None and before.get(quantizer) != quantizer.requested:
                    before[quantizer] = quantizer.requested
                    quantizer.initialize(layer.rows(), settings.weight_init)
        batches = task.batches("calibration", batch_size=settings.batch_size, seed=settings.seed)
        limit, method = settings.calibration_batches, settings.activation_init
        calibrate(model, batches, max_batches=limit, method=method, again=True)  # also where bits stay

    def _phase(
        self,
        model: nn.Module,
        label: str,
        epochs: int,
        teacher: nn.Module | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        """Train for some epochs.

        label: FLOAT, or a low-bit phase
        average: of the weights; it is updated after every step and evaluated in their place
        """
        if not epochs:
            self.seconds[label] = 0.0
            return
        task, settings = self.run.task, self.run.settings
        optimizer = make_optimizer(task, model, settings, label)
        steps = task.steps_per_epoch(settings.batch_size)
        transition = None
        if label == LAST and settings.transition_rate is not None:
            transition = TransitionRate(model, optimizer, settings.transition_rate, steps=epochs * steps)
        last = self.run.file(f"last/{label}.safetensors")
        if not last.exists():
            self.log.cut(self.progress.log_position)  # a row may have been written without its checkpoint

        def evaluate(network: nn.Module) -> dict[str, Any]:
            sample = task.batches("calibration", batch_size=min(SAMPLE, settings.batch_size), seed=settings.seed)
            with nullcontext() if average is None else average.swapped():
                prepared = network.model if isinstance(network, FusedNetwork) else network
                return {**task.metric(network), "quantizers": clip_rates(prepared, sample, max_batches=1)}

        self.progress = fit(
            model,
            lambda epoch: task.batches("train", batch_size=settings.batch_size, seed=settings.seed, epoch=epoch),
            optimizer,
            epochs=epochs,
            steps_per_epoch=steps,
            schedule=CosineSchedule(max(1, epochs * steps), min(settings.warmup, max(0, epochs * steps - 1))),
            loss=make_loss(task, settings),
            teacher=teacher,
            clip_norm=None if label == FLOAT else settings.clip_norm,
            accumulate=settings.accumulate,
            autocast=settings.autocast,
            evaluate=evaluate,
            after_step=None if average is None else lambda iteration: average.update(),
            extras={} if average is None else {"average": average},
            transition=transition,
            log=self.log,
            checkpoint=last,
            checkpoint_every=self.checkpoint_every,
            resume=True,
            label=label,
            quiet=self.quiet,
        )
        self.seconds[label] = self.progress.seconds
