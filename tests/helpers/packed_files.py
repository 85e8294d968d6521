"""Packed files taken apart and put together again, with checksums that fit: what a liar would write."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors as they are stored, the JSON object of the metadata)."""
    with safe_open(str(path), "pt") as file:
        names = sorted(file.keys())
        return {name: file.get_tensor(name) for name in names}, json.loads(file.metadata()["lsquant.packed"])


def write(path: Path, tensors: dict[str, Tensor], document: Any) -> None:
    """The same as a file, without lsquant's own checksum over everything.

    The checksums of the tensors are made anew unless the document has none, or is given as text.
    """
    if isinstance(document, dict) and "crc32" in document:
        data = [tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy() for name in sorted(tensors)]
        document = {**document, "crc32": [zlib.crc32(d.tobytes()) for d in data]}
    text = document if isinstance(document, str) else json.dumps(document)
    path.write_bytes(safetensors.torch.save({n: t.contiguous() for n, t in tensors.items()}, {"lsquant.packed": text}))
