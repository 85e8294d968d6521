"""The command line and packed files, and golden vectors: from a run and from a model of one's own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lsquant
from helpers.cli_own import CNN, result
from helpers.command_line import TINY, Result, refused, run
from helpers.report_pages import page_data
from lsquant.tasks import open_run


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Result]]:
    """A tiny run, its packed file, its vectors and what each command gave; read only."""
    path = tmp_path_factory.mktemp("runs") / "digits-w3a3"
    assert run("train", "digits", "--bits", "3", "--out", path, "--quiet", *TINY).code == 0
    results = {}
    for name, *options in (
        ("export", "--profile", "packed", "--json"), ("verify", "--profile", "packed", "--json"),
        ("export onnx", "--vectors", path / "export" / "v.npz"), ("report",), ("report json", "--json"),
    ):  # fmt: skip
        results[name] = run(name.split()[0], path, *options)
        assert results[name].code == 0, results[name]
    return path, results


def test_export_and_verify(line):
    path, results = line
    file = path / "export" / "packed.safetensors"
    data = file.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    told = results["export"].json
    assert told == {"file": str(file), "profile": "packed", "bytes": len(data), "header": header}
    float_bytes = sum(t.nbytes for t in load_file(path / "model.safetensors").values())
    assert len(data) - header < float_bytes / 6
    text = run("export", path, "--profile", "packed").out
    assert text == f"{file}: {len(data):,} bytes, {header:,} of them header\n"
    verdict = results["verify"].json
    assert (verdict["level"], verdict["exact"], verdict["samples"], verdict["layers"]) == ("outputs", True, 500, 5)
    assert verdict["profile"] == "packed"
    assert json.loads((path / "export" / "packed.verdict.json").read_text()) == verdict
    model = lsquant.load_packed(open_run(path).task.model(), file).eval()
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), open_run(path).model().eval()(x))


def test_the_report_shows_the_size_and_the_verdict(line):
    path, results = line
    size = (path / "export" / "packed.safetensors").stat().st_size
    header = results["export"].json["header"]
    lines = [re.sub(" {2,}", "  ", row) for row in results["report"].out.splitlines()]
    assert f"export/packed.safetensors  {size:,} bytes" in lines
    assert f"export/packed.safetensors: header  {header:,} bytes" in lines
    assert "profile packed, PyTorch" in results["report"].out
    assert "exact, level outputs" in results["report"].out
    (shown,) = page_data(path / "report.html")["runs"]
    assert ["export/packed.safetensors", size] in shown["files"]
    assert [v["profile"] for v in shown["verdicts"]] == ["packed"]
    told = results["report json"].json
    assert told["verdicts"] == {"packed": "outputs"}
    assert told["files"]["export/packed.safetensors"] == size


def test_vectors_of_a_run(line):
    path, results = line
    folder = path / "export"
    assert f"{folder / 'v.npz'}; on the device: python check_vectors.py FILE.onnx v.npz" in results["export onnx"].out
    v = np.load(folder / "v.npz")
    batch, _ = next(iter(open_run(path).task.batches("test", batch_size=4)))
    assert v["input/0"].tobytes() == batch.numpy().tobytes()
    assert v["layers"].tolist() == ["stem", "conv1", "conv2", "conv3", "head"]
    assert v["codes/conv1"].max() <= 7
    command = [sys.executable, "check_vectors.py", "exact.onnx", "v.npz"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "output 0: equal, bit for bit\n")


def test_a_file_of_another_run_is_not_exact(line, tmp_path):
    path, _ = line
    model = open_run(path).model()
    with torch.no_grad():
        model.get_submodule("head").bias[3] += 1.0  # type: ignore[index, operator]
    lsquant.export_packed(model, tmp_path / "p")
    found = run("verify", path, "--profile", "packed", "--file", tmp_path / "p")
    assert found.code == 1
    assert "not exact; level reached: weights" in found.out
    assert found.out.endswith("required: outputs\n")
    assert run("verify", path, "--file", tmp_path / "p", "--require", "weights").code == 0


def test_refusals(line, tmp_path):
    path, _ = line
    only_onnx = "--opset is an option of the profiles exact, qdq, small"
    refused(2, only_onnx, "export", path, "--profile", "packed", "--opset", "18", "--out", tmp_path / "p")
    assert list(tmp_path.iterdir()) == []
    packed = path / "export" / "packed.safetensors"
    refused(2, "has the profile packed, not qdq", "verify", path, "--file", packed, "--profile", "qdq")
    listed = "'exact', 'qdq', 'small', 'integer', 'program', 'packed'"
    refused(2, listed, "verify", path, "--profile", "qqd")
    refused(2, listed, "export", path, "--profile", "dense", "--out", tmp_path / "p")
    refused(3, "does not exist", "export", path, "--profile", "packed", "--out", tmp_path / "none" / "p")
    data = (path / "export" / "packed.safetensors").read_bytes()
    (tmp_path / "p").write_bytes(data[:-5])
    refused(3, "damaged", "verify", path, "--profile", "packed", "--file", tmp_path / "p")
    refused(3, r"export .* --profile packed writes it", "verify", tmp_path_of(path, tmp_path), "--profile", "packed")


def tmp_path_of(path: Path, folder: Path) -> Path:
    """The run without exported files."""
    moved = folder / "moved"
    moved.mkdir()
    for name in ("config.toml", "recipe.toml", "model.safetensors"):
        (moved / name).write_bytes((path / name).read_bytes())
    return moved


def test_a_model_of_ones_own(calibrated, capsys):
    told = result(capsys, "export", "model.safetensors", *CNN, "--profile", "packed", "--vectors", "v.npz")
    assert told["file"] == "model.packed.safetensors"
    assert told["vectors"] == "v.npz"
    assert np.load("v.npz")["input/0"].shape == (4, 1, 8, 8)
    assert Path("check_vectors.py").is_file()
    verdict = result(capsys, "verify", "model.safetensors", *CNN, "--profile", "packed")
    assert (verdict["level"], verdict["batches"]) == ("outputs", 3)
    assert json.loads(Path("model.packed.verdict.json").read_text()) == verdict
