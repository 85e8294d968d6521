"""The mathematics of LSQ in plain PyTorch, one equation a function.  The truth every kernel is held to; slow.

Sources: LSQ = Esser et al., Learned Step Size Quantization, ICLR 2020, arXiv:1902.08153v3.
LSQ+ = Bhalgat et al., arXiv:2004.09576, with the offset turned into an integer zero point in the forward pass.
Equation numbers (M1) .. (M12) are those of docs/mathematics.md.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lsquant._util.errors import UsageError
from lsquant.mse import mse_step as mse_step
from lsquant.mse import rows_per_step

GUARD_FACTOR = 2.0**-10
"""s_min = GUARD_FACTOR * s0, the smallest step the forward pass uses (M7)."""

LARGEST_CODE = 2**22
"""Bounds of codes beyond it are refused: round(v / s) + z is exact below."""

SUM_BLOCK = 256
"""Length of the float32 blocks of the step gradient's sum; blocks are summed in float64 (M6)."""


def bounds(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """(M1) Return the lowest and the highest code.

    Signed ``-2^(b-1) .. 2^(b-1)-1``, unsigned ``0 .. 2^b-1``; narrow drops the lowest.

    Raises: UsageError for bits outside 2..8 or narrow with unsigned.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise UsageError(f"bounds: bits={bits!r}; bits must be an integer from 2 to 8")
    if narrow and not signed:
        raise UsageError("bounds: narrow=True drops the lowest signed level and cannot go with signed=False")
    return (-(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def gradient_scale(count: int, q_max: int) -> float:
    """(M5) Compute ``g = 1 / sqrt(N * q_max)``.

    count: N, the elements of one sample that share the step.
    Raises: UsageError for a count or q_max below 1.
    Source: LSQ section 2.2.
    """
    if count < 1 or q_max < 1:
        raise UsageError(f"gradient_scale: count={count}, q_max={q_max}; both must be at least 1")
    return 1.0 / math.sqrt(count * q_max)


# ---- layout: which element belongs to which step ----


def step_view(x: Tensor, step: Tensor, axis: int | None, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Reshape ``x`` and ``step`` so that they broadcast.

    x: any shape.
    step: (1,), (x.shape[axis],) or (x.numel() / group_size,) float32, one per run of ``group_size`` elements of the
        row-major flattened x, a run never crossing a row of dimension 0.
    Raises: UsageError naming both shapes.
    """
    if step.dtype != torch.float32:
        raise UsageError(f"step must be float32, got {step.dtype}; steps stay float32 under .to(dtype)")
    if step.dim() != 1:
        raise UsageError(f"step must be 1-D, one value per tensor, channel or group; got shape {tuple(step.shape)}")
    if group_size is not None:
        if axis not in (None, 0, -x.dim()):
            raise UsageError(f"axis={axis} with group_size={group_size}: groups lie along the dimensions after axis 0")
        row = x.shape[1:].numel()
        if group_size < 1 or row % group_size:
            raise UsageError(f"group_size={group_size} does not divide the {row} elements of a row of {tuple(x.shape)}")
        _expect(step, x.numel() // group_size, x)
        return x.reshape(-1, group_size), step.unsqueeze(1)
    if axis is not None:
        if not -x.dim() <= axis < x.dim():
            raise UsageError(f"axis={axis} is outside an input of shape {tuple(x.shape)}")
        _expect(step, x.shape[axis], x)
        return x, step.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])
    _expect(step, 1, x)
    return x, step.reshape(())


def require_bounds(q_min: int, q_max: int) -> None:
    """Raise UsageError where bounds are not in order, or codes so large that sums of them round in float32."""
    if not -LARGEST_CODE <= q_min <= q_max <= LARGEST_CODE:
        raise UsageError(f"q_min={q_min}, q_max={q_max}; bounds must be in order and within 2^22")


def require_layout(
    x: Tensor,
    step: Tensor,
    axis: int | None,
    group_size: int | None,
    zero_point: int | Tensor | None = None,
    offset: Tensor | None = None,
) -> None:
    """Check that steps, zero points and offsets fit an input.

    Raises: UsageError naming the shapes, dtypes or devices; see ``step_view``.
    """
    if not x.is_floating_point():
        raise UsageError(f"an input must be floating point, got {x.dtype}")
    if step.device != x.device:
        raise UsageError(f"the input is on {x.device}, the step on {step.device}; move one of them with .to()")
    if zero_point is not None and offset is not None:
        raise UsageError("give zero_point (a fixed integer) or offset (learned, LSQ+), not both")
    if axis is not None or group_size is not None or step.shape != (1,) or step.dtype != torch.float32:
        step_view(x, step, axis, group_size)
    for name, zero in (("zero_point", zero_point), ("offset", offset)):
        if not isinstance(zero, Tensor):
            continue
        if zero.shape != step.shape:
            raise UsageError(f"{name} must have the step's shape {tuple(step.shape)}, got {tuple(zero.shape)}")
        if zero.device != step.device:
            raise UsageError(f"the step is on {step.device}, the {name} on {zero.device}; move one of them with .to()")
    if offset is not None and offset.dtype != torch.float32:
        raise UsageError(f"offset must be float32, got {offset.dtype}; offsets stay float32 under .to(dtype)")


