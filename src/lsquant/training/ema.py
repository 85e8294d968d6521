"""An exponential moving average of the weights.

Source: Polyak and Juditsky, 1992, in the form of Tarvainen and Valpola, arXiv:1703.01780; the warm-up is TensorFlow's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.entry import Entry
from lsquant._util.errors import UsageError


class WeightAverage:
    """Average every parameter and every floating buffer of the state dict over training, in float32.

    average = d_n * average + (1 - d_n) * value after the n-th update,   d_n = min(decay, (1 + n) / (10 + n))

    d_n keeps a short run from being an average of its beginning. Integer buffers are not averaged: they stay the
    model's. Construct it after `prepare`, `calibrate` and the move to a device; call `update()` after every step.

    model: prepared and calibrated
    decay: between 0 and 1

    Raises: UsageError for a decay outside (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if not 0.0 < decay < 1.0:
            raise UsageError(f"WeightAverage: decay={decay}; it must lie between 0 and 1, e.g. 0.999")
        self.model, self.decay, self.updates = model, decay, 0
        kept = model.state_dict().keys()
        buffers = {name: b for name, b in model.named_buffers() if name in kept}
        # aliases without gradients: writing to them is writing to the model
        self.live = {n: t.detach() for n, t in (*model.named_parameters(), *buffers.items()) if t.is_floating_point()}
        self.average = {name: t.to(torch.float32, copy=True) for name, t in self.live.items()}

    def update(self) -> None:
        """Update the averages with the present values."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.average.values()), [t.float() for t in self.live.values()], 1.0 - decay)  # pyright: ignore

    def apply(self) -> None:
        """Replace the model's values by the averages, for good."""
        torch._foreach_copy_(list(self.live.values()), list(self.average.values()))  # pyright: ignore

    @contextmanager
    def swapped(self) -> Iterator[nn.Module]:
        """Replace the model's values by the averages inside the `with` block."""
        own = [t.clone() for t in self.live.values()]
        self.apply()
        try:
            yield self.model
        finally:
            torch._foreach_copy_(list(self.live.values()), own)  # pyright: ignore

    def state_dict(self) -> dict[str, Any]:
        """Return the state for `fit(extras=...)` and other checkpoints."""
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises: UsageError if it is of another model."""
        found = Entry(state_dict, "the state of WeightAverage").record(("updates", "average"))
        saved = {name: entry.value for name, entry in found["average"].table().items()}
        form = {n: (t.shape, t.dtype) for n, t in saved.items() if isinstance(t, Tensor)}
        if form != {n: (t.shape, t.dtype) for n, t in self.average.items()} or len(form) != len(saved):
            raise UsageError("WeightAverage: the saved averages are of another model")
        self.updates = found["updates"].integer(0, 2**62)
        for name, t in self.average.items():
            t.copy_(saved[name])
