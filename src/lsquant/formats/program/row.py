"""The row of programs in the table of formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lsquant._util.entry import parse_json
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.tensors import header_size, read_tensors
from lsquant.formats.base import FileFormat
from lsquant.formats.onnx.graph import array
from lsquant.formats.program.writer import FORMAT, KEY, WITH_ZEROS, export_program, program_content
from lsquant.fusion import FusedNetwork, fuse
from lsquant.shipped import Pair, Shipped

LARGEST = 1 << 26
"""Characters of a document."""


@dataclass(frozen=True)
class ProgramFile:
    """What a program file holds.  document: as it was written, not checked; tensors: by name."""

    path: str
    document: dict[str, Any]
    tensors: dict[str, Tensor]


class ProgramFormat(FileFormat):
    """safetensors files with the program of an integer-only network, which NumPy can run."""

    name = "program"
    about = "integer-only (joins=8): folded codes and the program, in safetensors, for a reader of 100 lines of NumPy"
    promise = "outputs"
    suffix = ".safetensors"
    runtimes = ("numpy",)

    def write(self, model: nn.Module, path: Path, example_inputs: Any, **options: Any) -> Path:
        self.require_options(options)
        return export_program(self.counterpart(model), path)

    def recognizes(self, path: Path) -> bool:
        """Tell whether a file is safetensors with a program in its metadata."""
        with open(path, "rb") as file:
            if file.read(9)[8:] != b"{":
                return False
        try:
            return KEY in read_tensors(path, with_tensors=False)[0]
        except DamagedFile:
            return False

    def read(self, path: str | os.PathLike[str]) -> ProgramFile:
        metadata, tensors, whole = read_tensors(path)
        if KEY not in metadata or not whole:
            raise DamagedFile(f"{path} has no program, or its checksum does not fit: it is damaged")
        entry = parse_json(metadata[KEY], str(path), largest=LARGEST)
        version = entry.parts("format")["format"].integer(0, 1 << 30)
        if version not in (FORMAT, WITH_ZEROS):
            raise DamagedFile(f"{path} has the format {version}; this version reads {FORMAT} and {WITH_ZEROS}")
        return ProgramFile(os.fspath(path), entry.value, tensors)

    def counterpart(self, model: nn.Module) -> FusedNetwork:
        return model if isinstance(model, FusedNetwork) else fuse(model)

    def pairs(self, content: ProgramFile, counterpart: nn.Module) -> Iterator[Pair]:
        """Yield every tensor of a file beside the network's.  Raises: UsageError for another program."""
        network: Any = counterpart
        document, tensors = program_content(network)
        said = {name: value for name, value in content.document.items() if name != "versions"}
        if said != document:
            raise UsageError(f"{content.path} is of another model: its program has other steps")
        kinds = [{name: (t.shape, t.dtype) for name, t in held.items()} for held in (tensors, content.tensors)]
        names = sorted(kinds[0].keys() | kinds[1].keys())
        if odd := [name for name in names if kinds[0].get(name) != kinds[1].get(name)]:
            raise UsageError(f"{content.path} is of another model: {odd[0]!r} is not as in this one")
        for name, mine in tensors.items():
            yield Pair(name.rpartition(".")[0], array(content.tensors[name]), array(mine))

    def weights(self, content: Any, record: Shipped) -> Iterator[Pair]:
        raise UsageError("a program is compared with a fused network")

    def header_size(self, path: Path) -> int | None:
        return header_size(path)
