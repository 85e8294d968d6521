"""One process at a time trains in a run directory.

The lock is the operating system's on the file ``.lock`` of the directory (``flock``; on Windows ``LockFileEx``),
through filelock, which PyTorch needs as well.  It goes with its process, however that ends, so a lock that is left
over is taken over at once; on Linux it holds between the machines of an NFS as well.  Where a file system has no such
lock, filelock takes a file that names host and process, and takes it over when that process is gone.  Beside it
stands ``.lock.json``: who holds the lock, for the message to others.
"""

from __future__ import annotations

import json
import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from lsquant._util.errors import UsageError
from lsquant._util.files import cannot_write, write_json

LOCK, HOLDER = ".lock", ".lock.json"


class RunLock:
    """Hold the lock of a run directory until ``release``, the end of a ``with`` block, or of the process.

    folder: the run directory, which exists.

    Raises: UsageError naming host and process where another process, or this one, holds it; CannotWrite.
    """

    def __init__(self, folder: Path) -> None:
        import filelock  # takes a while, and only training needs it

        self.folder = folder
        self._lock = filelock.FileLock(folder / LOCK, timeout=0, thread_local=False)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the file system has no such lock: filelock then takes another
                self._lock.acquire()
        except filelock.Timeout as error:
            raise UsageError(
                f"{folder} is being trained by {_holder(folder)}: wait for it, stop it, or choose another --out"
            ) from error
        except OSError as error:
            raise cannot_write(folder / LOCK, error) from error
        try:
            with suppress(OSError):
                (folder / HOLDER).unlink()  # a dead process's, or a link that leads out of the folder
            write_json(folder / HOLDER, {"host": socket.gethostname(), "process": os.getpid()})
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back and remove its files; a second time nothing happens."""
        if not self._lock.is_locked:
            return
        with suppress(OSError):
            (self.folder / HOLDER).unlink(missing_ok=True)
        with suppress(OSError):
            (self.folder / LOCK).unlink(missing_ok=True)  # while it is held: who waits on this file looks at its links
        self._lock.release()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


def _holder(folder: Path) -> str:
    """Say who holds the lock, in words."""
    try:
        found: Any = json.loads((folder / HOLDER).read_text(encoding="utf-8"))
        host, process = found["host"], found["process"]
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    if not (isinstance(host, str) and isinstance(process, int)):
        return "another process"
    return f"process {process} on {host[:255]!r}"
