"""The quantizer alone, forward and backward, against ``x * 1.0`` forward and backward: one read and one write each.

A 4-bit signed quantizer over values of a normal distribution.  Before anything is timed, outputs and gradients of every
contender are compared with ``lsquant.reference``; lsquant's own have to be equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from peers import PEERS, LeftOut, Problem, Quantize
from timing import Contender, Options, Row, forget_compiled, measure, profile, rows, say, show
from torch import Tensor

import lsquant
from lsquant import kernels, reference

BASELINE = "x * 1.0"
PHASE = "forward + backward"


class Layout(NamedTuple):
    """How a number of elements is laid out, and what shares a step."""

    name: str
    shapes: dict[int, tuple[int, ...]]
    axis: int | None
    channels_last: bool = False


IMAGES = {
    36_864: (4, 16, 24, 24), 2_097_152: (128, 16, 32, 32), 8_388_608: (512, 16, 32, 32), 768: (2, 16, 4, 6),
}  # fmt: skip
MATRICES = {36_864: (64, 576), 2_097_152: (512, 4096), 8_388_608: (2048, 4096), 768: (16, 48)}
LAYOUTS = (
    Layout("per tensor", IMAGES, None),
    Layout("per channel, axis 1", IMAGES, 1),
    Layout("per channel, axis 1, channels-last", IMAGES, 1, channels_last=True),
    Layout("per channel, axis 0", MATRICES, 0),
)
SIZES, TINY = (36_864, 2_097_152, 8_388_608), (768,)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def engines(device: str) -> list[str]:
    """lsquant's engines that run on a device, the fastest last."""
    names = reversed(kernels.PREFERRED.get(device, ("eager",)))
    return [name for name in names if not kernels.why_not(name)]


def problem(layout: Layout, elements: int, dtype: torch.dtype, device: str) -> Problem:
    random = torch.Generator().manual_seed(elements)
    x = torch.randn(layout.shapes[elements], generator=random)
    steps = 1 if layout.axis is None else x.shape[layout.axis]
    step = 0.2 + 0.2 * torch.rand(steps, generator=random)
    if layout.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    return Problem(x.to(device, dtype), step.to(device), layout.axis, 4, reference.gradient_scale(x[0].numel(), 7))


def ours(p: Problem) -> Quantize:
    step = p.step.clone().requires_grad_()
    return Quantize(lambda x: lsquant.fake_quantize(x, step, *p.bounds, p.g, axis=p.axis), [step])


def ours_compiled(p: Problem) -> Quantize:
    function, parameters = ours(p)
    return Quantize(torch.compile(function, dynamic=False), parameters)


def identity(p: Problem) -> Quantize:
    return Quantize(lambda x: x * 1.0, [])


def results(quantize: Quantize, x: Tensor, upstream: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """The output and the gradients of x and of the parameters."""
    y = quantize.function(x)
    return y, torch.autograd.grad(y, [x, *quantize.parameters], upstream)


def truth(p: Problem, upstream: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    step = p.step.clone().requires_grad_()
    function = Quantize(lambda x: reference.fake_quantize(x, step, *p.bounds, p.g, axis=p.axis), [step])
    return results(function, p.x.detach().requires_grad_(), upstream)


def compared(found: tuple[Tensor, Sequence[Tensor]], wanted: tuple[Tensor, Sequence[Tensor]], p: Problem,
             strict: bool) -> str:  # fmt: skip
    """How many elements have another code, or another gradient (by 1 %, not by rounding), than the reference.

    Raises: RuntimeError where ``strict`` and any value differs.
    """
    (y, (dx, ds, *_)), (y0, (dx0, ds0, *_)) = found, wanted
    off = float((ds.reshape(-1) - ds0).norm() / ds0.norm())
    if strict and not (torch.equal(y, y0) and torch.equal(dx, dx0) and off < 1e-4):
        raise RuntimeError(f"lsquant is not its reference: y {(y != y0).sum()}, dx {(dx != dx0).sum()}, ds off {off:g}")
    codes = ((y.float() - y0.float()).abs() > p.broadcast(p.step) / 2).float().mean()
    gradients = ((dx.float() - dx0.float()).abs() > 0.01 * dx0.float().abs()).float().mean()
    return f"other than the reference: {float(codes):.3%} of codes, {float(gradients):.3%} of dx"


def contenders(p: Problem, options: Options) -> Iterator[Contender]:
    """Every contender for one tensor, checked."""
    x = p.x.detach().requires_grad_()
    upstream = torch.randn_like(x)
    wanted = truth(p, upstream)

    def contender(name: str, make: Callable[[Problem], Quantize], engine: str | None = None, profiled: bool = False,
                  q: Problem = p) -> Contender:  # fmt: skip
        try:
            quantize = make(q)
            with lsquant.use_engine(engine):
                found = results(quantize, x, upstream)
        except (LeftOut, NotImplementedError) as reason:
            return Contender(name, None, BASELINE, check=f"left out: {reason}")
        check = "" if name == BASELINE or q is not p else compared(found, wanted, p, engine is not None)
        return Contender(name, lambda: results(quantize, x, upstream), BASELINE, engine, check, profiled)

    yield contender(BASELINE, identity, profiled=True)
    best = engines(options.device)[-1]
    for name, make in PEERS.items():
        if options.selects(name):
            yield contender(name, make)
    for engine in engines(options.device):
        if options.selects(name := f"lsquant, {engine}"):
            yield contender(name, ours, engine, profiled=True)
    if options.selects("lsquant, compiled"):
        yield contender("lsquant, compiled", ours_compiled)
    if p.axis is not None and options.selects(name := f"lsquant, {best}, per tensor"):
        yield contender(name, ours, best, q=p._replace(step=p.step[:1], axis=None))


def run(options: Options) -> list[Row]:
    """All sizes, types and layouts."""
    found: list[Row] = []
    for elements in TINY if options.tiny else SIZES:
        for type_name, dtype in DTYPES.items():
            for layout in LAYOUTS:
                configuration = f"{elements:,} elements, {type_name}, {layout.name}"
                say(f"quantizer: {configuration}")
                forget_compiled()
                field = list(contenders(problem(layout, elements, dtype, options.device), options))
                measure(field, options)
                new = list(rows("quantizer", configuration, PHASE, field, options))
                show(new)
                found += new
                for c in field:
                    if options.profile and c.profile and c.call and type_name == "float32" and layout.axis is None:
                        profile(f"quantizer {elements}", c, options)
    return found
