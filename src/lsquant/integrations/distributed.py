"""Processes that train one model together (DistributedDataParallel)."""

from __future__ import annotations

import torch
from torch import distributed, nn

from lsquant.nn import quantizers


@torch.no_grad()
def synchronize(model: nn.Module, source: int = 0) -> None:
    """Give every process the steps, signs and N of process `source`; call it in all of them.

    For processes that calibrated on different batches, or where only `source` calibrated.  DistributedDataParallel
    copies parameters and buffers of process 0 by itself; on an accelerator, and in compiled code, the sign (hence the
    bounds) and N that Python knows are then those of before, until this function reads the buffers again.
    """
    together = distributed.is_available() and distributed.is_initialized()
    for _, quantizer in quantizers(model):
        if together:
            for tensor in [*quantizer.parameters(), *quantizer.buffers()]:
                distributed.broadcast(tensor, source)
        quantizer._refresh()
