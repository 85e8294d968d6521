"""The table of formats: a new one takes one class and one row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
from helpers.convert import ready
from lsquant import QuantSpec, Recipe
from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant.cli.main import main, parser
from lsquant.formats import FORMATS, FileFormat, ModuleFormat, file_format, file_formats, format_of, profile_of
from lsquant.shipped import Pair, Shipped, Stored, paired, ship
from lsquant.verification import LEVELS

MAGIC = b"dummy\n"


class DummyFormat(FileFormat):
    """Steps and codes as JSON."""

    name = "dummy"
    about = "steps and codes as JSON"
    promise = "weights"
    suffix = ".dummy"

    def write(self, model: nn.Module, path: Path, example_inputs: Any, **options: Any) -> Path:
        self.require_options(options)
        content = {}
        for name, q in ship(model).quantizers.items():
            content[name] = {"step": q.step.tolist(), "codes": None if q.weight is None else q.weight.codes.tolist()}
        path.write_bytes(MAGIC + json.dumps(content).encode())
        return path

    def recognizes(self, path: Path) -> bool:
        return path.read_bytes()[: len(MAGIC)] == MAGIC

    def read(self, path: str | os.PathLike[str]) -> Any:
        return json.loads(Path(path).read_bytes()[len(MAGIC) :])

    def weights(self, content: Any, record: Shipped) -> Iterator[Pair]:
        stored = {}
        for name, q in content.items():
            codes = None if q["codes"] is None else torch.tensor(q["codes"], dtype=torch.int8)
            stored[name] = Stored(torch.tensor(q["step"]), codes=codes)
        return paired(record, stored)


@pytest.fixture
def dummy(monkeypatch: pytest.MonkeyPatch) -> FileFormat:
    row = DummyFormat()
    monkeypatch.setitem(FORMATS, row.name, row)
    return row


def build() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3))


def data() -> list[torch.Tensor]:
    return [torch.rand(5, 2, 4, 4, generator=torch.Generator().manual_seed(1))]


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(2)
    return ready(build(), Recipe(QuantSpec(4, granularity="channel"), 4), data()[0]).eval()


def test_every_row_says_what_it_does() -> None:
    assert list(file_formats()) == [
        "exact", "qdq", "small", "integer", "program", "packed", "compressed-tensors", "hf", "gguf",
    ]  # fmt: skip
    for name, row in FORMATS.items():
        assert row.name == name
        assert row.promise in LEVELS[1:]
        assert row.about
        assert isinstance(row, ModuleFormat if name == "torchao" else FileFormat)
    assert file_format(None).name == "exact"
    named = "'exact', 'qdq', 'small', 'integer', 'program', 'packed', 'compressed-tensors', 'hf', 'gguf'"
    with pytest.raises(UsageError, match=f"'torchao'; choose from {named}"):
        file_format("torchao")


def test_a_new_format_is_verified_at_weights(dummy: FileFormat, trained: nn.Module, tmp_path: Path) -> None:
    path = dummy.write(trained, tmp_path / "m.any", None)
    assert format_of(path) is dummy
    assert profile_of(path) == "dummy"
    verdict = lsquant.verify(trained, path, data())
    assert (verdict.level, verdict.profile, verdict.layers, verdict.plain) == ("weights", "dummy", 2, None)
    assert verdict.checks[0].compared == 4 * 18 + 3 * 64 + (4 + 3) + 2  # codes, steps of weights, steps of inputs
    assert not verdict.reaches("layers")
    with pytest.raises(UsageError, match="which no runtime runs: leave out runtime='onnxruntime'"):
        lsquant.verify(trained, path, data(), runtime="onnxruntime")
    with pytest.raises(UsageError, match="profile dummy takes no option 'opset'"):
        dummy.write(trained, tmp_path / "m.any", None, opset=18)

    content = dummy.read(path)
    content["3.weight_quantizer"]["codes"][1][7] += 1
    path.write_bytes(MAGIC + json.dumps(content).encode())
    verdict = lsquant.verify(trained, path, data())
    assert (verdict.level, verdict.checks[0].mismatches, verdict.checks[0].worst) == ("none", 1, "3.weight_quantizer")
    content["another"] = content.pop("3.weight_quantizer")
    path.write_bytes(MAGIC + json.dumps(content).encode())
    assert lsquant.verify(trained, path, data()).checks[0].mismatches == 3 * 64 + 3 + 1
    path.write_bytes(MAGIC + b"{}")
    assert lsquant.verify(trained, path, data()).level == "none"


def test_a_new_format_on_the_command_line(
    dummy: FileFormat, trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["export", "--help"])
    named = "one of exact, qdq, small, integer, program, packed, compressed-tensors, hf, gguf, dummy"
    assert named in " ".join(capsys.readouterr().out.split())
    lsquant.save(trained, tmp_path / "m.safetensors")
    (tmp_path / "own.py").write_text("from test_formats import build, data\n")
    own = [f"--model={tmp_path / 'own.py'}:build", f"--data={tmp_path / 'own.py'}:data", "--profile=dummy"]
    assert main(["export", str(tmp_path / "m.safetensors"), *own]) == 0
    path = tmp_path / "m.dummy.dummy"
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size:,} bytes\n"
    assert main(["verify", str(tmp_path / "m.safetensors"), *own, "--require=weights"]) == 0
    assert "level reached: weights" in capsys.readouterr().out
    assert json.loads((tmp_path / "m.dummy.verdict.json").read_text())["profile"] == "dummy"
    assert main(["verify", str(tmp_path / "m.safetensors"), *own]) == 1
    assert "required: outputs (profile dummy promises weights: --require weights)" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "m.safetensors"), *own, "--opset=18"]) == 2
    assert "--opset is an option of the profiles exact, qdq, small, integer" in capsys.readouterr().err


def test_files_of_no_format(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match="does not exist"):
        format_of(tmp_path / "none")
    (tmp_path / "f").write_bytes(b"something else")
    (tmp_path / "safetensors").write_bytes((8 + 256).to_bytes(8, "little") + b"{")  # begins with the byte of ONNX
    assert format_of(tmp_path / "safetensors").name == "packed"
    (tmp_path / "onnx").write_bytes(b"\x08\x0a\x12\x07lsquant")
    assert format_of(tmp_path / "onnx").name == "exact"
    (tmp_path / "gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    assert format_of(tmp_path / "gguf").name == "gguf"
    known = r"\(exact, qdq, small, integer, program, packed, gguf\)"
    with pytest.raises(DamagedFile, match=f"is of no format that lsquant reads {known}"):
        format_of(tmp_path / "f")


def test_operations_in_place_after_a_layer_do_not_reach_the_verdict(trained: nn.Module, tmp_path: Path) -> None:
    """The output of the convolution is compared, not what the ReLU makes of it in the same memory."""
    pytest.importorskip("onnxruntime")
    verdict = lsquant.verify(trained, lsquant.export_onnx(trained, tmp_path / "m.onnx", data()[0]), data())
    assert verdict.exact, str(verdict)
    assert lsquant.verify(trained, lsquant.export_packed(trained, tmp_path / "p"), data()).exact


def test_the_record_has_what_ships(trained: nn.Module) -> None:
    record = ship(trained)
    names = ["0.weight_quantizer", "0.input_quantizer", "3.weight_quantizer", "3.input_quantizer"]
    assert list(record.quantizers) == names
    assert list(record.layers) == ["0", "3"]
    weight = record.layers["0"].weight
    assert weight is record.quantizers["0.weight_quantizer"]
    assert weight.weight is not None
    codes = trained[0].weight.detach() / trained[0].weight_quantizer.step.detach().reshape(4, 1, 1, 1)
    assert np.array_equal(weight.weight.codes.numpy(), np.clip(np.rint(codes.numpy()), -8, 7))
    assert (weight.q_min, weight.q_max, weight.axis, weight.group_size, weight.zero_point) == (-8, 7, 0, None, None)
    assert (weight.weight.name, weight.weight.exchanged, record.layers["0"].kind) == ("0.weight", 0, "Conv2d")
    assert record.standalone() == {}


def test_one_rule_for_a_step_that_ships(trained: nn.Module, tmp_path: Path) -> None:
    """A step so large that no code times it is finite is refused by every format alike."""
    with torch.no_grad():
        trained[3].input_quantizer.step.fill_(3e37)
    for export in (
        lsquant.to_integer,
        lambda model: lsquant.export_packed(model, tmp_path / "p"),
        lambda model: lsquant.export_vectors(model, tmp_path / "v.npz", data()[0]),
    ):
        with pytest.raises(UsageError, match=r"3\.input_quantizer: a step is 3\.00.*e\+37, no step to ship"):
            export(trained)
    assert list(tmp_path.iterdir()) == []
