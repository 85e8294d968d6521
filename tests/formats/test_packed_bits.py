"""Packed codes bit by bit, and why a weight ``code * step`` has that code again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import oracle
from lsquant._util.bits import CHUNK, pack, unpack

# ---- bits ----


def by_hand(codes: list[int], bits: int) -> bytes:
    """One long number in binary, cut into bytes."""
    number = sum((code % 2**bits) << (bits * i) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_at_every_place(bits, signed):
    low, high = oracle.bounds(bits, signed)
    codes = list(range(low, high + 1)) * 2
    for cut in range(18):
        part = codes[cut:]
        data = pack(np.array(part, np.int8 if signed else np.uint8), bits)
        assert data.dtype == np.uint8
        assert data.tobytes() == by_hand(part, bits)
        back = unpack(data, bits, len(part), signed)
        assert back.dtype == (np.int8 if signed else np.uint8)
        assert back.tolist() == part


def test_literal_bytes():
    assert pack(np.array([[1, -2, 0, -1], [1, 0, 0, 0]], np.int8), 2).tobytes() == bytes([0b11001001, 0b00000001])
    assert pack(np.array([1, -1, 3, -4, 2], np.int8), 3).tobytes() == bytes([0b11111001, 0b00101000])
    assert pack(np.array([-8, 7, 5], np.int8), 4).tobytes() == bytes([0x78, 0x05])
    assert pack(np.array([200, 1], np.uint8), 8).tobytes() == bytes([200, 1])
    assert pack(np.array([], np.int8), 5).tobytes() == b""


@pytest.mark.parametrize("bits", [2, 3, 7])
def test_more_codes_than_are_handled_at_a_time(bits):
    codes = np.random.default_rng(bits).integers(*oracle.bounds(bits, True), 2 * CHUNK + 13, np.int8, endpoint=True)
    data = pack(codes, bits)
    assert len(data) == (codes.size * bits + 7) // 8
    assert data[-9:].tobytes() == by_hand(codes.tolist()[-72:], bits)[-9:] if codes.size * bits % 8 == 0 else True
    assert (unpack(data, bits, codes.size, True) == codes).all()
    start = CHUNK * bits // 8
    assert data[start : start + bits].tobytes() == by_hand(codes[CHUNK : CHUNK + 8].tolist(), bits)


@pytest.mark.parametrize("bits, kind", [(2, "INT2"), (4, "INT4"), (2, "UINT2"), (4, "UINT4")])
def test_bytes_of_onnx(bits, kind):
    """At 2 and 4 bits the bytes are the raw data of an ONNX initializer."""
    onnx = pytest.importorskip("onnx")
    if not hasattr(onnx.TensorProto, kind):
        pytest.skip(f"this onnx has no {kind}")
    low, high = oracle.bounds(bits, kind.startswith("I"))
    codes = np.random.default_rng(0).integers(low, high, 37, endpoint=True)
    proto = onnx.helper.make_tensor("t", getattr(onnx.TensorProto, kind), [37], pack(codes, bits).tobytes(), raw=True)
    assert (onnx.numpy_helper.to_array(proto).astype(np.int8) == codes).all()


def test_a_wrong_number_of_bytes():
    with pytest.raises(ValueError, match="9 codes of 3 bits take 4 bytes, not 3"):
        unpack(np.zeros(3, np.uint8), 3, 9, True)


# ---- code * step has the same code, and -z * s the same zero point ----


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_code_times_step_is_that_code_again(kind):
    """Every code from -128 to 255 and 200 steps at each exponent, denormal ones too; and so for the zero points."""
    codes = torch.arange(-128, 256, dtype=torch.float32).unsqueeze(1)
    if kind == torch.bfloat16:
        codes = codes[:256]  # 8 bits of mantissa: signed codes
    low, high = (-149, 119) if kind == torch.float32 else (-126, 119) if kind == torch.bfloat16 else (-14, 8)
    bits = torch.randint(0, 2**23, (200,))
    bits[:64] = torch.arange(64)
    bits[64:128] = 2**23 - 1 - torch.arange(64)
    mantissas = 1.0 + bits.double() / 2**23
    for exponent in range(low, high):
        steps = (mantissas * 2.0**exponent).float()
        steps = steps[steps > 0]
        again = (codes * steps).to(kind).float() / steps
        assert torch.equal(again.round(), codes.expand_as(again)), exponent
        offset = -(codes * steps)
        assert torch.equal((-offset / steps).round(), codes.expand_as(again)), exponent
