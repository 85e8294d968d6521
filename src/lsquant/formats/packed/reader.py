"""Reads packed files.  Everything in the header is checked before it is used, for a file may lie."""

from __future__ import annotations

import math
import os
from dataclasses import replace

import torch
from torch import Tensor

from lsquant._util.bits import packed_bytes, unpack
from lsquant._util.entry import Entry, parse_json, shown
from lsquant._util.errors import UsageError
from lsquant._util.tensors import CHECKSUM, read_tensors
from lsquant._version import __version__
from lsquant.formats.packed.content import JOINED_FORMAT, KEY, Packed, PackedQuantizer, crc32
from lsquant.nn import weight_steps
from lsquant.recipe import Recipe, target_of
from lsquant.shipped.record import is_shippable
from lsquant.spec import MAX_BITS, MIN_BITS, QuantSpec

MOST = 2**63 - 1
"""Of a number that becomes an int64."""
SPEC = ("bits", "signed", "narrow", "granularity", "group_size", "offset", "step_dtype", "dynamic", "container")
OWN = ("count", "decided", "asked", "axis", "weight", "shape", "swapped", "tied")


def read_packed(path: str | os.PathLike[str]) -> Packed:
    """Return the content of a packed file: codes, steps, zero points and the rest.  No model is needed.

    Raises: MissingFile; DamagedFile naming file and key; UsageError for a file of another kind or of a newer format.
    """
    metadata, tensors, sound = read_tensors(path)
    if KEY not in metadata:
        hint = ": read it with lsquant.load" if "lsquant.format" in metadata else ""
        raise UsageError(f"{path} was not written by lsquant.export_packed{hint}")
    file = Entry(None, os.fspath(path))
    file.require(sound or CHECKSUM not in metadata, "its checksum does not fit its content")
    document = parse_json(metadata[KEY], os.fspath(path))
    version = document.parts("format")["format"].integer(1, MOST)
    if version > JOINED_FORMAT:
        raise UsageError(
            f"{path} has packed format {version}; lsquant {__version__} reads format {JOINED_FORMAT}: update lsquant"
        )
    return _content(document, tensors)


def _content(document: Entry, tensors: dict[str, Tensor]) -> Packed:
    """Return the checked content."""
    parts = document.parts("versions", "layers", "quantizers", "aliases", "crc32")
    joins = _joins(document.parts("joins")["joins"]) if "joins" in document.value else None
    checksums = parts["crc32"].items()
    parts["crc32"].require(len(checksums) == len(tensors), f"{len(checksums)} checksums of {len(tensors)} tensors")
    for name, checksum in zip(sorted(tensors), checksums, strict=True):
        checksum.require(checksum.value == crc32(tensors[name]), f"the checksum of {shown(name)} does not fit")
    floats = dict(tensors)
    quantizers = {name: _quantizer(name, entry, floats) for name, entry in parts["quantizers"].table().items()}
    for name, q in quantizers.items():
        owner = quantizers.get(q.tied or "")
        if q.tied is not None and (owner is None or owner.tied is not None or owner.weight or owner.step.numel() != 1):
            parts["quantizers"].refuse(f"{shown(name)} has the step of {shown(q.tied)}, which owns none for it")
        if owner is not None:
            quantizers[name] = replace(q, step=owner.step, count=owner.count)
    layers = {name: _layer(entry, quantizers) for name, entry in parts["layers"].table().items()}
    stored = {*floats, *(q.weight for q in quantizers.values())}
    stored |= {f"{name}.{key}" for name, q in quantizers.items() for key in q.state()}
    aliases = parts["aliases"].text_table()
    for name, first in aliases.items():
        parts["aliases"].require(first in stored, f"{shown(name)} is an alias of {shown(first)}, which is not there")
        parts["aliases"].require(name not in stored, f"{shown(name)} is an alias, and a tensor of its own")
    return Packed(quantizers, floats, layers, aliases, parts["versions"].text_table(), joins)


def _joins(entry: Entry) -> QuantSpec:
    """Return the specification of what joins read."""
    found = entry.record(("bits",), SPEC[1:])
    try:
        asked = QuantSpec.from_dict({key: part.value for key, part in found.items()})
        spec = Recipe(joins=asked, target=target_of(asked)).joins
    except UsageError as error:
        entry.refuse(str(error))
    assert isinstance(spec, QuantSpec)
    return spec


