"""Packed files: the trained integers at their true size, in safetensors (docs/format.md states the format).

Tensors: ``QUANTIZER.codes`` uint8, densely packed; ``QUANTIZER.step`` float32; ``QUANTIZER.zero_point`` int32 with an
offset; everything that is not quantized under its own name.  The metadata ``lsquant.packed`` is one JSON object.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lsq_nn
from lsquant import ops
from lsquant._util.batches import unwrapped
from lsquant._util.bits import pack, unpack
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.tensors import CHECKSUM, read_tensors, write_tensors
from lsquant._version import __version__
from lsquant.checkpoint import restore, stored_once
from lsquant.nn import QuantizedLayer, WeightLayout, weight_steps
from lsquant.quantizer import Quantizer
from lsquant.recipe import Recipe, Rule
from lsquant.spec import QuantSpec

FORMAT = 1
PROFILE = "packed"
KEY = "lsquant.packed"
_STATE = ("step", "offset", "initial_step", "signed", "count", "initialized")


@dataclass(frozen=True)
class PackedQuantizer:
    """One quantizer of a packed file.

    spec: bits, sign and granularity, decided.  asked: the same as the recipe has it.  step: (steps,) float32, guarded.
    zero_point: (steps,) int32, or None for 0.  count: N of the gradient scale, 0 where unknown.  axis: the dimension
    that has a step per index, or None.  For weights also weight: its name; rows: (steps, codes that share one) int8 or
    uint8; shape: of the weight with output channels first; swapped: the conv groups in which the weight itself has
    the first two dimensions of shape exchanged, or 0.
    """

    spec: QuantSpec
    asked: QuantSpec
    step: Tensor
    zero_point: Tensor | None
    count: int
    axis: int | None
    weight: str | None = None
    rows: Tensor | None = None
    shape: tuple[int, ...] = ()
    swapped: int = 0

    @property
    def codes(self) -> Tensor | None:
        """int8 or uint8 in the weight's own shape; None for activations."""
        return None if self.rows is None else self._own(self.rows)

    @property
    def values(self) -> Tensor | None:
        """``code * step``, float32 in the weight's own shape; None for activations."""
        return None if self.rows is None else self._own(self.rows.to(torch.float32) * self.step.unsqueeze(1))

    def _own(self, rows: Tensor) -> Tensor:
        rows = rows.reshape(self.shape)
        return ops.swap_channels(rows, self.swapped) if self.swapped else rows

    def state(self) -> dict[str, Tensor]:
        """A Quantizer's state dict: the offset ``-z * s`` rounds to z again, the step is above its own guard."""
        state = {
            "step": self.step,
            "initial_step": self.step,
            "signed": torch.tensor(int(bool(self.spec.signed)), dtype=torch.int8),
            "count": torch.tensor(self.count),
            "initialized": torch.tensor(True),
        }
        return state if self.zero_point is None else {**state, "offset": -self.zero_point * self.step}


@dataclass(frozen=True)
class Packed:
    """The content of a packed file.

    quantizers: name -> PackedQuantizer.  floats: name in the state dict -> tensor that is not quantized.  layers: name
    -> {"type", and "weight" and "input" where quantized: names of quantizers}.  aliases: second name -> stored name.
    versions: of lsquant and torch that wrote it.
    """

    quantizers: dict[str, PackedQuantizer]
    floats: dict[str, Tensor]
    layers: dict[str, dict[str, str]]
    aliases: dict[str, str]
    versions: dict[str, str]

    def recipe(self) -> Recipe:
        """One rule per layer, by exact name."""
        asked = {None: None, **{name: q.asked for name, q in self.quantizers.items()}}
        rules = [
            Rule("re:" + re.escape(name), asked[layer.get("weight")], asked[layer.get("input")])
            for name, layer in self.layers.items()
        ]
        return Recipe(None, None, rules)


# ---- writing ----


