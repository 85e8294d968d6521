"""Illnesses of steps, weights, activations and BatchNorm that ``check`` looks for.  Each function yields
(code, text, evidence); the thresholds lie well beyond what healthy runs of docs/report.md show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsquant.diagnostics.collect import Tally
from lsquant.mse import ValueSummary, best_step, squared_errors
from lsquant.quantizer import Quantizer
from lsquant.reference import GUARD_FACTOR

Ill = tuple[str, str, dict[str, Any]]
MOVED_FAR = 64.0  # times smaller or larger than the initial step; healthy: 0.4 to 2
OF_A_STEP = 0.1  # a step that Adam moves by more than this share of itself in an iteration
DEAD = 0.25  # of the output channels; healthy: up to an eighth
CLOSE, OSCILLATING = 0.01, 0.15  # in steps from a transition point; share of the weights so close, healthy: 2 to 6 %
NEGATIVE = 0.01  # of the values of an unsigned quantizer
POOR = 3.0  # times the least squared error, before training
SHIFT, SPREAD = 1.0, 4.0  # of BatchNorm's mean, in standard deviations; of its variance, as a factor: medians
ENOUGH = 256  # values from which on a share says something
SAMPLE = 1 << 16  # values of one batch that the least squared error is taken from


def of_step(q: Quantizer) -> Iterator[Ill]:
    """Steps that collapsed or exploded."""
    step, start = q.step.detach(), q.initial_step
    ratio = float((step / start).median())
    evidence = {"ratio": ratio, "initial": float(start.median()), "step": float(step.median())}
    if GUARD_FACTOR <= ratio < 1 / MOVED_FAR:
        yield "step_collapsed", f"its step fell to {ratio:.2g} of the initial one: few values are left inside", evidence
    elif ratio > MOVED_FAR:
        yield "step_exploded", f"its step grew to {ratio:.3g} times the initial one: most codes are 0", evidence


def of_learning(q: Quantizer, group: dict[str, Any]) -> Iterator[Ill]:
    """A learning rate that is unsuitable for Adam.  group: the optimizer's, of the step."""
    rate = float(group.get("lr", 0.0))
    share = rate / max(float(q.effective_step().detach().median()), 1e-30)
    if "betas" in group and share > OF_A_STEP:
        text = f"an Adam-type optimizer moves it by about {share:.0%} of itself in every iteration (lr {rate:g})"
        yield "adam_step_lr", text, {"lr": rate, "share": share}


def unmoved(sound: dict[str, Quantizer], started: bool | None) -> Iterator[tuple[str, Ill]]:
    """Steps that are still where they began while others have moved.  sound: quantizers by name, with steps.

    started: whether the optimizer has begun; None without one, where the model was trained if most steps have moved
    (where bits were changed, most are new).
    """
    learning = {name: q for name, q in sound.items() if q.step.requires_grad}
    still = [name for name, q in learning.items() if torch.equal(q.step.detach(), q.initial_step)]
    moved = len(learning) - len(still)
    if moved > len(still) if started is None else started and moved:
        text = "its step is still exactly the initial one, while others have moved"
        yield from ((name, ("step_unmoved", text, {"moved": moved, "still": len(still)})) for name in still)


def of_weight(q: Quantizer, rows: Tensor) -> Iterator[Ill]:
    """Output channels whose codes are all 0, and weights that sit on transition points, where they oscillate."""
    codes = q.codes(rows).reshape(rows.shape[0], -1)
    zero = q.zero_point()
    dead = 0 if zero is not None else int((codes == 0).all(1).sum())
    if dead >= 2 and dead > DEAD * len(codes):
        text = f"all weights of {dead} of {len(codes)} output channels are 0"
        yield "dead_channels", text, {"dead": dead, "channels": len(codes)}
    if zero is not None or rows.numel() < ENOUGH:
        return
    vs = (rows.reshape(q.step.numel(), -1) / q.effective_step().detach()[:, None]).flatten()
    vs = vs[(vs > q.q_min) & (vs < q.q_max)]
    share = float(((vs - vs.floor() - 0.5).abs() < CLOSE).double().mean()) if vs.numel() >= ENOUGH else 0.0
    if share > OSCILLATING:
        text = f"{share:.0%} of its weights lie within {CLOSE:g} steps of a transition point: they go back and forth"
        yield "oscillating", text, {"share": share, "expected": 2 * CLOSE}


