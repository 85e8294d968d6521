"""What every op of the library needs from torch: no second derivative, autocast, outputs laid out as promised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

custom_op: Any = torch.library.custom_op
_LIBRARY = torch.library.Library("lsquant", "FRAGMENT")


def refuse_second_derivative(op: Any) -> None:
    """Make differentiating a backward op an error that says what to do."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            "lsquant defines no second derivative: round() has none. Call backward() without create_graph=True, "
            "or switch the quantizers off with lsquant.disabled(model)"
        )

    op.register_autograd(backward)


def register_autocast(name: str, call: Callable[[torch.dtype], Callable[..., Any]]) -> None:
    """Run the op ``name`` with autocast off inside; ``call(dtype)`` gives the function for autocast's dtype."""
    for device in ("cpu", "cuda"):

        def kernel(*args: Any, device: str = device) -> Any:
            function = call(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return function(*args)

        _LIBRARY.impl(name, kernel, "Autocast" + device.upper())


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format a convolution's output takes from its input."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return torch.contiguous_format


def laid_out_like(result: Tensor, like: Tensor) -> Tensor:
    """``result`` in the strides that ``torch.empty_like(like)`` has; copies only when they differ."""
    wanted = torch.empty_like(like, device="meta", dtype=result.dtype)
    if result.stride() == wanted.stride():
        return result
    return torch.empty_like(like, dtype=result.dtype).copy_(result)
