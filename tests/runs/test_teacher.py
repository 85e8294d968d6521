"""Distillation: the loss against a teacher, and the teacher's file in a run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import lsquant
from helpers.logs import untimed
from helpers.small_digits import float_files, network, rounded, small, stopped, task
from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant.runs.network_files import load_teacher
from lsquant.tasks import resume_training, run_training

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return float_files(tmp_path_factory.mktemp("float"))


@pytest.mark.parametrize("width, weight, temperature", [(4, 1.0, 1.0), (6, 1.0, 1.0), (6, 0.5, 3.0), (None, 1.0, 1.0)])
def test_the_loss_against_the_teacher_is_that_of_the_formula(files, tmp_path, width, weight, temperature):
    """A batch holds the whole data, so the epoch's loss is that of the calibrated network before any step."""
    how = {"distill": width == 4, "distill_weight": weight, "distill_temperature": temperature}
    run = small(tmp_path / "a", files, files[6] if width == 6 else None, batch_size=1297, **how)
    metrics = run_training(run, quiet=True)
    model = rounded(files, 1297).train()
    ((x, y),) = run.task.batches("train", batch_size=1297)
    with torch.no_grad():
        logits = model(x)
        expected = F.cross_entropy(logits, y)
        if width is not None:
            p = torch.softmax(network(files, width).eval()(x) / temperature, -1)
            q = torch.softmax(logits / temperature, -1)
            expected = expected + weight * temperature**2 * (p * (p / q).log()).sum() / len(y)
    assert untimed(run.file("log.jsonl"))[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert metrics.get("teacher") == (run.task.metric(network(files, 6)) if width == 6 else None)


def test_a_run_keeps_its_teacher(files, tmp_path):
    whole = small(tmp_path / "whole", files, files[6])
    run_training(whole, quiet=True)
    config = whole.file("config.toml").read_text()
    teacher = tmp_path / "teacher.safetensors"
    teacher.write_bytes(Path(files[6]).read_bytes())
    run = small(tmp_path / "a", files, str(teacher))
    stopped(run)
    assert re.search(r'teacher_sha256 = "[0-9a-f]{64}"', config).group() in run.file("config.toml").read_text()

    teacher.write_bytes(Path(files[4]).read_bytes())
    with pytest.raises(UsageError, match="teacher_sha256 was"):
        run_training(run, resume=True, quiet=True)
    teacher.unlink()
    run_training(run, resume=True, quiet=True)  # needs it no more
    assert run.file("model.safetensors").read_bytes() == whole.file("model.safetensors").read_bytes()


def test_a_teacher_that_changed_in_the_run_is_named(files, tmp_path):
    run = small(tmp_path / "a", files, files[6])
    stopped(run)
    copy = run.file("last/teacher.safetensors")
    copy.write_bytes(Path(files[4]).read_bytes())
    with pytest.raises(DamagedFile, match=r"last/teacher\.safetensors is not the teacher of .*--overwrite"):
        resume_training(run.path, quiet=True)
    copy.unlink()
    with pytest.raises(MissingFile, match=r"teacher\.safetensors does not exist"):
        resume_training(run.path, quiet=True)


def test_teachers_that_do_not_fit_are_named_before_anything_is_written(files, tmp_path):
    with pytest.raises(UsageError, match=r"width5\.safetensors: its tensors fit none of width4, width6"):
        run_training(small(tmp_path / "a", files, files[5]), quiet=True)
    with pytest.raises(MissingFile, match=r"none\.safetensors"):
        run_training(small(tmp_path / "a", files, str(tmp_path / "none.safetensors")), quiet=True)
    plain = replace(small(tmp_path / "a", files, files[6]), task=lsquant.tasks.get_task("digits", width=4))
    with pytest.raises(UsageError, match=r"width6\.safetensors is the checkpoint of another architecture"):
        run_training(plain, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_teacher_of_an_old_file_and_of_a_wrapped_model_fits(files, tmp_path):
    """Without the counters of BatchNorm, which torch once did not have, and with DataParallel's names."""
    old = {f"module.{n}": t for n, t in load_file(files[6]).items() if not n.endswith("num_batches_tracked")}
    save_file(old, tmp_path / "old.safetensors")
    net: Any = load_teacher(task(), tmp_path / "old.safetensors")
    assert net.stem.weight.shape[0] == 6
    assert torch.equal(net.head.weight, network(files, 6).head.weight)
    assert not any(p.requires_grad or p.is_meta for p in net.parameters())
    assert not net.training


@pytest.mark.parametrize("name, blocks", [("resnet20", 3), ("resnet56", 9)])
def test_published_checkpoints_are_recognised(data_folder, name, blocks):
    cifar = lsquant.tasks.get_task("cifar10", data="none")
    net: Any = load_teacher(cifar, data_folder / "checkpoints" / f"cifar10_{name}.safetensors")
    assert len(net.layer3) == blocks