def of_levels(q: Quantizer, tally: Tally) -> Iterator[Ill]:
    """Fewer levels than half of those from the lowest to the highest that occurs: there are holes between them."""
    used = torch.nonzero(tally.codes).flatten()
    reach = int(used[-1] - used[0]) + 1 if len(used) else 0
    if len(used) and len(used) <= reach // 2:
        bits = float(np.log2(len(used)))
        text = f"only {len(used)} of {reach} levels between its outermost occur: {bits:.1f} bits of {q.spec.bits}"
        yield "few_levels", text, {"used": len(used), "reach": reach, "bits": bits}


def of_sign(q: Quantizer, tally: Tally, lowest: float) -> Iterator[Ill]:
    """Values below 0 that an unsigned quantizer cuts off."""
    share = tally.low / max(tally.elements, 1)
    if (
        q.q_min == 0
        and q.offset is None
        and share > NEGATIVE
        and lowest < -0.5 * float(q.effective_step().detach().min())
    ):
        text = f"{share:.0%} of its values are below 0, down to {lowest:.3g}, but it is unsigned: they become 0"
        yield "negative_cut", text, {"share": share, "lowest": lowest}


class Untrained:
    """Float values of an input whose step is as calibration left it: is it near the least squared error for these?"""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.summary = quantizer, ValueSummary()
        one = quantizer.step.numel() == 1 and quantizer.offset is None
        self.watches = one and torch.equal(quantizer.step.detach(), quantizer.initial_step)

    def add(self, x: Tensor) -> None:
        if self.watches and bool(torch.isfinite(x).all()):
            self.summary.add(x.detach().flatten()[:: -(-x.numel() // SAMPLE) or 1])

    def ill(self) -> Iterator[Ill]:
        q, s = self.quantizer, self.summary
        if not self.watches or s.total < ENOUGH or not (best := best_step(s, q.q_min, q.q_max)):
            return
        steps = np.array([float(q.step.detach()), best])
        mine, least = squared_errors(s.table(), steps, q.q_min, q.q_max)[0]
        lossless = mine * 4.0**q.spec.bits < float(s.table()[1][2, -1])
        if mine > POOR * least and not lossless:
            text = f"its step gives {mine / max(least, 1e-30):.3g} times the least squared error on these data"
            yield "calibration_poor", text, {"step": float(steps[0]), "best": best, "values": s.total}


class Statistics:
    """Means and variances of the input of a BatchNorm, against its running ones."""

    def __init__(self, module: Any) -> None:
        self.module, self.count, self.sums = module, 0, torch.zeros(2, module.num_features, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        v = x.detach().transpose(0, 1).flatten(1).double().cpu()
        self.count += v.shape[1]
        self.sums += torch.stack([v.sum(1), (v * v).sum(1)])

    def ill(self) -> Iterator[Ill]:
        if self.count < ENOUGH or not bool(torch.isfinite(self.sums).all()):
            return
        mean, square = self.sums / self.count
        var, eps = (square - mean * mean).clamp_min(0), self.module.eps
        known_mean, known_var = self.module.running_mean.double().cpu(), self.module.running_var.double().cpu()
        shift = float(((mean - known_mean).abs() / (known_var + eps).sqrt()).median())
        spread = float(((var + eps) / (known_var + eps)).log().abs().median().exp())
        if shift > SHIFT or spread > SPREAD:
            text = f"its running statistics are not those of these data: means differ by {shift:.2g} standard "
            text += f"deviations, variances by a factor {spread:.2g} (medians)"
            yield "stale_batchnorm", text, {"shift": shift, "spread": spread}


def statistics(module: nn.Module) -> Statistics | None:
    """For a BatchNorm with running statistics, else None."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return Statistics(module) if isinstance(module, kinds) and module.running_mean is not None else None
