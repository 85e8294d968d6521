"""Joins and functions whose inputs are stored as codes: what stands between the layers of an integer-only network."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lsquant._util.leaf import leaf
from lsquant.nn.functions import Mean
from lsquant.nn.joins import Add, Cat, Mul
from lsquant.nn.pool import (
    ExactAdaptiveAvgPool1d,
    ExactAdaptiveAvgPool2d,
    ExactAdaptiveAvgPool3d,
    ExactAvgPool1d,
    ExactAvgPool2d,
    ExactAvgPool3d,
)
from lsquant.quantizer import Quantizer


class StoredInputs(nn.Module):
    """Mixed in before the float module's class: every input is fake-quantized, then the float module computes.

    input_quantizers: one per operand of an addition or a product; one for all inputs of everything else.  A tensor that
        is read in several places has the same quantizer in all of them.
    float_type: the class of the float module.
    """

    input_quantizers: nn.ModuleList
    float_type: type[nn.Module]

    def forward(self, *inputs: Any) -> Any:
        if not all(isinstance(x, Tensor) for x in inputs):
            return leaf(self, *inputs)
        own: Any = self.input_quantizers
        given = [own[min(place, len(own) - 1)](x) for place, x in enumerate(inputs)]
        return super().forward(*given)

    def quantizer_of(self, place: int) -> Quantizer:
        """Return the quantizer of one input."""
        own: Any = self.input_quantizers
        return own[min(place, len(own) - 1)]


class QuantAdd(StoredInputs, Add):
    """``lsquant.nn.Add`` of two stored tensors: ``y = a_hat + b_hat``."""

    float_type = Add


class QuantMul(StoredInputs, Mul):
    """``lsquant.nn.Mul`` of two stored tensors: ``y = a_hat b_hat``."""

    float_type = Mul


class QuantCat(StoredInputs, Cat):
    """``lsquant.nn.Cat`` of stored tensors of one step and sign."""

    float_type = Cat


class QuantMean(StoredInputs, Mean):
    """``lsquant.nn.Mean`` of a stored tensor."""

    float_type = Mean


class QuantAdaptiveAvgPool1d(StoredInputs, ExactAdaptiveAvgPool1d):
    """``nn.AdaptiveAvgPool1d`` of a stored tensor."""


class QuantAdaptiveAvgPool2d(StoredInputs, ExactAdaptiveAvgPool2d):
    """``nn.AdaptiveAvgPool2d`` of a stored tensor."""


class QuantAdaptiveAvgPool3d(StoredInputs, ExactAdaptiveAvgPool3d):
    """``nn.AdaptiveAvgPool3d`` of a stored tensor."""


class QuantAvgPool1d(StoredInputs, ExactAvgPool1d):
    """``nn.AvgPool1d`` of a stored tensor."""


class QuantAvgPool2d(StoredInputs, ExactAvgPool2d):
    """``nn.AvgPool2d`` of a stored tensor."""


class QuantAvgPool3d(StoredInputs, ExactAvgPool3d):
    """``nn.AvgPool3d`` of a stored tensor."""


def _of_function(kind: type[nn.Module]) -> type[StoredInputs]:
    """Make the type of an elementwise function of a stored tensor; this module holds it under its name."""
    name = f"Quant{kind.__name__}"
    about = f"``nn.{kind.__name__}`` of a stored tensor: one output for each code."
    made = type(name, (StoredInputs, kind), {"__doc__": about, "__module__": __name__, "float_type": kind})
    globals()[name] = made
    return made


FUNCTIONS = (nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Mish, nn.ELU, nn.LeakyReLU)
_TYPES: tuple[Any, ...] = (
    QuantAdd, QuantMul, QuantCat, QuantMean, QuantAdaptiveAvgPool1d, QuantAdaptiveAvgPool2d, QuantAdaptiveAvgPool3d,
    QuantAvgPool1d, QuantAvgPool2d, QuantAvgPool3d,
    *map(_of_function, FUNCTIONS),
)  # fmt: skip

STORED_TYPES: dict[type, type[StoredInputs]] = {kind.float_type: kind for kind in _TYPES}
"""Float type -> the type whose inputs are stored."""
