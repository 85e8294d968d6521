"""(M18) Elementwise functions between two quantizers: one code of the output for each code of the input.

SiLU is ``x sigmoid(x)`` with the sigmoid in codes of 8 bits, as integer runtimes compute it; in the container
"symmetric", which has no 8 unsigned bits, a function like the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import reference_integer as reference

MOST_RAISES = 1000


def plain_function(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the function of a module without its quantizers."""
    return lambda x: module.float_type.forward(module, x)


def all_codes(low: int, high: int, device: torch.device) -> Tensor:
    """Return every code less z of a tensor, ascending, float32."""
    return torch.arange(low, high + 1, dtype=torch.float32, device=device)


@lru_cache(64)
def all_products(largest_a: int, largest_b: int) -> Tensor:
    """Return every magnitude of a product of two codes, but 0, float64."""
    return reference.products(largest_a, largest_b)


def has_gate(module: nn.Module) -> bool:
    """Tell whether a function is its input times a sigmoid in codes of 8 unsigned bits."""
    return isinstance(module, nn.SiLU) and module.quantizer_of(0).spec.container != "symmetric"  # type: ignore[operator]


@torch.no_grad()
def function_quotients(module: Any, codes: Tensor, step: Tensor, output_step: Tensor) -> Tensor:
    """(M18) Return what is rounded to codes of the output, float64.

    ``u = fl32(fl32(f(fl32(q s))) / s_y)``, f computed in float64; for SiLU ``u = q q_g s s_g / s_y``.

    codes: of the input, less their zero point.
    step, output_step: () float32.
    """
    if has_gate(module):
        gate = reference.gate_codes(codes, step)
        return codes.double() * gate * (step.double() * reference.GATE_STEP / output_step.double())
    values = plain_function(module)((codes * step).double()).float()
    return (values / output_step).double()


@torch.no_grad()
def safe_function_steps(
    module: Any, codes: Tensor, bounds: tuple[int, int], step: Tensor, output_step: Tensor
) -> tuple[Tensor, Tensor]:
    """Raise the steps of a function's input and output until nothing that is rounded comes close to a tie.

    Runtimes compute functions with errors of some 1e-7; away from ties they find the same codes.

    codes: every code of the input, less z.
    bounds: of the output's codes, less their z.
    Returns: (step, output_step); as they were where MOST_RAISES did not suffice.
    """
    found, output_found = step, output_step
    for _ in range(MOST_RAISES):
        if has_gate(module) and reference.near_a_tie(reference.gate_quotients(codes, found), 0, 255):
            found = reference.raised(found)
        elif reference.near_a_tie(function_quotients(module, codes, found, output_found), *bounds):
            output_found = reference.raised(output_found)
        else:
            return found, output_found
    return step, output_step


def is_safe(module: Any, codes: Tensor, bounds: tuple[int, int], step: Tensor, output_step: Tensor) -> bool:
    """Tell whether nothing that a function rounds comes close to a tie."""
    if has_gate(module) and reference.near_a_tie(reference.gate_quotients(codes, step), 0, 255):
        return False
    return not reference.near_a_tie(function_quotients(module, codes, step, output_step), *bounds)