def _expect(step: Tensor, count: int, x: Tensor) -> None:
    if step.numel() != count:
        raise UsageError(f"an input of shape {tuple(x.shape)} wants {count} step(s) here, got {step.numel()}")


def zero_point(step: Tensor, offset: Tensor, q_min: int, q_max: int) -> Tensor:
    """(M9) Compute LSQ+'s ``z = clip(round(-b / s), q_min, q_max)``.

    step, offset: (steps,) float32.
    Returns: (steps,) float32 integers.
    """
    return torch.clamp(torch.round(-offset / step), q_min, q_max)


def _view(
    x: Tensor,
    step: Tensor,
    q_min: int,
    q_max: int,
    axis: int | None,
    group_size: int | None,
    fixed: int | Tensor | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | int]:
    """Return x, step and zero point, checked and in shapes that broadcast."""
    require_bounds(q_min, q_max)
    require_layout(x, step, axis, group_size, fixed, offset)
    v, s = step_view(x, step, axis, group_size)
    if offset is not None:
        return v, s, zero_point(step, offset, q_min, q_max).reshape(s.shape)
    if isinstance(fixed, Tensor):
        return v, s, fixed.to(torch.float32).reshape(s.shape)
    return v, s, fixed or 0


# ---- forward ----


def quotient(v: Tensor, s: Tensor) -> Tensor:
    """(M2) Compute ``v / s``, a true IEEE float32 division."""
    return v.to(torch.float32) / s


def code_of_quotient(v: Tensor, vs: Tensor, z: Tensor | int, q_min: int, q_max: int) -> Tensor:
    """(M2) Compute ``clip(round(v/s) + z, q_min, q_max)``, half to even; NaN where v is not finite."""
    code = torch.clamp(torch.round(vs) + z, q_min, q_max)
    return torch.where(torch.isfinite(v), code, torch.nan)


