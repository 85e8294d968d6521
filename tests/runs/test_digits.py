"""The task digits, run directories, and a whole training: what is left, what is refused, what is repeated."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lsquant
import lsquant.nn
from helpers.logs import untimed
from lsquant._util.errors import DamagedFile, DiskFull, MissingExtra, MissingFile, UsageError
from lsquant.tasks import Run, Settings, get_task, is_run, load_float, open_run, resume_training, run_training
from lsquant.tasks.digits import Digits, DigitsNet

pytest.importorskip("sklearn")
TINY = Settings(float_epochs=2, epochs=2, batch_size=400, float_lr=0.05, calibration_batches=2)
FILES = {"config.toml", "recipe.toml", "env.json", "log.jsonl", "metrics.json", "model.safetensors", "last", "export"}


def tiny(path: Path, settings: Settings = TINY, **changes) -> Run:
    return Run(path, get_task("digits", width=2), lsquant.Recipe.preset("w2a2"), settings, **changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished tiny run; read only."""
    run = tiny(tmp_path_factory.mktemp("run") / "a")
    run_training(run, quiet=True)
    return run


# ---- the task ----


def test_the_split_is_stratified_disjoint_and_always_the_same():
    task = Digits()
    (x, y), (x_test, y_test) = task.data["train"], task.data["test"]
    assert x.shape == (1297, 1, 8, 8)
    assert x_test.shape == (500, 1, 8, 8)
    share = torch.bincount(y_test) / (torch.bincount(y) + torch.bincount(y_test))
    assert (share - 500 / 1797).abs().max() < 0.006
    assert torch.cat([x, x_test]).unique(dim=0).shape[0] >= 1790  # the data set has no more doubles than that
    assert y_test[:12].tolist() == Digits().data["test"][1][:12].tolist() == [4, 2, 7, 8, 9, 0, 1, 4, 5, 9, 9, 5]


def test_pixels_are_sixteenths():
    x = Digits().data["train"][0]
    assert x.dtype == torch.float32
    assert x.min() == 0.0
    assert x.max() == 1.0
    assert torch.equal(x * 16, (x * 16).round())


def test_batches_depend_on_seed_and_epoch_only():
    task = Digits()

    def first(**changes) -> torch.Tensor:
        return next(iter(task.batches("train", **({"batch_size": 64, "seed": 0, "epoch": 0} | changes))))[0]

    assert torch.equal(first(), first())
    assert not torch.equal(first(), first(epoch=1))
    assert not torch.equal(first(), first(seed=1))
    labels = torch.cat([y for _, y in task.batches("train", batch_size=64, seed=3, epoch=5)])
    assert torch.equal(labels.bincount(), task.data["train"][1].bincount())
    assert len(list(task.batches("train", batch_size=64))) == task.steps_per_epoch(64) == 21
    y = torch.cat([y for _, y in task.batches("test", batch_size=64, seed=9)])
    assert torch.equal(y, task.data["test"][1])


def test_scikit_learn_is_asked_for_late_and_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    task = Digits()
    with pytest.raises(MissingExtra, match=r"lsquant\[digits\]"):
        task.example_input()


def test_unknown_tasks_and_options():
    with pytest.raises(UsageError, match="did you mean 'digits'"):
        get_task("digit")
    with pytest.raises(UsageError, match="widht"):
        get_task("digits", widht=3)
    with pytest.raises(UsageError, match="unknown setting epoch"):
        Settings.from_dict({"epoch": 3})
    with pytest.raises(UsageError, match="batch_size=0"):
        Settings(batch_size=0)


# ---- the run directory ----


def test_a_finished_run_has_everything(finished):
    assert {entry.name for entry in finished.path.iterdir()} == FILES
    metrics = json.loads(finished.file("metrics.json").read_text())
    assert metrics["format"] == 1
    assert [set(metrics[key]) for key in ("float", "rounded", "lsq")] == [{"accuracy", "test_loss"}] * 3
    rows = [json.loads(line) for line in finished.file("log.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"]) for row in rows] == [("float", 1), ("float", 2), ("lsq", 1), ("lsq", 2)]
    assert rows[-1]["accuracy"] == metrics["lsq"]["accuracy"]
    names = {name for name, _ in lsquant.nn.quantizers(finished.model())}
    assert "conv1.weight_quantizer" in names
    assert set(rows[-1]["quantizers"]) == names
    for facts in rows[-1]["quantizers"].values():
        assert set(facts) == {"step", "R", "guarded", "clip_rate"}
        assert facts["step"] > 0.0
        assert 0.0 <= facts["clip_rate"] <= 1.0
    assert {facts["R"] is None for facts in rows[-1]["quantizers"].values()} == {False}


