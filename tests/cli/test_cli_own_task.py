"""``lsquant train FILE.py:task`` and the commands on its run, with the files of cli_own.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.cli_own import result, run


@pytest.mark.parametrize("name", ["task", "Points", "make"])
def test_train_a_task_of_ones_own(own, capsys, name):
    where = f"points.py:{name}"
    facts = result(capsys, "train", where, "--bits", "4", "--out", "run", "--quiet")
    assert facts["lsq"]["accuracy"] > 80
    settings = (own / "run" / "config.toml").read_text()
    assert f'task = "{where}"' in settings
    assert "batch_size = 32" in settings  # the task's own settings
    assert result(capsys, "eval", "run", "--task", where)["accuracy"] == facts["lsq"]["accuracy"]
    assert result(capsys, "train", where, "--resume", "--out", "run", "--quiet")["lsq"] == facts["lsq"]
    result(capsys, "check", "run", "--task", where)
    for command in (["train", "--resume", "--out", "run"], ["eval", "run"], ["check", "run"], ["export", "run"]):
        run(*command, code=2)  # what a directory names is not run
        assert "if you trust that file, name it with --task FILE.py:task" in capsys.readouterr().err
    run("check", "run", "--model", "points.py:task", code=2)
    assert "leave out --model and --data" in capsys.readouterr().err


def test_a_run_is_opened_from_another_folder(own, capsys, monkeypatch):
    """The task's file is found where the run was started, so that `report` does not replace a page by a poorer one."""
    facts = result(capsys, "train", "points.py:task", "--bits", "4", "--out", "run", "--quiet")
    elsewhere = own / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    named = ["--task", "../points.py:task"]
    assert result(capsys, "eval", "../run", *named)["accuracy"] == facts["lsq"]["accuracy"]
    assert result(capsys, "report", "../run", *named)["missing"] == []
    assert result(capsys, "train", "../points.py:task", "--resume", "--out", "../run", "--quiet")["lsq"] == facts["lsq"]
    (own / "points.py").rename(own / "moved.py")
    run("eval", "../run", *named, code=3)
    assert "points.py does not exist" in capsys.readouterr().err


def test_a_run_of_a_built_in_task_is_opened_from_another_folder(own, capsys, monkeypatch):
    pytest.importorskip("sklearn")
    short = ["--float-epochs", "0", "--epochs", "0", "--quiet"]
    facts = result(capsys, "train", "digits", "--bits", "4", "--out", "run", *short)
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    assert result(capsys, "eval", "../run") == facts["lsq"]


def test_train_wrong_tasks(own, capsys):
    for where, text in (
        ("points.py:tsak", "points.py has no 'tsak'; near names: task"),
        ("points.py:half", "is a Linear and no task: it lacks batches, example_input"),
        ("points", "there is no task 'points'; tasks: digits, cifar10, text, or your own as FILE.py:task"),
    ):
        run("train", where, "--bits", "4", "--out", "run", code=2)
        assert text in capsys.readouterr().err
    run("train", "point.py:task", "--bits", "4", "--out", "run", code=3)
    assert "near names: points.py" in capsys.readouterr().err
    assert not Path("run").exists()


def test_check_of_a_digits_run(own, capsys):
    pytest.importorskip("sklearn")
    short = ["--float-epochs", "1", "--epochs", "1", "--quiet"]
    run("train", "digits", "--bits", "4", "--out", "run", *short)
    facts = result(capsys, "check", "run", "--max-batches", "2")
    assert facts["errors"] == 0
