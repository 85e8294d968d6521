"""Random calls of the operators: everything follows from a seed.  Sizes are odd on purpose: 0, 1, primes, too many."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import oracle
from lsquant import ops

SIZES = (1, 1, 2, 3, 4, 5, 7, 8)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = ("linear", "linear", "convolution", "convolution", "convolution", "transposed", "quantizer", "channels")


@dataclass(frozen=True)
class Call:
    """One call of an operator.  weight: rows, output channels first; also the constants of kind "channels"."""

    kind: str
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    x_grid: ops.Grid
    w_grid: ops.Grid
    conv: ops.Conv | None
    spoiled: str

    def run(self) -> Tensor:
        if self.kind == "linear":
            return ops.linear(self.x, self.weight, self.bias, self.x_grid, self.w_grid)
        if self.kind == "quantizer":
            return ops.fake_quantize_with(self.x, self.w_grid)
        if self.kind == "channels":
            return ops.scale_shift(self.x, self.weight, self.w_grid.step)
        assert self.conv is not None
        return ops.convolution(self.x, self.weight, self.bias, self.x_grid, self.w_grid, self.conv)

    def with_leaves(self) -> tuple[Call, list[Tensor]]:
        """The same call on tensors that want gradients, and these: x, then weight and steps of a product."""
        x, weight = (t.detach().requires_grad_() for t in (self.x, self.weight))
        x_step, w_step = (grid.step.detach().requires_grad_() for grid in (self.x_grid, self.w_grid))
        grids = {"x_grid": self.x_grid._replace(step=x_step), "w_grid": self.w_grid._replace(step=w_step)}
        mine = replace(self, x=x, weight=weight, **grids)
        if self.kind == "quantizer":
            return mine, [x, w_step]
        return mine, [x, weight, w_step] if self.kind == "channels" else [x, weight, x_step, w_step]

    def float_shape(self) -> tuple[int, ...]:
        """The shape that PyTorch's float layer gives; raises what that layer raises."""
        x, weight, bias = torch.zeros(self.x.shape), torch.zeros(self.weight.shape), None
        if self.bias is not None:
            bias = torch.zeros(self.bias.shape)
        if self.kind == "linear":
            return tuple(F.linear(x, weight, bias).shape)
        if self.conv is None:
            return tuple(x.shape)
        c, dims = self.conv, self.weight.dim() - 2
        if not c.transposed:
            conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
            return tuple(conv(x, weight, bias, c.stride, c.padding, c.dilation, c.groups).shape)
        weight = ops.swap_channels(weight, c.groups)
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return tuple(conv(x, weight, bias, c.stride, c.padding, c.output_padding, c.groups, c.dilation).shape)

    def expected(self) -> Tensor:
        """The value by the oracle, in the type of x."""
        x, weight = array(self.x), array(self.weight)
        if self.kind == "channels":
            value = oracle.batchnorm_eval(x, weight, array(self.w_grid.step))
            return torch.tensor(value).to(self.x.dtype)
        q, p, c = self.w_grid, self.x_grid, self.conv
        layout = {"group_size": q.group_size} if q.group_size else {"axis": q.axis}
        if self.kind == "quantizer":
            z = zero_point(q)
            return torch.tensor(oracle.fake_quantize(x, array(q.step), q.q_min, q.q_max, z, **layout)).to(self.x.dtype)
        s_x, s_w, z = array(p.step), array(q.step), float(np.ravel(zero_point(p))[0])
        if len(s_w) > 1 and not q.group_size:
            layout = {"axis": 0}
        q_x = oracle.codes(x, s_x, p.q_min, p.q_max, z)
        q_w = oracle.codes(weight, s_w, q.q_min, q.q_max, **layout)
        bias = None if self.bias is None else array(self.bias)
        if self.kind == "linear" and q.group_size:
            value = oracle.linear_groups(q_x, z, s_x[0], q_w, s_w, q.group_size, bias)
        elif c is None:
            value = oracle.linear(q_x, z, s_x[0], q_w, s_w, bias)
        elif c.transposed:
            own = ops.swap_channels(torch.tensor(q_w), c.groups).numpy()
            numbers = (c.stride, c.padding, c.dilation, c.groups, c.output_padding)
            value = oracle.transposed_convolution(q_x, z, s_x[0], own, s_w, bias, *numbers)
        elif q.group_size:
            value = by_groups(q_x, z, s_x[0], q_w, s_w.reshape(len(q_w), -1), q.group_size, bias, c)
        else:
            value = oracle.convolution(q_x, z, s_x[0], q_w, s_w, bias, c.stride, c.padding, c.dilation, c.groups)
        return torch.tensor(value).to(self.x.dtype)


