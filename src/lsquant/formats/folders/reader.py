"""Reads model folders.  Everything in them is checked before it is used, for a folder may come from anybody."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsquant._util.entry import Entry, read_json, shown
from lsquant._util.tensors import CHECKSUM, read_tensors
from lsquant.formats.folders.content import (
    CONFIG,
    FORMAT,
    KEY,
    LINEAR,
    METHOD,
    PACKED,
    SCALE,
    SCALE_DTYPES,
    SHAPE,
    WEIGHTS,
    Scheme,
    unpacked_rows,
    words,
)
from lsquant.shipped import Stored
from lsquant.shipped.record import is_shippable

MOST = 2**31 - 1
"""Rows or columns of a weight, at most."""
ARGUMENTS = ("num_bits", "type", "symmetric", "strategy")
MORE_ARGUMENTS = (
    *("group_size", "dynamic", "actorder", "block_structure", "observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
)


@dataclass(frozen=True)
class ModelFolder:
    """The content of a model folder.

    path: of the folder.
    layers: name -> codes and steps.
    tensors: name -> tensor that is not quantized.
    config: of the model, without its quantization.
    """

    path: str
    layers: dict[str, Stored]
    tensors: dict[str, Tensor]
    config: dict[str, Any]


def read_floats(folder: str | os.PathLike[str]) -> ModelFolder:
    """Return the tensors of a folder without quantization.  Raises: MissingFile, DamagedFile."""
    config = read_json(Path(folder) / CONFIG)
    config.require(KEY not in config.table(), f"it has a {KEY!r}")
    return ModelFolder(os.fspath(folder), {}, _tensors(folder), config.value)


def read_compressed(folder: str | os.PathLike[str]) -> ModelFolder:
    """Return codes, steps and what stays float of a folder that ``export_compressed_tensors`` wrote.

    Raises: MissingFile; DamagedFile naming file and key, also for what lsquant does not write: zero points,
        activations, patterns as targets, weights in several files.
    """
    config = read_json(Path(folder) / CONFIG)
    quantization = config.parts(KEY)[KEY]
    parts = quantization.parts("quant_method", "format", "config_groups", "ignore")
    parts["quant_method"].choice((METHOD,))
    parts["format"].choice((FORMAT,))
    ignored = set(_names(parts["ignore"]))
    schemes: dict[str, Scheme] = {}
    for group in parts["config_groups"].table().values():
        scheme = _scheme(group)
        for target in _names(group.parts("targets")["targets"]):
            group.require(target not in schemes, f"a second group with the target {shown(target)}")
            schemes[target] = scheme
    tensors = _tensors(folder)
    layers: dict[str, Stored] = {}
    for key in [name for name in tensors if name.endswith(f".{PACKED}")]:
        name = key.removesuffix(f".{PACKED}")
        entry = Entry(None, str(Path(folder) / WEIGHTS), name[:80])
        found = schemes.get(name, schemes.get(LINEAR))
        if found is None or name in ignored:
            entry.refuse(f"it has codes, and {CONFIG} does not count it among the quantized layers")
        entry.require(f"{name}.weight" not in tensors, "it has codes and a float weight")
        layers[name] = _layer(entry, found, *(tensors.pop(f"{name}.{part}", None) for part in (PACKED, SCALE, SHAPE)))
    said = {key: value for key, value in config.value.items() if key != KEY}
    return ModelFolder(os.fspath(folder), layers, tensors, said)


def _tensors(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return all tensors.  Raises: MissingFile, DamagedFile."""
    path = Path(folder) / WEIGHTS
    metadata, tensors, sound = read_tensors(path)
    Entry(None, str(path)).require(sound or CHECKSUM not in metadata, "its checksum does not fit its content")
    return tensors


def _names(entry: Entry) -> list[str]:
    """Return a list of names of layers; a pattern, which could run for ever, is none."""
    names = entry.texts()
    for name in names:
        entry.require(not name.startswith("re:"), f"{shown(name)} is a pattern, and lsquant reads names")
    return names


def _scheme(group: Entry) -> Scheme:
    """Return the checked scheme of a group of layers."""
    parts = group.parts("targets", "weights")
    for name in ("input_activations", "output_activations"):
        if name in parts:
            parts[name].choice((None,))
    if "format" in parts:
        parts["format"].choice((None, FORMAT))
    found = parts["weights"].record(ARGUMENTS, MORE_ARGUMENTS)
    found["type"].choice(("int",))
    found["symmetric"].choice((True,))
    for name in ("dynamic", "actorder"):
        if name in found:
            found[name].choice((None, False))
    bits = found["num_bits"].integer(2, 8)
    strategy = found["strategy"].choice(("tensor", "channel", "group"))
    size = found.get("group_size")
    if strategy == "group":
        parts["weights"].require(size is not None, "groups without a group_size")
        assert size is not None
        return Scheme(bits, strategy, size.integer(1, MOST))
    if size is not None:
        size.choice((None, -1))
    return Scheme(bits, strategy, None)


def _layer(entry: Entry, scheme: Scheme, packed: Tensor | None, scale: Tensor | None, shape: Tensor | None) -> Stored:
    """Return the codes and steps of a layer."""
    if packed is None or packed.dtype != torch.int32 or packed.dim() != 2:
        entry.refuse(f"its {PACKED} is no matrix of int32")
    if shape is None or shape.dtype not in (torch.int64, torch.int32) or tuple(shape.shape) != (2,):
        entry.refuse(f"its {SHAPE} is not two integers")
    rows, columns = (int(n) for n in shape)
    entry.require(1 <= rows <= MOST and 1 <= columns <= MOST, f"a weight of {rows} x {columns}")
    wanted = (rows, words(columns, scheme.bits))
    said = f"{rows} x {columns} codes of {scheme.bits} bits take {wanted[0]} x {wanted[1]} words, not "
    entry.require(tuple(packed.shape) == wanted, said + shown(list(packed.shape)))
    entry.require(columns % (scheme.group_size or 1) == 0, f"groups of {scheme.group_size} in {columns} columns")
    steps = scheme.scale_shape(rows, columns)
    if scale is None or scale.dtype not in SCALE_DTYPES.values() or tuple(scale.shape) != steps:
        entry.refuse(f"its {SCALE} is not {list(steps)} of {', '.join(SCALE_DTYPES)}")
    step = scale.to(torch.float32).reshape(-1)
    entry.require(bool(is_shippable(step).all()), "a step is not finite, too large, or not above 0")
    return Stored(step, codes=unpacked_rows(packed, scheme.bits, columns))
