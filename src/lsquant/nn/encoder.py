"""Torch's transformer encoder without its fused eval-mode path, which computes with the float weights directly."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lsquant._util.leaf import leaf


class UnfusedEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` that always calls its layers, so that quantized ones are used in eval mode."""

    float_type = nn.TransformerEncoderLayer

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if not isinstance(src, Tensor):
            return leaf(self, src, src_mask, src_key_padding_mask, is_causal)
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    @property
    def activation_relu_or_gelu(self) -> int:
        """0 tells torch that the fast path does not apply."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: Any) -> None:
        vars(self)["activation_relu_or_gelu"] = value


class UnfusedEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` that makes no nested tensors, which belong to the fast path."""

    float_type = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if not isinstance(src, Tensor):
            return leaf(self, src, mask, src_key_padding_mask, is_causal)
        return super().forward(src, mask, src_key_padding_mask, is_causal)

    @property
    def use_nested_tensor(self) -> bool:
        """Always False."""
        return False

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: Any) -> None:
        vars(self)["use_nested_tensor"] = value
