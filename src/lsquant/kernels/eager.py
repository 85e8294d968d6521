"""The eager engine: the quantizer of ``lsquant.reference``, everything else by the contract's defaults."""

from __future__ import annotations

from torch import Tensor

from lsquant import reference
from lsquant.kernels.engine import Engine, Grid


class EagerEngine(Engine):
    """Plain PyTorch; runs on every device."""

    name = "eager"

    def why_not(self) -> str:
        return ""

    def quantize(self, x: Tensor, grid: Grid) -> Tensor:
        return reference.quantize(
            x, grid.step, grid.q_min, grid.q_max, axis=grid.axis, group_size=grid.group_size,
            zero_point=grid.zero_point, offset=grid.offset,
        )  # fmt: skip

    def quantize_backward(
        self, grad: Tensor, x: Tensor, grid: Grid, reuse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return reference.quantize_backward(
            grad, x, grid.step, grid.q_min, grid.q_max, grid.gradient_scale, axis=grid.axis,
            group_size=grid.group_size, zero_point=grid.zero_point, offset=grid.offset,
        )  # fmt: skip


ENGINE = EagerEngine()
