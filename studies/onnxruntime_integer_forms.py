"""Which forms of 8-bit operands does ONNX Runtime multiply exactly on this processor?

    python studies/onnxruntime_integer_forms.py

Every form of storing the same integers (activations x weights, signed or unsigned, with or without a zero point) is run
through ConvInteger and MatMulInteger in a plain session, on extreme and on uniform codes, and compared with exact
integer sums.  On x86 without VNNI some forms saturate pairs of products at 16 bits.  Prints a Markdown table, and the
time of ConvInteger with signed and with unsigned weights.
"""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

SIGNED, UNSIGNED = (-128, 127), (0, 255)
# name: (activation range, weight range, stored activation offset, stored weight offset)
FORMS = {
    "u8 x s8": (UNSIGNED, SIGNED, 0, 0),
    "u8 x s7": (UNSIGNED, (-64, 63), 0, 0),
    "s8 x s8": (SIGNED, SIGNED, 0, 0),
    "s8 as u8 (zero point 128) x s8": (SIGNED, SIGNED, 128, 0),
    "s8 x s8 as u8 (zero point 128)": (SIGNED, SIGNED, 0, 128),
    "u8 x s8 as u8 (zero point 128)": (UNSIGNED, SIGNED, 0, 128),
    "s8 as u8 x s8 as u8": (SIGNED, SIGNED, 128, 128),
}


def codes(rng: np.random.Generator, shape: tuple[int, ...], low: int, high: int, extreme: bool) -> np.ndarray:
    return rng.choice([low, high], shape) if extreme else rng.integers(low, high + 1, shape)


def stored(values: np.ndarray, low: int, offset: int) -> np.ndarray:
    return (values + offset).astype(np.uint8 if low + offset >= 0 else np.int8)


def session(operator: str, x: np.ndarray, w: np.ndarray, zeros: tuple[int, int]) -> ort.InferenceSession:
    kinds = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int8): TensorProto.INT8}
    points = [np.asarray(z, a.dtype) for z, a in zip(zeros, (x, w), strict=True)]
    constants = {"w": w, "xz": points[0], "wz": points[1]}
    attributes = {"pads": [1, 1, 1, 1]} if operator == "ConvInteger" else {}
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "w", "xz", "wz"], ["y"], **attributes)],
        "form",
        [helper.make_tensor_value_info("x", kinds[x.dtype], x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [None] * x.ndim)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def exact(operator: str, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Sums over int64."""
    if operator == "MatMulInteger":
        return x.astype(np.int64) @ w.astype(np.int64)
    padded = np.pad(x.astype(np.int64), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, w.astype(np.int64), optimize=True)


def wrong(operator: str, name: str) -> tuple[int, int]:
    """(wrong, compared) elements."""
    (xl, xh), (wl, wh), x_offset, w_offset = FORMS[name]
    shapes = ((4, 32, 13, 13), (17, 32, 3, 3)) if operator == "ConvInteger" else ((67, 300), (300, 33))
    rng, bad, total = np.random.default_rng(0), 0, 0
    for extreme in (True, False):
        x, w = codes(rng, shapes[0], xl, xh, extreme), codes(rng, shapes[1], wl, wh, extreme)
        sx, sw = stored(x, xl, x_offset), stored(w, wl, w_offset)
        got = session(operator, sx, sw, (x_offset, w_offset)).run(None, {"x": sx})[0]
        expected = exact(operator, x, w)
        bad, total = bad + int((got != expected).sum()), total + expected.size
    return bad, total


def milliseconds(names: tuple[str, ...], repeats: int = 15) -> dict[str, float]:
    """Median time of ConvInteger in each form, in turns: 3x3, 32 channels, 64 images of 16 x 16."""
    rng, calls = np.random.default_rng(0), {}
    for name in names:
        (xl, xh), (wl, wh), x_offset, w_offset = FORMS[name]
        x = stored(codes(rng, (64, 32, 16, 16), xl, xh, False), xl, x_offset)
        w = stored(codes(rng, (32, 32, 3, 3), wl, wh, False), wl, w_offset)
        calls[name] = session("ConvInteger", x, w, (x_offset, w_offset)), x
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, (runner, x) in calls.items():
            runner.run(None, {"x": x})  # the threads of the session before come to rest
            start = time.perf_counter()
            runner.run(None, {"x": x})
            found[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.median(times)) for name, times in found.items()}


if __name__ == "__main__":
    totals = {operator: wrong(operator, "u8 x s7")[1] for operator in ("ConvInteger", "MatMulInteger")}
    print(f"ONNX Runtime {ort.__version__}, wrong sums of {' and '.join(f'{n:,}' for n in totals.values())}:\n")
    print("| activation x weight | " + " | ".join(totals) + " |\n|---|---|---|")
    for form in FORMS:
        print(f"| {form} | " + " | ".join(f"{wrong(operator, form)[0]:,}" for operator in totals) + " |")
    times = milliseconds(("u8 x s8", "u8 x s8 as u8 (zero point 128)"))
    print("\nConvInteger, 3x3, 32 channels, ms: " + ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()))
