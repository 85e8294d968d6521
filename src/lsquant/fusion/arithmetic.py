"""(M13) to (M18) on tensors that carry gradients: codes are whole float32 numbers, sums are exact.

A stored tensor is its codes less their zero point, ``q - z``; the gradient that it carries is that of its value
``v_hat = (q - z) s`` times s, so that every step can be differentiated as a function of codes.  The forward values are
those of ``lsquant.reference_integer``, bit for bit; the gradients are those of docs/mathematics.md, section
"Integer-only arithmetic".
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant import ops
from lsquant import reference as plain
from lsquant import reference_integer as reference
from lsquant._util.errors import UsageError
from lsquant.kernels import Grid
from lsquant.nn import ExactBatchNorm
from lsquant.quantizer import Quantizer

EXACT_IN_FLOAT32 = 2**24
"""Sums of whole numbers below it are exact in float32, in any order."""
BIAS_IN_FLOAT32 = 2**22
"""Below it ``rint(fl(fl(b s) / s))`` is b."""
LARGEST_INT8 = 127


class Codes(NamedTuple):
    """What the codes of a stored tensor may be, less its zero point, and its step.

    step: () float32, with gradient.
    low, high: bounds of ``q - z``.
    gradient_scale: of step and offset.
    zero: z, the zero point.
    offset: () float32, with gradient, LSQ+'s b; None for z = 0.
    own: whether low and high are bounds of the quantizer, which move with b, or those of a limit.
    """

    step: Tensor
    low: int
    high: int
    gradient_scale: float
    zero: int = 0
    offset: Tensor | None = None
    own: tuple[bool, bool] = (True, True)

    def within(self, low: float | None, high: float | None) -> Codes:
        """Return the same with the bounds of a limit, given as real numbers: ReLU has low=0."""
        step = self.step.detach()
        bounds = [self.low, self.high]
        for place, value in enumerate((low, high)):
            if value is not None:
                code = float(torch.round(torch.tensor(value, dtype=torch.float32) / step))
                bounds[place] = int(max(self.low, min(self.high, code)))
        bottom, top = max(bounds[0], self.low), min(bounds[1], self.high)
        own = (self.own[0] and bottom == self.low, self.own[1] and top == self.high)
        return self._replace(low=bottom, high=top, own=own)

    def quantize(self, u: Tensor) -> Tensor:
        """Return ``clip(rint(u), low, high)``."""
        return ops.quantized(u, self._unit_grid(u))

    def gradients(self, grad: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(M14) Return the gradients of u, step and offset, from that of ``clip(rint(u), low, high)``.

        With an offset (M10) holds beyond the quantizer's own bounds: ``q_min`` and ``q_max`` for the step, 1 for b.
        """
        of_u, of_unit, _ = ops.quantized_gradients(grad, u, self._unit_grid(u))
        of_unit, step = of_unit.reshape(()), self.step.detach()
        if self.offset is None:
            return of_u, of_unit / step, None
        beyond = ((u <= self.low) & self.own[0]) | ((u >= self.high) & self.own[1])
        outer = plain.sum_per_step(torch.where(beyond, grad.to(torch.float32), 0.0), None, None).reshape(())
        of_offset = (outer * self.gradient_scale).to(torch.float32)
        return of_u, (of_unit + self.zero * of_offset) / step, of_offset / step

    def _unit_grid(self, u: Tensor) -> Grid:
        """Return the quantizer of quotients: that of LSQ with a step of 1."""
        return Grid(torch.ones(1, device=u.device), self.low, self.high, self.gradient_scale)


