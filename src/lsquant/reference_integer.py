"""The arithmetic of integer-only networks in plain PyTorch, one equation a function; slow.

Between two layers everything is an integer code but one float32 multiplication per output.  Equation numbers (M13) to
(M18) are those of docs/mathematics.md.  ``q``, ``z`` and ``s`` are codes, zero point and step of a tensor, ``fl32`` is
one rounding to float32, ``rint`` rounds half to even.  The products over codes are sums of integers: any exact way to
compute them will do, so they are arguments here.

Source: (M14) and (M16) are what ONNX Runtime's QLinearConv, QGemm and QLinearGlobalAveragePool compute, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from lsquant._util.errors import UsageError

INT32 = 2**31
"""Sums, biases and sums with a bias stay below it in magnitude."""

TIE_MARGIN = Fraction(1, 2**13)
"""No possible sum of an addition comes closer than this to a rounding tie."""

STEP_FACTOR = 1.0 + 1e-6
"""What a step is multiplied by until the margin is kept."""

FUNCTION_MARGIN = 2.0**-12
PRODUCT_MARGIN = 2.0**-21
GATE_STEP = 2.0**-8

DEAD_CHANNEL = 2.0**-10
"""The scale of a channel that BatchNorm multiplies by 0, in units of the output step."""


def fold_batch_norm(
    weight_step: Tensor,
    alpha: Tensor,
    beta: Tensor,
    input_step: Tensor,
    output_step: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(M13) Fold ``y = alpha x + beta`` into the weight step and an integer bias.

    ``s_w[c] <- fl32(s_w[c] alpha_c)``;  ``b_c = rint((beta_c + alpha_c bias_c) / fl32(s_x s_w[c]))``, in float64.
    Where ``alpha_c`` is 0, ``s_w[c] = fl32(2^-10 s_y / s_x)``, and the caller sets the codes of that channel to 0.

    weight_step: (1,) or (C,) float32
    alpha, beta: (C,) float32
    input_step, output_step: (1,) float32
    bias: (C,) float32, the layer's own
    Returns: folded step (C,) float32, negative where alpha is; bias (C,) int64, which ``fits_int32`` judges.
    """
    step = (weight_step * alpha).to(torch.float32)
    step = torch.where(step == 0, DEAD_CHANNEL * output_step / input_step, step)
    shift = beta.double() if bias is None else beta.double() + alpha.double() * bias.double()
    return step, torch.round(shift / (input_step * step).double()).clamp(-(2.0**62), 2.0**62).to(torch.int64)


def fits_int32(codes: Tensor, bias: Tensor, largest_input: int) -> Tensor:
    """Tell per channel whether bias and every possible sum with it stay within int32.

    codes: (C, ...) integers, output channels first
    bias: (C,) int64
    largest_input: the largest ``|q_x - z_x|``
    Returns: (C,) bool.  Where it is False, double the step of the channel and make codes and bias anew.
    """
    sums = codes.to(torch.int64).abs().reshape(codes.shape[0], -1).sum(1) * largest_input
    return (sums + bias.abs()) < INT32


def multiplier(input_step: Tensor, weight_step: Tensor, output_step: Tensor) -> Tensor:
    """(M14) Return ``M_c = fl32(fl32(s_x s_w[c]) / s_y)``, in the shape of weight_step, float32."""
    return (input_step * weight_step) / output_step


def scaled(sums: Tensor, bias: Tensor, factor: Tensor, channel_axis: int = 1) -> Tensor:
    """(M14) Return ``u = fl32(fl32(acc_c + b_c) M_c)``; with ``factor = fl32(s_x s_w[c])``, the output of a last layer.

    sums: (N, C, ...) int64 or int32, ``sum (q_x - z_x) q_w``
    bias: (C,) integers
    factor: (1,) or (C,) float32
    Returns: float32 in the shape of sums.
    """
    shape = [1] * sums.ndim
    shape[channel_axis] = -1
    total = (sums.to(torch.int64) + bias.to(torch.int64).reshape(shape)).to(torch.float32)
    return total * factor.to(torch.float32).reshape(shape)


def requantize(u: Tensor, zero_point: int, low: int, high: int) -> Tensor:
    """(M14) Return the codes ``clip(rint(u) + z_y, lo, hi)``, int64.

    low, high: bounds of the codes; a ReLU raises low to ``max(q_min, z_y)``, an upper limit lowers high likewise.
    """
    return (torch.round(u.double()) + zero_point).clamp(low, high).to(torch.int64)


