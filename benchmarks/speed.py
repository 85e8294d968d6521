"""Speed and memory of lsquant, of the float model and of other libraries, in one run.

    python benchmarks/speed.py                      # everything, to results/bench/*.csv
    python benchmarks/speed.py resnet20 --threads 2 --profile
    python benchmarks/speed.py quantizer --only lsquant core --repeats 7
    python benchmarks/tables.py                     # the tables of docs/benchmarks.md

Workloads: quantizer, resnet20, resnet18, vit, bert, memory, collection.  Brevitas and torchao take part
where they are installed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import collection
import memory
import network_speed
import quantizer_speed
import torch
from networks import WORKLOADS
from timing import Options, report, say

OTHERS = {"quantizer": quantizer_speed.run, "memory": memory.run, "collection": collection.run}
NAMES = ("quantizer", *WORKLOADS, "memory", "collection")
MEMORY_REPEATS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=f"any of {', '.join(NAMES)}; none: all")
    parser.add_argument("--only", nargs="+", default=(), help="contenders with these in their names, and baselines")
    parser.add_argument("--repeats", type=int, help=f"default 15 (memory: {MEMORY_REPEATS} processes each)")
    parser.add_argument("--threads", type=int, help="torch's threads; default: torch's choice")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--autocast", action="store_true", help="networks under bfloat16 autocast")
    parser.add_argument("--profile", action="store_true", help="also tables of the operators that take most time")
    parser.add_argument("--tiny", action="store_true", help="sizes that only show that everything runs")
    parser.add_argument("--out", type=Path, default=Path("results/bench"))
    a = parser.parse_args(arguments)
    if unknown := sorted(set(a.workloads) - set(NAMES)):
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(NAMES)}")
    if (a.repeats is not None and a.repeats < 1) or (a.threads is not None and a.threads < 1):
        parser.error("--repeats and --threads are at least 1")
    if a.threads:
        torch.set_num_threads(a.threads)
    warnings.simplefilter("ignore")  # other packages' own affairs
    for name in a.workloads or NAMES:
        options = Options(
            a.out, a.only, a.repeats or (MEMORY_REPEATS if name == "memory" else 15), 1 if a.tiny else 2,
            0.0 if a.tiny else 0.02, a.device, a.autocast, a.profile, a.tiny,
        )  # fmt: skip
        if name in WORKLOADS:
            found = network_speed.run(name, options)
        else:
            found = OTHERS[name](options)
        if found:
            say(f"written: {report(name + ('-autocast' if a.autocast and name in WORKLOADS else ''), found, options)}")


if __name__ == "__main__":
    main()
