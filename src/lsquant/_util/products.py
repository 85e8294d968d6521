"""Notices products with a layer's weight that go round the layer."""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.overrides import TorchFunctionMode

Key = TypeVar("Key")


def address(t: Tensor) -> int:
    """Where a tensor's values lie; the same for its views.  0 where it has no storage."""
    return 0 if t.is_sparse else t.untyped_storage().data_ptr()


class Bypass(TorchFunctionMode, Generic[Key]):
    """Notices products with a weight outside its layer; joining it to others counts as well.

    weights: address -> key; inside: not empty while a layer computes.  ``values``: notice every function that computes
    with the weight's values, not products alone.  found: key -> name of the function, a product before others.
    """

    PRODUCT = re.compile(
        r"(bi)?linear|(__r?)?matmul(__)?|(b?add)?(b?mm|mv)|(tensor)?dot|inner|einsum|embedding(_bag)?"
        r"|conv(_transpose)?[123]d|convolution|multi_head_attention_forward|cat|stack"
    )

    # reads shape, dtype or device; ``__get__`` is an attribute
    FORM = re.compile(r"__get__|to|type_as|new_\w+|\w+_like")

    def __init__(self, weights: dict[int, Key], inside: list[Any], values: bool = False) -> None:
        super().__init__()
        self.weights = {place: key for place, key in weights.items() if place}
        self.inside, self.values, self.found = inside, values, dict[Key, str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        product = bool(self.PRODUCT.fullmatch(name))
        computes = self.values and isinstance(result, Tensor) and not self.FORM.fullmatch(name)
        if not self.inside and (product or computes):
            for value in [*args, *(kwargs or {}).values()]:
                for t in value if isinstance(value, (tuple, list)) else [value]:
                    key = self.weights.get(address(t)) if isinstance(t, Tensor) else None
                    if key is not None and (product or key not in self.found):
                        self.found[key] = name
        return result
