"""The training benchmarks on made-up images: the long runs, stopped and started again, and the pilot."""

from __future__ import annotations

import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lsquant
from helpers.benchmarks import ROOT
from helpers.cifar_files import joined, six_parts
from lsquant import reference
from lsquant._util.errors import UsageError
from lsquant.runs import training
from lsquant.tasks.resnet import cifar_resnet
from lsquant.training import Log, load_state, save_state


def results(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "results").iterdir()}


def epochs(result: dict[str, Any]) -> list[int]:
    return [row["epoch"] for row in result["rows"]]


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process gets the next one of the list whenever a row of a log is written; their handlers are put back."""
    numbers: list[int] = []
    append, before = Log.append, {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def append_and_signal(log: Log, row: dict[str, Any]) -> None:
        append(log, row)
        if numbers:
            os.kill(os.getpid(), numbers.pop(0))

    monkeypatch.setattr(Log, "append", append_and_signal)
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_long_runs_are_stopped_and_go_on(bench, words, signals, tmp_path, monkeypatch, capfd):
    """The commit is another one at every start."""
    long_runs, commits = bench("long_runs"), iter("abcdefg")
    monkeypatch.setattr(long_runs, "commit", lambda: next(commits))
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = [*words, "--epochs", "2", "--threads", "1", "--only", "w2a2", "w4a4-teacher", *folders]
    signals.append(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        long_runs.main(command)
    stopped = results(tmp_path)
    assert {name: (r["finished"], epochs(r), r["commits"]) for name, r in stopped.items()} == {
        "w2a2": (False, [1], ["a"])
    }
    (tmp_path / "results" / "w2a2.json").unlink()
    long_runs.main(["--collect", *folders])  # as after a kill
    assert results(tmp_path) == stopped

    load_teacher = training.load_teacher

    def load_and_signal(*a: Any) -> torch.nn.Module:
        signals[:] = [signal.SIGINT]
        return load_teacher(*a)

    capfd.readouterr()
    with monkeypatch.context() as patch:  # a signal in the second run only
        patch.setattr(training, "load_teacher", load_and_signal)
        with pytest.raises(SystemExit, match="130"):
            long_runs.main(command)
    said = capfd.readouterr().err
    texts = ("w2a2: going on", "w4a4-teacher: starting", "lsq 1/2", "lsq 2/2")
    assert [said.count(text) for text in texts] == [1, 1, 2, 1]
    long_runs.main(command)
    found = results(tmp_path)
    assert {name: (r["finished"], epochs(r), r["commits"], r["teacher"]) for name, r in found.items()} == {
        "w2a2": (True, [1, 2], ["a", "b"], None),
        "w4a4-teacher": (True, [1, 2], ["c", "d"], "resnet32.safetensors"),
    }
    for r in found.values():
        assert r["settings"]["threads"] == 1
        assert r["metrics"]["lsq"]["accuracy"] == r["rows"][-1]["accuracy"]

    model = tmp_path / "runs" / "w2a2" / "model.safetensors"
    before = model.stat().st_mtime_ns
    long_runs.main(command)
    assert model.stat().st_mtime_ns == before
    assert results(tmp_path) == found
    shutil.rmtree(tmp_path / "results")
    subprocess.run([sys.executable, str(ROOT / "benchmarks" / "long_runs.py"), "--collect", *folders], check=True)
    assert results(tmp_path) == found


def test_long_runs_refuse_another_run_and_missing_files(bench, words, tmp_path, capsys):
    long_runs, folders = bench("long_runs"), ["--out", str(tmp_path / "a"), "--results", str(tmp_path / "b")]
    for missing in (words[:2], [*words[:4], "--only", "w2a2-teacher"]):
        with pytest.raises(SystemExit, match="2"):
            long_runs.main([*missing, *folders])
        assert "--init and, for runs with a teacher, --teacher are needed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "start", "teacher", "settings"),
    [
        ("w3a3", None, None, (24, 0.02, 1e-4, False, 1.0)),
        ("w4a4-rate", None, None, (15, 0.01, 1e-4, False, 1.0)),
        ("w3a3-rate", None, None, (40, 0.05, 1e-4, False, 1.0)),
        ("w2a2-teacher", None, "resnet32", (40, 0.03, 1e-4, False, 1.0)),
        ("w4a4-more", "w4a4", None, (6, 0.03, 1e-4, False, 1.0)),
        ("w3a3-distill", "w3a3", None, (9, 0.02, 1e-4, True, 1.0)),
        ("w3a3-next", "w4a4", None, (26, 0.05, 1e-4, False, 1.0)),
        ("w3a3-taught", "w3a3", "resnet32", (12, 0.01, 1e-4, False, 4.0)),
    ],
)
def test_what_the_kinds_start_from(bench, words, signals, tmp_path, monkeypatch, name, start, teacher, settings):
    long_runs, made = bench("long_runs"), []
    monkeypatch.setattr(long_runs, "run_training", lambda run, **_: made.append(run))
    long_runs.main([*words, "--only", name, "--out", str(tmp_path / "a"), "--results", str(tmp_path / "b")])
    (one,) = made
    s = one.settings
    assert (s.epochs, s.lr, s.weight_decay, s.distill, s.distill_temperature) == settings
    assert s.weight_decay_by_bits
    assert (one.start and Path(one.start).stem) == (start and f"cifar10-resnet20-{start}")
    assert (one.teacher and Path(one.teacher).stem) == teacher
    assert one.init == words[3]


# ---- the state that goes into the repository ----


def stopped(long_runs: Any, signals: list[int], folder: Path, command: list[str]) -> Path:
    """A run of three epochs that was stopped after the row of the second; its kept state."""
    signals.extend([0, signal.SIGTERM])  # 0 does nothing
    with pytest.raises(SystemExit, match="143"):
        long_runs.main(command)
    long_runs.main([*command, "--keep-state"])
    (kept,) = (folder / "results" / "state").iterdir()
    return kept


def digests(run: Path) -> dict[str, Any]:
    keys = ("loss", "accuracy", "lr", "transition_rate", "transition_lr")
    rows = [{k: row.get(k) for k in keys} for row in Log(run / "log.jsonl").rows()]
    return {"model": (run / "model.safetensors").read_bytes(), "rows": rows}


@pytest.mark.parametrize("name", ["w2a2-transitions", "w2a2-sgd-transitions-teacher"])
def test_a_run_goes_on_from_its_kept_state_elsewhere(bench, words, signals, tmp_path, monkeypatch, capsys, name):
    long_runs = bench("long_runs")

    def command(folder: str) -> list[str]:
        folders = ["--out", str(tmp_path / folder / "runs"), "--results", str(tmp_path / folder / "results")]
        return [*words, "--epochs", "3", "--only", name, *folders]

    long_runs.main(command("whole"))
    monkeypatch.setattr(long_runs, "commit", lambda: "a")
    kept = stopped(long_runs, signals, tmp_path / "there", command("there"))
    assert kept.name == f"{name}.tar.xz"
    assert 100_000 < kept.stat().st_size <= 3_000_000
    there = json.loads((tmp_path / "there" / "results" / f"{name}.json").read_text())
    assert (there["finished"], epochs(there)) == (False, [1, 2])

    # a fresh clone elsewhere: the results are there, the runs are not, the files lie in another folder
    shutil.copytree(tmp_path / "there" / "results", tmp_path / "here" / "results")
    moved = tmp_path / "moved"
    shutil.copytree(words[1], moved)
    monkeypatch.setattr(long_runs, "commit", lambda: "b")
    capsys.readouterr()
    here = [word.replace(words[1], str(moved)) for word in command("here")]
    other = here.copy()
    other[3] = words[5]
    with pytest.raises(UsageError, match=r"--init .*resnet32.safetensors is not the file of the run's start"):
        long_runs.main(other)
    long_runs.main(here)
    assert f"{name}: goes on from" in (said := capsys.readouterr().err)
    assert ", with the same bits" in said
    assert digests(tmp_path / "here" / "runs" / name) == digests(tmp_path / "whole" / "runs" / name)
    done = json.loads((tmp_path / "here" / "results" / f"{name}.json").read_text())
    assert (done["finished"], epochs(done), done["commits"]) == (True, [1, 2, 3], ["a", "b"])
    assert len(done["trace"]) == 3
    assert not list((tmp_path / "here" / "results" / "state").iterdir())
    assert not list((tmp_path / "here" / "runs").glob(".*"))
    shutil.rmtree(tmp_path / "here" / "runs")  # the results say that it is finished
    capsys.readouterr()
    long_runs.main(here)
    assert f"{name}: finished" in capsys.readouterr().err
    assert not (tmp_path / "here" / "runs" / name).exists()


def test_a_kept_state_of_another_run_or_of_nothing_is_refused(bench, words, signals, tmp_path):
    long_runs = bench("long_runs")
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = [*words, "--epochs", "3", "--only", "w2a2-transitions", *folders]
    kept = stopped(long_runs, signals, tmp_path, command)
    whole = kept.read_bytes()
    runs = tmp_path / "runs" / "w2a2-transitions"

    # two folders: the one that is behind neither goes on nor overwrites what the other kept
    behind = tmp_path / "behind"
    shutil.copytree(runs, behind)
    state = load_state(runs / "last" / "lsq.safetensors")
    save_state(behind / "last" / "lsq.safetensors", {**state, "at": {**state["at"], "epoch": 0}})
    shutil.rmtree(runs)
    shutil.copytree(behind, runs)
    for option in ([], ["--keep-state"]):
        with pytest.raises(UsageError, match=r"is further \(\[1, 0\]\) than .* \(\[0, 0\]\)"):
            long_runs.main([*command, *option])
    assert kept.read_bytes() == whole
    shutil.rmtree(runs)

    for option, says in (("--lr", "lr was 0.03, not 7.0"), ("--seed", "seed was 0, not 7"), ("--threads", "threads")):
        with pytest.raises(UsageError, match=f"is of another run: .*{says}"):
            long_runs.main([*command, option, "7"])
    for damaged in (whole[:1000], b"no archive", lzma.compress(b"no archive"), lzma.compress(bytes(3000))):
        kept.write_bytes(damaged)
        with pytest.raises(UsageError, match="is no kept state of a run"):
            long_runs.main(command)
    assert [path.name for path in (tmp_path / "runs").iterdir() if path.name != "process"] == [
        "w2a2-transitions.commits"
    ]


def test_only_states_of_finished_runs_are_deleted(bench, words, signals, tmp_path):
    long_runs = bench("long_runs")
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    state = tmp_path / "results" / "state"
    state.mkdir(parents=True)
    for name, finished in (("w4a4-long", False), ("w3a3-long", True)):
        (state / f"{name}.tar.xz").write_text("a state")
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps({"finished": finished}))
    signals.extend([0, signal.SIGTERM])
    command = [*words, "--epochs", "3", "--only", "w2a2-more", *folders]  # starts from a network of the repository
    with pytest.raises(SystemExit, match="143"):
        long_runs.main(command)
    long_runs.main(["--keep-state", *folders])
    assert sorted(path.name for path in state.iterdir()) == ["w2a2-more.tar.xz", "w4a4-long.tar.xz"]
    shutil.rmtree(tmp_path / "runs")
    long_runs.main(command)
    assert json.loads((tmp_path / "results" / "w2a2-more.json").read_text())["finished"]


def test_another_processor_is_said_and_a_large_state_refused(bench, words, signals, tmp_path, monkeypatch, capsys):
    long_runs = bench("long_runs")
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    command = [*words, "--epochs", "3", "--only", "w2a2-transitions", *folders]
    stopped(long_runs, signals, tmp_path, command)
    with monkeypatch.context() as patch:
        patch.setattr(long_runs, "LIMIT", 1000)
        with pytest.raises(UsageError, match=r"takes .* bytes, more than 1,000"):
            long_runs.main([*command, "--keep-state"])
    shutil.rmtree(tmp_path / "runs")
    here = long_runs.environment()
    monkeypatch.setattr(long_runs, "environment", lambda: {**here, "processor": "another"})
    monkeypatch.setattr(long_runs, "run_training", lambda run, **_: None)
    long_runs.main(command)
    assert "on another machine (processor" in (said := capsys.readouterr().err)
    assert "here 'another'): not with the same bits" in said


def test_pause_and_continue(bench, tmp_path):
    long_runs = bench("long_runs")
    folders = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    with pytest.raises(UsageError, match="no run is going on"):
        long_runs.main(["--pause", *folders])
    hold = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import long_runs, pathlib, time\n"
    hold += f"with long_runs.alone(pathlib.Path({str(tmp_path / 'runs')!r})): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            for option, wanted in (("--pause", os.CLD_STOPPED), ("--continue", os.CLD_CONTINUED)):
                long_runs.main([option, *folders])
                assert os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WCONTINUED).si_code == wanted
            with pytest.raises(UsageError, match=f"process {process.pid} trains in .* already"):
                long_runs.main(["--init", "x", "--only", "w2a2", *folders])
        finally:
            process.kill()
    with pytest.raises(UsageError, match="no run is going on"):
        long_runs.main(["--continue", *folders])


# ---- the pilot ----


def test_the_pilot_runs_what_is_not_there_yet(bench, words, tmp_path, capsys):
    pilot = bench("pilot")
    command = [*words, "--out", str(tmp_path), "--epochs", "1", "--images", "9", "--bits", "2"]
    names = ["base", "n-batch", "teacher"]
    pilot.main([*command, "--only", *names])
    rows = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert set(rows) == {f"w2a2-{name}.json" for name in names}
    for row in rows.values():
        assert (row["bits"], row["epochs"], row["images"], len(row["loss"])) == (2, 1, 9, 1)
        assert row["accuracy"] in [100 * n / 3 for n in range(4)]  # of all test images
    assert rows["w2a2-base.json"]["loss"] == rows["w2a2-n-batch.json"]["loss"] != rows["w2a2-teacher.json"]["loss"]

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if "teacher" not in path.name}
    (tmp_path / "w2a2-teacher.json").unlink()
    capsys.readouterr()
    pilot.main([*command, "--only", *names])
    assert capsys.readouterr().err.count(" % in ") == 1
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again = json.loads((tmp_path / "w2a2-teacher.json").read_text())
    assert again["loss"] == rows["w2a2-teacher.json"]["loss"]


def test_what_the_pilot_changes_is_changed_and_put_back(bench):
    pilot, model = bench("pilot"), torch.nn.Sequential(torch.nn.Linear(100, 4))
    lsquant.prepare(model, lsquant.Recipe(4, 4))
    lsquant.calibrate(model, [torch.randn(8, 100)])
    quantizers = dict(lsquant.quantizers(model))
    before, factor = {name: q.gradient_scale for name, q in quantizers.items()}, reference.GUARD_FACTOR
    with pilot.changed(batch_in_n=64, guard=0.25):
        inside = {name: q.gradient_scale for name, q in quantizers.items()}
        assert reference.GUARD_FACTOR == 0.25
    assert inside["0.weight_quantizer"] == before["0.weight_quantizer"]
    assert inside["0.input_quantizer"] == pytest.approx(before["0.input_quantizer"] / 8)
    assert {name: q.gradient_scale for name, q in quantizers.items()} == before
    assert factor == reference.GUARD_FACTOR


def test_the_pilot_sees_the_first_images_and_all_test_images_at_the_end(bench, words, monkeypatch):
    pilot = bench("pilot")
    monkeypatch.setattr(pilot, "LOOK", 2)
    task = pilot.Part(words[1], 9)
    labels = joined(six_parts(0))["train"][1]
    seen = torch.cat([y for _, y in task.batches("train", batch_size=4)])
    assert sorted(seen.tolist()) == sorted(labels[:9].tolist())
    assert task.steps_per_epoch(4) == 3
    assert sum(len(y) for _, y in task.batches("test", batch_size=1)) == 2
    task.accuracy(cifar_resnet("resnet20").eval())
    assert sum(len(y) for _, y in task.batches("test", batch_size=1)) == 3


def test_the_table_of_the_pilot(bench, tmp_path, capsys):
    numbers = {
        ("base", 2): (10.0, 80.0),
        ("ema", 2): (10.0, 80.25),
        ("base", 4): (60.0, 90.0),
        ("warmup", 4): (60.0, 89.5),
    }
    for (name, bits), (rounded, accuracy) in numbers.items():
        row = {"variant": name, "bits": bits, "rounded": rounded, "accuracy": accuracy}
        (tmp_path / f"{name}{bits}.json").write_text(json.dumps(row))
    bench("pilot").main(["--table", str(tmp_path)])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.count("trained, %") == 2
    assert [line.partition(" | ")[2] for line in lines] == [
        "10.0 | 80.00 |  | 60.0 | 90.00 |  |",
        " |  |  | 60.0 | 89.50 | -0.50 |",
        "10.0 | 80.25 | +0.25 |  |  |  |",
    ]
