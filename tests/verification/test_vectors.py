"""Golden vectors, and the checker that needs neither torch nor lsquant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
import oracle
from helpers.checkpoint import trained
from helpers.convert import images, ready
from lsquant import QuantSpec, Recipe
from lsquant._util.errors import MissingFile, UsageError
from lsquant.verification import vectors

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)

BLOCKED = """
import runpy, sys

class Blocked:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("torch", "lsquant"):
            raise ImportError(f"{name} is not on the device")

sys.meta_path.insert(0, Blocked())
sys.argv = ["check_vectors.py", *sys.argv[1:]]
runpy.run_path("check_vectors.py", run_name="__main__")
"""


def check(folder: Path, onnx: str = "m.onnx", golden: str = "v.npz") -> tuple[int, str]:
    """The checker's exit code and what it printed, in a process without torch and lsquant."""
    command = [sys.executable, "-c", BLOCKED, onnx, golden]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, torch.Tensor]:
    """A folder with m.onnx, v.npz and check_vectors.py, the model and the images; read only."""
    torch.manual_seed(0)
    folder, model, x = tmp_path_factory.mktemp("vectors"), trained(), images(4)
    lsquant.export_onnx(model, folder / "m.onnx", x)
    assert lsquant.export_vectors(model, folder / "v.npz", x) == folder / "v.npz"
    return folder, model, x


def test_the_checker_agrees(exported):
    code, said = check(exported[0])
    assert (code, said.splitlines()) == (0, ["output 0: equal, bit for bit"])


def test_the_checker_is_short_and_imports_two_packages(exported):
    text = (exported[0] / "check_vectors.py").read_text()
    assert [line.split()[1] for line in text.splitlines() if line.startswith("import")] == [
        "sys",
        "numpy",
        "onnxruntime",
    ]
    assert len([line for line in text.splitlines() if line.strip()]) <= 30


def test_what_is_in_the_vectors(exported):
    """Codes by the oracle, from what is in the file itself."""
    folder, model, x = exported
    v = np.load(folder / "v.npz")
    assert v["input/0"].tobytes() == x.numpy().tobytes()
    with torch.no_grad():
        assert v["output/0"].tobytes() == model(x).numpy().tobytes()
    assert v["layers"].tolist() == ["0", "5"]
    zero_point = int(v["zero_point/0.input_quantizer"][0])
    first = oracle.codes(v["input/0"], v["step/0.input_quantizer"], 0, 15, zero_point)
    assert v["codes/0"].dtype == np.uint8
    assert (v["codes/0"] == first).all()
    assert v["codes/5"].shape == (4, 16)
    assert 0 <= v["codes/5"].min() < v["codes/5"].max() <= 31
    for name, low, high, options in (("0", -8, 7, {"axis": 0}), ("5", -4, 3, {"group_size": 8})):
        weight, step = model[int(name)].weight.detach().numpy(), v[f"step/{name}.weight_quantizer"]
        assert v[f"weight/{name}"].dtype == np.int8
        assert (v[f"weight/{name}"] == oracle.codes(weight, step, low, high, **options)).all()
    names = {"layers", "input/0", "output/0", "zero_point/0.input_quantizer", "zero_point/5.input_quantizer"}
    kinds = {f"{kind}/{i}" for kind in ("codes", "weight") for i in (0, 5)}
    steps = {f"step/{i}.{side}_quantizer" for side in ("weight", "input") for i in (0, 5)}
    assert set(v) == (names - {"zero_point/5.input_quantizer"}) | kinds | steps


def altered(folder: Path, target: Path, **arrays: Any) -> None:
    shutil.copytree(folder, target, dirs_exist_ok=True)
    np.savez(target / "v.npz", **{**np.load(folder / "v.npz"), **arrays})


def test_one_wrong_bit_fails(exported, tmp_path):
    y = np.load(exported[0] / "v.npz")["output/0"].copy()
    y.reshape(-1).view(np.uint32)[5] ^= 1
    altered(exported[0], tmp_path, **{"output/0": y})
    assert check(tmp_path) == (1, "output 0: DIFFERENT\n")


@pytest.mark.parametrize("change", [lambda y: y[:1], lambda y: y.view(np.int32), lambda y: y * np.nan])
def test_another_shape_type_or_nan_fails(change, exported, tmp_path):
    altered(exported[0], tmp_path, **{"output/0": change(np.load(exported[0] / "v.npz")["output/0"])})
    assert check(tmp_path)[0] == 1


