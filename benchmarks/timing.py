"""What every speed benchmark shares: contenders measured in turns, rows, CSV files, profiles.

One round measures each contender once (A B C, A B C, ...), so that a machine that slows down slows all of them.  Calls
shorter than ``Options.seconds`` are repeated within one measurement, and are preceded by one that is not measured.
"""

from __future__ import annotations

import csv
import gc
import io
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lsquant
from lsquant._util.files import atomic_write_text
from lsquant.diagnostics.environment import environment

VERSIONS = ("lsquant", "torch", "numpy", "triton", "brevitas", "torchao")


@dataclass(frozen=True)
class Options:
    """What the command line decides; ``tiny`` takes sizes that only show that everything runs."""

    out: Path = Path("results/bench")
    only: Sequence[str] = ()
    repeats: int = 15
    warmup: int = 2
    seconds: float = 0.02
    device: str = "cpu"
    autocast: bool = False
    profile: bool = False
    tiny: bool = False

    def selects(self, name: str) -> bool:
        """Whether a contender is asked for: one of ``only`` occurs in its name, any case."""
        return not self.only or any(part.lower() in name.lower() for part in self.only)

    def chosen(self, baselines: dict[str, str]) -> list[str]:
        """Of contenders with their baselines, those that are asked for and the baselines these need."""
        needed = {baseline for name, baseline in baselines.items() if self.selects(name)}
        return [name for name in baselines if name in needed or self.selects(name)]


@dataclass
class Contender:
    """One way of computing the workload.

    call: runs it once; None when it is left out.  baseline: the contender that the ratio is taken to.
    engine: lsquant's engine, forced while it is measured.  check: what it computed, or why it is left out.
    timer: seconds of one call, of so many in a row, for what runs elsewhere; it is then asked instead of ``call``.
    """

    name: str
    call: Callable[[], Any] | None
    baseline: str
    engine: str | None = None
    check: str = ""
    profile: bool = False
    seconds: list[float] = field(default_factory=list)
    timer: Callable[[int], float] | None = None

    def time(self, times: int, device: str) -> float:
        """Seconds of one call, from ``times`` in a row."""
        return self.timer(times) if self.timer is not None else _timed(self.call, times, device)


@dataclass(frozen=True)
class Row:
    """One line of a CSV file.  Times and sizes are 0 with ``repeats`` 0 for a contender that was left out."""

    workload: str
    configuration: str
    phase: str
    contender: str
    unit: str
    p20: float
    p50: float
    p80: float
    repeats: int
    ratio: float
    baseline: str
    check: str
    device: str
    processor: str
    threads: int
    versions: str


def measure(contenders: Sequence[Contender], options: Options) -> None:
    """Fill ``seconds`` of every contender, one entry a round.  Garbage is collected between rounds only."""
    running = [c for c in contenders if c.call is not None]
    inner: dict[str, int] = {}
    for contender in running:
        with lsquant.use_engine(contender.engine):
            for _ in range(options.warmup):
                once = contender.time(1, options.device)
                inner[contender.name] = min(max(1, int(options.seconds / max(once, 1e-6))), 10_000)
    gc.collect()
    gc.freeze()  # what is there already need not be looked at again
    gc.disable()
    try:
        for _ in range(options.repeats):
            for contender in running:
                times = inner[contender.name]
                with lsquant.use_engine(contender.engine):
                    if times > 1:
                        contender.time(1, options.device)
                    contender.seconds.append(contender.time(times, options.device))
            gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()


def _timed(call: Callable[[], Any] | None, times: int, device: str) -> float:
    """Seconds of one call, from ``times`` in a row."""
    assert call is not None
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def rows(workload: str, configuration: str, phase: str, contenders: Sequence[Contender], options: Options,
         unit: str = "ms", factor: float = 1e3) -> Iterator[Row]:  # fmt: skip
    """One row a contender; the ratio is p50 over the baseline's p50."""
    middle = {c.name: float(np.median(c.seconds)) for c in contenders if c.seconds}
    for c in contenders:
        p20, p50, p80 = (np.percentile(c.seconds, (20, 50, 80)) * factor).tolist() if c.seconds else (0.0, 0.0, 0.0)
        ratio = middle[c.name] / middle[c.baseline] if c.seconds and middle.get(c.baseline) else 0.0
        yield Row(
            workload, configuration, phase, c.name, unit, p20, p50, p80, len(c.seconds), ratio, c.baseline, c.check,
            *machine(options.device),
        )  # fmt: skip


def machine(device: str) -> tuple[str, str, int, str]:
    """Device, processor, threads and versions; the commit has a + when the working tree has changes."""
    facts = environment()
    found = {name: facts["packages"].get(name) or version(name) for name in VERSIONS}
    versions = ", ".join([f"{name} {version}" for name, version in found.items() if version])
    where = f"cpu {facts['cpu_capability']}" if device == "cpu" else torch.cuda.get_device_name()
    return where, facts["processor"], torch.get_num_threads(), f"python {facts['python']}, {versions}, {commit()}"


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit this file is from."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", "../src", ".")
    return f"commit {git('rev-parse', '--short=10', 'HEAD') or 'unknown'}{'+' if changed else ''}"


def report(workload: str, found: Sequence[Row], options: Options) -> Path:
    """Write ``<out>/<workload>.csv`` and show the rows on stdout."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(Row)])
    for row in found:
        values = [getattr(row, f.name) for f in fields(Row)]
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{workload}.csv"
    atomic_write_text(path, text.getvalue())
    return path


def show(found: Sequence[Row]) -> None:
    """One line a row, on stdout."""
    if found:
        print(f"\n{found[0].workload}: {found[0].configuration}, {found[0].phase}")
    for row in found:
        if not row.repeats:
            print(f"  {row.contender:32} {row.check}")
            continue
        spread = f"{row.p50:10.3f} {row.unit} ({row.p20:.3f} to {row.p80:.3f})"
        print(f"  {row.contender:32} {spread:36} {row.ratio:6.2f} x {row.baseline}; {row.check}", flush=True)


def profile(workload: str, contender: Contender, options: Options) -> None:
    """``<out>/profile-<workload>-<contender>.txt``: the 15 operators that take the most time themselves, 3 calls."""
    assert contender.call is not None
    kinds = [torch.profiler.ProfilerActivity.CPU]
    by = "self_cpu_time_total"
    if options.device != "cpu":
        kinds, by = [*kinds, torch.profiler.ProfilerActivity.CUDA], "self_cuda_time_total"
    with lsquant.use_engine(contender.engine):
        contender.call()
        with torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(3):
                contender.call()
            _wait(options.device)
    table = profiler.key_averages().table(sort_by=by, row_limit=15, max_name_column_width=60)
    name = re.sub(r"[^a-z0-9]+", "-", f"{workload} {contender.name}".lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    head = f"{workload}, {contender.name}, 3 calls; {'; '.join(map(str, machine(options.device)))}\n"
    atomic_write_text(options.out / f"profile-{name}.txt", head + table + "\n")


def forget_compiled() -> None:
    """Drop what was compiled before: its limit of variants counts per function.  Importing the compiler takes long."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
