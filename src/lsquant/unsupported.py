"""Why a module stays in floating point: the reasons that ``Changes`` and ``check`` give."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lsquant.nn import EXACT_TYPES, QUANTIZED_TYPES, QuantizedLayer, quantized_type
from lsquant.quantizer import Quantizer


def reason_for_layer(layer: nn.Module, bypassed: dict[nn.Module, str]) -> str:
    """Say why a layer of a known type cannot be quantized; "" where it can.

    bypassed: layer that is not called -> the function that computes with its weight, of ``execution_order``.
    """
    if function := bypassed.get(layer):
        return f"its weight is used by {function} without calling the layer: not quantized"
    weight = layer.weight
    assert isinstance(weight, Tensor)
    if not weight.numel():
        return "it has no weights"
    kind = quantized_type(layer)
    return kind.unsupported(layer) if kind else ""


def reason_for_module(module: nn.Module) -> str:
    """Say why a module of another type that has weights stays in floating point; "" for everything else."""
    if isinstance(module, (QuantizedLayer, Quantizer)):
        return ""
    name = type(module).__name__
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return f"{name} computes with its weights directly, so no layer can be replaced: not quantized"
    if isinstance(module, tuple(QUANTIZED_TYPES)):
        base = next(kind.__name__ for kind in type(module).__mro__ if kind in QUANTIZED_TYPES)
        if is_parametrized(module):
            return f"{base} with a parametrized weight, computed anew for each use: not quantized"
        if next(module.parameters(recurse=False), None) is None:
            return ""  # traced: its parameters are in a layer of their own
        return f"a subclass of {base} may compute otherwise: not quantized"
    if type(module) in EXACT_TYPES and (reason := EXACT_TYPES[type(module)].unsupported(module)):
        return f"not bit-exact in runtimes: {reason}"
    if type(module).__module__.startswith("torch.nn.modules.") and isinstance(
        getattr(module, "weight", None), nn.Parameter
    ):
        return "" if "Norm" in name else f"{name} is not supported"
    if own := _own_matrices(module):
        return f"it holds {', '.join(own)} itself, used without a layer that lsquant knows: not quantized"
    return ""


def _own_matrices(module: nn.Module) -> list[str]:
    """Name a module's own parameters of two dimensions or more; none where a stand-alone Quantizer is beside them."""
    is_list = isinstance(module, (nn.ParameterList, nn.ParameterDict))
    if not is_list and type(module).__module__.startswith("torch.nn."):
        return []
    if any(isinstance(child, Quantizer) for child in module.children()):
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if sum(size > 1 for size in p.shape) > 1]