def test_an_output_too_many_fails(exported, tmp_path):
    altered(exported[0], tmp_path, **{"output/1": np.zeros(3, np.float32)})
    assert check(tmp_path)[0] == 1


def test_a_file_of_other_weights_fails(exported, tmp_path):
    folder, model, x = exported
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    other = lsquant.load_packed(nn.Sequential(*lsquant.revert(trained())), lsquant.export_packed(model, tmp_path / "p"))
    with torch.no_grad():
        other[5].weight[0, 0] += other[5].weight_quantizer.step[0] * (1 if other[5].weight[0, 0] <= 0 else -1)
    lsquant.export_onnx(other, tmp_path / "m.onnx", x)
    assert check(tmp_path)[0] == 1


def test_damaged_files_fail(exported, tmp_path):
    folder = exported[0]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    data = (folder / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(data[: len(data) // 2])
    assert check(tmp_path)[0] != 0
    (tmp_path / "m.onnx").write_bytes(data)
    assert check(tmp_path)[0] == 0
    (tmp_path / "v.npz").write_bytes((folder / "v.npz").read_bytes()[:-99])
    assert check(tmp_path)[0] != 0
    assert check(tmp_path, onnx="none.onnx")[0] != 0


def test_the_checker_names_what_it_wants(exported, tmp_path):
    shutil.copytree(exported[0], tmp_path, dirs_exist_ok=True)
    golden = {n.replace("input/0", "input/other"): v for n, v in np.load(tmp_path / "v.npz").items()}
    np.savez(tmp_path / "v.npz", **golden)
    how: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    done = subprocess.run([sys.executable, "check_vectors.py", "m.onnx", "v.npz"], **how)
    assert done.returncode == 1
    assert re.search(r"^v\.npz has no inputs for \S+ of m\.onnx: it is of another model$", done.stderr.strip())
    done = subprocess.run([sys.executable, "check_vectors.py"], **how)
    assert done.returncode == 1
    assert "python check_vectors.py FILE.onnx VECTORS.npz" in done.stderr


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, Extra: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.b(self.b(self.a(x)))
        return y, self.b(Extra)


def test_keywords_several_outputs_and_a_layer_called_again(tmp_path):
    batch = {"x": torch.randn(5, 4), "Extra": torch.randn(5, 3)}
    model = TwoInputs()
    lsquant.prepare(model, Recipe(4, QuantSpec(4, signed=True)))
    lsquant.calibrate(model, [batch])
    lsquant.export_onnx(model.eval(), tmp_path / "m.onnx", batch)
    lsquant.export_vectors(model, tmp_path / "v.npz", batch)
    v = np.load(tmp_path / "v.npz")
    assert v["layers"].tolist() == ["a", "b", "b#2", "b#3"]
    assert {"input/x", "input/extra", "output/0", "output/1", "codes/b", "codes/b#2", "codes/b#3"} <= set(v)
    assert v["codes/b#3"].dtype == np.int8
    assert (v["codes/b#3"] == model.b.input_quantizer.codes(batch["Extra"]).numpy()).all()
    assert check(tmp_path) == (0, "output 0: equal, bit for bit\noutput 1: equal, bit for bit\n")


def test_an_input_is_padded_before_it_is_quantized(tmp_path):
    """Where the padding is of values: as in the exported file."""
    model, x = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")), torch.randn(2, 2, 5, 5)
    ready(model, Recipe(4, 4), x).eval()
    lsquant.export_vectors(model, tmp_path / "v.npz", x)
    v = np.load(tmp_path / "v.npz")
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), "reflect")
    assert (v["codes/0"] == oracle.codes(padded, v["step/0.input_quantizer"], -8, 7)).all()


def test_what_has_no_vectors(tmp_path):
    model, x = trained(), images(2)
    with pytest.raises(UsageError, match="called the model 2 times"):
        lsquant.export_vectors(model, tmp_path / "v.npz", x, forward=lambda m, batch: (m(batch), m(batch)))
    with pytest.raises(UsageError, match="NaN or infinite"):
        lsquant.export_vectors(model, tmp_path / "v.npz", x * torch.nan)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MissingFile):
        lsquant.export_vectors(model, tmp_path / "none" / "v.npz", x)


def test_the_model_is_unchanged(tmp_path):
    model, x = (
        ready(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), Recipe(4, 4), torch.randn(9, 4)).train(),
        torch.randn(2, 4),
    )
    lsquant.export_vectors(model, tmp_path / "v.npz", x)
    assert all(m.training for m in model.modules())
    assert not model[0]._forward_hooks
    assert (tmp_path / vectors.CHECKER).is_file()
