"""Initialised quantizers of every kind, for the tests of Quantizer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lsquant import Quantizer, QuantSpec


def data(*shape: int, seed: int = 0, unsigned: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.relu() if unsigned else x


def ready(bits: int = 4, shape: tuple[int, ...] = (1,), x: Tensor | None = None, **spec: Any) -> Quantizer:
    """An initialised quantizer; keyword arguments are those of QuantSpec, and axis and count."""
    own = {k: spec.pop(k) for k in ("axis", "count") if k in spec}
    quantizer = Quantizer(QuantSpec(bits, **spec), shape, **{"count": 30, **own})
    quantizer.initialize(data(6, 30) if x is None else x)
    return quantizer


VARIETIES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "signed": {"signed": True},
    "unsigned": {"signed": False, "x": data(6, 30, unsigned=True)},
    "channel": {"granularity": "channel", "shape": (6,), "axis": 0, "signed": True},
    "group": {"granularity": "group", "group_size": 10, "shape": (18,), "signed": True, "count": 10},
    "offset": {"offset": True},
}
varieties = pytest.mark.parametrize("variety", VARIETIES)
