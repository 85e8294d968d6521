"""Frozen counterparts of the quantized layers: integer codes and steps as buffers, no float weight kept beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import nn as lsq_nn
from lsquant import ops, reference
from lsquant.quantizer import Quantizer

Marker = str | None


class FrozenQuantizer(nn.Module):
    """A quantizer whose step, zero point and bounds are fixed; a weight's also has the codes.

    step: (steps,) float32, guarded.  zero_point: (steps,) int32 or None for 0.  bounds: (2,) int32, the lowest and the
    highest code.  codes: (out, ...) int8 or uint8, output channels first, or None.  axis: the dimension that has a step
    per index, or None.  group_size: neighbours in a row that share a step, or None.
    """

    step: Tensor
    zero_point: Tensor | None
    bounds: Tensor
    codes: Tensor | None
    _apply: Any = Quantizer._apply  # steps stay float32

    def __init__(
        self, step: Tensor, q_min: int, q_max: int, zero_point: Tensor | None = None, axis: int | None = None,
        group_size: int | None = None, codes: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        tensors = {"codes": codes, "step": step, "zero_point": zero_point, "bounds": torch.tensor([q_min, q_max])}
        for name, value in tensors.items():
            self.register_buffer(name, None if value is None else value.detach().clone())
        self.bounds = self.bounds.to(torch.int32)
        self.q_min, self.q_max, self.axis, self.group_size = q_min, q_max, axis, group_size
        self.marker: Marker = None

    def grid(self) -> ops.Grid:
        """As the ops take it.  The offset ``-z s`` rounds to z again."""
        offset = None if self.zero_point is None else -self.zero_point * self.step
        return ops.Grid(
            self.step, self.q_min, self.q_max, offset=offset, axis=self.axis, group_size=self.group_size
        )

    def float_codes(self, x: Tensor) -> Tensor:
        """Codes as float32 integers in the shape of x, NaN where x is not finite."""
        layout = {"axis": self.axis, "group_size": self.group_size, "zero_point": self.zero_point}
        return reference.codes(x, self.step, self.q_min, self.q_max, **layout)

    def values(self) -> Tensor:
        """A weight, ``code * step`` as float32; recomputed at every call."""
        assert self.codes is not None
        codes, step = reference.step_view(self.codes.to(torch.float32), self.step, self.axis, self.group_size)
        return (codes * step).reshape(self.codes.shape)

    def forward(self, x: Tensor) -> Tensor:
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
    """A custom ONNX node ``lsquant::kind`` with the layer's name, for an exporter to replace; computes nothing."""
    return torch.onnx.ops.symbolic(
        f"lsquant::{kind}", (x,), attrs={"layer": name}, dtype=torch.float32, shape=tuple(shape), version=1
    )


