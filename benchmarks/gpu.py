"""The Triton engine on a GPU, in one command of at most ten minutes: is it exact, how fast is it, what memory it takes.

    python benchmarks/gpu.py                        # everything, to results/bench/gpu.csv, and as a table on stdout
    python benchmarks/gpu.py --only cases int_mm    # these sections
    python benchmarks/gpu.py --tiny --out gpu.csv   # without a GPU: tiny sizes, Triton's interpreter

Needs PyTorch with CUDA and safetensors; lsquant need not be installed, and no C++ is built.  The sections, in order:

cases      the table of tests/helpers/cases.py against tests/oracle.py: codes, outputs and gradients; layers over codes
quantizer  forward and backward over ``x * 1.0`` forward and backward, each checked first
int_mm     ``torch._int_mm`` over int8 codes: its sums, and its time over that of a bfloat16 product
compile    a compiled model is one graph and gives the codes of the eager one
networks   a training step of a ResNet-18 and of a ViT at 4/4 bits over the float step, both under bfloat16 autocast

A section runs in a process of its own (--tiny: one for all), so that what stops one does not stop the others.  What
does not begin within --budget seconds is skipped; the table names it.  Exit code 1: something failed, and its row says
what; 2: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "src"))  # the last: an installed lsquant comes before it
try:
    import memory
    import numpy as np
    import tables
    import timing
    import torch
    from gpu_sections import FAILED, NEEDS_CUDA, OK, SECTIONS, SKIPPED, Row, rows_of, settings, skipped
    from timing import Options, say

    import lsquant
    from lsquant._util.files import atomic_write_text
    from lsquant.diagnostics.environment import processor
except ModuleNotFoundError as missing:
    sys.exit(f"benchmarks/gpu.py needs {missing.name}, which is not installed: pip install {missing.name}")

MARK = "gpu.py: "  # begins the lines that a section's process writes for the one that started it
BUDGET, GRACE = 540.0, 30.0  # seconds; a process that runs longer than what is left and the grace is stopped


def child(sections: Sequence[str], options: Options, seconds: float) -> None:
    """Run sections in this process; every row is written when it is known."""
    deadline = time.monotonic() + seconds
    for section in sections:
        for row in rows_of(section, options, deadline):
            print("\n" + MARK + json.dumps(asdict(row)), flush=True)
        print("\n" + MARK + json.dumps({"finished": section}), flush=True)


def listen(command: Sequence[str], sections: Sequence[str], limit: float, variables: Mapping[str, str]) -> list[Row]:
    """The rows that a process writes within ``limit`` seconds, and one for each of its sections that has no end."""
    start, found, finished = time.monotonic(), [], set()
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True, "env": {**os.environ, **variables}}
    # in a session of its own: the compiler's processes are stopped with it
    with subprocess.Popen(command, **options, start_new_session=True) as process:
        stop = threading.Timer(limit, stopped, [process.pid])
        stop.start()
        try:
            for line in process.stdout or ():
                if not line.startswith(MARK):
                    say(line.rstrip())
                    continue
                message = json.loads(line.removeprefix(MARK))
                if "finished" in message:
                    finished.add(message["finished"])
                else:
                    found.append(Row(**message))
            code = process.wait()
        except BaseException:
            stopped(process.pid)
            raise
        finally:
            stop.cancel()
    late = time.monotonic() - start >= limit
    reason = f"its process was stopped after {limit:.0f} s" if late else f"its process ended with code {code}"
    lost = [Row(name, "the rest of it", status=FAILED, check=reason) for name in sections if name not in finished]
    return [*found, *lost]


def stopped(session: int) -> None:
    """Stop what runs in a session that was started here."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)


def collected(sections: Sequence[str], tiny: bool, budget: float, write: Callable[[Sequence[Row]], None]) -> list[Row]:
    """The rows of all sections; write: is called with those that are there after every process."""
    deadline = time.monotonic() + budget
    found: list[Row] = []
    # the interpreter is chosen when Triton is imported, in the process of a section
    variables = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if tiny else {"TRITON_INTERPRET": "0"}
    for group in [sections] if tiny else [[name] for name in sections]:
        left = deadline - time.monotonic()
        if left > 0:
            command = [sys.executable, __file__, "--child", "--budget", f"{left:.1f}", "--only", *group]
            found += listen(command + (["--tiny"] if tiny else []), group, left + GRACE, variables)
        else:
            found += [skipped(name, "all of it") for name in group]
        write(found)
    return found


