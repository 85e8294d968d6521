"""Quantized linear and convolution: codes, exact integer sums, one scale; LSQ's gradients for input, weight and steps.

The backward pass keeps the float input and weight, as the float layer does, and recomputes codes from them.  Both ops
take the arguments of ``_INPUT`` and ``_WEIGHT``, a bias and a group size; ``conv`` below is empty for linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsquant import reference
from lsquant._util.errors import UsageError
from lsquant.kernels import engine
from lsquant.ops.registration import Op, laid_out_like, memory_format
from lsquant.ops.sums import arranged, convolution_of_codes, linear_of_codes


class Grid(NamedTuple):
    """One quantizer as the ops see it: guarded step (1-D float32), bounds, g, LSQ+'s offset, size of its groups."""

    step: Tensor
    q_min: int
    q_max: int
    gradient_scale: float
    offset: Tensor | None = None
    group_size: int | None = None


_INPUT = "Tensor x, Tensor x_step, Tensor? x_offset, int x_min, int x_max, float x_scale"
_WEIGHT = "Tensor weight, Tensor w_step, int w_min, int w_max, float w_scale"
_CONV = ", int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
_WANTED = ", bool need_x, bool has_bias, ScalarType? low"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # x, its step and offset; weight, its step; bias


def _centred(x: Tensor, step: Tensor, offset: Tensor | None, q_min: int, q_max: int) -> Tensor:
    """``q_x - z`` as float32 integers."""
    codes = reference.codes(x, step, q_min, q_max, offset=offset)
    return codes if offset is None else codes.sub_(reference.zero_point(step, offset, q_min, q_max).reshape(()))


def _axis(w_step: Tensor, group_size: int | None) -> int | None:
    return 0 if group_size is None and w_step.numel() > 1 else None


def _engine(x: Tensor, weight: Tensor) -> Any:
    return engine(x.device.type, torch.promote_types(x.dtype, weight.dtype))


def _forward(x_args: Sequence[Any], w_args: Sequence[Any], bias: Tensor | None, group_size: int | None,
             conv: Sequence[Any], out_dtype: torch.dtype | None) -> Tensor:  # fmt: skip
    x, x_step, x_offset, x_min, x_max, _ = x_args
    weight, w_step, w_min, w_max, _ = w_args
    y = None
    if group_size is None and (fused := getattr(_engine(x, weight), "convolution" if conv else "linear", None)):
        y = fused(*x_args[:5], weight, w_step, w_min, w_max, bias, *([conv] if conv else []))
    if y is not None:
        return y.to(out_dtype or x.dtype)
    qx = _centred(x, x_step, x_offset, x_min, x_max)
    qw = reference.codes(weight, w_step, w_min, w_max, axis=_axis(w_step, group_size), group_size=group_size)
    # the largest possible sum |q_x - z||q_w|: when z is learned, |q_x - z| is at most the whole range
    terms = group_size or weight[0].numel()
    top_x = x_max - x_min if x_offset is not None else max(abs(x_min), abs(x_max))
    bound = terms * top_x * max(abs(w_min), abs(w_max))
    if conv:
        y = convolution_of_codes(qx, qw, x_step * w_step, bias, bound, *conv, group_size=group_size)
        return y.to(out_dtype or x.dtype).contiguous(memory_format=memory_format(x))
    scale = x_step * w_step if group_size is None else (x_step * w_step).reshape(weight.shape[0], -1)
    y = linear_of_codes(qx, qw, scale, bias, bound, group_size)
    return y.to(out_dtype or x.dtype).contiguous()


