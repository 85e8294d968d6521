"""Layers of the integer model: codes and steps as buffers, and no float weight beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import nn as lsq_nn
from lsquant import ops
from lsquant._util.leaf import leaf
from lsquant.quantizer import Quantizer
from lsquant.shipped.frozen import FrozenQuantizer, mark
from lsquant.shipped.record import ShippedLayer, own_layout


class IntegerLayer(nn.Module):
    """What the layers of the integer model share.  Weights, input or both are quantized.

    The plain attributes of the float layer are kept.

    weight: rows (out, ...) where the weights are not quantized; otherwise ``code * step`` in the shape and type of the
        float layer's weight, made at every access, for models that read its type or shape.
    bias: as in the float layer.
    like: (0,), has the type and device of the float layer's weight.
    """

    weight: Tensor
    like: Tensor
    bias: Tensor | None

    def __init__(
        self,
        shipped: ShippedLayer,
        weights: FrozenQuantizer | None,
        inputs: FrozenQuantizer | None,
        stored: FrozenQuantizer | None = None,
    ) -> None:
        super().__init__()
        source = shipped.source
        vars(self).update({k: v for k, v in vars(source).items() if k[0] != "_" and k not in vars(self)})
        self.weight_quantizer, self.input_quantizer, self.stored_quantizer = weights, inputs, stored
        self.exchanged = shipped.exchanged
        self.strides = _strides(shipped)
        if weights is None:
            self.register_buffer("weight", source.rows().detach().clone())
        self.register_buffer("like", source.weight.new_empty(0), persistent=False)
        self.register_buffer("bias", None if source.bias is None else source.bias.detach().clone())
        self.marker: str | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.weight_quantizer is not None:
            return self.own_layout(self.weight_quantizer.values()).to(self.like.dtype)
        return super().__getattr__(name)

    def own_layout(self, rows: Tensor) -> Tensor:
        """Return a weight as the float layer has it, from rows (out, ...)."""
        return own_layout(rows, self.exchanged)

    def as_trained(self, weight: Tensor) -> Tensor:
        """Return a weight, laid out as the float layer's, with that one's strides: PyTorch rounds by them."""
        if weight.stride() == self.strides:
            return weight
        return torch.empty_strided(weight.shape, self.strides, dtype=weight.dtype, device=weight.device).copy_(weight)

    @property
    def input(self) -> FrozenQuantizer | None:
        """The quantizer of the input."""
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
        """Return the weight or its codes, output channels first."""
        codes = self.codes
        return self.weight if codes is None else codes

    def before(self, x: Tensor) -> Tensor:
        """Return the input as it is quantized: padded where the padding mode is not zeros."""
        return x

    def output_shape(self, x: Tensor, *extra: Any) -> tuple[Any, ...]:
        """Return the shape of the output for an input that went through ``before``."""
        raise NotImplementedError

    def sums(self, x: Tensor, weight: Tensor, grids: tuple[ops.Grid, ops.Grid], *extra: Any) -> Tensor:
        """Return the output over codes, ``fl(fl(acc * fl(s_x s_w)) + b)``.

        weight: ``code * step``, from which the same codes are made again.
        grids: of the input and of the weight.
        """
        raise NotImplementedError

    def in_float(self, x: Tensor, weight: Tensor, *extra: Any) -> Tensor:
        """Return the output of the float layer, for layers with only one quantized side."""
        raise NotImplementedError

    def forward(self, input: Tensor, *extra: Any) -> Tensor:
        """Compute the output.  extra: what else ``sums`` and the others need in this kind of layer."""
        if not isinstance(input, Tensor):
            return leaf(self, input)
        read = input if self.stored_quantizer is None else self.stored_quantizer(input)
        x, weights, inputs = self.before(read), self.weight_quantizer, self.input_quantizer
        if self.marker is not None:
            return mark("Layer", x, self.marker, self.output_shape(x, *extra))
        if weights is not None and inputs is not None:  # fl(fl(q s) / s) rounds to q
            return self.sums(x, weights.values(), (inputs.grid(), weights.grid()), *extra)
        weight = self.rows() if weights is None else weights.values().to(x.dtype)
        return self.in_float(x if inputs is None else inputs(x), weight, *extra)


@torch.no_grad()
def _strides(shipped: ShippedLayer) -> tuple[int, ...]:
    """Return the strides of the weight that the trained layer computes with in floating point."""
    source, weights = shipped.source, shipped.weight
    if weights is None or shipped.input is not None:
        return source.weight.stride()
    return source.from_rows(weights.source.forward(source.rows())).stride()


class IntegerLinear(IntegerLayer):
    """``nn.Linear`` over codes.  With groups, their sums are added in float32 in the order of the groups."""

    def output_shape(self, x: Tensor, *extra: Any) -> tuple[Any, ...]:
        return (*x.shape[:-1], self.rows().shape[0])

    def sums(self, x: Tensor, weight: Tensor, grids: tuple[ops.Grid, ops.Grid], *extra: Any) -> Tensor:
        inputs, weights = grids
        return ops.linear(x, weight, self.bias, inputs, weights)

    def in_float(self, x: Tensor, weight: Tensor, *extra: Any) -> Tensor:
        weight = self.own_layout(self.as_trained(self.own_layout(weight)))
        return F.linear(x, weight, self.bias)


class IntegerConv(IntegerLayer):
    """A convolution of one to three dimensions over codes, transposed or not.

    codes, weight: rows (out, in / groups, *kernel), also when transposed.
    padding: (before, after) of each dimension, in elements, filled with the code z.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    output_padding: tuple[int, ...]
    transposed: bool
    groups: int
    padding_mode: str

    def __init__(self, shipped: ShippedLayer, *quantizers: FrozenQuantizer | None) -> None:
        super().__init__(shipped, *quantizers)
        source = shipped.source
        if source.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            self.padding = [(t // 2, t - t // 2) for t in total]
        else:
            pads = [0] * len(self.kernel_size) if source.padding == "valid" else source.padding
            self.padding = [(int(p), int(p)) for p in pads]

    @property
    def node_padding(self) -> list[tuple[int, int]]:
        """The zero padding that is left to the convolution itself."""
        return self.padding if self.padding_mode == "zeros" else [(0, 0)] * len(self.padding)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input, output_size) if self.transposed else leaf(self, input)
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
        """Return the input, padded where sides differ, and the geometry that is left."""
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
        return conv.convolve(x, self.as_trained(self.own_layout(weight)), self.bias)


def _flat(sides: list[tuple[int, int]]) -> list[int]:
    """Return the sides as F.pad takes them, the last dimension first."""
    return [side for pair in reversed(sides) for side in pair]


class IntegerEmbedding(IntegerLayer):
    """``nn.Embedding`` from codes: the requested rows, ``code * step`` in the type of the float weight."""

    def output_shape(self, x: Tensor, *extra: Any) -> tuple[Any, ...]:
        return (*x.shape, self.rows().shape[1])

    def forward(self, input: Tensor) -> Tensor:
        if not isinstance(input, Tensor):
            return leaf(self, input)
        quantizer = self.weight_quantizer
        assert quantizer is not None
        assert quantizer.codes is not None
        if self.marker is not None:
            return mark("Layer", input, self.marker, self.output_shape(input))
        indices, (count, size), step = input.reshape(-1), quantizer.codes.shape, quantizer.step
        found = quantizer.codes.index_select(0, indices).to(torch.float32)
        if step.numel() > 1:
            step = step.reshape(count, -1).index_select(0, indices).unsqueeze(-1)
            found = found.unflatten(-1, (step.shape[-2], -1))
        return (found * step).reshape(*input.shape, size).to(self.like.dtype)


class IntegerBatchNorm(nn.Module):
    """BatchNorm in eval mode, ``fl(fl(x * alpha) + beta)``.

    alpha, beta: (C, 1, ...) float32, with ``dims`` ones.
    """

    alpha: Tensor
    beta: Tensor
    _apply: Any = Quantizer._apply

    def __init__(self, alpha: Tensor, beta: Tensor, dims: int) -> None:
        super().__init__()
        self.register_buffer("alpha", alpha.detach().reshape(-1, *[1] * dims).clone())
        self.register_buffer("beta", beta.detach().reshape(-1, *[1] * dims).clone())

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            return leaf(self, x)
        alpha, beta = self.alpha, self.beta
        if not torch.compiler.is_exporting():  # exported as two operators that every runtime has
            return ops.scale_shift(x, alpha.flatten(), beta.flatten())
        if x.dim() == alpha.dim():  # BatchNorm1d of (batch, C)
            alpha, beta = alpha.squeeze(-1), beta.squeeze(-1)
        return (x * alpha + beta).to(x.dtype)
