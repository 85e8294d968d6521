"""Latency of several things in turns, so that a machine that slows down slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FEWEST = 7
"""Rounds, below which a median says little."""
SECONDS = 0.05
"""How long one measurement lasts at least: shorter calls are repeated in it."""
MOST_CALLS = 10_000


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call: p50 is the median of the rounds, p20 and p80 the spread."""

    p20: float
    p50: float
    p80: float


def in_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Latency]:
    """Time every call once a round, for ``repeats`` rounds, after two calls that do not count.

    Garbage is collected between rounds only.
    """
    times = {}
    for name, call in calls.items():
        call()
        times[name] = min(MOST_CALLS, 1 + int(SECONDS / max(_seconds(call, 1), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    was_on = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    gc.disable()
    try:
        for _ in range(repeats):
            for name, call in calls.items():
                call()  # the caches still hold what the one before left
                found[name].append(_seconds(call, times[name]))
            gc.collect()
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()
    return {name: Latency(*np.percentile(np.array(s) * 1e3, (20, 50, 80)).tolist()) for name, s in found.items()}


def _seconds(call: Callable[[], Any], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times
