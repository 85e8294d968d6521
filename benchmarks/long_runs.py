"""The long CIFAR-10 runs: ResNet-20 at 2/2, 3/3 and 4/4 bits, each without a teacher and with one.

    python benchmarks/long_runs.py --data DIR --init resnet20.safetensors --teacher resnet56.safetensors

Runs that are finished are left alone and one that was stopped goes on, with the bits of one that was not: start the
same command again.  stderr gets a line an epoch.  `--out` (runs/long) has a run directory each; `--results`
(results/long) a JSON each, rewritten when a run ends or is stopped by SIGINT or SIGTERM: metrics of every epoch, seed,
commits, versions, hardware, seconds.  `--collect` only writes these, also of runs that were killed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lsquant import Recipe
from lsquant._util.files import read_json, write_json
from lsquant.tasks import Run, get_task, is_run, open_run, run_training
from lsquant.training import Log


@dataclass(frozen=True)
class Kind:
    """A way to train at each number of bits.

    `lengths`: epochs and learning rate by bits; `says`: in the table of results; `start`: how many bits more the
    network of results/networks has that it starts from (None: the float network); `taught`: against --teacher;
    `settings`: others of the run.
    """

    lengths: dict[int, tuple[int, float]]
    says: str = ""
    start: int | None = None
    taught: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


FLOAT = {2: (40, 0.03), 3: (24, 0.02), 4: (26, 0.05)}
KINDS = {
    "": Kind(FLOAT),
    "-rate": Kind({3: (40, 0.05), 4: (15, 0.01)}, "at another rate"),
    "-teacher": Kind(FLOAT, "with a teacher", taught=True),
    "-more": Kind({2: (10, 0.02), 3: (14, 0.03), 4: (6, 0.03)}, "trained further", start=0),
    "-distill": Kind(
        dict.fromkeys(FLOAT, (9, 0.02)), "further against the float network", start=0, settings={"distill": True}
    ),
    "-next": Kind({2: (12, 0.02), 3: (26, 0.05)}, "from the network of a bit more", start=1),
    # the gradients of the teacher's part are larger at this temperature, hence the low rate
    "-taught": Kind(dict.fromkeys(FLOAT, (12, 0.01)), "further with a teacher", 0, True, {"distill_temperature": 4.0}),
}
RUNS = {
    f"w{bits}a{bits}{name}": (bits, kind) for name, kind in KINDS.items() for bits in (2, 4, 3) if bits in kind.lengths
}
NETWORKS = Path(__file__).resolve().parents[1] / "results" / "networks"


def commit() -> str:
    """The commit of the working tree, with a + if it has changes."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def collect(path: Path, results: Path) -> None:
    """One JSON of a run that is there, finished or not."""
    run = open_run(path)
    rows = [row for row in Log(run.file("log.jsonl")).rows() if row["phase"] == "lsq"]
    keep = ("epoch", "loss", "accuracy", "test_loss", "train_accuracy", "lr", "seconds")
    metrics, commits = run.file("metrics.json"), path.with_suffix(".commits")
    result: dict[str, Any] = {
        "run": path.name, "finished": metrics.is_file(), "epochs_done": len(rows), "settings": run.settings.to_dict(),
        "teacher": run.teacher and Path(run.teacher).name, "start": run.start and Path(run.start).name,
        "model": run.task.options["model"],
        "environment": read_json(run.file("env.json")), "commits": [],
        "rows": [{key: row[key] for key in keep if key in row} for row in rows],
    }  # fmt: skip
    if commits.is_file():
        result["commits"] = list(dict.fromkeys(commits.read_text().splitlines()))
    if metrics.is_file():
        result["metrics"] = read_json(metrics)
    write_json(results / f"{path.name}.json", result)


def stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data")
    parser.add_argument("--init")
    parser.add_argument("--teacher")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, help="by default those of KINDS in this file, as the learning rate")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's threads: a run keeps to them, its bits depend on them")
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    parser.add_argument("--results", type=Path, default=Path("results/long"))
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=[n for n, (_, kind) in RUNS.items() if kind.lengths is FLOAT]
    )
    parser.add_argument("--networks", type=Path, default=NETWORKS, help="files that runs of low bits start from")
    parser.add_argument("--collect", action="store_true")
    a = parser.parse_args(argv)
    for folder in (a.out, a.results):
        folder.mkdir(parents=True, exist_ok=True)
    if a.collect:
        for name in a.only:
            if is_run(a.out / name):
                collect(a.out / name, a.results)
        return
    if a.init is None or (a.teacher is None and any(RUNS[name][1].taught for name in a.only)):
        parser.error("--init and --teacher are needed")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    for name in a.only:
        bits, kind = RUNS[name]
        path, task = a.out / name, get_task("cifar10", data=a.data, model=a.model)
        epochs, lr = kind.lengths[bits]
        options = {"epochs": a.epochs or epochs, "lr": a.lr or lr, "seed": a.seed, "threads": a.threads}
        settings = replace(task.settings, weight_decay_by_bits=True, **{**options, "distill": False, **kind.settings})
        run = Run(path, task, Recipe.preset(f"w{bits}a{bits}"), settings, a.init, a.teacher if kind.taught else None)
        if kind.start is not None:
            file = f"cifar10-{a.model}-w{bits + kind.start}a{bits + kind.start}.safetensors"
            run = replace(run, start=str(a.networks / file))
        if not run.file("metrics.json").is_file():
            print(f"{name}: {'going on' if is_run(path) else 'starting'}", file=sys.stderr, flush=True)
            with path.with_suffix(".commits").open("a") as file:
                print(commit(), file=file)
        try:
            run_training(run, resume=True, checkpoint_every=100)
        finally:
            if is_run(path):
                collect(path, a.results)


if __name__ == "__main__":
    main()
