"""Find the step of least squared error over all values seen, in bounded memory.

Values are kept as they are up to RAW_LIMIT; beyond it they are counted in bins of 2^-13 relative width with exact first
and second moments, so that streaming any number of batches costs a few MB.  The error of a step is then a sum over
levels of prefix-sum differences: ``sum_k S2_k - 2 q_k s S1_k + (q_k s)^2 n_k``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lsquant._util.errors import UsageError

RAW_LIMIT = 1 << 18
FEW = 4
"""Up to so many raw values a level, rounding each is faster than finding the levels' edges among them."""
GRID = 2000
GRID_RANGE = (1e-4, 2.0)


class ValueSummary:
    """Summarize a stream of values for the search: sorted representatives, counts and moments."""

    def __init__(self) -> None:
        self._raw: list[np.ndarray] = []
        self._bins: tuple[np.ndarray, np.ndarray] | None = None  # sorted keys, (3, bins) of n, sum, sum of squares
        self.total = 0
        self.magnitude = 0.0  # sum of |v|
        self.low, self.high = np.inf, -np.inf

    def add(self, x: Tensor) -> None:
        """Add the values of a tensor of any shape.

        Raises: UsageError for a NaN or an infinity.
        """
        values = x.detach().to("cpu", torch.float32).reshape(-1).numpy()
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = int((~np.isfinite(values)).sum())
            raise UsageError(f"{bad} of {values.size} values are NaN or infinite")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.total += values.size
        self.magnitude += float(np.abs(values).sum(dtype=np.float64))
        self._raw.append(values.copy())
        if self.total > RAW_LIMIT:
            self._compress()

    def _compress(self) -> None:
        keys, moments = self._bins or (np.empty(0, np.int64), np.empty((3, 0)))
        for values in self._raw:
            ordered = np.sort(values)
            ordered += np.float32(0.0)  # -0 becomes 0
            # the leading 22 bits of a float32: sign, exponent, 13 of the mantissa; equal ones lie together
            new = ordered.view(np.int32) >> 10
            starts = np.flatnonzero(np.concatenate([[True], new[1:] != new[:-1]]))
            v = ordered.astype(np.float64)
            counts = np.diff(starts, append=v.size).astype(np.float64)
            new, fresh = new[starts], np.stack([counts, np.add.reduceat(v, starts), np.add.reduceat(v * v, starts)])
            keys, where = np.unique(np.concatenate([keys, new]), return_inverse=True)
            both = np.concatenate([moments, fresh], axis=1)
            moments = np.stack([np.bincount(where, row, keys.size) for row in both])
        self._raw, self._bins = [], (keys, moments)

    def table(self) -> tuple[np.ndarray, np.ndarray]:
        """Return sorted values, (k,) float64, and prefix sums of count, value and squared value, (3, k+1) float64."""
        if self._bins is not None:
            self._compress()
            moments = self._bins[1]
            values = moments[1] / moments[0]
            order = np.argsort(values)
            values, moments = values[order], moments[:, order]
        else:
            values = np.sort(np.concatenate(self._raw or [np.empty(0, np.float32)])).astype(np.float64)
            moments = np.stack([np.ones_like(values), values, values * values])
        return values, np.concatenate([np.zeros((3, 1)), np.cumsum(moments, axis=1)], axis=1)