def codes(
    x: Tensor,
    step: Tensor,
    q_min: int,
    q_max: int,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    zero_point: int | Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """(M2) Compute ``clip(round(v / s) + z, q_min, q_max)`` as float32 in the shape of x; NaN where x is not finite."""
    v, s, z = _view(x, step, q_min, q_max, axis, group_size, zero_point, offset)
    return code_of_quotient(v, quotient(v, s), z, q_min, q_max).reshape(x.shape)


def quantize(
    x: Tensor,
    step: Tensor,
    q_min: int,
    q_max: int,
    *,
    axis: int | None = None,
    group_size: int | None = None,
    zero_point: int | Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """(M3) Compute ``v_hat = (codes - z) * s``, in the dtype of x."""
    v, s, z = _view(x, step, q_min, q_max, axis, group_size, zero_point, offset)
    return ((code_of_quotient(v, quotient(v, s), z, q_min, q_max) - z) * s).reshape(x.shape).to(x.dtype)


# ---- backward ----


def inside(vs: Tensor, z: Tensor | int, q_min: int, q_max: int) -> Tensor:
    """(M4) Compute ``q_min - z < v/s < q_max - z`` on the raw quotient; equality is outside."""
    return (vs > q_min - z) & (vs < q_max - z)


def step_terms(vs: Tensor, z: Tensor | int, q_min: int, q_max: int, *, learned_offset: bool = False) -> Tensor:
    """(M4) Compute ``d v_hat / d s`` per element.

    ``round(v/s) - v/s`` inside, ``q_min - z`` below, ``q_max - z`` above.

    With LSQ+'s learned offset (M10) the outer values are ``q_min`` and ``q_max``.  NaN where v/s is NaN.
    """
    low, high = q_min - z, q_max - z
    out_low, out_high = (q_min, q_max) if learned_offset else (low, high)
    outer = torch.where(vs <= low, out_low, out_high).to(vs.dtype)
    return torch.where(inside(vs, z, q_min, q_max) | torch.isnan(vs), torch.round(vs) - vs, outer)


def sum_per_step(terms: Tensor, axis: int | None, group_size: int | None) -> Tensor:
    """(M6) Sum terms over the elements that share a step, in an order that never changes.

    Blocks of 256 in float32, blocks in float64, 256 at a time: the same bits for any number of threads.

    terms: the shape ``step_view`` gave, float32.
    Returns: (steps,) float64.
    """
    rows = rows_per_step(terms, axis, group_size)
    if rows.numel() == 0:
        return torch.zeros(rows.shape[0], dtype=torch.float64, device=terms.device)
    while True:
        pad = -rows.shape[1] % SUM_BLOCK
        rows = torch.nn.functional.pad(rows, (0, pad)).reshape(rows.shape[0], -1, SUM_BLOCK).sum(-1).to(torch.float64)
        if rows.shape[1] == 1:
            return rows[:, 0]


def quantize_backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(M4)-(M6), (M10) Compute the gradients of x, step and offset, the latter two times g.

    grad: the shape of x, float.
    Returns: (the shape and dtype of x; (steps,) float32; (steps,) float32 or None without an offset).
    """
    v, s, z = _view(x, step, q_min, q_max, axis, group_size, zero_point, offset)
    up = grad.reshape(v.shape).to(torch.float32)
    vs = torch.where(torch.isfinite(v), quotient(v, s), torch.nan)
    within = inside(vs, z, q_min, q_max)
    grad_x = torch.where(within, up, 0.0).reshape(x.shape).to(x.dtype)
    terms = step_terms(vs, z, q_min, q_max, learned_offset=offset is not None) * up
    grad_step = (sum_per_step(terms, axis, group_size) * gradient_scale).to(torch.float32)
    if offset is None:
        return grad_x, grad_step, None
    outer = sum_per_step(torch.where(within, 0.0, up), axis, group_size)
    return grad_x, grad_step, (outer * gradient_scale).to(torch.float32)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, offset: Tensor | None, bounds: tuple[int, int], scale: float, kind: Any
    ) -> Tensor:
        """Quantize; kind: axis, group_size and zero_point by name."""
        ctx.save_for_backward(x, step, offset)
        ctx.bounds, ctx.scale, ctx.kind = bounds, scale, kind
        q_min, q_max = bounds
        return quantize(x, step, q_min, q_max, offset=offset, **kind)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x, step, offset = ctx.saved_tensors
        q_min, q_max = ctx.bounds
        of_x, of_step, of_offset = quantize_backward(
            grads[0], x, step, q_min, q_max, ctx.scale, offset=offset, **ctx.kind
        )
        return of_x, of_step, of_offset, None, None, None


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
    """(M3) Compute ``(codes(v) - z) * s`` with LSQ's gradients, slowly; arguments of ``lsquant.fake_quantize``."""
    kind = {"axis": axis, "group_size": group_size, "zero_point": zero_point}
    return _FakeQuantize.apply(x, step, offset, (q_min, q_max), gradient_scale, kind)


# ---- the guard, R, initial steps ----


def guard(step: Tensor, initial_step: Tensor, step_dtype: str = "float32") -> Tensor:
    """(M7) Compute the guarded step.

    ``s_eff = s_min where s < s_min else s``, ``s_min = 2^-10 * s0``; ``d s_eff / d s = 1``.  NaN stays NaN.

    step_dtype: "float16" or "bfloat16": then s_eff is rounded to it, to nearest even, and never to 0 or infinity.

    Raises: UsageError under the transforms of torch.func.
    """
    try:
        return _Guard.apply(step, initial_step, step_dtype)  # type: ignore[no-any-return]
    except RuntimeError as error:
        if "functorch" not in str(error):
            raise
        raise UsageError(
            "torch.func (grad, vjp, jvp, vmap, ...) does not go through learned steps: use torch.autograd.grad or "
            "backward(), or switch the quantizers off with lsquant.disabled(model)"
        ) from error


class _Guard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor, initial_step: Tensor, step_dtype: str) -> Tensor:
        low = GUARD_FACTOR * initial_step
        guarded = torch.where(step < low, low, step)
        return guarded if step_dtype == "float32" else snapped(guarded, step_dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


def snapped(step: Tensor, step_dtype: str) -> Tensor:
    """Return positive steps rounded to a type, float32: to nearest even, never to 0 or infinity.

    step_dtype: "float16" or "bfloat16".
    """
    dtype = getattr(torch, step_dtype)
    numbers = torch.finfo(dtype)
    least = numbers.tiny * numbers.eps  # the smallest that is not 0
    inside = step.clamp(least, numbers.max).to(dtype).to(torch.float32)
    return torch.where(torch.isfinite(step), inside, step)


def step_balance(
    weight: Tensor,
    weight_grad: Tensor,
    step: Tensor,
    step_grad: Tensor,
    *,
    axis: int | None = None,
    group_size: int | None = None,
) -> Tensor:
    """(M8) Compute ``R = (|dL/ds| / s) / (||dL/dw|| / ||w||)`` per step, g included in dL/ds.

    weight, weight_grad: the elements that share the steps; for an activation step its layer's whole weight.
    step: (steps,) float32, the guarded step.
    step_grad: (steps,) float32.
    Returns: (steps,) float32; infinite or NaN where a weight gradient is zero.
    Source: LSQ section 2.2.
    """
    if step.numel() == 1:
        axis = group_size = None
    rows = (rows_per_step(t.detach().double(), axis, group_size) for t in (weight, weight_grad))
    norm_w, norm_g = (torch.linalg.vector_norm(r, dim=1) for r in rows)
    ratio = (step_grad.detach().double().abs() / step.detach().double()) / (norm_g / norm_w)
    return ratio.to(torch.float32)


def initial_step(x: Tensor, q_max: int, *, axis: int | None = None, group_size: int | None = None) -> Tensor:
    """(M11) Compute the paper's first step, ``s0 = 2 mean(|v|) / sqrt(q_max)``.

    x: any shape, float.
    Returns: (steps,) float32, 0 for all-zero values.
    Source: LSQ section 2.1.
    """
    mean = rows_per_step(x.detach().double().abs(), axis, group_size).mean(1)
    return (2.0 * mean / math.sqrt(q_max)).to(torch.float32)