def requantize_terms(u: Tensor, zero_point: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """(M14) Return the derivatives of ``v_hat = (q_y - z_y) s_y`` by the real value ``u s_y`` and by ``s_y``.

    Inside is ``lo - z_y < u < hi - z_y``: 1, and ``rint(u) - u``.
    Outside: 0, and ``lo - z_y`` below, ``hi - z_y`` above.

    Returns: two float32 tensors in the shape of u.
    """
    bottom, top = float(low - zero_point), float(high - zero_point)
    inside = (u > bottom) & (u < top)
    step = torch.where(inside, torch.round(u) - u, torch.where(u >= top, top, bottom))
    return inside.to(torch.float32), step


def sum_codes(step: float, output_step: float, largest: int) -> Tensor:
    """(M15) Return ``rint(n s / s_y)`` of every possible sum n of an addition, the quotient exact.

    step, output_step: float32 values
    largest: the largest ``|q_a - z_a + q_b - z_b|``
    Returns: (2 largest + 1,) int64, that of n at index ``n + largest``.
    """
    ratio = Fraction(step) / Fraction(output_step)
    return torch.tensor([round(n * ratio) for n in range(-largest, largest + 1)])


def add(
    a: Tensor, b: Tensor, zero_points: tuple[int, int], table: Tensor, zero_point: int, low: int, high: int
) -> Tensor:
    """(M15) Add two tensors of one step: ``q_y = clip(rint((q_a - z_a + q_b - z_b) s / s_y) + z_y, lo, hi)``, int64.

    a, b: codes
    table: of ``sum_codes``
    """
    total = a.to(torch.int64) - zero_points[0] + b.to(torch.int64) - zero_points[1]
    return (table[total + (len(table) - 1) // 2] + zero_point).clamp(low, high)


def safe_output_step(step: float, output_step: float, largest: int) -> float:
    """(M15) Raise the output step of an addition until no possible sum comes close to a tie.

    ``s_y`` is multiplied by 1 + 1e-6 until no n has ``n s / s_y`` within 2^-13 of a tie: a runtime that rounds on the
    way then finds the same codes.

    step, output_step, largest: as for ``sum_codes``
    Returns: a float32 value.
    Raises: UsageError for a step that is not positive and finite.
    """
    s, s_y = torch.tensor(step, dtype=torch.float32), torch.tensor(output_step, dtype=torch.float32)
    if not (s > 0 and s_y > 0 and bool(torch.isfinite(s)) and bool(torch.isfinite(s_y))):
        raise UsageError(f"safe_output_step: steps {step!r} and {output_step!r} must be positive and finite")
    n = torch.arange(1, largest + 1, dtype=torch.float64)
    margin = float(TIE_MARGIN)
    while True:
        quotient = n * s.double() / s_y.double()  # its error, 2^-44 of at most 2^9, does not count beside the margin
        if not bool(((quotient - quotient.floor() - 0.5).abs() <= margin).any()):
            return float(s_y)
        s_y = raised(s_y)


def products(largest_a: int, largest_b: int) -> Tensor:
    """Return every magnitude that a product of codes may have, but 0; float64, ascending."""
    a, b = (torch.arange(1, largest + 1, dtype=torch.float64) for largest in (largest_a, largest_b))
    return torch.unique(torch.outer(a, b))


def multiply(
    a: Tensor, b: Tensor, zero_points: tuple[int, int], ratio: Fraction, zero_point: int, low: int, high: int
) -> Tensor:
    """(M19) Multiply two tensors: ``q_y = clip(rint((q_a - z_a) (q_b - z_b) s_a s_b / s_y) + z_y, lo, hi)``, int64.

    a, b: codes, whose shapes broadcast
    ratio: ``s_a s_b / s_y``, exact
    """
    product = (a.to(torch.int64) - zero_points[0]) * (b.to(torch.int64) - zero_points[1])
    every, places = torch.unique(product, return_inverse=True)
    table = torch.tensor([round(n * ratio) for n in every.tolist()])
    return (table[places] + zero_point).clamp(low, high)


def near_a_product_tie(products: Tensor, ratio: float, largest: int) -> bool:
    """(M19) Tell whether a quotient ``n ratio`` lies so close to a tie that a runtime may round it otherwise.

    A runtime rounds at most four times on the way, each time by at most 2^-24 of the value: within 2^-21 of the value.

    products: float64 magnitudes
    ratio: ``s_a s_b / s_y``
    largest: the largest magnitude of a code of the output; quotients above it are clipped
    """
    quotients = products * ratio
    quotients = quotients[quotients < largest + 1]
    return bool(((quotients - quotients.floor() - 0.5).abs() <= quotients * PRODUCT_MARGIN).any())


def raised(step: Tensor) -> Tensor:
    """Return a step times 1 + 1e-6, at least the next float32."""
    return torch.maximum(step * STEP_FACTOR, torch.nextafter(step, torch.full_like(step, torch.inf)))


def near_a_tie(quotients: Tensor, low: int, high: int) -> bool:
    """(M18) Tell whether a quotient between the bounds lies within 2^-12 of a tie.  quotients: float64."""
    inside = (quotients > low - 1) & (quotients < high + 1)
    return bool((inside & ((quotients - quotients.floor() - 0.5).abs() <= FUNCTION_MARGIN)).any())


def gate_quotients(codes: Tensor, step: Tensor) -> Tensor:
    """(M18) Return ``sigmoid(fl32(q s)) / s_g``, float64, with ``s_g = 1 / 256``: the sigmoid in SiLU."""
    return torch.sigmoid((codes.to(torch.float32) * step).double()) / GATE_STEP


def gate_codes(codes: Tensor, step: Tensor) -> Tensor:
    """(M18) Return ``q_g = clip(rint(sigmoid(fl32(q s)) / s_g), 0, 255)``, float64 whole numbers."""
    return torch.round(gate_quotients(codes, step)).clamp(0, 255)


def average(
    codes: Tensor, zero_point: int, step: float, output_step: float, output_zero: int, low: int, high: int
) -> Tensor:
    """(M16) Average over all spatial positions.

    ``q_y = clip(rint(fl32(fl32(sum (q_x - z_x)) fl32(s_x / fl32(s_y n)))) + z_y, lo, hi)``

    codes: (N, C, ...) integers; n is the number of positions
    Returns: (N, C, 1, ...) int64.
    """
    spatial = list(range(2, codes.ndim))
    count = codes[0, 0].numel()
    total = (codes.to(torch.int64) - zero_point).sum(spatial, keepdim=True).to(torch.float32)
    s, s_y = torch.tensor(step, dtype=torch.float32), torch.tensor(output_step, dtype=torch.float32)
    return requantize(total * (s / (s_y * count)), output_zero, low, high)


def average_windows(
    sums: Tensor, count: int, step: float, output_step: float, output_zero: int, low: int, high: int
) -> Tensor:
    """(M16) Average over windows of one size, as a layer whose weights are 1 with the step ``fl32(1 / n)``.

    ``q_y = clip(rint(fl32(fl32(sum (q_x - z_x)) fl32(fl32(s_x fl32(1 / n)) / s_y))) + z_y, lo, hi)``

    sums: integers, ``sum (q_x - z_x)`` of every window, positions of the padding counted as 0
    count: n, the positions of a window
    Returns: int64 in the shape of sums.
    """
    s, s_y = torch.tensor(step, dtype=torch.float32), torch.tensor(output_step, dtype=torch.float32)
    weight_step = torch.tensor(1.0) / count
    return requantize(sums.to(torch.float32) * multiplier(s, weight_step, s_y), output_zero, low, high)


def read(
    codes: Tensor, zero_point: int, step: float, output_step: float, output_zero: int, low: int, high: int
) -> Tensor:
    """(M17) Requantize a stored tensor for a reader with fewer bits.

    ``q_n = clip(rint(fl32(fl32((q - z) s) / s_n)) + z_n, lo, hi)``

    codes: integers of any shape
    Returns: int64 in the shape of codes.
    """
    s, s_n = torch.tensor(step, dtype=torch.float32), torch.tensor(output_step, dtype=torch.float32)
    return requantize((codes.to(torch.int64) - zero_point).to(torch.float32) * s / s_n, output_zero, low, high)


def function_table(
    function: Callable[[Tensor], Tensor],
    bounds: tuple[int, int],
    zero_point: int,
    step: float,
    output_bounds: tuple[int, int],
    output_zero: int,
    output_step: float,
) -> Tensor:
    """(M18) Tabulate an elementwise function between two quantizers.

    ``q_y = clip(rint(fl32(fl32(f(fl32((q - z) s))) / s_y)) + z_y, lo, hi)``, f computed in float64.

    function: on float64 tensors
    Returns: (q_max - q_min + 1,) int64, the code of the output for each code of the input, ascending.
    """
    codes = torch.arange(bounds[0], bounds[1] + 1)
    s, s_y = torch.tensor(step, dtype=torch.float32), torch.tensor(output_step, dtype=torch.float32)
    values = function(((codes - zero_point).to(torch.float32) * s).double()).to(torch.float32)
    return requantize(values / s_y, output_zero, *output_bounds)
