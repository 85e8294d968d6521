"""One table of cases for every engine test: what is quantized, how, and with which values.

A `Case` is a description; `case.build()` makes its tensors (always the same ones). Nothing of lsquant is imported.
"""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import oracle

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, ...] = (7, 33)
    bits: int = 4
    signed: bool = True
    narrow: bool = False
    axis: int | None = None
    group_size: int | None = None
    zero_point: str | None = None  # None, "int" (one number for all) or "tensor" (one per step)
    offset: bool = False  # LSQ+
    dtype: str = "float32"
    layout: str = "contiguous"  # "channels_last", "transposed", "strided", "offset" (storage offset 1), "expanded"
    values: str = "normal"  # "ties", "boundaries", "huge", "integers", "wide" (most are clipped), "one"

    def __str__(self) -> str:
        return self.name

    @property
    def step_count(self) -> int:
        if self.axis is not None:
            return self.shape[self.axis]
        return int(np.prod(self.shape)) // self.group_size if self.group_size else 1

    def build(self) -> "Built":
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        q_min, q_max = oracle.bounds(self.bits, self.signed, self.narrow)
        layout = {"axis": self.axis, "group_size": self.group_size}
        n = self.step_count
        step = np.exp(rng.uniform(np.log(0.02), np.log(0.5), n)).astype(np.float32)
        if self.values == "ties":
            step[::2] = np.exp2(np.round(np.log2(step[::2])))  # a power of two: every tie is exact
        if self.values == "huge":
            step[:] = rng.uniform(0.6e-3, 1.0e-3, n)
        zero_point, offset, z = None, None, np.zeros(n)
        if self.zero_point == "int":
            zero_point = int(rng.integers(q_min, q_max + 1))
            z = np.full(n, float(zero_point))
        elif self.zero_point == "tensor":
            z = rng.integers(q_min, q_max + 1, n).astype(np.float64)
            zero_point = torch.tensor(z, dtype=torch.int32)
        elif self.offset:
            offset = (-step * rng.uniform(q_min - 1.0, q_max * 0.7 + 1.0, n)).astype(np.float32)
            z = oracle.lsq_plus_zero_point(offset, step, q_min, q_max)
        x = self._values(rng, step, z, q_min, q_max, layout)
        upstream = torch.tensor(rng.standard_normal(self.shape), dtype=torch.float32).to(DTYPES[self.dtype])
        return Built(
            case=self,
            x=arrange(torch.tensor(x).to(DTYPES[self.dtype]), self.layout),
            step=torch.tensor(step),
            q_min=q_min,
            q_max=q_max,
            g=oracle.gradient_scale(max(1, int(np.prod(self.shape)) // max(n, 1)), q_max),
            layout=layout,
            zero_point=zero_point,
            offset=None if offset is None else torch.tensor(offset),
            upstream=upstream,
            z=z,
        )

    def _values(self, rng, step, z, q_min, q_max, layout) -> np.ndarray:
        s, zero = (oracle.spread(a, self.shape, **layout) for a in (step, z))
        low, high = q_min - zero, q_max - zero
        s64 = s.astype(np.float64)
        if self.values in ("normal", "wide", "one"):
            spread = {"normal": 0.6, "wide": 4.0, "one": 0.6}[self.values]
            quotients = (low + high) / 2 + rng.standard_normal(self.shape) * (high - low + 1) * spread
            return (quotients * s64).astype(np.float32)
        if self.values == "integers":
            return ((rng.integers(-3, q_max - q_min + 4, self.shape) + low) * s64).astype(np.float32)
        if self.values == "ties":
            return ((rng.integers(-3, q_max - q_min + 4, self.shape) + low + 0.5) * s64).astype(np.float32)
        if self.values == "boundaries":  # the clip points themselves and the float32 neighbours of v
            v = (np.where(rng.integers(0, 2, self.shape) > 0, low, high) * s64).astype(np.float32)
            towards = np.array([-np.inf, 0.0, np.inf], np.float32)[rng.integers(0, 3, self.shape)]
            v = np.where(towards == 0, v, np.nextafter(v, towards)).astype(np.float32)
            return np.where(np.abs(v) < 1e-30, np.float32(0), v)  # no denormals
        if self.values == "huge":  # v/s overflows float32, beside ordinary values and zeros of both signs
            limit = 6.5e4 if self.dtype == "float16" else 3.3e38
            big = np.where(rng.integers(0, 2, self.shape) > 0, limit, -limit).astype(np.float32)
            usual = (rng.standard_normal(self.shape) * s64 * q_max).astype(np.float32)
            choice = [big, usual, np.float32(0.0), np.float32(-0.0)]
            return np.choose(rng.integers(0, 4, self.shape), choice).astype(np.float32)
        raise ValueError(self.values)


@dataclass(frozen=True)
class Built:
    case: Case
    x: torch.Tensor
    step: torch.Tensor
    q_min: int
    q_max: int
    g: float
    layout: dict[str, Any]
    zero_point: int | torch.Tensor | None
    offset: torch.Tensor | None
    upstream: torch.Tensor
    z: np.ndarray  # the integer zero point of every step, LSQ+ included

    @property
    def extras(self) -> dict[str, Any]:
        """The keyword arguments of `fake_quantize` and `codes`."""
        return {**self.layout, "zero_point": self.zero_point, "offset": self.offset}

    def oracle_arguments(self):
        v = self.x.detach().float().numpy()
        return (v, self.step.numpy(), self.q_min, self.q_max)

    def expected_codes(self) -> np.ndarray:
        return oracle.codes(*self.oracle_arguments(), self.z, **self.layout)

    def expected_value(self) -> torch.Tensor:
        """In the type of x."""
        value = oracle.fake_quantize(*self.oracle_arguments(), self.z, **self.layout)
        return torch.tensor(value, dtype=torch.float32).to(self.x.dtype)

    def expected_element_gradient(self) -> torch.Tensor:
        upstream = self.upstream.float().numpy()
        gradient = oracle.element_gradient(upstream, *self.oracle_arguments(), self.z, **self.layout)
        return torch.tensor(gradient, dtype=torch.float32).to(self.x.dtype)

    def expected_step_gradient(self):
        upstream = self.upstream.float().numpy()
        return oracle.step_gradient(
            upstream, *self.oracle_arguments(), self.g, self.z, **self.layout, lsq_plus=self.case.offset
        )

    def expected_offset_gradient(self):
        upstream = self.upstream.float().numpy()
        return oracle.offset_gradient(upstream, *self.oracle_arguments(), self.g, self.z, **self.layout)


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    if layout == "contiguous":
        return x
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":  # every second element of a larger tensor filled with NaN
        big = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
        big[..., ::2] = x
        return big[..., ::2]
    if layout == "offset":
        flat = torch.cat([torch.full((1,), float("nan"), dtype=x.dtype), x.reshape(-1)])
        return flat[1:].view(x.shape)
    if layout == "expanded":
        return x[:1].expand(x.shape)
    raise ValueError(layout)


def _every_bit_width() -> list[Case]:
    cases = []
    for bits in range(2, 9):
        for values in ("normal", "ties", "boundaries"):
            cases.append(Case(f"s{bits}-{values}", bits=bits, values=values))
            cases.append(Case(f"u{bits}-{values}", bits=bits, signed=False, values=values))
            cases.append(Case(f"s{bits}-narrow-{values}", bits=bits, narrow=True, values=values))
    return cases


def _granularities() -> list[Case]:
    cases = []
    for values in ("normal", "ties", "boundaries", "huge"):
        cases += [
            Case(f"axis0-{values}", shape=(5, 3, 4, 4), axis=0, values=values),
            Case(f"axis1-{values}", shape=(5, 3, 4, 4), axis=1, bits=8, values=values),
            Case(f"axis-last-{values}", shape=(5, 3, 7), axis=2, bits=2, values=values),
            Case(f"group-{values}", shape=(6, 24), group_size=8, bits=3, values=values),
            Case(f"group-conv-{values}", shape=(4, 6, 3, 3), group_size=27, bits=4, narrow=True, values=values),
            Case(f"tensor-unsigned-{values}", signed=False, values=values),
        ]
    return cases


def _zero_points() -> list[Case]:
    cases = []
    for bits in (2, 4, 8):
        for signed in (True, False):
            for kind in ("int", "tensor", "offset"):
                extra: dict[str, Any] = {"offset": True} if kind == "offset" else {"zero_point": kind}
                base = Case(f"z-{kind}-{'s' if signed else 'u'}{bits}", bits=bits, signed=signed, **extra)
                cases += [base, replace(base, name=base.name + "-boundaries", values="boundaries")]
                cases.append(replace(base, name=base.name + "-axis", shape=(6, 5, 3), axis=0, values="wide"))
                cases.append(replace(base, name=base.name + "-group", shape=(4, 12), group_size=6, values="ties"))
    return cases


def _types() -> list[Case]:
    cases = []
    for dtype in ("bfloat16", "float16", "float64"):
        for values in ("normal", "ties", "boundaries", "huge"):
            cases.append(Case(f"{dtype}-{values}", dtype=dtype, values=values, shape=(9, 40)))
        cases += [
            Case(f"{dtype}-axis", dtype=dtype, shape=(8, 3, 5, 5), axis=0, bits=8),
            Case(f"{dtype}-group", dtype=dtype, shape=(8, 32), group_size=16, bits=4),
            Case(f"{dtype}-lsq-plus", dtype=dtype, offset=True, signed=False, bits=4),
            Case(f"{dtype}-zero-point", dtype=dtype, zero_point="int", signed=False, bits=8),
            Case(f"{dtype}-channels-last", dtype=dtype, shape=(4, 6, 5, 5), layout="channels_last"),
        ]
    return cases


def _shapes() -> list[Case]:
    cases = [
        Case("awkward", shape=(9, 41, 341), bits=8),
        Case("awkward-unsigned", shape=(9, 41, 341), bits=2, signed=False, values="wide"),
        Case("awkward-axis0", shape=(9, 41, 341), axis=0),
        Case("awkward-axis1", shape=(9, 41, 341), axis=1, offset=True, signed=False),
        Case("awkward-axis2", shape=(9, 41, 341), axis=2),
        Case("awkward-groups", shape=(9, 41, 341), group_size=341, bits=3),
        Case("awkward-prime", shape=(65537,), bits=4),
        Case("one-long-row", shape=(1, 100003), axis=0, bits=4),
        Case("group-of-one", shape=(3, 8), group_size=1),
        Case("group-of-row", shape=(3, 8), group_size=8),
        Case("zero-dimensional", shape=(), values="one"),
        Case("one-element", shape=(1,), values="one"),
        Case("one-element-4d", shape=(1, 1, 1, 1), axis=1, values="one"),
        Case("one-channel", shape=(1, 17), axis=0),
        Case("empty", shape=(0,)),
        Case("empty-batch", shape=(0, 5)),
        Case("empty-batch-axis", shape=(0, 5), axis=1),
        Case("empty-batch-images", shape=(0, 3, 8, 8), layout="channels_last"),
        Case("empty-inside", shape=(3, 0), axis=0),
        Case("empty-lsq-plus", shape=(0, 5), offset=True, signed=False),
    ]
    for layout in ("channels_last", "transposed", "strided", "offset", "expanded"):
        cases += [
            Case(f"{layout}-tensor", shape=(4, 6, 5, 7), layout=layout),
            Case(f"{layout}-axis0", shape=(4, 6, 5, 7), layout=layout, axis=0, bits=8),
            Case(f"{layout}-axis1", shape=(4, 6, 5, 7), layout=layout, axis=1, bits=3),
            Case(f"{layout}-group", shape=(4, 6, 5, 7), layout=layout, group_size=35),
            Case(f"{layout}-lsq-plus", shape=(4, 6, 5, 7), layout=layout, offset=True, signed=False),
            Case(f"{layout}-zero-points", shape=(4, 6, 5, 7), layout=layout, axis=1, zero_point="tensor"),
        ]
    return cases


CASES: list[Case] = [*_every_bit_width(), *_granularities(), *_zero_points(), *_types(), *_shapes()]
assert len({case.name for case in CASES}) == len(CASES), "two cases share a name"


def some(*names: str) -> list[Case]:
    """The cases of these names, for tests that need only a few."""
    table = {case.name: case for case in CASES}
    return [table[name] for name in names]
