"""How a command ends where it cannot go on: one line on stderr, the exit code, no traceback, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import refused, run
from lsquant import cli

SCRIPT = "import sys; from lsquant.cli import main; sys.exit(main())"
TRAIN = ("train", "digits", "--bits", "2", "--epochs", "500", "--threads", "1", "--quiet")
linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")


def script(folder: Path) -> list[str]:
    """The command as installed: a script of the name lsquant."""
    file = folder / "bin" / "lsquant"
    file.parent.mkdir()
    file.write_text(SCRIPT)
    return [sys.executable, str(file)]


RUNNING: list[subprocess.Popen[str]] = []
PATIENCE = 600 if os.environ.get("LSQUANT_SANITIZE") else 60  # seconds; sanitizers make all of it slower


@pytest.fixture(autouse=True)
def nothing_stays_alive() -> Iterator[None]:
    """A test that fails leaves no process behind, which would compute beside all tests that follow."""
    yield
    for process in RUNNING:
        process.kill()
    RUNNING.clear()


def started(command: list[str], folder: Path) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    RUNNING.append(subprocess.Popen(command, cwd=folder, text=True, **pipes))
    return RUNNING[-1]


def waited(process: subprocess.Popen[str], condition: Any, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@linux
@pytest.mark.parametrize(
    "mapped, number, how",
    [
        ("libtorch_python", signal.SIGINT, "script"),
        ("_multiarray_umath", signal.SIGINT, "script"),
        ("_multiarray_umath", signal.SIGINT, "module"),
        ("libtorch_python", signal.SIGTERM, "module"),
    ],
)
def test_ctrl_c_while_pytorch_is_imported(mapped: str, number: signal.Signals, how: str, tmp_path: Path) -> None:
    """In the first second: once a library of PyTorch or NumPy is mapped, its import is under way."""
    command = script(tmp_path) if how == "script" else [sys.executable, "-m", "lsquant"]
    process = started([*command, *TRAIN, "--out", "run"], tmp_path)
    maps = Path(f"/proc/{process.pid}/maps")
    waited(process, lambda: mapped in maps.read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (130, "", "lsquant: interrupted\n")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "bin"] == []


def test_ctrl_c_while_a_run_is_trained(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    process = started([*script(tmp_path), *TRAIN, "--out", "run"], tmp_path)
    waited(process, lambda: (tmp_path / "run" / "last" / "float.safetensors").exists())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (130, "")
    assert err == "lsquant: interrupted; go on with: lsquant train --resume --out run\n"
    left = [path.name for path in (tmp_path / "run").rglob("*")]
    assert not [name for name in left if name.endswith(".tmp") or "lock" in name]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bin", "run"]


def test_ctrl_c_before_there_is_a_run_gives_no_hint(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lsquant.cli.training.get_task", interrupted)
    result = run(*TRAIN, "--out", tmp_path / "run")
    assert (result.code, result.out, result.err) == (130, "", "lsquant: interrupted\n")
    monkeypatch.setattr(sys.modules["lsquant.cli.main"], "parser", interrupted)
    result = run("env")
    assert (result.code, result.out, result.err) == (130, "", "lsquant: interrupted\n")


def test_no_other_program_gets_handlers() -> None:
    code = "import signal; before = signal.getsignal(2); import lsquant; assert signal.getsignal(2) is before"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=2 * PATIENCE)


# ---- stdout and stderr ----


@pytest.mark.skipif(os.name != "posix", reason="a shell's redirections")
@pytest.mark.parametrize(
    "redirection, says, code",
    [
        (">&-", "lsquant: error: cannot write the result to stdout: it is closed", 3),
        (">/dev/full", "lsquant: error: cannot write the result to stdout: No space left on device", 3),
        ("2>&- >&-", "", 3),
    ],
)
def test_a_stdout_that_takes_nothing(redirection: str, says: str, code: int, tmp_path: Path) -> None:
    line = f'"{sys.executable}" -m lsquant env {redirection}'
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(says)
    assert done.stderr.count("\n") == bool(says)


@pytest.mark.parametrize("arguments", [["env"], ["--help"]])
def test_a_reader_that_has_gone(arguments: list[str], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lsquant", *arguments]
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=2 * PATIENCE)
    os.close(writer)
    if arguments == ["--help"]:  # argparse keeps the error of its own writing to itself
        assert (done.returncode in (0, 3), "Traceback" in done.stderr) == (True, False)
        return
    assert done.returncode == 3
    assert done.stderr == "lsquant: error: cannot write the result to stdout: Broken pipe\n"


def test_a_stderr_whose_reader_has_gone_costs_the_message_only(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lsquant", "eval", "none"]
    done = subprocess.run(command, cwd=tmp_path, stderr=writer, stdout=subprocess.PIPE, text=True, timeout=2 * PATIENCE)
    os.close(writer)
    assert (done.returncode, done.stdout) == (3, "")


# ---- files and folders ----


def test_errors_of_the_system_are_one_line(tmp_path: Path, monkeypatch) -> None:
    def failing(_: Any) -> None:
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr("lsquant.cli.commands.environment", lambda: failing(None))
    refused(3, r"^lsquant: error: /some/file: Permission denied\n$", "env")


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="a folder that not even root may write to")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    refused(3, r"^lsquant: error: cannot write .*\n$", *TRAIN, "--out", "/sys/kernel/run")
    refused(3, r"^lsquant: error: .*/sys/kernel.*\n$", "figure", "--out", "/sys/kernel")


def test_the_entry_point_is_what_the_script_calls() -> None:
    assert SCRIPT.split("from ")[1].startswith(f"{cli.__name__} import main")


def test_a_name_that_the_terminal_does_not_take(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, and characters that an ASCII stdout has not: they are written as escapes."""
    command = [sys.executable, "-m", "lsquant", "figure", "--out"]
    for name, says in ((b"\xff", rb"\udcff"), ("ü".encode(), rb"\xfc")):
        folder = os.fsencode(tmp_path) + b"/" + name
        done = subprocess.run(
            [*command, folder], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert says in done.stdout


def test_what_a_file_says_does_not_steer_the_terminal(capsys) -> None:
    cli.main(["eval", "\x1b]0;title\x07\x1b[2J"])
    said = capsys.readouterr().err
    assert "\x1b" not in said
    assert "\x07" not in said
    assert r"\x1b]0;title\x07" in said
