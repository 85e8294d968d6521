"""BatchNorm in a fixed order of operations, so that a runtime can repeat its eval mode bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsquant import ops
from lsquant._util.leaf import leaf
from lsquant.nn.exact import ExactLayer


class ExactBatchNorm(ExactLayer, nn.modules.batchnorm._BatchNorm):
    """Normalize by ``fl(fl(x * alpha) + beta)`` in eval mode, with float32 alpha and beta, two roundings.

    PyTorch's own eval kernel uses a fused multiply-add, which ONNX Runtime does not.  Training mode is unchanged.
    """

    def affine_constants(self) -> tuple[Tensor, Tensor]:
        """Compute ``alpha = gamma / sqrt(var + eps)``, ``beta - mean * alpha``, both (C,) float32; differentiable.

        Every operation is rounded correctly, on every machine: PyTorch's float32 square root is not on all processors.
        """
        if self.running_mean is None or self.running_var is None:
            raise RuntimeError("affine_constants: this BatchNorm keeps no running statistics")
        # a float64 root, even one that is a unit off, rounds to the float32 nearest to the true one
        deviation = torch.sqrt((self.running_var.float() + self.eps).double()).float()
        alpha = (torch.ones_like(deviation) if self.weight is None else self.weight.float()) / deviation
        shift = self.running_mean.float() * alpha
        return alpha, -shift if self.bias is None else self.bias.float() - shift

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input)
        if self.training or self.running_mean is None:
            return super().forward(input)
        self._check_input_dim(input)
        return ops.scale_shift(input, *self.affine_constants())

    @staticmethod
    def unsupported(layer: nn.Module) -> str:
        return "" if getattr(layer, "track_running_stats", True) else "it keeps no running statistics"


class ExactBatchNorm1d(ExactBatchNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` with an exact eval mode.  x: (batch, C) or (batch, C, length)."""

    float_type, dims = nn.BatchNorm1d, 1


class ExactBatchNorm2d(ExactBatchNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with an exact eval mode.  x: (batch, C, height, width)."""

    float_type, dims = nn.BatchNorm2d, 2


class ExactBatchNorm3d(ExactBatchNorm, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` with an exact eval mode.  x: (batch, C, *three)."""

    float_type, dims = nn.BatchNorm3d, 3
