"""Synchronization of processes that train one model together (DistributedDataParallel)."""

from __future__ import annotations

import torch
from torch import distributed, nn

from lsquant.nn import quantizers


@torch.no_grad()
def synchronize(model: nn.Module, source: int = 0) -> None:
    """Broadcast steps, signs and N from process `source`; call it in every process.

    It is for processes that calibrated on different batches, or where only `source` calibrated. DistributedDataParallel
    broadcasts parameters and buffers of process 0 by itself. On an accelerator, and in compiled code, Python then still
    has the sign (hence the bounds) and N of before; this function reads the buffers again, with or without a process
    group.
    """
    together = distributed.is_available() and distributed.is_initialized()
    for _, quantizer in quantizers(model):
        if together:
            for tensor in [*quantizer.parameters(), *quantizer.buffers()]:
                distributed.broadcast(tensor, source)
        quantizer._refresh()