def _layer(entry: Entry, quantizers: dict[str, PackedQuantizer]) -> dict[str, str]:
    """Return what the file says of a layer: texts, and the names of quantizers that are there, each on its side."""
    layer = entry.text_table()
    for side in ("weight", "input", "stored"):
        name = layer.get(side)
        entry.require(name is None or name in quantizers, f"it has no such quantizer, {shown(name)}")
        is_weight = name is not None and quantizers[name].weight is not None
        entry.require(name is None or is_weight == (side == "weight"), f"its {side} has a quantizer of another side")
    return layer


def _quantizer(name: str, entry: Entry, tensors: dict[str, Tensor]) -> PackedQuantizer:
    """Return a checked quantizer; its tensors are taken out of ``tensors``."""
    found = entry.record(("bits", "count"), (*SPEC[1:], *OWN[1:]))
    try:
        spec = QuantSpec.from_dict({key: found[key].value for key in SPEC if key in found})
    except UsageError as error:
        entry.refuse(str(error))
    entry.require(spec.signed is not None, "its sign is undecided")
    count = found["count"].integer(0, MOST)
    axis = found["axis"].integer(0, MOST) if "axis" in found else None
    decided = found["decided"].boolean() if "decided" in found else False
    asked = replace(spec, signed=None) if decided else spec
    if "asked" in found:
        asked = replace(asked, bits=found["asked"].integer(MIN_BITS, MAX_BITS))
        fits = decided and asked.decide(spec.signed is True) == spec
        entry.require(fits, f"{asked.bits} bits were asked for, which do not become {spec}")
    if "tied" in found:
        alone = spec.granularity == "tensor" and not spec.offset and "weight" not in found
        entry.require(alone, "a tied quantizer has one step, no offset and no weight")
        return PackedQuantizer(spec, asked, torch.ones(1), None, count, None, tied=found["tied"].text())
    step, zero_point = _steps(name, entry, spec, tensors)
    if "weight" not in found:
        return PackedQuantizer(spec, asked, step, zero_point, count, axis)
    weight = found["weight"].text()
    shape = torch.Size(n.integer(1, MOST) for n in (found["shape"].items(16) if "shape" in found else []))
    swapped = found["swapped"].integer(0, MOST) if "swapped" in found else 0
    entry.require(not spec.offset, "an offset of a weight")
    entry.require(len(shape) > (swapped > 0), f"shape {shown(list(shape))}")
    entry.require(not swapped or shape[0] % swapped == 0, f"{swapped} groups of {shape[0]} channels")
    data = tensors.pop(f"{name}.codes", None)
    if data is None or data.dtype != torch.uint8 or data.dim() != 1:
        entry.refuse("it has no codes in one dimension of uint8")
    total, low, high = math.prod(shape), spec.q_min, spec.q_max
    wanted = packed_bytes(total, spec.bits)
    entry.require(data.numel() == wanted, f"{total} codes of {spec.bits} bits take {wanted} bytes, not {data.numel()}")
    codes = torch.from_numpy(unpack(data.numpy(), spec.bits, total, low < 0))
    entry.require(int(codes.min()) >= low and int(codes.max()) <= high, f"a code outside {low} to {high}")
    try:
        steps, share = weight_steps(shape, spec.granularity, spec.group_size, name)
    except UsageError as error:
        entry.refuse(str(error))
    entry.require(steps == step.numel(), f"{step.numel()} steps instead of {steps}")
    rows = codes.reshape(steps, share)
    return PackedQuantizer(spec, asked, step, zero_point, count, axis, weight, rows, tuple(shape), swapped)


def _steps(name: str, entry: Entry, spec: QuantSpec, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return the steps and zero points of a quantizer, taken out of ``tensors``."""
    step, zero_point = tensors.pop(f"{name}.step", None), tensors.pop(f"{name}.zero_point", None)
    if step is None or step.dtype != torch.float32 or step.dim() != 1 or not step.numel():
        entry.refuse("it has no steps in one dimension of float32")
    entry.require(bool(is_shippable(step).all()), "a step is not finite, too large, or not above 0")
    has_both = spec.offset == (zero_point is not None)
    entry.require(has_both, "a zero point without an offset, or an offset without a zero point")
    if zero_point is not None:
        fits = zero_point.dtype == torch.int32 and zero_point.shape == step.shape
        entry.require(fits, "its zero points do not fit its steps")
        inside = (zero_point >= spec.q_min) & (zero_point <= spec.q_max)
        entry.require(bool(inside.all()), "a zero point out of range")
    return step, zero_point
