"""Engines: nothing but arithmetic.  One table from name to lazily imported module, and the choice between them.

Every engine has ``quantize`` and ``quantize_backward``; what else one has (``fake_quantize``, ``scale_shift``,
``linear``, ``convolution``, ``weight_gradient``, ``input_gradient``) is used where it fits, else floating point over
codes serves.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType, TracebackType

import torch

from lsquant._util.errors import UsageError
from lsquant.kernels import eager

ENGINES = {"eager": "lsquant.kernels.eager", "cpp": "lsquant.kernels.cpp", "triton": "lsquant.kernels.triton"}
PREFERRED = {"cpu": ("cpp", "eager"), "cuda": ("triton", "eager")}  # by device; eager serves everywhere
TYPES = (torch.float32, torch.bfloat16, torch.float16)  # of input that the fused engines take
VARIABLE = "LSQUANT_ENGINE"  # forces an engine, as use_engine does

_forced: str | None = os.environ.get(VARIABLE) or None
_chosen: dict[str, ModuleType] = {}


def engine(device: str = "cpu", dtype: torch.dtype = torch.float32) -> ModuleType:
    """The module of the engine for tensors on ``device`` ("cpu", "cuda"): the forced one, else the first that runs.

    Other types than ``TYPES`` (float64) are left to plain PyTorch.
    Raises: UsageError naming the reason when the forced one cannot run.
    """
    if dtype not in TYPES:
        return eager
    found = _chosen.get(device)
    found = visible(device) if found is None else found
    return found if found is not None else _choose(device)


def visible(device: str) -> ModuleType | None:
    """The Triton engine where it serves and torch.compile is tracing: the compiler is shown its kernels.  Else None."""
    traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if device != "cuda" or not traced or _forced not in (None, "triton"):
        return None
    from lsquant.kernels import triton  # the compiler cannot trace import_module

    return None if triton.why_not() else triton


def why_not(name: str) -> str:
    """Why an engine cannot run here; empty when it can.  Builds it if it has to be built.

    Raises: UsageError for an unknown name.
    """
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}; engines: {', '.join(ENGINES)}")
    return importlib.import_module(ENGINES[name]).why_not()


def _choose(device: str) -> ModuleType:
    if _forced is not None and device != "meta":
        if reason := why_not(_forced):
            raise UsageError(f"the engine {_forced!r} is forced (use_engine or {VARIABLE}) and cannot run: {reason}")
        name = _forced
    else:
        name = "eager"
        for candidate in PREFERRED.get(device, ()):
            if not (reason := why_not(candidate)):
                name = candidate
                break
            print(f"lsquant: engine {candidate} is off, a slower one serves: {reason}", file=sys.stderr, flush=True)
    _chosen[device] = importlib.import_module(ENGINES[name])
    return _chosen[device]


class use_engine:
    """``use_engine("eager")`` forces an engine from now on, ``use_engine(None)`` chooses the best again.

    As a context manager it does so for a block.  Engines: "eager" (plain PyTorch), "cpp" (C++, CPU), "triton" (CUDA).
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