class _Requantize(torch.autograd.Function):
    """Codes of quotients u, differentiable in step, offset and an x with ``u = x ratio``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, u: Tensor, ratio: Tensor, codes: Codes
    ) -> Tensor:
        ctx.save_for_backward(u, ratio)
        ctx.codes = codes
        return codes.quantize(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        u, ratio = ctx.saved_tensors
        of_u, of_step, of_offset = ctx.codes.gradients(grads[0], u)
        return of_u * ratio, of_step, of_offset, None, None, None


def requantized(x: Tensor, ratio: Tensor, u: Tensor, codes: Codes) -> Tensor:
    """(M14) Return codes of the quotients u, less z, as the network computes them.

    x: what they are differentiated by; as real numbers ``u = x ratio``.
    ratio: () float32.
    """
    q: Any = _Requantize.apply(x, codes.step, codes.offset, u, ratio, codes)
    return q


def codes_of(v: Tensor, step: Tensor) -> Tensor:
    """Return the codes less z of values ``v_hat``, whole float32 numbers: ``v / s`` is one up to its rounding."""
    return torch.round(v.detach() / step.detach()) + 0.0  # no -0.0


class _Valued(torch.autograd.Function):
    """Given values, with the gradient of another tensor."""

    @staticmethod
    def forward(ctx: Any, differentiable: Tensor, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def with_values(differentiable: Tensor, values: Tensor) -> Tensor:
    """Return a tensor of given values whose gradient goes to another one."""
    if not (torch.is_grad_enabled() and differentiable.requires_grad):
        return values
    v: Any = _Valued.apply(differentiable, values)
    return v


@torch.no_grad()
def zero_of(quantizer: Quantizer) -> int | None:
    """(M9) Return z, by the guarded step of the quantizer itself, raised or not; None where it has none.

    That is where step or offset are not finite: an infinite one is no bound of the codes.
    """
    if quantizer.offset is None:
        return 0
    if not math.isfinite(float(quantizer.offset)):
        return None
    step, bounds = quantizer.effective_step(), (quantizer.q_min, quantizer.q_max)
    zero = float(plain.zero_point(step, quantizer.offset, *bounds))
    return int(zero) if math.isfinite(zero) else None


def bounds_of(quantizer: Quantizer) -> tuple[int, int]:
    """Return the lowest and the highest ``q - z`` of a stored tensor."""
    zero = zero_of(quantizer) or 0
    return quantizer.q_min - zero, quantizer.q_max - zero


def codes_grid(quantizer: Quantizer, step: Tensor | None = None) -> Codes:
    """Return the codes of a stored tensor.

    step: () float32, where it differs from the quantizer's own, as behind an addition.
    """
    grid, zero = quantizer.grid(), zero_of(quantizer)
    own = grid.step.reshape(())
    if zero is None:  # everything is NaN then, so that a loss scaler sees it
        own, zero = own * math.nan, 0
    offset = None if grid.offset is None else grid.offset.reshape(())
    held = own if step is None else with_values(own, step)
    return Codes(held, grid.q_min - zero, grid.q_max - zero, grid.gradient_scale, zero, offset)


# ---- one layer ----


class Folded(NamedTuple):
    """(M13) What a layer multiplies with and adds.

    codes: of the weight, rows, whole float32 numbers; those of a channel that BatchNorm multiplies by 0 are 0.
    step: (C,) float32, the folded step, negative where BatchNorm's factor is; positive for the container "symmetric".
    bias: (C,) float64 whole numbers.
    raised: channels whose step was raised until bias and sums fit.
    clipped: codes -128 that became 127, where a channel's codes were negated.
    """

    codes: Tensor
    step: Tensor
    bias: Tensor
    raised: int
    clipped: int = 0

    def positive(self) -> Folded:
        """Return the same with positive steps: codes and bias of a channel with a negative one are negated."""
        negative = self.step < 0
        codes = torch.where(negative.reshape([-1] + [1] * (self.codes.dim() - 1)), -self.codes, self.codes)
        held = codes.clamp(max=LARGEST_INT8)
        bias = torch.where(negative, -self.bias, self.bias)
        return Folded(held + 0.0, self.step.abs(), bias + 0.0, self.raised, int((held != codes).sum()))


@torch.no_grad()
def folded(
    rows: Tensor,
    weight_codes: Tensor,
    weight_step: Tensor,
    bounds: tuple[int, int],
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    input_step: Tensor,
    output_step: Tensor,
    largest_input: int,
    most_bias: float = math.inf,
) -> Folded:
    """(M13) Fold BatchNorm into the steps and the bias of a layer; raise steps until every sum fits into int32.

    rows: the float weight, output channels first.
    weight_codes: its codes, whole float32 numbers.
    weight_step: (1,) or (C,) float32.
    bounds: of the codes.
    alpha, beta: (C,) float32.
    bias: (C,) float32 or None, the layer's own.
    most_bias: below which ``|b_c|`` has to be.
    """

    def fitting() -> Tensor:
        return reference.fits_int32(codes, shift, largest_input) & (shift.abs() < most_bias)

    fold = reference.fold_batch_norm
    step, shift = fold(weight_step, alpha, beta, input_step, output_step, bias)
    dead = (weight_step * alpha).expand_as(step) == 0
    shape = [-1] + [1] * (rows.dim() - 1)
    codes = torch.where(dead.reshape(shape), torch.zeros_like(weight_codes), weight_codes)
    fits, raised = fitting(), 0
    own = weight_step.expand_as(step).clone()
    while not bool(fits.all()):
        raised = max(raised, int((~fits).sum()))
        own = torch.where(fits, own, own * 2)
        anew = torch.round(rows / own.reshape(shape)).clamp(*bounds)
        codes = torch.where((fits | dead).reshape(shape), codes, anew)
        step = torch.where(fits, step, step * 2)
        total = beta.double() if bias is None else beta.double() + alpha.double() * bias.double()
        shift = torch.round(total / (input_step * step).double()).clamp(-(2.0**62), 2.0**62).to(torch.int64)
        fits = fitting()
    return Folded(codes, step, shift.double(), raised)


def product(layer: Any, x: Tensor, rows: Tensor) -> Tensor:
    """Return the product of a layer's float type for an input and a weight given as rows, without bias; (N, C, ...)."""
    weight = layer.from_rows(rows)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if layer.transposed:
        conv = ops.Conv(layer.stride, layer.padding, layer.dilation, True, layer.output_padding, layer.groups)
        return conv.convolve(x, weight, None)
    padded, padding = layer.padded(x)
    return ops.Conv(layer.stride, padding, layer.dilation, False, (), layer.groups).convolve(padded, weight, None)


