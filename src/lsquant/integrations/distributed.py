"""Processes that train one model together (DistributedDataParallel)."""

from __future__ import annotations

import torch
from torch import distributed, nn

from lsquant.nn import quantizers


@torch.no_grad()
def synchronize(model: nn.Module, source: int = 0) -> None:
    """Give every process the steps, signs and N of process `source`; call it in all of them.

    For processes that calibrated on different batches, or where only `source` calibrated.  DistributedDataParallel
    copies parameters and buffers of process 0 by itself, but not what was decided from them in Python (the sign, hence
    the bounds).  Without a process group only that is read back.
    """
    together = distributed.is_available() and distributed.is_initialized()
    for _, quantizer in quantizers(model):
        if together:
            for tensor in [*quantizer.parameters(), *quantizer.buffers()]:
                distributed.broadcast(tensor, source)
        quantizer._refresh()
