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

from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.tensors import read_tensors, write_tensors

FORMAT = "lsquant training checkpoint"
VERSION = 1


def encode(value: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Split a value into (structure, tensors): valid JSON, and contiguous CPU tensors that share no memory.

    Raises: UsageError for a type that the format does not have.
    """
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()

    def walk(item: Any, path: str) -> Any:
        if isinstance(item, torch.Tensor):
            tensor = item.detach().to("cpu").contiguous()
            pointer = tensor.untyped_storage().data_ptr()
            tensors[path] = tensor.clone() if pointer in storages else tensor
            storages.add(pointer)
            return {"tensor": path}
        if isinstance(item, float) and not math.isfinite(item):
            return {"float": repr(float(item))}
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        if isinstance(item, (list, tuple)):
            items = [walk(part, f"{path}.{index}") for index, part in enumerate(item)]
            return items if isinstance(item, list) else {"tuple": items}
        if isinstance(item, dict):
            if not all(isinstance(key, (str, int)) for key in item):
                raise UsageError(f"a checkpoint cannot hold the keys of {path or 'the state'}: only str and int")
            return {"dict": [[key, walk(part, f"{path}.{key}" if path else str(key))] for key, part in item.items()]}
        raise UsageError(f"a checkpoint cannot hold a {type(item).__name__} (at {path or 'the top'})")

    return walk(value, ""), tensors


def decode(structure: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Rebuild the value that `encode` split."""
    if isinstance(structure, list):
        return [decode(item, tensors) for item in structure]
    if not isinstance(structure, dict):
        return structure
    (kind, content), *rest = structure.items()
    if rest:
        raise ValueError(f"unknown structure {sorted(structure)}")
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in content)
    if kind == "dict":
        return {key: decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown structure {kind!r}")


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
            f"{path} is no checkpoint this version reads: it says format {found[0]!r}, version {found[1]!r}; "
            f"needed are {FORMAT!r}, version {VERSION}"
        )
    if not sound:
        raise DamagedFile(f"the checkpoint {path} is damaged: its checksum does not fit its content")
    return decode(json.loads(metadata["structure"]), tensors)


def model_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict, and the buffers that are not in it (counters), which a resumed run needs as well."""
    state = dict(model.state_dict())
    return {"state": state, "volatile": {name: b for name, b in model.named_buffers() if name not in state}}


def load_model_state(model: nn.Module, saved: dict[str, Any]) -> None:
    """Restore what `model_state` returned.

    Raises: UsageError if it is the state of another architecture.
    """
    try:
        model.load_state_dict(saved["state"])
    except RuntimeError as error:
        raise UsageError(f"the checkpoint is of another architecture: {error}") from error
    buffers = dict(model.named_buffers())
    with torch.no_grad():
        for name, value in saved["volatile"].items():
            if name in buffers:
                buffers[name].copy_(value)
