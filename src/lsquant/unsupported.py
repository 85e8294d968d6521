"""What cannot be quantized or shipped: the reasons that ``Changes``, ``check`` and every writer give."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils.parametrize import is_parametrized

from lsquant._util.errors import UsageError
from lsquant.nn import (
    EXACT_TYPES,
    QUANTIZED_TYPES,
    QuantizedLayer,
    quantized_layers,
    quantized_type,
    row_shape,
    weight_steps,
)
from lsquant.quantizer import Quantizer
from lsquant.spec import QuantSpec

SEEN = "seen_by_prepare"
"""Attribute of a layer that ``prepare`` left in floating point, and of the model it was called with."""

TORCHAO_TYPES = (nn.Linear, nn.Conv2d, nn.Embedding)
"""The float types whose weight torchao's tensor can be."""

# ---- why a module stays in floating point ----


def reason_for_layer(layer: nn.Module, bypassed: dict[nn.Module, str]) -> str:
    """Say why a layer of a known type cannot be quantized; "" where it can.

    bypassed: layer -> the function that computes with its weight without calling it, of ``execution_order``.
    """
    if reason := not_its_own(layer):
        return f"{reason}: not quantized"
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
            remedy = " and ".join(_remove_parametrization(name) for name in module.parametrizations)  # type: ignore
            return f"{base} with a parametrized weight, computed anew for each use ({remedy}): not quantized"
        if next(module.parameters(recurse=False), None) is None:
            return ""  # traced: its parameters are in a layer of their own
        return f"a subclass of {base} may compute otherwise: not quantized"
    if type(module) in EXACT_TYPES and (reason := EXACT_TYPES[type(module)].unsupported(module)):
        return f"not bit-exact in runtimes: {reason}"
    is_list = isinstance(module, (nn.ParameterList, nn.ParameterDict))
    if type(module).__module__.startswith("torch.nn.") and not is_list:
        if not type(module).__module__.startswith("torch.nn.modules."):
            return ""
        has_weight = isinstance(getattr(module, "weight", None), nn.Parameter) or _own_matrices(module)
        return f"{name} is not supported" if has_weight and "Norm" not in name else ""
    if own := _own_matrices(module):
        return f"it holds {', '.join(own)} itself, used without a layer that lsquant knows: not quantized"
    return ""


def _own_matrices(module: nn.Module) -> list[str]:
    """Name a module's own parameters of two dimensions or more; none where a stand-alone Quantizer is beside them."""
    if any(isinstance(child, Quantizer) for child in module.children()):
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if sum(size > 1 for size in p.shape) > 1]


# ---- what a layer ships is what its forward pass uses ----


def not_its_own(layer: nn.Module) -> str:
    """Say why the state dict does not hold what a layer computes with; "" where it does, as usual.

    So it is where a hook or a parametrization makes the weight or the bias, and where the object has a ``forward`` of
    its own.  The reason names the remedy.
    """
    if "forward" in vars(layer):
        return "its forward method was replaced on this object (delete that attribute)"
    for name in ("weight", "bias"):
        if is_parametrized(layer, name):
            return f"a parametrization makes its {name} anew for each use ({_remove_parametrization(name)})"
        value: Any = getattr(layer, name, None)
        if value is None or name in layer._parameters:
            continue
        if name in layer._buffers and name not in layer._non_persistent_buffers_set:
            continue
        maker, remedy = _maker(layer, name)
        return f"{maker} its {name} anew for each forward pass ({remedy})"
    return ""


def _remove_parametrization(name: str) -> str:
    return f"call torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) before prepare"


def _maker(layer: nn.Module, tensor: str) -> tuple[str, str]:
    """Return what makes a tensor of a layer, with its verb, and the remedy."""
    for hook in layer._forward_pre_hooks.values():
        kind = type(hook)
        name = getattr(hook, "name", getattr(hook, "_tensor_name", None))
        if name != tensor or not kind.__module__.startswith("torch.nn.utils."):
            continue
        if kind.__module__ == "torch.nn.utils.prune":
            return "pruning makes", f"call torch.nn.utils.prune.remove(layer, {tensor!r}) before prepare"
        plain = kind.__module__.rpartition(".")[2]
        return f"{plain} makes", f"call torch.nn.utils.remove_{plain}(layer) before prepare"
    return "something makes", f"register its {tensor} as a parameter or a persistent buffer before prepare"