def test_a_run_is_opened_with_all_its_settings(finished):
    again = open_run(finished.path)
    assert again.config() == finished.config()
    assert again.recipe == finished.recipe
    assert again.settings == TINY
    metrics = json.loads(finished.file("metrics.json").read_text())
    assert again.task.metric(again.model()) == metrics["lsq"]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    first = json.loads(finished.file("metrics.json").read_text())
    again = run_training(tiny(tmp_path / "b"), quiet=True)
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert untimed(finished.file("log.jsonl")) == untimed(tmp_path / "b" / "log.jsonl")
    assert_equal_models(finished.path, tmp_path / "b")
    other = run_training(tiny(tmp_path / "c", Settings(**{**TINY.to_dict(), "seed": 1})), quiet=True)
    assert other["float"] != first["float"]


def test_an_existing_directory_is_an_error_that_names_the_ways_out(finished, tmp_path):
    with pytest.raises(UsageError, match=r"--resume .* --overwrite"):
        run_training(tiny(finished.path), quiet=True)
    with pytest.raises(UsageError, match="exclude each other"):
        run_training(tiny(finished.path), resume=True, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no run directory: --overwrite deletes nothing else"):
        run_training(tiny(tmp_path / "mine"), overwrite=True)
    with pytest.raises(MissingFile, match="no run directory"):
        run_training(tiny(tmp_path / "mine"), resume=True)
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="no run directory"):
        run_training(tiny(tmp_path / "file"), overwrite=True)


def test_overwrite_deletes_what_runs_make_and_nothing_else(tmp_path):
    short = Settings(**{**TINY.to_dict(), "float_epochs": 1, "epochs": 0})
    run_training(tiny(tmp_path / "a", short), quiet=True)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / "export" / "model.onnx").write_text("old")
    run_training(tiny(tmp_path / "a", short), overwrite=True, quiet=True)
    assert {entry.name for entry in (tmp_path / "a").iterdir()} == FILES | {"notes.txt"}
    assert not list((tmp_path / "a" / "export").iterdir())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert is_run(tmp_path / "a")


def test_resuming_with_other_settings_is_refused(finished):
    with pytest.raises(UsageError, match="seed was 0, not 5"):
        run_training(tiny(finished.path, Settings(**{**TINY.to_dict(), "seed": 5})), resume=True)
    with pytest.raises(UsageError, match="recipe was"):
        run_training(Run(finished.path, finished.task, lsquant.Recipe.preset("w4a4"), TINY), resume=True)


def test_a_finished_run_is_resumed_to_its_metrics(finished):
    before = finished.file("model.safetensors").stat().st_mtime_ns
    assert resume_training(finished.path, quiet=True) == json.loads(finished.file("metrics.json").read_text())
    assert finished.file("model.safetensors").stat().st_mtime_ns == before


def test_a_broken_config_is_named(tmp_path):
    (tmp_path / "config.toml").write_text("kind = ")
    with pytest.raises(DamagedFile, match=r"config\.toml"):
        open_run(tmp_path)
    (tmp_path / "config.toml").write_text('kind = "lsquant run"\nformat = 99\n')
    with pytest.raises(DamagedFile, match="format 99"):
        open_run(tmp_path)
    with pytest.raises(MissingFile, match=r"config\.toml"):
        open_run(tmp_path / "none")


def assert_equal_models(one: Path, other: Path) -> None:
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key].reshape(-1).view(torch.uint8), b[key].reshape(-1).view(torch.uint8)) for key in a)


# ---- stopped anywhere ----


class Stop(BaseException):
    """Stands in for a kill, inside the test's own process."""


