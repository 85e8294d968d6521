"""Packed files that are damaged or lie: one clear error, bounded memory, nothing executed, the model unchanged."""

from __future__ import annotations

import copy
import json
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.checkpoint import VARIED, assert_equal, everything, trained
from helpers.convert import net
from helpers.packed_files import read, write
from lsquant._util.errors import DamagedFile, LsquantError, UsageError

Parts = tuple[dict[str, torch.Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A small trained model with channels, groups and zero points, and its file; read only."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("packed") / "p.safetensors"
    model = trained(VARIED)
    lsquant.export_packed(model, path)
    return model, path


def flat(found: lsquant.Packed) -> dict[str, Any]:
    """All that a reader gets, to be compared."""
    parts: dict[str, Any] = {**found.floats, "layers": found.layers, "aliases": found.aliases}
    for name, q in found.quantizers.items():
        parts |= {f"{name}.{key}": value for key, value in vars(q).items()}
    return parts


# ---- lies: everything fits its checksum, and is wrong ----

LIES = {
    "a step of 0": lambda t, d: t["0.weight_quantizer.step"].zero_(),
    "a negative step": lambda t, d: t["5.input_quantizer.step"].neg_(),
    "a step that is NaN": lambda t, d: t["5.input_quantizer.step"].fill_(torch.nan),
    "an infinite step": lambda t, d: t["5.input_quantizer.step"].fill_(torch.inf),
    "a step in half precision": lambda t, d: t.update({"5.input_quantizer.step": torch.ones(1).half()}),
    "a step without dimensions": lambda t, d: t.update({"5.input_quantizer.step": torch.tensor(1.0)}),
    "no step": lambda t, d: t.pop("5.input_quantizer.step"),
    "a step too many": lambda t, d: t.update({"0.weight_quantizer.step": torch.ones(5)}),
    "no steps at all": lambda t, d: t.update({"0.weight_quantizer.step": torch.ones(0)}),
    "a zero point out of range": lambda t, d: t["0.input_quantizer.zero_point"].fill_(16),
    "a zero point below": lambda t, d: t["0.input_quantizer.zero_point"].fill_(-1),
    "a zero point of another type": lambda t, d: t.update({"0.input_quantizer.zero_point": torch.zeros(1)}),
    "a zero point too many": lambda t, d: t.update({"5.input_quantizer.zero_point": torch.zeros(1).int()}),
    "no zero point": lambda t, d: t.pop("0.input_quantizer.zero_point"),
    "no codes": lambda t, d: t.pop("5.weight_quantizer.codes"),
    "too few codes": lambda t, d: t.update({"5.weight_quantizer.codes": torch.zeros(17).byte()}),
    "too many codes": lambda t, d: t.update({"5.weight_quantizer.codes": torch.zeros(19).byte()}),
    "codes as int8": lambda t, d: t.update({"5.weight_quantizer.codes": torch.zeros(18).char()}),
    "codes in two dimensions": lambda t, d: t.update({"5.weight_quantizer.codes": torch.zeros(3, 6).byte()}),
    "a huge shape": lambda t, d: weight(d).update(shape=[2**40, 2**40]),
    "a huge first dimension": lambda t, d: weight(d).update(shape=[2**62, 16]),
    "a shape beyond 64 bits": lambda t, d: weight(d).update(shape=[2**100]),
    "a shape of zeros": lambda t, d: weight(d).update(shape=[0, 16]),
    "a negative shape": lambda t, d: weight(d).update(shape=[-3, -16]),
    "no dimensions": lambda t, d: weight(d).update(shape=[]),
    "a shape of fractions": lambda t, d: weight(d).update(shape=[3.0, 16.0]),
    "a shape of text": lambda t, d: weight(d).update(shape="3, 16"),
    "a shape of truth": lambda t, d: weight(d).update(shape=[True, 48]),
    "another shape": lambda t, d: weight(d).update(shape=[16, 3]),
    "another group size": lambda t, d: weight(d).update(group_size=16),
    "a group size that does not divide": lambda t, d: weight(d).update(group_size=5),
    "a group size of 0": lambda t, d: weight(d).update(group_size=0),
    "swapped in 5 groups": lambda t, d: weight(d).update(swapped=5),
    "swapped in -1 groups": lambda t, d: weight(d).update(swapped=-1),
    "1 bit": lambda t, d: weight(d).update(bits=1),
    "a million bits": lambda t, d: weight(d).update(bits=10**6),
    "bits in text": lambda t, d: weight(d).update(bits="3"),
    "4 bits": lambda t, d: weight(d).update(bits=4),
    "no bits": lambda t, d: weight(d).pop("bits"),
    "no sign": lambda t, d: weight(d).update(signed=None),
    "narrow by 5": lambda t, d: weight(d).update(narrow=5),
    "a code that narrow excludes": lambda t, d: narrow(t, d),
    "a granularity that is none": lambda t, d: weight(d).update(granularity="row"),
    "an unknown field": lambda t, d: weight(d).update(colour="blue"),
    "a count of -1": lambda t, d: weight(d).update(count=-1),
    "a count beyond 64 bits": lambda t, d: weight(d).update(count=2**63),
    "an axis of text": lambda t, d: weight(d).update(axis="0"),
    "a weight without a name": lambda t, d: weight(d).update(weight=7),
    "a quantizer that is a list": lambda t, d: d["quantizers"].update({"5.weight_quantizer": [1, 2]}),
    "quantizers in a list": lambda t, d: d.update(quantizers=[1]),
    "no quantizers": lambda t, d: d.pop("quantizers"),
    "layers in a list": lambda t, d: d.update(layers=["0"]),
    "a layer of text": lambda t, d: d["layers"].update({"5": "Linear"}),
    "a layer with another's quantizer": lambda t, d: d["layers"]["5"].update(weight="7.weight_quantizer"),
    "a layer whose quantizer is a list": lambda t, d: d["layers"]["5"].update(weight=["5.weight_quantizer"]),
    "an alias of nothing": lambda t, d: d["aliases"].update({"a": "b"}),
    "an alias of an alias": lambda t, d: d["aliases"].update({"a": "b", "b": "a"}),
    "an alias of a list": lambda t, d: d["aliases"].update({"a": [1]}),
    "aliases in a list": lambda t, d: d.update(aliases=[1]),
    "no aliases": lambda t, d: d.pop("aliases"),
    "versions in a number": lambda t, d: d.update(versions=1),
    "no checksums": lambda t, d: d.pop("crc32"),
    "format 0": lambda t, d: d.update(format=0),
    "format 1.5": lambda t, d: d.update(format=1.5),
    "format true": lambda t, d: d.update(format=[1]),
    "no format": lambda t, d: d.pop("format"),
}  # fmt: skip


def narrow(tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
    """-4, in binary 100, eight times in three bytes."""
    weight(document).update(narrow=True)
    tensors["5.weight_quantizer.codes"][:3] = torch.tensor([0b00100100, 0b01001001, 0b10010010])


def weight(document: dict[str, Any]) -> dict[str, Any]:
    return document["quantizers"]["5.weight_quantizer"]


def refused(path: Path, error: type[LsquantError] = DamagedFile, says: str | None = None) -> None:
    model = net()
    before = everything(model)
    with pytest.raises(error, match=says) as caught:
        lsquant.load_packed(model, path)
    assert str(path) in str(caught.value)
    assert_equal(everything(model), before)


@pytest.mark.parametrize("name", LIES)
def test_lies(name, packed, tmp_path):
    tensors, document = read(packed[1])
    tensors = {k: t.clone() for k, t in tensors.items()}
    LIES[name](tensors, document)
    write(tmp_path / "lie", tensors, document)
    refused(tmp_path / "lie", says="is damaged: .")


def test_the_lies_begin_with_the_truth(packed, tmp_path):
    """The test's own writer makes a good file, when nothing is changed."""
    write(tmp_path / "p", *read(packed[1]))
    one, other = (lsquant.load_packed(net(), path) for path in (tmp_path / "p", packed[1]))
    assert_equal(everything(one), everything(other))


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", '"a"', "[" * 100_000, "1" * 5000, '{"format": 1e999}'])
def test_metadata_that_is_no_object(text, packed, tmp_path):
    write(tmp_path / "p", read(packed[1])[0], text)
    refused(tmp_path / "p")


def test_a_newer_format_says_so(packed, tmp_path):
    tensors, document = read(packed[1])
    document |= {"format": 3, "quantizers": "laid out in another way"}
    write(tmp_path / "p", tensors, document)
    refused(tmp_path / "p", UsageError, r"packed format 3; lsquant [\d.]+ reads format 2: update lsquant")


def test_the_checksum_names_the_tensor(packed, tmp_path):
    """A file without lsquant's own checksum over everything, as others may write it: the tensor's is still there."""
    tensors, document = read(packed[1])
    tensors["5.bias"] = tensors["5.bias"] + 1
    write(tmp_path / "p", tensors, json.dumps(document))
    refused(tmp_path / "p", says=r"the checksum of '5\.bias' does not fit")


def test_recipes_of_a_file_are_taken_literally(packed, tmp_path):
    """A layer's name is no pattern: ``.`` is a dot, and ``(a+)+`` costs nothing."""
    tensors, document = read(packed[1])
    document["layers"]["(a+)+" * 9 + "$"] = {"type": "Linear"}
    write(tmp_path / "p", tensors, document)
    refused(tmp_path / "p", UsageError, "matches no layer")


def test_flipped_bits_are_noticed_wherever_they_are(packed, tmp_path):
    """Everywhere but in the name of lsquant's own checksum, where one does no harm."""
    data, path = packed[1].read_bytes(), tmp_path / "flipped"
    header, name = 8 + int.from_bytes(data[:8], "little"), data.index(b"lsquant.checksum")
    truth = flat(lsquant.read_packed(packed[1]))
    for number, place in enumerate([*range(0, header, 7), *range(header, len(data), 5)]):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (number % 8)
        path.write_bytes(damaged)
        content = clean(lambda: lsquant.read_packed(path), f"byte {place}", path)
        assert content is None or (name <= place < name + 16 and same(flat(content), truth)), place


def test_a_changed_number_of_the_specification_is_noticed(packed, tmp_path):
    """The nastiest flip: still valid, but not what was trained."""
    data, path = packed[1].read_bytes(), tmp_path / "p"
    for old, new in ((rb"count\":18", rb"count\":19"), (b"decided", b"Decided"), (rb"bits\":5", rb"bits\":7")):
        assert data.count(old) >= 1
        path.write_bytes(data.replace(old, new, 1))
        refused(path, says="checksum does not fit its content")


# ---- damage at random ----


class Damage:
    """Files made from one by a random change each, written over one another."""

    def __init__(self, source: Path, target: Path, seed: int) -> None:
        self.data, self.target, self.random = source.read_bytes(), target, random.Random(seed)
        self.parts = read(source)
        self.header = 8 + int.from_bytes(self.data[:8], "little")

    KINDS = ("cut", "flip", "flip header", "bytes", "length", "header", "splice", "lie", "lie", "tensor")

    def make(self) -> str:
        """Write the next file; what was done to it."""
        kind = self.random.choice(self.KINDS)
        if kind in ("lie", "tensor"):
            tensors, document = dict(self.parts[0]), copy.deepcopy(self.parts[1])
            said = self._lie(document) if kind == "lie" else self._tensor(tensors)
            write(self.target, tensors, document)
            return said
        data, r = bytearray(self.data), self.random
        if kind == "cut":
            del data[r.randrange(len(data)) :]
        elif kind == "flip":
            data[r.randrange(len(data))] ^= 1 << r.randrange(8)
        elif kind == "flip header":
            for _ in range(r.randint(1, 4)):
                data[r.randrange(self.header)] ^= 1 << r.randrange(8)
        elif kind == "bytes":
            for _ in range(r.randint(1, 40)):
                data[r.randrange(len(data))] = r.randrange(256)
        elif kind == "length":
            data[:8] = struct.pack("<Q", r.choice([0, 1, 2**16, 2**31, 2**63, 2**64 - 1, r.randrange(2**20)]))
        elif kind == "header":
            header = json.loads(self.data[8 : self.header])
            name = r.choice(sorted(header))
            self._change(header, name)
            text = json.dumps(header).encode()
            data[: self.header] = struct.pack("<Q", len(text)) + text
        else:
            at, length = r.randrange(len(data)), r.randrange(200)
            data[at : at + r.randrange(200)] = self.data[r.randrange(len(data)) :][:length]
        self.target.write_bytes(data)
        return kind

    VALUES = (None, True, 0, -1, 1, 2, 9, 2**31, 2**40, 2**63, 2**64, 10**30, 1.5, float("inf"), float("nan"), "", "a",
              "0.weight", [], [1], [2**40] * 3, [[]], {}, {"a": 1})  # fmt: skip

    def _change(self, where: Any, key: Any) -> None:
        """Replace, remove or double a value somewhere below ``where[key]``."""
        r = self.random
        while isinstance(where[key], (dict, list)) and len(where[key]) and r.random() < 0.8:
            where = where[key]
            key = r.choice(sorted(where)) if isinstance(where, dict) else r.randrange(len(where))
        if r.random() < 0.2:
            del where[key]
        elif r.random() < 0.2 and isinstance(where, dict):
            where[r.choice(["x", "signed", "shape", "weight", "5", "axis", "group_size"])] = where.pop(key)
        else:
            where[key] = r.choice(self.VALUES)

    def _lie(self, document: dict[str, Any]) -> str:
        key = self.random.choice([k for k in document if k != "crc32"])
        before = copy.deepcopy(document[key])
        self._change(document, key)
        return f"lie {key}: {before} became {document.get(key)}"

    def _tensor(self, tensors: dict[str, torch.Tensor]) -> str:
        r = self.random
        name = r.choice(sorted(tensors))
        t = tensors.pop(name)
        shape = r.choice([(0,), (1,), (0, 2**40), (2, 3), (), tuple(t.shape) + (1,), tuple(t.shape)])
        if r.random() < 0.8:
            kinds = [torch.uint8, torch.int8, torch.float32, torch.float16, torch.int32, torch.int64, torch.bool]
            tensors[name] = (torch.randn(shape) * r.choice([0, 1, 100])).to(r.choice(kinds))
        return f"tensor {name}: {tensors.get(name)}"


def clean(act: Callable[[], Any], said: str, path: Path) -> Any:
    """What ``act`` returns, or None where it raises one of the two errors that name the file; any other fails."""
    try:
        return act()
    except (DamagedFile, UsageError) as error:
        if str(path) in str(error):
            return None
        raise AssertionError(f"{said}: the error does not name the file") from error
    except BaseException as error:
        raise AssertionError(said) from error


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return list(one) == list(other) and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


def fuzz(packed: tuple[nn.Module, Path], folder: Path, count: int, seed: int) -> dict[str, int]:
    """Read (and one in ten: load) damaged files: a clean error, or what was there before, or another valid file."""
    damage = Damage(packed[1], folder / "damaged", seed)
    truth, found = flat(lsquant.read_packed(packed[1])), {"refused": 0, "unharmed": 0, "another": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        said = f"number {number}, {damage.make()}"
        content = clean(lambda: lsquant.read_packed(damage.target), said, damage.target)
        if content is None:
            found["refused"] += 1
        elif same(flat(content), truth):
            found["unharmed"] += 1
        else:  # what others could have written, with checksums that fit
            found["another"] += 1
            assert "lie" in said or "tensor" in said, said
        if number % 10 == 0 or content is not None:
            model = net()
            if clean(lambda model=model: lsquant.load_packed(model, damage.target), said, damage.target) is None:
                assert type(model[0]) is nn.Conv2d
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 2**16, f"{grown} KiB more memory was used, for files of {len(damage.data)} bytes"
    return found


def test_five_hundred_damaged_files(packed, tmp_path, seed):
    found = fuzz(packed, tmp_path, 500, seed)
    assert found["refused"] > 400, found
    assert sum(found.values()) == 500


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_damaged_files(part, packed, tmp_path, seed):
    found = fuzz(packed, tmp_path, 2500, seed)
    assert found["refused"] > 2000, found
