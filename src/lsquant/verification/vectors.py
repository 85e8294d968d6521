"""Golden vectors: what the trained model computes on a few samples, for a check on the device it is shipped to."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lsquant._util.batches import Forward, evaluating, run_batch, unwrapped
from lsquant._util.errors import UsageError
from lsquant._util.files import atomic_write_bytes
from lsquant.formats.onnx.graph import array
from lsquant.quantizer import Quantizer
from lsquant.shipped import ship
from lsquant.verification.recorder import layer_input, recording, watched

CHECKER = "check_vectors.py"


def export_vectors(
    model: nn.Module, path: str | os.PathLike[str], batch: Any, *, forward: Forward | None = None
) -> Path:
    """Write inputs, all codes and outputs of one batch as an ``.npz``, and ``check_vectors.py`` beside it.

    Arrays: ``input/0`` and so on, or ``input/NAME`` for keywords; ``codes/LAYER`` int8 or uint8, the input of each
    layer (``LAYER#2`` where it is called again); ``weight/LAYER`` int8 codes; ``step/QUANTIZER`` float32,
    ``zero_point/QUANTIZER`` int32; ``output/0`` and so on; ``layers``: names in order of execution.
    ``python check_vectors.py FILE.onnx PATH`` needs NumPy and ONNX Runtime.

    model: the trained model, which is unchanged.
    path: of the file.  Returned.
    batch, forward: as for ``verify``; a few samples are enough.

    Raises: UsageError for values without a code, or a model that was not called once.
    """
    arrays: dict[str, Any] = {}
    model = unwrapped(model)
    record = ship(model)
    with evaluating(model), recording(model) as calls:
        run_batch(model, batch, forward)
        if len(calls) != 1:
            raise UsageError(f"export_vectors: the batch called the model {len(calls)} times, not once")
        named = {**{str(i): x for i, x in enumerate(calls[0].inputs)}, **calls[0].keywords}
        arrays |= {f"input/{name.lower()}": array(x) for name, x in named.items()}
        modules, order = watched(model), []
        for (name, number), recorded in calls[0].layers.items():
            layer: Any = modules[name]
            order.append(f"{name or 'model'}{f'#{number + 1}' if number else ''}")
            quantizer = layer if isinstance(layer, Quantizer) else layer.input_quantizer
            if quantizer is not None:
                arrays[f"codes/{order[-1]}"] = array(quantizer.codes(layer_input(layer, recorded.input)))
        for name, shipped in record.layers.items():
            if shipped.weight is not None and shipped.weight.weight is not None:
                arrays[f"weight/{name or 'model'}"] = array(shipped.weight.weight.own_codes())
        for name, quantizer in record.quantizers.items():
            arrays[f"step/{name}"] = array(quantizer.step)
            if quantizer.zero_point is not None:
                arrays[f"zero_point/{name}"] = array(quantizer.zero_point)
        arrays |= {f"output/{i}": array(y) for i, y in enumerate(calls[0].outputs)}
    buffer = io.BytesIO()
    np.savez(buffer, layers=np.array(order), **arrays)
    atomic_write_bytes(path, buffer.getvalue())
    atomic_write_bytes(Path(path).with_name(CHECKER), Path(__file__).with_name(CHECKER).read_bytes())
    return Path(path)
