"""Reads GGUF files.  A file may lie: every size in it is compared with the bytes that are there before it is used."""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsquant._util.entry import Entry, shown
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.files import require_file
from lsquant.formats.gguf.blocks import TYPES, BlockType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
"""Of the data of tensors, where the file does not say."""
DIMENSIONS = 4
NAME = 1 << 16
"""Bytes of a name, at most."""
STRING, ARRAY = 8, 9
SCALARS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
"""Kind of a value -> NumPy's name of it."""
FLOATS = {0: "<f4", 1: "<f2"}
"""Types of tensors without blocks: number -> NumPy's name."""
BLOCKS: dict[int, BlockType] = {kind.number: kind for kind in TYPES.values()}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    kind: the number of its type.
    shape: rows first, as in PyTorch.
    data: its bytes, a view of the file.
    """

    kind: int
    shape: tuple[int, ...]
    data: np.ndarray

    @property
    def block_type(self) -> BlockType | None:
        """Its type, None for floating point."""
        return BLOCKS.get(self.kind)

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """Return codes, int8 in ``shape``, and steps, (rows, blocks of a row) float32, of a tensor in blocks."""
        kind = BLOCKS[self.kind]
        codes, step = kind.unpack(self.data.reshape(-1, self.shape[-1] // kind.block * kind.size))
        return codes.reshape(self.shape), step

    def values(self) -> np.ndarray:
        """Return the values of a tensor in floating point, in its own type."""
        return self.data.view(FLOATS[self.kind]).reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """What a GGUF file holds.

    path: of the file, for messages.
    metadata: key -> number, truth value, text, list of texts or array of numbers.
    tensors: by name.
    start: bytes before the data of the tensors.
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    start: int


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Return the content of a GGUF file; the data of its tensors stay in the file.

    Raises: MissingFile; DamagedFile; UsageError for a type of tensors that lsquant does not write.
    """
    require_file(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error
    return _content(_Cursor(data, Entry(None, os.fspath(path))))


class _Cursor:
    """Reads values one after the other; ``file.refuse`` raises the error of a damaged file."""

    def __init__(self, data: mmap.mmap | bytes, file: Entry) -> None:
        self.data, self.file, self.at = data, file, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        if count > self.left:
            self.file.refuse(f"at byte {self.at:,} it needs {count:,} more bytes and has {self.left:,}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, form: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self, longest: int | None = None) -> str:
        length = self.number("Q")
        if longest is not None and length > longest:
            self.file.refuse(f"a name of {length:,} bytes at byte {self.at:,}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            self.file.refuse(f"a text before byte {self.at:,} is no UTF-8")

    def scalars(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def value(self, key: str) -> Any:
        """Return a value of the metadata."""
        kind = self.number("I")
        if kind in SCALARS:
            return self.scalars(kind, 1)[0].item()
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            self.file.refuse(f"{shown(key)} has a value of the unknown kind {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind in SCALARS:
            return self.scalars(kind, count)
        if kind != STRING:
            self.file.refuse(f"{shown(key)} is a list of the kind {kind}, which is not read")
        if count > self.left // 8:
            self.file.refuse(f"{shown(key)} has {count:,} texts in {self.left:,} bytes")
        return [self.text() for _ in range(count)]


def _content(cursor: _Cursor) -> GgufFile:
    """Return the checked content."""
    file = cursor.file
    file.require(cursor.take(4) == MAGIC, "it does not begin as a GGUF file")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise UsageError(f"{file.file} has version {version} of GGUF; versions 2 and 3, little-endian, are read")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(value_count):  # ends where the bytes do
        key = cursor.text(NAME)
        file.require(key not in metadata, f"two values of {shown(key)}")
        metadata[key] = cursor.value(key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    sound = type(alignment) is int and 0 < alignment <= 1 << 20 and alignment & (alignment - 1) == 0
    file.require(sound, f"its alignment is {shown(alignment)}")
    listed = {}
    for _ in range(tensor_count):
        name = cursor.text(NAME)
        file.require(name not in listed, f"two tensors {shown(name)}")
        listed[name] = _entry(cursor, name)
    start = -(-cursor.at // alignment) * alignment
    tensors, used = {}, 0
    for name, (shape, kind, size, offset) in listed.items():
        begin, used = start + offset, used + size
        inside = offset % alignment == 0 and begin + size <= len(cursor.data) and used <= len(cursor.data)
        file.require(inside, f"the tensor {shown(name)} is not inside of the file")
        tensors[name] = GgufTensor(kind, shape, np.frombuffer(cursor.data, np.uint8, size, begin))
    return GgufFile(file.file, metadata, tensors, start)


def _entry(cursor: _Cursor, name: str) -> tuple[tuple[int, ...], int, int, int]:
    """Return shape, type, size in bytes and offset of a tensor."""
    file, count = cursor.file, cursor.number("I")
    file.require(1 <= count <= DIMENSIONS, f"the tensor {shown(name)} has {count} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(count))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if kind in BLOCKS:
        block, size = BLOCKS[kind].block, BLOCKS[kind].size
    elif kind in FLOATS:
        block, size = 1, np.dtype(FLOATS[kind]).itemsize
    else:
        known = ", ".join(["F32", "F16", *(name.upper() for name in TYPES)])
        raise UsageError(f"{file.file}: the tensor {shown(name)} has the type {kind}; lsquant reads {known}")
    file.require(min(shape) > 0 and shape[-1] % block == 0, f"the tensor {shown(name)} has the shape {shown(shape)}")
    return shape, kind, math.prod(shape) // block * size, offset
