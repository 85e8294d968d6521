"""The engines under test and the one way the tests call them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lsquant
from helpers.cases import Built

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton engine: a GPU, or Triton's interpreter


def on_device(x: Tensor, step: Tensor, *numbers: Any, **extras: Any) -> Tensor:
    """`fake_quantize` where the Triton engine computes; the result is brought back."""
    moved = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in extras.items()}
    return lsquant.fake_quantize(x.to(DEVICE), step.to(DEVICE), *numbers, **moved).to(x.device)


# a test with a parameter `engine` runs with that engine forced (conftest.py)
ENGINES: dict[str, Callable[..., Tensor]] = {
    "reference": lsquant.reference.fake_quantize,
    "eager": lsquant.fake_quantize,
    "cpp": lsquant.fake_quantize,
    "triton": on_device,
    "quantizer_only": lsquant.fake_quantize,  # of the tests: all but the quantizer is the contract's defaults
}

BOUND = 256 * 2.0**-24  # of sum |terms|: what the design allows a step gradient to be off


def leaf(t: Tensor) -> Tensor:
    """The same values and strides, a leaf that wants a gradient."""
    return t.detach().requires_grad_()


def value(engine: str, built: Built) -> Tensor:
    return ENGINES[engine](built.x, built.step, built.q_min, built.q_max, built.g, **built.extras)


def gradients(engine: str, built: Built, upstream: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(gradient of x, of the step, of the offset or None) for the case's upstream gradient."""
    x, step = leaf(built.x), leaf(built.step)
    wanted = [x, step]
    extras: dict[str, Any] = dict(built.extras)
    if built.offset is not None:
        extras["offset"] = leaf(built.offset)
        wanted.append(extras["offset"])
    y = ENGINES[engine](x, step, built.q_min, built.q_max, built.g, **extras)
    got = torch.autograd.grad(y, wanted, built.upstream if upstream is None else upstream)
    return got[0], got[1], got[2] if built.offset is not None else None


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal type, shape and values; NaN equals NaN, and 0 equals -0."""
    assert got.dtype == expected.dtype, f"{got.dtype} instead of {expected.dtype}"
    assert got.shape == expected.shape, f"{tuple(got.shape)} instead of {tuple(expected.shape)}"
    different = ~((got == expected) | (got.isnan() & expected.isnan()))
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(different.sum())} of {got.numel()} differ, "
            f"first at {at}: {got[at].item()!r}, not {expected[at].item()!r}"
        )


def assert_within(got: Tensor, expected: Any, magnitude: Any) -> None:
    """A step-like gradient: float32, one per step, within the bound of the design against float64."""
    assert got.dtype == torch.float32
    assert got.shape == (len(expected),)
    error = (got.double() - torch.tensor(expected)).abs()
    assert bool((error <= BOUND * torch.tensor(magnitude)).all()), (
        f"error {error.max().item():g}, allowed {BOUND * float(magnitude[int(error.argmax())]):g}"
    )
