"""The errors lsquant raises on purpose. Each has the exit code that the command line ends with."""

from __future__ import annotations


class LsquantError(Exception):
    """Base of all errors raised on purpose. `exit_code`: int, what the command line returns for it."""

    exit_code = 1


class UsageError(LsquantError, ValueError):
    """Something was asked for that cannot be done as asked: a wrong argument, an existing output, a wrong recipe."""

    exit_code = 2


class MissingExtra(LsquantError, ImportError):
    """An optional package is not installed; the message names the extra that installs it."""

    exit_code = 3


class MissingFile(LsquantError, FileNotFoundError):
    """A file or folder that was named does not exist."""

    exit_code = 3


class DamagedFile(LsquantError, ValueError):
    """A file exists but is truncated, corrupted or not of the kind that is read."""

    exit_code = 3


class DiskFull(LsquantError, OSError):
    """No space is left for a file being written; the file that was there before is unchanged."""

    exit_code = 3
