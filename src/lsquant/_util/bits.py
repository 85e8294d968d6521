"""Packing of codes of 2 to 8 bits: eight neighbours make ``bits`` bytes, lowest bits first."""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 20
"""Codes packed at a time, a multiple of 8: bounds the memory that packing takes beside its result."""


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes into a stream of bits, least significant first: code i is at bits ``i * bits`` and above.

    codes: (...) integer, in two's complement; taken row by row.
    bits: 2 to 8.
    Returns: (ceil(size * bits / 8),) uint8; bits left over are 0.

    >>> pack(np.array([1, -1]), 4)
    array([241], dtype=uint8)
    """
    flat = codes.reshape(-1)
    out = np.empty((-(-flat.size // 8), bits), np.uint8)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        words = np.zeros((-(-part.size // 8), 8), np.uint64)
        words.reshape(-1)[: part.size] = part.astype(np.int64) & (2**bits - 1)
        joined = np.bitwise_or.reduce(words << _shifts(bits), axis=1).astype("<u8")
        out[start // 8 : start // 8 + len(words)] = joined.view(np.uint8).reshape(-1, 8)[:, :bits]
    return out.reshape(-1)[: packed_bytes(flat.size, bits)]


def unpack(data: np.ndarray, bits: int, count: int, signed: bool) -> np.ndarray:
    """Unpack what ``pack`` gave.

    data: (ceil(count * bits / 8),) uint8.
    count: codes in it.
    signed: whether the codes are in two's complement.
    Returns: (count,) int8 where signed, else uint8.
    Raises: ValueError for another number of bytes.
    """
    if data.size != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, not {data.size}")
    out = np.empty(count, np.int8 if signed else np.uint8)
    sign = 2 ** (bits - 1) if signed else 0
    for start in range(0, count, CHUNK):
        part = data[start // 8 * bits :][: CHUNK // 8 * bits]
        words = np.zeros((-(-part.size // bits), 8), np.uint8)
        rows = np.zeros(len(words) * bits, np.uint8)
        rows[: part.size] = part
        words[:, :bits] = rows.reshape(-1, bits)
        codes = (words.view("<u8") >> _shifts(bits)).astype(np.int16) & (2**bits - 1)
        out[start : start + CHUNK] = ((codes ^ sign) - sign).reshape(-1)[: min(CHUNK, count - start)]
    return out


def packed_size(count: int, bits: int, steps: int, zero_points: int = 0) -> int:
    """Return the bytes of a quantized tensor: packed codes, float32 steps and int32 zero points."""
    return packed_bytes(count, bits) + 4 * (steps + zero_points)


def packed_bytes(count: int, bits: int) -> int:
    """Return the bytes that packed codes take."""
    return (count * bits + 7) // 8


def _shifts(bits: int) -> np.ndarray:
    return np.arange(8, dtype=np.uint64) * np.uint64(bits)
