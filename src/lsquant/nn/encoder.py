"""Torch's transformer encoder layer without its eval-mode fast path, which computes with the float weights directly."""

from __future__ import annotations

from typing import Any

from torch import nn


class SteppedEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` that always calls its layers, so that quantized ones are used in eval mode, too."""

    float_type = nn.TransformerEncoderLayer

    @property
    def activation_relu_or_gelu(self) -> int:
        """0 tells torch that the fast path does not apply."""
        return 0

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: Any) -> None:
        pass

    @staticmethod
    def unsupported(layer: nn.Module) -> str:
        return ""
