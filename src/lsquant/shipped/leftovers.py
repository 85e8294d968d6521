"""What stays float of a trained model: everything in its state dict that no quantizer replaces by codes."""

from __future__ import annotations

from torch import Tensor, nn

from lsquant.checkpoint import stored_once
from lsquant.nn import QuantizedLayer
from lsquant.quantizer import Quantizer
from lsquant.shipped.record import Shipped

QUANTIZER_STATE = ("step", "offset", "initial_step", "signed", "count", "initialized")
"""What a quantizer has in the state dict."""


def leftovers(record: Shipped) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what stays float, and the aliases of the state dict.

    The first dictionary has the tensors that ship as they are, by their names in the state dict, each once.  A weight
    with codes is among them only where something else reads the same memory in floating point.  The second has for
    each further name of a stored tensor, or of a weight with codes, the name under which it is stored.
    """
    tensors, aliases = stored_once(record.model)
    read_in_float = _used_in_float(record.model)
    for quantizer in record.quantizers.values():
        for key in QUANTIZER_STATE:
            tensors.pop(f"{quantizer.name}.{key}", None)
        if quantizer.weight is not None and quantizer.weight.name not in read_in_float:
            del tensors[aliases.get(quantizer.weight.name, quantizer.weight.name)]
    return tensors, aliases


def _used_in_float(model: nn.Module) -> set[str]:
    """Return the names of weights that share memory with a tensor which does not have their quantizer."""
    owners: dict[str, Quantizer | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            owners[f"{name}.weight".lstrip(".")] = module.weight_quantizer
    spans = []
    for name, t in model.state_dict().items():
        reach = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((str(t.device), t.data_ptr(), t.data_ptr() + reach * t.element_size(), name))
    overlapping: list[list[str]] = []
    end = ("", 0)
    for device, low, high, name in sorted(spans):
        if (device, low) >= end:
            overlapping.append([])
        overlapping[-1].append(name)
        end = max(end, (device, high))
    return {name for names in overlapping if len({owners.get(n) for n in names}) > 1 for name in names}
