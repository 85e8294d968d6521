"""``TiedQuantizer``: a quantizer with the step of another one and a sign of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lsquant._util.errors import UsageError
from lsquant.quantizer import Quantizer
from lsquant.spec import QuantSpec


class TiedQuantizer(Quantizer):
    """Fake-quantize by the step of an owner: ``v_hat = clip(round(v / s), q_min, q_max) * s``.

    Additions and concatenations of codes need operands of one step.  One quantizer owns it; the others use its guarded
    step s, its s0, N and gradient scale g, and have the zero point 0 and a sign of their own, thus their own q_min and
    q_max.

    spec: bits, granularity "tensor", no offset.
    owner: one step, no offset, not tied itself.

    Buffers:
    signed, bounds, guarded: as of ``Quantizer``; guarded stays 0, for the owner counts.
    """

    owner: Quantizer

    def __init__(self, spec: QuantSpec, owner: Quantizer) -> None:
        super().__init__(spec)
        if isinstance(owner, TiedQuantizer) or owner.step.numel() != 1 or owner.offset is not None or spec.offset:
            raise UsageError("TiedQuantizer: the owner must have one step, no offset, and a step of its own")
        for name in ("step", "offset"):
            del self._parameters[name]
        for name in ("initial_step", "count", "initialized"):
            del self._buffers[name]
        self.__dict__["owner"] = owner  # no submodule: its tensors are in the state dict where it stands

    def __getattr__(self, name: str) -> Any:
        if name in _OWNED and "owner" in self.__dict__:
            return getattr(self.owner, name)
        return super().__getattr__(name)

    @property
    def is_decided(self) -> bool:
        """Whether the sign is known."""
        self._follow()
        return self._mirror.spec.signed is not None

    @property
    def step_dtype(self) -> str:
        """The type that the owner's step is rounded to."""
        return self.owner.step_dtype

    def _follow(self) -> None:
        own = self._buffers["signed"]
        state = self.owner._state()
        if type(own) is not Tensor or own.is_meta or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
            return
        try:
            source = (int(own), state.count, state.initialized)
        except RuntimeError:  # under a mode for fake tensors
            return
        if source != self._mirror.source:
            spec = self.requested if source[0] < 0 else self.requested.decide(bool(source[0]))
            ready = state.initialized and spec.signed is not None
            self._mirror = self._mirror._replace(spec=spec, count=state.count, initialized=ready, source=source)

    def _gradient_scale(self, state: Any) -> float:
        return self.owner.gradient_scale

    def count_guarded(self) -> None:
        """Count nothing: the owner counts the guarded steps."""

    def _set(self, spec: QuantSpec, step: Tensor, offset: Tensor | None = None) -> None:
        self.signed.fill_(int(bool(spec.signed)))
        self._write_bounds(spec)
        self._refresh()

    def set_count(self, count: int) -> None:
        """Leave N as it is: it is the owner's."""

    def forget(self) -> None:
        """Mark the sign as not decided, where the specification leaves it open."""
        self.signed.fill_(-1 if self.requested.signed is None else int(self.requested.signed))
        self._write_bounds(self.requested)
        self._refresh()


_OWNED = frozenset(("step", "offset", "initial_step", "count", "initialized"))
