"""An engine of the tests that has only the quantizer, written apart from the package's: all else is the defaults."""

from __future__ import annotations

import torch
from torch import Tensor

from lsquant import reference
from lsquant.kernels import Engine, Grid


class QuantizerOnly(Engine):
    name = "quantizer_only"

    def why_not(self) -> str:
        return ""

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        v, s, z = self._views(x, grid)
        code = torch.clamp(torch.round(v.float() / s) + z, grid.q_min, grid.q_max)
        y = torch.where(torch.isfinite(v), (code - z) * s, torch.nan)
        return y.reshape(x.shape).to(x.dtype)

    def quantize_backward(
        self, grad: Tensor, x: Tensor, grid: Grid, reuse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        v, s, z = self._views(x, grid)
        up, low, high = grad.reshape(v.shape).float(), grid.q_min - z, grid.q_max - z
        vs = torch.where(torch.isfinite(v), v.float() / s, torch.nan)
        inside, learned = (vs > low) & (vs < high), grid.offset is not None
        below, above = (grid.q_min, grid.q_max) if learned else (low, high)
        terms = torch.where(inside | vs.isnan(), torch.round(vs) - vs, torch.where(vs <= low, below, above)) * up
        of_x = torch.where(inside, up, 0.0).reshape(x.shape).to(x.dtype)
        of_offset = self._sums(torch.where(inside, 0.0, up), grid) if learned else None
        return of_x, self._sums(terms, grid), of_offset

    def _views(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        reference.require_layout(x, grid.step, grid.axis, grid.group_size, grid.zero_point, grid.offset)
        z = torch.zeros_like(grid.step) + (0 if grid.zero_point is None else grid.zero_point)
        if grid.offset is not None:
            z = torch.clamp(torch.round(-grid.offset / grid.step), grid.q_min, grid.q_max)
        if grid.group_size is not None:
            return x.reshape(-1, grid.group_size), grid.step[:, None], z[:, None]
        shape = [-1 if grid.axis is not None and d == grid.axis % x.dim() else 1 for d in range(x.dim())]
        return x, grid.step.reshape(shape), z.reshape(shape)

    def _sums(self, terms: Tensor, grid: Grid) -> Tensor:
        terms = terms.double()
        if grid.group_size is not None:
            found = terms.sum(1)
        elif grid.axis is not None:
            found = terms.movedim(grid.axis, 0).flatten(1).sum(1) if terms.dim() > 1 else terms
        else:
            found = terms.sum().reshape(1)
        return (found * grid.gradient_scale).float()


ENGINE = QuantizerOnly()
