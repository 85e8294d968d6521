"""Quantized counterpart of transformers' FalconLinear, a Linear in two steps.  Imported only when met."""

from __future__ import annotations

from transformers.models.falcon.modeling_falcon import FalconLinear  # type: ignore[import-not-found, unused-ignore]

from lsquant.nn.matmul import QuantLinear


class QuantFalconLinear(QuantLinear, FalconLinear):
    """transformers' ``FalconLinear`` with learned steps; see QuantLinear."""

    float_type = FalconLinear
