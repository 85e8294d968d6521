"""Programs of integer-only networks: a reader of 100 lines of NumPy gives the trained bits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lsquant
from lsquant import Recipe, UsageError
from lsquant._util.errors import DamagedFile
from lsquant.formats.program import reader
from lsquant.formats.program.writer import KEY
from lsquant.nn import Add, Cat, Chunk, Mean, Mul, Slice, Split

GOLDEN = Path(__file__).parent / "golden"
EVERY_OPERATOR = {"quantize", "layer", "add", "multiply", "concat", "average", "function", "move"}


class Everything(nn.Module):
    """Every operator that a program has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU6()
        self.depthwise, self.silu = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.SiLU()
        self.wide = nn.Conv2d(8, 8, 2, padding=1, dilation=2)
        self.up, self.add, self.pool = nn.Upsample(scale_factor=2), Add(), nn.MaxPool2d(3, 2, 1)
        self.left, self.right = (Slice(slice(None), slice(*ends)) for ends in ((None, 4), (4, None)))
        self.cat, self.pad, self.shuffle = Cat(1), nn.ZeroPad2d((1, 0, 2, 1)), nn.PixelShuffle(2)
        self.more = nn.ConstantPad3d((0, 0, 0, 0, 1, 1), 0.0)  # of channels
        self.tanh, self.low, self.mean, self.flatten = nn.Tanh(), nn.Conv2d(4, 6, 1), Mean((2, 3), True), nn.Flatten()
        self.head, self.end, self.mul = nn.Linear(6, 5), nn.ReLU(), Mul()
        self.windows, self.larger = nn.AvgPool2d(2, 1, 1), nn.ConvTranspose2d(8, 8, 3, 2, 1)
        self.chunk, self.split = Chunk(2), Split([3, 1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = self.add(x, self.up(self.silu(self.wide(self.depthwise(x)))[:, :, :4, :4]))
        x = self.pool(self.cat(self.right(x), self.left(x)))
        x = self.larger(self.windows(x))
        first, second = self.chunk(x)
        more, less = self.split(first)
        x = self.cat(self.mul(second, less), self.cat(more, less))
        x = self.low(self.more(self.shuffle(self.pad(self.tanh(x)))))
        return self.end(self.head(self.flatten(self.mean(x))))


def made() -> tuple[lsquant.FusedNetwork, torch.Tensor]:
    torch.manual_seed(3)
    model, x = Everything(), torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        model.norm.weight.copy_(torch.randn(8))
        for _ in range(3):
            model(x)
    lsquant.trace(model.eval(), x)
    recipe = Recipe(4, 8, [lsquant.Rule("depthwise", 2, 3), lsquant.Rule("head", 8, 8)], joins=8)
    lsquant.prepare(model, recipe, example_inputs=x)
    lsquant.calibrate(model, [x])
    return lsquant.fuse(model), x


def vectors(network: lsquant.FusedNetwork, x: torch.Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = network(x).numpy()
    codes = {f"codes/{name}": q.numpy().astype(np.int16) for name, q in network.codes(x).items()}
    return {"input/0": x.numpy(), "output/0": output, **codes}


def test_every_operator(tmp_path: Path) -> None:
    network, x = made()
    path = lsquant.export_program(network, tmp_path / "p.safetensors")
    document, _ = reader.load(path)
    assert {step["op"] for step in document["steps"]} == EVERY_OPERATOR
    assert {step["move"] for step in document["steps"] if "move" in step} == {
        "slice", "upsample", "max_pool", "pad", "pixel_shuffle", "flatten", "chunk",
    }  # fmt: skip
    assert any("reader" in step for step in document["steps"])
    assert any("limit" in step for step in document["steps"])
    verdict = lsquant.verify(network, path, [x, 2 * x[:1], -x])
    assert verdict.exact, str(verdict)
    assert verdict.runtime.startswith("NumPy")
    assert lsquant.verify(network.model, path, [x]).exact


def test_the_reader_needs_nothing_but_numpy(tmp_path: Path) -> None:
    """It is a file that can be copied, of at most 100 lines."""
    network, x = made()
    path = lsquant.export_program(network, tmp_path / "p.safetensors")
    np.savez(tmp_path / "v.npz", **vectors(network, x))  # type: ignore[arg-type]
    copy = tmp_path / "reader.py"
    source = Path(reader.__file__).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 100
    copy.write_text(source, encoding="utf-8")
    script = f"""
import sys, numpy as np
sys.path.insert(0, {str(tmp_path)!r})
import reader
golden = np.load({str(tmp_path / "v.npz")!r})
outputs, codes = reader.run(*reader.load({str(path)!r}), golden["input/0"])
assert outputs[0].dtype == np.float32 and outputs[0].tobytes() == golden["output/0"].tobytes()
codes = {{name: q for name, q in codes.items() if "/" not in name}}  # the inside of a transposed convolution
for name, q in codes.items():
    assert np.array_equal(golden["codes/" + name], q), name
assert len(codes) == len(golden.files) - 2
assert not {{"torch", "lsquant"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_golden_vectors() -> None:
    """A file and its codes as they were written once: ``python tests/formats/test_program.py`` writes them anew."""
    golden = np.load(GOLDEN / "program.npz")
    outputs, codes = reader.run(*reader.load(GOLDEN / "program.safetensors"), golden["input/0"])
    assert outputs[0].tobytes() == golden["output/0"].tobytes()
    codes = {name: q for name, q in codes.items() if "/" not in name}  # the inside of a transposed convolution
    assert {f"codes/{name}" for name in codes} == {name for name in golden.files if name.startswith("codes/")}
    for name, q in codes.items():
        assert np.array_equal(golden[f"codes/{name}"], q), name


def test_a_program_of_another_model(tmp_path: Path) -> None:
    network, x = made()
    path = lsquant.export_program(network, tmp_path / "p.safetensors")
    with torch.no_grad():
        network.model.head.bias += 0.5  # type: ignore[operator, union-attr]
    verdict = lsquant.verify(network, path, [x])
    assert verdict.level == "none"
    assert verdict.checks[0].worst.startswith("head")
    small = nn.Sequential(nn.Conv2d(3, 2, 1)).eval()
    lsquant.prepare(small, Recipe(4, 8, joins=8), example_inputs=x)
    lsquant.calibrate(small, [x])
    with pytest.raises(UsageError, match="of another model: its program has other steps"):
        lsquant.verify(small, path, [x])


def test_what_a_program_cannot_hold_is_named(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6, 6)
    cases: list[tuple[nn.Module, str]] = [
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2, ceil_mode=True), nn.Conv2d(4, 2, 1)), "1: MaxPool2d"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.Softmax(1)), "1: Softmax is computed in floating point"),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 2, 2)), "1: .*ConvTranspose2d whose output is real"),
        (Chunked(Split(2)), "getitem: the index 0 has no form in a program"),
    ]
    for model, says in cases:
        lsquant.prepare(model.eval(), Recipe(4, 8, joins=8), example_inputs=x)
        lsquant.calibrate(model, [x])
        with pytest.raises(UsageError, match=says):
            lsquant.export_program(lsquant.fuse(model), tmp_path / "p.safetensors")
        assert not list(tmp_path.iterdir())


class Chunked(nn.Module):
    def __init__(self, cut: nn.Module) -> None:
        super().__init__()
        self.cut, self.a, self.b, self.cat = cut, nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), Cat(1)
        self.end = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.cut(x)
        return self.end(self.cat(self.a(a), self.b(b)))


def test_damaged_programs(tmp_path: Path) -> None:
    """A program is run only after it was found to be the model's own."""
    network, x = made()
    path = lsquant.export_program(network, tmp_path / "p.safetensors")
    data = path.read_bytes()
    for cut in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(DamagedFile):
            lsquant.verify(network, path, [x])
    flipped = bytearray(data)
    flipped[-3] ^= 4
    path.write_bytes(flipped)
    with pytest.raises(DamagedFile, match="checksum"):
        lsquant.verify(network, path, [x])
    path.write_bytes(data)
    document, _ = reader.load(path)
    edits: list[Any] = [{**document, "format": 2}, {**document, "steps": 3}, {"steps": []}, [], {**document, "more": 1}]
    for edited in edits:
        save_file(load_file(path), tmp_path / "e.safetensors", {KEY: json.dumps(edited)})
        with pytest.raises((DamagedFile, UsageError)):
            lsquant.verify(network, tmp_path / "e.safetensors", [x])


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    fused, images = made()
    lsquant.export_program(fused, GOLDEN / "program.safetensors")
    np.savez_compressed(GOLDEN / "program.npz", **vectors(fused, images))  # type: ignore[arg-type]
