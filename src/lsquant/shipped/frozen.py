"""A shipped quantizer as a module: step, zero point, bounds and codes as buffers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lsquant import ops, reference
from lsquant._util.leaf import leaf
from lsquant.quantizer import Quantizer
from lsquant.shipped.record import ShippedQuantizer


class FrozenQuantizer(nn.Module):
    """A quantizer with fixed step, zero point and bounds; that of a weight also has the codes.

    step: (steps,) float32, guarded.
    zero_point: (steps,) int32, None for 0.
    bounds: (2,) int32, the lowest and the highest code.
    codes: (out, ...) int8 or uint8, output channels first, None for activations.
    axis: the dimension with a step per index, or None.
    group_size: the number of neighbours in a row that share a step, or None.
    """

    step: Tensor
    zero_point: Tensor | None
    bounds: Tensor
    codes: Tensor | None
    _apply: Any = Quantizer._apply  # steps stay float32

    def __init__(self, shipped: ShippedQuantizer) -> None:
        super().__init__()
        tensors = {
            "codes": None if shipped.weight is None else shipped.weight.codes,
            "step": shipped.step,
            "zero_point": shipped.zero_point,
            "bounds": torch.tensor([shipped.q_min, shipped.q_max], dtype=torch.int32),
        }
        for name, value in tensors.items():
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.q_min, self.q_max = shipped.q_min, shipped.q_max
        self.axis, self.group_size = shipped.axis, shipped.group_size
        self.marker: str | None = None

    def grid(self) -> ops.Grid:
        """Return the quantizer as the ops take it.  The offset ``-z s`` rounds to z again."""
        offset = None if self.zero_point is None else -self.zero_point * self.step
        return ops.Grid(
            self.step, self.q_min, self.q_max, offset=offset, axis=self.axis, group_size=self.group_size
        )

    def float_codes(self, x: Tensor) -> Tensor:
        """Return the codes of x as float32 integers in its shape, NaN where x is not finite."""
        layout = {"axis": self.axis, "group_size": self.group_size, "zero_point": self.zero_point}
        return reference.codes(x, self.step, self.q_min, self.q_max, **layout)

    def values(self) -> Tensor:
        """Return a weight, ``code * step`` as float32, computed at every call."""
        assert self.codes is not None
        codes, step = reference.step_view(self.codes.to(torch.float32), self.step, self.axis, self.group_size)
        return (codes * step).reshape(self.codes.shape)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return leaf(self, x)
        if self.marker is not None:
            return mark("Quantizer", x, self.marker, x.shape)
        return ops.fake_quantize_with(x, self.grid())

    def extra_repr(self) -> str:
        steps = "" if self.step.numel() == 1 else f", {self.step.numel()} steps"
        return f"{self.q_min} to {self.q_max}{steps}" + ("" if self.codes is None else f", codes {[*self.codes.shape]}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        codes = state_dict.get(prefix + "codes")
        if self.codes is not None and codes is not None and codes.dtype in (torch.int8, torch.uint8):
            self.codes = self.codes.to(codes.dtype)  # a sign decided otherwise than here
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.q_min, self.q_max = self.bounds.tolist()


def mark(kind: str, x: Tensor, name: str, shape: Any) -> Tensor:
    """Return a custom ONNX node ``lsquant::kind`` with the layer's name, which an exporter replaces.

    Nothing is computed.
    """
    return torch.onnx.ops.symbolic(
        f"lsquant::{kind}", (x,), attrs={"layer": name}, dtype=torch.float32, shape=tuple(shape), version=1
    )
