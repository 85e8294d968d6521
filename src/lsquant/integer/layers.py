"""Frozen counterparts of the quantized layers: integer codes and steps as buffers, no float weight kept beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import ops, reference

Marker = str | None


class FrozenQuantizer(nn.Module):
    """A quantizer whose step, zero point and bounds are fixed.

    step: (steps,) float32, guarded.  zero_point: (steps,) int32 or None for 0.  axis: the dimension that has a step per
    index, or None.
    """

    step: Tensor
    zero_point: Tensor | None

    def __init__(
        self, step: Tensor, q_min: int, q_max: int, zero_point: Tensor | None = None, axis: int | None = None
    ) -> None:
        super().__init__()
        self.register_buffer("step", step.detach().clone())
        self.register_buffer("zero_point", None if zero_point is None else zero_point.detach().to(torch.int32).clone())
        self.q_min, self.q_max, self.axis = q_min, q_max, axis
        self.marker: Marker = None

    def float_codes(self, x: Tensor) -> Tensor:
        """Codes as float32 integers in the shape of x."""
        return reference.codes(x, self.step, self.q_min, self.q_max, axis=self.axis, zero_point=self.zero_point)

    def centred_codes(self, x: Tensor) -> Tensor:
        """``code - z`` as float32 integers; one step for the whole tensor."""
        codes = self.float_codes(x)
        return codes if self.zero_point is None else codes - self.zero_point.to(torch.float32)

    def codes(self, x: Tensor) -> Tensor:
        """Codes as int8 (signed) or uint8 (unsigned)."""
        return self.float_codes(x).to(torch.int8 if self.q_min < 0 else torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        if self.marker is not None:
            return mark("Quantizer", x, self.marker, x.shape)
        return ops.fake_quantize(x, self.step, self.q_min, self.q_max, 1.0, axis=self.axis, zero_point=self.zero_point)


def mark(kind: str, x: Tensor, name: str, shape: Any) -> Tensor:
    """A custom ONNX node ``lsquant::kind`` with the layer's name, for an exporter to replace; computes nothing."""
    return torch.onnx.ops.symbolic(
        f"lsquant::{kind}", (x,), attrs={"layer": name}, dtype=torch.float32, shape=tuple(shape), version=1
    )


class IntegerLayer(nn.Module):
    """Common to the frozen layers.  Quantized in weights, in its input, or in both.

    codes: (out, ...) int8 or uint8, or None; weight_step: (steps,) float32; weight: float32, only when the weights are
    not quantized; scale: ``fl(s_x * s_w)``, (1,), (out,) or, with groups, (out, groups), only when both are.
    """

    codes: Tensor | None
    weight_step: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        input: FrozenQuantizer | None,
        codes: Tensor | None,
        weight_step: Tensor | None,
        weight_bounds: tuple[int, int],
        weight: Tensor | None,
        bias: Tensor | None,
        group_size: int | None,
    ) -> None:
        super().__init__()
        self.input = input
        self.weight_bounds, self.group_size = weight_bounds, group_size
        scale = None
        if input is not None and weight_step is not None and codes is not None:
            scale = input.step * weight_step.detach()
            if group_size is not None:
                scale = scale.reshape(codes.shape[0], -1)
        for name, value in {
            "codes": codes, "weight_step": weight_step, "weight": weight, "bias": bias, "scale": scale
        }.items():  # fmt: skip
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.marker: Marker = None

    def before(self, x: Tensor) -> Tensor:
        """What is done to the input before it is quantized: nothing, or the padding of a non-zero padding mode."""
        return x

    def output_shape(self, x: Tensor) -> tuple[Any, ...]:
        """Shape of the output for an input that went through ``before``."""
        raise NotImplementedError

    def sums(self, codes_x: Tensor, codes_w: Tensor, bound: int) -> Tensor:
        """The output from centred codes, ``fl(fl(acc * scale) + b)``."""
        raise NotImplementedError

    def in_float(self, x: Tensor, weight: Tensor) -> Tensor:
        """The float layer, for layers of which only one side is quantized."""
        raise NotImplementedError

    def weight_values(self) -> Tensor:
        """``code * step`` as float32, or the float weight; recomputed at every call."""
        if self.codes is None or self.weight_step is None:
            assert self.weight is not None
            return self.weight
        axis = 0 if self.group_size is None and self.weight_step.numel() > 1 else None
        codes, step = reference.step_view(self.codes.to(torch.float32), self.weight_step, axis, self.group_size)
        return (codes * step).reshape(self.codes.shape)

    def bound(self) -> int:
        """The largest possible ``sum |q_x - z||q_w|`` of one output element."""
        assert self.codes is not None
        assert self.input is not None
        low, high = self.input.q_min, self.input.q_max
        if self.input.zero_point is not None:
            low, high = low - int(self.input.zero_point.max()), high - int(self.input.zero_point.min())
        terms = self.group_size or self.codes[0].numel()
        return terms * max(abs(low), abs(high)) * max(abs(q) for q in self.weight_bounds)

    def forward(self, input: Tensor) -> Tensor:
        x = self.before(input)
        if self.marker is not None:
            return mark("Layer", x, self.marker, self.output_shape(x))
        if self.scale is None or self.codes is None or self.input is None:
            return self.in_float(x if self.input is None else self.input(x), self.weight_values())
        return self.sums(self.input.centred_codes(x), self.codes.to(torch.float32), self.bound())


