"""``fake_quantize``: the staircase with LSQ's gradients, one op forward and one backward.

Keeps the input and the step for the backward pass and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsquant._util.errors import UsageError
from lsquant.kernels import engine, visible
from lsquant.ops.registration import Op, laid_out_like

_ARGUMENTS = (
    "Tensor x, Tensor step, int q_min, int q_max, float gradient_scale, int? axis, int? group_size, "
    "int fixed_zero, Tensor? zero_point, Tensor? offset"
)


def _rest(
    fixed_zero: int, zero_point: Tensor | None, offset: Tensor | None
) -> tuple[int | Tensor | None, Tensor | None]:
    return (zero_point if zero_point is not None else fixed_zero or None), offset


def _forward(x, step, q_min, q_max, _, axis, group_size, *zero):  # type: ignore[no-untyped-def]
    quantize = engine(x.device.type, x.dtype).quantize
    return laid_out_like(quantize(x, step, q_min, q_max, axis, group_size, *_rest(*zero)), x)


def _backward(grad, x, step, q_min, q_max, scale, axis, group_size, *zero):  # type: ignore[no-untyped-def]
    kind, kernels = (axis, group_size, *_rest(*zero)), engine(x.device.type, x.dtype)
    grad_x, grad_step, grad_offset = kernels.quantize_backward(grad, x, step, q_min, q_max, scale, *kind)
    return laid_out_like(grad_x, x), grad_step, step.new_empty(0) if grad_offset is None else grad_offset


def _fake_backward(grad: Tensor, x: Tensor, step: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(step), step.new_empty(0) if rest[-1] is None else step.clone()


_op = Op("fake_quantize", f"({_ARGUMENTS}) -> Tensor", _forward, lambda x, *rest: torch.empty_like(x))
_backward_op = Op(
    "fake_quantize_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _backward, _fake_backward
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, step, *ctx.numbers, zero_point, offset = inputs
    ctx.save_for_backward(*(t for t in (x, step, zero_point, offset) if t is not None))
    ctx.kinds = (zero_point is not None, offset is not None)


def _differentiate(ctx: Any, grad: Tensor, backward: Any = _backward_op) -> Any:
    x, step, *small = ctx.saved_tensors
    zero_point = small.pop(0) if ctx.kinds[0] else None
    offset = small.pop(0) if ctx.kinds[1] else None
    grad_x, grad_step, grad_offset = backward(grad, x, step, *ctx.numbers, zero_point, offset)
    return grad_x, grad_step, None, None, None, None, None, None, None, None if offset is None else grad_offset


class _Visible(torch.autograd.Function):
    """The op for torch.compile where the engine's kernels can be shown to the compiler: not opaque."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        _setup(ctx, args, None)
        return _forward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _differentiate(ctx, *grads, backward=_backward)


_op.differentiate(_differentiate, _setup)
_op.under_autocast(lambda args, dtype: args)
_backward_op.refuse_derivative()


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
    """``(clip(round(x / s) + z, q_min, q_max) - z) * s``, differentiable in x, step and offset as LSQ defines it.

    x: any shape, float32, bfloat16, float16, or float64, slowly (computed in float32).
    step: (1,), (x.shape[axis],) or (groups,) float32, > 0, already guarded; groups are runs of ``group_size`` along the
    dimensions after the first, row-major.
    gradient_scale: g, multiplies the gradients of step and offset.
    zero_point: a fixed integer z, or a tensor of them like step.  offset: LSQ+'s b, like step; at most one of the two.
    Returns: the shape, dtype and memory format of x; NaN where x is not finite or its step is NaN or infinite.
    Raises: UsageError for shapes that do not fit.  Source: arXiv:1902.08153 eqs. (1)-(3), arXiv:2004.09576.

    >>> import torch
    >>> fake_quantize(torch.tensor([0.2, 0.8, 9.0]), torch.tensor([0.5]), 0, 3, 1.0)
    tensor([0.0000, 1.0000, 1.5000])
    """
    if step.dtype != torch.float32:
        raise UsageError(f"fake_quantize: step must be float32, got {step.dtype}; steps stay float32 under .to(dtype)")
    if not x.is_floating_point():
        raise UsageError(f"fake_quantize: x must be a floating-point tensor, got {x.dtype}")
    fixed = zero_point if isinstance(zero_point, int) else 0
    tensor = zero_point if isinstance(zero_point, Tensor) else None
    if offset is not None and zero_point is not None:
        raise UsageError("fake_quantize: give zero_point (a fixed integer) or offset (learned, LSQ+), not both")
    args = (x, step, q_min, q_max, gradient_scale, axis, group_size, fixed, tensor, offset)
    if type(x) in _PLAIN and not torch.compiler.is_compiling():
        # derivative in C++: the Python one costs more than the arithmetic on small tensors
        return getattr(engine(x.device.type, x.dtype), "fake_quantize", _op)(*args)
    if visible(x.device.type) is not None:
        return _Visible.apply(*args)
    return _op(*args)


_PLAIN = (Tensor, torch.nn.Parameter)