class IntegerLayer(nn.Module):
    """Common to the frozen layers.  Quantized in weights, in its input, or in both.

    The float layer's plain attributes are kept.  weight: rows (out, ...) when the weights are not quantized; otherwise
    ``code * step`` in the float layer's shape and type, made at every access, for models that read its type or shape.
    """

    weight: Tensor
    like: Tensor
    bias: Tensor | None

    def __init__(self, source: Any, weights: FrozenQuantizer | None, inputs: FrozenQuantizer | None) -> None:
        super().__init__()
        vars(self).update({k: v for k, v in vars(source).items() if k[0] != "_" and k not in vars(self)})
        self.weight_quantizer, self.input_quantizer = weights, inputs
        if weights is None:
            self.register_buffer("weight", source.rows().detach().clone())
        self.register_buffer("like", source.weight.new_empty(0), persistent=False)
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())
        self.marker: Marker = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.weight_quantizer is not None:
            return self.own_layout(self.weight_quantizer.values()).to(self.like.dtype)
        return super().__getattr__(name)

    def own_layout(self, rows: Tensor) -> Tensor:
        """A weight from rows, as the float layer has it."""
        return rows

    @property
    def input(self) -> FrozenQuantizer | None:
        """The input's quantizer."""
        return self.input_quantizer

    @property
    def codes(self) -> Tensor | None:
        """(out, ...) int8 or uint8, output channels first; None where the weights are not quantized."""
        return None if self.weight_quantizer is None else self.weight_quantizer.codes

    @property
    def weight_step(self) -> Tensor | None:
        """(steps,) float32."""
        return None if self.weight_quantizer is None else self.weight_quantizer.step

    @property
    def weight_bounds(self) -> tuple[int, int]:
        """The lowest and the highest code of the weights."""
        return (0, 0) if self.weight_quantizer is None else (self.weight_quantizer.q_min, self.weight_quantizer.q_max)

    @property
    def group_size(self) -> int | None:
        """Of the weights."""
        return None if self.weight_quantizer is None else self.weight_quantizer.group_size

    @property
    def scale(self) -> Tensor | None:
        """``fl(s_x * s_w)``: (1,), (out,) or, with groups, (out, groups); only where both sides are quantized."""
        if self.weight_step is None or self.input_quantizer is None or self.codes is None:
            return None
        scale = self.input_quantizer.step * self.weight_step
        return scale if self.group_size is None else scale.reshape(self.codes.shape[0], -1)

    def rows(self) -> Tensor:
        """The weight or its codes, output channels first."""
        codes = self.codes
        return self.weight if codes is None else codes

    def before(self, x: Tensor) -> Tensor:
        """What is done to the input before it is quantized: nothing, or the padding of a non-zero padding mode."""
        return x

    def output_shape(self, x: Tensor, *extra: Any) -> tuple[Any, ...]:
        """Shape of the output for an input that went through ``before``."""
        raise NotImplementedError

    def sums(self, x: Tensor, weight: Tensor, grids: tuple[ops.Grid, ops.Grid], *extra: Any) -> Tensor:
        """The output over codes, ``fl(fl(acc * fl(s_x s_w)) + b)``; ``weight`` has the codes again."""
        raise NotImplementedError

    def in_float(self, x: Tensor, weight: Tensor, *extra: Any) -> Tensor:
        """The float layer, for layers of which only one side is quantized."""
        raise NotImplementedError

    def forward(self, input: Tensor, *extra: Any) -> Tensor:
        """extra: what else ``sums`` and the others of this kind of layer need."""
        x, weights, inputs = self.before(input), self.weight_quantizer, self.input_quantizer
        if self.marker is not None:
            return mark("Layer", x, self.marker, self.output_shape(x, *extra))
        if weights is not None and inputs is not None:  # fl(fl(q s) / s) rounds to q
            return self.sums(x, weights.values(), (inputs.grid(), weights.grid()), *extra)
        weight = self.rows() if weights is None else weights.values().to(x.dtype)
        return self.in_float(x if inputs is None else inputs(x), weight, *extra)


class IntegerLinear(IntegerLayer):
    """``nn.Linear`` over codes; with groups, the sums of the groups are added in float32 in their order."""

    def __init__(self, source: Any, weights: FrozenQuantizer | None, inputs: FrozenQuantizer | None) -> None:
        super().__init__(source, weights, inputs)
        self.weight_layout = source.weight_layout

    def own_layout(self, rows: Tensor) -> Tensor:
        return self.weight_layout.weight(rows)

    def output_shape(self, x: Tensor, *extra: Any) -> tuple[Any, ...]:
        return (*x.shape[:-1], self.rows().shape[0])

    def sums(self, x: Tensor, weight: Tensor, grids: tuple[ops.Grid, ops.Grid], *extra: Any) -> Tensor:
        inputs, weights = grids
        return ops.linear(x, weight, self.bias, inputs, weights)

    def in_float(self, x: Tensor, weight: Tensor, *extra: Any) -> Tensor:
        return F.linear(x, weight, self.bias)


