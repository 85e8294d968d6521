"""BatchNorm in eval mode: ``fl(fl(x * alpha) + beta)``, two roundings, never a fused multiply-add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsquant.ops.registration import custom_op, laid_out_like, refuse_second_derivative, register_autocast


def _channels(t: Tensor, x: Tensor) -> Tensor:
    return t.reshape([-1 if d == 1 else 1 for d in range(x.dim())])


@custom_op("lsquant::scale_shift", mutates_args=(), schema="(Tensor x, Tensor alpha, Tensor beta) -> Tensor")
def _forward(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    y = (x.to(torch.float32) * _channels(alpha, x)).add_(_channels(beta, x))
    return laid_out_like(y.to(x.dtype), x)


@_forward.register_fake
def _(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return torch.empty_like(x)


@custom_op(
    "lsquant::scale_shift_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor alpha) -> (Tensor, Tensor, Tensor)",
)
def _backward(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    up = grad.to(torch.float32)
    others = [d for d in range(x.dim()) if d != 1]
    grad_x = laid_out_like((up * _channels(alpha, x)).to(x.dtype), x)
    return grad_x, (up * x.to(torch.float32)).sum(others), up.sum(others)


@_backward.register_fake
def _(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(alpha)


refuse_second_derivative(_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


_forward.register_autograd(lambda ctx, grad: _backward(grad, *ctx.saved_tensors), setup_context=_setup)
register_autocast("scale_shift", lambda dtype: _forward)


def scale_shift(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``fl(fl(x * alpha) + beta)`` per channel.  x: (batch, C, ...); alpha, beta: (C,) float32.  Returns x's dtype."""
    return _forward(x, alpha, beta)
