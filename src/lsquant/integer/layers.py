"""Frozen counterparts of the quantized layers: integer codes and steps as buffers, no float weight kept beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import nn as lsq_nn
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

    def output_shape(self, x: Tensor, *extra: Any) -> tuple[Any, ...]:
        """Shape of the output for an input that went through ``before``."""
        raise NotImplementedError

    def sums(self, codes_x: Tensor, codes_w: Tensor, bound: int, *extra: Any) -> Tensor:
        """The output from centred codes, ``fl(fl(acc * scale) + b)``."""
        raise NotImplementedError

    def in_float(self, x: Tensor, weight: Tensor, *extra: Any) -> Tensor:
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

    def forward(self, input: Tensor, *extra: Any) -> Tensor:
        """extra: what else ``sums`` and the others of this kind of layer need."""
        x = self.before(input)
        if self.marker is not None:
            return mark("Layer", x, self.marker, self.output_shape(x, *extra))
        if self.scale is None or self.codes is None or self.input is None:
            return self.in_float(x if self.input is None else self.input(x), self.weight_values(), *extra)
        return self.sums(self.input.centred_codes(x), self.codes.to(torch.float32), self.bound(), *extra)


class IntegerLinear(IntegerLayer):
    """``nn.Linear`` over codes; with groups, the sums of the groups are added in float32 in their order."""

    def output_shape(self, x: Tensor, *extra: Any) -> tuple[Any, ...]:
        weight = self.codes if self.codes is not None else self.weight
        assert weight is not None
        return (*x.shape[:-1], weight.shape[0])

    def sums(self, codes_x: Tensor, codes_w: Tensor, bound: int, *extra: Any) -> Tensor:
        assert self.scale is not None
        return ops.linear_of_codes(codes_x, codes_w, self.scale, self.bias, bound, self.group_size)

    def in_float(self, x: Tensor, weight: Tensor, *extra: Any) -> Tensor:
        return F.linear(x, weight, self.bias)


class IntegerConv(IntegerLayer):
    """A convolution of one to three dimensions over codes, transposed or not.

    codes, weight: rows (out, in / groups, *kernel), also when transposed.  padding: (before, after) of each dimension,
    in elements, of code z.
    """

    def __init__(self, *args: Any, source: Any) -> None:
        super().__init__(*args)
        self.kernel_size, self.stride, self.dilation = source.kernel_size, source.stride, source.dilation
        self.transposed, self.groups, self.padding_mode = source.transposed, source.groups, source.padding_mode
        self.output_padding = source.output_padding
        if source.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            self.padding = [(t // 2, t - t // 2) for t in total]
        else:
            pads = [0] * len(self.kernel_size) if source.padding == "valid" else source.padding
            self.padding = [(int(p), int(p)) for p in pads]

    @property
    def node_padding(self) -> list[tuple[int, int]]:
        """The zero padding that remains to be done by the convolution itself."""
        return self.padding if self.padding_mode == "zeros" else [(0, 0)] * len(self.padding)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        batched = input.dim() == len(self.kernel_size) + 2
        x = input if batched else input.unsqueeze(0)
        extra = list(lsq_nn.output_padding(self, x, output_size)) if self.transposed else [0] * len(self.padding)
        y = super().forward(x, extra)
        return y if batched else y.squeeze(0)

    def before(self, x: Tensor) -> Tensor:
        return x if self.padding_mode == "zeros" else F.pad(x, _flat(self.padding), mode=self.padding_mode)

    def output_shape(self, x: Tensor, extra: list[int]) -> tuple[Any, ...]:
        weight = self.codes if self.codes is not None else self.weight
        assert weight is not None
        sides = zip(x.shape[2:], self.node_padding, self.kernel_size, self.dilation, self.stride, extra, strict=True)
        if self.transposed:
            spatial = [(n - 1) * s - a - b + d * (k - 1) + 1 + e for n, (a, b), k, d, s, e in sides]
        else:
            spatial = [(n + a + b - d * (k - 1) - 1) // s + 1 for n, (a, b), k, d, s, _ in sides]
        return (x.shape[0], weight.shape[0], *spatial)

    def _operands(self, x: Tensor, extra: list[int]) -> tuple[Tensor, list[Any]]:
        """The input, padded where sides differ, and the arguments of torch.convolution after the bias."""
        padding = [a for a, _ in self.node_padding]
        if any(a != b for a, b in self.node_padding):
            x, padding = F.pad(x, _flat(self.node_padding)), [0] * len(padding)
        return x, [self.stride, padding, self.dilation, self.transposed, extra, self.groups]

    def sums(self, codes_x: Tensor, codes_w: Tensor, bound: int, extra: list[int]) -> Tensor:
        assert self.scale is not None
        x, conv = self._operands(codes_x, extra)
        return ops.convolution_of_codes(x, codes_w, self.scale, self.bias, bound, *conv, group_size=self.group_size)

    def in_float(self, x: Tensor, weight: Tensor, extra: list[int]) -> Tensor:
        x, conv = self._operands(x, extra)
        return torch.convolution(x, ops.arranged(weight, conv), self.bias, *conv)


def _flat(sides: list[tuple[int, int]]) -> list[int]:
    """As F.pad takes them, the last dimension first."""
    return [side for pair in reversed(sides) for side in pair]


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
