"""The pilot that settles the defaults: low-bit ResNet-20 on CIFAR-10, one change at a time.

    python studies/pilot.py --data DIR --init resnet20.safetensors --teacher resnet56.safetensors --out results/pilot
    python studies/pilot.py --table results/pilot

Every run trains `--epochs` epochs over the first `--images` training images in their official order, starting from the
float checkpoint, and is measured on all 10,000 test images.  One JSON per run in `--out`; runs that are there are left
alone, so the command goes on where it was stopped.  `--table` prints the table of docs/pilot.md.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lsquant import QuantSpec, Recipe, reference
from lsquant._util.files import write_json
from lsquant.diagnostics.environment import environment
from lsquant.quantizer import Quantizer
from lsquant.runs.directory import Run
from lsquant.runs.training import run_training
from lsquant.tasks.cifar10 import Cifar10

# name: (what is changed, settings, other changes)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "base": ("the defaults: paper's weight steps, MSE activation steps, N of one sample, lr 0.01", {}, {}),
    "base-seed1": ("the same, seed 1", {"seed": 1}, {}),
    "base-seed2": ("the same, seed 2", {"seed": 2}, {}),
    "weights-mse": ("weight steps by least squared error", {"weight_init": "mse"}, {}),
    "activations-paper": ("activation steps by the paper's rule", {"activation_init": "paper"}, {}),
    "channel": ("a weight step per output channel", {}, {"granularity": "channel"}),
    "channel-mse": ("a weight step per channel, by MSE", {"weight_init": "mse"}, {"granularity": "channel"}),
    "n-batch": ("N of activations counts the batch", {}, {"batch_in_n": True}),
    "guard-2^-4": ("guard at 2^-4 of the first step", {}, {"guard": 2.0**-4}),
    "guard-2^-20": ("guard at 2^-20 of the first step", {}, {"guard": 2.0**-20}),
    "lr-0.003": ("learning rate 0.003", {"lr": 0.003}, {}),
    "lr-0.03": ("learning rate 0.03", {"lr": 0.03}, {}),
    "step-lr-0.001": ("learning rate of the steps 0.001", {"step_lr": 0.001}, {}),
    "step-lr-0.1": ("learning rate of the steps 0.1", {"step_lr": 0.1}, {}),
    "decay-by-bits": ("weight decay by bits, as the paper", {"weight_decay_by_bits": True}, {}),
    "warmup": ("100 iterations of warm-up", {"warmup": 100}, {}),
    "clip-norm": ("gradient norm at most 1", {"clip_norm": 1.0}, {}),
    "ema": ("averaged weights, decay 0.99", {"ema": 0.99}, {}),
    "bn": ("BatchNorm estimated anew on 50 batches", {"bn_batches": 50}, {}),
    "distill": ("distillation from the float ResNet-20", {"distill": True}, {}),
    "teacher": ("distillation from ResNet-56", {}, {"teacher": True}),
    "progressive": ("8 bits, then 4, an epoch each, then the bits", {"progressive": (8, 4)}, {}),
}
LOOK = 1000  # test images looked at on the way; the result is of all


class Part(Cifar10):
    """CIFAR-10 with the first `images` training images, and a cheaper look at the test data on the way."""

    name = "cifar10"

    def __init__(self, data: str, images: int) -> None:
        super().__init__(data)
        self.images, self.all = images, False

    def batches(self, split: Any, **how: Any) -> Iterator[tuple[Tensor, Tensor]]:
        whole = self.data
        part = {"train": self.images, "test": len(whole["test"][0]) if self.all else LOOK}
        self.data = {key: (x[: part[key]], y[: part[key]]) for key, (x, y) in whole.items()}
        rest = super().batches(split, **how)
        first = next(rest)
        self.data = whole
        yield first
        yield from rest

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-self.images // batch_size)

    def accuracy(self, model: nn.Module) -> float:
        self.all = True
        return self.metric(model)["accuracy"]


@contextmanager
def changed(batch_in_n: int | None = None, guard: float | None = None) -> Iterator[None]:
    """What no setting changes: N of activation steps counts the batch; the guard's factor."""
    scale, factor = Quantizer.gradient_scale, reference.GUARD_FACTOR

    def smaller(quantizer: Quantizer) -> float:
        is_input = quantizer.name.endswith("input_quantizer")
        return scale.fget(quantizer) / (math.sqrt(batch_in_n or 1) if is_input else 1.0)  # type: ignore[misc]

    try:
        Quantizer.gradient_scale = property(smaller)  # type: ignore[assignment,method-assign]
        reference.GUARD_FACTOR = guard or factor
        yield
    finally:
        Quantizer.gradient_scale, reference.GUARD_FACTOR = scale, factor  # type: ignore[method-assign]


