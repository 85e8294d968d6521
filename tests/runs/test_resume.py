"""Killed at any point and resumed, a run ends with the same bits as one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers.logs import CLOCK, untimed
from lsquant._util.errors import DamagedFile, UsageError
from lsquant.tasks.digits import DigitsNet
from lsquant.training import CosineSchedule, fit, load_state, param_groups
from lsquant.training.state import encode

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
DRIVER, SMALL = HELPERS / "resume_driver.py", HELPERS / "small_digits.py"
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_and_resume.py"
SOURCE = Path(__file__).resolve().parents[2] / "src"


def call(*command: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SOURCE), environment.get("PYTHONPATH", "")])
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def drive(*arguments: object) -> dict:
    return json.loads(call(sys.executable, DRIVER, *arguments).stdout)


def content(folder: Path) -> tuple[dict, dict, list]:
    """Structure and tensors of the last checkpoint, and the log, without the time it took."""
    state = load_state(folder / "last.safetensors")
    for values, names in ((state["at"], ("seconds", "log_position")), (state["at"]["row"], CLOCK)):
        for name in names:
            del values[name]
    structure, tensors = encode(state)
    return structure, tensors, untimed(folder / "log.jsonl")


def check(tmp_path: Path, number: int, seed: int) -> None:
    result = drive(tmp_path, number, seed)
    assert result["events"] > 50
    assert list(result["statuses"].values()) == [[-signal.SIGKILL, 0]] * number, result
    structure, tensors, log = content(tmp_path / "whole")
    assert len(log) == 4
    assert sum(name.startswith("extras.average") for name in tensors) > 5
    for event in result["statuses"]:
        message = f"killed at event {event} of {result['events']}"
        resumed = content(tmp_path / event)
        assert resumed[0] == structure, message
        assert resumed[1].keys() == tensors.keys(), message
        assert all(torch.equal(bits(value), bits(resumed[1][key])) for key, value in tensors.items()), message
        assert resumed[2] == log, message


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_3_points_resumes_to_the_same_bits(tmp_path, seed):
    check(tmp_path, 3, seed)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_20_points_resumes_to_the_same_bits(tmp_path, seed):
    check(tmp_path, 20, seed)


# everything that has a state of its own: phases by bits, a teacher's file, averages, statistics estimated at the end
ALL = "--progressive 8,4 --distill-weight 0.5 --ema 0.9 --bn-batches 3 --clip-norm 1 --warmup 3 --weight-init mse"
ALL += " --integer-only --fold-epochs 1"


def kill_digits(tmp_path: Path, kills: int, seed: int) -> None:
    """By the documented command; killed from outside, at random times, in whatever phase that is."""
    pytest.importorskip("sklearn")
    torch.manual_seed(seed)
    save_file(DigitsNet(6).state_dict(), tmp_path / "teacher.safetensors")
    options = [*ALL.split(), "--teacher", tmp_path / "teacher.safetensors", "--checkpoint-every", 3, "--quiet"]
    script = [sys.executable, BENCHMARK, "--kills", kills, "--kill-seed", seed, "--folder", tmp_path / "runs"]
    done = call(*script, f"{SMALL}:task", "--bits", 2, *options)
    lines = done.stdout.splitlines()
    assert lines[-1] == f"{kills} of {kills} runs ended with the bits of the run that was not killed"
    assert len([line for line in lines if line.endswith(": equal")]) == kills
    phases = [row["phase"] for row in untimed(tmp_path / "runs" / "whole" / "log.jsonl")]
    assert phases == ["float", "float", "lsq-8", "lsq-4", "lsq", "fold"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_digits_killed_3_times_from_outside_end_with_the_same_bits(tmp_path, seed):
    kill_digits(tmp_path, 3, seed)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_digits_killed_50_times_from_outside_end_with_the_same_bits(tmp_path, seed):
    kill_digits(tmp_path, 50, seed)


# ---- what is not the same run is refused ----


def run(folder: Path, model: nn.Linear | None = None, **changes) -> nn.Linear:
    torch.manual_seed(0)
    model = model or nn.Linear(3, 2)
    options = {"epochs": 1, "steps_per_epoch": 2, "quiet": True, "resume": True} | changes
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(param_groups(model, 0.1), momentum=0.9)
    data = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))] * 2
    fit(model, lambda epoch: data, optimizer, checkpoint=folder / "c.safetensors", log=folder / "log.jsonl", **options)
    return model


def test_a_complete_run_is_only_loaded(tmp_path):
    first = run(tmp_path)
    log = (tmp_path / "log.jsonl").read_bytes()
    again = run(tmp_path)
    assert torch.equal(first.weight, again.weight)
    assert (tmp_path / "log.jsonl").read_bytes() == log


def test_without_resume_the_checkpoint_is_not_read(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"anything")
    run(tmp_path, resume=False)
    assert load_state(tmp_path / "c.safetensors")["at"]["epoch"] == 1


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UsageError, match=r"c\.safetensors is the checkpoint of another run: epochs 1, not 2"):
        run(tmp_path, epochs=2)
    with pytest.raises(UsageError, match="another architecture"):
        run(tmp_path, nn.Linear(3, 5))
    model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="another optimizer"):
        run(tmp_path, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_a_damaged_checkpoint_and_a_cut_log_are_clear_errors(tmp_path):
    def stop(iteration):
        if iteration == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, epochs=2, after_step=stop)
    whole = (tmp_path / "c.safetensors").read_bytes()
    (tmp_path / "c.safetensors").write_bytes(whole[:-7])
    with pytest.raises(DamagedFile, match=r"c\.safetensors is damaged"):
        run(tmp_path, epochs=2)
    (tmp_path / "c.safetensors").write_bytes(whole)
    (tmp_path / "log.jsonl").write_bytes(b"")
    with pytest.raises(DamagedFile, match=r"log\.jsonl has 0 bytes"):
        run(tmp_path, epochs=2)


def test_adam_and_other_state_survive(tmp_path):
    """Adam's moments and counters, and anything given as `extras`."""

    class Counter:
        def __init__(self):
            self.seen = 0

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state_dict):
            self.seen = state_dict["seen"]

    def train(folder: Path, stop: int | None):
        torch.manual_seed(0)
        model, counter = nn.Linear(3, 2), Counter()
        optimizer = torch.optim.AdamW(param_groups(model, 0.1, 0.01))
        data = [
            (torch.randn(4, 3, generator=torch.Generator().manual_seed(i)), torch.tensor([0, 1, 0, 1]))
            for i in range(3)
        ]

        def after_step(iteration):
            counter.seen += 1
            if iteration == stop:
                raise KeyboardInterrupt

        fit(
            model, lambda epoch: data, optimizer, epochs=3, steps_per_epoch=3, schedule=CosineSchedule(9),
            checkpoint=folder / "c.safetensors", checkpoint_every=2, resume=True, quiet=True,
            after_step=after_step, extras={"counter": counter},
        )  # fmt: skip
        return model, optimizer, counter

    straight = tmp_path / "a"
    stopped = tmp_path / "b"
    straight.mkdir()
    stopped.mkdir()
    expected = train(straight, None)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, 6)
    resumed = train(stopped, None)
    assert torch.equal(expected[0].weight, resumed[0].weight)
    assert resumed[2].seen == expected[2].seen == 9
    for a, b in zip(expected[1].state.values(), resumed[1].state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
