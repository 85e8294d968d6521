"""How should a trained w4a4 network go to other bits: with rescaled steps, or with steps set anew?

    python studies/change_of_bits.py

Task digits: float training, then w4a4, then w3a3 or w2a2 from it by ``prepare(..., steps=...)``, three seeds.  Prints a
Markdown table of test accuracies right after the change and after five more epochs.  About three minutes on one core.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from statistics import mean

import torch

import lsquant
from lsquant.tasks import Task, get_task
from lsquant.training import CosineSchedule, fit
from lsquant.training.seeds import seed_everything

BATCH = 64


def train(task: Task, model: torch.nn.Module, epochs: int, lr: float, seed: int) -> None:
    steps = task.steps_per_epoch(BATCH)
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr, 1e-4), momentum=0.9)
    batches = lambda epoch: task.batches("train", batch_size=BATCH, seed=seed, epoch=epoch)  # noqa: E731
    schedule = CosineSchedule(epochs * steps)
    fit(model, batches, optimizer, epochs=epochs, steps_per_epoch=steps, schedule=schedule, quiet=True)


def calibration(task: Task, seed: int) -> list[torch.Tensor]:
    return [x for x, _ in task.batches("calibration", batch_size=BATCH, seed=seed)]


def accuracies(seed: int) -> dict[tuple[str, str], tuple[float, float]]:
    task = get_task("digits")
    task.settings = replace(task.settings, seed=seed)
    seed_everything(seed, "change of bits")
    model = task.model()
    train(task, model, 10, 0.1, seed)
    lsquant.prepare(model, lsquant.Recipe.preset("w4a4"), task.example_input())
    lsquant.calibrate(model, calibration(task, seed))
    train(task, model, 5, 0.03, seed)
    found = {}
    for name in ("w3a3", "w2a2"):
        for how in ("rescale", "recalibrate"):
            other = copy.deepcopy(model)
            lsquant.prepare(other, lsquant.Recipe.preset(name), task.example_input(), steps=how)
            if how == "recalibrate":
                lsquant.calibrate(other, calibration(task, seed), again=True)
            before = task.metric(other)["accuracy"]
            train(task, other, 5, 0.03, seed)
            found[name, how] = before, task.metric(other)["accuracy"]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    runs = [accuracies(seed) for seed in range(3)]
    print("| from w4a4 to | steps | right after | after 5 epochs |\n|---|---|---|---|")
    for key in runs[0]:
        before, after = zip(*(run[key] for run in runs), strict=True)
        spread = f"{min(after):.1f} to {max(after):.1f}"
        print(f"| {key[0]} | {key[1]} | {mean(before):.1f} % | {mean(after):.1f} % ({spread}) |")
