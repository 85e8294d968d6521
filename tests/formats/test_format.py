"""docs/format.md is the format: its reader reads, its examples hold, and a file written long ago still loads.

``PYTHONPATH=tests python tests/formats/test_format.py`` wrote tests/data/packed-v1.safetensors.  It is never written
anew: another format gets another number and another file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.packed import LAYERS
from helpers.packed_files import read
from helpers.random_nets import trained_net
from helpers.readme import blocks
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.bits import pack
from lsquant._util.errors import UsageError
from lsquant.formats.packed import writer as module

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "format.md"
GOLDEN = Path(__file__).parents[1] / "data" / "packed-v1.safetensors"


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """What the page's reader defines.  It uses nothing but Python and NumPy."""
    (text,) = [text for _, text in blocks(PAGE, {"python"}) if "def read(" in text]
    assert len([line for line in text.splitlines() if line.strip()]) <= 50
    assert set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE)) == {"json", "zlib", "numpy"}
    space: dict[str, Any] = {}
    exec(text, space)
    return space


def compare(reader: dict[str, Any], model: nn.Module, path: Path) -> None:
    """The page's reader against the model itself."""
    found, arrays = reader["read"](path)
    state = {k: v for k, v in model.state_dict().items() if "quantizer" not in k}
    weights = {f"{n}.weight": layer for n, layer in lsquant.nn.quantized_layers(model) if layer.weight_quantizer}
    assert set(arrays) == set(state)
    for name, array in arrays.items():
        want = weights[name].dequantized_weight() if name in weights else state[name]
        assert array.shape == tuple(want.shape), name
        assert array.tobytes() == want.detach().contiguous().numpy().tobytes(), name
    for name, q in lsquant.quantizers(model):
        got, zero_point = found[name], q.zero_point()
        assert got["step"].tobytes() == q.effective_step().detach().numpy().tobytes()
        assert np.array_equal(got["zero_point"], 0 if zero_point is None else zero_point.numpy())
        assert (got["spec"]["bits"], got["spec"]["signed"]) == (q.spec.bits, q.spec.signed)
    names = {quantizer: name for name, quantizer in lsquant.quantizers(model)}
    for _, layer in lsquant.nn.quantized_layers(model):
        codes, expected = found[names[layer.weight_quantizer]]["codes"], layer.integer_weight()[0].numpy()
        assert codes.shape == expected.shape
        assert (codes == expected).all()


@pytest.mark.parametrize("seed", range(20))
def test_the_reader_reads_random_networks(seed, reader, tmp_path):
    model = trained_net(seed)
    compare(reader, model, lsquant.export_packed(model, tmp_path / "p"))


@pytest.mark.parametrize("name", LAYERS)
def test_the_reader_reads_every_kind_of_layer(name, reader, tmp_path):
    build, shape, kind = LAYERS[name]
    model, x = nn.Sequential(build(), nn.BatchNorm1d(9)), torch.randn(shape)
    recipe = Recipe(
        QuantSpec(3, granularity=kind, group_size=4 if kind == "group" else None), QuantSpec(5, offset=True)
    )
    lsquant.prepare(model, recipe)
    lsquant.calibrate(model[:1], [x])
    compare(reader, model, lsquant.export_packed(model, tmp_path / "p"))


def test_the_reader_refuses_damage_and_a_newer_format(reader, tmp_path, monkeypatch):
    path = lsquant.export_packed(trained_net(1), tmp_path / "p")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        reader["read"](path)
    monkeypatch.setattr(module, "FORMAT", 3)
    with pytest.raises(ValueError, match="has format 3"):
        reader["read"](lsquant.export_packed(trained_net(1), path))
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"format 3; lsquant .* reads format 2: update lsquant"):
        lsquant.read_packed(path)


def test_the_examples_of_packed_codes():
    rows = re.findall(r"^\| ([-\d, ]+) \| (\d), (signed|unsigned) \| `([\da-f ]+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 4
    for codes, bits, sign, data in rows:
        values = np.array([int(c) for c in codes.split(",")], np.int8 if sign == "signed" else np.uint8)
        assert pack(values, int(bits)).tobytes() == bytes.fromhex(data)


def test_the_page_names_every_member(tmp_path):
    """Everything in the JSON object and in a quantizer is on the page, in backquotes."""
    page = PAGE.read_text()
    members: set[str] = set()
    for path in (GOLDEN, lsquant.export_packed(trained_net(3), tmp_path / "p")):
        _, document = read(path)
        members |= {*document, *(key for q in document["quantizers"].values() for key in q)}
        members |= {key for layer in document["layers"].values() for key in layer}
    assert members >= {"swapped", "decided", "offset", "group_size", "narrow", "crc32", "axis"}
    assert [name for name in members if f"`{name}`" not in page] == []


# ---- a file written by format 1 ----


def build() -> nn.Module:
    tied = nn.Linear(3, 3, bias=False)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2, bias=False),
        nn.Flatten(), nn.Linear(16, 3), tied, nn.Linear(3, 3),
    )  # fmt: skip
    model[7].weight = tied.weight
    return model


def fill(t: Tensor, number: int) -> None:
    """Small exact numbers of both signs, the same everywhere: multiples of 1/64."""
    values = (torch.arange(t.numel()) * 37 + number * 11) % 61 - 30
    t.copy_((values / 64).reshape(t.shape))


