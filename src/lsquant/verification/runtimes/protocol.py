"""What a runtime is to the verdict: it opens a file, and each runner computes what the trained model computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from lsquant._util.batches import Forward
from lsquant.verification.recorder import Call, LayerCall

Array = Tensor | np.ndarray


@dataclass
class Observed:
    """What a runtime computes for one call of the model.

    The iterables may compute what they yield, so that no more than one layer is in memory.

    layers: (layer call, codes of its input, output) of every layer, each given the trained model's own input.
    codes: (layer call, codes of its input) of every layer, end to end.
    outputs: (name, value) of every output of the model.
    explain: names what differs first, once something does.

    Codes are float32 integers; None where there are none.
    """

    layers: Iterable[tuple[LayerCall, Array | None, Array]]
    codes: Iterable[tuple[LayerCall, Array | None]]
    outputs: Sequence[tuple[str, Array]]
    explain: Callable[[], str] = str


class Runner(Protocol):
    """A file that is open in a runtime, with certain options."""

    def run(self, calls: list[Call], batch: Any, forward: Forward | None) -> Iterator[Observed]:
        """Yield what the file gives for each call of the trained model on a batch."""
        ...


@dataclass
class Opened:
    """A file, open in a runtime.

    title: of the runtime, with its version.
    runners: (options, runner): under the recommended options first, without any last.
    has_options: whether the runtime takes options, so that a verdict also says what the file gives without any.
    remarks: for the verdict: what the runtime makes of the file.
    """

    title: str
    runners: list[tuple[dict[str, str], Runner]]
    has_options: bool
    remarks: tuple[str, ...] = ()


class Runtime(ABC):
    """A runtime of ``verify``.  name: as ``verify(runtime=)`` takes it."""

    name: str

    @abstractmethod
    def open(
        self, path: str, content: Any, model: nn.Module, node_modules: Any = None
    ) -> AbstractContextManager[Opened]:
        """Open a file until the block ends.

        path: of the file.
        content: what its format read from it.
        model: the trained model, which is unchanged.
        node_modules: the folder with onnxruntime-web, for the runtime of that name.
        """
