"""Quantized linear and convolution: codes, exact integer sums, one scale; LSQ's gradients for input, weight and steps.

The backward pass keeps the float input and weight, as the float layer does, and recomputes codes from them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lsquant import reference
from lsquant._util.errors import UsageError
from lsquant.kernels import Conv, Engine, Grid, engine_for
from lsquant.ops.checks import require_gradient, require_product
from lsquant.ops.registration import Op, keep, kept, laid_out_like, memory_format
from lsquant.ops.sums import convolution_of_codes, linear_of_codes


class Product(NamedTuple):
    """What a quantized layer multiplies.

    x: (..., in), or (batch, in, *spatial) with a geometry; float.
    x_grid: of the input, one step.
    weight: (out, in), or rows (out, in / groups, *kernel); float.
    w_grid: of the weight, with one step, one per output channel or one per group.
    conv: a convolution's geometry, None for a linear layer.
    """

    x: Tensor
    x_grid: Grid
    weight: Tensor
    w_grid: Grid
    conv: Conv | None

    @property
    def engine(self) -> Engine:
        return engine_for(self.x.device.type, torch.promote_types(self.x.dtype, self.weight.dtype))


class Gradients(NamedTuple):
    """Of a product; empty tensors where there is none to give."""

    x: Tensor
    x_step: Tensor
    x_offset: Tensor
    weight: Tensor
    w_step: Tensor
    bias: Tensor


# ---- forward ----


def _forward(p: Product, bias: Tensor | None, autocast_dtype: torch.dtype | None) -> Tensor:
    """Compute the output; autocast_dtype: its type instead of x's."""
    dtype = autocast_dtype or p.x.dtype
    if p.conv is None:
        fused = p.engine.linear(p.x, p.x_grid, p.weight, p.w_grid, bias)
    else:
        fused = p.engine.convolution(p.x, p.x_grid, p.weight, p.w_grid, bias, p.conv)
    return _over_codes(p, bias, dtype) if fused is None else fused.to(dtype)


