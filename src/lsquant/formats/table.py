"""The table of formats: one row a format.  The command line, ``verify`` and the report read it."""

from __future__ import annotations

import os
from pathlib import Path

from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.files import is_folder, require_file
from lsquant.formats.base import FileFormat, Format
from lsquant.formats.folders.row import CompressedTensorsFormat, HfFormat
from lsquant.formats.gguf.row import GgufFormat
from lsquant.formats.onnx.integer_row import IntegerOnnxFormat
from lsquant.formats.onnx.row import OnnxFormat
from lsquant.formats.packed.row import PackedFormat
from lsquant.formats.program.row import ProgramFormat
from lsquant.formats.torchao import TorchaoFormat

ROWS: tuple[Format, ...] = (
    OnnxFormat("exact", "ONNX, sums of integers, equal to the trained layers", "layers"),
    OnnxFormat("qdq", "ONNX, float operators over QuantizeLinear and DequantizeLinear", "weights"),
    OnnxFormat("small", "ONNX, as exact, with weights of 2 and 4 bits in initializers of that size", "layers"),
    IntegerOnnxFormat("integer", "ONNX, integer-only: no floating point between layers (joins=8)", "weights"),
    ProgramFormat(),
    PackedFormat(),
    CompressedTensorsFormat(),
    HfFormat(),
    GgufFormat(),
    TorchaoFormat(),
)
FORMATS: dict[str, Format] = {row.name: row for row in ROWS}
"""Name -> row."""
DEFAULT = "exact"
"""The format of ``lsquant export`` where none is named."""
INTEGER_ONLY = "integer"
"""That of an integer-only run."""


def file_formats() -> dict[str, FileFormat]:
    """Return the rows that write files, by name."""
    return {name: row for name, row in FORMATS.items() if isinstance(row, FileFormat)}


def file_format(name: str | None) -> FileFormat:
    """Return the row of this name, the default for None.  Raises: UsageError for a name that is unknown."""
    rows = file_formats()
    if name is not None and name not in rows:
        raise UsageError(f"no files are written with profile {name!r}; choose from {', '.join(map(repr, rows))}")
    return rows[name or DEFAULT]


def format_of(path: str | os.PathLike[str]) -> FileFormat:
    """Return the row that reads a file: by its first bytes, for damaged files by its suffix; a folder by its config.

    Where several rows write files of one kind, ``row.profile(row.read(path))`` tells which it was.

    Raises: MissingFile; DamagedFile for a file of no known format.
    """
    inside = is_folder(path)
    rows = [row for row in file_formats().values() if row.is_folder == inside]
    if not inside:
        require_file(path)
    for row in rows:
        if row.recognizes(Path(path)):
            return row
    if inside:
        require_file(path)
    for row in rows:
        if Path(path).suffix == row.suffix:
            return row
    raise DamagedFile(f"{path} is of no format that lsquant reads ({', '.join(row.name for row in rows)}), or damaged")


def profile_of(path: str | os.PathLike[str]) -> str:
    """Return the name of the row that wrote a file, which is not run.  Raises: MissingFile, DamagedFile."""
    row = format_of(path)
    return row.profile(row.read(path))
