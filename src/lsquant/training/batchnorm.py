"""Re-estimation of BatchNorm's running statistics with the present weights.

Source: Wu and Johnson, "Rethinking Batch in BatchNorm", arXiv:2105.07576, section 3 (there called PreciseBN).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from lsquant._util.batches import Forward, evaluating, run_batch, take
from lsquant._util.errors import UsageError

_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def batchnorms(model: nn.Module) -> list[nn.Module]:
    """Return the BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _TYPES) and m.running_mean is not None]


def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Any], *, max_batches: int | None = None, forward: Forward | None = None
) -> None:
    """Replace running means and variances by the plain averages of the batch statistics over `batches`.

    running_mean = (1/B) sum_b mean_b;   running_var = (1/B) sum_b var_b, unbiased as in training

    batches: training batches of the size trained with; every batch counts the same
    max_batches: use no more than these; None uses all
    forward: as for `calibrate`

    BatchNorm layers run in train mode, all others (quantizers, dropout) in eval mode; parameters and steps do not
    change. Modes are restored. A layer that no batch reaches keeps its statistics.

    Raises: UsageError without a BatchNorm that keeps statistics, or without batches. After any error the statistics
    are what they were.
    """
    norms: list[Any] = batchnorms(model)
    if not norms:
        raise UsageError("reestimate_batchnorm: the model has no BatchNorm that keeps running statistics")
    old = [(n.momentum, [b.clone() for b in n.buffers()]) for n in norms]
    done = False
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch then takes the plain average
                norm.train()
            for batch in take(batches, max_batches):
                run_batch(model, batch, forward)
        done = True
    finally:
        for norm, (momentum, buffers) in zip(norms, old, strict=True):
            norm.momentum = momentum
            if not done or not norm.num_batches_tracked:
                with torch.no_grad():
                    for now, before in zip(norm.buffers(), buffers, strict=True):
                        now.copy_(before)
