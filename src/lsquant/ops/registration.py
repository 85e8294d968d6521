"""What every op of the library needs from torch: registration, no second derivative, autocast, outputs laid out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("lsquant", "FRAGMENT")


class Op:
    """An op ``lsquant::name``, opaque to torch.compile and torch.export.

    Registered on torch's dispatcher directly: the first call of a ``torch.library.custom_op`` imports all of
    torch._dynamo.  function: computes it, returning fresh tensors; fake: the same for shapes only.
    """

    def __init__(self, name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.name = name
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, lambda *args: _no_view(function(*args)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"lsquant::{name}", fake, lib=_LIBRARY)
        self._call = getattr(torch.ops.lsquant, name).default
        self._arguments = tuple(argument.name for argument in self._call._schema.arguments)

    def gradients(self, **found: Tensor | None) -> tuple[Tensor | None, ...]:
        """Put gradients, given by the names of arguments, in the arguments' order, None where none is given."""
        ordered = tuple(found.pop(name, None) for name in self._arguments)
        if found:
            raise TypeError(f"{self.name} has no argument {', '.join(found)}")
        return ordered

    def needs_gradient(self, ctx: Any, *names: str) -> bool:
        """Tell whether any of the named arguments wants a gradient."""
        wanted = zip(self._arguments, ctx.needs_input_grad, strict=True)
        return any(needed for name, needed in wanted if name in names)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def differentiate(self, backward: Callable[..., Any], setup: Callable[..., Any]) -> None:
        """Register the derivative; see ``torch.library.register_autograd``."""
        torch.library.register_autograd(f"lsquant::{self.name}", backward, setup_context=setup, lib=_LIBRARY)

    def refuse_derivative(self) -> None:
        """Make differentiating a backward op an error that says what to do."""

        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                "lsquant defines no second derivative: round() has none. Call backward() without create_graph=True, "
                "or switch the quantizers off with lsquant.disabled(model)"
            )

        self.differentiate(backward, lambda ctx, inputs, output: None)

    def under_autocast(self, adapt: Callable[[tuple[Any, ...], torch.dtype], tuple[Any, ...]]) -> None:
        """Run with autocast off inside; ``adapt(args, autocast's dtype)`` gives the arguments."""
        for device in ("cpu", "cuda"):

            def kernel(*args: Any, device: str = device) -> Any:
                adapted = adapt(args, torch.get_autocast_dtype(device))
                with torch.autocast(device, enabled=False):
                    return self(*adapted)

            _LIBRARY.impl(self.name, kernel, "Autocast" + device.upper())


def keep(ctx: Any, arguments: Sequence[Any]) -> None:
    """Save the arguments of an op for its derivative; ``kept`` gives them back."""
    ctx.save_for_backward(*(value for value in arguments if isinstance(value, Tensor)))
    ctx.others = tuple(None if isinstance(value, Tensor) else value for value in arguments)
    ctx.are_tensors = tuple(isinstance(value, Tensor) for value in arguments)


def kept(ctx: Any) -> tuple[Any, ...]:
    """Return the arguments that ``keep`` saved, in their order."""
    tensors = iter(ctx.saved_tensors)
    pairs = zip(ctx.others, ctx.are_tensors, strict=True)
    return tuple(next(tensors) if is_tensor else value for value, is_tensor in pairs)


def _no_view(result: Any) -> Any:
    """Return the result as no view, which autograd would forbid to modify in place; nothing is copied."""
    return (
        torch.ops.aten._unsafe_view(result, result.shape)
        if isinstance(result, Tensor) and result._is_view()
        else result
    )


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format a convolution's output takes from its input."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return torch.contiguous_format


def laid_out_like(result: Tensor, like: Tensor) -> Tensor:
    """Compute ``result`` in the strides that ``torch.empty_like(like)`` has; copies only when they differ."""
    wanted = torch.empty_like(like, device="meta", dtype=result.dtype)
    if result.stride() == wanted.stride():
        return result
    return torch.empty_like(like, dtype=result.dtype).copy_(result)
