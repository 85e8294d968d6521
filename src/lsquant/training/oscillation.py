"""Oscillation of weights between two codes while training.

After Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv:2203.11086.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import reference
from lsquant._util.entry import Entry
from lsquant._util.errors import UsageError
from lsquant.quantizer import Quantizer
from lsquant.tying import weight_quantizers

EVERY = 11  # iterations between two looks: a prime, so that a short period is not mistaken for rest
WINDOW = 16  # looks
SAMPLE = 2048  # weights of a quantizer that are looked at


class Oscillation:
    """Measure by weight quantizer how many weights oscillate.

    oscillation = share of the weights whose code has gone both up and down within the last WINDOW looks

    A look compares codes with those of the look before, on at most SAMPLE weights spread evenly (weight i lies
    frac(i * 0.618...) of the way). It reads nothing back from the device and draws no random number. Call `look` after
    every optimizer step.

    model: prepared, with the steps set
    every: optimizer steps between two looks

    Raises: UsageError unless `every` is a whole number, at least 1.
    """

    def __init__(self, model: nn.Module, every: int = EVERY) -> None:
        if type(every) is not int or every < 1:
            raise UsageError(f"Oscillation: every={every!r}; give a number of optimizer steps, at least 1")
        self.every, self.steps = every, 0
        self.seen: dict[str, Tensor] = {}  # (3, n) int16: codes, looks since they went up, since they went down
        self.places: dict[str, tuple[tuple[Tensor, ...], Tensor]] = {}
        self.layers: dict[str, tuple[Any, Quantizer]] = {}
        for q, (name, layer) in weight_quantizers(model).items():
            if q.is_initialized:
                self.layers[f"{name}.weight_quantizer".lstrip(".")] = layer, q

    @torch.no_grad()
    def look(self) -> None:
        """Count an optimizer step; every `every` steps, compare the codes."""
        self.steps += 1
        for name, (layer, q) in self.layers.items() if self.steps % self.every == 0 else ():
            rows = layer.rows()
            if name not in self.places:
                self.places[name] = _places(rows, q.step.numel())
            place, shared = self.places[name]
            found = reference.codes(rows[place], q.effective_step()[shared], q.q_min, q.q_max, axis=0)
            codes = torch.nan_to_num(found).to(torch.int16)
            if name not in self.seen:
                self.seen[name] = torch.stack([codes, torch.full_like(codes, WINDOW), torch.full_like(codes, WINDOW)])
                continue
            before, ages = self.seen[name][0], self.seen[name][1:]
            ages.add_(1).clamp_(max=WINDOW).masked_fill_(torch.stack([codes > before, codes < before]), 0)
            before.copy_(codes)

    def shares(self) -> dict[str, float]:
        """Return the share by quantizer; nothing until a window is full, after WINDOW + 1 looks."""
        if self.steps // self.every <= WINDOW:
            return {}
        return {name: float((seen[1:] < WINDOW).all(0).double().mean()) for name, seen in self.seen.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints: steps and what was seen."""
        return {"steps": self.steps, "every": self.every, "seen": self.seen}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; a state of another model or interval is ignored."""
        found = Entry(dict(state_dict), "the state of Oscillation").record(("steps", "every", "seen"))
        steps, every = (found[name].integer(0, 2**62) for name in ("steps", "every"))
        seen: dict[str, Tensor] = {}
        for name, entry in found["seen"].table().items():
            good = isinstance(entry.value, Tensor) and entry.value.dtype == torch.int16 and entry.value.dim() == 2
            entry.require(good and len(entry.value) == 3, "it is not (3, n) codes and ages")
            seen[name] = entry.value
        if every == self.every and seen.keys() <= self.layers.keys():
            sizes = {name: min(self.layers[name][0].rows().numel(), SAMPLE) for name in seen}
            if any(t.shape[1] != sizes[name] for name, t in seen.items()):
                return
            self.steps = steps
            self.seen = {name: t.to(self.layers[name][1].step.device, copy=True) for name, t in seen.items()}


def _places(rows: Tensor, steps: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return where the weights of the sample are: their index in `rows`, and that of their step."""
    count, n = rows.numel(), min(rows.numel(), SAMPLE)
    flat = torch.arange(n, dtype=torch.float64)
    flat = (flat if n == count else flat * 0.6180339887498949 % 1.0 * count).long().to(rows.device)
    return torch.unravel_index(flat, rows.shape), flat // (count // steps)
