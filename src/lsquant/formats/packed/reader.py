"""Reads packed files.  Everything in the header is checked before it is used, for a file may lie."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lsquant._util.bits import unpack
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.tensors import CHECKSUM, read_tensors
from lsquant._version import __version__
from lsquant.formats.packed.content import FORMAT, KEY, Packed, PackedQuantizer, crc32
from lsquant.nn import weight_steps
from lsquant.shipped.record import is_shippable
from lsquant.spec import QuantSpec


def read_packed(path: str | os.PathLike[str]) -> Packed:
    """Return the content of a packed file: codes, steps, zero points and the rest.  No model is needed.

    Raises: MissingFile; DamagedFile; UsageError for a file of another kind or of a newer format.
    """
    metadata, tensors, sound = read_tensors(path)
    if KEY not in metadata:
        hint = ": read it with lsquant.load" if "lsquant.format" in metadata else ""
        raise UsageError(f"{path} was not written by lsquant.export_packed{hint}")
    try:
        _require(sound or CHECKSUM not in metadata, "its checksum does not fit its content")
        document = json.loads(metadata[KEY])
        version = document["format"]
        if not (newer := type(version) is int and version > FORMAT):
            _require(version == FORMAT, f"format {version!r}")
            return _content(document, tensors)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise DamagedFile(f"{path} is damaged: {error or type(error).__name__}") from error
    assert newer
    raise UsageError(f"{path} has packed format {version}; lsquant {__version__} reads format {FORMAT}: update lsquant")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _content(document: dict[str, Any], tensors: dict[str, Tensor]) -> Packed:
    """Return the checked content.  Raises: ValueError and the like where something does not fit."""
    for name, checksum in zip(sorted(tensors), document["crc32"], strict=True):
        _require(checksum == crc32(tensors[name]), f"the checksum of {name!r} does not fit")
    floats, quantizers = dict(tensors), {}
    for name, entry in document["quantizers"].items():
        quantizers[name] = _quantizer(name, dict(entry), floats)
    for layer in document["layers"].values():
        _require({layer.get("weight"), layer.get("input")} <= {None, *quantizers}, f"{layer} has no such quantizer")
    stored = {*floats, *(q.weight for q in quantizers.values())}
    stored |= {f"{name}.{key}" for name, q in quantizers.items() for key in q.state()}
    _require(set(document["aliases"].values()) <= stored, "an alias of a tensor that it does not have")
    return Packed(quantizers, floats, document["layers"], document["aliases"], dict(document["versions"]))


def _quantizer(name: str, entry: dict[str, Any], tensors: dict[str, Tensor]) -> PackedQuantizer:
    """Return a checked quantizer; its tensors are taken out of ``tensors``."""
    count, decided, axis = entry.pop("count"), entry.pop("decided", False), entry.pop("axis", None)
    weight, shape, swapped = entry.pop("weight", None), entry.pop("shape", []), entry.pop("swapped", 0)
    spec = QuantSpec.from_dict(entry)
    step, zero_point = tensors.pop(f"{name}.step"), tensors.pop(f"{name}.zero_point", None)
    low, high = spec.q_min, spec.q_max
    _require(step.dtype == torch.float32 and step.dim() == 1 and step.numel() > 0, f"{name}: an invalid step")
    _require(bool(is_shippable(step).all()), f"{name}: a step is not finite, too large, or not above 0")
    has_both = spec.offset == (zero_point is not None)
    _require(has_both, f"{name}: a zero point without an offset, or an offset without a zero point")
    if zero_point is not None:
        fits = zero_point.dtype == torch.int32 and zero_point.shape == step.shape
        _require(fits and bool(((zero_point >= low) & (zero_point <= high)).all()), f"{name}: a wrong zero point")
    numbers = (count, swapped, *shape, axis or 0)
    _require(all(type(n) is int and 0 <= n < 2**63 for n in numbers) and type(spec.narrow) is bool, f"{name}: {entry}")
    asked = replace(spec, signed=None) if decided else spec
    if weight is None:
        return PackedQuantizer(spec, asked, step, zero_point, count, axis)
    _require(type(weight) is str and len(shape) > (swapped > 0) and min(shape) > 0, f"{name}: shape {shape}")
    _require(not swapped or shape[0] % swapped == 0, f"{name}: {swapped} groups of {shape[0]} channels")
    data = tensors.pop(f"{name}.codes")
    _require(data.dtype == torch.uint8 and data.dim() == 1, f"{name}: codes of {data.dtype}")
    codes = torch.from_numpy(unpack(data.numpy(), spec.bits, math.prod(shape), low < 0))
    _require(int(codes.min()) >= low and int(codes.max()) <= high, f"{name}: a code outside {low} to {high}")
    steps, share = weight_steps(torch.Size(shape), spec.granularity, spec.group_size, name)
    _require(steps == step.numel(), f"{name}: {step.numel()} steps instead of {steps}")
    rows = codes.reshape(steps, share)
    return PackedQuantizer(spec, asked, step, zero_point, count, axis, weight, rows, tuple(shape), swapped)