class IntegerLinear(IntegerLayer):
    """``nn.Linear`` over codes; with groups, the sums of the groups are added in float32 in their order."""

    def output_shape(self, x: Tensor) -> tuple[Any, ...]:
        weight = self.codes if self.codes is not None else self.weight
        assert weight is not None
        return (*x.shape[:-1], weight.shape[0])

    def sums(self, codes_x: Tensor, codes_w: Tensor, bound: int) -> Tensor:
        assert self.scale is not None
        return ops.linear_of_codes(codes_x, codes_w, self.scale, self.bias, bound, self.group_size)

    def in_float(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight, self.bias)


class IntegerConv2d(IntegerLayer):
    """``nn.Conv2d`` over codes.  padding: (top, bottom, left, right) in elements, of code z."""

    def __init__(self, *args: Any, source: nn.Conv2d) -> None:
        super().__init__(*args)
        self.stride, self.dilation, self.groups = list(source.stride), list(source.dilation), source.groups
        self.kernel, self.padding_mode = list(source.kernel_size), source.padding_mode
        if source.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
            self.padding = (total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2)
        else:
            rows, columns = (0, 0) if source.padding == "valid" else source.padding  # type: ignore[misc]
            self.padding = (int(rows), int(rows), int(columns), int(columns))

    @property
    def node_padding(self) -> tuple[int, int, int, int]:
        """The zero padding that remains to be done by the convolution itself."""
        return self.padding if self.padding_mode == "zeros" else (0, 0, 0, 0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.dim() == 4 else super().forward(input.unsqueeze(0)).squeeze(0)

    def before(self, x: Tensor) -> Tensor:
        if self.padding_mode == "zeros":
            return x
        top, bottom, left, right = self.padding
        return F.pad(x, (left, right, top, bottom), mode=self.padding_mode)

    def output_shape(self, x: Tensor) -> tuple[Any, ...]:
        weight = self.codes if self.codes is not None else self.weight
        assert weight is not None
        top, bottom, left, right = self.node_padding
        size = [x.shape[-2] + top + bottom, x.shape[-1] + left + right]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        spatial = [(n - r) // s + 1 for n, r, s in zip(size, reach, self.stride, strict=True)]
        return (*x.shape[:-3], weight.shape[0], *spatial)

    def _padded(self, x: Tensor) -> tuple[Tensor, list[int]]:
        top, bottom, left, right = self.node_padding
        if top == bottom and left == right:
            return x, [top, left]
        return F.pad(x, (left, right, top, bottom)), [0, 0]

    def sums(self, codes_x: Tensor, codes_w: Tensor, bound: int) -> Tensor:
        assert self.scale is not None
        x, padding = self._padded(codes_x)
        geometry = (self.stride, padding, self.dilation, False, [0, 0], self.groups)
        return ops.convolution_of_codes(x, codes_w, self.scale, self.bias, bound, *geometry, self.group_size)

    def in_float(self, x: Tensor, weight: Tensor) -> Tensor:
        x, padding = self._padded(x)
        return F.conv2d(x, weight, self.bias, self.stride, padding, self.dilation, self.groups)


class IntegerBatchNorm(nn.Module):
    """BatchNorm in eval mode, ``fl(fl(x * alpha) + beta)``.  alpha, beta: (C, 1, ...) float32, ``dims`` ones."""

    alpha: Tensor
    beta: Tensor

    def __init__(self, alpha: Tensor, beta: Tensor, dims: int) -> None:
        super().__init__()
        self.register_buffer("alpha", alpha.detach().reshape(-1, *[1] * dims).clone())
        self.register_buffer("beta", beta.detach().reshape(-1, *[1] * dims).clone())

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha, self.beta
        if x.dim() == alpha.dim():  # BatchNorm1d of (batch, C)
            alpha, beta = alpha.squeeze(-1), beta.squeeze(-1)
        return x * alpha + beta
