"""What layers with an exact eval mode have in common."""

from __future__ import annotations

from torch import nn


class ExactLayer(nn.Module):
    """Mixed in before the float layer's class: its eval mode is a fixed order of float operations.

    float_type: the class of the float layer.
    dims: spatial dimensions of the input.
    """

    float_type: type[nn.Module]
    dims: int

    @staticmethod
    def unsupported(layer: nn.Module) -> str:
        """Say why a float layer of this type has no exact form; empty when it has one."""
        return ""
