"""Run the program of an integer-only network: this file and NumPy, at most 100 lines, the formulas of the docs."""

import json

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view as views

F, TYPES = np.float32, {"F32": "<f4", "I32": "<i4", "U8": "u1"}


def load(path):
    """Return (document, tensors) of a file of profile program: safetensors, with the program in its metadata."""
    data = np.fromfile(path, "u1").tobytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    document = json.loads(header.pop("__metadata__")["lsquant.program"])
    parts = {name: memoryview(data)[start:][slice(*t["data_offsets"])] for name, t in header.items()}
    return document, {n: np.frombuffer(parts[n], TYPES[t["dtype"]]).reshape(t["shape"]) for n, t in header.items()}


def unpacked(data, bits, shape):
    """Return signed codes of a stream of bits, least significant first."""
    stream = np.unpackbits(data, bitorder="little")[: int(np.prod(shape)) * bits].reshape(-1, bits).astype(np.int64)
    return ((stream @ (1 << np.arange(bits)) ^ 1 << (bits - 1)) - (1 << (bits - 1))).reshape(shape)


def windows(q, kernel, step, pad):
    """Return (batch, channels, *positions, *kernel), the windows of a padded image."""
    size = [(k - 1) * d + 1 for k, d in zip(kernel, step["dilation"], strict=True)]
    q = np.pad(q, [(0, 0), (0, 0), *step["padding"]], constant_values=pad)
    every = (slice(None, None, skipped) for skipped in step["stride"] + step["dilation"])
    return views(q, size, tuple(range(2, q.ndim)))[(..., *every)]


def convolution(q, w, step):
    """Return the sums of products of codes: float64, which holds whole numbers up to 2^53."""
    g, seen = step["groups"], windows(q.astype(np.float64), w.shape[2:], step, 0)
    positions = seen.shape[2 : w.ndim]
    seen = np.moveaxis(seen.reshape(len(q), g, w.shape[1], *positions, *w.shape[2:]), 2, w.ndim)
    rows, columns = seen.reshape(len(q), g, int(np.prod(positions)), w[0].size), w.reshape(g, len(w) // g, -1)
    return np.swapaxes(rows @ np.swapaxes(columns, 1, 2), 2, 3).reshape(len(q), len(w), *positions)


def moved(q, step):
    """Compute max pooling, slices, padding, flatten, upsampling and the like on codes."""
    kind, n = step["move"], q.ndim - 2
    if kind == "max_pool":
        return windows(q, step["kernel"], step, -(2**31)).max(tuple(range(-n, 0)))
    if kind == "slice":
        return q[tuple(slice(*part) for part in step["index"])]
    if kind == "chunk":
        first = step["part"] * (size := -(-q.shape[step["axis"]] // step["chunks"]))
        return q[(slice(None),) * step["axis"] + (slice(first, first + size),)]
    if kind == "pad":
        return np.pad(q, [(0, 0)] * (q.ndim - len(step["padding"])) + step["padding"])
    if kind == "upsample":
        return np.kron(q, np.ones([1, 1, *(step["factors"] * n)[:n]], q.dtype))
    if kind == "pixel_shuffle":
        r, (h, w) = step["factor"], q.shape[2:]
        return q.reshape(len(q), -1, r, r, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(len(q), -1, h * r, w * r)
    return q.reshape(len(q), -1)  # flatten


def run(document, tensors, *inputs):
    """Return (outputs, name -> codes of every stored tensor).  inputs: float32 arrays."""
    codes, zeros, real = {}, {}, dict(zip(document["inputs"], inputs, strict=True))
    for step in document["steps"]:
        name, op, t = step["name"], step["op"], tensors.get
        x = [codes[read] - zeros[read] for read in step["reads"] if read in codes]
        s, s_y = t(f"{step['reads'][0]}.step"), t(f"{name}.step")
        z = zeros[name] = step.get("zero", 0) if "low" in step else zeros.get(step["reads"][0], 0)
        if op == "quantize":
            u = real[step["reads"][0]] / s_y
        elif op == "layer":
            q, w = x[0], unpacked(t(f"{step['layer']}.codes"), step["bits"], step["shape"])
            if (s_n := t(f"{step['layer']}.read_step")) is not None:  # fewer bits than the stored tensor has
                q, s = np.clip(np.rint(q.astype(F) * s / s_n), *step["reader"]).astype(np.int64), s_n
            acc, shape = q * 1.0 @ w.T if w.ndim == 2 else convolution(q, w, step), [-1] + [1] * (w.ndim - 2)
            total = (acc + t(f"{step['layer']}.bias").reshape(shape)).astype(F)
            u = total * ((s * t(f"{step['layer']}.weight_step")) / (F(1) if s_y is None else s_y)).reshape(shape)
        elif op == "add":
            u = (x[0] + x[1]) * np.float64(s) / np.float64(s_y)
        elif op == "multiply":
            u = x[0] * x[1] * (np.float64(s) * t(f"{step['reads'][1]}.step") / np.float64(s_y))
        elif "kernel" in step and op == "average":
            total = windows(x[0], step["kernel"], step, 0).sum(tuple(range(-len(step["kernel"]), 0))).astype(F)
            u = total * (s * (F(1) / F(np.prod(step["kernel"]))) / s_y)
        elif op == "average":
            total = x[0].sum(tuple(step["axes"]), keepdims=step["keep"])
            u = total.astype(F) * (s / (s_y * F(x[0].size // total.size)))
        elif op == "function":
            u = t(f"{name}.table").astype(np.int64)[x[0] - step["first"]]
        else:
            codes[name] = z + (np.concatenate(x, step["axis"]) if op == "concat" else moved(x[0], step))
        if "low" in step:
            codes[name] = np.clip(np.rint(u) + z, step["low"], step["high"]).astype(np.int64)
        elif name not in codes:
            real[name] = u if "limit" not in step else np.clip(u, *step["limit"]).astype(F)
    ends = {n: (codes[n] - zeros[n]).astype(F) * tensors[f"{n}.step"] for n in {*document["outputs"]} - {*real}}
    return [{**ends, **real}[n] for n in document["outputs"]], codes
