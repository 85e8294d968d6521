"""The table of engines and the choice between them.  An engine's module is imported when it is first asked for."""

from __future__ import annotations

import importlib
import os
import sys
from types import TracebackType

import torch

from lsquant._util.errors import UsageError
from lsquant.kernels.eager import ENGINE as EAGER
from lsquant.kernels.engine import Engine

ENGINES = {"eager": "lsquant.kernels.eager", "cpp": "lsquant.kernels.cpp", "triton": "lsquant.kernels.triton"}
"""Name of an engine -> the module whose ``ENGINE`` it is."""

PREFERRED = {"cpu": ("cpp", "eager"), "cuda": ("triton", "eager")}
"""Device -> engines, the fastest first; "eager" runs on every device."""

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Input types that the fused engines take; others (float64) are left to plain PyTorch."""

VARIABLE = "LSQUANT_ENGINE"
"""Environment variable that forces an engine, as ``use_engine`` does."""

_forced: str | None = os.environ.get(VARIABLE) or None
_chosen: dict[str, Engine] = {}


def engine_for(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Engine:
    """Choose the engine for tensors of a device and type: the forced one, else the first of ``PREFERRED`` that runs.

    device: "cpu", "cuda" and so on.
    dtype: of the input.
    Raises: UsageError naming the reason when the forced engine cannot run.
    """
    if dtype not in TYPES:
        return EAGER
    found = _chosen.get(device)
    if found is None:
        found = visible(device)
    return found if found is not None else _choose(device)


def visible(device: str) -> Engine | None:
    """Return the Triton engine where torch.compile is tracing and can be shown its kernels, else None."""
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if device != "cuda" or not traced or _forced not in (None, "triton"):
        return None
    from lsquant.kernels import triton  # the compiler cannot trace import_module

    return None if triton.ENGINE.why_not() else triton.ENGINE


def named(name: str) -> Engine:
    """Import an engine by its name.  Raises: UsageError listing the engines for an unknown name."""
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}; engines: {', '.join(ENGINES)}")
    return importlib.import_module(ENGINES[name]).ENGINE


def why_not(name: str) -> str:
    """Say why an engine cannot run here; empty when it can.  Builds it if it has to be built.

    Raises: UsageError for an unknown name.
    """
    return named(name).why_not()


def _choose(device: str) -> Engine:
    if _forced is not None and device != "meta":
        if reason := why_not(_forced):
            raise UsageError(f"the engine {_forced!r} is forced (use_engine or {VARIABLE}) and cannot run: {reason}")
        chosen = named(_forced)
    else:
        chosen = EAGER
        for candidate in PREFERRED.get(device, ()):
            if not (reason := why_not(candidate)):
                chosen = named(candidate)
                break
            print(f"lsquant: engine {candidate} is off, a slower one serves: {reason}", file=sys.stderr, flush=True)
    _chosen[device] = chosen
    return chosen


class use_engine:
    """Force an engine from now on; ``use_engine(None)`` chooses the fastest available again.

    As a context manager it does so for a block.

    name: "eager" (plain PyTorch), "cpp" (C++, CPU), "triton" (CUDA), or None.
    Raises: UsageError for an unknown engine, or one that cannot run, with the reason.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None and (reason := why_not(name)):
            raise UsageError(f"use_engine({name!r}): it cannot run here: {reason}")
        self._before, _forced = _forced, name
        _chosen.clear()

    def __enter__(self) -> use_engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._before
        _chosen.clear()
