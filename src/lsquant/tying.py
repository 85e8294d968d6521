"""Shared weights and shared quantizers: which layers share what is decided here, and nowhere else.

A weight is shared when several layers hold the same Parameter object (``head.weight = table.weight``).  Such layers
share one weight quantizer, that of the first of them in order of definition, and a file stores the tensors once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from lsquant._util.errors import UsageError
from lsquant.nn import QuantizedLayer, quantized_layers
from lsquant.quantizer import Quantizer

Layer = TypeVar("Layer", bound=nn.Module)


# ---- layers ----


def layers_by_weight(layers: Iterable[Layer]) -> dict[Tensor, list[Layer]]:
    """Group layers by the Parameter object that is their weight; weights and layers keep the order given."""
    groups: dict[Tensor, list[Layer]] = {}
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        groups.setdefault(weight, []).append(layer)
    return groups


def share_weight_quantizers(layers: Iterable[nn.Module]) -> None:
    """Give layers with one weight the weight quantizer of the first of them that has one."""
    quantized = [layer for layer in layers if getattr(layer, "weight_quantizer", None) is not None]
    for sharing in layers_by_weight(quantized).values():
        for layer in sharing[1:]:
            layer.weight_quantizer = sharing[0].weight_quantizer


def weights_with_several_quantizers(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Find weights that were tied after ``prepare``: layers that share a weight, but not its quantizer.

    Yields (layer, first layer with this weight), as names.
    """
    names = {layer: name for name, layer in quantized_layers(model)}
    for sharing in layers_by_weight(names).values():
        for layer in sharing[1:]:
            if layer.weight_quantizer is not sharing[0].weight_quantizer:
                yield names[layer], names[sharing[0]]


def require_one_quantizer_each(model: nn.Module) -> None:
    """Raise UsageError naming layers whose weights were tied after ``prepare``: one weight cannot have two codes."""
    for name, first in weights_with_several_quantizers(model):
        raise UsageError(
            f"layers {first!r} and {name!r} share one weight, but not its quantizer: it was tied after prepare; call "
            "lsquant.prepare(model, recipe) again"
        )


# ---- quantizers ----


def weight_quantizers(model: nn.Module) -> dict[Quantizer, tuple[str, QuantizedLayer]]:
    """Return each weight quantizer once, in order of definition -> name and layer of the first layer that uses it."""
    owners: dict[Quantizer, tuple[str, QuantizedLayer]] = {}
    for name, layer in quantized_layers(model):
        if layer.weight_quantizer is not None:
            owners.setdefault(layer.weight_quantizer, (name, layer))
    return owners


def quantizer_owners(model: nn.Module) -> dict[Quantizer, tuple[str, QuantizedLayer]]:
    """Return each quantizer of a weight or an input once -> name and layer of the first layer that uses it."""
    owners: dict[Quantizer, tuple[str, QuantizedLayer]] = {}
    for name, layer in quantized_layers(model):
        for quantizer in layer.own_quantizers():
            owners.setdefault(quantizer, (name, layer))
    return owners


# ---- tensors in files ----


def stored_once(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split the state dict into the tensors that a file stores and the names that are aliases of them.

    Two names are one tensor when memory, shape and strides are equal.  Another view of a stored tensor is copied whole,
    as safetensors requires.
    Returns: (name -> tensor, second name -> stored name).
    Raises: UsageError naming a value of the state dict that is no tensor.
    """
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_names: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    storages: set[int] = set()
    for name, tensor in model.state_dict().items():
        _require_tensor(name, tensor)
        key = (tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride())
        if tensor.numel() and (first := first_names.setdefault(key, name)) != name:
            aliases[name] = first
            continue
        storage = tensor.untyped_storage()
        is_view = storage.nbytes() != tensor.nbytes or (storage.data_ptr() and storage.data_ptr() in storages)
        storages.add(storage.data_ptr())
        copy = tensor.detach().clone() if is_view else tensor.detach()
        stored[name] = copy.contiguous()
    return stored, aliases


def _require_tensor(name: str, value: object) -> None:
    if isinstance(value, Tensor):
        return
    module = name.removesuffix("_extra_state").rstrip(".") or "(root)"
    raise UsageError(
        f"module {module!r} keeps a {type(value).__name__} in its state dict ({name!r}), and files hold tensors only; "
        "let its get_extra_state return a tensor, or keep the value elsewhere, as in save(..., metadata=)"
    )


def weights_used_in_float(model: nn.Module) -> set[str]:
    """Name the weights whose memory is also read without their quantizer, so that a file has to keep them in float."""
    owners: dict[str, Quantizer | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            owners[f"{name}.weight".lstrip(".")] = module.weight_quantizer
    found: set[str] = set()
    for names in _overlapping({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}):
        if len({owners.get(name) for name in names}) > 1:
            found.update(names)
    return found


def _overlapping(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Group names whose tensors lie in overlapping memory; a tensor that overlaps no other is a group by itself."""
    spans: list[tuple[str, int, int, str]] = []
    for name, t in tensors.items():
        elements = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((str(t.device), t.data_ptr(), t.data_ptr() + elements * t.element_size(), name))
    groups: list[list[str]] = []
    end = ("", 0)
    for device, first, last, name in sorted(spans):
        if (device, first) >= end:
            groups.append([])
        groups[-1].append(name)
        end = max(end, (device, last))
    return groups
