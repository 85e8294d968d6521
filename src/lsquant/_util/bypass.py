"""Detection of functions that use a weight without calling its layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

Key = TypeVar("Key")

PRODUCT = re.compile(
    r"(bi)?linear|(__r?)?matmul(__)?|(b?add)?(b?mm|mv)|(tensor)?dot|inner|einsum|embedding(_bag)?"
    r"|conv(_transpose)?[123]d|convolution|multi_head_attention_forward|cat|stack"
)
"""Functions that multiply with a weight, look rows up in it, or join it to other weights for a product."""

METADATA = re.compile(r"__get__|to|type_as|new_\w+|\w+_like")
"""Functions that read shape, dtype or device only; ``__get__`` is an attribute."""


def address(t: Tensor) -> int:
    """Return where a tensor's memory begins, the same for all its views; 0 where it has none of its own."""
    return 0 if t.is_sparse else t.untyped_storage().data_ptr()


class BypassDetector(TorchFunctionMode, Generic[Key]):
    """Detect uses of a weight that bypass its layer, in the torch functions called inside the ``with`` block.

    weights: ``address`` of a weight -> key.
    running: the layers that are being computed now, kept by the caller's hooks; while there is one nothing is recorded.
    any_use: record every function that computes with the values, not products alone.
    own: gives the addresses that the module computing now owns itself; their use bypasses no layer.

    ``found``: key -> name of the function; a product replaces another function.
    """

    def __init__(
        self, weights: dict[int, Key], running: list[Any], any_use: bool = False, own: Callable[[], set[int]] = set
    ) -> None:
        super().__init__()
        self.weights = {place: key for place, key in weights.items() if place}
        self.running = running
        self.any_use = any_use
        self.own = own
        self.found: dict[Key, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.running:
            return result
        name = getattr(func, "__name__", "")
        is_product = PRODUCT.fullmatch(name) is not None
        computes = isinstance(result, Tensor) and METADATA.fullmatch(name) is None
        if is_product or (self.any_use and computes):
            self._record(name, is_product, [*args, *kwargs.values()])
        return result

    def _record(self, name: str, is_product: bool, operands: list[Any]) -> None:
        for value in operands:
            for t in value if isinstance(value, (tuple, list)) else [value]:
                key = self.weights.get(address(t)) if isinstance(t, Tensor) else None
                if key is None or not (is_product or key not in self.found) or address(t) in self.own():
                    continue
                self.found[key] = name
