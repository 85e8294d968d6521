"""Trains in child processes that kill themselves by SIGKILL at a chosen event, and resumes them. Run by test_resume.py.

python resume_driver.py FOLDER NUMBER SEED: one run that is left alone in FOLDER/whole, then NUMBER runs, each killed at
a random event and resumed, in FOLDER/<event>. Prints a line of JSON: the number of events, and the statuses by event.

An event is anything after which the state on disk or in memory may have changed: an optimizer step, and before, in the
middle of and after every write. The process that forks has run no torch operation, so the children are sound.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo  # custom ops import it at their first call: once here instead of in every child
from torch import nn
from torch.nn import functional as F

import lsquant
from lsquant._util import files
from lsquant.training import CosineSchedule, WeightAverage, fit, param_groups
from lsquant.training import log as log_module
from lsquant.training.seeds import generator, seed_everything

EPOCHS, STEPS = 4, 5


class Net(nn.Module):
    """Dropout draws from the global generator; the counter of BatchNorm and the quantizers' buffers have state."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, bias=False)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(self.conv(F.relu(self.stem(x)))))
        return self.head(self.drop(x.mean((2, 3))))


class Events:
    """Counts events and kills the process at number `kill_at`."""

    def __init__(self, kill_at: int | None) -> None:
        self.kill_at, self.count = kill_at, 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def watch_writes(event: Events) -> None:
    """Events at every fsync and rename, with half a file written, and with half a row in the log."""
    fsync, replace, text = os.fsync, os.replace, log_module.json_text

    def watched_fsync(handle: int) -> None:
        event()
        fsync(handle)

    def watched_replace(source, target) -> None:
        whole = Path(source).read_bytes()
        Path(source).write_bytes(whole[: len(whole) // 2])
        event()
        Path(source).write_bytes(whole)
        event()
        replace(source, target)
        event()

    def watched_text(row) -> str:
        if event.count + 1 == event.kill_at:  # half a row, then the kill
            with open(current["log"], "ab") as file:
                file.write(text(row).encode()[:20])
        event()
        return text(row)

    files.os = _Patched(os, fsync=watched_fsync, replace=watched_replace)
    log_module.os = _Patched(os, fsync=watched_fsync)
    log_module.json_text = watched_text


class _Patched:
    def __init__(self, module, **changes) -> None:
        self._module = module
        vars(self).update(changes)

    def __getattr__(self, name: str):
        return getattr(self._module, name)


current: dict[str, Path] = {}


def batches(epoch: int):
    x = torch.randn(40, 1, 6, 6, generator=generator("x"))
    y = torch.randint(0, 3, (40,), generator=generator("y"))
    for part in torch.randperm(40, generator=generator(5, epoch)).split(8):
        yield x[part] + 0.1 * torch.randn(len(part), 1, 6, 6), y[part]  # augmented by the global generator


def train(folder: Path, kill_at: int | None) -> int:
    """One run in `folder`, resumed from what is there; returns how many events it had."""
    current["log"] = folder / "log.jsonl"
    event = Events(kill_at)
    watch_writes(event)
    seed_everything(0)
    model = Net()
    lsquant.prepare(model, lsquant.Recipe.preset("w2a2"), example_inputs=torch.zeros(1, 1, 6, 6))
    lsquant.calibrate(model, [next(iter(batches(0)))])
    optimizer = torch.optim.SGD(param_groups(model, 0.05, 1e-4), momentum=0.9)
    average = WeightAverage(model, 0.9)

    def after_step(iteration: int) -> None:
        average.update()
        event()

    fit(
        model,
        batches,
        optimizer,
        epochs=EPOCHS,
        steps_per_epoch=STEPS,
        schedule=CosineSchedule(EPOCHS * STEPS, warmup=3),
        clip_norm=1.0,
        evaluate=lambda m: {"noise": float(torch.rand(()))},
        after_step=after_step,
        extras={"average": average},
        log=folder / "log.jsonl",
        checkpoint=folder / "last.safetensors",
        checkpoint_every=2,
        resume=True,
        quiet=True,
    )
    return event.count


def fork(work: Callable[[], None]) -> int:
    """The process id of a child that does `work`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def child(folder: Path, kill_at: int | None) -> int:
    """The status of a child that trains: 0, or -9 if it was killed. Its number of events goes to events.json."""
    folder.mkdir(exist_ok=True)

    def work() -> None:
        (folder / "events.json").write_text(json.dumps(train(folder, kill_at)))

    pid = fork(work)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(folder: str, number: str, seed: str) -> None:
    root = Path(folder)
    assert child(root / "whole", None) == 0
    total = json.loads((root / "whole" / "events.json").read_text())
    statuses = {}
    for event in random.Random(int(seed)).sample(range(1, total + 1), int(number)):
        statuses[event] = [child(root / str(event), event), child(root / str(event), None)]
    print(json.dumps({"events": total, "statuses": statuses}))


if __name__ == "__main__":
    main(*sys.argv[1:])
