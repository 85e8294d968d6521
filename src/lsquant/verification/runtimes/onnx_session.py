"""Sessions on ONNX models, which look alike in every runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, np.ndarray]


class Session(Protocol):
    """A loaded model: the names of its inputs and outputs, and a run."""

    inputs: list[str]
    outputs: list[str]

    def run(self, names: Sequence[str], feeds: Arrays) -> list[np.ndarray]:
        """Return the outputs of these names."""
        ...


@dataclass
class Engine:
    """What opens sessions.

    title: of the runtime, with its version.
    kinds: the options of its sessions: the recommended ones first, then none where that is not the same.
    open: (path or bytes of a model, options) -> Session.
    optimised: (path of a model, options) -> the graph that the runtime makes of it; None where it does not tell.
    """

    title: str
    kinds: list[dict[str, str]]
    open: Callable[[str | bytes, dict[str, str]], Session]
    optimised: Callable[[str, dict[str, str]], Any] | None = None
