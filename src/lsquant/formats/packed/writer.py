"""Writes packed files, and makes a model of one: the trained integers at their true size, in safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant._util.batches import unwrapped
from lsquant._util.bits import pack
from lsquant._util.errors import UsageError
from lsquant._util.tensors import write_tensors
from lsquant._version import __version__
from lsquant.checkpoint import restore
from lsquant.formats.packed.content import FORMAT, JOINED_FORMAT, KEY, crc32
from lsquant.formats.packed.reader import read_packed
from lsquant.shipped import Shipped, ShippedQuantizer, leftovers, ship


def export_packed(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the codes and steps of a model at their true size, and what stays float as it is.

    The file holds no graph: ``load_packed`` needs the float model.  Nothing in the file is executed.

    model: the trained model, which is unchanged.
    path: of the file.  Returned.

    Raises: UsageError naming a quantizer that has no step, is switched off or has values without a code, and for a
        model without quantized layers; MissingFile; DiskFull (the old file is then unchanged).
    """
    record = ship(model).require_layers("export_packed")
    tensors, aliases = leftovers(record)
    for quantizer in record.quantizers.values():
        tensors |= _tensors(quantizer)
    document = {
        "format": FORMAT if record.joins is None else JOINED_FORMAT,
        "versions": {"lsquant": __version__, "torch": torch.__version__},
        "layers": _layers(record),
        "quantizers": {name: _entry(quantizer, aliases) for name, quantizer in record.quantizers.items()},
        "aliases": aliases,
        "crc32": [crc32(tensors[name]) for name in sorted(tensors)],
        **({} if record.joins is None else {"joins": record.joins.to_dict()}),
    }
    write_tensors(path, tensors, {KEY: json.dumps(document, separators=(",", ":"))})
    return Path(path)


def _tensors(quantizer: ShippedQuantizer) -> dict[str, Tensor]:
    """Return what the file holds of a quantizer."""
    if quantizer.owner is not None:
        return {}
    found = {f"{quantizer.name}.step": quantizer.step}
    if quantizer.zero_point is not None:
        found[f"{quantizer.name}.zero_point"] = quantizer.zero_point
    if quantizer.weight is not None:
        codes = quantizer.weight.codes.cpu().contiguous().numpy()
        found[f"{quantizer.name}.codes"] = torch.from_numpy(pack(codes, quantizer.spec.bits))
    return found


def _layers(record: Shipped) -> dict[str, dict[str, str]]:
    """Return the type of each layer and the names of its quantizers."""
    listed: dict[str, dict[str, str]] = {}
    for name, layer in record.layers.items():
        sides = {"weight": layer.weight, "input": layer.input, "stored": layer.stored}
        listed[name] = {"type": layer.kind, **{side: q.name for side, q in sides.items() if q is not None}}
    return listed


def _entry(quantizer: ShippedQuantizer, aliases: dict[str, str]) -> dict[str, Any]:
    """Return what the header says of a quantizer."""
    entry: dict[str, Any] = {**quantizer.spec.to_dict(), "count": quantizer.count}
    if quantizer.requested.signed is None:
        entry["decided"] = True
    if quantizer.requested.bits != quantizer.spec.bits:
        entry["asked"] = quantizer.requested.bits
    if quantizer.owner is not None:
        entry["tied"] = quantizer.owner
    if quantizer.axis is not None:
        entry["axis"] = quantizer.axis
    if quantizer.weight is not None:
        weight = quantizer.weight
        entry |= {"weight": aliases.get(weight.name, weight.name), "shape": list(weight.codes.shape)}
        if weight.exchanged:
            entry["swapped"] = weight.exchanged
    return entry


def load_packed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a packed file into a model: prepared, with ``code * step`` as weights, which has the same codes.

    In eval mode its outputs equal those of the trained model bit for bit.  The float weights behind the codes are lost.

    model: the float architecture, or the prepared one.  Returned.

    Raises: as ``read_packed``; UsageError for another architecture; the model is then unchanged.
    """
    packed = read_packed(path)
    dtypes = {name: t.dtype for name, t in unwrapped(model).state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, q in packed.quantizers.items():
        state |= {f"{name}.{key}": value for key, value in q.state().items()}
        values = q.values
        if q.weight is None or q.rows is None or values is None or q.weight in packed.floats:
            continue
        state[q.weight] = values
        dtype, step = dtypes.get(q.weight, torch.float32), q.step.unsqueeze(1)
        if not torch.equal(((q.rows * step).to(dtype).to(torch.float32) / step).round(), q.rows.to(torch.float32)):
            raise UsageError(f"{path}: the steps of {q.weight} are too small or large for {dtype}; use a float32 model")
    state |= packed.floats
    state |= {name: state[first] for name, first in packed.aliases.items()}
    for name, q in lsq_nn.lone_quantizers(model):
        theirs = packed.quantizers[name].spec if name in packed.quantizers else q.spec
        if q.requested.decide(bool(theirs.signed)) != theirs:
            raise UsageError(f"{path}: {name} is {theirs} in the file and {q.requested} in the model")
    return restore(model, packed.recipe(), state, path)
