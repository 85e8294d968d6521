"""The block types of GGUF that lsquant writes: codes and steps to bytes and back.

A block is one scale d in float16 and the codes of neighbours along the input dimension.  Layouts as ggml has them:
q4_0, q8_0 and tq2_0 are those of gguf's ``quants.py``; q2_0, which gguf 0.19 does not know, that of llama.cpp's
``dequantize_row_q2_0``: d, then 16 bytes, element j of the block in bits ``2 * (j % 4)`` of byte ``j // 4``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
HALF = np.dtype("<f2")


@dataclass(frozen=True)
class BlockType:
    """A type of GGUF tensors.

    name: as ``export_gguf`` takes it.
    number: in a file.
    block: elements that share d.
    size: bytes of a block.
    low, high: the codes that it holds.
    file_type: ``general.file_type`` of a file that has mostly this type.
    scale_first: whether d stands before the codes.
    sign: of d, the step times which it is.
    encode: (blocks, block) int8 codes to (blocks, size - 2) uint8.
    decode: the inverse.
    """

    name: str
    number: int
    block: int
    size: int
    low: int
    high: int
    file_type: int
    scale_first: bool
    sign: int
    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]

    def pack(self, codes: Array, step: Array) -> Array:
        """Return the bytes of a weight.

        codes: (rows, columns) int8 within ``low`` to ``high``, columns a multiple of ``block``.
        step: (rows, columns / block) float32 that float16 holds.
        Returns: (rows, columns / block * size) uint8.
        """
        scale = (self.sign * step).astype(HALF).reshape(-1, 1).view(np.uint8)
        data = self.encode(codes.reshape(-1, self.block))
        parts = (scale, data) if self.scale_first else (data, scale)
        return np.concatenate(parts, axis=1).reshape(len(codes), -1)

    def unpack(self, data: Array) -> tuple[Array, Array]:
        """Return what ``pack`` was given.

        data: (rows, columns / block * size) uint8, any bytes.
        Returns: codes (rows, columns) int8, step (rows, columns / block) float32.
        """
        blocks = data.reshape(-1, self.size)
        scale, rest = (blocks[:, :2], blocks[:, 2:]) if self.scale_first else (blocks[:, -2:], blocks[:, :-2])
        with np.errstate(invalid="ignore"):  # NaN of a stranger
            step = np.ascontiguousarray(scale).view(HALF).astype(np.float32) * np.float32(self.sign)
        return self.decode(rest).reshape(len(data), -1), step.reshape(len(data), -1)


def _fields(values: Array, width: int, run: int) -> Array:
    """Pack numbers of ``width`` bits: byte i of each run holds elements i, i + run, ... of it, lowest bits first.

    values: (blocks, n) uint8.  run: bytes that are filled side by side.  Returns: (blocks, n * width / 8) uint8.
    """
    split = values.reshape(len(values), -1, 8 // width, run)
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    return np.bitwise_or.reduce(split << shifts, axis=2).reshape(len(values), -1)


def _numbers(data: Array, width: int, run: int) -> Array:
    """Return what ``_fields`` was given, as int8."""
    split = data.reshape(len(data), -1, 1, run)
    shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(1, 1, -1, 1)
    return ((split >> shifts) & np.uint8(2**width - 1)).reshape(len(data), -1).view(np.int8)


TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType(
            "q4_0", 2, 32, 18, -8, 7, 2, True, 1,
            lambda codes: _fields((codes + 8).view(np.uint8), 4, 16),
            lambda data: _numbers(data, 4, 16) - np.int8(8),
        ),
        BlockType(
            "q8_0", 8, 32, 34, -128, 127, 7, True, 1,
            lambda codes: codes.view(np.uint8),
            lambda data: np.ascontiguousarray(data).view(np.int8),
        ),
        BlockType(
            "q2_0", 42, 64, 18, -2, 1, 41, True, -1,
            lambda codes: _fields((1 - codes).view(np.uint8), 2, 1),
            lambda data: np.int8(1) - _numbers(data, 2, 1),
        ),
        BlockType(
            "tq2_0", 35, 256, 66, -1, 1, 37, False, 1,
            lambda codes: _fields((codes + 1).view(np.uint8), 2, 32),
            lambda data: _numbers(data, 2, 32) - np.int8(1),
        ),
    )
}  # fmt: skip
"""Name -> type."""
