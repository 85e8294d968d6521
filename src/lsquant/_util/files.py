"""Atomic writing: a file is the old one or a complete new one, never half written."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lsquant._util import entry
from lsquant._util.errors import CannotWrite, DamagedFile, DiskFull, LsquantError, MissingFile, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_is_full(error: BaseException) -> bool:
    """Tell whether an error says that no space is left; safetensors raises no OSError, but quotes its number."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(f"(os error {number})" in str(error) for number in _FULL)


def cannot_write(path: str | os.PathLike[str], error: BaseException) -> LsquantError:
    """Return the error to raise where a file cannot be written: DiskFull, or CannotWrite with the reason."""
    if disk_is_full(error):
        return DiskFull(f"no space left on the disk while writing {path}; the old file, if any, is unchanged")
    reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
    return CannotWrite(f"cannot write {path}: {reason}; the old file, if any, is unchanged")


def _is_of_the_system(error: BaseException) -> bool:
    """Tell whether an error comes from the operating system; safetensors quotes its number."""
    if isinstance(error, LsquantError):
        return False
    return isinstance(error, OSError) or re.search(r"\(os error \d+\)", str(error)) is not None


def as_path(path: Any) -> Path:
    """Return a path that was given.  Raises: UsageError for what is none."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise UsageError(f"{entry.shown(path)} is no path: give the name of a file, a text or a pathlib.Path")
    return Path(path)


def is_folder(path: Any) -> bool:
    """Tell whether a path is that of a folder.  Raises: UsageError for what is no path."""
    try:
        return as_path(path).is_dir()
    except OSError:
        return False


def require_file(path: Any) -> Path:
    """Return the path of a file that is there.

    Raises: MissingFile; UsageError for a folder, or what is no path; DamagedFile where it may not be looked at.
    """
    found = as_path(path)
    try:
        if found.is_file():
            return found
        if found.is_dir():
            raise UsageError(f"{path} is a folder: give the name of a file")
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error
    raise MissingFile(f"{path} does not exist")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``; on success it is flushed to disk and renamed to ``path``.

    On any error the temporary file is removed and the file that was at ``path`` is unchanged.

    Raises: UsageError for a folder and for what is no path; MissingFile if the folder of ``path`` does not exist;
        DiskFull; CannotWrite.
    """
    target = Path(os.path.realpath(as_path(path)))
    try:
        if target.is_dir():
            raise UsageError(f"{path} is a folder: give the name of a file to write")
        if not target.parent.is_dir():
            raise MissingFile(f"the folder {target.parent} of {path} does not exist: create it first")
    except LsquantError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from error
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(_mode(target))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if _is_of_the_system(error):
            raise cannot_write(path, error) from error
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replace: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success its files are flushed to disk and it is renamed to ``path``.

    On any error the temporary folder is removed and what was at ``path`` is unchanged.  A process killed between the
    two renames that replace a folder leaves the old one beside it, under a hidden name.

    replace: name of a file that a folder must hold, beside nothing but files, to be replaced; None replaces none.
    Raises: UsageError for what exists and is not replaced, and for what is no path; MissingFile if the folder around
        ``path`` does not exist; DiskFull; CannotWrite.
    """
    target = Path(os.path.realpath(as_path(path)))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    try:
        _require_room(path, target, replace)
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        try:
            if target.exists():
                os.replace(target, old)
            os.replace(temporary, target)
        except BaseException:
            if old.exists() and not target.exists():
                os.replace(old, target)
            raise
        _sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if _is_of_the_system(error):
            raise cannot_write(path, error) from error
        raise


def _require_room(path: Any, target: Path, replace: str | None) -> None:
    """Raise an error where a folder cannot be made at ``target``, or what is there is not to be replaced."""
    if not target.parent.is_dir():
        raise MissingFile(f"the folder {target.parent} of {path} does not exist: create it first")
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{path} is a file: give the name of a folder to write")
    if replace is None:
        raise UsageError(f"{path} exists: give another folder, or overwrite=True to replace it")
    files = list(target.iterdir())
    if files and (not (target / replace).is_file() or any(f.is_dir() or f.is_symlink() for f in files)):
        raise UsageError(f"{path} is no model folder, which has {replace} and no folders in it: it is not replaced")


def require_no_link(path: str | os.PathLike[str]) -> None:
    """Raise UsageError for a symbolic link where a file would be written that nobody named: it leads anywhere."""
    if os.path.islink(path):
        raise UsageError(
            f"{path} is a symbolic link, and what it leads to would be overwritten: remove it, or name another file"
        )


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace the file at ``path`` by ``data``, or leave it as it is and raise."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace the file at ``path`` by ``text`` in UTF-8, or leave it as it is and raise."""
    atomic_write_bytes(path, text.encode())


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return standard JSON; NaN and infinities, which JSON has not, become null, other objects their str()."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Replace the file at ``path`` by indented JSON."""
    atomic_write_text(path, json_text(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON, plain and not nested deeply.  Raises: MissingFile, DamagedFile naming the file."""
    return entry.read_json(path).value


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Remove the temporary files and folders that a killed process left in ``folder`` and below; return how many."""
    leftovers = list(Path(folder).rglob(".*.tmp"))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return len(leftovers)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _mode(path: Path) -> int:
    """Return the permissions of the file that is replaced, or of a new file (safetensors gives the owner's only)."""
    if path.exists():
        return path.stat().st_mode & 0o777
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Flush the folder's entry, so that the rename survives a power cut; not all systems can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
