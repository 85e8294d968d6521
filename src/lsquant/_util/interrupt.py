"""Ctrl-C and SIGTERM while the command line is still loading PyTorch: one line and exit code 130, as later.

The script ``lsquant`` and ``python -m lsquant`` import this package, and with it PyTorch, which takes a second or more,
before any function of theirs is called; a KeyboardInterrupt would end in a traceback of some import.  So this module,
the first that the package imports, sets handlers that end the process at once, for nothing is begun yet; ``release``
puts Python's back.  In any other program nothing is done.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

INTERRUPTED = 130
_USUAL = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def _is_command_line() -> bool:
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # the package of `python -m NAME` is being imported
        given = sys.orig_argv
        return "-m" in given and given[given.index("-m") + 1 :][:1] == ["lsquant"]
    return os.path.basename(program) in ("lsquant", "lsquant.exe")


def _stop(*_: Any) -> NoReturn:
    try:
        os.write(2, b"lsquant: interrupted\n")
    finally:
        os._exit(INTERRUPTED)


def _hold() -> None:
    """Set the handlers, where Python's own are in place."""
    if not _is_command_line():
        return
    with suppress(ValueError):  # not the main thread
        for number, usual in _USUAL.items():
            if signal.getsignal(number) is usual:
                signal.signal(number, _stop)


def release() -> None:
    """Put Python's handlers back: from now on Ctrl-C is a KeyboardInterrupt."""
    with suppress(ValueError):  # not the main thread
        for number, usual in _USUAL.items():
            if signal.getsignal(number) is _stop:
                signal.signal(number, usual)


_hold()
