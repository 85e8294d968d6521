"""What a folder of compressed-tensors holds (docs/compressed-tensors.md): names, types, and how codes are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsquant._util.bits import pack, unpack
from lsquant.spec import QuantSpec

CONFIG, WEIGHTS = "config.json", "model.safetensors"
KEY = "quantization_config"
"""The key of config.json."""
METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"
LINEAR = "Linear"
"""The target that stands for every linear layer that no other target names."""
SCALE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
WORD = 32
"""Bits of a word; as many codes take as many words as a code has bits."""


@dataclass(frozen=True)
class Scheme:
    """How the weights of a group of layers are quantized.

    bits: 2 to 8; codes are signed.
    strategy: "tensor", "channel" or "group".
    group_size: neighbours in a row that share a step, for "group".
    """

    bits: int
    strategy: str
    group_size: int | None

    @classmethod
    def of(cls, spec: QuantSpec) -> Scheme:
        return cls(spec.bits, spec.granularity, spec.group_size)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape of ``weight_scale``; a group size must divide the columns."""
        if self.strategy == "tensor":
            return (1,)
        return (rows, 1 if self.group_size is None else columns // self.group_size)

    def group(self, targets: list[str]) -> dict[str, Any]:
        """Return the entry of ``config_groups``."""
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": self.strategy,
            "group_size": self.group_size,
            "dynamic": False,
        }
        nothing = {"input_activations": None, "output_activations": None}
        return {"targets": targets, "weights": weights, **nothing, "format": FORMAT}


def words(columns: int, bits: int) -> int:
    """Return the int32 words that a row of codes takes."""
    return -(-columns * bits // WORD)


def packed_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes row by row, each row into whole words: ``code + 2^(bits-1)``, lowest bits first.

    codes: (rows, columns) int8.  Returns (rows, words) int32.
    """
    rows, columns = codes.shape
    padded = np.zeros((rows, -(-columns // WORD) * WORD), np.uint8)
    padded[:, :columns] = codes.cpu().numpy().astype(np.int16) + 2 ** (bits - 1)
    stream = pack(padded, bits).reshape(rows, -1)[:, : 4 * words(columns, bits)]
    return torch.from_numpy(np.ascontiguousarray(stream).view("<i4").astype(np.int32, copy=False))


def unpacked_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Unpack what ``packed_rows`` gave.  packed: (rows, words) int32.  Returns (rows, columns) int8."""
    rows, count = packed.shape
    stream = np.zeros((rows, -(-count // bits) * bits), "<i4")
    stream[:, :count] = packed.numpy()
    wide = stream.shape[1] * WORD // bits
    found = unpack(stream.view(np.uint8).reshape(-1), bits, rows * wide, signed=False).reshape(rows, wide)
    return torch.from_numpy((found[:, :columns].astype(np.int16) - 2 ** (bits - 1)).astype(np.int8))
