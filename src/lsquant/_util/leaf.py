"""Layers of lsquant in graphs of ``torch.fx``: one node each, as torch's own layers are."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy

from lsquant._util.errors import UsageError


def leaf(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return the node that calls a module: for a forward pass that was not called with a tensor but a Proxy.

    torch.fx takes modules for leaves by the name of the package they come from, torch.nn.  So the forward passes of
    lsquant, when they are called with a Proxy, make the node themselves: the plain tracer then needs no argument.

    args, kwargs: what ``forward`` was called with; where it is traced by ``torch.fx`` one of them is a Proxy.
    Raises: UsageError where there is none, and where the module is itself what is traced.
    """
    proxy = next((a for a in (*args, *kwargs.values()) if isinstance(a, Proxy)), None)
    if proxy is None:
        given = type(args[0]).__name__
        raise UsageError(f"{type(module).__name__}({module.extra_repr()}): the input is a {given}, it must be a tensor")
    tracer: Any = proxy.tracer
    if tracer.root is module:
        raise UsageError(
            f"a {type(module).__name__} has no graph of its own in torch.fx: trace a module that holds it, as "
            "torch.nn.Sequential(layer)"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
