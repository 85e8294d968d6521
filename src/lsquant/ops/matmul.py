"""Quantized linear and convolution: codes, exact integer sums, one scale; LSQ's gradients for input, weight and steps.

The backward pass keeps the float input and weight, as the float layer does, and recomputes codes from them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsquant import reference
from lsquant._util.errors import UsageError
from lsquant.kernels import engine
from lsquant.ops.registration import (
    custom_op,
    laid_out_like,
    memory_format,
    refuse_second_derivative,
    register_autocast,
)
from lsquant.ops.sums import convolution_of_codes, linear_of_codes


class Grid(NamedTuple):
    """One quantizer as the ops see it: guarded step (1-D float32), bounds, g, LSQ+'s offset."""

    step: Tensor
    q_min: int
    q_max: int
    gradient_scale: float
    offset: Tensor | None = None


_X = "Tensor x, Tensor x_step, Tensor? x_offset, int x_min, int x_max, float x_scale"
_W = "Tensor weight, Tensor w_step, int w_min, int w_max, float w_scale"
_CONV = "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
_DTYPE = "ScalarType? out_dtype"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # x, its step and offset; weight, its step; bias


def _centred(x: Tensor, step: Tensor, offset: Tensor | None, q_min: int, q_max: int) -> Tensor:
    """``q_x - z`` as float32 integers."""
    codes = reference.codes(x, step, q_min, q_max, offset=offset)
    return codes if offset is None else codes.sub_(reference.zero_point(step, offset, q_min, q_max).reshape(()))


def _bound(terms: int, x_min: int, x_max: int, offset: Tensor | None, w_min: int, w_max: int) -> int:
    """The largest possible ``sum |q_x - z||q_w|``; |q_x - z| is at most the whole range when z is learned."""
    top_x = x_max - x_min if offset is not None else max(abs(x_min), abs(x_max))
    return terms * top_x * max(abs(w_min), abs(w_max))


# ---- linear ----


@custom_op(
    "lsquant::linear", mutates_args=(), schema=f"({_X}, {_W}, Tensor? bias, int? group_size, {_DTYPE}) -> Tensor"
)
def _linear(
    x: Tensor,
    x_step: Tensor,
    x_offset: Tensor | None,
    x_min: int,
    x_max: int,
    x_scale: float,
    weight: Tensor,
    w_step: Tensor,
    w_min: int,
    w_max: int,
    w_scale: float,
    bias: Tensor | None,
    group_size: int | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    qx = _centred(x, x_step, x_offset, x_min, x_max)
    qw = reference.codes(weight, w_step, w_min, w_max, axis=_axis(w_step, group_size), group_size=group_size)
    scale = x_step * w_step
    if group_size is not None:
        scale = scale.reshape(weight.shape[0], -1)
    bound = _bound(group_size or weight.shape[1], x_min, x_max, x_offset, w_min, w_max)
    y = linear_of_codes(qx, qw, scale, bias, bound, group_size)
    return y.to(out_dtype or x.dtype).contiguous()


def _axis(w_step: Tensor, group_size: int | None) -> int | None:
    return 0 if group_size is None and w_step.numel() > 1 else None


@_linear.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], rest[5].shape[0]), dtype=rest[-1] or x.dtype)


@custom_op(
    "lsquant::linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_X}, {_W}, int? group_size, bool need_x) -> {_GRADIENTS}",
)
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    x_step: Tensor,
    x_offset: Tensor | None,
    x_min: int,
    x_max: int,
    x_scale: float,
    weight: Tensor,
    w_step: Tensor,
    w_min: int,
    w_max: int,
    w_scale: float,
    group_size: int | None,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    axis = _axis(w_step, group_size)
    up = grad.to(torch.float32).reshape(-1, weight.shape[0])
    rows = _centred(x, x_step, x_offset, x_min, x_max).mul_(x_step).reshape(-1, weight.shape[1])
    grad_w = up.t() @ rows
    del rows
    grad_x = x.new_empty(0, dtype=torch.float32)
    if need_x:
        w_hat = engine().quantize(weight.float(), w_step, w_min, w_max, axis, group_size, None, None)
        grad_x = (up @ w_hat).reshape(x.shape)
    wq = (weight, w_step, w_min, w_max, w_scale, axis, group_size)
    return *_through(grad_x, x, x_step, x_offset, x_min, x_max, x_scale, need_x), *_weight(grad_w, wq), up.sum(0)


