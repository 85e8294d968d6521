"""Every writer of files, where the disk is full or the folder may not be written: one error and the old file."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
from lsquant._util.errors import CannotWrite, DiskFull
from lsquant._util.files import atomic_write_text, write_json
from lsquant.report.figure import draw_figures
from lsquant.runs.lock import RunLock
from lsquant.training import Log
from lsquant.training.state import save_state

resource = pytest.importorskip("resource")
LIMIT = 2048  # bytes of a file; what is written here has more


class Big(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = Big()
    lsquant.prepare(model, lsquant.Recipe(4, 4))
    lsquant.calibrate(model, [torch.randn(16, 64)])
    return model.eval()


def export_onnx(profile: str) -> Callable[[nn.Module, Path], Any]:
    def write(model: nn.Module, path: Path) -> None:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        lsquant.export_onnx(model, path, torch.randn(1, 64), profile=profile)  # type: ignore[arg-type]

    return write


def vectors(model: nn.Module, path: Path) -> None:
    lsquant.export_vectors(model, path, torch.randn(4, 64))


WRITERS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save": lsquant.save,
    "packed": lsquant.export_packed,
    "exact": export_onnx("exact"),
    "qdq": export_onnx("qdq"),
    "report": lambda model, path: lsquant.write_report(model, path, [torch.randn(4, 64)]),
    "vectors": vectors,
    "checkpoint": lambda model, path: save_state(path, {"model": dict(model.state_dict())}),
    "text": lambda model, path: atomic_write_text(path, "x" * 10_000),
    "json": lambda model, path: write_json(path, ["x" * 10_000]),
}


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond LIMIT: as on a full disk, the system refuses what is written after that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("old", [None, b"the old file"])
@pytest.mark.parametrize("what", WRITERS)
def test_a_full_disk(what: str, old: bytes | None, model: nn.Module, tmp_path: Path) -> None:
    name = "m.npz" if what == "vectors" else "m"
    path = tmp_path / name
    if old is not None:
        path.write_bytes(old)
    if what == "vectors":  # beside it a small script is written first
        (tmp_path / "check_vectors.py").write_text("old")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with full_disk(), pytest.raises(DiskFull, match=r"^no space left on the disk while writing .*old file") as caught:
        WRITERS[what](model, path)
    assert str(tmp_path) in str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    after = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    assert after.keys() - {"check_vectors.py"} == before.keys() - {"check_vectors.py"}
    assert after.get(name) == old
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    WRITERS[what](model, path)  # with space again
    assert path.stat().st_size > LIMIT


def test_a_full_disk_under_a_log(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.append({"a": 1})
    with full_disk(), pytest.raises(DiskFull, match=r"log\.jsonl"):
        log.append({"a": "x" * 10_000})


def test_a_full_disk_under_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with full_disk(), pytest.raises(DiskFull, match="staircase"):
        draw_figures(tmp_path, bits=2)
    assert [entry.name for entry in tmp_path.iterdir()] == []


READ_ONLY = Path("/sys/kernel")  # not even root writes there


@pytest.mark.skipif(not READ_ONLY.is_dir(), reason="needs a folder that nobody may write to")
@pytest.mark.parametrize("what", WRITERS)
def test_a_folder_that_may_not_be_written(what: str, model: nn.Module) -> None:
    with pytest.raises(CannotWrite, match=r"^cannot write /sys/kernel/\S+: [^\n]+$") as caught:
        WRITERS[what](model, READ_ONLY / ("m.npz" if what == "vectors" else "m"))
    assert isinstance(caught.value, OSError)
    assert caught.value.exit_code == 3


@pytest.mark.skipif(not READ_ONLY.is_dir(), reason="needs a folder that nobody may write to")
def test_a_run_directory_that_may_not_be_written() -> None:
    with pytest.raises(CannotWrite, match=r"^cannot write /sys/kernel/\.lock: "):
        RunLock(READ_ONLY)
    with pytest.raises(CannotWrite, match=r"cannot write /sys/kernel/log\.jsonl"):
        Log(READ_ONLY / "log.jsonl").append({"a": 1})


def test_vectors_are_numbers_again(model: nn.Module, tmp_path: Path) -> None:
    vectors(model, tmp_path / "m.npz")
    with np.load(tmp_path / "m.npz") as found:
        assert found.files
