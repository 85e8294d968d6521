"""Training checkpoints: one safetensors file, structure as JSON in its metadata, a checksum, no pickle.

A nested value (dicts, lists, tuples, numbers, strings, None, tensors) is split into tensors and JSON:
    tensor -> {"tensor": key}    tuple -> {"tuple": [...]}    dict -> {"dict": [[key, value], ...]}
    nan, inf, -inf -> {"float": "nan"}    lists, strings, None, booleans, other numbers -> themselves
A float is written with the digits that give back the same float, so the round trip is exact.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch
from torch import nn

from lsquant._util.entry import Entry, parse_json, shown
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.tensors import read_tensors, write_tensors

FORMAT = "lsquant training checkpoint"
VERSION = 1
LEVELS = 16
"""Levels of nesting that a state may have."""
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What torch's optimizers keep of a parameter, in its shape."""


def encode(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a value into (structure, tensors): valid JSON, and contiguous CPU tensors that share no memory.

    Raises: UsageError for a type that the format does not have, integers beyond 64 bits, more than LEVELS of nesting.
    """
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def walk(item: Any, path: str, level: int = 0) -> Any:
        if level > LEVELS:
            raise UsageError(f"a checkpoint cannot hold more than {LEVELS} levels of nesting (at {path[:80]})")
        if isinstance(item, torch.Tensor):
            tensor = item.detach().to("cpu").contiguous()
            pointer = tensor.untyped_storage().data_ptr()
            tensors[path] = tensor.clone() if pointer in storages else tensor
            storages.add(pointer)
            return {"tensor": path}
        if isinstance(item, float) and not math.isfinite(item):
            return {"float": repr(float(item))}
        if isinstance(item, int) and item.bit_length() > 64:
            raise UsageError(f"a checkpoint cannot hold an integer beyond 64 bits (at {path or 'the top'})")
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if isinstance(item, (list, tuple)):
            items = [walk(part, f"{path}.{index}", level + 1) for index, part in enumerate(item)]
            return items if isinstance(item, list) else {"tuple": items}
        if isinstance(item, dict):
            if not all(isinstance(key, (str, int)) for key in item):
                raise UsageError(f"a checkpoint cannot hold the keys of {path or 'the state'}: only str and int")
            at = f"{path}." if path else ""
            return {"dict": [[key, walk(part, f"{at}{key}", level + 1)] for key, part in item.items()]}
        raise UsageError(f"a checkpoint cannot hold a {type(item).__name__} (at {path or 'the top'})")

    return walk(value, ""), tensors


def decode(structure: Any, tensors: dict[str, torch.Tensor], file: str = "the checkpoint") -> Any:
    """Rebuild the value that `encode` split.  Raises: DamagedFile for another structure."""
    return _decoded(Entry(structure, file, "structure"), tensors)


def _decoded(entry: Entry, tensors: dict[str, torch.Tensor]) -> Any:
    value = entry.value
    if isinstance(value, list):  # most are long lists of numbers
        parts = [(i, item) for i, item in enumerate(value) if isinstance(item, (dict, list))]
        found = list(value)
        for i, item in parts:
            found[i] = _decoded(entry.at(str(i), item), tensors)
        return found
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        entry.refuse(f"unknown structure {shown(value)}")
    ((kind, inner),) = entry.table().items()
    if kind == "tensor":
        return tensors[inner.choice(tensors.keys())] if isinstance(inner.value, str) else inner.choice(())
    if kind == "float":
        return float(inner.choice(("nan", "inf", "-inf")))
    if kind == "tuple":
        inner.items()
        return tuple(_decoded(inner, tensors))
    if kind == "dict":
        table: dict[Any, Any] = {}
        for pair in inner.items():
            halves = pair.items(2)
            pair.require(len(halves) == 2, "a pair of key and value is needed")
            key = halves[0].value if type(halves[0].value) is int else halves[0].text()
            pair.require(key not in table, f"the key {shown(key)} is there twice")
            table[key] = _decoded(entry.at(str(key), halves[1].value), tensors)
        return table
    entry.refuse(f"unknown structure {shown(kind)}")


def save_state(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` to a temporary file and rename it, so that a kill or a full disk leaves the old file.

    Raises: DiskFull; MissingFile (the folder); UsageError (a type that the format does not have).
    """
    structure, tensors = encode(state)
    text = json.dumps(structure, allow_nan=False)
    write_tensors(path, tensors, {"format": FORMAT, "version": str(VERSION), "structure": text})


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises: MissingFile; DamagedFile naming the file if it is truncated, altered or something else.
    """
    metadata, tensors, sound = read_tensors(path)
    found = (metadata.get("format"), metadata.get("version"))
    if found != (FORMAT, str(VERSION)):
        raise DamagedFile(
            f"{path} is no checkpoint this version reads: it says format {shown(found[0])}, version {shown(found[1])}; "
            f"needed are {FORMAT!r}, version {VERSION}"
        )
    if not sound:
        raise DamagedFile(f"the checkpoint {path} is damaged: its checksum does not fit its content")
    if "structure" not in metadata:
        raise DamagedFile(f"the checkpoint {path} is damaged: it has no structure")
    state = _decoded(parse_json(metadata["structure"], os.fspath(path), "structure"), tensors)
    if not isinstance(state, dict):
        raise DamagedFile(f"the checkpoint {path} is damaged: its structure is {shown(state)}, not a table")
    return state


def load_model_part(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `model_state` gave, of a checkpoint that `fit` wrote.  Raises: MissingFile, DamagedFile."""
    return check_model_part(Entry(load_state(path), os.fspath(path)).parts("model")["model"])


def check_model_part(entry: Entry) -> dict[str, Any]:
    """Return the model's part of a checkpoint.  Raises: DamagedFile where it is none."""
    for part in entry.record(("state", "volatile")).values():
        for tensor in part.table().values():
            if not isinstance(tensor.value, torch.Tensor):
                raise tensor.wrong("a tensor")
    return entry.value


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict, and the buffers that are not in it (counters), which a resumed run needs as well."""
    state = dict(model.state_dict())
    return {"state": state, "volatile": {name: b for name, b in model.named_buffers() if name not in state}}


def load_model_state(model: nn.Module, saved: dict[str, Any]) -> None:
    """Restore what `model_state` returned.

    Raises: UsageError if it is the state of another architecture.
    """
    now = model.state_dict()
    for name, tensor in saved["state"].items():
        if name in now and _kind(tensor) != _kind(now[name]):
            raise UsageError(f"the checkpoint is of another architecture: {name} is {tensor.dtype}")
    try:
        model.load_state_dict(saved["state"])
    except RuntimeError as error:
        raise UsageError(f"the checkpoint is of another architecture: {error}") from error
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in saved["volatile"].items():
            if name in buffers:
                if value.shape != buffers[name].shape or _kind(value) != _kind(buffers[name]):
                    raise UsageError(f"the checkpoint is of another architecture: {name} is {tuple(value.shape)}")
                buffers[name].copy_(value)


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


# ---- what fit reads ----


def check_optimizer_part(entry: Entry, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer, of the form that this one's state has.

    Raises: UsageError where it is another optimizer's; DamagedFile for values that no optimizer has.
    """
    mine, found = optimizer.state_dict(), entry.record(("state", "param_groups"))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    groups = found["param_groups"].items()
    if len(groups) != len(mine["param_groups"]):
        raise UsageError(f"{entry.file} is the checkpoint of another optimizer: it has {len(groups)} groups")
    for group, here in zip(groups, mine["param_groups"], strict=True):
        facts = group.parts("params", "lr")
        if facts["params"].value != here["params"]:
            raise UsageError(f"{entry.file} is the checkpoint of another optimizer: a group has other parameters")
        for name, fact in facts.items():
            if name in here and name != "params" and not _alike(fact.value, here[name]):
                raise fact.wrong(f"a value as {shown(here[name])}")
            if name == "betas" and isinstance(fact.value, (tuple, list)):
                for i, beta in enumerate(fact.value):
                    fact.require(_is_number(beta) and 0.0 <= beta < 1.0, f"{shown(beta)} as number {i}")
            fact.require(name in here or isinstance(fact.value, (bool, int, float, str)), "no hyperparameter")
    state = found["state"].value
    if not isinstance(state, dict) or not all(type(key) is int and 0 <= key < len(parameters) for key in state):
        raise found["state"].wrong("a table by numbers of parameters")
    needed = _needed(optimizer, [group.table() for group in groups])
    for key, facts in state.items():
        of_parameter = found["state"].at(str(key), facts)
        if facts:  # a parameter that had no gradient yet has no state
            of_parameter.parts(*sorted(needed[key]))
        for name, fact in of_parameter.table().items():
            value, shape = fact.value, parameters[key].shape
            if isinstance(value, torch.Tensor):
                fits = value.shape == shape if name in MOMENTS else name != "step" or value.numel() == 1
                fact.require(fits and not value.is_complex(), f"shape {tuple(value.shape)}, type {value.dtype}")
            else:
                plain = value is None or isinstance(value, (bool, int, float, str))
                fact.require(plain and (value is None or name not in MOMENTS), f"{shown(value)} is no tensor")
            if name == "step":
                steps = value.item() if isinstance(value, torch.Tensor) else value
                fact.at("number", steps).number(0.0, 2.0**53)  # torch's Adam raises its betas to this power
    return entry.value


def _needed(optimizer: torch.optim.Optimizer, groups: list[dict[str, Entry]]) -> list[set[str]]:
    """Return by parameter what torch's optimizers look up in its state without asking whether it is there."""
    needed: list[set[str]] = []
    for group, here in zip(groups, optimizer.param_groups, strict=True):
        keys: set[str] = set()
        if isinstance(optimizer, torch.optim.Adam):  # AdamW is one
            keys = {"step", "exp_avg", "exp_avg_sq"}
            keys |= {"max_exp_avg_sq"} if "amsgrad" in group and group["amsgrad"].value else set()
        needed += [keys] * len(here["params"])
    return needed


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _alike(value: Any, here: Any) -> bool:
    """Tell whether one hyperparameter may replace another: a number a number, true, false or None the same kind."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and (isinstance(here, torch.Tensor) or _is_number(here))
    if here is None or isinstance(here, bool):
        return value is None or isinstance(value, bool)
    if isinstance(here, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(value) == len(here) and all(map(_alike, value, here))
    return isinstance(value, str) if isinstance(here, str) else _is_number(value)
