"""Where in the user's code a function is called, and why a block cannot be traced."""

from __future__ import annotations

import os
import sys
from types import FrameType, TracebackType

import torch

Place = tuple[str, int, int]
"""File, line, and the instruction in its function."""

_LIBRARY = tuple(os.path.dirname(file) + os.sep for file in (torch.__file__, __file__))


class Untraceable(Exception):
    """What stands in the way of tracing a block, in words.  ``place``: where; None where it is not known."""

    def __init__(self, reason: str, place: Place | None = None) -> None:
        super().__init__(reason)
        self.place = place


def in_library(frame: FrameType) -> bool:
    """Tell whether a frame runs torch's code or that of this package."""
    file = frame.f_code.co_filename
    return file.startswith(_LIBRARY) or file.startswith("<frozen")


def current_place() -> Place | None:
    """Return the innermost place outside torch and this package that is being executed."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and in_library(frame):
        frame = frame.f_back
    return None if frame is None else (frame.f_code.co_filename, frame.f_lineno, frame.f_lasti)


def raised_at(traceback: TracebackType | None) -> Place | None:
    """Return the innermost place outside torch and this package through which an error passed."""
    found = None
    while traceback is not None:
        if not in_library(traceback.tb_frame):
            found = (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno, traceback.tb_lasti)
        traceback = traceback.tb_next
    return found


def spoken(place: Place | None) -> str:
    """Return a place as ``file:line``."""
    return "an unknown place" if place is None else f"{place[0]}:{place[1]}"