class IntegerConv(IntegerLayer):
    """A convolution of one to three dimensions over codes, transposed or not.

    codes, weight: rows (out, in / groups, *kernel), also when transposed.  padding: (before, after) of each dimension,
    in elements, of code z.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int
    padding_mode: str

    def __init__(self, source: Any, weights: FrozenQuantizer | None, inputs: FrozenQuantizer | None) -> None:
        super().__init__(source, weights, inputs)
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

    def own_layout(self, rows: Tensor) -> Tensor:
        """A weight from rows, as the float layer and ONNX' operators have it."""
        return ops.swap_channels(rows, self.groups) if self.transposed else rows

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        batched = input.dim() == len(self.kernel_size) + 2
        x = input if batched else input.unsqueeze(0)
        extra = list(lsq_nn.output_padding(self, x, output_size)) if self.transposed else [0] * len(self.padding)
        y = super().forward(x, extra)
        return y if batched else y.squeeze(0)

    def before(self, x: Tensor) -> Tensor:
        return x if self.padding_mode == "zeros" else F.pad(x, _flat(self.padding), mode=self.padding_mode)

    def output_shape(self, x: Tensor, extra: list[int]) -> tuple[Any, ...]:
        sides = zip(x.shape[2:], self.node_padding, self.kernel_size, self.dilation, self.stride, extra, strict=True)
        if self.transposed:
            spatial = [(n - 1) * s - a - b + d * (k - 1) + 1 + e for n, (a, b), k, d, s, e in sides]
        else:
            spatial = [(n + a + b - d * (k - 1) - 1) // s + 1 for n, (a, b), k, d, s, _ in sides]
        return (x.shape[0], self.rows().shape[0], *spatial)

    def _operands(self, x: Tensor, extra: list[int]) -> tuple[Tensor, ops.Conv]:
        """The input, padded where sides differ, and the geometry that is left."""
        padding = [a for a, _ in self.node_padding]
        if any(a != b for a, b in self.node_padding):
            x, padding = F.pad(x, _flat(self.node_padding)), [0] * len(padding)
        return x, ops.Conv(self.stride, padding, self.dilation, self.transposed, extra, self.groups)

    def sums(self, x: Tensor, weight: Tensor, grids: tuple[ops.Grid, ops.Grid], extra: list[int]) -> Tensor:
        x, conv = self._operands(x, extra)
        inputs, weights = grids
        return ops.convolution(x, weight, self.bias, inputs, weights, conv)

    def in_float(self, x: Tensor, weight: Tensor, extra: list[int]) -> Tensor:
        x, conv = self._operands(x, extra)
        return conv.convolve(x, conv.weight_of(weight), self.bias)


def _flat(sides: list[tuple[int, int]]) -> list[int]:
    """As F.pad takes them, the last dimension first."""
    return [side for pair in reversed(sides) for side in pair]


class IntegerEmbedding(IntegerLayer):
    """``nn.Embedding`` from codes: the rows that are asked for, ``code * step`` in the type the float weight had."""

    def forward(self, input: Tensor) -> Tensor:
        quantizer = self.weight_quantizer
        assert quantizer is not None
        assert quantizer.codes is not None
        indices, (count, size), step = input.reshape(-1), quantizer.codes.shape, quantizer.step
        found = quantizer.codes.index_select(0, indices).to(torch.float32)
        if step.numel() > 1:
            step = step.reshape(count, -1).index_select(0, indices).unsqueeze(-1)
            found = found.unflatten(-1, (step.shape[-2], -1))
        return (found * step).reshape(*input.shape, size).to(self.like.dtype)


class IntegerBatchNorm(nn.Module):
    """BatchNorm in eval mode, ``fl(fl(x * alpha) + beta)``.  alpha, beta: (C, 1, ...) float32, ``dims`` ones."""

    alpha: Tensor
    beta: Tensor
    _apply: Any = Quantizer._apply

    def __init__(self, alpha: Tensor, beta: Tensor, dims: int) -> None:
        super().__init__()
        self.register_buffer("alpha", alpha.detach().reshape(-1, *[1] * dims).clone())
        self.register_buffer("beta", beta.detach().reshape(-1, *[1] * dims).clone())

    def forward(self, x: Tensor) -> Tensor:
        alpha, beta = self.alpha, self.beta
        if not torch.compiler.is_exporting():  # exported as two operators that every runtime has
            return ops.scale_shift(x, alpha.flatten(), beta.flatten())
        if x.dim() == alpha.dim():  # BatchNorm1d of (batch, C)
            alpha, beta = alpha.squeeze(-1), beta.squeeze(-1)
        return (x * alpha + beta).to(x.dtype)
