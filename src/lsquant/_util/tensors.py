"""safetensors files, written atomically, with a checksum over everything in them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lsquant._util.entry import reason
from lsquant._util.errors import DamagedFile
from lsquant._util.files import atomic_write, require_file

CHECKSUM = "lsquant.checksum"


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file aside and rename it; equal content gives equal bytes.

    tensors: name -> tensor, contiguous, sharing no memory.
    metadata: strings by name; the checksum is added.
    Raises: MissingFile (the folder), DiskFull; the old file is then unchanged.
    """
    with atomic_write(path) as temporary:
        save_file(tensors, str(temporary), {**metadata, CHECKSUM: _checksum(metadata, tensors)})
        _sort_header(temporary)


def read_tensors(
    path: str | os.PathLike[str], *, with_tensors: bool = True
) -> tuple[dict[str, str], dict[str, Tensor], bool]:
    """Read a safetensors file.

    with_tensors: False reads the metadata alone; the checksum is then not compared.
    Returns: (metadata, tensors, whether there is a checksum that fits).
    Raises: MissingFile; DamagedFile naming the file where it is truncated or no safetensors file.
    """
    require_file(path)
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            names = file.keys() if with_tensors else ()
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # the parser's own kind, and torch's for shapes and types that it does not take
        try:
            with open(path, "rb") as raw:
                is_zip = raw.read(2) == b"PK"
        except OSError:
            is_zip = False
        hint = "; it looks like torch.save's: write the state dict with safetensors.torch.save_file" if is_zip else ""
        raise DamagedFile(f"{path} is damaged or not a safetensors file: {reason(error)}{hint}") from error
    return metadata, tensors, with_tensors and metadata.get(CHECKSUM) == _checksum(metadata, tensors)


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return BLAKE2b over metadata (but the checksum), names, types, shapes and contents, in order of names."""
    digest = hashlib.blake2b(digest_size=16)
    known = sorted(item for item in metadata.items() if item[0] != CHECKSUM)
    listed = [(name, str(t.dtype), tuple(t.shape)) for name, t in sorted(tensors.items())]
    digest.update(repr((known, listed)).encode())
    for name, _, _ in listed:
        digest.update(tensors[name].cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def on_meta(model: nn.Module) -> list[str]:
    """Name the parameters and buffers, those of the state dict or not, that are on the meta device, without values."""
    return [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]


def header_size(path: str | os.PathLike[str]) -> int:
    """Return the number of bytes before the data of the tensors."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _sort_header(path: Path) -> None:
    """Sort the header's keys in place: the library's own order varies, and equal content is to give equal bytes."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.dumps(json.loads(file.read(size)), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        data = header.encode()
        if len(data) <= size:
            file.seek(8)
            file.write(data.ljust(size))
