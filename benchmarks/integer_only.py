"""Integer-only ResNet-20 on CIFAR-10: trained in that form for three epochs, and only calibrated.

    python benchmarks/integer_only.py --train runs/integer --data DIR --init FILE [--only w4a8 ...]    # 12 minutes each
    python benchmarks/integer_only.py --publish runs/integer --data DIR --init FILE     # files and verdicts
    python benchmarks/integer_only.py                      # the table of docs/integer-only.md, from results/integer

Every run is ``lsquant train cifar10 ... --integer-only --epochs 3 --fold-epochs 1``.  ``results/integer`` gets its
program (docs/integer-only.md) and a JSON with accuracies, sizes and verdicts on all 10,000 test images.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results import summary
from tables import ROOT, replaced, table

import lsquant
from lsquant._util.files import atomic_write_text, read_json, write_json
from lsquant.runs import is_run, load_float
from lsquant.tasks import get_task, open_run

BITS = ("w8a8", "w4a8", "w2a8", "w4a4")
OPTIONS = "--integer-only --epochs 3 --fold-epochs 1 --distill --weight-init mse --threads 1"
CALIBRATION = 2000  # images
RESULTS = ROOT / "results" / "integer"


def command(bits: str, folder: Path, data: str, init: str) -> list[str]:
    """The command that trains a run, or goes on with it."""
    if is_run(folder / bits):
        return ["train", "--resume", "--out", str(folder / bits)]
    weight, activation = bits.removeprefix("w").split("a")
    words = ["--data", data, "--init", init, "--weight-bits", weight, "--activation-bits", activation]
    return ["train", "cifar10", *words, *OPTIONS.split(), "--out", str(folder / bits)]


def publish(bits: str, folder: Path, data: str, init: str) -> None:
    """Keep the program of a finished run, with accuracies and verdicts."""
    run = open_run(folder / bits, data=data)
    network, example = run.network(), run.task.example_input()
    folder = run.file("export")
    folder.mkdir(exist_ok=True)
    paths = {
        "integer": lsquant.export_onnx(network, folder / "integer.onnx", example, profile="integer"),
        "packed": lsquant.export_packed(network.model, folder / "packed.safetensors"),
        "program": lsquant.export_program(network, folder / "program.safetensors"),
    }
    again = lsquant.fuse(lsquant.load_packed(run.float_model(), paths["packed"]).eval())
    files: dict[str, Any] = {"packed": {"bytes": paths["packed"].stat().st_size}}
    for name in ("integer", "program"):  # of the network that the packed file gives
        batches = run.task.batches("test", batch_size=250)
        verdict = lsquant.verify(again, paths[name], batches, max_batches=4 if name == "program" else None)
        files[name] = summary(verdict, paths[name].stat().st_size)
        print(f"{bits}, {name}: {verdict.level}", file=sys.stderr, flush=True)
    shutil.copyfile(paths["program"], RESULTS / f"{bits}.safetensors")
    metrics = read_json(run.file("metrics.json"))
    calibrated = calibrated_only(run.recipe, data, init)
    write_json(RESULTS / f"{bits}.json", {"bits": bits, **metrics, "calibrated": calibrated, "files": files})


def calibrated_only(recipe: lsquant.Recipe, data: str, init: str) -> dict[str, float]:
    """The metrics of the float network in integer-only form, with steps by least squared error and no training."""
    task = get_task("cifar10", data=data)
    model = load_float(task.model(), init).eval()
    lsquant.trace(model, task.example_input())
    lsquant.prepare(model, recipe, example_inputs=task.example_input())
    lsquant.calibrate(model, task.batches("calibration", batch_size=250), max_batches=CALIBRATION // 250, weights="mse")
    return task.metric(lsquant.fuse(model.eval()))


def page(found: Sequence[dict[str, Any]]) -> str:
    """A line a run."""
    head = ("bits", "calibrated only", "two epochs", "folded", "a third epoch in that form", "bytes of the ONNX file",
            "of the program", "verdict", "codes that differ")  # fmt: skip
    lines = []
    for run in found:
        shares = [f"{run[name]['accuracy']:.2f} %" for name in ("calibrated", "lsq", "folded", "fused")]
        file, program = run["files"]["integer"], run["files"]["program"]
        _, of, differ, _ = file["checks"][-2]
        shares[-1] = f"**{shares[-1]}**"
        sizes = [f"{part['bytes']:,}" for part in (file, program)]
        lines.append((run["bits"], *shares, *sizes, f"`{file['level']}`", f"{differ:,} of {of:,}"))
    return "\n".join(table(head, lines))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--train", type=Path, help="folder of runs, which are trained, or gone on with")
    parser.add_argument("--publish", type=Path, help="folder of finished runs, which are exported and verified")
    parser.add_argument("--data", help="folder of the images")
    parser.add_argument("--init", help="the float checkpoint")
    parser.add_argument("--only", nargs="+", choices=BITS, default=BITS)
    a = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for bits in a.only if a.train else ():
        subprocess.run([sys.executable, "-m", "lsquant", *command(bits, a.train, a.data, a.init)], check=True)
    for bits in a.only if a.publish else ():
        publish(bits, a.publish, a.data, a.init)
    kept = {bits: RESULTS / f"{bits}.json" for bits in BITS}
    found = [read_json(path) for path in kept.values() if path.is_file()]
    place = ROOT / "docs" / "integer-only.md"
    atomic_write_text(place, replaced(place.read_text(encoding="utf-8"), {"integer": page(found)}.__getitem__))


if __name__ == "__main__":
    main()
