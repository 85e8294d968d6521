"""Losses: cross-entropy, and distillation from a float teacher.

Source: Hinton et al., arXiv:1503.02531; LSQ (arXiv:1902.08153) uses temperature 1 and weights both parts 1:1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def distillation_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> torch.Tensor:
    """Compute cross-entropy plus distillation, the mean over the samples.

    CE(logits, target) + weight * T^2 * KL(softmax(teacher_logits / T) || softmax(logits / T))

    KL and the cross-entropy with the teacher's probabilities differ by the teacher's entropy: equal gradients.

    logits: (..., classes) float
    target: (...) int64, class numbers
    teacher_logits: like `logits`; no gradient flows into it
    temperature: T
    weight: of the second term
    """
    classes = logits.shape[-1]
    logits, teacher_logits = logits.reshape(-1, classes), teacher_logits.detach().reshape(-1, classes)
    hard = F.cross_entropy(logits, target.reshape(-1))
    soft = F.kl_div(
        F.log_softmax(logits / temperature, dim=-1),
        F.log_softmax(teacher_logits / temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )
    return hard + weight * temperature**2 * soft


def classification_loss(
    output: torch.Tensor,
    batch: Any,
    teacher_output: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
) -> torch.Tensor:
    """Compute cross-entropy with the class numbers batch[1], or `distillation_loss` with a teacher: `fit`'s default."""
    target = batch[1]
    if teacher_output is None:
        return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))
    return distillation_loss(output, target, teacher_output, temperature=temperature, weight=weight)


def hits(output: Any, batch: Any) -> tuple[torch.Tensor | int, int]:
    """Count (right answers, targets): the former as a tensor on the device; (0, 0) unless batch[1] is class numbers."""
    target = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or not isinstance(output, torch.Tensor):
        return 0, 0
    if output.shape[:-1] != target.shape:
        return 0, 0
    return (output.detach().argmax(-1) == target).sum(), target.numel()
