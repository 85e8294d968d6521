"""Symptoms of steps, weights, activations and BatchNorm that ``check`` looks for.

The thresholds lie well beyond what healthy runs show (docs/report.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsquant.diagnostics.collect import ValueStatistics
from lsquant.mse import ValueSummary, best_step, exact_steps, squared_errors
from lsquant.quantizer import Quantizer
from lsquant.reference import GUARD_FACTOR, step_view
from lsquant.tied import TiedQuantizer

Symptom = tuple[str, str, dict[str, Any]]
"""(code of a finding, what is wrong in words, the numbers behind it)"""

MOVED_FAR = 64.0
"""Times smaller or larger than the initial step; healthy: 0.4 to 2."""
SHARE_OF_STEP = 0.1
"""Share of a step by which an Adam-type optimizer may move it in an iteration."""
DEAD = 0.25
"""Share of the output channels whose codes are all 0; healthy: up to an eighth."""
CLOSE = 0.01
"""Distance to a transition point, in steps, that counts as lying on it."""
OSCILLATING = 0.15
"""Share of the weights that lie on a transition point; healthy: 2 to 6 %."""
NEGATIVE = 0.01
"""Share of the values of an unsigned quantizer that are below 0."""
REPEATED = 4
"""Times that each value of a weight occurs, on average, from which on they count as few."""
SAME = 1e-3
"""Share of the step that a weight may change by and count as represented."""
POOR = 3.0
"""Times the least squared error, before training."""
SHIFT = 1.0
"""Distance of a BatchNorm's running mean from that of the data, in standard deviations, median over channels."""
SPREAD = 4.0
"""Factor between a BatchNorm's running variance and that of the data, median over channels."""
ENOUGH = 256
"""Values from which on a share means something."""
SAMPLE = 1 << 16
"""Values of one batch that the least squared error is taken from."""


def of_step(q: Quantizer) -> Iterator[Symptom]:
    """Find steps that collapsed or exploded: ``s / s0`` below 1/64 or above 64."""
    step, start = q.step.detach(), q.initial_step
    ratio = float((step / start).median())
    evidence = {"ratio": ratio, "initial": float(start.median()), "step": float(step.median())}
    if GUARD_FACTOR <= ratio < 1 / MOVED_FAR:
        yield "step_collapsed", f"its step fell to {ratio:.2g} of the initial one: few values are left inside", evidence
    elif ratio > MOVED_FAR:
        yield "step_exploded", f"its step grew to {ratio:.3g} times the initial one: most codes are 0", evidence


def of_learning_rate(q: Quantizer, group: dict[str, Any]) -> Iterator[Symptom]:
    """Find a learning rate that is unsuitable for Adam.  group: the optimizer's, that holds the step."""
    rate = float(group.get("lr", 0.0))
    share = rate / max(float(q.effective_step().detach().median()), 1e-30)
    if "betas" in group and share > SHARE_OF_STEP:
        text = f"an Adam-type optimizer moves it by about {share:.0%} of itself in every iteration (lr {rate:g})"
        yield "adam_step_lr", text, {"lr": rate, "share": share}


def unmoved(sound: dict[str, Quantizer], started: bool | None) -> Iterator[tuple[str, Symptom]]:
    """Find steps that are still the initial ones while others have moved.

    sound: quantizers by name whose steps are set and finite.
    started: whether the optimizer has made a step; None without one: the model then counts as trained if most steps
        have moved (where bits were changed, most are new).
    Yields: (name of the quantizer, symptom). ``training.TransitionRate`` holds the steps of all weights below 8 bits:
    where all of these are the initial ones, they have no symptom.
    """
    learning = {name: q for name, q in sound.items() if q.step.requires_grad}
    low = {name: q for name, q in learning.items() if name.endswith("weight_quantizer") and q.spec.bits < 8}
    if len(low) > 1 and all(torch.equal(q.step.detach(), q.initial_step) for q in low.values()):
        learning = {name: q for name, q in learning.items() if name not in low}
    still = [name for name, q in learning.items() if torch.equal(q.step.detach(), q.initial_step)]
    moved = len(learning) - len(still)
    trained = moved > len(still) if started is None else started and moved > 0
    if trained:
        text = "its step is still exactly the initial one, while others have moved"
        for name in still:
            yield name, ("step_unmoved", text, {"moved": moved, "still": len(still)})


def of_weight(q: Quantizer, rows: Tensor) -> Iterator[Symptom]:
    """Find output channels whose codes are all 0, and weights that oscillate around transition points.

    rows: (out, ...) float, the weight with output channels first.
    """
    if q.offset is not None:
        return
    codes = q.codes(rows).reshape(rows.shape[0], -1)
    dead = int((codes == 0).all(1).sum())
    if dead >= 2 and dead > DEAD * len(codes):
        text = f"all weights of {dead} of {len(codes)} output channels are 0"
        yield "dead_channels", text, {"dead": dead, "channels": len(codes)}
    if rows.numel() < ENOUGH:
        return
    quotients = (rows.reshape(q.step.numel(), -1) / q.effective_step().detach()[:, None]).flatten()
    inside = quotients[(quotients > q.q_min) & (quotients < q.q_max)]
    share = 0.0
    if inside.numel() >= ENOUGH:
        share = float(((inside - inside.floor() - 0.5).abs() < CLOSE).double().mean())
    if share > OSCILLATING:
        text = f"{share:.0%} of its weights lie within {CLOSE:g} steps of a transition point: they go back and forth"
        yield "oscillating", text, {"share": share, "expected": 2 * CLOSE}


