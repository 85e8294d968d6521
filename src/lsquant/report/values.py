"""Compute what the page draws of a quantizer: histograms of its values, and the error of its step and of others."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsquant._util.errors import UsageError
from lsquant.diagnostics.collect import ValueStatistics
from lsquant.mse import ValueSummary, best_step, rows_per_step
from lsquant.quantizer import Quantizer

Table = tuple[np.ndarray, np.ndarray]
SAMPLE = 1 << 20  # values of one batch in the histogram and the least squared error; the other columns see all values
KEPT = 64  # steps of one quantizer that get a histogram of their own
BINS, CHANNEL_BINS = 640, 64
ATOMS, CHANNEL_ATOMS = 256, 48  # up to so many distinct values are counted one by one
REACH = 4.25  # the histogram reaches so many times beyond the clip points, as the page's slider does


class Values(ValueStatistics):
    """Summarize the values of a quantizer in bounded memory: all of them, and those of each kept step."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.step = quantizer.effective_step().detach()
        self.kept = kept_steps(self.step) if len(self.step) > 1 else []
        self.all, self.each = ValueSummary(), [ValueSummary() for _ in self.kept]
        self.damage = "" if bool(torch.isfinite(self.step).all()) else "steps are NaN or infinite"

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        super().add(x)
        rows = rows_per_step(x.detach(), self.quantizer.axis, self.quantizer.spec.group_size).to(torch.float32)
        if self.damage or not rows.numel():
            return
        stride = -(-rows.numel() // SAMPLE)
        try:
            if not self.kept:
                self.all.add(rows.reshape(-1)[:: stride + (stride > 1 and not stride % 2)])  # odd: not along a layout
                return
            rows = rows[:, ::stride]
            self.all.add(rows / self.step[:, None])
            for index, summary in zip(self.kept, self.each, strict=True):
                summary.add(rows[index])
        except UsageError as error:
            self.damage = str(error)

    def views(self) -> list[dict[str, Any]]:
        """Return the drawings to choose from.

        The first is of all values, in units of their steps where there are several; one for each kept step follows.
        Empty without values, or where some are not finite.
        """
        q = self.quantizer
        if self.damage or not self.all.total:
            return []
        zero, start = q.zero_point(), q.initial_step
        points = [0] * len(self.step) if zero is None else zero.tolist()
        offsets = [None] * len(points) if q.offset is None else q.offset.detach().tolist()
        steps = self.step.tolist()
        if not self.kept:
            return [_view(self.all, q, steps[0], float(start[0]), points[0], offsets[0], BINS, ATOMS)]
        found = []
        if len(set(points)) == 1:
            ratio = float((start / self.step).median())
            found.append(_view(self.all, q, 1.0, ratio, points[0], None, BINS, ATOMS) | {"index": None})
        for i, summary in zip(self.kept, self.each, strict=True):
            view = _view(
                summary, q, steps[i], float(start[i]), points[i], offsets[i], CHANNEL_BINS, CHANNEL_ATOMS
            )  # fmt: skip
            found.append(view | {"index": i})
        return found


def kept_steps(step: Tensor) -> list[int]:
    """Return at most KEPT indices, ascending: the 8 smallest, the 8 largest and evenly spaced other steps."""
    total = len(step)
    if total <= KEPT:
        return list(range(total))
    order = step.argsort().tolist()
    chosen = {*order[:8], *order[-8:]}
    for index in np.linspace(0, total - 1, KEPT - 16).round().astype(int).tolist():
        chosen.add(index)
    return sorted(chosen)


def _view(
    summary: ValueSummary,
    q: Quantizer,
    step: float,
    initial: float,
    zero: int,
    offset: float | None,
    bins: int,
    atoms: int,
) -> dict[str, Any]:
    """Return one drawing, as the page's script takes it.

    zero: the zero point, subtracted from the bounds
    Returns: among others `best`, the step of least squared error at this zero point, None where all values are 0.
    """
    low, high = q.q_min - zero, q.q_max - zero
    table = summary.table()
    best = best_step(summary, low, high) or None
    marks = {"initial": initial, "learned": step, "best": best}
    return {
        "step": step,
        "initial": initial,
        "best": best,
        "low": low,
        "high": high,
        "offset": offset,
        "at": {name: judge(table, s, low, high) for name, s in marks.items() if s},
        "histogram": histogram(table, low * step * REACH, high * step * REACH, bins, atoms),
    }


def judge(table: Table, step: float, low: int, high: int) -> dict[str, Any]:
    """Measure what a step does to values: mean squared error, SQNR, shares clipped, levels used.

    table: of ``ValueSummary.table``
    low, high: bounds in units of the step, the zero point subtracted
    Returns: `error`, `sqnr` in dB (None without noise), `clip_low` and `clip_high` from 0 to 1, `used`.
    """
    values, prefix = table
    codes = np.arange(low, high + 1, dtype=np.float64)
    cuts = np.concatenate([[0], np.searchsorted(values, step * (codes[:-1] + 0.5)), [values.size]])
    n, s1, s2 = (np.diff(row[cuts]) for row in prefix)
    total, signal = prefix[0, -1], prefix[2, -1]
    error = max(float((s2 - 2.0 * codes * step * s1 + (codes * step) ** 2 * n).sum()), 0.0)
    error = error if error > 1e-12 * signal else 0.0  # what is left of the sums' rounding
    below = prefix[0, np.searchsorted(values, low * step)]
    above = total - prefix[0, np.searchsorted(values, high * step, side="right")]
    return {
        "error": error / total,
        "sqnr": 10.0 * math.log10(signal / error) if error else None,
        "clip_low": float(below / total),
        "clip_high": float(above / total),
        "used": int((n > 0).sum()),
    }


def histogram(table: Table, low: float, high: float, bins: int, atoms: int) -> dict[str, Any]:
    """Count values.

    low, high: the range to draw, in units of the values
    Returns: at most `atoms` distinct values as {"values", "counts"}; more in equal bins between `from` and `to`, which
    lie within the values and within low .. high. Exact zeros are counted apart (`zeros`); `below` and `above` hold
    count, sum and sum of squares of the values beyond both ends.
    """
    values, prefix = table
    distinct, where = np.unique(np.float32(values), return_inverse=True)
    counts = np.bincount(where, np.diff(prefix[0]), distinct.size)
    if distinct.size <= atoms:
        return {"values": [short(v) for v in distinct], "counts": [int(n) for n in counts]}
    start, end = max(float(values[0]), min(low, 0.35 * low - 0.1 * high)), min(float(values[-1]), high or -low)
    if start >= end:  # a step far too small or too large for these values
        start, end = float(values[0]), float(values[-1])
    first, last = np.searchsorted(values, start), np.searchsorted(values, end, side="right")
    inner = values[first:last] != 0.0
    n = np.diff(prefix[0])[first:last]
    filled = np.histogram(values[first:last][inner], bins, (start, end), weights=n[inner])[0]
    return {
        "from": start,
        "to": end,
        "counts": [int(c) for c in filled],
        "zeros": int(n[~inner].sum()),
        "below": [short(x) for x in prefix[:, first]],
        "above": [short(x) for x in prefix[:, -1] - prefix[:, last]],
    }


def short(value: float, digits: int = 7) -> float | None:
    """Round to that many significant digits; None where not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
