"""Calls registered operators directly with arguments that do not fit: each has to be refused, none may end the process.

``python -m helpers.raw_operators FIRST COUNT`` in a process of its own; prints what was not refused, then the counts.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lsquant import kernels

BIG = 2**40


def arguments() -> dict[str, dict[str, Any]]:
    """Operator -> arguments that fit, by name, in the order of the schema."""
    x, weight, image = torch.randn(5, 12), torch.randn(8, 12), torch.randn(2, 4, 6, 6)
    rows, step, steps = torch.randn(8, 4, 3, 3), torch.tensor([0.3]), torch.full((8,), 0.2)
    quantizer = {
        "x": x, "step": torch.full((12,), 0.3), "q_min": -8, "q_max": 7, "gradient_scale": 1.0, "axis": 1,
        "group_size": None, "fixed_zero": 0, "zero_point": None, "offset": torch.full((12,), 0.1),
    }  # fmt: skip
    grouped = quantizer | {"step": torch.full((20,), 0.3), "axis": None, "group_size": 3, "offset": None,
                           "zero_point": torch.zeros(20, dtype=torch.int32)}  # fmt: skip
    inputs = {"x_step": step, "x_offset": torch.tensor([-0.6]), "x_min": 0, "x_max": 15}
    weights = {"w_step": steps, "w_min": -8, "w_max": 7}
    numbers = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    bias, up, up_image = torch.randn(8), torch.randn(5, 8), torch.randn(2, 8, 6, 6)
    constants = {"x": image, "alpha": torch.ones(4), "beta": torch.ones(4)}
    flat = {"x": x, **inputs, "x_gradient_scale": 1.0, "weight": weight, **weights, "w_gradient_scale": 1.0,
            "group_size": None}  # fmt: skip
    conv = flat | {"x": image, "weight": rows} | numbers | {"transposed": False, "output_padding": [], "groups": 1}
    transposed = conv | {"stride": [2, 2], "transposed": True, "output_padding": [1, 1]}
    by_groups = flat | {"w_step": torch.full((32,), 0.2), "group_size": 3}
    forward, backward = (
        {"bias": bias, "autocast_dtype": None},
        {"need_x": True, "has_bias": True, "autocast_dtype": None},
    )
    found = {
        "lsquant.fake_quantize": quantizer,
        "lsquant.fake_quantize:grouped": grouped,
        "lsquant.fake_quantize_backward": {"grad": torch.randn(5, 12), **quantizer},
        "lsquant.scale_shift": constants,
        "lsquant.scale_shift_backward": {"grad": image, "x": image, "alpha": torch.ones(4)},
        "lsquant.linear": forward | flat,
        "lsquant.linear:grouped": forward | by_groups,
        "lsquant.linear_backward": {"grad": up} | backward | flat,
        "lsquant.convolution": forward | conv,
        "lsquant.convolution:transposed": forward | transposed,
        "lsquant.convolution_backward": {"grad": up_image} | backward | conv,
    }
    if not kernels.why_not("cpp"):
        wide = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
        found |= {
            "lsquant_cpp.fake_quantize": quantizer,
            "lsquant_cpp.fake_quantize:grouped": grouped,
            "lsquant_cpp.fake_quantize_backward": {"grad": torch.randn(5, 12), **quantizer},
            "lsquant_cpp.fake_quantize_backward_reusing": {"grad": torch.randn(5, 12), **grouped},
            "lsquant_cpp.scale_shift": constants,
            "lsquant_cpp.linear": {"x": x, **inputs, "weight": weight, **weights, "bias": bias},
            "lsquant_cpp.convolution": {"x": image, **inputs, "weight": rows, **weights, "bias": bias, **numbers},
            "lsquant_cpp.weight_gradient": {"grad": up_image, "x": image, **inputs, "kernel": [3, 3], **numbers},
            "lsquant_cpp.input_gradient": {"grad": torch.randn(2, 32, 6, 6), "weight": torch.randn(32, 32, 3, 3),
                                           "size": list(wide.shape), "padding": [1, 1]},
        }  # fmt: skip
    return found


# ---- what is wrong with a value, whatever it is for ----


OF_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "one more": lambda t: torch.cat([t, t[:1]]),
    "one less": lambda t: t[1:],
    "a dimension more": lambda t: t.unsqueeze(0),
    "no dimension": lambda t: t.reshape(-1)[0],
    "integers": lambda t: t.to(torch.int64) if t.is_floating_point() else t.to(torch.complex64),
    "complex": lambda t: t.to(torch.complex64),
    "without memory": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "nothing": lambda t: None,
}
OF_NUMBERS: dict[str, Callable[[int], Any]] = {
    "negative": lambda n: -abs(n) - 100,
    "huge": lambda n: BIG,
    "a word": lambda n: "1",
}
OF_LISTS: dict[str, Callable[[list[int]], Any]] = {
    "negative": lambda v: [-1] * len(v),
    "huge": lambda v: [BIG] * len(v),
    "largest": lambda v: [2**63 - 1] * len(v),
    "one more": lambda v: [*v, 1],
    "one less": lambda v: v[:-1],
    "zero": lambda v: [0] * len(v),
}
FITS = {
    ("fixed_zero", "negative"), ("fixed_zero", "huge"),  # any number
    ("offset", "nothing"), ("x_offset", "nothing"), ("zero_point", "nothing"), ("bias", "nothing"),
    ("group_size", "nothing"), ("padding", "zero"), ("output_padding", "zero"),
    ("x_min", "negative"), ("w_min", "negative"), ("q_min", "negative"),  # still bounds
    ("x", "one less"), ("x", "one more"), ("x", "a dimension more"),  # another batch
}  # fmt: skip
"""(argument, what is done to it) that may be accepted."""


def spoil(r: random.Random, given: dict[str, Any]) -> tuple[str, str, dict[str, Any]]:
    """(argument, what is done to it, all arguments)."""
    while True:
        name = r.choice(sorted(given))
        value = given[name]
        if isinstance(value, bool) or value is None or isinstance(value, float):
            continue
        kinds: Any = OF_TENSORS if isinstance(value, Tensor) else OF_LISTS if isinstance(value, list) else OF_NUMBERS
        if isinstance(value, list) and not value:
            continue
        how = r.choice(sorted(kinds))
        return name, how, given | {name: kinds[how](value)}


def operator(name: str) -> Any:
    namespace, op = name.split(":")[0].split(".")
    return getattr(getattr(torch.ops, namespace), op).default


def refused(name: str, given: dict[str, Any], differentiated: bool = False) -> bool:
    try:
        if differentiated:
            floats = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.is_floating_point()}
            given = given | {k: v.detach().requires_grad_() for k, v in floats.items()}
        found = operator(name)(*given.values())
        if differentiated and isinstance(found, Tensor) and found.requires_grad:
            found.sum().backward()
    except Exception:  # noqa: BLE001  (any error will do: only a crash or a result is wrong)
        return True
    return False


def main(first: int, count: int) -> None:
    table, counts = arguments(), Counter[str]()
    for name, given in table.items():
        operator(name)(*given.values())
    for seed in range(first, first + count):
        r = random.Random(seed)
        name = r.choice(sorted(table))
        argument, how, given = spoil(r, table[name])
        if r.random() < 0.3:  # two at once: anything but a crash
            other, _, twice = spoil(r, table[name])
            given = given | {other: twice[other]}
            refused(name, given, r.random() < 0.5)
            counts["spoiled twice"] += 1
        elif refused(name, given, r.random() < 0.3):
            counts["refused"] += 1
        elif (argument, how) in FITS:
            counts["accepted"] += 1
        else:
            print(f"not refused: {name}, {argument}, {how}, seed {seed}")
    print(dict(sorted(counts.items())))


if __name__ == "__main__":
    torch.manual_seed(0)
    main(*map(int, sys.argv[1:]))