def _require_dimensions(layer: Any, norm: ExactBatchNorm | None, x: Tensor) -> None:
    """Raise UsageError for an input without a batch, or of which BatchNorm normalizes another dimension."""
    name, kind = layer.weight_quantizer.name.removesuffix(".weight_quantizer"), type(layer).__name__
    if isinstance(layer, nn.Linear):
        if x.dim() < 2:
            raise UsageError(f"{name}: {kind} is given {tuple(x.shape)}, without a batch; give (batch, ..., features)")
        if norm is not None and x.dim() != 2:
            raise UsageError(
                f"{name}: the BatchNorm behind this {kind} normalizes another dimension of {tuple(x.shape)} than the "
                "layer's features, so it is no factor of its steps; use a 1x1 convolution, or joins=None"
            )
    elif x.dim() != layer.weight.dim():
        raise UsageError(f"{name}: {kind} is given {tuple(x.shape)}, without a batch; give (batch, channels, ...)")


class Folding(NamedTuple):
    """What of a layer and its BatchNorm carries gradients.

    fake: the fake-quantized weight, rows.
    alpha, beta: (C,) float32, ``y = alpha x + beta``.
    """

    fake: Tensor
    alpha: Tensor
    beta: Tensor


def fold_layer(layer: Any, norm: ExactBatchNorm | None, read: Codes, out: Codes | None) -> tuple[Folding, Folded]:
    """(M13) Fold BatchNorm into a layer.

    read: the codes of its input.
    out: those of its output, None for a real one.
    """
    rows, quantizer = layer.rows(), layer.weight_quantizer
    shape = [-1] + [1] * (rows.dim() - 1)
    fake, s_w = quantizer(rows), quantizer.grid().step.detach()
    codes = torch.round(fake.detach() / s_w.reshape(shape if s_w.numel() > 1 else ()))
    if norm is None:
        alpha, beta = torch.ones(len(rows), device=rows.device), torch.zeros(len(rows), device=rows.device)
    else:
        alpha, beta = norm.affine_constants()
    s_x = read.step.detach()
    s_y = torch.ones_like(s_x) if out is None else out.step.detach()
    bounds, largest = (quantizer.q_min, quantizer.q_max), max(abs(read.low), abs(read.high))
    symmetric = layer.input_quantizer.spec.container == "symmetric"
    most_bias = BIAS_IN_FLOAT32 if symmetric else math.inf
    constants = folded(rows, codes, s_w, bounds, alpha, beta, layer.bias, s_x, s_y, largest, most_bias)
    return Folding(fake, alpha, beta), constants.positive() if symmetric else constants


