"""The errors that lsquant raises on purpose; each has the exit code that the command line ends with."""

from __future__ import annotations


class LsquantError(Exception):
    """Base of all errors raised on purpose.  ``exit_code``: what the command line returns for it."""

    exit_code = 1


class UsageError(LsquantError, ValueError):
    """A request that cannot be met as it stands: an invalid argument or recipe, an output that exists already."""

    exit_code = 2


class ShapeError(UsageError, RuntimeError):
    """Shapes that PyTorch's own layer refuses too, in its words: whoever catches its RuntimeError catches this one."""


class ForwardError(UsageError, RuntimeError):
    """A forward pass that failed: the model and the batch do not fit together."""


class MissingExtra(LsquantError, ImportError):
    """A missing optional package; the message names the extra that installs it."""

    exit_code = 3


class MissingFile(LsquantError, FileNotFoundError):
    """A file or folder that does not exist."""

    exit_code = 3


class DamagedFile(LsquantError, ValueError):
    """A file that is truncated, corrupted or of another kind."""

    exit_code = 3


class DiskFull(LsquantError, OSError):
    """A full disk; the file that was there before is unchanged."""

    exit_code = 3


class CannotWrite(LsquantError, OSError):
    """A folder or file that may not be written; the file that was there before is unchanged."""

    exit_code = 3