def array(t: Tensor) -> np.ndarray:
    return t.detach().float().numpy()


def by_groups(q_x: Any, z: float, s_x: Any, q_w: Any, s_w: Any, size: int, bias: Any, c: ops.Conv) -> Any:
    """One convolution per group of weights, the other codes at 0, added in float32 in order.  s_w: (out, groups)."""
    rows, total = q_w.reshape(len(q_w), -1), np.float32(0)
    for k in range(s_w.shape[1]):
        part = np.zeros_like(rows)
        part[:, k * size : (k + 1) * size] = rows[:, k * size : (k + 1) * size]
        numbers = (None, c.stride, c.padding, c.dilation, c.groups)
        total = total + oracle.convolution(q_x, z, s_x, part.reshape(q_w.shape), s_w[:, k], *numbers)
    return total if bias is None else total + bias.reshape(1, -1, 1, 1)


def zero_point(grid: ops.Grid) -> Any:
    if grid.offset is not None:
        return oracle.lsq_plus_zero_point(array(grid.offset), array(grid.step), grid.q_min, grid.q_max)
    return grid.zero_point.numpy() if isinstance(grid.zero_point, Tensor) else grid.zero_point or 0


def drawn(seed: int) -> Call:
    """The call of a seed: one in eight is spoiled, one in five has values that are not finite."""
    r = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    kind = r.choice(KINDS)
    dtype = r.choice(DTYPES)
    if kind == "linear":
        call = _linear(r, g, dtype)
    elif kind in ("convolution", "transposed"):
        call = _convolution(r, g, dtype, kind)
    else:
        call = _elementwise(r, g, dtype, kind)
    x = call.x.clone()
    if x.numel() and r.random() < 0.2:
        for _ in range(r.randint(1, 2)):
            x.view(-1)[r.randrange(x.numel())] = r.choice([float("nan"), float("inf"), -float("inf")])
    call = replace(call, x=_laid_out(r, x))
    if call.weight.dim() > 1:
        call = replace(call, weight=_laid_out(r, call.weight))
    return _spoiled(r, call) if r.random() < 0.125 else call


def _size(r: random.Random, most: int = 8) -> int:
    return 0 if r.random() < 0.03 else min(most, r.choice(SIZES))


def _values(g: torch.Generator, shape: Any, scale: float, dtype: torch.dtype) -> Tensor:
    return (torch.randn(tuple(shape), generator=g) * scale).to(dtype)


def _grid(r: random.Random, g: torch.Generator, steps: int, weight: bool = False, **layout: Any) -> ops.Grid:
    signed = r.random() < (0.9 if weight else 0.5)
    low, high = oracle.bounds(r.choice([2, 3, 4, 4, 5, 7, 8, 8]), signed, signed and r.random() < 0.2)
    step = torch.rand(steps, generator=g) * 0.2 + 0.05
    offset = None
    if not weight and r.random() < 0.3:
        offset = -step * r.randint(low, high)
    return ops.Grid(step, low, high, 0.5, offset=offset, **layout)


def _divisor(r: random.Random, n: int) -> int:
    return r.choice([d for d in range(1, n + 1) if n % d == 0]) if n else 1


