"""What stays float of a trained model: everything in its state dict that no quantizer replaces by codes."""

from __future__ import annotations

from torch import Tensor

from lsquant.shipped.record import Shipped
from lsquant.tying import stored_once, weights_used_in_float

QUANTIZER_STATE = ("step", "offset", "initial_step", "signed", "count", "initialized", "bounds")
"""What a quantizer has in the state dict."""


def leftovers(record: Shipped) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what stays float, and the aliases of the state dict.

    The first dictionary has the tensors that ship as they are, by their names in the state dict, each once.  A weight
    with codes is among them only where something else reads the same memory in floating point.  The second has for
    each further name of a stored tensor, or of a weight with codes, the name under which it is stored.
    """
    tensors, aliases = stored_once(record.model)
    read_in_float = weights_used_in_float(record.model)
    bounds = {f"{name}.bounds" for name in record.quantizers}  # which a reader knows from the bits
    aliases = {name: first for name, first in aliases.items() if first not in bounds}
    for quantizer in record.quantizers.values():
        for key in QUANTIZER_STATE:
            tensors.pop(f"{quantizer.name}.{key}", None)
        if quantizer.weight is not None and quantizer.weight.name not in read_in_float:
            del tensors[aliases.get(quantizer.weight.name, quantizer.weight.name)]
    return tensors, aliases