class End(NamedTuple):
    """(M14) What is done to the sums of a layer's products of codes.

    bias: (C,) float64 whole numbers.
    factor: (C,) float32, M, or ``fl32(s_x s_w)`` of a last layer.
    scale: (C,) float32, the value of a sum of 1 before BatchNorm, ``s_x s_w``.
    axis: of the channels.
    codes: of the output; None for a real one.
    """

    bias: Tensor
    factor: Tensor
    scale: Tensor
    axis: int
    codes: Codes | None

    def quotients(self, sums: Tensor) -> Tensor:
        """Return ``u = fl32(fl32(acc + b) M)``."""
        view = [1] * sums.dim()
        view[self.axis] = -1
        # a float32 addition of two whole numbers that float32 holds rounds their sum once
        small = sums.dtype == torch.float32 and float(self.bias.abs().max()) < EXACT_IN_FLOAT32
        kind = torch.float32 if small else torch.float64
        return (sums.to(kind) + self.bias.to(kind).reshape(view)).float() * self.factor.reshape(view)


class _Ended(torch.autograd.Function):
    """Codes, or real values, of sums, with the gradients of ``y = alpha scale sums + shift``."""

    @staticmethod
    def forward(
        ctx: Any, sums: Tensor, alpha: Tensor, shift: Tensor, step: Tensor, offset: Tensor | None, end: End
    ) -> Tensor:
        u = end.quotients(sums)
        ctx.save_for_backward(sums, alpha, *(() if end.codes is None else (u,)))
        ctx.end = end
        return u if end.codes is None else end.codes.quantize(u)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        sums, alpha, *saved = ctx.saved_tensors
        end, (grad,), of_step, of_offset = ctx.end, grads, None, None
        scale = end.scale
        if end.codes is not None:
            grad, of_step, of_offset = end.codes.gradients(grad, saved[0])
            step = end.codes.step.detach()
            scale = scale / step
        channels = list(range(sums.dim()))
        del channels[end.axis]
        view = [1] * sums.dim()
        view[end.axis] = -1
        of_shift = grad.sum(channels)
        of_alpha = (grad * sums.float()).sum(channels) * scale if ctx.needs_input_grad[1] else None
        of_sums = (grad * (scale * alpha).reshape(view)).to(sums.dtype) if ctx.needs_input_grad[0] else None
        return of_sums, of_alpha, of_shift if end.codes is None else of_shift / step, of_step, of_offset, None


def layer_output(
    layer: Any, norm: ExactBatchNorm | None, x: Tensor, read: Codes, out: Codes | None
) -> tuple[Tensor, Folded]:
    """(M13, M14) Compute one layer, with BatchNorm: codes of the stored output, or a real one where out is None.

    x: codes of the input less z, as the layer reads them.
    read: what they may be.
    """
    _require_dimensions(layer, norm, x)
    (fake, alpha, beta), constants = fold_layer(layer, norm, read, out)
    shape = [-1] + [1] * (fake.dim() - 1)
    s_x = read.step.detach()
    largest = max(abs(read.low), abs(read.high))
    exact = float(constants.codes.abs().reshape(len(fake), -1).sum(1).max()) * largest < EXACT_IN_FLOAT32
    kind = torch.float32 if exact and x.is_cpu else torch.float64  # other devices may multiply otherwise
    scale = constants.step / torch.where(alpha == 0, torch.ones_like(alpha), alpha).detach()  # s_w, raised where it was
    w_codes = with_values(fake / scale.reshape(shape), constants.codes).to(kind)
    sums = product(layer, x.to(kind), w_codes)
    scales = s_x * constants.step
    factor = scales if out is None else scales / out.step.detach()
    end = End(constants.bias, factor, s_x * scale, sums.dim() - 1 if isinstance(layer, nn.Linear) else 1, out)
    shift = beta if layer.bias is None else beta + alpha * layer.bias
    step, offset = (s_x, None) if out is None else (out.step, out.offset)
    y: Any = _Ended.apply(sums, alpha, shift, step, offset, end)
    return y, constants