def place(tiny: bool) -> dict[str, Any]:
    """Device, processor, threads and versions.  ``timing.machine`` would build the C++ engine."""
    device = f"cpu {torch.backends.cpu.get_cpu_capability()}, Triton's interpreter"
    if not tiny:
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    versions = {"lsquant": lsquant.__version__, "torch": torch.__version__, "numpy": np.__version__,
                "triton": timing.version("triton") or "absent"}  # fmt: skip
    python, commit = ".".join(map(str, sys.version_info[:3])), timing.commit() if shutil.which("git") else "no commit"
    text = ", ".join([f"python {python}", *(f"{name} {version}" for name, version in versions.items()), commit])
    return {"device": device, "processor": processor(), "threads": torch.get_num_threads(), "versions": text}


def write_csv(path: Path, where: Mapping[str, Any], found: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*(f.name for f in fields(Row)), *where], lineterminator="\n")
    writer.writeheader()
    for row in found:
        numbers = {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in asdict(row).items()}
        writer.writerow({**numbers, **where})
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, text.getvalue())


def table(rows: tables.Rows) -> str:
    """The rows of the CSV file in Markdown."""
    lines = []
    for row in rows:
        value = f"{tables.spread(row) if row['unit'] in ('ms', 'MiB') else row['p50']} {row['unit']}"
        ratio = f"{float(row['ratio']):.2f} times {row['baseline']}" if float(row["ratio"]) else ""
        ratio = "1" if row["contender"] and row["contender"] == row["baseline"] else ratio
        peak = f"{int(row['peak_bytes']) / memory.MIB:,.0f}" if int(row["peak_bytes"]) else ""
        cells = [row["section"], row["what"], row["contender"], value if int(row["repeats"]) else "", ratio, peak]
        lines.append([cell.replace("|", "/") for cell in (*cells, row["status"], row["check"])])
    head = ("section", "what", "contender", "p50 (p20 to p80)", "ratio", "peak, MiB", "status", "check")
    where = "; ".join(rows[0][name] for name in ("device", "processor", "versions")) if rows else ""
    return "\n".join([f"*{where}.*", "", *tables.table(head, lines)])


def summary(found: Sequence[Row]) -> str:
    """How many rows have which status; what failed and what was skipped, by name."""
    counts = {status: sum(row.status == status for row in found) for status in (OK, FAILED, NEEDS_CUDA, SKIPPED)}
    lines = [f"{len(found)} rows: " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    for status in (FAILED, SKIPPED):
        named = [f"{row.section} ({', '.join(filter(None, (row.what, row.contender)))})" for row in found
                 if row.status == status]  # fmt: skip
        lines += [f"{status}: {'; '.join(named)}"] if named else []
    return "\n".join(lines)


def exit_code(found: Sequence[Row]) -> int:
    return int(any(row.status == FAILED for row in found))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
                        help=f"any of {', '.join(SECTIONS)}; default: all")  # fmt: skip
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS",
                        help=f"what does not begin within it is skipped; default {BUDGET:.0f}")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/bench/gpu.csv"))
    parser.add_argument("--tiny", action="store_true", help="on the CPU, sizes that only show that everything runs")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # how it starts itself for a section
    a = parser.parse_args(arguments)
    sections = [name for name in SECTIONS if name in a.only]
    if a.child:
        warnings.simplefilter("ignore")  # other packages' own affairs
        child(sections, settings(a.tiny), a.budget)
        return 0
    if not (a.tiny or torch.cuda.is_available()):
        print("There is no CUDA device: benchmarks/gpu.py measures on one; --tiny runs without.", file=sys.stderr)
        return 2
    where = place(a.tiny)
    found = collected(sections, a.tiny, a.budget, lambda rows: write_csv(a.out, where, rows))
    print(table(tables.read(a.out)), "", summary(found), sep="\n")
    say(f"written: {a.out}")
    return exit_code(found)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who stops it stops the process of the section as well
    sys.exit(main())