def recipe(bits: int, granularity: str = "tensor") -> Recipe:
    base = Recipe.preset(f"w{bits}a{bits}")
    assert isinstance(base.weight, QuantSpec)
    if granularity == "tensor":
        return base
    rules = [replace(r, weight=replace(r.weight, granularity=granularity)) if isinstance(r.weight, QuantSpec) else r
             for r in base.preset_rules]  # fmt: skip
    return Recipe(weight=replace(base.weight, granularity=granularity), activation=base.activation, rules=rules)


def run_one(name: str, bits: int, a: argparse.Namespace) -> dict[str, Any]:
    what, settings, other = VARIANTS[name]
    task = Part(a.data, a.images)
    scratch = Path(a.out) / "scratch"
    teacher = a.teacher if other.get("teacher") else None
    chosen = replace(task.settings, epochs=a.epochs, **settings)
    run = Run(scratch, task, recipe(bits, other.get("granularity", "tensor")), chosen, a.init, teacher)
    began = time.monotonic()
    with changed(chosen.batch_size if other.get("batch_in_n") else None, other.get("guard")):
        metrics = run_training(run, overwrite=scratch.exists(), quiet=True)
        model = run.model()
    seconds = time.monotonic() - began
    rows = [json.loads(line) for line in run.file("log.jsonl").read_text().splitlines()]
    guards = sum(q["guarded"] for q in rows[-1]["quantizers"].values())
    return {
        "variant": name, "what": what, "bits": bits, "epochs": a.epochs, "images": a.images,
        "accuracy": task.accuracy(model), "rounded": metrics["rounded"]["accuracy"], "loss": [r["loss"] for r in rows],
        "guarded": guards, "seconds": seconds, "settings": chosen.to_dict(), "environment": environment(),
    }  # fmt: skip


def table(folder: Path) -> str:
    """Markdown: a row a variant, accuracy by bits, the difference to the base."""
    found = {(r["variant"], r["bits"]): r for r in (json.loads(p.read_text()) for p in sorted(folder.glob("*.json")))}
    bits = sorted({b for _, b in found})
    lines = ["| change | " + " | ".join(f"{b}/{b} bits, rounded | trained, % | difference" for b in bits) + " |"]
    lines.append("|---|" + "--:|" * 3 * len(bits))
    for name, (what, *_) in VARIANTS.items():
        cells = []
        for b in bits:
            row, base = found.get((name, b)), found.get(("base", b))
            if row is None or base is None:
                cells += ["", "", ""]
            else:
                by = row["accuracy"] - base["accuracy"]
                cells += [f"{row['rounded']:.1f}", f"{row['accuracy']:.2f}", "" if row is base else f"{by:+.2f}"]
        if any(cells):
            lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data")
    parser.add_argument("--init")
    parser.add_argument("--teacher")
    parser.add_argument("--out", default="results/pilot")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--table", metavar="DIR", help="print the table of what is there")
    a = parser.parse_args(argv)
    if a.table:
        print(table(Path(a.table)))
        return
    for bits in a.bits:
        for name in a.only:
            path = Path(a.out) / f"w{bits}a{bits}-{name}.json"
            if path.exists() or (name == "progressive" and bits > 3):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            result = run_one(name, bits, a)
            write_json(path, result)
            print(f"{path.stem}: {result['accuracy']:.2f} % in {result['seconds']:.0f} s", file=sys.stderr, flush=True)
    shutil.rmtree(Path(a.out) / "scratch", ignore_errors=True)


if __name__ == "__main__":
    main()
