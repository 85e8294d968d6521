"""Modules that join tensors: addition, multiplication, concatenation.  As modules they have names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lsquant._util.errors import UsageError


class Add(nn.Module):
    """Compute ``a + b``.

    a, b: tensors whose shapes broadcast.

    >>> lsquant.nn.Add()(torch.tensor([1.0]), torch.tensor([2.0]))
    tensor([3.])
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Mul(nn.Module):
    """Compute ``a * b`` elementwise, as squeeze-and-excite blocks do.

    a, b: tensors whose shapes broadcast.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Cat(nn.Module):
    """Concatenate tensors: ``Cat(dim)(a, b, c)`` is ``torch.cat((a, b, c), dim)``.

    dim: the dimension along which the tensors may differ; 1, the default, is the channels.
    Raises: UsageError, where the tensors are given as a list.
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise UsageError(f"Cat: dim is {dim!r}, not an integer; use lsquant.nn.Cat(1)(a, b)")
        self.dim = dim

    def forward(self, *tensors: Tensor) -> Tensor:
        if not tensors or isinstance(tensors[0], (tuple, list)):
            raise UsageError("Cat takes its tensors one by one: cat(a, b) instead of cat([a, b])")
        return torch.cat(tensors, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