def _over_codes(p: Product, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the output by floating point over codes."""
    codes_x, codes_w = _centred_codes(p.x, p.x_grid), _centred_codes(p.weight, p.w_grid)
    group_size = p.w_grid.group_size
    terms = group_size or p.weight.shape[1:].numel()
    bound = terms * p.x_grid.largest_code * p.w_grid.largest_code
    scale = p.x_grid.step * p.w_grid.step
    if p.conv is not None:
        y = convolution_of_codes(codes_x, codes_w, scale, bias, bound, p.conv, group_size)
        return y.to(dtype).contiguous(memory_format=memory_format(p.x))
    if group_size is not None:
        scale = scale.reshape(p.weight.shape[0], -1)
    return linear_of_codes(codes_x, codes_w, scale, bias, bound, group_size).to(dtype).contiguous()


def _centred_codes(v: Tensor, grid: Grid) -> Tensor:
    """Compute ``q - z`` as float32 integers."""
    step, offset = grid.step, grid.offset
    codes = reference.codes(v, step, grid.q_min, grid.q_max, axis=grid.axis, group_size=grid.group_size, offset=offset)
    if offset is None:
        return codes
    return codes.sub_(reference.zero_point(step, offset, grid.q_min, grid.q_max).reshape(()))


# ---- backward ----


def _backward(grad: Tensor, p: Product, need_x: bool, has_bias: bool, autocast_dtype: torch.dtype | None) -> Gradients:
    """Compute the gradients.

    autocast_dtype: of the two products instead of float32; steps, codes and sums over codes stay float32.
    """
    up = grad.to(autocast_dtype or torch.float32)
    of_x: Tensor | None = None
    if p.conv is None:
        of_w = _linear_weight_gradient(up, p)
    else:
        of_x, of_w = _convolution_gradients(up, p, p.conv, need_x)
    none = p.x_grid.step.new_empty(0)
    bias = _bias_gradient(up, p) if has_bias else none.clone()
    weight, w_step, _ = p.engine.quantize_backward(of_w.to(torch.float32), p.weight, p.w_grid, reuse=True)
    weight = laid_out_like(weight, p.weight)
    if not need_x:
        return Gradients(p.x.new_empty(0), none, none.clone(), weight, w_step, bias)
    if of_x is None:
        of_x = _linear_input_gradient(up, p)
    of_x = of_x if of_x.dtype == p.x.dtype else of_x.to(torch.float32)
    x, x_step, x_offset = p.engine.quantize_backward(of_x, p.x, p.x_grid, reuse=True)
    return Gradients(laid_out_like(x, p.x), x_step, none if x_offset is None else x_offset, weight, w_step, bias)


def _rows(t: Tensor) -> Tensor:
    """Return (rows, n) from (..., n), also where n is 0."""
    return t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def _bias_gradient(up: Tensor, p: Product) -> Tensor:
    if p.conv is None:
        return _rows(up).sum(0, dtype=torch.float32)
    return up.sum([0, *range(2, up.dim())], dtype=torch.float32)


def _linear_weight_gradient(up: Tensor, p: Product) -> Tensor:
    """Compute the gradient of the dequantized weight.

    The dequantized input ends here.  It and the input's gradient are equally large and never exist together, so the
    peak of memory is the float layer's.
    """
    x_hat = p.engine.quantize(p.x.float(), p.x_grid).to(up.dtype)
    return _rows(up).t() @ _rows(x_hat)


def _linear_input_gradient(up: Tensor, p: Product) -> Tensor:
    """Compute the gradient of the dequantized input."""
    w_hat = p.engine.quantize(p.weight.float(), p.w_grid).to(up.dtype)
    return (_rows(up) @ w_hat).reshape(p.x.shape)


def _convolution_gradients(up: Tensor, p: Product, conv: Conv, need_x: bool) -> tuple[Tensor | None, Tensor]:
    """Compute the gradients of the dequantized input (None where it is not needed) and weight.

    By the engine's own products where it has them and autocast does not ask for another type.
    """
    of_x: Tensor | None = None
    of_w: Tensor | None = None
    if p.w_grid.group_size is None and up.dtype == torch.float32:
        of_w = p.engine.weight_gradient(up, p.x, p.x_grid, list(p.weight.shape[2:]), conv)
    if of_w is None:
        x_hat = p.engine.quantize(p.x.float(), p.x_grid).to(up.dtype)
    else:  # only its shape is looked at
        x_hat = p.x if p.x.dtype == torch.float32 else torch.empty_like(p.x, dtype=torch.float32)
    w_hat = p.engine.quantize(p.weight.float(), p.w_grid).to(up.dtype)
    if need_x and of_w is not None:
        of_x = p.engine.input_gradient(up, p.x, w_hat, conv)
    left_x, left_w = need_x and of_x is None, of_w is None
    if left_x or left_w:
        x, w = conv.gradients(up, x_hat, conv.weight_of(w_hat), left_x, left_w)
        of_x = x if left_x else of_x
        of_w = conv.rows_of(w) if w is not None and left_w else of_w
    assert of_w is not None
    return of_x, of_w


# ---- registration: the arguments of the ops are flat, a product's last ----

_PRODUCT = (
    "Tensor x, Tensor x_step, Tensor? x_offset, int x_min, int x_max, float x_gradient_scale, "
    "Tensor weight, Tensor w_step, int w_min, int w_max, float w_gradient_scale, int? group_size"
)
_CONV = ", int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups"
_FORWARD = "Tensor? bias, ScalarType? autocast_dtype"
_BACKWARD = "Tensor grad, bool need_x, bool has_bias, ScalarType? autocast_dtype"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # those of Gradients


def _flat(p: Product) -> tuple[Any, ...]:
    x, w, conv = p.x_grid, p.w_grid, p.conv
    if x.zero_point is not None or w.zero_point is not None:
        raise UsageError("the layers take no fixed zero point; give offset=-zero_point * step")
    of_x = (p.x, x.step, x.offset, x.q_min, x.q_max, x.gradient_scale)
    of_w = (p.weight, w.step, w.q_min, w.q_max, w.gradient_scale, w.group_size)
    if conv is None:
        return (*of_x, *of_w)
    geometry = (
        list(conv.stride), list(conv.padding), list(conv.dilation), conv.transposed, list(conv.output_padding),
        conv.groups,
    )  # fmt: skip
    return (*of_x, *of_w, *geometry)


def _product(
    x: Tensor, x_step: Tensor, x_offset: Tensor | None, x_min: int, x_max: int, x_gradient_scale: float,
    weight: Tensor, w_step: Tensor, w_min: int, w_max: int, w_gradient_scale: float, group_size: int | None,
    *conv: Any,
) -> Product:  # fmt: skip
    axis = 0 if group_size is None and w_step.numel() != 1 else None
    x_grid = Grid(x_step, x_min, x_max, x_gradient_scale, offset=x_offset)
    w_grid = Grid(w_step, w_min, w_max, w_gradient_scale, axis=axis, group_size=group_size)
    return Product(x, x_grid, weight, w_grid, Conv(*conv) if conv else None)


def _with_finite_offset(p: Product) -> Product:
    """Return the product; with the step NaN where the offset is not finite, whose zero point would be any integer."""
    offset = p.x_grid.offset
    return p if offset is None else p._replace(x_grid=p.x_grid._replace(step=p.x_grid.step + 0.0 * offset))


def _fake_forward(bias: Tensor | None, autocast_dtype: torch.dtype | None, *flat: Any) -> Tensor:
    p = _product(*flat)
    dtype, shape = autocast_dtype or p.x.dtype, require_product(*p[:4], bias, p.conv)
    if p.conv is None:
        return p.x.new_empty(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=p.x.device, memory_format=memory_format(p.x))


def _fake_backward(
    grad: Tensor, need_x: bool, has_bias: bool, autocast_dtype: torch.dtype | None, *flat: Any
) -> Gradients:
    p = _product(*flat)
    require_gradient(grad, require_product(*p[:4], None, p.conv), p.x)
    none = p.x_grid.step.new_empty(0)
    return Gradients(
        x=torch.empty_like(p.x) if need_x else p.x.new_empty(0),
        x_step=torch.empty_like(p.x_grid.step) if need_x else none,
        x_offset=torch.empty_like(p.x_grid.step) if need_x and p.x_grid.offset is not None else none.clone(),
        weight=torch.empty_like(p.weight),
        w_step=torch.empty_like(p.w_grid.step),
        bias=p.w_grid.step.new_empty(p.weight.shape[0] if has_bias else 0),
    )


def _run_forward(bias: Tensor | None, autocast_dtype: torch.dtype | None, *flat: Any) -> Tensor:
    p = _product(*flat)
    if 0 in (size := require_product(*p[:4], bias, p.conv)):
        return p.x.new_empty(size, dtype=autocast_dtype)
    return _forward(_with_finite_offset(p), bias, autocast_dtype)


def _run_backward(
    grad: Tensor, need_x: bool, has_bias: bool, autocast_dtype: torch.dtype | None, *flat: Any
) -> tuple[Tensor, ...]:
    p = _product(*flat)
    require_gradient(grad, require_product(*p[:4], None, p.conv), p.x)
    return _backward(grad, _with_finite_offset(p), need_x, has_bias, autocast_dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    bias, ctx.autocast_dtype, *flat = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype  # a bias is not kept
    keep(ctx, flat)


def _differentiate(ctx: Any, grad: Tensor, op: Op, backward: Op) -> Any:
    flat = kept(ctx)
    need_x = op.needs_gradient(ctx, "x", "x_step", "x_offset")
    has_offset = _product(*flat).x_grid.offset is not None
    found = Gradients(*backward(grad, need_x, ctx.bias_dtype is not None, ctx.autocast_dtype, *flat))
    return op.gradients(
        x=found.x if need_x else None,
        x_step=found.x_step if need_x else None,
        x_offset=found.x_offset if need_x and has_offset else None,
        weight=found.weight,
        w_step=found.w_step,
        bias=None if ctx.bias_dtype is None else found.bias.to(ctx.bias_dtype),
    )


def _register(name: str, geometry: str) -> Op:
    op = Op(name, f"({_FORWARD}, {_PRODUCT}{geometry}) -> Tensor", _run_forward, _fake_forward)
    schema = f"({_BACKWARD}, {_PRODUCT}{geometry}) -> {_GRADIENTS}"
    backward = Op(name + "_backward", schema, _run_backward, _fake_backward)
    op.differentiate(partial(_differentiate, op=op, backward=backward), _setup)
    op.under_autocast(_with_dtype)
    backward.refuse_derivative()
    return op


def _with_dtype(arguments: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    bias, _, *flat = arguments
    return (bias, None if flat[0].dtype == torch.float64 else dtype, *flat)  # autocast leaves float64 as it is


_linear = _register("linear", "")
_convolution = _register("convolution", _CONV)


# ---- the calls ----


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, x_grid: Grid, w_grid: Grid) -> Tensor:
    """Compute a quantized linear layer over exact integer sums, differentiable.

    ``y = fl(fl(acc * fl(s_x s_w)) + b)``, ``acc`` the exact sum of ``(q_x - z) q_w``

    x: (..., in) float32, bfloat16 or float16.
    weight: (out, in), likewise.
    bias: (out,), likewise, or None.
    x_grid: of the input, one step.
    w_grid: of the weight; step: (1,), (out,) or, with groups, (out * in / group_size,).
    Returns: (..., out) in x's dtype, autocast's under autocast unless that is float64.
    Raises: UsageError where input, weight, bias and steps do not fit.
    """
    return _linear(bias, None, *_flat(Product(x, x_grid, weight, w_grid, None)))


def convolution(x: Tensor, rows: Tensor, bias: Tensor | None, x_grid: Grid, w_grid: Grid, conv: Conv) -> Tensor:
    """Compute a quantized N-d convolution over exact integer sums, differentiable; see ``linear``.

    x: (batch, in, *spatial) float32, bfloat16 or float16; padding is the zero point in code space.
    rows: (out, in / groups, *kernel), likewise, also when transposed.
    bias: (out,), likewise, or None.
    x_grid: of the input, one step.
    w_grid: of the weight; step: (1,), (out,) or, with groups, one per run of an output channel's weights.
    conv: the geometry.
    Returns: (batch, out, *spatial) in x's dtype, autocast's under autocast, and x's memory format.
    Raises: UsageError where input, weight, bias and steps do not fit; ShapeError where the float layer raises as well.
    """
    return _convolution(bias, None, *_flat(Product(x, x_grid, rows, w_grid, conv)))