def test_a_run_stopped_in_any_phase_resumes_to_the_same_result(finished, tmp_path, monkeypatch, seed):
    """A batch for training, calibration or evaluation is where the run stops; test_resume.py has the real kills."""
    state = {"count": 0, "stop": None}
    original = Digits.batches

    def counted(self, split, **options):
        for batch in original(self, split, **options):
            state["count"] += 1
            if state["count"] == state["stop"]:
                raise Stop
            yield batch

    monkeypatch.setattr(Digits, "batches", counted)
    run_training(tiny(tmp_path / "whole"), quiet=True, checkpoint_every=1)
    total = state["count"]
    quarter = total // 4  # one stop in each quarter: float and low-bit phases, measuring in between
    for part in range(4):
        stop = random.Random(seed + part).randrange(part * quarter + 1, (part + 1) * quarter + 1)
        state.update(count=0, stop=stop)
        path = tmp_path / f"stop{stop}"
        with pytest.raises(Stop):
            run_training(tiny(path), quiet=True, checkpoint_every=1)
        state.update(stop=None)
        metrics = resume_training(path, quiet=True)
        assert {**metrics, "seconds": 0} == {**json.loads(finished.file("metrics.json").read_text()), "seconds": 0}
        assert untimed(path / "log.jsonl") == untimed(finished.file("log.jsonl")), f"stopped at {stop}"
        assert_equal_models(path, finished.path)


def test_full_disk_while_saving_the_model_is_one_clear_error_and_the_run_goes_on_later(finished, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        if "model.safetensors" not in path:
            return save_file(tensors, path, metadata)
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lsquant._util.tensors.save_file", full)
        with pytest.raises(DiskFull, match=r"no space left .*model\.safetensors"):
            run_training(tiny(tmp_path / "a"), quiet=True)
    assert {entry.name for entry in (tmp_path / "a").iterdir()} == FILES - {"model.safetensors", "metrics.json"}
    resume_training(tmp_path / "a", quiet=True)
    assert_equal_models(tmp_path / "a", finished.path)


# ---- a float checkpoint as the beginning ----


def test_a_run_starts_from_a_float_checkpoint_and_needs_it_once(tmp_path):
    task = get_task("digits", width=2)
    torch.manual_seed(0)
    model = task.model()
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    settings = Settings(**{**TINY.to_dict(), "epochs": 1, "distill": True})
    metrics = run_training(tiny(tmp_path / "a", settings, init=str(tmp_path / "float.safetensors")), quiet=True)
    assert metrics["float"] == task.metric(model)
    (tmp_path / "float.safetensors").unlink()
    (tmp_path / "a" / "metrics.json").unlink()
    again = resume_training(tmp_path / "a", quiet=True)
    assert {**metrics, "seconds": 0} == {**again, "seconds": 0}


def test_bad_float_checkpoints_are_named(tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(MissingFile, match=r"f\.safetensors"):
        load_float(DigitsNet(2), path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(DamagedFile, match=r"f\.safetensors"):
        load_float(DigitsNet(2), path)
    save_file(DigitsNet(4).state_dict(), path)
    with pytest.raises(UsageError, match=r"f\.safetensors .*another architecture: \S+ is \(4\D.*\), not \(2\D.*\)$"):
        load_float(DigitsNet(2), path)
    save_file({**DigitsNet(2).state_dict(), "extra": torch.ones(1), "more": torch.ones(1)}, path)
    with pytest.raises(UsageError, match=r"the model lacks extra \(and 1 more\)$"):
        load_float(DigitsNet(2), path)
    save_file({"conv1.weight_quantizer.step": torch.ones(1)}, path)
    with pytest.raises(UsageError, match="a float checkpoint is wanted here"):
        load_float(DigitsNet(2), path)


# ---- the promise ----


@pytest.mark.slow
def test_two_bits_within_a_point_and_a_half_of_float(tmp_path):
    run = Run(tmp_path / "a", get_task("digits"), lsquant.Recipe.preset("w2a2"), Digits.settings)
    metrics = run_training(run, quiet=True)
    assert metrics["float"]["accuracy"] >= 98.0
    assert metrics["lsq"]["accuracy"] >= metrics["float"]["accuracy"] - 1.5
    assert metrics["rounded"]["accuracy"] < metrics["lsq"]["accuracy"]