def export_packed(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the codes and steps of ``model`` at their true size, and the rest as it is; the model is unchanged.

    Nothing in the file is executed; it holds no graph: ``load_packed`` needs the float model.  Returns the path.
    Raises: UsageError naming a quantizer that has no step, is switched off or has values without a code, and for a
    model without quantized layers; MissingFile, DiskFull (the old file is then unchanged).
    """
    model = unwrapped(model)
    layers = dict(lsq_nn.quantized_layers(model))
    if not layers:
        raise UsageError("export_packed: the model has no quantized layer; call lsquant.prepare(model, recipe) first")
    names = {quantizer: name for name, quantizer in lsq_nn.quantizers(model)}
    tensors, aliases = stored_once(model)
    entries: dict[str, dict[str, Any]] = {}
    for quantizer, name in names.items():
        if not quantizer.enabled:
            raise UsageError(f"{name}: this quantizer is switched off (lsquant.disabled); export outside of that block")
        entries[name] = _entry(quantizer)
        zero_point = quantizer.zero_point()
        for key in _STATE:
            tensors.pop(f"{name}.{key}", None)
        step = tensors[f"{name}.step"] = quantizer.effective_step().detach().clone()
        if not bool((torch.isfinite(step) & (step > 0)).all()):
            raise UsageError(f"{name}: a step is {step[~(torch.isfinite(step) & (step > 0))][0]}, no step to ship")
        if zero_point is not None:
            tensors[f"{name}.zero_point"] = zero_point
    listed: dict[str, dict[str, str]] = {}
    kept = _used_in_float(model)
    for name, layer in layers.items():
        kind = layer.float_type.__name__
        own = {"weight": layer.weight_quantizer, "input": layer.input_quantizer}
        listed[name] = {"type": kind, **{side: names[q] for side, q in own.items() if q is not None}}
        if layer.weight_quantizer is None:
            continue
        if getattr(layer, "max_norm", None) is not None:
            raise UsageError(f"{name}: an Embedding with max_norm changes its weight in use; it cannot be packed")
        weight = f"{name}.weight".lstrip(".")
        stored, quantizer = aliases.get(weight, weight), listed[name]["weight"]
        if "weight" in entries[quantizer]:
            continue  # a weight shared with a layer before
        rows = layer.to_rows(layer.integer_weight()[0])
        moved = layer.weight_layout is WeightLayout.INPUT_FIRST
        entries[quantizer] |= {"weight": stored, "shape": list(rows.shape)}
        entries[quantizer] |= {"swapped": getattr(layer, "groups", 1)} if moved else {}
        if weight not in kept:
            del tensors[stored]
        bits = layer.weight_quantizer.spec.bits
        tensors[f"{quantizer}.codes"] = torch.from_numpy(pack(rows.cpu().contiguous().numpy(), bits))
    document = {
        "format": FORMAT,
        "versions": {"lsquant": __version__, "torch": torch.__version__},
        "layers": listed,
        "quantizers": entries,
        "aliases": aliases,
        "crc32": [_crc32(tensors[name]) for name in sorted(tensors)],
    }
    write_tensors(path, tensors, {KEY: json.dumps(document, separators=(",", ":"))})
    return Path(path)


def _entry(quantizer: Quantizer) -> dict[str, Any]:
    entry = {**quantizer.require_initialized().spec.to_dict(), "count": quantizer.elements_per_step}
    if quantizer.requested.signed is None:
        entry["decided"] = True
    return entry if quantizer.axis is None else {**entry, "axis": quantizer.axis}


def _used_in_float(model: nn.Module) -> set[str]:
    """Names of weights that lie in the memory of something without their quantizer: these are kept in float as well."""
    owners: dict[str, Quantizer | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            owners[f"{name}.weight".lstrip(".")] = module.weight_quantizer
    spans = []
    for name, t in model.state_dict().items():
        reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((str(t.device), t.data_ptr(), t.data_ptr() + reach * t.element_size(), name))
    overlapping: list[list[str]] = []
    end = ("", 0)
    for device, low, high, name in sorted(spans):
        if (device, low) >= end:
            overlapping.append([])
        overlapping[-1].append(name)
        end = max(end, (device, high))
    return {name for names in overlapping if len({owners.get(n) for n in names}) > 1 for name in names}


def _crc32(t: Tensor) -> int:
    return zlib.crc32(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ---- reading ----


def read_packed(path: str | os.PathLike[str]) -> Packed:
    """The plain tensors of a packed file: codes, steps, zero points and the rest; no model is needed.

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
    """Everything checked before it is used: a file may lie about each number in it."""
    for name, checksum in zip(sorted(tensors), document["crc32"], strict=True):
        _require(checksum == _crc32(tensors[name]), f"the checksum of {name!r} does not fit")
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
    """Takes the quantizer's tensors out of ``tensors``."""
    count, decided, axis = entry.pop("count"), entry.pop("decided", False), entry.pop("axis", None)
    weight, shape, swapped = entry.pop("weight", None), entry.pop("shape", []), entry.pop("swapped", 0)
    spec = QuantSpec.from_dict(entry)
    step, zero_point = tensors.pop(f"{name}.step"), tensors.pop(f"{name}.zero_point", None)
    low, high = spec.q_min, spec.q_max
    _require(step.dtype == torch.float32 and step.dim() == 1 and step.numel() > 0, f"{name}: a step that is none")
    _require(bool((torch.isfinite(step) & (step > 0)).all()), f"{name}: a step is not finite or not above 0")
    _require(spec.offset == (zero_point is not None), f"{name}: a zero point more or less")
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


def load_packed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Make a model what ``export_packed`` wrote: prepared, with ``code * step`` as weights, which has the same codes.

    model: the float architecture, or the prepared one.  In eval mode its outputs equal the trained model's bit for
    bit; what is lost are the float weights behind the codes.  Returns the model.
    Raises: as ``read_packed``; UsageError for another architecture; the model is then unchanged.
    """
    packed = read_packed(path)
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
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
