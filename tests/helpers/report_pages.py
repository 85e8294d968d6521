"""Report pages for the tests: the data in a page, a model with every kind of quantizer, what its numbers must be."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lsquant
import oracle
from lsquant import Quantizer, QuantSpec, Recipe, Rule


def page_data(page: Path) -> dict[str, Any]:
    """What the page's scripts are given."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(f"{name} is no JSON")))


class Net(nn.Module):
    """One step per tensor, per channel and per group, LSQ+, 8 bits, and a quantizer of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grouped, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(96, 40), nn.Linear(40, 5)
        self.own = Quantizer(QuantSpec(3), count=40)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.max_pool2d(torch.relu(self.conv(x)), 2).flatten(1)
        return self.head(self.own(torch.nn.functional.gelu(self.grouped(x))))


def calibrated(seed: int = 0) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """Prepared and calibrated; then steps are changed, so that they clip and are not the initial ones.  With gradients.
    Returns the model, two batches of calibration and two others."""
    torch.manual_seed(seed)
    model, batches = Net().eval(), [torch.randn(9, 3, 8, 8) for _ in range(4)]
    channel, group = QuantSpec(2, granularity="channel"), QuantSpec(4, granularity="group", group_size=8)
    rules = [Rule("conv", channel, 8), Rule("grouped", group, 2), Rule("head", QuantSpec(3), QuantSpec(4, offset=True))]
    lsquant.prepare(model, Recipe(4, 4, rules))
    lsquant.calibrate(model, batches[:2])
    with torch.no_grad():
        for i, (_, q) in enumerate(lsquant.quantizers(model)):
            q.step.mul_((0.6, 1.3, 0.8)[i % 3])
            if q.offset is not None:
                q.offset.mul_(0.9)
        model.conv.weight_quantizer.step[2] = 1e-6  # the guard holds it
    model.train()
    torch.nn.functional.cross_entropy(model(batches[0]), torch.arange(9) % 5).backward()
    return model.eval(), batches[:2], batches[2:]


def array(t: Tensor) -> np.ndarray:
    return t.detach().numpy()


def values_of(model: nn.Module, batches: list[Tensor]) -> dict[str, list[np.ndarray]]:
    """What each quantizer of ``Net`` sees, by the names of the state dict."""
    found: dict[str, list[np.ndarray]] = {f"{n}.weight_quantizer": [array(w)] for n, w in _weights(model)}
    for name in ("conv", "grouped", "head", "own"):
        seen: list[np.ndarray] = []
        found["own" if name == "own" else f"{name}.input_quantizer"] = seen
        hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args, s=seen: s.append(array(args[0])))
        with torch.no_grad():
            for batch in batches:
                model(batch)
        hook.remove()
    return found


def _weights(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, getattr(model, name).weight) for name in ("conv", "grouped", "head")]


def zero_points(q: Quantizer, step: np.ndarray) -> Any:
    return 0 if q.offset is None else oracle.lsq_plus_zero_point(array(q.offset), step, q.q_min, q.q_max)


def judged(values: np.ndarray, step: float, low: int, high: int) -> dict[str, Any]:
    """What a step does to values, by the oracle's codes; low .. high: the outermost levels in steps."""
    s = np.array([step], np.float32)
    codes = oracle.codes(values, s, low, high).astype(np.float64)
    v = values.astype(np.float64)
    noise, signal = float(np.sum((v - codes * float(s[0])) ** 2)), float(np.sum(v * v))
    return {
        "error": noise / v.size,
        "sqnr": 10 * math.log10(signal / noise) if noise else None,
        "clip_low": float(np.mean(v / step < low)),
        "clip_high": float(np.mean(v / step > high)),
        "used": len(np.unique(codes)),
    }
