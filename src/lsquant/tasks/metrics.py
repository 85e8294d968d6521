"""Metrics that tasks share."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional as F

from lsquant._util.batches import evaluating


def classification_metric(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Measure a classifier, in eval mode.

    batches: of (input, target), the target class numbers (n,) int64

    Returns accuracy: percent of the samples whose largest logit is the label's; test_loss: the mean cross-entropy.
    """
    right, loss, count = 0, 0.0, 0
    with evaluating(model):
        for x, y in batches:
            logits = model(x)
            right += int((logits.argmax(-1) == y).sum())
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            count += len(y)
    return {"accuracy": 100.0 * right / count, "test_loss": loss / count}
