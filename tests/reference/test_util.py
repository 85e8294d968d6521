"""Files, optional imports, progress and batches."""

from __future__ import annotations

import errno
import io
import json
import os

import pytest
import torch
from torch import nn

from lsquant._util.batches import evaluating, model_inputs, run_batch, take
from lsquant._util.errors import DamagedFile, DiskFull, LsquantError, MissingExtra, MissingFile, UsageError
from lsquant._util.files import atomic_write, atomic_write_text, json_text, read_json, remove_leftovers, write_json
from lsquant._util.optional import require
from lsquant.training.progress import ProgressBar


def test_exit_codes():
    assert [e.exit_code for e in (LsquantError, UsageError, MissingExtra, MissingFile)] == [1, 2, 3, 3]
    assert issubclass(UsageError, ValueError)
    assert issubclass(MissingFile, FileNotFoundError)
    assert issubclass(MissingExtra, ImportError)


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "old")
    atomic_write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("fault", [RuntimeError("stop"), KeyboardInterrupt()])
def test_atomic_write_keeps_the_old_file_on_an_error(tmp_path, fault):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(fault)), atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise fault
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_atomic_write_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"no space left on the disk while writing .*a\.txt"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_full_disk_of_safetensors_is_recognised(tmp_path):
    """The limit on file size stands in for a full disk: the system refuses the write, inside safetensors."""
    resource = pytest.importorskip("resource")
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    path.write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(DiskFull, match=r"a\.safetensors"), atomic_write(path) as temporary:
            save_file({"a": torch.zeros(100_000)}, temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_atomic_write_follows_links_and_needs_the_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    atomic_write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "real" / "a.txt").read_text() == "new"
    with pytest.raises(MissingFile, match="does not exist"):
        atomic_write_text(tmp_path / "none" / "a.txt", "x")


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_those_of_a_new_file_or_of_the_old_one(tmp_path):
    path = tmp_path / "a.txt"
    (tmp_path / "plain").write_text("")
    with atomic_write(path) as temporary:
        temporary.touch(0o600)
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    path.chmod(0o640)
    atomic_write_text(path, "x")
    assert path.stat().st_mode & 0o777 == 0o640


def test_remove_leftovers(tmp_path):
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / ".c.safetensors.123.tmp").write_text("half")
    (tmp_path / "keep.tmp").write_text("mine")
    assert remove_leftovers(tmp_path) == 1
    assert (tmp_path / "keep.tmp").exists()


def test_json(tmp_path):
    assert json.loads(json_text({"a": [float("nan"), 1.5], "b": float("inf")})) == {"a": [None, 1.5], "b": None}
    write_json(tmp_path / "a.json", {"x": 1})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    (tmp_path / "b.json").write_text('{"x": ')
    with pytest.raises(DamagedFile, match=r"b\.json"):
        read_json(tmp_path / "b.json")
    with pytest.raises(MissingFile, match=r"c\.json"):
        read_json(tmp_path / "c.json")


def test_require(tmp_path, monkeypatch):
    assert require("json", extra="x") is json
    with pytest.raises(MissingExtra, match=r"lsquant\[onnx\]"):
        require("no_such_package.part", extra="onnx")
    (tmp_path / "broken_package.py").write_text("import missing_inside\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="missing_inside") as caught:
        require("broken_package", extra="onnx")
    assert not isinstance(caught.value, MissingExtra)


def test_progress_off_a_terminal():
    stream = io.StringIO()
    bar = ProgressBar(range(3), label="epoch 1", stream=stream)
    bar.note("loss 0.5")
    assert list(bar) == [0, 1, 2]
    text = stream.getvalue()
    assert text.count("\n") == 1
    assert "\r" not in text
    assert "\x1b" not in text
    assert "epoch 1" in text
    assert "3/3" in text
    assert "loss 0.5" in text


def test_progress_quiet():
    stream = io.StringIO()
    assert list(ProgressBar(iter("ab"), quiet=True, stream=stream)) == ["a", "b"]
    assert stream.getvalue() == ""


class _Keywords(nn.Module):
    def forward(self, a, b=0):
        return a + b


def test_batches():
    model, x = _Keywords(), torch.ones(2)
    assert torch.equal(run_batch(model, x), x)
    assert torch.equal(run_batch(model, (x, "label")), x)
    assert torch.equal(run_batch(model, [x]), x)
    assert torch.equal(run_batch(model, {"a": x, "b": x}), 2 * x)
    assert torch.equal(run_batch(model, "s", lambda m, batch: m(x, len(batch))), 2 * x)
    with pytest.raises(UsageError, match="forward="):
        model_inputs("text")
    with pytest.raises(UsageError, match="empty"):
        model_inputs(())


def test_take_asks_for_no_more_than_needed():
    source = iter(range(5))
    assert list(take(source, 2)) == [0, 1]
    assert next(source) == 2
    with pytest.raises(UsageError, match="no batches"):
        list(take([], None))
    with pytest.raises(UsageError, match=r"pass \[batch\]"):
        list(take(torch.zeros(2), None))
    with pytest.raises(UsageError, match="at least 1"):
        list(take([1], 0))


def test_evaluating_restores_every_mode():
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    model[1].eval()
    with pytest.raises(RuntimeError), evaluating(model):  # noqa: PT012
        assert not model.training
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert torch.is_grad_enabled()
