"""The row of packed files in the table of formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lsquant._util.tensors import header_size
from lsquant.formats.base import FileFormat
from lsquant.formats.packed.content import Packed
from lsquant.formats.packed.reader import read_packed
from lsquant.formats.packed.writer import export_packed
from lsquant.shipped import Pair, Shipped, Stored, paired


class PackedFormat(FileFormat):
    """safetensors files with densely packed codes.  ``verify`` loads them into a copy of the model."""

    name = "packed"
    about = "codes at their true size, without a graph, in safetensors"
    promise = "outputs"
    suffix = ".safetensors"
    runtimes = ("pytorch",)

    def write(self, model: nn.Module, path: Path, example_inputs: Any, **options: Any) -> Path:
        self.require_options(options)
        return export_packed(model, path)

    def recognizes(self, path: Path) -> bool:
        """Tell whether a file begins as safetensors do: eight bytes of length, then JSON."""
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"

    def read(self, path: str | os.PathLike[str]) -> Packed:
        return read_packed(path)

    def weights(self, content: Packed, record: Shipped) -> Iterator[Pair]:
        stored = {}
        for name, q in content.quantizers.items():
            codes = None if q.rows is None else q.rows.reshape(q.shape)
            stored[name] = Stored(q.step, q.zero_point, codes)
        return paired(record, stored)

    def header_size(self, path: Path) -> int | None:
        return header_size(path)
