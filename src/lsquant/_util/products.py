"""The multiplications of a model: those of its matrix products and convolutions, module by module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

WHOLE = (nn.MultiheadAttention, nn.RNNBase)
"""Modules that stand for all products inside them."""


class ProductCounter(TorchDispatchMode):
    """Count the multiplications of matrix products and convolutions inside the ``with`` block, module by module.

    Elementwise products are not counted.

    whole: types of modules, beside those of ``WHOLE`` and their subclasses, that stand for all products inside them.

    ``running``: modules that are being computed, the innermost last; kept by the caller's hooks.
    ``counts``: module -> multiplications.
    ``functions``: module -> names of the functions, in order of their first use.
    """

    supports_higher_order_operators = True

    def __init__(self, whole: tuple[type, ...] = ()) -> None:
        super().__init__()
        self.whole = whole
        self.running: list[nn.Module] = []
        self.counts: dict[nn.Module, int] = {}
        self.functions: dict[nn.Module, dict[str, None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_aten = getattr(func, "namespace", "") == "aten"
        name = func.__name__.partition(".")[0]
        if is_aten and name not in PRODUCTS and _in_inference(args):
            with self:  # here linear and matmul arrive as they are
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if is_aten and name in PRODUCTS and self.running:
            formula, spoken = PRODUCTS[name]
            count = formula([a.shape if isinstance(a, Tensor) else a for a in args], result)
            module = next((m for m in self.running if isinstance(m, WHOLE) or type(m) in self.whole), self.running[-1])
            if count and not isinstance(module, nn.RNNBase):  # see recurrent_products
                self.add(module, count, spoken)
        return result

    def add(self, module: nn.Module, count: int, function: str) -> None:
        """Add multiplications of a module."""
        self.counts[module] = self.counts.get(module, 0) + count
        self.functions.setdefault(module, {})[function] = None


def _in_inference(args: tuple[Any, ...]) -> bool:
    """Tell whether functions arrive whole: in inference mode, and where an argument was made in it."""
    return torch.is_inference_mode_enabled() or any(isinstance(a, Tensor) and a.is_inference() for a in args)


def recurrent_products(layer: nn.RNNBase, x: Any) -> int:
    """Count the multiplications of a recurrent layer: each of its weights multiplies once per step and sequence.

    Some engines compute the layer in one function, so it is not counted from inside.

    x: its input, a tensor (..., input_size) or a PackedSequence.
    """
    data = x if isinstance(x, Tensor) else x.data
    weights = sum(w.numel() for one in layer.all_weights for w in one if isinstance(w, Tensor) and w.dim() > 1)
    return data.shape[:-1].numel() * weights


# ---- one formula per function, from its arguments, with shapes in place of tensors, and its output ----


def _product(first: int) -> Callable[[Any, Any], int]:
    """Count for two matrices or vectors from this argument on: the first's elements times the second's columns."""

    def formula(args: Any, _: Any) -> int:
        a, b = args[first], args[first + 1]
        return math.prod(a) * (b[-1] if len(b) > 1 else 1)

    return formula


def _convolution(args: Any, output: Any) -> int:
    x, weight = args[0], args[1]
    transposed = len(args) > 6 and args[6] is True
    return math.prod(x if transposed else output.shape) * math.prod(weight[1:])


def _attention(args: Any, _: Any) -> int:
    query, key, value = args[:3]
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _bilinear(args: Any, _: Any) -> int:
    x, weight = args[0], args[1]
    return math.prod(x[:-1]) * math.prod(weight)


_ATTENTION = "scaled_dot_product_attention"
PRODUCTS: dict[str, tuple[Callable[[Any, Any], int], str]] = {
    **dict.fromkeys(("mm", "mv", "dot", "vdot", "bmm", "_int_mm", "_scaled_mm"), (_product(0), "matmul")),
    **dict.fromkeys(("addmm", "addmv", "addbmm", "baddbmm", "_addmm_activation"), (_product(1), "matmul")),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), (_convolution, "a convolution")),
    **dict.fromkeys(
        (
            *("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu"),
            *("_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"),
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        (_attention, _ATTENTION),
    ),
    "_trilinear": (_bilinear, "bilinear"),
}
"""ATen function -> formula, and the function as users call it."""
