"""Steps of least squared error for many short rows at once: a step per channel or group of a weight.

``lsquant.mse`` searches one row after the other and takes any number of values; here all rows are searched together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lsquant.mse import exact_step

CANDIDATES, LOWEST, HIGHEST = 96, 0.05, 1.4
"""Steps that are tried first: so many, between these multiples of the step at which neither end is cut."""
FEW, MORE, ALL_UP = 32, 8, 2.1
"""Where fewer than so many values count, the error jumps from step to step: so many times more steps, up to this."""
NEAR, ROUNDS, BEST = 9, 3, 8
AT_ONCE = 1 << 22
"""Elements that are rounded at once, by all candidates together."""


@torch.no_grad()
def row_steps(rows: Tensor, q_min: int, q_max: int, importance: Tensor | None = None) -> Tensor:
    """Find ``argmin_s sum_i m_i (v_i - clip(round(v_i / s), q_min, q_max) s)^2`` of each row.

    rows: (steps, elements) float.
    importance: (steps, elements) float or None for 1, the weight m of every squared error, at least 0.
    Returns: (steps,) float32, 0 for a row whose values, or whose important values, are all 0.  The error is at most
        1.001 times that of the best of 2,000 log-spaced steps on random rows of 32 elements and more (a test).
    """
    rows = rows.detach().float()
    if importance is not None:
        importance = importance.detach().float().expand_as(rows)
        rows = torch.where(importance > 0, rows, torch.zeros_like(rows))
        importance = importance / importance.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    per_chunk = max(1, AT_ONCE // max(1, rows.shape[1] * CANDIDATES))
    parts = torch.arange(len(rows)).split(per_chunk)
    found = [_searched(rows[p], None if importance is None else importance[p], q_min, q_max) for p in parts]
    return torch.cat(found) if found else rows.new_empty(0)


def _searched(given: Tensor, importance: Tensor | None, q_min: int, q_max: int) -> Tensor:
    if not len(given) or not given.shape[1]:
        return given.new_zeros(len(given))
    exponents = torch.frexp(given.abs().amax(1, keepdim=True))[1]
    rows = torch.ldexp(given, -exponents)  # squares of very large and very small values are none in float32
    top = rows.new_zeros(len(rows))  # the step at which neither end is cut
    if q_min < 0:
        top = torch.maximum(top, rows.amin(1) / q_min)
    if q_max > 0:
        top = torch.maximum(top, rows.amax(1) / q_max)
    live = top > 0
    steps = torch.where(live, top, torch.ones_like(top))[:, None]
    # a step that is c too small costs (c top)^2 at the largest value, and saves less than elements * (top / q)^2 / 4
    saved = 0.5 * rows.shape[1] ** 0.5 / min(abs(q) for q in (q_min, q_max) if q)
    lowest, highest, tries = max(LOWEST, 1.0 - saved), HIGHEST, CANDIDATES
    if importance is not None or rows.shape[1] < FEW:
        highest, tries = ALL_UP, MORE * CANDIDATES
    if importance is not None:  # the largest value may count for nothing
        lowest = LOWEST
    grid = torch.logspace(0, 1, tries, base=highest / lowest, device=rows.device) * lowest
    tried = steps * grid
    errors, closed = _errors(rows, tried, importance, q_min, q_max)
    kept = errors.topk(BEST, largest=False).indices
    starts = tried.gather(1, kept)
    best, error = starts[:, :1], errors.gather(1, kept[:, :1])
    near = torch.logspace(-1, 1, NEAR, base=float(grid[1] / grid[0]), device=rows.device)
    candidates = torch.cat([(starts[..., None] * near).flatten(1), closed.gather(1, kept)], 1)
    for _ in range(ROUNDS):
        errors, closed = _errors(rows, candidates, importance, q_min, q_max)
        order = errors.topk(BEST, largest=False).indices
        better = errors.gather(1, order[:, :1]) < error
        best = torch.where(better, candidates.gather(1, order[:, :1]), best)
        error = torch.minimum(error, errors.gather(1, order[:, :1]))
        candidates = closed.gather(1, order)
    found = torch.where(live, best[:, 0], torch.zeros_like(top))
    exact = torch.nonzero((error[:, 0] > 0) & (error[:, 0] < 1e-9 * rows.square().sum(1))).flatten()
    return _exact_where_possible(given, torch.ldexp(found, exponents[:, 0]), exact, q_min, q_max)


def _errors(rows: Tensor, steps: Tensor, importance: Tensor | None, q_min: int, q_max: int) -> tuple[Tensor, Tensor]:
    """Return the errors of steps, (rows, candidates), and the steps that are best for the same codes."""
    if rows.numel() * steps.shape[1] > 2 * AT_ONCE and steps.shape[1] > 1:
        size = max(1, AT_ONCE // rows.numel())
        parts = [_errors(rows, part, importance, q_min, q_max) for part in steps.split(size, 1)]
        return torch.cat([e for e, _ in parts], 1), torch.cat([c for _, c in parts], 1)
    v, s = rows[:, None], steps[:, :, None]
    codes = torch.round(v / s).clamp_(q_min, q_max)
    weighted = codes if importance is None else codes * importance[:, None]
    norm, dot = (codes * weighted).sum(2), (weighted * v).sum(2)
    misses = (v - codes * s).square_()
    errors = (misses if importance is None else misses * importance[:, None]).sum(2)
    closed = torch.where((norm > 0) & (dot > 0), dot / norm.clamp(min=torch.finfo(norm.dtype).tiny), steps)
    return errors, closed


def _exact_where_possible(rows: Tensor, steps: Tensor, among: Tensor, q_min: int, q_max: int) -> Tensor:
    """Return steps; of the rows among which there may be one that a step represents as it is, that step."""
    for row in among.tolist():
        exact = exact_step(rows[row].cpu().numpy(), q_min, q_max)
        if exact:
            steps[row] = exact
    return steps
