"""log.jsonl: one JSON object a line, cut back to the checkpoint's position when a run is resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsquant._util.errors import DamagedFile, DiskFull
from lsquant._util.files import disk_is_full, json_text


class Log:
    """Appends rows to `path` (None: keeps nothing)."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and flush it to the disk. NaN becomes null. Raises: DiskFull."""
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
            raise

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
        os.truncate(self.path, position)

    def rows(self) -> list[dict[str, Any]]:
        """All rows written so far."""
        if self.path is None or not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
