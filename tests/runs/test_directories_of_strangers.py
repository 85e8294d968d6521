"""Run directories come from strangers: each value is typed, an error names file and key, no code of theirs runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import lsquant
from helpers.edited_files import read_safetensors, write_safetensors
from lsquant import Recipe, Rule
from lsquant._util.errors import DamagedFile, LsquantError, UsageError
from lsquant.cli import main as command
from lsquant.report.run_files import read_verdict, run_files
from lsquant.runs.directory import Run, is_run, read_run, start_run
from lsquant.runs.lock import HOLDER, RunLock
from lsquant.runs.log_reader import latest, log_rows, read_metrics
from lsquant.tasks import Settings, get_task, open_run, run_training
from lsquant.tasks.digits import Digits
from lsquant.training import Log, TransitionRate, fit, load_state, param_groups, save_state
from lsquant.training.seeds import rng_state, set_rng_state

RULES = [Rule("re:conv[12]", 3), Rule(nn.Linear, 8, 8), Rule("stem", 8)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    start_run(Run(tmp_path / "run", Digits(width=2), Recipe(4, 4, RULES), Settings(progressive=(8,))))
    return tmp_path / "run"


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("epochs = 30\nlr", 'epochs = "30"\nlr', "settings: epochs='30': it must be a whole number"),
        ("distill = false", "distill = 0", "settings: distill=0: it must be true or false"),
        ("progressive = [8]", "progressive = 8", "settings: progressive=8: it must be a list of bits"),
        ("progressive = [8]", "progressive = [8.0]", "progressive"),
        ("weight_decay = 0.0001", "weight_decay = 1e300", "weight_decay=1e\\+300: it must be a number from 0 to 1e"),
        ("epochs = 30\nlr = 0.01", "epochs = 30\nlr = 1e300", r"settings: lr=1e\+300: it must be a number from 0"),
        ("lr = 0.01", "lr = nan", "settings: lr=nan: it must be a number from 0"),
        ('optimizer = "sgd"', "optimizer = ['sgd']", r"settings: optimizer=\['sgd'\]: it must be a word"),
        ("seed = 0", "sede = 0", "settings: unknown setting sede"),
        ("seed = 0", "seed = 0\nthreads = 200000", "settings: threads=200000: it must be at most 1024"),  # a crash
        ("seed = 0", "seed = 0x" + "f" * 40, "seed=an integer of 160 bits"),
        ('task = "digits"', "task = 3", "task is 3; needed is a text"),
        ("width = 2", "width = [[2]]", r"options\.width\[0\]: \[2\] is no option"),
        ("width = 2", "width = 0x" + "f" * 40, r"options\.width: an integer beyond 64 bits"),
        ("width = 2", "width = 1979-05-27", "is no option of a task"),
        ("format = 1", "format = true", "format True; this version reads"),
        ("format = 1", "format = 2", "format 2; this version reads"),
        ("[options]", "[options", "not valid TOML"),
        ("kind", "a." * 90 + "kind", "nested deeper"),
    ],
)
def test_config(old, new, says, run):
    config = run / "config.toml"
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(DamagedFile, match=rf"config\.toml .*{says}"):
        read_run(run)


@pytest.mark.parametrize("width", ["'24'", "true", "0", "2.0", "5000"])
def test_options_of_a_task(width, run):
    config = run / "config.toml"
    config.write_text(config.read_text().replace("width = 2", f"width = {width}"))
    with pytest.raises(UsageError, match=r"task 'digits': width=.*a number of channels from 1 to 4096"):
        open_run(run)


def test_what_is_no_text(run):
    for data in (b"\xff\xfe", b"\x00", b"[" * 100_000):
        (run / "config.toml").write_bytes(data)
        assert not is_run(run)
        with pytest.raises(DamagedFile, match=r"config\.toml is "):
            read_run(run)


def test_recipe_toml_holds_names_and_the_run_is_the_same(run):
    """Classes and regular expressions of code are written as the names they match; resuming compares these."""
    stored = read_run(run).recipe
    assert [rule.which for rule in stored.rules] == ["conv1", "conv2", "head", "stem"]
    assert "re:" not in (run / "recipe.toml").read_text()
    assert "class:" not in (run / "recipe.toml").read_text()
    same = Run(run, Digits(width=2), Recipe(4, 4, RULES), Settings(progressive=(8,)))
    start_run(same, resume=True)
    other = Run(run, Digits(width=2), Recipe(4, 4, RULES[1:]), Settings(progressive=(8,)))
    with pytest.raises(UsageError, match=r"is another run .recipe was"):
        start_run(other, resume=True)


def test_code_that_a_directory_names_is_not_run(run, monkeypatch):
    """Wherever it lies, unless the user names it."""
    monkeypatch.chdir(run.parent)
    (run.parent / "theirs.py").write_text("open('ran', 'w').close()\nfrom lsquant.tasks.digits import Digits as task\n")
    (run / "theirs.py").write_text((run.parent / "theirs.py").read_text())
    config, text = run / "config.toml", (run / "config.toml").read_text()
    for name in ("theirs.py:task", "run/theirs.py:task", f"{run}/theirs.py:task", "os:system", "../x.py:task"):
        config.write_text(text.replace('task = "digits"', f'task = "{name}"'))
        with pytest.raises(UsageError, match="nothing that a run directory names is run"):
            open_run(run)
    assert not Path("ran").exists()
    config.write_text(text.replace('task = "digits"', 'task = "theirs.py:task"'))
    assert open_run(run, "theirs.py:task").task_name == "theirs.py:task"
    assert Path("ran").exists()


def test_a_log_of_anything(tmp_path):
    """Rows that are none are named, numbers beyond reason are left out, and nothing is taken for more than it is."""
    rows = [
        json.dumps({"quantizers": {"a": {"step": 0.5, "guarded": True, "R": "x"}, "b": 3}}),
        "[1]", "{", "[" * 5000, '{"quantizers": {"a": {"step": 1' + "0" * 400 + "}}}", '{"loss": NaN}', "\x00",
        json.dumps({"quantizers": {"a": {"step": 1e999}}}).replace("Infinity", "1e999"),
    ]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(rows))
    missing: list[str] = []
    assert latest(log_rows(tmp_path / "log.jsonl", missing)) == {"a": {"step": 0.5}, "b": {}}
    assert missing == ["log.jsonl: line 2, 3, 4, 5, 6 and others cannot be read"]
    with pytest.raises(DamagedFile, match=r"line 1 of .*log\.jsonl is damaged"):
        Log(tmp_path / "log.jsonl").rows()


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"lsq": 3}', "lsq is 3; needed is a table"),
        ('{"lsq": {"accuracy": "90"}}', r"lsq\.accuracy is '90'; needed is a finite number"),
        ('{"seed": 1.5}', "seed is 1.5; needed is an integer"),
        ('{"lsq": {"accuracy": 1e999}}', "lsq.accuracy is inf; needed is a finite number"),
        ("[]", "its content is .*; needed is a table"),
    ],
)
def test_metrics(text, says, tmp_path):
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(DamagedFile, match=rf"metrics\.json is damaged: {says}"):
        read_metrics(tmp_path / "metrics.json")
    assert read_metrics_of('{"lsq": {"accuracy": null}, "task": "x"}', tmp_path) == {
        "lsq": {"accuracy": None}, "task": "x"
    }  # fmt: skip


def read_metrics_of(text: str, folder: Path) -> dict:
    (folder / "metrics.json").write_text(text)
    return read_metrics(folder / "metrics.json")


def test_verdicts_and_what_the_report_takes(run):
    good = {"level": "codes", "profile": "exact", "runtime": "x", "samples": 3, "session": {}, "checks": []}
    file = run / "export" / "exact.verdict.json"
    file.write_text(json.dumps(good))
    assert read_verdict(file) == good
    for change in ({"level": "all"}, {"samples": -1}, {"samples": True}, {"session": {"a": 1}}, {"checks": [{}]},
                   {"plain": {"plain": good}}, {"plain": {**good, "plain": good}}, {"profile": ["x"]}):  # fmt: skip
        file.write_text(json.dumps(good | change))
        with pytest.raises(DamagedFile, match=r"exact\.verdict\.json is damaged: "):
            read_verdict(file)
        found = run_files(run)
        assert found["verdicts"] == []
        assert any("exact.verdict.json is damaged" in text for text in found["missing"])


# ---- checkpoints of a training ----


def trained(path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(param_groups(model, 0.1))
    data = [(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))] * 2
    fit(model, lambda epoch: data, optimizer, epochs=2, steps_per_epoch=2, checkpoint=path, resume=True, quiet=True)


def change(state: dict, *keys: object, to: object) -> None:
    for key in keys[:-1]:
        state = state[key]
    state[keys[-1]] = to


@pytest.mark.parametrize(
    "keys, value, says",
    [
        (("at", "epoch"), -1, r"at\.epoch is -1; needed is an integer from 0 to 2"),
        (("at", "step"), 1.0, r"at\.step is 1\.0"),
        (("at", "log_position"), -5, "log_position is -5"),
        (("at", "colour"), 1, "unknown key 'colour'"),
        (("threads",), "one", "threads is 'one'"),
        (("model",), [1], "model is"),
        (("model", "state", "weight"), "w", r"model\.state\.weight is 'w'; needed is a tensor"),
        (("optimizer", "state"), {"a": 1}, "a table by numbers of parameters"),
        (("optimizer", "state", 0, "exp_avg"), torch.ones(7), r"exp_avg: shape \(7,\)"),
        (("optimizer", "state", 0, "exp_avg"), 1.0, "is no tensor"),
        (("optimizer", "state", 1), {"step": torch.tensor(4.0)}, r"state\.1.*the key 'exp_avg' is missing"),
        (("optimizer", "param_groups", 0, "amsgrad"), True, "the key 'max_exp_avg_sq' is missing"),
        (("optimizer", "state", 0, "step"), torch.tensor(-1000.0), "needed is a finite number from 0"),
        (("optimizer", "state", 0, "step"), torch.tensor(torch.inf), "needed is a finite number from 0"),
        (("optimizer", "param_groups", 0, "lr"), "fast", "lr is 'fast'"),
        (("optimizer", "param_groups", 0, "betas"), (0.9, 1.0), "betas: 1.0 as number 1"),
        (("optimizer", "param_groups", 0, "betas"), 3, "betas is 3"),
        (("optimizer", "param_groups", 0, "fused"), "yes", "fused is 'yes'"),
        (("rng", "numpy", 2), 10_000, "rng.numpy.2 is 10000; needed is an integer from 0 to 624"),
        (("rng", "python"), (3, (1, 2), None), "needed is 625 integers"),
        (("rng", "torch"), torch.zeros(5, dtype=torch.uint8), r"rng\.torch: Expected a CPUGeneratorImplState"),
        (("epoch_rng",), {}, "the key 'torch' is missing"),
        (("extras",), [], "extras is"),
    ],
)
def test_checkpoints(keys, value, says, tmp_path):
    trained(tmp_path / "c")
    state = load_state(tmp_path / "c")
    state["at"]["epoch"] = 1
    change(state, *keys, to=value)
    save_state(tmp_path / "c", state)
    random = rng_state()
    try:
        with pytest.raises(LsquantError, match=f"damaged: .*{says}"):
            trained(tmp_path / "c")
    finally:
        set_rng_state(random)


def test_the_rate_of_transitions(tmp_path):
    """A rate that is finite and beyond float32 would fail in the optimizer's step (found by the fuzzer)."""
    model = nn.Sequential(nn.Linear(4, 4))
    lsquant.prepare(model, Recipe(4, None))
    control = TransitionRate(model, torch.optim.SGD(param_groups(model, 0.1, low_bit=True)), steps=9)
    for change in ({"lr": 1e300}, {"rate": 2.0}, {"done": -1}, {"trace": [[1, 2, 3]]}, {"trace": 3}, {"colour": 1}):
        with pytest.raises(DamagedFile, match="the state of TransitionRate is damaged"):
            control.load_state_dict(control.state_dict() | change)


