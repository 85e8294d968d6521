"""The ONNX graph being written, and the trace of each layer in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lsquant._util.optional import require

FLOAT, UINT8, INT8, INT32, DOUBLE = 1, 2, 3, 6, 11  # onnx.TensorProto
Dims = list[int | None]
"""The shape of a value, None for a free dimension."""


def array(t: Tensor) -> np.ndarray:
    """Return a contiguous NumPy copy."""
    return np.ascontiguousarray(t.detach().cpu().numpy())


class Table(NamedTuple):
    """The codes of a quantized embedding, one initializer for all layers that have its weight.

    name: of the initializer.
    stored: (rows, columns) int8 or uint8, shifted.
    shift: what was added to the codes for storage.
    narrow: the type of ml_dtypes with 4 or 2 bits that they have in the file, or None.
    """

    name: str
    stored: np.ndarray
    shift: int
    narrow: Any


@dataclass
class Graph:
    """Nodes and initializers being written.

    nodes: in order of execution.
    constants: the initializers, by name.
    prefix: the start of the names of the present layer's nodes.
    tables: of the embeddings, by the quantizer of their weight.
    """

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    prefix: str = ""
    tables: dict[Any, Table] = field(default_factory=dict)

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """Add an initializer, once for each name.  Returns the name."""
        self.constants[name] = np.asarray(value)
        return name

    def node(self, operator: str, inputs: list[str], output: str, label: str = "", **attributes: Any) -> str:
        """Add a node ``prefix/label`` with one output.  Returns the output's name."""
        name = f"{self.prefix}/{label or operator}"
        helper = require("onnx", extra="onnx").helper
        self.nodes.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output


_KEYS = {"stored_shift": "offset", "weight_shift": "weight_offset"}  # field -> its key in the file


@dataclass
class LayerTrace:
    """Where the parts of one call of a layer are in the file.  Part of the file's metadata, as JSON.

    layer: its name in the model.
    call: 0 for its first call in a forward pass, 1 for the next.
    input, output: the values that enter and leave it.
    codes: the value with the codes of the input, None where the input is not quantized.
    stored_shift: what was added to the codes of the input for storage.
    input_step: the initializer of s_x.
    weights: the initializers of the codes of the weight, in the order of their groups.
    weight_shift: what was added to the codes of the weight for storage.
    transposed: whether the codes are stored as (in, out).
    layout: "" for output channels first; of a transposed convolution also "own", (in, out / groups, ...), or
        "reversed", with reversed kernels.
    scales: the initializers of fl(s_x s_w).
    weight_steps: the initializers of s_w.
    """

    layer: str
    call: int
    input: str
    output: str
    codes: str | None = None
    stored_shift: int = 0
    input_step: str | None = None
    weights: list[str] = field(default_factory=list)
    weight_shift: int = 0
    transposed: bool = False
    layout: str = ""
    scales: list[str] = field(default_factory=list)
    weight_steps: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The layer's name in the names of nodes and initializers."""
        return self.layer or "model"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the metadata."""
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerTrace:
        """Return the trace of ``to_dict``.  Raises: TypeError for other values."""
        fields = {key: name for name, key in _KEYS.items()}
        return cls(**{fields.get(key, key): value for key, value in values.items()})
