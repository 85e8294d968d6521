"""A small language model at few bits: float, rounded by least squares, trained; perplexity and bytes.

    python benchmarks/stories260k.py --data DIR --out FOLDER
    python benchmarks/language_models.py --model FOLDER --data TEXT.txt --valid OTHER.txt --runs runs/text

Every recipe is a run of `lsquant train text`, resumed where it was stopped; results/text/NAME.json is written when it
has ended.  --only names recipes.  `python benchmarks/results.py` makes the table of docs/text.md from these files.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import replace
from pathlib import Path

import torch

import lsquant
from lsquant._util.files import write_json
from lsquant.diagnostics.environment import environment
from lsquant.runs import Run, run_training
from lsquant.tasks import get_task, open_run

RESULTS = Path(__file__).parent.parent / "results" / "text"
RATES = {"w8g32": 1e-4, "w4g32": 3e-4, "w3g32": 1e-3, "w2g32": 2e-3, "ternaryg32": 2e-3}
"""Recipe -> learning rate of Adam."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--valid", required=True, nargs="+", metavar="FILE")
    parser.add_argument("--runs", type=Path, default=Path("runs/text"), metavar="DIR")
    parser.add_argument("--only", nargs="+", choices=RATES, default=list(RATES), metavar="RECIPE")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    name = Path(arguments.model).name
    for recipe in arguments.only:
        task = get_task("text", model=arguments.model, data=arguments.data, valid=arguments.valid)
        settings = replace(task.settings, lr=RATES[recipe], epochs=arguments.epochs, threads=arguments.threads)
        run = Run(arguments.runs / f"{name}-{recipe}", task, task.preset(recipe), settings)  # type: ignore[attr-defined]
        metrics = run_training(run, resume=run.path.exists())
        model = open_run(run.path).model()
        packed = lsquant.export_packed(model, run.path / "export" / "packed.safetensors")
        results = {key: metrics[key] for key in ("float", "rounded", "lsq")}
        excess = [results[key]["loss"] - results["float"]["loss"] for key in ("lsq", "rounded")]
        row = {
            "model": name, "recipe": recipe, **results, "share_of_excess": excess[0] / excess[1],
            "steps": settings.epochs * task.steps_per_epoch(settings.batch_size),
            "tokens_a_step": settings.batch_size * task.options["sequence"], "lr": settings.lr, "seed": settings.seed,
            "seconds": metrics["seconds"], "packed_bytes": packed.stat().st_size, "commit": commit.strip(),
            "float_bytes": sum(4 * p.numel() for p in task.model().parameters()),
            "hardware": environment(), "torch": torch.__version__,
        }  # fmt: skip
        write_json(RESULTS / f"{name}-{recipe}.json", row)
        print(recipe, {key: round(value["loss"], 4) for key, value in results.items()}, row["share_of_excess"])


if __name__ == "__main__":
    main()
