"""``fake_quantize``: the staircase with LSQ's gradients, one op forward and one backward.

Keeps the input and the step for the backward pass and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from lsquant._util.errors import UsageError
from lsquant.kernels import Grid, engine_for, visible
from lsquant.ops.checks import require_gradient, require_grid
from lsquant.ops.registration import Op, keep, kept, laid_out_like

# ---- registration: the arguments of the ops are flat ----

_ARGUMENTS = (
    "Tensor x, Tensor step, int q_min, int q_max, float gradient_scale, int? axis, int? group_size, "
    "int fixed_zero, Tensor? zero_point, Tensor? offset"
)


def _flat(x: Tensor, grid: Grid) -> tuple[Any, ...]:
    zero = grid.zero_point
    fixed, zeros = (0, zero) if isinstance(zero, Tensor) else (zero or 0, None)
    return (
        x, grid.step, grid.q_min, grid.q_max, grid.gradient_scale, grid.axis, grid.group_size, fixed, zeros,
        grid.offset,
    )  # fmt: skip


def _grid(
    step: Tensor, q_min: int, q_max: int, gradient_scale: float, axis: int | None, group_size: int | None,
    fixed_zero: int, zero_point: Tensor | None, offset: Tensor | None,
) -> Grid:  # fmt: skip
    zero = zero_point if zero_point is not None else fixed_zero or None
    return Grid(step, q_min, q_max, gradient_scale, offset, zero, axis, group_size)


def _forward(x: Tensor, *numbers: Any) -> Tensor:
    return quantized(x, _grid(*numbers))


def _backward(grad: Tensor, x: Tensor, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
    require_gradient(grad, x.shape, x)
    return quantized_gradients(grad, x, _grid(*numbers))


def _fake_forward(x: Tensor, *numbers: Any) -> Tensor:
    require_grid(x, _grid(*numbers))
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, *numbers: Any) -> tuple[Tensor, Tensor, Tensor]:
    grid = _grid(*numbers)
    require_grid(x, grid)
    require_gradient(grad, x.shape, x)
    of_offset = grid.step.new_empty(0) if grid.offset is None else torch.empty_like(grid.step)
    return torch.empty_like(x), torch.empty_like(grid.step), of_offset


_op = Op("fake_quantize", f"({_ARGUMENTS}) -> Tensor", _forward, _fake_forward)
_backward_op = Op(
    "fake_quantize_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _backward, _fake_backward
)


def _differentiate(ctx: Any, grad: Tensor, backward: Callable[..., Any] = _backward_op) -> Any:
    x, *numbers = kept(ctx)
    of_x, of_step, of_offset = backward(grad, x, *numbers)
    has_offset = _grid(*numbers).offset is not None
    return _op.gradients(x=of_x, step=of_step, offset=of_offset if has_offset else None)


class _Visible(torch.autograd.Function):
    """The op for torch.compile where the engine's kernels can be shown to the compiler: not opaque."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        keep(ctx, arguments)
        return _forward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _differentiate(ctx, *grads, backward=_backward)


_op.differentiate(_differentiate, lambda ctx, inputs, output: keep(ctx, inputs))
_op.under_autocast(lambda arguments, dtype: arguments)
_backward_op.refuse_derivative()


# ---- what the ops compute ----


def quantized(x: Tensor, grid: Grid) -> Tensor:
    """Fake-quantize, not differentiable; the engine checks what it is given."""
    return laid_out_like(engine_for(x.device.type, x.dtype).quantize(x, grid), x)


def quantized_gradients(grad: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, step and offset; the last is empty without an offset."""
    of_x, of_step, of_offset = engine_for(x.device.type, x.dtype).quantize_backward(grad, x, grid)
    return laid_out_like(of_x, x), of_step, grid.step.new_empty(0) if of_offset is None else of_offset


# ---- the calls ----

_PLAIN = (Tensor, torch.nn.Parameter)


def fake_quantize_with(x: Tensor, grid: Grid) -> Tensor:
    """Fake-quantize by a record; see ``fake_quantize``."""
    if not x.is_floating_point():
        raise UsageError(f"fake_quantize: x must be a floating-point tensor, got {x.dtype}")
    if type(x) in _PLAIN and not torch.compiler.is_compiling():
        # a derivative that is not in Python: that one costs more than the arithmetic on small tensors
        direct = engine_for(x.device.type, x.dtype).fake_quantize(x, grid)
        return _op(*_flat(x, grid)) if direct is None else direct
    if visible(x.device.type) is not None:
        return _Visible.apply(*_flat(x, grid))
    return _op(*_flat(x, grid))


def _require_numbers(
    x: Any, step: Any, q_min: Any, q_max: Any, scale: Any, axis: Any, group_size: Any, zero_point: Any, offset: Any
) -> None:  # fmt: skip
    """Raise UsageError naming an argument of another type, of which torch would only say that it does not fit."""
    none = type(None)
    wanted = (
        ("x", x, Tensor, "a tensor"),
        ("step", step, Tensor, "a tensor, 1-D float32"),
        ("q_min", q_min, Integral, "an integer"),
        ("q_max", q_max, Integral, "an integer"),
        ("gradient_scale", scale, Real, "a number"),
        ("axis", axis, (Integral, none), "an integer or None"),
        ("group_size", group_size, (Integral, none), "an integer or None"),
        ("zero_point", zero_point, (Integral, Tensor, none), "an integer, a tensor of them, or None"),
        ("offset", offset, (Tensor, none), "a tensor like step, or None"),
    )
    for name, value, types, words in wanted:
        if not isinstance(value, types):
            raise UsageError(f"fake_quantize: {name}={value!r}; give {words}")


def fake_quantize(
    x: Tensor,
    step: Tensor,
    q_min: int,
    q_max: int,
    gradient_scale: float,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    zero_point: int | Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize, differentiable in x, step and offset as LSQ defines it.

    ``v_hat = (clip(round(v / s) + z, q_min, q_max) - z) * s``

    x: any shape, float32, bfloat16, float16, or float64, slowly (computed in float32).
    step: (1,), (x.shape[axis],) or (groups,) float32, > 0, the guard applied.
    q_min, q_max: lowest and highest code.
    gradient_scale: g, multiplies the gradients of step and offset.
    axis: the dimension that has a step per index, or None.
    group_size: elements of one group, a run along the dimensions after the first, row-major, or None.
    zero_point: a fixed integer z, or a tensor of them like step.
    offset: LSQ+'s b, like step; at most one of zero_point and offset.
    Returns: the shape, dtype and memory format of x; NaN where x is not finite or its step is NaN or infinite.
    Raises: UsageError for shapes, types and devices that do not fit.
    Source: arXiv:1902.08153 eqs. (1)-(3), arXiv:2004.09576.

    >>> import torch
    >>> fake_quantize(torch.tensor([0.2, 0.8, 9.0]), torch.tensor([0.5]), 0, 3, 1.0)
    tensor([0.0000, 1.0000, 1.5000])
    """
    _require_numbers(x, step, q_min, q_max, gradient_scale, axis, group_size, zero_point, offset)
    return fake_quantize_with(x, Grid(step, q_min, q_max, gradient_scale, offset, zero_point, axis, group_size))
