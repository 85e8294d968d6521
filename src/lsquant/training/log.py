"""Write log.jsonl: one JSON object a line, cut back to the checkpoint's position on resuming; and TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from lsquant._util.entry import parse_json, shown
from lsquant._util.errors import CannotWrite, DamagedFile, DiskFull
from lsquant._util.files import disk_is_full, json_text
from lsquant._util.optional import require


class Log:
    """Append rows to a file.

    path: None keeps nothing
    board: a folder for TensorBoard's event files, which get the numbers too

    Raises: MissingExtra for a `board` without the package tensorboard.
    """

    def __init__(self, path: str | os.PathLike[str] | None, board: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.board = None if board is None else Board(board)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and flush it to the disk. NaN becomes null. Raises: DiskFull; CannotWrite."""
        if self.path is None:
            return
        try:
            with open(self.path, "ab") as file:
                file.write(json_text(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            if disk_is_full(error):
                raise DiskFull(f"no space left on the disk while writing {self.path}") from error
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from error
        if self.board is not None:
            self.board.write(row, self.rows)

    @property
    def position(self) -> int:
        """The length of the file in bytes."""
        return self.path.stat().st_size if self.path is not None and self.path.exists() else 0

    def cut(self, position: int) -> None:
        """Remove everything after `position`: rows written after the checkpoint, or half a row.

        Raises: DamagedFile if the file is shorter than that.
        """
        if self.path is None or self.position == position:
            return
        if self.position < position:
            raise DamagedFile(
                f"{self.path} has {self.position} bytes, the checkpoint was made when it had {position}: "
                "it was cut or replaced, so the run cannot be resumed with a complete log"
            )
        try:
            os.truncate(self.path, position)
        except OSError as error:
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from error
        if self.board is not None:
            self.board.close()

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows written so far.  Raises: DamagedFile naming the line that is none."""
        if self.path is None or not self.path.exists():
            return []
        rows = []
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                entry = parse_json(line.decode("utf-8", "replace"), f"line {number} of {self.path}")
                row = entry.table()
                for facts in row["quantizers"].table().values() if "quantizers" in row else ():
                    facts.table()
                rows.append(entry.value)
        return rows


def flat(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a row by name, as trackers take them, e.g. "quantizers/conv1.weight_quantizer/step"."""
    facts = {f"quantizers/{n}/{k}": v for n, some in row.get("quantizers", {}).items() for k, v in some.items()}
    return {k: float(v) for k, v in ({**row, **facts}).items() if isinstance(v, (int, float)) and k != "iteration"}


def _is_inside(name: str) -> bool:
    """Whether a name in a folder stays in that folder, on any system."""
    path = PureWindowsPath(name)
    return not path.anchor and ".." not in path.parts and "\0" not in name


class Board:
    """Write the numbers of the log as TensorBoard's scalars over `iteration`, each phase in a folder of its name.

    The first row that is written, and the first after `close`, rewrites the folder from the whole log, so that nothing
    stays of what a killed run wrote after its checkpoint.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        require("tensorboard", extra="tensorboard")
        self.folder, self.writers = Path(folder), {}

    def write(self, row: Mapping[str, Any], rows: Callable[[], list[dict[str, Any]]]) -> None:
        """Write `row`, the last of `rows()`, all rows of the log."""
        from torch.utils.tensorboard import SummaryWriter  # imports tensorboard

        if not self.writers:
            for old in self.folder.glob("*/events.out.tfevents.*"):
                old.unlink()
        for one in [row] if self.writers else rows():
            phase = str(one.get("phase", "train"))
            if not _is_inside(phase):
                raise DamagedFile(f"the log names the phase {shown(phase)}, which leads out of {self.folder}")
            if phase not in self.writers:
                self.writers[phase] = SummaryWriter(str(self.folder / phase))
            for tag, value in flat(one).items():
                self.writers[phase].add_scalar(tag, value, one.get("iteration"))
        for writer in self.writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers.clear()
