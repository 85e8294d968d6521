"""What a quantizer does to values, counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

import lsquant
import oracle


def array(t: torch.Tensor) -> np.ndarray:
    return t.detach().numpy()


def by_hand(q: lsquant.Quantizer, values: list[np.ndarray]) -> dict[str, Any]:
    """Every field that follows from values and step."""
    step = oracle.guard(array(q.step), array(q.initial_step))
    z: Any = 0
    if q.offset is not None:
        z = oracle.lsq_plus_zero_point(array(q.offset), step, q.q_min, q.q_max)
    kind = {"axis": q.axis} if q.axis is not None else {"group_size": q.spec.group_size}
    quotients, codes, signal, noise = [], [], 0.0, 0.0
    for v in values:
        spread = oracle.spread(z, v.shape, **kind)
        quotients.append((oracle.quotient(v, step, **kind).astype(np.float64) + spread).reshape(-1))
        codes.append(oracle.codes(v, step, q.q_min, q.q_max, z, **kind).reshape(-1))
        v_hat = (codes[-1].reshape(v.shape) - spread) * oracle.spread(step.astype(np.float64), v.shape, **kind)
        signal += float(np.sum(v.astype(np.float64) ** 2))
        noise += float(np.sum((v - v_hat) ** 2))
    every, code = np.concatenate(quotients), np.concatenate(codes)
    counts = np.array([np.sum(code == level) for level in range(q.q_min, q.q_max + 1)])
    share = counts[counts > 0] / counts.sum()
    return {
        "bits": q.spec.bits,
        "levels": q.q_max - q.q_min + 1,
        "steps": step.size,
        "step": float(np.sort(step)[(step.size - 1) // 2]),
        "step_min": float(step.min()),
        "step_max": float(step.max()),
        "initial_step": float(np.sort(array(q.initial_step))[(step.size - 1) // 2]),
        "count": int(q.count),
        "elements": code.size,
        "clip_low": float(np.mean(every < q.q_min)),
        "clip_high": float(np.mean(every > q.q_max)),
        "levels_used": int(np.sum(counts > 0)),
        "entropy": float(-np.sum(share * np.log2(share))),
        "sqnr": 10 * math.log10(signal / noise),
        "spec": str(q.spec),
        "guarded": 0,
    }