def _backward(
    grad: Tensor, x_args: Sequence[Any], w_args: Sequence[Any], group_size: int | None, conv: Sequence[Any],
    need_x: bool, has_bias: bool, low: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """low: autocast's dtype, in which the two products are computed then; steps, codes and their sums are not."""
    x, x_step, x_offset, x_min, x_max, x_scale = x_args
    weight, w_step, w_min, w_max, _ = w_args
    w_layout = (_axis(w_step, group_size), group_size, None, None)
    dtype = low or torch.float32
    empty, up = x_step.new_empty(0), grad.to(dtype)
    kernels = _engine(x, weight)
    grad_x: Tensor | None = None
    grad_w: Tensor | None = None
    if conv and group_size is None and low is None and (fused := getattr(kernels, "weight_gradient", None)):
        grad_w = fused(up, *x_args[:5], weight, conv)
    x_layout = (None, None, None, x_offset)
    if grad_w is None:
        x_hat = kernels.quantize(x.float(), x_step, x_min, x_max, *x_layout).to(dtype)
    else:  # only its shape is looked at
        x_hat = x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32)

    def quantized_weight() -> Tensor:
        return kernels.quantize(weight.float(), w_step, w_min, w_max, *w_layout).to(dtype)

    if conv:
        w_hat = quantized_weight()
        if need_x and grad_w is not None and (fused := getattr(kernels, "input_gradient", None)):
            grad_x = fused(up, x, w_hat, conv)
        mask = [need_x and grad_x is None, grad_w is None, False]
        if any(mask):
            grads = torch.ops.aten.convolution_backward(up, x_hat, arranged(w_hat, conv), None, *conv, mask)
            grad_x = grads[0] if mask[0] else grad_x
            grad_w = arranged(grads[1], conv) if mask[1] else grad_w
        del x_hat, w_hat
        grad_bias = up.sum([0, *range(2, up.dim())], dtype=torch.float32) if has_bias else empty.clone()
    else:
        rows = up.reshape(-1, weight.shape[0])
        grad_w = rows.t() @ x_hat.reshape(-1, weight.shape[1])
        del x_hat  # as large as grad_x: they never exist together, and the float layer's peak is this one's
        grad_bias = rows.sum(0, dtype=torch.float32) if has_bias else empty.clone()
    assert grad_w is not None
    of_w, grad_ws, _ = kernels.quantize_backward(grad_w.to(torch.float32), *w_args, *w_layout, reuse=True)
    by_x = x.new_empty(0), empty, empty.clone()
    if need_x:
        if grad_x is None:
            grad_x = (up.reshape(-1, weight.shape[0]) @ quantized_weight()).reshape(x.shape)
        grids = (x, x_step, x_min, x_max, x_scale, *x_layout)
        grad_x = grad_x if grad_x.dtype == x.dtype else grad_x.to(torch.float32)
        of_x, grad_step, grad_b = kernels.quantize_backward(grad_x, *grids, reuse=True)
        by_x = laid_out_like(of_x, x), grad_step, empty if grad_b is None else grad_b
    return *by_x, laid_out_like(of_w, weight), grad_ws, grad_bias


def _fake_backward(grad: Tensor, x_args: Sequence[Any], w_args: Sequence[Any], need_x: bool,
                   has_bias: bool) -> tuple[Tensor, ...]:  # fmt: skip
    (x, x_step, offset, *_), (weight, w_step, *_) = x_args, w_args
    none = x_step.new_empty(0)
    by_x = (torch.empty_like(x), torch.empty_like(x_step)) if need_x else (x.new_empty(0), none)
    grad_b = torch.empty_like(x_step) if need_x and offset is not None else none.clone()
    by_bias = w_step.new_empty(weight.shape[0] if has_bias else 0)
    return *by_x, grad_b, torch.empty_like(weight), torch.empty_like(w_step), by_bias


def _fake_linear(*a: Any) -> Tensor:
    return a[0].new_empty((*a[0].shape[:-1], a[6].shape[0]), dtype=a[13] or a[0].dtype)


def _fake_convolution(*a: Any) -> Tensor:
    x, weight = (t.to("meta", torch.float32) for t in (a[0], a[6]))
    shape = torch.convolution(x, arranged(weight, a[13:19]), None, *a[13:19]).shape
    return torch.empty(shape, dtype=a[19] or a[0].dtype, device=a[0].device, memory_format=memory_format(a[0]))


