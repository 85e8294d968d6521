"""Section 1 of the design in NumPy, as plainly as it can be said: the judge of every engine.

Imports nothing but NumPy and the standard library, shares no line with the package. Rules: every division and
multiplication of the forward pass is rounded to float32, every sum is float64 (over integer codes: int64, so exact).

Shapes: `v` is an array of any shape; `step` is 1-D and its layout is given by `axis` and `group_size`: neither = one
step for the tensor; `axis` = one step per index of that axis; `group_size` = one step per run of `group_size`
neighbours in row-major order. `z` (the integer zero point), `b` (LSQ+'s offset): numbers or 1-D arrays like `step`.
"""

import math
from typing import Any

import numpy as np

F32 = np.float32


# ---------------------------------------------------------------------- which step belongs to which element


def step_index(shape, axis=None, group_size=None):
    """Array of `shape`: the number of the step that element uses."""
    index = np.zeros(shape, dtype=np.int64)
    if axis is not None:
        for k in range(shape[axis]):
            np.moveaxis(index, axis, 0)[k] = k
    elif group_size is not None:
        flat = index.reshape(-1)
        for k in range(flat.size // group_size):
            flat[k * group_size : (k + 1) * group_size] = k
        index = flat.reshape(shape)
    return index


def spread(per_step, shape, axis=None, group_size=None):
    """A number or a 1-D array like the step -> array of `shape`, one value per element."""
    per_step = np.asarray(per_step)
    if per_step.ndim == 0:
        return np.full(shape, per_step)
    return per_step[step_index(shape, axis, group_size)]


def sum_per_step(terms, count, axis=None, group_size=None):
    """Float64 sum of `terms` over the elements that share a step -> (count,) float64."""
    total = np.zeros(count, dtype=np.float64)
    np.add.at(total, step_index(terms.shape, axis, group_size).reshape(-1), terms.astype(np.float64).reshape(-1))
    return total


# ---------------------------------------------------------------------- codes and values


def bounds(bits, signed, narrow=False):
    if signed:
        return -(2 ** (bits - 1)) + (1 if narrow else 0), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1


def lsq_plus_zero_point(b, step, q_min, q_max):
    """z = clip(round(-b/s), q_min, q_max), float32 division; NaN where b/s is NaN."""
    with np.errstate(all="ignore"):
        return np.clip(np.rint(-np.asarray(b, F32) / np.asarray(step, F32)).astype(np.float64), q_min, q_max)


def quotient(v, step, axis=None, group_size=None):
    """The float32 quotient v/s."""
    v = np.asarray(v, dtype=F32)
    with np.errstate(all="ignore"):
        return v / spread(np.asarray(step, F32), v.shape, axis, group_size)


def codes(v, step, q_min, q_max, z: Any = 0, axis=None, group_size=None):
    """clip(round(v/s) + z, q_min, q_max) as float64 integers; NaN where v is not finite or the step is NaN.

    An infinite step gives the code z, and the value (z - z) * inf = NaN.
    """
    v = np.asarray(v, dtype=F32)
    q = quotient(v, step, axis, group_size)
    code = np.clip(np.rint(q).astype(np.float64) + spread(z, v.shape, axis, group_size), q_min, q_max)
    return np.where(np.isfinite(v), code, np.nan)


def fake_quantize(v, step, q_min, q_max, z: Any = 0, axis=None, group_size=None):
    """(codes - z) * s, one float32 multiplication."""
    v = np.asarray(v, dtype=F32)
    level = codes(v, step, q_min, q_max, z, axis, group_size) - spread(z, v.shape, axis, group_size)
    with np.errstate(all="ignore"):
        return level.astype(F32) * spread(np.asarray(step, F32), v.shape, axis, group_size)


# ---------------------------------------------------------------------- gradients


def inside(v, step, q_min, q_max, z: Any = 0, axis=None, group_size=None):
    """q_min - z < v/s < q_max - z, on the raw quotient; equality is outside."""
    q = quotient(v, step, axis, group_size).astype(np.float64)
    z = spread(z, q.shape, axis, group_size)
    return (q > q_min - z) & (q < q_max - z)


def element_gradient(upstream, v, step, q_min, q_max, z: Any = 0, axis=None, group_size=None):
    """d v_hat / d v times upstream."""
    return np.where(inside(v, step, q_min, q_max, z, axis, group_size), np.asarray(upstream, F32), F32(0))


def step_terms(v, step, q_min, q_max, z: Any = 0, axis=None, group_size=None, lsq_plus=False):
    """d v_hat / d s of every element, float64 (the subtraction round(q) - q is exact in float32 already).

    NaN where v is not finite: its v_hat is NaN, and a loss scaler must see it in the gradient.
    """
    q = quotient(v, step, axis, group_size)
    z = spread(z, q.shape, axis, group_size)
    with np.errstate(all="ignore"):
        terms = (np.rint(q) - q).astype(np.float64)
    below, above = q.astype(np.float64) <= q_min - z, q.astype(np.float64) >= q_max - z
    terms = np.where(below, q_min if lsq_plus else q_min - z, terms)
    terms = np.where(above, q_max if lsq_plus else q_max - z, terms)
    return np.where(np.isfinite(v), terms, np.nan)


def step_gradient(upstream, v, step, q_min, q_max, g, z: Any = 0, axis=None, group_size=None, lsq_plus=False):
    """(gradient of each step, sum |terms| of each step), both with g; allowed error 256 * 2^-24 * the second."""
    terms = step_terms(v, step, q_min, q_max, z, axis, group_size, lsq_plus) * np.asarray(upstream, np.float64)
    count = len(step)
    return g * sum_per_step(terms, count, axis, group_size), g * sum_per_step(np.abs(terms), count, axis, group_size)


def offset_gradient(upstream, v, step, q_min, q_max, g, z, axis=None, group_size=None):
    """LSQ+: d v_hat / d b = 0 inside, 1 outside; (gradient, sum |terms|) of each offset, both with g."""
    outside = ~inside(v, step, q_min, q_max, z, axis, group_size)
    terms = np.where(outside, np.asarray(upstream, np.float64), 0.0)
    count = len(step)
    return g * sum_per_step(terms, count, axis, group_size), g * sum_per_step(np.abs(terms), count, axis, group_size)


# ---------------------------------------------------------------------- scales


def gradient_scale(count, q_max):
    return 1.0 / math.sqrt(count * q_max)


def initial_step(w, q_max, axis=None, group_size=None):
    """The paper's 2*mean(|w|)/sqrt(q_max) of each step."""
    w = np.asarray(w, np.float64)
    index = step_index(w.shape, axis, group_size)
    return np.array([2.0 * np.abs(w[index == k]).mean() / math.sqrt(q_max) for k in range(index.max() + 1)])


def guard(step, initial):
    """s_min where s < s_min, else s; s_min = 2^-10 * s0."""
    guarded = np.array(step, dtype=F32)
    for k in range(len(guarded)):
        s_min = F32(2.0**-10) * F32(initial[k])
        if guarded[k] < s_min:
            guarded[k] = s_min
    return guarded


def step_balance(w, w_grad, step, step_grad, axis=None, group_size=None):
    """R = (|dL/ds| / s) / (||dL/dw|| / ||w||) of each step."""
    index = step_index(w.shape, axis, group_size)
    ratios = []
    for k in range(len(step)):
        mine = index == k
        norm_w = math.sqrt(np.sum(np.asarray(w, np.float64)[mine] ** 2))
        norm_grad = math.sqrt(np.sum(np.asarray(w_grad, np.float64)[mine] ** 2))
        ratios.append((abs(float(step_grad[k])) / float(step[k])) / (norm_grad / norm_w))
    return np.array(ratios)


def squared_error(v, step, q_min, q_max, z=0):
    """Sum of (v_hat - v)^2 over a tensor with one step."""
    v = np.asarray(v, F32)
    v_hat = fake_quantize(v, np.array([step], F32), q_min, q_max, z)
    return float(np.sum((v_hat.astype(np.float64) - v.astype(np.float64)) ** 2))


def best_squared_error(v, q_min, q_max, steps=2000):
    """Brute force: (smallest error, its step) over log-spaced steps in [1e-4, 2] * max|v|."""
    best, best_step = math.inf, math.nan
    for candidate in np.geomspace(1e-4, 2.0, steps) * float(np.abs(v).max()):
        error = squared_error(v, candidate, q_min, q_max)
        if error < best:
            best, best_step = error, candidate
    return best, best_step


# ---------------------------------------------------------------------- quantized layers


def finish(acc, s_x, s_w, bias=None):
    """y = fl(fl(acc * fl(s_x*s_w)) + b); acc (..., out): exact integers, or NaN; s_w: (1,) or (out,)."""
    y = acc.astype(F32) * (F32(s_x) * np.asarray(s_w, F32))
    return y if bias is None else y + np.asarray(bias, F32)


def split_nan(q_x):
    """Codes that may hold NaN -> (int64 codes with 0 there, 1 where a NaN is)."""
    bad = np.isnan(np.asarray(q_x, np.float64))
    return np.where(bad, 0, q_x).astype(np.int64), bad.astype(np.int64)


def linear(q_x, z, s_x, q_w, s_w, bias=None):
    """q_x (..., in), q_w (out, in): integer codes -> (..., out) float32."""
    q_x, bad = split_nan(q_x)
    q_w = np.asarray(q_w).astype(np.int64)
    acc = ((q_x - int(z)) @ q_w.T).astype(np.float64)
    acc[bad.sum(axis=-1) > 0] = np.nan
    return finish(acc, s_x, s_w, bias)


def linear_groups(q_x, z, s_x, q_w, s_w, group_size, bias=None):
    """Groups along the input: acc_g * fl(s_x*s_wg) added in float32 in order of g, then b. s_w: (out * groups,)."""
    q_x, bad = split_nan(q_x)
    q_w = np.asarray(q_w).astype(np.int64)
    out, size = q_w.shape
    s_w = np.asarray(s_w, F32).reshape(out, size // group_size)
    y = np.zeros((*q_x.shape[:-1], out), dtype=F32)
    for g in range(size // group_size):
        part = slice(g * group_size, (g + 1) * group_size)
        acc = (q_x[..., part] - int(z)) @ q_w[:, part].T
        y = y + acc.astype(F32) * (F32(s_x) * s_w[:, g])
    y[bad.sum(axis=-1) > 0] = np.nan
    return y if bias is None else y + np.asarray(bias, F32)


def pair(value):
    return (int(value), int(value)) if np.ndim(value) == 0 else (int(value[0]), int(value[1]))


def same_padding(kernel, dilation):
    """PyTorch's padding="same": ((top, bottom), (left, right)), the odd one goes to the bottom and to the right."""
    totals = [pair(dilation)[i] * (kernel[i] - 1) for i in range(2)]
    return tuple((total // 2, total - total // 2) for total in totals)


def conv2d(q_x, z, s_x, q_w, s_w, bias=None, stride=1, padding: Any = 0, dilation=1, groups=1):
    """q_x (N, C, H, W), q_w (O, C/groups, kh, kw): integer codes -> (N, O, H', W') float32; padding in code space is z.

    `padding`: a number, (vertical, horizontal), "same", or ((top, bottom), (left, right)).
    """
    codes_x, bad = split_nan(q_x)
    q_w = np.asarray(q_w).astype(np.int64)
    (n, _, _, _), (o, c_group, kh, kw) = codes_x.shape, q_w.shape
    (sh, sw), (dh, dw) = pair(stride), pair(dilation)
    if isinstance(padding, str):
        rows_and_columns = same_padding((kh, kw), dilation)
    elif np.ndim(padding) < 2:
        rows_and_columns = tuple((p, p) for p in pair(padding))
    else:
        rows_and_columns = padding
    margin = ((0, 0), (0, 0), *rows_and_columns)
    x = np.pad(codes_x, margin, constant_values=int(z)) - int(z)
    bad = np.pad(bad, margin)
    h_out = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    w_out = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    acc, nans = np.zeros((n, o, h_out, w_out), np.int64), np.zeros((n, o, h_out, w_out), np.int64)
    for out_channel in range(o):
        first = (out_channel // (o // groups)) * c_group
        for k in range(c_group):
            for i in range(kh):
                for j in range(kw):
                    rows = slice(i * dh, i * dh + sh * (h_out - 1) + 1, sh)
                    columns = slice(j * dw, j * dw + sw * (w_out - 1) + 1, sw)
                    acc[:, out_channel] += x[:, first + k, rows, columns] * q_w[out_channel, k, i, j]
                    nans[:, out_channel] += bad[:, first + k, rows, columns]
    result = finish(np.moveaxis(np.where(nans > 0, np.nan, acc), 1, -1), s_x, s_w, bias)
    return np.moveaxis(result, -1, 1)


def each(value, dims):
    """A number, or one number per dimension -> a tuple."""
    return (int(value),) * dims if np.ndim(value) == 0 else tuple(int(v) for v in value)


def convolution(q_x, z, s_x, q_w, s_w, bias=None, stride=1, padding: Any = 0, dilation=1, groups=1):
    """conv2d for any number of dimensions. q_x (N, C, *sizes), q_w (O, C/groups, *kernel); padding in code space is z.

    `padding`: a number, one per dimension, or (before, after) per dimension.
    """
    codes_x, bad = split_nan(q_x)
    q_w = np.asarray(q_w).astype(np.int64)
    (o, c_group, *kernel), dims = q_w.shape, q_w.ndim - 2
    stride, dilation = each(stride, dims), each(dilation, dims)
    sides = padding if np.ndim(padding) == 2 else [(p, p) for p in each(padding, dims)]
    margin = ((0, 0), (0, 0), *sides)
    x = np.pad(codes_x, margin, constant_values=int(z)) - int(z)
    bad = np.pad(bad, margin)
    out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    acc, nans = np.zeros((len(x), o, *out), np.int64), np.zeros((len(x), o, *out), np.int64)
    for out_channel in range(o):
        first = (out_channel // (o // groups)) * c_group
        for k in range(c_group):
            for at in np.ndindex(*kernel):
                window = tuple(
                    slice(i * d, i * d + s * (n - 1) + 1, s)
                    for i, d, s, n in zip(at, dilation, stride, out, strict=True)
                )
                acc[:, out_channel] += x[(slice(None), first + k, *window)] * q_w[(out_channel, k, *at)]
                nans[:, out_channel] += bad[(slice(None), first + k, *window)]
    result = finish(np.moveaxis(np.where(nans > 0, np.nan, acc), 1, -1), s_x, s_w, bias)
    return np.moveaxis(result, -1, 1)


def output_channels(shape, groups):
    """The output channel of each weight of a transposed convolution, whose weight is (C, O/groups, *kernel)."""
    channel = np.zeros(shape, np.int64)
    for c in range(shape[0]):
        for j in range(shape[1]):
            channel[c, j] = c // (shape[0] // groups) * shape[1] + j
    return channel


def transposed_convolution(q_x, z, s_x, q_w, s_w, bias=None, stride=1, padding=0, dilation=1, groups=1, extra: Any = 0):
    """q_x (N, C, *sizes), q_w (C, O/groups, *kernel): every input element is spread over a window of the output.

    Element i goes to i * stride + k * dilation - padding; `extra` is output_padding: more elements at the far end.
    """
    codes_x, bad = split_nan(q_x)
    q_w = np.asarray(q_w).astype(np.int64)
    (c, o_group, *kernel), dims, x = q_w.shape, q_w.ndim - 2, codes_x - int(z)
    stride, padding, dilation, extra = (each(v, dims) for v in (stride, padding, dilation, extra))
    sizes = x.shape[2:]
    out = [
        (sizes[i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + extra[i] + 1 for i in range(dims)
    ]
    channel = output_channels(q_w.shape, groups)
    acc = np.zeros((len(x), o_group * groups, *out), np.int64)
    nans = np.zeros_like(acc)
    for k in range(c):
        for j in range(o_group):
            target = int(channel[(k, j, *[0] * dims)])
            for at in np.ndindex(*kernel):
                for place in np.ndindex(*sizes):
                    to = tuple(place[i] * stride[i] + at[i] * dilation[i] - padding[i] for i in range(dims))
                    if all(0 <= to[i] < out[i] for i in range(dims)):
                        acc[(slice(None), target, *to)] += x[(slice(None), k, *place)] * q_w[(k, j, *at)]
                        nans[(slice(None), target, *to)] += bad[(slice(None), k, *place)]
    result = finish(np.moveaxis(np.where(nans > 0, np.nan, acc), 1, -1), s_x, s_w, bias)
    return np.moveaxis(result, -1, 1)


def batchnorm_constants(weight, bias, mean, var, eps):
    """alpha = weight / sqrt(var + eps), beta = bias - mean * alpha, in float64."""
    alpha = np.asarray(weight, np.float64) / np.sqrt(np.asarray(var, np.float64) + eps)
    return alpha, np.asarray(bias, np.float64) - np.asarray(mean, np.float64) * alpha


def batchnorm_eval(x, alpha, beta):
    """fl(fl(x*alpha) + beta) over channel axis 1."""
    shape = (1, -1) + (1,) * (np.ndim(x) - 2)
    return np.asarray(x, F32) * np.asarray(alpha, F32).reshape(shape) + np.asarray(beta, F32).reshape(shape)


# ---------------------------------------------------------------------- integer-only networks, (M13) to (M18)


def folded(s_w, alpha, beta, s_x, s_y, bias=None):
    """Per channel: s_w alpha in float32, 2^-10 s_y / s_x where it is 0; b = rint of float64; (step, b as int)."""
    steps, shifts = [], []
    for c in range(len(alpha)):
        step = F32(s_w[c % len(s_w)]) * F32(alpha[c])
        if step == 0:
            step = F32(F32(2.0**-10) * F32(s_y)) / F32(s_x)
        shift = float(F32(beta[c])) + (0.0 if bias is None else float(F32(alpha[c])) * float(F32(bias[c])))
        steps.append(step)
        shifts.append(int(np.rint(shift / float(F32(s_x) * step))))
    return np.array(steps, F32), shifts


def _code(u, z, low, high):
    """clip(rint(u) + z, low, high) of a float32 number."""
    return int(min(max(int(np.rint(F32(u))) + z, low), high))


def integer_layer(acc, b, s_x, s_w, s_y, z, low, high):
    """Codes of one layer from its sums; acc: (N, C) integers, b: (C,) integers, s_w: (C,)."""
    result = np.zeros(np.shape(acc), np.int64)
    for n, c in np.ndindex(*np.shape(acc)):
        m = F32(F32(s_x) * F32(s_w[c])) / F32(s_y)
        result[n, c] = _code(F32(int(acc[n, c]) + int(b[c])) * m, z, low, high)
    return result


def _rounded_ratio(n, s, s_y):
    """n s / s_y, exact, rounded half to even: with Python's integers."""
    (a, b), (c, d) = float(F32(s)).as_integer_ratio(), float(F32(s_y)).as_integer_ratio()
    top, bottom = n * a * d, b * c
    whole, rest = divmod(top, bottom)
    if 2 * rest > bottom or (2 * rest == bottom and whole % 2):
        whole += 1
    return whole


def integer_add(qa, qb, za, zb, s, s_y, z, low, high):
    """Codes of a sum of two tensors with one step."""
    return np.vectorize(lambda i, j: min(max(_rounded_ratio(int(i) - za + int(j) - zb, s, s_y) + z, low), high))(qa, qb)


def integer_multiply(qa, qb, za, zb, s_a, s_b, s_y, z, low, high):
    """Codes of a product of two tensors: the quotient exact, rounded half to even."""
    (a, b), (c, d), (e, f) = (float(F32(s)).as_integer_ratio() for s in (s_a, s_b, s_y))

    def one(i, j):
        top, bottom = (int(i) - za) * (int(j) - zb) * a * c * f, b * d * e
        whole, rest = divmod(top, bottom)
        whole += int(2 * rest > bottom or (2 * rest == bottom and whole % 2 == 1))
        return min(max(whole + z, low), high)

    return np.vectorize(one)(qa, qb)


def distance_to_product_tie(n, s_a, s_b, s_y):
    """|u - nearest half| / u for u = n s_a s_b / s_y, exact up to the last divisions."""
    (a, b), (c, d), (e, f) = (float(F32(s)).as_integer_ratio() for s in (s_a, s_b, s_y))
    top, bottom = n * a * c * f, b * d * e
    return abs(2 * (top % bottom) - bottom) / (2 * top)


def distance_to_tie(n, s, s_y):
    """|n s / s_y - nearest half|, exact up to the last division."""
    (a, b), (c, d) = float(F32(s)).as_integer_ratio(), float(F32(s_y)).as_integer_ratio()
    rest, bottom = (n * a * d) % (b * c), b * c
    return abs(2 * rest - bottom) / (2 * bottom)


def integer_average(q, z_x, s_x, s_y, z, low, high):
    """Codes of the mean over all positions; q: (N, C, positions)."""
    result = np.zeros(q.shape[:2], np.int64)
    factor = F32(s_x) / F32(F32(s_y) * F32(q.shape[2]))
    for n, c in np.ndindex(*q.shape[:2]):
        result[n, c] = _code(F32(sum(int(v) - z_x for v in q[n, c])) * factor, z, low, high)
    return result


def integer_average_windows(q, kernel, stride, z_x, s_x, s_y, z, low, high):
    """Codes of the means over square windows; q: (N, C, H, W)."""
    m = F32(F32(s_x) * (F32(1) / F32(kernel * kernel))) / F32(s_y)
    sizes = [(n - kernel) // stride + 1 for n in q.shape[2:]]
    result = np.zeros((*q.shape[:2], *sizes), np.int64)
    for n, c, i, j in np.ndindex(*result.shape):
        window = q[n, c, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
        result[n, c, i, j] = _code(F32(sum(int(v) - z_x for v in window.flat)) * m, z, low, high)
    return result


def integer_reader(q, z_x, s, s_n, z, low, high):
    """Codes of a reader with fewer bits."""
    return np.vectorize(lambda v: _code(F32(F32(int(v) - z_x) * F32(s)) / F32(s_n), z, low, high))(q)


def integer_table(f, q_min, q_max, z_x, s, s_y, z, low, high):
    """One code for each code of the input; f: on Python floats."""
    values = [F32(f(float(F32(F32(q - z_x) * F32(s))))) for q in range(q_min, q_max + 1)]
    return np.array([_code(v / F32(s_y), z, low, high) for v in values])


def integer_silu(q_min, q_max, s, s_y, low, high):
    """(M18) SiLU: the sigmoid in units of 1/256, an integer, times the code."""
    codes = []
    for q in range(q_min, q_max + 1):
        gate = round(256 / (1 + math.exp(-float(F32(q) * F32(s)))))
        product = q * min(gate, 255) * float(s) / 256 / float(s_y)  # no step puts one near a tie
        codes.append(min(max(round(product), low), high))
    return np.array(codes)
