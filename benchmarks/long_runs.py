"""The long CIFAR-10 runs: ResNet-20 at 2/2, 3/3 and 4/4 bits, each without a teacher and with ResNet-56.

    python benchmarks/long_runs.py --data DIR --init resnet20.safetensors --teacher resnet56.safetensors

Runs that are finished are left alone and one that was stopped goes on, with the bits of one that was not: start the
same command again.  `--out` (runs/long) has a run directory each; `--results` (results/long) a JSON each, rewritten
when a run ends or is interrupted: metrics of every epoch, seed, commits, versions, hardware, seconds.  `--collect` only
writes these, also of runs that were killed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from lsquant import Recipe
from lsquant._util.files import read_json, write_json
from lsquant.tasks import Run, get_task, is_run, open_run, run_training
from lsquant.training import Log

RUNS = {f"w{b}a{b}{'-teacher' if teacher else ''}": (b, teacher) for teacher in (False, True) for b in (2, 4, 3)}


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
    metrics, file = run.file("metrics.json"), results / f"{path.name}.json"
    commits = read_json(file)["commits"] if file.is_file() else []
    result: dict[str, Any] = {
        "run": path.name, "finished": metrics.is_file(), "epochs_done": len(rows), "settings": run.settings.to_dict(),
        "teacher": run.teacher and Path(run.teacher).name, "model": run.task.options["model"],
        "environment": read_json(run.file("env.json")), "commits": list(dict.fromkeys([*commits, commit()])),
        "rows": [{key: row[key] for key in keep if key in row} for row in rows],
    }  # fmt: skip
    if metrics.is_file():
        result["metrics"] = read_json(metrics)
    write_json(file, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data")
    parser.add_argument("--init")
    parser.add_argument("--teacher")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/long"))
    parser.add_argument("--results", type=Path, default=Path("results/long"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--collect", action="store_true")
    a = parser.parse_args()
    a.results.mkdir(parents=True, exist_ok=True)
    for name in a.only if not a.collect else ():
        bits, teacher = RUNS[name]
        path = a.out / name
        if is_run(path):
            run = open_run(path, **({"data": a.data} if a.data else {}))
        else:
            task = get_task("cifar10", data=a.data, model=a.model)
            settings = replace(task.settings, epochs=a.epochs, seed=a.seed, weight_decay_by_bits=True)
            run = Run(path, task, Recipe.preset(f"w{bits}a{bits}"), settings, a.init, a.teacher if teacher else None)
        print(f"{name}: {'going on' if is_run(path) else 'starting'}", file=sys.stderr, flush=True)
        try:
            run_training(run, resume=is_run(path), checkpoint_every=100)
        finally:
            if is_run(path):
                collect(path, a.results)
    if a.collect:
        for path in sorted(a.out.iterdir()):
            if is_run(path):
                collect(path, a.results)


if __name__ == "__main__":
    main()
