"""A run directory has one writer: who else comes is refused by name, and a lock that was left over is taken over."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lsquant
from helpers.command_line import refused, run
from lsquant import LsquantError, UsageError
from lsquant._util.files import remove_leftovers
from lsquant.runs.directory import START, start_run
from lsquant.runs.lock import HOLDER, LOCK, RunLock
from lsquant.tasks import Run, Settings, get_task, run_training

pytest.importorskip("sklearn")
HOLD = """
import sys, time
from pathlib import Path
from lsquant.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(300)
"""


def tiny(path: Path, **others: Any) -> Run:
    settings = Settings(epochs=0, float_epochs=0, batch_size=80, threads=1)
    return Run(path, get_task("digits"), lsquant.Recipe.preset("w2a2"), settings, **others)


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A run directory, and another process that holds its lock."""
    path = tmp_path / "run"
    start_run(tiny(path)).release()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    yield path, holder
    holder.kill()
    holder.wait()
    holder.stdout.close()


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_a_run_that_is_alive_is_refused_and_a_dead_ones_lock_is_taken_over(other_process) -> None:
    path, holder = other_process
    before = names(path)
    who = rf"is being trained by process {holder.pid} on '{socket.gethostname()}': wait for it"
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match=who):
            run_training(tiny(path), quiet=True, **options)
    refused(2, who, "train", "--resume", "--out", path, "--quiet")
    refused(2, who, "train", "digits", "--bits", "2", "--overwrite", "--out", path, "--quiet")
    assert names(path) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert {LOCK, HOLDER} <= set(names(path))  # left over
    assert set(run_training(tiny(path), resume=True, quiet=True)) >= {"lsq"}
    assert not {LOCK, HOLDER} & set(names(path))


def test_a_live_run_can_be_read(other_process) -> None:
    path, _ = other_process
    assert run("report", path, "--quiet").code == 0
    assert (path / "report.html").is_file()


def test_temporary_files_of_the_process_that_is_alive_stay(other_process) -> None:
    path, _ = other_process
    (path / "last" / ".lsq.safetensors.1.tmp").write_text("being written")
    with pytest.raises(UsageError, match="is being trained"):
        run_training(tiny(path), resume=True, quiet=True)
    assert (path / "last" / ".lsq.safetensors.1.tmp").is_file()
    assert remove_leftovers(path) == 1


def test_a_lock_is_held_once_also_within_a_process(tmp_path: Path) -> None:
    with RunLock(tmp_path) as lock:
        assert json.loads((tmp_path / HOLDER).read_text()) == {"host": socket.gethostname(), "process": os.getpid()}
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            RunLock(tmp_path)
        lock.release()
        lock.release()
        RunLock(tmp_path).release()
    assert names(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 3, "process": "x"}', "\ud800"])
def test_what_stands_beside_a_lock_is_not_trusted(text: str, tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / HOLDER).write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(UsageError, match="is being trained by another process"):
            RunLock(tmp_path)


def test_overwriting_takes_the_lock_first_and_leaves_none(tmp_path: Path) -> None:
    run_, path = tiny(tmp_path / "run"), tmp_path / "run"
    run_training(run_, quiet=True)
    first = names(path)
    (path / "mine.txt").write_text("x")
    run_training(run_, overwrite=True, quiet=True)
    assert names(path) == sorted([*first, "mine.txt"])
    (path / "mine.txt").unlink()
    run_training(run_, overwrite=True, quiet=True)
    assert names(path) == first
    assert names(tmp_path) == ["run"]
    with RunLock(path), pytest.raises(UsageError, match="is being trained"):
        start_run(run_, overwrite=True)
    assert names(path) == first


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), UsageError("no")])
@pytest.mark.parametrize("exists", [False, True])
def test_a_start_that_fails_leaves_nothing(exists: bool, error: Any, tmp_path: Path, monkeypatch) -> None:
    run_ = tiny(tmp_path / "run")
    if exists:
        start_run(run_).release()
    before = {entry: names(tmp_path / entry) for entry in names(tmp_path)}

    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr("lsquant.runs.directory.write_json", failing)
    with pytest.raises((KeyboardInterrupt, LsquantError)):
        start_run(run_, overwrite=exists)
    assert {entry: names(tmp_path / entry) for entry in names(tmp_path)} == before


def test_a_directory_that_another_process_made_meanwhile(tmp_path: Path, monkeypatch) -> None:
    run_ = tiny(tmp_path / "run")

    def slower(folder: Path, run: Run) -> None:
        folder.mkdir()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / START.partition("/")[0]).mkdir()

    monkeypatch.setattr("lsquant.runs.directory._fill", slower)
    with pytest.raises(UsageError, match="another process has just made"):
        start_run(run_)
    assert names(tmp_path) == ["run"]


def test_the_lock_ends_with_the_training(tmp_path: Path, monkeypatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        assert HOLDER in names(tmp_path / "run")
        raise KeyboardInterrupt

    monkeypatch.setattr("lsquant.runs.training._Training.train", failing)
    with pytest.raises(KeyboardInterrupt):
        run_training(tiny(tmp_path / "run"), quiet=True)
    assert not {LOCK, HOLDER} & set(names(tmp_path / "run"))


def test_waiting_is_not_part_of_it(other_process) -> None:
    path, _ = other_process
    began = time.monotonic()
    with pytest.raises(UsageError):
        RunLock(path)
    assert time.monotonic() - began < 5.0
