"""Versions, processor and threads, for bug reports and a run's env.json.  No names of machines or folders."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import torch

from lsquant import kernels

_PACKAGES = (
    "lsquant", "torch", "numpy", "safetensors", "onnx", "onnxruntime", "onnxscript", "scikit-learn", "matplotlib",
    "transformers", "triton", "openvino", "gguf",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """Describe the environment: versions of Python and of the packages, the hardware, and each engine.

    Packages that are absent are left out, and none is imported.  An engine is "on", or says why it is off; one that has
    to be built is built.
    """
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        **({"engine_forced": os.environ[kernels.VARIABLE]} if kernels.VARIABLE in os.environ else {}),
        "engines": {name: kernels.why_not(name) or "on" for name in kernels.ENGINES},
        "packages": packages,
    }


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()