def golden_model() -> nn.Module:
    """Filled by hand: no random number, no sum whose order could matter decides what is in the file."""
    model = build()
    lsquant.prepare(model, Recipe(8, 8, [
        Rule("0", QuantSpec(3, granularity="channel"), QuantSpec(4, offset=True)),
        Rule("3", QuantSpec(2, narrow=True, granularity="channel"), 6),
        Rule("5", QuantSpec(5, granularity="group", group_size=8), QuantSpec(7, signed=True)),
    ]))  # fmt: skip
    with torch.no_grad():
        for number, parameter in enumerate(p for n, p in model.named_parameters() if "quantizer" not in n):
            fill(parameter, number)
        model[1].weight.mul_(8)
        model[1].running_mean.copy_(torch.tensor([0.5, -0.25, 0.0, 0.125]))
        model[1].running_var.copy_(torch.tensor([1.0, 4.0, 0.25, 1.0]))
    state = model.state_dict()
    for number, (name, quantizer) in enumerate(lsquant.quantizers(model)):
        steps = (torch.arange(quantizer.step.numel()) + number + 3) / 64
        for key in ("step", "initial_step"):
            state[f"{name}.{key}"] = steps if "weight" in name else steps / (2 if name[0] == "0" else 64)
        state[f"{name}.signed"] = torch.tensor(int("weight" in name or name.startswith("5")), dtype=torch.int8)
        state[f"{name}.initialized"] = torch.tensor(True)
        state[f"{name}.count"] = torch.tensor(number + 1)
    state["0.input_quantizer.offset"] = torch.tensor([-0.25])
    model.load_state_dict(state)
    return model.eval()


X = torch.tensor([[[[0.0, 0.5], [-0.25, 1.0]]], [[[-0.125, 0.0], [0.25, 0.0625]]]])


SPECS = {
    "0.weight_quantizer": (3, True),
    "0.input_quantizer": (4, False),
    "3.weight_quantizer": (2, True),
    "3.input_quantizer": (6, False),
    "5.weight_quantizer": (5, True),
    "5.input_quantizer": (7, True),
    "6.weight_quantizer": (8, True),
    "6.input_quantizer": (8, False),
    "7.input_quantizer": (8, False),
}
CODES_0 = [[[[-4, 2], [-4, 3]]], [[[-1, -4], [2, -4]]], [[[3, 0], [-4, 2]]], [[[-2, 3], [0, -4]]]]
CODES_3 = [
    [[[1, -1], [1, 1]], [[-1, 1], [-1, 1]]],
    [[[1, -1], [1, -1]], [[-1, 1], [-1, 1]]],
    [[[-1, -1], [1, -1]], [[1, 0], [-1, 1]]],
    [[[-1, 1], [0, -1]], [[1, -1], [1, 0]]],
]
OUTPUT = [
    [-0.0604705810546875, -0.4581298828125, 0.1970367431640625],
    [-0.060092926025390625, -0.4562416076660156, 0.19477081298828125],
]


def test_the_old_file_still_loads(reader):
    packed = lsquant.read_packed(GOLDEN)
    assert packed.versions == {"lsquant": "0.1.0", "torch": "2.13.0"}
    q = packed.quantizers
    assert {n: (k.spec.bits, k.spec.signed) for n, k in q.items()} == SPECS
    assert q["0.weight_quantizer"].codes.tolist() == CODES_0
    assert q["3.weight_quantizer"].codes.tolist() == CODES_3
    assert q["0.weight_quantizer"].step.tolist() == [3 / 64, 4 / 64, 5 / 64, 6 / 64]
    assert q["0.input_quantizer"].zero_point.tolist() == [8]
    assert q["5.weight_quantizer"].rows.shape == (6, 8)
    assert packed.layers["7"]["weight"] == "6.weight_quantizer"
    assert packed.floats["1.running_var"].tolist() == [1.0, 4.0, 0.25, 1.0]
    assert packed.aliases["7.weight"] == "6.weight"
    model = lsquant.load_packed(build(), GOLDEN).eval()
    with torch.no_grad():
        assert model(X).tolist() == OUTPUT
        assert torch.equal(model(X), golden_model()(X))
    compare(reader, golden_model(), GOLDEN)


def test_the_same_model_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "__version__", "0.1.0")
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    lsquant.export_packed(golden_model(), tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == GOLDEN.read_bytes()


def test_bytes_of_the_old_file():
    """Codes at the place where the header says, by hand."""
    data = GOLDEN.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    low, high = json.loads(data[8:start])["3.weight_quantizer.codes"]["data_offsets"]
    rows = torch.tensor(CODES_3).reshape(2, 2, 2, 2, 2).transpose(1, 2).reshape(-1).tolist()
    assert data[start + low : start + high] == pack(np.array(rows, np.int8), 2).tobytes()
    assert high - low == 8


if __name__ == "__main__":
    module.__version__, torch.__version__ = "0.1.0", "2.13.0"
    lsquant.export_packed(golden_model(), GOLDEN)
    found = lsquant.read_packed(GOLDEN).quantizers
    print({n: (q.spec.bits, q.spec.signed) for n, q in found.items()})
    for i in (0, 3):
        print(found[f"{i}.weight_quantizer"].codes.tolist())
    print(golden_model()(X).tolist())