@pytest.mark.parametrize(
    "structure, says",
    [
        ("[1]", "its structure is"),
        ('{"dict": 3}', "needed is a list"),
        ('{"dict": [[1]]}', "a pair of key and value"),
        ('{"dict": [["a", 1], ["a", 2]]}', "the key 'a' is there twice"),
        ('{"dict": [[1.5, 1]]}', "needed is a text"),
        ('{"tensor": "nothing"}', "needed is one of"),
        ('{"tensor": ["a"]}', "needed is one of"),
        ('{"float": "1"}', "needed is one of 'nan', 'inf', '-inf'"),
        ('{"class": "os.system"}', "unknown structure 'class'"),
        ('{"dict": [], "tuple": []}', "unknown structure"),
        ("[" * 200 + "]" * 200, "nested deeper than 64"),
        ("{", "not valid JSON"),
    ],
)
def test_structures(structure, says, tmp_path):
    save_state(tmp_path / "c", {"a": torch.ones(2)})
    tensors, metadata = read_safetensors(tmp_path / "c")
    write_safetensors(tmp_path / "c", tensors, metadata | {"structure": structure}, True)
    with pytest.raises(DamagedFile, match=f"c is damaged: .*{says}"):
        load_state(tmp_path / "c")


LINKS = {
    "export/exact.onnx": ["export", "RUN"],
    "export": ["export", "RUN"],
    "export/exact.verdict.json": ["verify", "RUN"],
    "report.html": ["report", "RUN"],
    "log.jsonl": ["train", "--resume", "--out", "RUN"],
    "metrics.json": ["train", "--resume", "--out", "RUN"],
    "last": ["train", "--resume", "--out", "RUN"],
    "last/float.safetensors": ["train", "--resume", "--out", "RUN"],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("links") / "run"
    settings = Settings(epochs=0, float_epochs=0, batch_size=80, threads=1)
    run_training(Run(path, get_task("digits"), Recipe.preset("w2a2"), settings), quiet=True)
    assert command(["export", str(path), "--quiet"]) == 0
    return path


@pytest.mark.parametrize("place", LINKS)
def test_nothing_is_written_through_a_link_in_a_run(place, finished, tmp_path, capsys):
    """A directory out of an archive may have links to any file of the user's; the user named none of them."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(finished, run)
    entry = run / place
    if entry.is_dir():
        entry.rename(mine)
    else:
        mine.write_text("precious")
        entry.unlink(missing_ok=True)
    entry.symlink_to(mine)
    before = {file.name: file.read_bytes() for file in ([mine] if mine.is_file() else mine.iterdir())}
    assert command([word.replace("RUN", str(run)) for word in LINKS[place]]) == 2
    assert f"{place} is a symbolic link" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in ([mine] if mine.is_file() else mine.iterdir())} == before
    assert command(["check", str(run), "--quiet"]) in (0, 1)  # it can be read


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    (run / HOLDER).symlink_to(tmp_path / "mine")
    with RunLock(run):
        assert json.loads((run / HOLDER).read_text())["process"] == os.getpid()
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("phase", ["../out", "/tmp/lsquant-out", "a/../../out", "C:\\out", "\\\\host\\out"])
def test_the_phase_of_a_log_is_no_path(phase, tmp_path):
    pytest.importorskip("tensorboard")
    log = Log(tmp_path / "run" / "log.jsonl", tmp_path / "run" / "board")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"phase": phase, "iteration": 1, "loss": 2.0}) + "\n")
    with pytest.raises(DamagedFile, match="leads out of"):
        log.append({"phase": "lsq", "iteration": 2, "loss": 1.0})
    assert not list(tmp_path.rglob("events*"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run"]