def _weight_grid(r: random.Random, g: torch.Generator, shape: list[int], groups: bool) -> ops.Grid:
    row = int(np.prod(shape[1:]))
    kind = r.choice(["tensor", "channel", "channel", "group"] if groups else ["tensor", "channel"])
    if kind == "group" and row:
        size = _divisor(r, row)
        return _grid(r, g, shape[0] * row // size, weight=True, group_size=size)
    return _grid(r, g, 1 if kind == "tensor" else shape[0], weight=True)


def _bias(r: random.Random, g: torch.Generator, out: int, dtype: torch.dtype) -> Tensor | None:
    return _values(g, [out], 1.0, dtype) if r.random() < 0.5 else None


def _linear(r: random.Random, g: torch.Generator, dtype: torch.dtype) -> Call:
    lead = [r.choice([_size(r), 32, 33, 70]), *[_size(r) for _ in range(r.randint(0, 2))]][r.randint(0, 1) :]
    in_, out = r.choice([_size(r), 13, 16, 31, 130, 520]), r.choice([_size(r), 8, 17, 33])
    x, weight = _values(g, [*lead, in_], 1.0, dtype), _values(g, [out, in_], 0.5, dtype)
    w_grid = _weight_grid(r, g, [out, in_], True)
    return Call("linear", x, weight, _bias(r, g, out, dtype), _grid(r, g, 1), w_grid, None, "")


def _convolution(r: random.Random, g: torch.Generator, dtype: torch.dtype, kind: str) -> Call:
    dims, groups = r.choice([1, 2, 2, 2, 3]), r.choice([1, 1, 1, 2, 3])
    in_, out = groups * r.choice([_size(r), 3, 9]), groups * r.choice([_size(r), 5, 17])
    small = 8 if dims < 3 else 4
    shape = [r.choice([_size(r, 4), 2]), in_, *[_size(r, small) for _ in range(dims)]]
    kernel = [r.choice([1, 2, 3, 3, 4]) for _ in range(dims)]
    stride, dilation = ([r.choice([1, 1, 1, 2, 3]) for _ in range(dims)] for _ in range(2))
    padding = [r.choice([0, 0, 1, 1, 2, 3]) for _ in range(dims)]
    extra = [r.choice([0, 0, 0, 1]) for _ in range(dims)] if kind == "transposed" else []
    conv = ops.Conv(stride, padding, dilation, kind == "transposed", extra, groups)
    if kind == "convolution" and r.random() < 0.1:  # gradients by minimal filtering, with channels last
        dims, out, in_ = 2, r.choice([32, 40]), r.choice([8, 32, 33])
        shape = [2, in_, r.choice([2, 4, 5]), r.choice([3, 4, 7])]
        kernel, padding = [3, 3], [r.choice([0, 1, 2]), r.choice([0, 1, 2])]
        conv = ops.Conv([1, 1], padding, [1, 1])
    rows = [out, in_ // conv.groups, *kernel]
    x, weight = _values(g, shape, 1.0, dtype), _values(g, rows, 0.5, dtype)
    w_grid = _weight_grid(r, g, rows, dims == 2 and kind == "convolution")
    return Call(kind, x, weight, _bias(r, g, out, dtype), _grid(r, g, 1), w_grid, conv, "")


def _elementwise(r: random.Random, g: torch.Generator, dtype: torch.dtype, kind: str) -> Call:
    shape = [r.choice([_size(r), 17]) for _ in range(r.randint(2 if kind == "channels" else 0, 5))]
    x = _values(g, shape, 1.0, dtype)
    if kind == "channels":
        alpha, beta = (_values(g, [shape[1]], 1.0, torch.float32) for _ in range(2))
        return Call(kind, x, alpha, None, _grid(r, g, 1), ops.Grid(beta, 0, 1), None, "")
    row = int(np.prod(shape[1:]))
    if shape and row and r.random() < 0.3:
        size = _divisor(r, row)
        grid = _grid(r, g, x.numel() // size, group_size=size)
    elif shape and r.random() < 0.6:
        axis = r.randrange(-len(shape), len(shape))
        grid = _grid(r, g, shape[axis], axis=axis)
    else:
        grid = _grid(r, g, 1)
    if grid.offset is None and r.random() < 0.3:
        zeros = torch.randint(grid.q_min, grid.q_max + 1, grid.step.shape, generator=g, dtype=torch.int32)
        grid = grid._replace(zero_point=r.choice([zeros, int(r.randint(grid.q_min, grid.q_max))]))
    return Call(kind, x, torch.empty(0), None, grid, grid, None, "")


def _laid_out(r: random.Random, t: Tensor) -> Tensor:
    """The same values in other strides, or the first of a dimension for all of it."""
    if not t.dim() or not t.numel():
        return t
    how = r.choice(["contiguous", "contiguous", "transposed", "strided", "offset", "channels last", "expanded"])
    if how == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "strided":
        return torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0]
    if how == "offset":
        return torch.cat([torch.full((1,), float("nan"), dtype=t.dtype), t.reshape(-1)])[1:].view(t.shape)
    if how == "channels last" and t.dim() in (4, 5):
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    if how == "expanded":
        d = r.randrange(t.dim())
        return t.narrow(d, 0, 1).expand(t.shape)
    return t


def _spoiled(r: random.Random, call: Call) -> Call:
    """One argument that does not fit: every engine has to say so."""
    q, p = call.w_grid, call.x_grid
    one_more = torch.cat([q.step, torch.ones(2)])
    choices: dict[str, Any] = {
        "steps": lambda: {"w_grid": q._replace(step=one_more)},
        "type of steps": lambda: {"w_grid": q._replace(step=q.step.double())},
        "shape of steps": lambda: {"w_grid": q._replace(step=q.step.reshape(1, -1))},
        "type of x": lambda: {"x": torch.zeros(call.x.shape, dtype=torch.int64)},
        "device of steps": lambda: {"w_grid": q._replace(step=q.step.to("meta"))},
    }
    if call.kind == "quantizer":
        choices["bounds"] = lambda: {"w_grid": q._replace(q_min=q.q_max, q_max=q.q_min)}
        choices["axis"] = lambda: {"w_grid": q._replace(axis=call.x.dim() + 1, group_size=None)}
        choices["group"] = lambda: {"w_grid": q._replace(axis=None, group_size=0)}
        choices["offset"] = lambda: {"w_grid": q._replace(offset=one_more, zero_point=None)}
    elif call.kind != "channels":
        choices["bounds"] = lambda: {"x_grid": p._replace(q_min=p.q_max, q_max=p.q_min)}
        choices["input steps"] = lambda: {"x_grid": p._replace(step=torch.ones(2))}
        choices["input offset"] = lambda: {"x_grid": p._replace(offset=torch.ones(2))}
        choices["bias"] = lambda: {"bias": torch.ones(call.weight.shape[0] + 1)}
        choices["weight"] = lambda: {"weight": torch.cat([call.weight, call.weight], 1)[:, 1:]}
        choices["dimensions"] = lambda: {"weight": call.weight.unsqueeze(-1)}
        choices["device of the weight"] = lambda: {"weight": call.weight.to("meta")}
    if call.conv is not None:
        conv = call.conv
        choices["stride"] = lambda: {"conv": conv._replace(stride=[0] * len(conv.stride))}
        choices["dilation"] = lambda: {"conv": conv._replace(dilation=[-1] * len(conv.stride))}
        choices["padding"] = lambda: {"conv": conv._replace(padding=[-1] * len(conv.stride))}
        choices["numbers"] = lambda: {"conv": conv._replace(stride=[1] * (len(conv.stride) + 1))}
        choices["groups"] = lambda: {"conv": conv._replace(groups=0)}
    name = r.choice(sorted(choices))
    if name == "weight" and call.weight.shape[1] < 2:
        name = "steps"
    return replace(call, spoiled=name, **choices[name]())
