"""What a format is: one row of the table in ``table.py``."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from lsquant._util.errors import UsageError
from lsquant.shipped import Pair, Shipped, ship


class Format(ABC):
    """A form in which a trained model ships.

    name: of the format; on the command line ``--profile NAME``.
    about: what it is, in a few words.
    promise: the level of the verdict that it reaches for every model: "weights", "layers", "codes" or "outputs".
    """

    name: str
    about: str
    promise: str


class ModuleFormat(Format):
    """A format for other tools in this process: a ``to_`` function, which writes no file."""

    @abstractmethod
    def make(self, model: nn.Module) -> nn.Module:
        """Return the model in this form.  model: the trained one, which is unchanged."""


class FileFormat(Format):
    """A format of files: an ``export_`` function, and what ``verify`` needs.

    suffix: of its files, with the dot.
    options: the keyword arguments that ``write`` takes.
    runtimes: the runtimes of ``verify`` that run its files, the default first; none for a format verified at
        ``weights`` only.
    is_folder: whether what it writes is a folder of files.
    """

    suffix: str
    options: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    is_folder = False

    @property
    def file_name(self) -> str:
        """The usual name of its file."""
        return f"{self.name}{self.suffix}"

    @abstractmethod
    def write(self, model: nn.Module, path: Path, example_inputs: Any, **options: Any) -> Path:
        """Write a trained model, which is unchanged.  Returns the path.

        example_inputs: one batch, for a format that needs the graph.
        """

    @abstractmethod
    def recognizes(self, path: Path) -> bool:
        """Tell whether an existing file is of this format, by its first bytes; a folder, by its config.json."""

    @abstractmethod
    def read(self, path: str | os.PathLike[str]) -> Any:
        """Return the content of a file, for ``weights`` and the runtimes.  Raises: MissingFile, DamagedFile."""

    def counterpart(self, model: nn.Module) -> nn.Module:
        """Return what computes as a file of this format should: the trained model itself, or a form of it."""
        return model

    def pairs(self, content: Any, counterpart: nn.Module) -> Iterator[Pair]:
        """Yield what ``weights`` yields, for the counterpart of a file."""
        return self.weights(content, ship(counterpart))

    @abstractmethod
    def weights(self, content: Any, record: Shipped) -> Iterator[Pair]:
        """Yield everything that a file holds of codes, steps and zero points beside the trained model's.

        Raises: UsageError for a file of another model.
        """

    def profile(self, content: Any) -> str:
        """Return the name of the row that wrote the file, where several rows write files of one kind."""
        return self.name

    def header_size(self, path: Path) -> int | None:
        """Return the bytes of a file's header, None for a format without one."""
        return None

    def size(self, path: Path) -> int:
        """Return the bytes of what was written."""
        return path.stat().st_size

    def require_options(self, options: dict[str, Any]) -> None:
        """Raise a UsageError that names an option which ``write`` does not take."""
        if odd := sorted(set(options) - set(self.options)):
            raise UsageError(f"profile {self.name} takes no option {odd[0]!r}")
