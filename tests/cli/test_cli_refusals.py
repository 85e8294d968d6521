"""What the command line refuses: one line on stderr, the right exit code, nothing written."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

from helpers.command_line import refused, run
from lsquant.cli import commands, training

for package in ("sklearn", "onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

USAGE: dict[str, tuple[str, ...]] = {
    "--bits 1: bits are 2 to 8": ("train", "digits", "--bits", "1", "--out", "OUT"),
    "--bits 9: bits are 2 to 8": ("train", "digits", "--bits", "9", "--out", "OUT"),
    "--bits 0: bits are 2 to 8": ("train", "digits", "--bits", "0", "--out", "OUT"),
    "--bits 1: bits are 2 to 8 *": ("train", "digits", "--weight-bits", "4", "--activation-bits", "1", "--out", "OUT"),
    "did you mean 'digits'": ("train", "digit", "--bits", "2", "--out", "OUT"),
    "give --bits N": ("train", "digits", "--out", "OUT"),
    "give --bits N,": ("train", "digits", "--weight-bits", "2", "--out", "OUT"),
    "name a task": ("train", "--bits", "2", "--out", "OUT"),
    "not both": ("train", "digits", "--bits", "2", "--recipe", "r.toml", "--out", "OUT"),
    "required: --out": ("train", "digits", "--bits", "2"),
    "epochs=-1": ("train", "digits", "--bits", "2", "--epochs", "-1", "--out", "OUT"),
    "batch_size=0": ("train", "digits", "--bits", "2", "--batch-size", "0", "--out", "OUT"),
    "invalid int value: 'two'": ("train", "digits", "--bits", "two", "--out", "OUT"),
    "--threads 0": ("env", "--threads", "0"),
    "--threads 99999999999": ("env", "--threads", "99999999999"),
    "invalid choice: 'nonsense'": ("nonsense",),
    "COMMAND": (),
    "unrecognized arguments: --fast": ("env", "--fast"),
    "invalid choice: 'none'": ("verify", "OUT", "--require", "none"),
    "figure.*bits|bits.*2 to 8": ("figure", "--bits", "9", "--out", "OUT"),
}


@pytest.mark.parametrize("says", USAGE)
def test_usage_errors(says, in_tmp):
    refused(2, says, *USAGE[says])
    assert not list(in_tmp.iterdir())


MISSING: dict[str, tuple[str, ...]] = {
    "no run directory": ("eval", "none"),
    "no run directory:": ("export", "none"),
    "no run directory: it": ("verify", "none"),
    "no run directory: it has": ("report", "none"),
    "no run directory: it has no": ("train", "--resume", "--out", "none"),
    "recipe r.toml does not exist": ("train", "digits", "--recipe", "r.toml", "--out", "OUT"),
}


@pytest.mark.parametrize("says", MISSING)
def test_missing_files(says, in_tmp):
    refused(3, says, *MISSING[says])
    assert not list(in_tmp.iterdir())


def test_what_is_missing_or_damaged_in_a_run(line, tmp_path):
    path, _ = line
    refused(3, r"none\.onnx does not exist", "verify", path, "--file", tmp_path / "none.onnx")
    refused(3, r"lsquant export .* --profile small", "verify", path, "--profile", "small")
    (tmp_path / "bad.onnx").write_bytes((path / "export" / "exact.onnx").read_bytes()[:500])
    refused(3, r"bad\.onnx", "verify", path, "--file", tmp_path / "bad.onnx")
    refused(2, "profile|fast", "export", path, "--profile", "fast", "--out", tmp_path / "fast.onnx")
    refused(3, "folder", "export", path, "--out", tmp_path / "none" / "m.onnx")
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.toml", "recipe.toml"):
        (half / name).write_bytes((path / name).read_bytes())
    refused(3, r"no model\.safetensors: the run is not finished", "eval", half)
    (half / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9])
    refused(3, r"model\.safetensors is damaged", "eval", half)
    (half / "config.toml").write_text("format = ")
    refused(3, r"config\.toml", "eval", half)
    assert not (tmp_path / "fast.onnx").exists()


@pytest.mark.parametrize(
    "package, extra, command",
    [
        ("sklearn.datasets", "digits", ("train", "digits", "--bits", "2", "--out", "OUT")),
        ("onnx", "onnx", ("export", "RUN", "--out", "m.onnx")),
        ("onnxruntime", "onnx", ("verify", "RUN")),
        ("matplotlib", "figure", ("figure",)),
        ("tensorboard", "tensorboard", ("train", "digits", "--bits", "2", "--tensorboard", "--out", "OUT")),
    ],
)
def test_a_missing_extra_is_named(package, extra, command, line, in_tmp, monkeypatch):
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    command = [line[0] if part == "RUN" else part for part in command]
    refused(3, rf"pip install 'lsquant\[{extra}\]'", *command)


def test_an_interrupt(monkeypatch):
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "environment", stop)
    refused(130, "interrupted", "env")


def test_sigterm_is_an_interrupt_that_says_how_to_go_on(monkeypatch, in_tmp):
    monkeypatch.setattr(training, "run_training", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    refused(130, "interrupted\n$", "train", "digits", "--bits", "2", "--out", "x")  # there is no run yet
    (in_tmp / "x").mkdir()
    (in_tmp / "x" / "config.toml").write_text('kind = "lsquant run"\n')
    refused(130, "go on with: lsquant train --resume --out x", "train", "digits", "--bits", "2", "--out", "x")
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_errors_are_not_hidden(monkeypatch):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(commands, "environment", fail)
    with pytest.raises(ZeroDivisionError):
        run("env")