_linear = Op(
    "linear",
    f"({_INPUT}, {_WEIGHT}, Tensor? bias, int? group_size, ScalarType? out_dtype) -> Tensor",
    lambda *a: _forward(a[:6], a[6:11], a[11], a[12], (), a[13]),
    _fake_linear,
)
_linear_backward = Op(
    "linear_backward",
    f"(Tensor grad, {_INPUT}, {_WEIGHT}, int? group_size{_WANTED}) -> {_GRADIENTS}",
    lambda grad, *a: _backward(grad, a[:6], a[6:11], a[11], (), *a[12:]),
    lambda grad, *a: _fake_backward(grad, a[:6], a[6:11], *a[12:14]),
)
_convolution = Op(
    "convolution",
    f"({_INPUT}, {_WEIGHT}, Tensor? bias, int? group_size{_CONV}, ScalarType? out_dtype) -> Tensor",
    lambda *a: _forward(a[:6], a[6:11], a[11], a[12], a[13:19], a[19]),
    _fake_convolution,
)
_convolution_backward = Op(
    "convolution_backward",
    f"(Tensor grad, {_INPUT}, {_WEIGHT}, int? group_size{_CONV}{_WANTED}) -> {_GRADIENTS}",
    lambda grad, *a: _backward(grad, a[:6], a[6:11], a[11], a[12:18], *a[18:]),
    lambda grad, *a: _fake_backward(grad, a[:6], a[6:11], *a[18:20]),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, x_step, x_offset, *ctx.x_numbers = inputs[:6]
    weight, w_step, *ctx.w_numbers = inputs[6:11]
    ctx.save_for_backward(x, x_step, weight, w_step, *([] if x_offset is None else [x_offset]))
    ctx.bias_dtype, ctx.rest, ctx.low = None if inputs[11] is None else inputs[11].dtype, inputs[12:-1], inputs[-1]


def _differentiate(ctx: Any, grad: Tensor, backward: Any) -> Any:
    x, x_step, weight, w_step, *offset = ctx.saved_tensors
    need_x, has_bias = any(ctx.needs_input_grad[:3]), ctx.bias_dtype is not None
    x_args = (x, x_step, offset[0] if offset else None, *ctx.x_numbers)
    gx, gs, gb, gw, gws, g_bias = backward(
        grad, *x_args, weight, w_step, *ctx.w_numbers, *ctx.rest, need_x, has_bias, ctx.low
    )
    by_x = (gx, gs, gb if offset else None) if need_x else (None, None, None)
    by_bias = None if ctx.bias_dtype is None else g_bias.to(ctx.bias_dtype)
    return *by_x, None, None, None, gw, gws, None, None, None, by_bias, *([None] * (len(ctx.rest) + 1))


for _op, _back in ((_linear, _linear_backward), (_convolution, _convolution_backward)):
    _op.differentiate(partial(_differentiate, backward=_back), _setup)
    _op.under_autocast(lambda args, dtype: (*args[:-1], dtype))
    _back.refuse_derivative()


def _flat(x_grid: Grid, x: Tensor, w_grid: Grid, weight: Tensor) -> tuple[Any, ...]:
    (xs, x_min, x_max, xg, xb, _), (ws, w_min, w_max, wg, *_) = x_grid, w_grid
    return x, xs, xb, x_min, x_max, xg, weight, ws, w_min, w_max, wg


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, x_grid: Grid, w_grid: Grid) -> Tensor:
    """A quantized linear layer: ``y = fl(fl(acc * fl(s_x s_w)) + b)``, ``acc`` the exact sum of ``(q_x - z) q_w``.

    x: (..., in); weight: (out, in); bias: (out,) or None; float32, bfloat16 or float16.  w_grid.step: (1,), (out,) or,
    with groups, (out * in / group_size,).  Returns (..., out) in x's dtype (autocast's under autocast).
    """
    if x.shape[-1] != weight.shape[1]:
        raise UsageError(f"linear: the input's last dimension is {x.shape[-1]}, the weight {tuple(weight.shape)}")
    return _linear(*_flat(x_grid, x, w_grid, weight), bias, w_grid.group_size, None)


def convolution(
    x: Tensor, rows: Tensor, bias: Tensor | None, x_grid: Grid, w_grid: Grid, stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """A quantized N-d convolution: ``y = fl(fl(acc * fl(s_x s_w)) + b)`` with exact integer sums; padding is z.

    x: (batch, in, *spatial); rows: (out, in / groups, *kernel), also when transposed; bias: (out,) or None.
    w_grid.step: (1,), (out,) or, with groups, one per run of the flattened (in / groups * kernel) weights.
    Returns (batch, out, *spatial) in x's dtype (autocast's under autocast) and memory format.
    """
    conv = (list(stride), list(padding), list(dilation), transposed, list(output_padding), groups)
    return _convolution(*_flat(x_grid, x, w_grid, rows), bias, w_grid.group_size, *conv, None)
