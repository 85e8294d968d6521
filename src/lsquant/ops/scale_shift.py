"""BatchNorm in eval mode: ``fl(fl(x * alpha) + beta)``, two roundings, never a fused multiply-add."""

from __future__ import annotations

import torch
from torch import Tensor

from lsquant.kernels import engine_for
from lsquant.kernels.engine import per_channel
from lsquant.ops.checks import require_channels, require_gradient
from lsquant.ops.registration import Op, laid_out_like


def _forward(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    require_channels(x, alpha=alpha, beta=beta)
    return laid_out_like(engine_for(x.device.type, x.dtype).scale_shift(x, alpha, beta), x)


def _backward(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    require_channels(x, alpha=alpha)
    require_gradient(grad, x.shape, x)
    up = grad.to(torch.float32)
    others = [d for d in range(x.dim()) if d != 1]
    grad_x = laid_out_like((up * per_channel(alpha, x)).to(x.dtype), x)
    return grad_x, (up * x.to(torch.float32)).sum(others), up.sum(others)


def _fake_forward(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    require_channels(x, alpha=alpha, beta=beta)
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    require_channels(x, alpha=alpha)
    require_gradient(grad, x.shape, x)
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(alpha)


_op = Op("scale_shift", "(Tensor x, Tensor alpha, Tensor beta) -> Tensor", _forward, _fake_forward)
_backward_op = Op(
    "scale_shift_backward",
    "(Tensor grad, Tensor x, Tensor alpha) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_op.differentiate(
    lambda ctx, grad: _backward_op(grad, *ctx.saved_tensors),
    lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], inputs[1]),
)
_op.under_autocast(lambda arguments, dtype: arguments)
_backward_op.refuse_derivative()


def scale_shift(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Scale and shift each channel: ``fl(fl(x * alpha) + beta)``, two roundings, differentiable.

    x: (batch, C, ...), float.
    alpha, beta: (C,) float32.
    Returns: the shape, dtype and memory format of x.
    Raises: UsageError where the constants do not fit.
    """
    return _op(x, alpha, beta)