def squared_errors(
    table: tuple[np.ndarray, np.ndarray], steps: np.ndarray, q_min: int, q_max: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the summed squared error of each step, and the step that is optimal for the same codes.

    table: of ``ValueSummary.table``
    steps: (m,) float64
    Returns: (m,) and (m,) float64.
    """
    values, prefix = table
    if values.size <= FEW * (q_max - q_min + 1) and prefix[0, -1] == values.size:
        codes = np.clip(np.rint(values / steps[:, None]), q_min, q_max)
        errors = np.square(values - codes * steps[:, None]).sum(1)
        norm = np.square(codes).sum(1)
        return errors, np.divide(codes @ values, norm, out=steps.copy(), where=norm > 0)
    q = np.arange(q_min, q_max + 1, dtype=np.float64)
    cuts = np.searchsorted(values, steps[:, None] * (q[:-1] + 0.5))
    ends = np.full((len(steps), 1), values.size)
    edges = np.concatenate([np.zeros_like(ends), cuts, ends], axis=1)
    n, s1, s2 = (np.diff(row[edges], axis=1) for row in prefix)
    qs = q * steps[:, None]
    errors = (s2 - 2.0 * qs * s1 + qs * qs * n).sum(1)
    norm = (q * q * n).sum(1)
    return errors, np.divide((q * s1).sum(1), norm, out=steps.copy(), where=norm > 0)


def _refine(table: tuple[np.ndarray, np.ndarray], start: float, ratio: float, q_min: int, q_max: int) -> float:
    """Find the best step near ``start``: a fine geometric grid, then codes and closed-form step in turns."""
    steps = start * np.geomspace(1 / ratio, ratio, 129)
    for _ in range(4):
        steps = np.unique(np.float32(np.concatenate([steps, [start]]))).astype(np.float64)
        steps = steps[steps > 0]
        errors, closed = squared_errors(table, steps, q_min, q_max)
        start = float(steps[np.argmin(errors)])
        steps = closed[np.argsort(errors)[:8]]
    return start


def exact_step(values: np.ndarray, q_min: int, q_max: int) -> float:
    """Find the largest step that represents every value exactly, a float32 value; 0.0 where none does.

    ``fl32(code * step) == v`` with a code of q_min to q_max.  Such a step is the largest positive value, or without one
    the lowest value, over its code, give or take a rounding.

    values: float32 values, in any order.
    """
    if len(np.unique(values[: 4 * (q_max - q_min + 1)])) > q_max - q_min + 1:  # cheap, and true of most
        return 0.0
    distinct = np.unique(values).astype(np.float32)
    if not len(distinct) or len(distinct) > q_max - q_min + 1 or not (distinct[0] or distinct[-1]):
        return 0.0
    end, bound = (distinct[-1], q_max) if distinct[-1] > 0 else (distinct[0], q_min)
    if not bound:  # negative values, unsigned codes
        return 0.0
    sign = 1 if bound > 0 else -1
    near = end / np.arange(sign, bound + sign, sign, dtype=np.float32)
    zero, infinity = np.float32(0), np.float32(np.inf)
    steps = np.stack([near, np.nextafter(near, infinity), np.nextafter(near, zero)], axis=1).reshape(-1)
    codes = np.rint(distinct / steps[:, None])
    exact = (codes >= q_min) & (codes <= q_max) & (codes * steps[:, None] == distinct)
    found = np.flatnonzero(exact.all(1))
    return float(steps[found[0]]) if len(found) else 0.0


def exact_steps(x: Tensor, q_min: int, q_max: int, *, axis: int | None = None, group_size: int | None = None) -> Tensor:
    """Find the step that represents all values exactly per tensor, index of ``axis`` or group, as ``exact_step``.

    Returns: (steps,) float32, 0 where there is none.
    """
    rows = rows_per_step(x.detach(), axis, group_size).to("cpu", torch.float32).numpy()
    steps = [exact_step(row, q_min, q_max) for row in rows]
    return torch.tensor(steps, dtype=torch.float32, device=x.device)


def best_step(summary: ValueSummary, q_min: int, q_max: int) -> float:
    """Find the step of least squared error, a float32 value; 0.0 when all values are 0.

    Its error is at most that of the best of 2,000 log-spaced steps in [1e-4, 2] * max|v| while the values are kept raw,
    and at most 1.001 times that beyond.  Where some step represents all values exactly in float32, the one found does.

    Raises: UsageError when there are no values.
    """
    if not summary.total:
        raise UsageError("no values to set a step from: the batch is empty")
    top = max(abs(summary.low), abs(summary.high))
    if top == 0.0:
        return 0.0
    table = summary.table()
    grid = top * np.geomspace(*GRID_RANGE, GRID)
    errors = squared_errors(table, grid, q_min, q_max)[0]
    found = _refine(table, float(grid[np.argmin(errors)]), grid[1] / grid[0], q_min, q_max)
    values = table[0].astype(np.float32)
    few = np.count_nonzero(np.diff(values)) <= q_max - q_min  # they are sorted
    if few and not _is_exact(values, found, q_min, q_max):
        return exact_step(values, q_min, q_max) or found
    return found


def _is_exact(values: np.ndarray, step: float, q_min: int, q_max: int) -> bool:
    """Tell whether a step represents float32 values as they are."""
    codes = np.clip(np.rint(values / np.float32(step)), q_min, q_max)
    return bool((codes * np.float32(step) == values).all())


def best_step_and_offset(summary: ValueSummary, q_min: int, q_max: int) -> tuple[float, float]:
    """Find LSQ+'s step and offset ``b = -z * s`` of least squared error over ranges shrunk from both ends.

    Zero is always a level: z lies between q_min and q_max.

    Returns: (step, offset), both 0.0 when all values are 0.
    Raises: UsageError when there are no values.
    """
    if not summary.total:
        raise UsageError("no values to set a step from: the batch is empty")
    low, high = min(summary.low, 0.0), max(summary.high, 0.0)
    if low == high:
        return 0.0, 0.0
    table = summary.table()
    shrink = np.geomspace(0.02, 1.0, 32)
    lows, highs = (np.unique(end * shrink) for end in (low, high))
    best = (np.inf, 0.0, 0)
    for bottom in lows:
        steps = (highs - bottom) / (q_max - q_min)
        zeros = np.clip(np.rint(q_min - bottom / steps), q_min, q_max)
        for z in np.unique(zeros):
            mine = steps[zeros == z]
            errors = squared_errors(table, mine, int(q_min - z), int(q_max - z))[0]
            if errors.min() < best[0]:
                best = (float(errors.min()), float(mine[np.argmin(errors)]), int(z))
    step = _refine(table, best[1], 1.1, q_min - best[2], q_max - best[2])
    return step, -best[2] * step


def rows_per_step(x: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """View x as (steps, elements that share one): one row for the tensor, or one per index of ``axis`` or group."""
    if group_size is not None:
        return x.reshape(-1, group_size)
    if axis is None:
        return x.reshape(1, -1)
    steps = x.shape[axis]
    return x.movedim(axis, 0).reshape(steps, x.numel() // steps if steps else 0)


def mse_step(x: Tensor, q_min: int, q_max: int, *, axis: int | None = None, group_size: int | None = None) -> Tensor:
    """Find the step of least squared error per tensor, index of ``axis`` or group.

    x: any shape, float.
    Returns: (steps,) float32, 0 for all-zero values.
    """
    steps = []
    for row in rows_per_step(x, axis, group_size):
        summary = ValueSummary()
        summary.add(row)
        steps.append(best_step(summary, q_min, q_max))
    return torch.tensor(steps, dtype=torch.float32, device=x.device)
