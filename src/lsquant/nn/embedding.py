"""Quantized Embedding: rows are gathered first and quantized then; values and gradients are the same either way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import ops
from lsquant._util.leaf import leaf
from lsquant.nn.base import QuantizedLayer
from lsquant.quantizer import Quantizer


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    """``nn.Embedding`` with learned steps of its weight; a channel is a row; the input, indices, is never quantized.

    input: (...) int.  Returns (..., embedding_dim) in the weight's dtype.
    """

    float_type = nn.Embedding
    bias = None
    takes_codes = False

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input)
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        found = F.embedding(input, self.weight, *options)
        quantizer = self.weight_quantizer
        if quantizer is None or not quantizer.enabled:
            return found
        rows = self._quantized(found, input, quantizer)
        if self.padding_idx is None or not rows.requires_grad:
            return rows
        # neither the weight's row of the padding nor its step learns from padding
        return torch.where((input == self.padding_idx).unsqueeze(-1), rows.detach(), rows)

    def _quantized(self, found: Tensor, input: Tensor, quantizer: Quantizer) -> Tensor:
        self.require_steps()
        quantizer.count_guarded()
        grid = quantizer.grid()
        if grid.step.numel() == 1:
            return ops.fake_quantize_with(found, grid._replace(axis=None, group_size=None))
        steps = grid.step.reshape(self.num_embeddings, -1).index_select(0, input.reshape(-1)).reshape(-1)
        rows = found.reshape(-1, self.embedding_dim)
        return ops.fake_quantize_with(rows, grid._replace(step=steps, axis=0)).reshape(found.shape)

    @staticmethod
    def unsupported(layer: nn.Module) -> str:
        if getattr(layer, "scale_grad_by_freq", False):
            return "scale_grad_by_freq has no step gradient"
        return "sparse gradients have no step gradient" if getattr(layer, "sparse", False) else ""
