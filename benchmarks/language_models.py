"""A small language model at few bits: float, rounded by least squares, trained; perplexity and bytes.

    python benchmarks/stories260k.py --data DIR --out FOLDER
    python benchmarks/language_models.py --model FOLDER --data TEXT.txt --valid OTHER.txt --runs runs/text
    python benchmarks/language_models.py                   # the table of docs/text.md alone, from results/text

Every recipe is a run of `lsquant train text`, resumed where it was stopped; results/text/NAME.json is written when it
has ended.  --only names recipes.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
from tables import ROOT, replaced, table

import lsquant
from lsquant._util.files import atomic_write_text, read_json, write_json
from lsquant.diagnostics.environment import environment
from lsquant.runs import Run, run_training
from lsquant.tasks import get_task, open_run

RESULTS = ROOT / "results" / "text"
RATES = {"w8g32": 1e-4, "w4g32": 3e-4, "w3g32": 1e-3, "w2g32": 2e-3, "ternaryg32": 2e-3}
"""Recipe -> learning rate of Adam."""


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """A parser of the options that the benchmarks of language models share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER")
    parser.add_argument("--data", nargs="+", metavar="FILE")
    parser.add_argument("--valid", nargs="+", metavar="FILE")
    parser.add_argument("--runs", type=Path, default=Path("runs/text"), metavar="DIR")
    return parser


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=RATES, default=list(RATES), metavar="RECIPE")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.model:
        measure(arguments)
    place = ROOT / "docs" / "text.md"
    atomic_write_text(place, replaced(place.read_text(encoding="utf-8"), {"text": page()}.__getitem__))


def page() -> str:
    """Return the table of what is in results/text."""
    rows = sorted(map(read_json, RESULTS.glob("*.json")), key=lambda r: (r["model"], list(RATES).index(r["recipe"])))
    head = ["model", "weights", "float, nats a token", "rounded by least squares", "trained"]
    head += ["share of the excess left", "bytes, packed", "steps"]
    cells = [
        [r["model"], f"`{r['recipe']}`", *(f"{r[key]['loss']:.3f}" for key in ("float", "rounded")),
         f"**{r['lsq']['loss']:.3f}**", f"{r['share_of_excess']:.2f}", f"{r['packed_bytes']:,}", str(r["steps"])]
        for r in rows
    ]  # fmt: skip
    return "\n".join(table(head, cells))


def measure(arguments: argparse.Namespace) -> None:
    """Train, or go on with, the runs that were asked for, and write their results."""
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
        RESULTS.mkdir(parents=True, exist_ok=True)
        write_json(RESULTS / f"{name}-{recipe}.json", row)
        print(recipe, {key: round(value["loss"], 4) for key, value in results.items()}, row["share_of_excess"])


if __name__ == "__main__":
    main()
