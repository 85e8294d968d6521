"""Quantized Embedding: rows are gathered first and quantized then; values and gradients are the same either way."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import ops
from lsquant.nn.base import QuantizedLayer


class QuantEmbedding(QuantizedLayer, nn.Embedding):
    """``nn.Embedding`` with learned steps of its weight; a channel is a row; the input, indices, is never quantized.

    input: (...) int.  Returns (..., embedding_dim) in the weight's dtype.
    """

    float_type = nn.Embedding
    bias = None
    takes_codes = False

    def forward(self, input: Tensor) -> Tensor:
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        found = F.embedding(input, self.weight, *options)
        quantizer = self.weight_quantizer
        if quantizer is None or not quantizer.enabled:
            return found
        step, q_min, q_max, scale, _ = quantizer.grid()
        kind = {"axis": 0, "group_size": quantizer.spec.group_size}
        if step.numel() == 1:
            return ops.fake_quantize(found, step, q_min, q_max, scale)
        steps = step.reshape(self.num_embeddings, -1).index_select(0, input.reshape(-1)).reshape(-1)
        rows = ops.fake_quantize(found.reshape(-1, self.embedding_dim), steps, q_min, q_max, scale, **kind)
        return rows.reshape(found.shape)

    @staticmethod
    def unsupported(layer: nn.Module) -> str:
        return "sparse gradients have no step gradient" if getattr(layer, "sparse", False) else ""