def unfit(layer: QuantizedLayer) -> str:
    """Say why codes of a quantized layer would not be what its forward pass uses; "" where they are.

    Reasons are those of ``not_its_own``, and steps whose number does not fit the weight any more.
    """
    if reason := not_its_own(layer):
        return f"{reason}, so it has no fixed codes"
    quantizer = layer.weight_quantizer
    if quantizer is None:
        return ""
    spec, shape = quantizer.requested, row_shape(layer)
    again = "call lsquant.prepare(model, recipe) again"
    try:
        steps, _ = weight_steps(shape, spec.granularity, spec.group_size, "")
    except (UsageError, ZeroDivisionError):
        return f"groups of {spec.group_size} do not divide its weight of shape {tuple(layer.weight.shape)}; {again}"
    if steps != quantizer.step.numel():
        found = f"its weight of shape {tuple(layer.weight.shape)} needs {steps} steps, its quantizer has"
        return f"{found} {quantizer.step.numel()}; {again}"
    return ""


def require_fit(name: str, layer: QuantizedLayer) -> None:
    """Raise a UsageError that names a layer whose codes would not be what its forward pass uses."""
    if reason := unfit(layer):
        raise UsageError(f"{name or type(layer).__name__}: {reason}")


def require_no_hooks(name: str, quantizer: Quantizer) -> None:
    """Raise a UsageError that names a forward hook of a layer's quantizer: codes ship, which it may change."""
    for hook in (*quantizer._forward_pre_hooks.values(), *quantizer._forward_hooks.values()):
        raise UsageError(
            f"{name}: this quantizer has a forward hook, {spoken_hook(hook)}, and no written form holds it; remove it "
            "(handle.remove()), or register it on the layer"
        )


def require_no_global_hooks() -> None:
    """Raise a UsageError that names a global forward hook, which acts on every layer of the process.

    No file and no copy of the model holds it, and nothing but running shows whether it changes values.
    """
    for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks):
        for hook in hooks.values():
            if not (getattr(hook, "__module__", None) or "").startswith("torch."):
                raise UsageError(
                    f"a global forward hook, {spoken_hook(hook)}, may change what every layer computes, and ships with "
                    "no model; remove it first (handle.remove()), or register it on the modules that need it"
                )


def spoken_hook(hook: Any) -> str:
    """Return the name of a hook, for messages."""
    return getattr(hook, "__qualname__", type(hook).__qualname__)


# ---- what no file can hold ----


def writers_without_form(layer: nn.Module, weight: QuantSpec | None, activation: QuantSpec | None) -> tuple[str, ...]:
    """Name the calls that cannot write a layer with these specifications."""
    kind = quantized_type(layer)
    if kind is None or (weight is None and activation is None):
        return ()
    if getattr(layer, "max_norm", None) is not None:
        return ("to_integer", "export_packed", "export_onnx", "to_torchao")
    found = []
    group_size = None if weight is None else weight.group_size
    parameter: Any = layer.weight
    kernel = parameter.shape[2:].numel()
    if group_size is not None and activation is not None and parameter.dim() > 2:
        found.append("export_onnx(profile='exact')")
    if weight is not None and (kind.float_type not in TORCHAO_TYPES or (group_size or 0) % kernel):
        found.append("to_torchao")
    return tuple(found)


# ---- layers that came after prepare ----


def note_seen(model: nn.Module, layers: Iterator[nn.Module]) -> None:
    """Keep at the model, and at its layers that stay float, that ``prepare`` has seen them."""
    for module in (model, *layers):
        vars(module)[SEEN] = True


def added_later(model: nn.Module) -> Iterator[str]:
    """Name float layers that came into a prepared model after ``prepare``, in place of others or beside them."""
    found: dict[nn.Module, str] = {}
    for prefix, root in model.named_modules():
        if not vars(root).get(SEEN) or not any(True for _ in quantized_layers(root)):
            continue
        for name, module in root.named_modules(prefix=prefix):
            if quantized_type(module) is None or isinstance(module, QuantizedLayer) or vars(module).get(SEEN):
                continue
            found.setdefault(module, name)
    return iter(found.values())


def warn_of_added(model: nn.Module) -> None:
    """Warn of layers that came into a prepared model after ``prepare``: they are written in floating point."""
    if names := list(added_later(model)):
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"{', '.join(map(repr, names[:3]))}{more}: put into the model after lsquant.prepare, so not quantized; "
            "call lsquant.prepare(model, recipe) again, which keeps the steps of the others",
            UserWarning,
            stacklevel=2,
        )
