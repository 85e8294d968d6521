"""Runs that train a network further which a file has already: `Run.start`, `lsquant train --start`."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lsquant
from helpers.logs import untimed
from helpers.small_digits import RECIPE, float_files, model_file, network, small, stopped, task
from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant.cli import main, training
from lsquant.cli.reporting import train_command
from lsquant.tasks import Run, open_run, resume_training, run_training

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, str], Run, str]:
    """Float files, a finished run from one, and its packed file."""
    folder = tmp_path_factory.mktemp("first")
    files = float_files(folder)
    run = small(folder / "run", files, epochs=2)
    run_training(run, quiet=True)
    lsquant.export_packed(run.model(), folder / "packed.safetensors")
    return files, run, str(folder / "packed.safetensors")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in task().batches("test", batch_size=250)])


@pytest.mark.parametrize("kind", ["packed", "saved"])
def test_training_starts_from_the_file(first, tmp_path, kind):
    """Without an epoch it is the network of the file; the float network and the calibrated one are measured as ever."""
    files, run, packed = first
    file = packed if kind == "packed" else str(run.file("model.safetensors"))
    again = replace(small(tmp_path / "a", files, epochs=0), start=file)
    metrics, before = run_training(again, quiet=True), run_training(run, resume=True, quiet=True)
    assert metrics["start"] == metrics["lsq"] == before["lsq"]
    assert (metrics["float"], metrics["rounded"]) == (before["float"], before["rounded"])
    assert torch.equal(logits(again.model()), logits(run.model()))
    if kind == "saved":
        wanted = model_file(run)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in model_file(again).items())


def test_no_float_network_is_needed(first, tmp_path):
    files, _, packed = first
    alone = replace(small(tmp_path / "a", files), start=packed, init=None)
    metrics = run_training(alone, quiet=True)
    with_init = run_training(replace(small(tmp_path / "b", files), start=packed), quiet=True)
    assert {*metrics} == {*with_init} - {"float", "rounded"}
    assert (metrics["start"], metrics["lsq"]) == (with_init["start"], with_init["lsq"])
    assert [row["phase"] for row in untimed(alone.file("log.jsonl"))] == ["lsq"]
    page = tmp_path / "report.html"
    assert main(["report", str(alone.path), "--out", str(page)]) == 0
    assert "as it starts" in page.read_text()


def test_it_learns_from_there(first, tmp_path):
    """An epoch holds the whole data: its loss is that of the file's network before any step."""
    files, _, packed = first
    run = replace(small(tmp_path / "a", files, batch_size=1297), start=packed)
    run_training(run, quiet=True)
    model = lsquant.load_packed(network(files), packed).train()
    ((x, y),) = run.task.batches("train", batch_size=1297)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(x), y)
    assert untimed(run.file("log.jsonl"))[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
    trained = model_file(run)
    assert not torch.equal(trained["head.weight"], model.state_dict()["head.weight"])
    steps = {name: model.state_dict()[f"head.{name}_quantizer.step"] for name in ("input", "weight")}
    assert not torch.equal(trained["head.input_quantizer.step"], steps["input"])
    assert torch.equal(trained["head.weight_quantizer.step"], steps["weight"])  # a whole v / s: gradient 0


def test_a_file_of_other_bits_keeps_its_weights_and_is_calibrated_anew(first, tmp_path):
    files, _, _ = first
    file = tmp_path / "w3a2.safetensors"
    model = network(files)
    recipe = lsquant.Recipe.preset("w3a2", skip=["stem"])
    lsquant.prepare(model, recipe, example_inputs=task().example_input())
    lsquant.calibrate(model, task().batches("calibration", batch_size=100), max_batches=1)
    with torch.no_grad():
        model.head.weight.mul_(1.1)
    lsquant.save(model, file)
    run = replace(small(tmp_path / "a", files, epochs=0), start=str(file), init=None)
    metrics = run_training(run, quiet=True)
    lsquant.prepare(model, RECIPE, example_inputs=task().example_input())
    lsquant.calibrate(model, task().batches("calibration", batch_size=200), max_batches=1, again=True)
    assert metrics["lsq"] == metrics["start"] == run.task.metric(model)
    assert torch.equal(logits(run.model()), logits(model))


def test_the_float_network_of_a_run_is_a_float_checkpoint(first, tmp_path):
    files, run, _ = first
    again = small(tmp_path / "a", {**files, 4: str(run.file("last/float.safetensors"))}, epochs=2)
    run_training(again, quiet=True)
    assert again.file("model.safetensors").read_bytes() == run.file("model.safetensors").read_bytes()
    wrong = small(tmp_path / "b", {**files, 4: str(run.file("last/lsq.safetensors"))})
    with pytest.raises(UsageError, match="it has quantizers"):
        run_training(wrong, quiet=True)


def test_overwriting_a_run_does_not_delete_what_it_starts_from(first, tmp_path):
    files, _, packed = first
    run = replace(small(tmp_path / "a", files), start=packed)
    run_training(run, quiet=True)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    inside = {name: str(run.file("last/float.safetensors")) for name in ("init", "teacher")}
    for name, file in {**inside, "start": str(run.file("model.safetensors"))}.items():
        with pytest.raises(UsageError, match="lies in the run that --overwrite would delete"):
            run_training(replace(run, **{name: file}), overwrite=True, quiet=True)
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_keeps_the_file(first, tmp_path):
    files, _, packed = first
    whole = replace(small(tmp_path / "whole", files), start=packed)
    run_training(whole, quiet=True)
    file = tmp_path / "file.safetensors"
    file.write_bytes(Path(packed).read_bytes())
    run = replace(small(tmp_path / "a", files), start=str(file))
    stopped(run)
    file.unlink()
    with pytest.raises(UsageError, match=r"start was .*file\.safetensors"):
        run_training(replace(run, start=packed), resume=True, quiet=True)
    resume_training(run.path, quiet=True)  # needs it no more
    assert run.file("model.safetensors").read_bytes() == whole.file("model.safetensors").read_bytes()
    assert open_run(run.path).start == str(file)


def test_files_that_do_not_fit_are_named_before_anything_is_written(first, tmp_path):
    files, _, packed = first
    other = small(tmp_path / "a", files)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(Path(packed).read_bytes()[:-1])
    before = sorted(tmp_path.iterdir())
    for start, says, error in (
        (str(tmp_path / "none.safetensors"), r"none\.safetensors", MissingFile),
        (str(damaged), r"damaged\.safetensors", DamagedFile),
        (files[4], r"width4\.safetensors was not written by lsquant\.save", UsageError),
        (str(tmp_path), "is a folder; of a run give its model.safetensors", UsageError),
    ):
        with pytest.raises(error, match=says):
            run_training(replace(other, start=start), quiet=True)
    for change, says in (
        (
            {"settings": replace(other.settings, progressive=(8,), epochs=2)},
            "start and progressive: .*give one of the two",
        ),
        ({"settings": replace(other.settings, distill=True), "init": None}, "start: no float network to distill from"),
    ):
        with pytest.raises(UsageError, match=says):
            run_training(replace(other, start=packed, **change), quiet=True)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_line(first, tmp_path, capsys, monkeypatch):
    files, _, packed = first
    run = replace(small(tmp_path / "a", files), start=packed)
    stopped(run)
    assert f"--start {shlex.quote(packed)}" in train_command(run)
    assert main(["train", "--resume", "--out", str(run.path), "--start", files[4]]) == 2
    assert re.search(r"start is '.*packed\.safetensors', not '.*width4", capsys.readouterr().err)
    started = []
    monkeypatch.setattr(training, "run_training", lambda run, **_: started.append(run) or {"seconds": {}})
    words = ["digits", "--bits", "2", "--init", files[4], "--start", packed, "--out", str(tmp_path / "b"), "--quiet"]
    assert main(["train", *words]) == 0
    assert (started[0].init, started[0].start, started[0].recipe) == (files[4], packed, RECIPE)
