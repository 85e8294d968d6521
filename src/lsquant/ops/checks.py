"""What the operators rely on, checked once for all engines: shapes, steps, types, devices, geometry.

The C++ operators check the same again, as they can be called without these; their messages say less.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lsquant import reference
from lsquant._util.errors import ShapeError, UsageError
from lsquant.kernels import Conv, Grid

_ONE = (1,)
_TYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_LARGEST = 2**30  # stride, padding and dilation: PyTorch's own sizes overflow silently far above


def require_product(
    x: Tensor, x_grid: Grid, weight: Tensor, w_grid: Grid, bias: Tensor | None, conv: Conv | None
) -> list[int]:
    """Check what a quantized linear layer or convolution multiplies.

    x: (..., in), or (batch, in, *spatial) with a geometry.
    weight: (out, in), or rows (out, in / groups, *kernel).
    bias: (out,) or None.
    Returns: the shape of the output.
    Raises: UsageError naming the shapes; ShapeError in PyTorch's words where the float layer refuses them too.
    """
    if x.dtype not in _TYPES or weight.dtype not in _TYPES:
        raise UsageError(
            f"input and weight must be float32, bfloat16, float16 or float64, got {x.dtype} and {weight.dtype}"
        )
    if x.layout != torch.strided or weight.layout != torch.strided:
        raise UsageError(f"input and weight must be dense, got {x.layout} and {weight.layout}")
    shape, rows = list(x.shape), list(weight.shape)
    if conv is None:
        if len(rows) != 2 or not shape or shape[-1] != rows[1]:
            last = shape[-1] if shape else "missing"
            raise UsageError(f"linear: the input's last dimension is {last}, the weight {tuple(rows)}")
        size = [*shape[:-1], rows[0]]
    else:
        size = _convolved(shape, rows, conv)
    require_steps(rows, w_grid.step, w_grid.group_size)
    step, w_step, offset = x_grid.step, w_grid.step, x_grid.offset
    if step.dtype != torch.float32 or step.shape != _ONE:
        raise UsageError(f"an input has one step, float32, got {_said(step)}")
    if offset is not None and (offset.dtype != torch.float32 or offset.shape != _ONE):
        raise UsageError(f"an input has one offset, float32, got {_said(offset)}")
    reference.require_bounds(x_grid.q_min, x_grid.q_max)
    reference.require_bounds(w_grid.q_min, w_grid.q_max)
    device = x.device
    if step.device != device or weight.device != device or w_step.device != device:
        raise UsageError(
            f"the input is on {device}, its step on {step.device}, the weight on {weight.device}, its steps on "
            f"{w_step.device}; move model or batch with .to()"
        )
    for name, t in (("offset", offset), ("bias", bias)):
        if t is not None and t.device != device:
            raise UsageError(f"the input is on {device}, the {name} on {t.device}; move model or batch with .to()")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise UsageError(f"the bias must be ({rows[0]},), floating point, got {_said(bias)}")
    return size


def require_grid(x: Tensor, grid: Grid) -> None:
    """Raise UsageError where a quantizer does not fit an input.  Engines check the same: this is for shapes alone."""
    reference.require_bounds(grid.q_min, grid.q_max)
    reference.require_layout(x, grid.step, grid.axis, grid.group_size, grid.zero_point, grid.offset)


def require_gradient(grad: Tensor, size: Sequence[int], x: Tensor) -> None:
    """Raise UsageError where a gradient has not the size of what it is the gradient of, or not the device of x."""
    if grad.device != x.device or grad.layout != torch.strided:
        raise UsageError(f"the gradient is {grad.layout} on {grad.device}, it must be dense, on {x.device}")
    if list(grad.shape) != list(size) or not grad.is_floating_point():
        raise UsageError(f"the gradient must be {tuple(size)}, floating point, got {_said(grad)}")


def require_channels(x: Tensor, **constants: Tensor) -> None:
    """Check constants per channel.

    x: (batch, C, ...), float.
    constants: (C,) float32 each.
    Raises: UsageError naming what does not fit.
    """
    if x.dim() < 2 or not x.is_floating_point():
        raise UsageError(f"scale_shift: the input must be (batch, C, ...), floating point, got {_said(x)}")
    for name, t in constants.items():
        if t.dim() != 1 or t.shape[0] != x.shape[1] or t.dtype != torch.float32 or t.device != x.device:
            raise UsageError(
                f"scale_shift: {name} must be ({x.shape[1]},) float32 on {x.device} for an input of shape "
                f"{tuple(x.shape)}, got {_said(t)} on {t.device}"
            )


def require_steps(rows: Sequence[int], step: Tensor, group: int | None) -> None:
    """Check that a weight has as many steps as it needs.

    rows: the shape of the weight, output channels first.
    step: (steps,) float32.
    group: weights that share a step, or None for one step per tensor or output channel.
    Raises: UsageError naming both numbers and the remedy.
    """
    if step.dtype != torch.float32 or step.dim() != 1:
        raise UsageError(f"steps must be float32 and 1-D, got {_said(step)}")
    found = step.numel()
    if group is None:
        wanted, each = rows[0], "output channel"
        if found in (1, wanted):
            return
    else:
        row = _product(rows[1:])
        if group < 1 or row % group:
            raise UsageError(
                f"group_size={group} does not divide the {row} weights per output channel of {tuple(rows)}"
            )
        wanted, each = rows[0] * row // group, f"group of {group}"
        if found == wanted:
            return
    raise UsageError(
        f"the weight, output channels first {tuple(rows)}, needs {wanted} steps, one per {each}; its quantizer has "
        f"{found}. It is not the weight that was prepared, as after pruning or growing: call "
        "lsquant.prepare(model, recipe) again and calibrate"
    )


def _convolved(shape: list[int], rows: list[int], conv: Conv) -> list[int]:
    """Return the shape of a convolution's output."""
    dims, groups, extra = len(rows) - 2, conv.groups, conv.output_padding or [0] * (len(rows) - 2)
    lists = (conv.stride, conv.padding, conv.dilation, extra)
    if dims not in (1, 2, 3) or len(shape) != len(rows) or any(len(numbers) != dims for numbers in lists):
        numbers = ", ".join(str(list(n)) for n in lists)
        raise UsageError(
            f"convolution: input {tuple(shape)}, weight {tuple(rows)}, geometry {numbers}: dimensions differ"
        )
    if groups < 1 or rows[0] % groups or shape[1] != rows[1] * groups:
        raise UsageError(
            f"convolution: an input of shape {tuple(shape)} does not fit a weight (output channels first) of shape "
            f"{tuple(rows)} in {groups} groups"
        )
    size, odd, transposed = [shape[0], rows[0]], 0 in shape or 0 in rows, conv.transposed
    for n, k, s, p, d, e in zip(shape[2:], rows[2:], *lists, strict=True):
        if s < 1 or d < 1 or p < 0 or e < 0 or (transposed and e >= max(s, d)):
            odd = True
            break
        if max(s, p, d, e) > _LARGEST:
            raise UsageError(f"convolution: a stride, padding or dilation of {max(s, p, d, e)} is beyond 2^30")
        out = (n - 1) * s - 2 * p + d * (k - 1) + e + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
        odd = odd or out < 1
        size.append(out)
    return _as_pytorch_says(shape, rows, conv) if odd else size


def _as_pytorch_says(shape: list[int], rows: list[int], conv: Conv) -> list[int]:
    """Return the shape of the output where something is empty.  Raises: ShapeError in PyTorch's words."""
    try:
        one = torch.empty(1, dtype=torch.float32)
        return list(conv.convolve(one.expand(shape), conv.weight_of(one.expand(rows))).shape)
    except (RuntimeError, IndexError) as error:
        raise ShapeError(str(error)) from error


def _said(t: Tensor) -> str:
    return f"{t.dtype} of shape {tuple(t.shape)}"


def _product(numbers: Sequence[int]) -> int:
    total = 1
    for n in numbers:
        total *= n
    return total