def of_few_values(q: Quantizer, rows: Tensor) -> Iterator[Symptom]:
    """Find weights that are integers, or a few values, and that the step turns into others.

    rows: (out, ...) float, the weight with output channels first.
    """
    if q.offset is not None or not bool(torch.isfinite(rows).all()):
        return
    rows = rows.to(torch.float32)
    levels = q.q_max - q.q_min + 1
    if len(torch.unique(rows.flatten()[: 4 * levels])) > levels:  # cheap, and true of most
        return
    distinct = torch.unique(rows)
    whole = bool((distinct == distinct.round()).all())
    if len(distinct) > levels or not (whole or rows.numel() >= REPEATED * len(distinct)):
        return
    values, step = step_view(rows, q.effective_step().detach(), q.axis, q.spec.group_size)
    error = (values - (values / step).round().clamp(q.q_min, q.q_max) * step).abs()
    changed = int((error > SAME * step).sum())
    if not changed:
        return
    kind = "integers" if whole else f"{len(distinct)} different values"
    exact = exact_steps(rows, q.q_min, q.q_max, axis=q.axis, group_size=q.spec.group_size)
    held = "a step represents them exactly"
    if not bool((exact > 0).all()):
        held = f"no step represents them at {q.spec.bits} bits"
    text = f"its {rows.numel()} weights are {kind}, and the step turns {changed} of them into others; {held}"
    yield "few_values", text, {"distinct": len(distinct), "changed": changed, "largest": float(error.max())}


def of_levels(q: Quantizer, values: ValueStatistics) -> Iterator[Symptom]:
    """Find holes: of the levels from the lowest to the highest that occurs, at most half are used."""
    used = torch.nonzero(values.codes).flatten()
    reach = int(used[-1] - used[0]) + 1 if len(used) else 0
    if len(used) and len(used) <= reach // 2:
        bits = float(np.log2(len(used)))
        text = f"only {len(used)} of {reach} levels between its outermost occur: {bits:.1f} bits of {q.spec.bits}"
        yield "few_levels", text, {"used": len(used), "reach": reach, "bits": bits}


def of_sign(q: Quantizer, values: ValueStatistics, lowest: float) -> Iterator[Symptom]:
    """Find values below 0 that an unsigned quantizer cuts off.  lowest: of the values."""
    if q.q_min < 0 or q.offset is not None:
        return
    share = values.low / max(values.elements, 1)
    if share > NEGATIVE and lowest < -0.5 * float(q.effective_step().detach().min()):
        text = f"{share:.0%} of its values are below 0, down to {lowest:.3g}, but it is unsigned: they become 0"
        yield "negative_cut", text, {"share": share, "lowest": lowest}


class CalibrationFit:
    """Compare a step that is as calibration left it with the step of least squared error for the data at hand."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self.summary = ValueSummary()
        one_step = quantizer.step.numel() == 1 and quantizer.offset is None and not isinstance(quantizer, TiedQuantizer)
        self.is_judged = one_step and torch.equal(quantizer.step.detach(), quantizer.initial_step)

    def add(self, x: Tensor) -> None:
        """Take in float values of one batch, at most SAMPLE of them."""
        if self.is_judged and bool(torch.isfinite(x).all()):
            stride = -(-x.numel() // SAMPLE) or 1
            self.summary.add(x.detach().flatten()[::stride])

    def symptoms(self) -> Iterator[Symptom]:
        """Find a step whose squared error is far from the least one."""
        q, summary = self.quantizer, self.summary
        if not self.is_judged or summary.total < ENOUGH:
            return
        best = best_step(summary, q.q_min, q.q_max)
        if not best:
            return
        table = summary.table()
        steps = np.array([float(q.step.detach()), best])
        error, least = squared_errors(table, steps, q.q_min, q.q_max)[0]
        lossless = error * 4.0**q.spec.bits < float(table[1][2, -1])
        if error > POOR * least and not lossless:
            text = f"its step gives {error / max(least, 1e-30):.3g} times the least squared error on these data"
            yield "calibration_poor", text, {"step": float(steps[0]), "best": best, "values": summary.total}


class BatchNormStatistics:
    """Compare means and variances of the input of a BatchNorm with its running ones."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.count = 0
        self.sums = torch.zeros(2, module.num_features, dtype=torch.float64)  # of values, of squares

    def add(self, x: Tensor) -> None:
        """Take in an input.  x: (batch, channels, ...)."""
        values = x.detach().transpose(0, 1).flatten(1).double().cpu()
        self.count += values.shape[1]
        self.sums += torch.stack([values.sum(1), (values * values).sum(1)])

    def symptoms(self) -> Iterator[Symptom]:
        """Find running statistics that are not those of the data."""
        if self.count < ENOUGH or not bool(torch.isfinite(self.sums).all()):
            return
        mean, square = self.sums / self.count
        variance, eps = (square - mean * mean).clamp_min(0), self.module.eps
        running_mean = self.module.running_mean.double().cpu()
        running_variance = self.module.running_var.double().cpu()
        shift = float(((mean - running_mean).abs() / (running_variance + eps).sqrt()).median())
        spread = float(((variance + eps) / (running_variance + eps)).log().abs().median().exp())
        if shift > SHIFT or spread > SPREAD:
            text = (
                f"its running statistics are not those of these data: means differ by {shift:.2g} standard "
                f"deviations, variances by a factor {spread:.2g} (medians)"
            )
            yield "stale_batchnorm", text, {"shift": shift, "spread": spread}


def batchnorm_statistics(module: nn.Module) -> BatchNormStatistics | None:
    """Return statistics to fill for a BatchNorm that keeps running ones; None for any other module."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    has_running = isinstance(module, kinds) and module.running_mean is not None
    return BatchNormStatistics(module) if has_running else None
