"""Builds the C++ engine once and loads it: cached by source, torch, compiler and processor; one process builds.

The cache is ``$LSQUANT_CACHE``, else ``$XDG_CACHE_HOME/lsquant``, else ``~/.cache/lsquant``.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lsquant._util.errors import LsquantError

SOURCES = ("quantize.cpp", "products.cpp", "gradients.cpp", "binding.cpp")
ARITHMETIC = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")  # never -ffast-math
LEVELS = {
    "AVX512": ("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}  # by torch's own capability, which ATEN_CPU_CAPABILITY lowers; else the compiler's baseline
SANITIZE = "LSQUANT_SANITIZE"
"""Environment variable for tests: 1 builds an engine that ends the process where it leaves its memory or the language
(`make test-sanitizers`).  The process needs the sanitizer's library in LD_PRELOAD."""
SANITIZERS = (
    "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize=vptr", "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer", "-g1",
)  # fmt: skip  (vptr: torch hides the type information that it needs)


class CannotBuild(LsquantError):
    """No compiler, or it failed; the text says so."""


def cache_folder() -> Path:
    """Return where built engines are kept."""
    if own := os.environ.get("LSQUANT_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lsquant"


def compiler() -> str:
    """Return the C++ compiler: ``$CXX``, g++ or clang++.  Raises: CannotBuild."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise CannotBuild("no C++ compiler was found ($CXX, g++, clang++); install one, for instance the package g++")


def target_flags() -> tuple[str, ...]:
    """Return instruction sets: torch's capability, and the dot-product instruction where the processor has it."""
    flags = LEVELS.get(torch.backends.cpu.get_cpu_capability(), ())
    if "-mavx512vl" in flags and "avx512_vnni" in _processor_flags() and _instructions_allowed():
        flags += ("-mavx512vnni",)
    return flags


def sanitizer_flags() -> tuple[str, ...]:
    """Return the sanitizers where ``LSQUANT_SANITIZE`` is 1, else nothing."""
    return SANITIZERS if os.environ.get(SANITIZE) == "1" else ()


def _instructions_allowed() -> bool:
    """Tell whether ONEDNN_MAX_CPU_ISA, which lowers torch's integer kernels, leaves the dot-product instruction on."""
    return not os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper().startswith(("SSE41", "AVX"))


def _processor_flags() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
    return next((line for line in text.splitlines() if line.startswith("flags")), "")


def library() -> Path:
    """Return the built engine, built now if it is not there.  Raises: CannotBuild."""
    command = compiler()
    folder = Path(__file__).parent
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]
    parts = [torch.__version__, version, platform.machine(), *ARITHMETIC, *target_flags(), *sanitizer_flags()]
    digest = hashlib.sha256("\n".join(parts).encode())
    for source in sorted(folder.glob("*.cpp")) + sorted(folder.glob("*.h")):
        digest.update(source.read_bytes())
    built = cache_folder() / f"engine-{digest.hexdigest()[:20]}.so"
    if built.is_file():
        return built
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with _lock(built.with_suffix(".lock")):
            if not built.is_file():
                _compile(command, folder, built)
    except OSError as error:
        raise CannotBuild(f"{built.parent} cannot be written: {error}; LSQUANT_CACHE names another folder") from error
    return built


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock in one process; the system gives it up when that one dies."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(command: str, folder: Path, built: Path) -> None:
    print("lsquant: building the C++ engine, once (about half a minute) ...", file=sys.stderr, flush=True)
    root = Path(torch.__file__).parent
    include = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    base = [command, "-std=c++20", "-fPIC", "-w", abi, *sanitizer_flags()]
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD" or not sanitizer_flags()}
    with tempfile.TemporaryDirectory(dir=built.parent, prefix="build-") as scratch:
        jobs, objects = [], []
        for source in SOURCES:
            objects.append(str(Path(scratch) / source) + ".o")
            flags = ["-O1", *include] if source == "binding.cpp" else [*ARITHMETIC, *target_flags()]
            job = [*base, *flags, "-c", str(folder / source), "-o", objects[-1]]
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            jobs.append((job, subprocess.Popen(job, **pipes, text=True, env=environment)))
        for job, process in jobs:
            _expect(job, process.communicate()[0], process.returncode)
        aside = str(Path(scratch) / built.name)
        lib = str(root / "lib")
        link = [
            command, "-shared", *sanitizer_flags(), "-o", aside, *objects, f"-L{lib}", "-ltorch_cpu", "-lc10",
            f"-Wl,-rpath,{lib}",
        ]  # fmt: skip
        done = subprocess.run(link, capture_output=True, text=True, check=False, env=environment)
        _expect(link, done.stdout + done.stderr, done.returncode)
        os.replace(aside, built)


def _expect(command: list[str], output: str, code: int) -> None:
    if code:
        said = "\n".join(output.strip().splitlines()[-5:])
        raise CannotBuild(f"the compiler failed ({' '.join(command[:1])} ... {command[-3]}):\n{said}")
