"""The results: networks of the long runs as packed files with their verdicts, and the tables of the documentation.

    python benchmarks/results.py --runs runs/long --data DIR    # files and verdicts of finished runs, then the page
    python benchmarks/results.py --measure --data DIR           # the accuracy of the kept files again, then the page
    python benchmarks/results.py                                # the pages alone, from what is in results/

Every finished run of long_runs.py is exported in every profile, and every file compared with the trained model on all
test images, as by ``lsquant export`` and ``lsquant verify``.  ``results/networks`` gets the packed file of each, and a
JSON with accuracy, sizes and verdicts; ``results/long`` the metrics (long_runs.py).  The pages are docs/results.md and
docs/pilot.md, with docs/figures/transition-rate.svg.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from long_runs import RUNS, collect
from tables import ROOT, replaced, table

from lsquant import Verdict, export_onnx, export_packed, load_packed, to_integer, verify
from lsquant._util.files import atomic_write, atomic_write_text, read_json, write_json
from lsquant.formats import file_format
from lsquant.tasks import get_task, is_run, open_run

PILOT = "pilot: "  # how a run of the pilot of equal budgets begins in the table of runs
PROFILES = ("packed", "exact", "small", "qdq")
TRAINING_IMAGES = 50_000  # of CIFAR-10


def summary(verdict: Verdict, size: int) -> dict[str, Any]:
    """Size, level, and of every comparison the elements, how many differ and by how much at most."""
    plain = {} if verdict.plain is None else {"plain": verdict.plain.level}
    checks = [[c.what, c.compared, c.mismatches, c.largest] for c in verdict.checks]
    about = {"bytes": size, "runtime": verdict.runtime, "level": verdict.level, **plain}
    return {**about, "samples": verdict.samples, "checks": checks}


def publish(path: Path, data: str | None, networks: Path) -> None:
    """Files and verdicts of one finished run."""
    run = open_run(path, **({"data": data} if data else {}))
    model, batches = run.model(), partial(run.task.batches, "test", batch_size=250)
    name, example = f"{run.task.name}-{run.task.options['model']}-{path.name}", run.task.example_input()
    files: dict[str, Any] = {}
    for profile in PROFILES:
        file = run.file(f"export/{file_format(profile).file_name}")
        if profile == "packed":
            export_packed(model, file)
        else:
            export_onnx(model, file, example, profile=profile)
        verdict = verify(model, file, batches())
        files[profile] = summary(verdict, file.stat().st_size)
        print(f"{name}, {profile}: {verdict.level}", file=sys.stderr, flush=True)
    shipped = run.file("export/packed.safetensors")
    integer = to_integer(load_packed(run.task.model(), shipped))
    shutil.copyfile(shipped, networks / f"{name}.safetensors")
    facts = {"run": path.name, "task": run.task.name, "model": run.task.options["model"]}
    write_json(networks / f"{name}.json", {**facts, **run.task.metric(integer), "files": files})


def measure(facts: Path, data: str | None) -> None:
    """The accuracy of a kept file, as the integer model has it here."""
    kept = read_json(facts)
    task = get_task(kept["task"], data=data, model=kept["model"])
    integer = to_integer(load_packed(task.model(), facts.with_suffix(".safetensors")))
    write_json(facts, {**kept, **task.metric(integer)})


def read(folder: Path) -> list[dict[str, Any]]:
    """All JSON files of a folder, in the order of the runs."""
    return sorted(map(read_json, folder.glob("*.json")), key=lambda facts: list(RUNS).index(facts["run"]))


def runs(found: Sequence[dict[str, Any]]) -> str:
    """A line a run, finished or not."""
    head = ("bits, weights/inputs", "test accuracy", "over float", "before", "epochs", "learning rate", "minutes")
    lines, environments = [], []
    for run in found:
        if RUNS[run["run"]].says.startswith(PILOT):
            continue
        settings, metrics, rows = run["settings"], run.get("metrics"), run["rows"]
        plan = RUNS[run["run"]]
        says = f"{plan.says}: {run['teacher']}" if plan.taught else plan.says
        what = ", ".join(filter(None, (plan.bits, says)))
        if metrics is None:
            accuracy, gap, rounded = f"({rows[-1]['accuracy']:.2f} % so far)" if rows else "", "", ""
        else:
            accuracy, floating = metrics["lsq"]["accuracy"], metrics["float"]["accuracy"]
            before = metrics.get("start", metrics["rounded"])["accuracy"]
            gap, rounded = f"{accuracy - floating:+.2f}", f"{before:.2f} %"
            accuracy = f"**{accuracy:.2f} %**"
        epochs = f"{run['epochs_done']}" if metrics else f"{run['epochs_done']} of {settings['epochs']}"
        minutes = f"{sum(row['seconds'] for row in rows) / 60:.0f}"
        lines.append((what, accuracy, gap, rounded, epochs, f"{settings['lr']:g}", minutes))
        commits = ", ".join(commit[:7] for commit in run["commits"])
        where = run["environment"]
        environments.append(
            f"- {what}: seed {settings['seed']}, commit {commits}, log `results/long/{run['run']}.json`; "
            f"{where['processor']}, {where['cpu_capability']}, {settings['threads']} thread of {where['cores']} cores, "
            f"torch {where['packages']['torch']}"
        )
    return "\n".join([*table(head, lines), "", *environments])


def methods(found: Sequence[dict[str, Any]]) -> str:
    """A line a run of the pilot of equal budgets: accuracy by epoch."""
    pilots = [run for run in found if RUNS[run["run"]].says.startswith(PILOT) and run["rows"]]
    head = ("way", "test accuracy after epoch 1", "2", "5", "8", "10", "mean of 8 to 10", "loss", "commit")
    lines = []
    for run in pilots:
        accuracy = {row["epoch"]: row["accuracy"] for row in run["rows"]}
        cells = [f"{accuracy[e]:.2f} %" if e in accuracy else "" for e in (1, 2, 5, 8, 10)]
        last = [accuracy[e] for e in (8, 9, 10) if e in accuracy]
        mean = f"{sum(last) / 3:.2f} %" if len(last) == 3 else ""
        commits = ", ".join(commit[:7] for commit in run["commits"])
        says = RUNS[run["run"]].says.removeprefix(PILOT)
        cells[-1] = f"**{cells[-1]}**" if cells[-1] else ""
        lines.append((says, *cells, mean, f"{run['rows'][-1]['loss']:.3f}", commits))
    return "\n".join(table(head, lines))


def within(found: Sequence[dict[str, Any]]) -> str:
    """A line a run with a transition rate: how far K was from R at most, between 10 and 75 % of the run."""
    head = ("run", "steps", "K / R between 10 and 75 % of the run", "U at first", "U half way")
    lines = []
    for run in found:
        total = -(-TRAINING_IMAGES // run["settings"]["batch_size"]) * run["settings"]["epochs"]
        part = [(k / r) for t, k, r, _ in run.get("trace", ()) if 0.1 <= t / total <= 0.75]
        rates = {t: u for t, _, _, u in run.get("trace", ())}
        if part:
            middle = f"{rates[min(rates, key=lambda t: abs(t - total / 2))]:.2g}" if max(rates) >= total / 2 else ""
            done = f"{max(rates):,} of {total:,}" if "metrics" not in run else f"{total:,}"
            lines.append(
                (RUNS[run["run"]].says.removeprefix(PILOT) + f", {run['settings']['epochs']} epochs", done,
                 f"{min(part):.2f} to {max(part):.2f}", f"{run['settings']['lr']:g}", middle)
            )  # fmt: skip
    return "\n".join(table(head, lines))


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """K and R over the steps of the pilot's runs, and U."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pilots = [run for run in found if RUNS[run["run"]].says.startswith(PILOT) and run.get("trace")]
    if not pilots:
        return
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "lsquant", "font.size": 9}):
        figure, (above, below) = plt.subplots(2, 1, figsize=(7.2, 4.8), sharex=True, layout="constrained")
        for run, color in zip(pilots, ("#0072B2", "#D55E00", "#009E73", "#E69F00"), strict=False):
            t, k, r, u = zip(*run["trace"], strict=True)
            says = RUNS[run["run"]].says.removeprefix(PILOT).replace(", transition rates", "")
            above.plot(t, [1000 * v for v in k], color=color, linewidth=1.2, label=f"K, {says}")
            below.plot(t, [v / run["settings"]["lr"] for v in u], color=color, linewidth=1.2, label=says)
        t, _, r, _ = zip(
            *max((run["trace"] for run in pilots), key=len), strict=True
        )  # the same for all, of one that ended
        above.plot(t, [1000 * v for v in r], color="black", linewidth=1.2, linestyle=(0, (4, 3)), label="R, the target")
        above.set_ylabel("weights that change\ncode in a step, per 1000")
        below.set_ylabel("U over its first value")
        below.set_xlabel("optimizer step")
        for axes in (above, below):
            axes.set_ylim(bottom=0.0)
            axes.grid(alpha=0.25)
            axes.legend(frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        plt.close(figure)


def files(found: Sequence[dict[str, Any]]) -> str:
    """A line a file, with its verdict."""
    head = ("network", "profile", "bytes", "level", "inputs of layers that differ", "outputs that differ")
    lines = []
    for network in found:
        for profile, file in network["files"].items():
            counts = [f"{n:,} of {of:,}" + (f" (by {by:.2g})" if n else "") for _, of, n, by in file["checks"][-2:]]
            level = f"`{file['level']}`"
            if file.get("plain", file["level"]) != file["level"]:
                level += f", `{file['plain']}` in a plain session"
            lines.append((network["run"], f"`{profile}`", f"{file['bytes']:,}", level, *counts))
    return "\n".join(table(head, lines))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, help="folder of finished runs, to be exported and verified")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--measure", action="store_true", help="take the accuracy of the kept files again")
    parser.add_argument("--data", help="folder of the images, where they have moved")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--pilot-page", type=Path, default=ROOT / "docs" / "pilot.md")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "figures" / "transition-rate.svg")
    parser.add_argument("--threads", type=int)
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    for folder in ("long", "networks"):
        (a.results / folder).mkdir(parents=True, exist_ok=True)
    for name in a.only if a.runs else ():
        path = a.runs / name
        if is_run(path):
            collect(path, a.results / "long")
            if (path / "metrics.json").is_file():
                publish(path, a.data, a.results / "networks")
    for facts in sorted((a.results / "networks").glob("*.json")) if a.measure else ():
        measure(facts, a.data)
    found = read(a.results / "long")
    tables = {"runs": runs(found), "files": files(read(a.results / "networks"))}
    tables |= {"methods": methods(found), "within": within(found)}
    for page in (a.page, a.pilot_page):
        atomic_write_text(page, replaced(page.read_text(encoding="utf-8"), tables.__getitem__))
    draw(found, a.figure)


if __name__ == "__main__":
    main()
