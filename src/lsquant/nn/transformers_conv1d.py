"""Quantized counterpart of transformers' Conv1D, a linear layer whose weight is (in, out).  Imported only when met."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D  # type: ignore[import-not-found, unused-ignore]

from lsquant import ops
from lsquant._util.leaf import leaf
from lsquant.nn.base import QuantizedLayer
from lsquant.nn.layout import WeightLayout


class QuantConv1D(QuantizedLayer, Conv1D):
    """transformers' ``Conv1D`` with learned steps; a channel is an output column.  x: (..., in) to (..., out)."""

    float_type = Conv1D
    weight_layout = WeightLayout.INPUT_FIRST

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return leaf(self, x)
        self.require_size(x.shape[-1], self.weight.shape[0])
        x, grids = self.read(x), self.grids()
        if grids is None:
            values, weight = self.float_operands(x)
            return F.linear(values, weight.t(), self.bias)
        self.count_guarded()
        x_grid, w_grid = grids
        return self.computed(ops.linear, x, self.rows(), self.bias, x_grid, w_grid)