def _through(
    grad: Tensor, x: Tensor, step: Tensor, offset: Tensor | None, q_min: int, q_max: int, scale: float, need_x: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the input's quantizer: gradients of x, step and offset; empty where there is none."""
    empty = step.new_empty(0)
    if not need_x:
        return x.new_empty(0), empty, empty.clone()
    grad_x, grad_step, grad_b = engine().quantize_backward(grad, x, step, q_min, q_max, scale, None, None, None, offset)
    return laid_out_like(grad_x, x), grad_step, empty if grad_b is None else grad_b


def _weight(grad: Tensor, quantizer: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    grad_w, grad_step, _ = engine().quantize_backward(grad, *quantizer, None, None)
    return laid_out_like(grad_w, quantizer[0]), grad_step


def _fake_gradients(x: Tensor, weight: Tensor, offset: Tensor | None, need_x: bool, *steps: Tensor) -> list[Tensor]:
    x_step, w_step = steps
    none = x_step.new_empty(0)
    by_x = [torch.empty_like(x), torch.empty_like(x_step)] if need_x else [x.new_empty(0), none]
    by_x.append(torch.empty_like(x_step) if need_x and offset is not None else x_step.new_empty(0))
    return [*by_x, torch.empty_like(weight), torch.empty_like(w_step)]


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, x_step: Tensor, *rest: Any) -> Any:
    weight, w_step = rest[4], rest[5]
    return *_fake_gradients(x, weight, rest[0], rest[-1], x_step, w_step), w_step.new_empty(weight.shape[0])


refuse_second_derivative(_linear_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Both forward ops begin with the input's six and the weight's five arguments and the bias."""
    x, x_step, x_offset, *x_numbers, weight, w_step, w_min, w_max, w_scale, bias = inputs[:12]
    ctx.save_for_backward(x, x_step, weight, w_step, *([] if x_offset is None else [x_offset]))
    ctx.x_numbers, ctx.w_numbers, ctx.rest = x_numbers, (w_min, w_max, w_scale), inputs[12:-1]
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad: Tensor, backward: Any) -> Any:
    x, x_step, weight, w_step, *offset = ctx.saved_tensors
    x_offset = offset[0] if offset else None
    need_x = any(ctx.needs_input_grad[:3])
    gx, gs, gb, gw, gws, g_bias = backward(
        grad, x, x_step, x_offset, *ctx.x_numbers, weight, w_step, *ctx.w_numbers, *ctx.rest, need_x
    )
    by_x = (gx, gs, gb if offset else None) if need_x else (None, None, None)
    by_bias = None if ctx.bias_dtype is None else g_bias.to(ctx.bias_dtype)
    return *by_x, None, None, None, gw, gws, None, None, None, by_bias, *([None] * (len(ctx.rest) + 1))


_linear.register_autograd(lambda ctx, grad: _differentiate(ctx, grad, _linear_backward), setup_context=_setup)
register_autocast("linear", lambda dtype: lambda *args: _linear(*args[:-1], dtype))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_grid: Grid, w_grid: Grid, group_size: int | None = None
) -> Tensor:
    """A quantized linear layer: ``y = fl(fl(acc * fl(s_x s_w)) + b)``, ``acc`` the exact sum of ``(q_x - z) q_w``.

    x: (..., in); weight: (out, in); bias: (out,) or None; float32, bfloat16 or float16.  w_grid.step: (1,), (out,) or,
    with group_size, (out * in / group_size,).  Returns (..., out) in x's dtype (autocast's under autocast).
    """
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"linear: the input's last dimension is {x.shape[-1]}, the weight {tuple(weight.shape)}")
    (xs, x_min, x_max, xg, xb), (ws, w_min, w_max, wg, _) = x_grid, w_grid
    return _linear(x, xs, xb, x_min, x_max, xg, weight, ws, w_min, w_max, wg, bias, group_size, None)


# ---- convolution ----


@custom_op(
    "lsquant::convolution",
    mutates_args=(),
    schema=f"({_X}, {_W}, Tensor? bias, int? group_size, {_CONV}, {_DTYPE}) -> Tensor",
)
def _convolution(
    x: Tensor,
    x_step: Tensor,
    x_offset: Tensor | None,
    x_min: int,
    x_max: int,
    x_scale: float,
    weight: Tensor,
    w_step: Tensor,
    w_min: int,
    w_max: int,
    w_scale: float,
    bias: Tensor | None,
    group_size: int | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    out_dtype: torch.dtype | None,
) -> Tensor:
    qx = _centred(x, x_step, x_offset, x_min, x_max)
    qw = reference.codes(weight, w_step, w_min, w_max, axis=_axis(w_step, group_size), group_size=group_size)
    bound = _bound(group_size or _terms(weight, transposed, groups), x_min, x_max, x_offset, w_min, w_max)
    conv = (stride, padding, dilation, transposed, output_padding, groups)
    y = convolution_of_codes(qx, qw, x_step * w_step, bias, bound, *conv, group_size=group_size)
    return y.to(out_dtype or x.dtype).contiguous(memory_format=memory_format(x))


def _terms(weight: Tensor, transposed: bool, groups: int) -> int:
    """Products in one sum: input channels of a group times the kernel's size."""
    fan_in = weight.shape[0] // groups if transposed else weight.shape[1]
    return fan_in * weight[0, 0].numel()


@_convolution.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    weight, conv, out_dtype = rest[5], rest[12:18], rest[18]
    meta = torch.convolution(x.to("meta", torch.float32), weight.to("meta", torch.float32), None, *conv)
    return torch.empty(meta.shape, dtype=out_dtype or x.dtype, device=x.device, memory_format=memory_format(x))


@custom_op(
    "lsquant::convolution_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_X}, {_W}, int? group_size, {_CONV}, bool need_x) -> {_GRADIENTS}",
)
def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    x_step: Tensor,
    x_offset: Tensor | None,
    x_min: int,
    x_max: int,
    x_scale: float,
    weight: Tensor,
    w_step: Tensor,
    w_min: int,
    w_max: int,
    w_scale: float,
    group_size: int | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    axis = _axis(w_step, group_size)
    up = grad.to(torch.float32)
    x_hat = _centred(x, x_step, x_offset, x_min, x_max).mul_(x_step)
    w_hat = engine().quantize(weight.float(), w_step, w_min, w_max, axis, group_size, None, None)
    conv = (stride, padding, dilation, transposed, output_padding, groups)
    grad_x, grad_w, _ = torch.ops.aten.convolution_backward(up, x_hat, w_hat, None, *conv, [need_x, True, False])
    del x_hat, w_hat
    g_bias = up.sum([0, *range(2, up.dim())])
    wq = (weight, w_step, w_min, w_max, w_scale, axis, group_size)
    return *_through(grad_x, x, x_step, x_offset, x_min, x_max, x_scale, need_x), *_weight(grad_w, wq), g_bias


@_convolution_backward.register_fake
def _(grad: Tensor, x: Tensor, x_step: Tensor, *rest: Any) -> Any:
    weight, w_step = rest[4], rest[5]
    return *_fake_gradients(x, weight, rest[0], rest[-1], x_step, w_step), w_step.new_empty(grad.shape[1])


refuse_second_derivative(_convolution_backward)
_convolution.register_autograd(lambda ctx, grad: _differentiate(ctx, grad, _convolution_backward), setup_context=_setup)
register_autocast("convolution", lambda dtype: lambda *args: _convolution(*args[:-1], dtype))


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_grid: Grid,
    w_grid: Grid,
    *,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    group_size: int | None = None,
) -> Tensor:
    """A quantized N-d convolution: ``y = fl(fl(acc * fl(s_x s_w)) + b)`` with exact integer sums; padding is z.

    x: (batch, in, *spatial); weight: (out, in / groups, *kernel); bias: (out,) or None.  w_grid.step: (1,), (out,)
    or, with group_size, one per run of the flattened (in / groups * kernel) weights.
    Returns (batch, out, *spatial) in x's dtype (autocast's under autocast) and memory format.
    """
    (xs, x_min, x_max, xg, xb), (ws, w_min, w_max, wg, _) = x_grid, w_grid
    conv = (stride, padding, dilation, False, [0] * len(stride), groups)
    return _convolution(x, xs, xb, x_min, x_max, xg, weight, ws, w_min, w_max, wg, bias, group_size, *conv, None)
