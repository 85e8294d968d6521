"""A schedule for the share of low-bit weights that change their code in a step, in place of a learning rate schedule.

Source: Lee, Jeon, Baek, Ham, "Scheduling Weight Transitions for Quantization-Aware Training", arXiv:2404.19248v4
(ICCV 2025), section 3: there "transition rate" and "transition-adaptive learning rate".
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import ops, reference
from lsquant._util.entry import Entry, shown
from lsquant._util.errors import UsageError
from lsquant.quantizer import Quantizer
from lsquant.training.groups import LOW_BIT, is_low_bit
from lsquant.tying import weight_quantizers

OPTIMIZERS = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""What the method was tried with, here and by its source; subclasses too."""
LARGE = 0.05
"""Share of weights that change code in a step, from which on ``first`` looks like percent."""
PAPER_STEPS = 80_000
"""Optimizer steps of the source's CIFAR schedules, for which its gain and its smoothing were chosen."""
SHORT = 400
"""Optimizer steps below which the gain stops growing: U would jump."""
POINTS = 400
"""Points of ``TransitionRate.trace``, at most."""


class TransitionRate:
    """Set the learning rate U of the low-bit weights so that the share of them that change code follows a schedule.

    After optimizer step t = 0, 1, ..., in which the share k of the low-bit weights got another code:

        K <- m K + (1 - m) k                       running transition rate, from 0
        R  = first * (1 + cos(pi t / steps)) / 2   its target; 0 from t = steps on
        U <- max(0, U + gain * (R - K))            the next step's learning rate, from the optimizer's own

    The model has one U. It is the learning rate of the groups "low_bit" of ``param_groups(..., low_bit=True)`` in every
    step, whatever a scheduler has set, so it scales weight decay as well. All other groups keep theirs. Hooks on the
    optimizer do this: the training loop needs no further call, steps that a loss scaler skips do not count, and
    accumulated batches are one step. Processes of DistributedDataParallel have the same weights, so they find the same
    U.

    model: prepared.
    optimizer: SGD, Adam or AdamW over ``param_groups(..., low_bit=True)``.
    first: R at the beginning, a share (not percent), e.g. 0.002; above 0.05 warns.
    steps: optimizer steps of the whole training: epochs times batches, over the batches accumulated for a step.
    gain: by default U's first value times 80,000 / steps, at most 200 times it: the source's gain is U's first value in
        schedules of 80,000 steps; in shorter ones K would lag behind R.
    smoothing: m; by default 0.99, and 1 - 40 / steps in schedules below 4,000 steps.
    fix_steps: the steps of these weights are not trained, as in the source. False trains them; a code that changes with
        its step counts as well.

    ``rate``, ``target``, ``lr``: K, R and U now. ``done``: optimizer steps counted. ``trace``: rows (t, K, R, U), at
    most 400 over the schedule. Checkpoints need ``state_dict``; ``fit(transition=...)`` does that. A copy of the
    optimizer (``deepcopy``, pickle) has no hooks: make another control for it.

    Raises: UsageError for numbers out of range; for an optimizer of another kind, without "low_bit" groups, of
    another model, or with a control already; and in a step where the model was prepared anew.

    >>> layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    >>> changes = lsquant.prepare(layer, lsquant.Recipe.preset("w2"))
    >>> optimizer = torch.optim.SGD(lsquant.param_groups(layer, lr=0.1, low_bit=True), momentum=0.9)
    >>> control = TransitionRate(layer, optimizer, first=0.002, steps=1000)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        first: float = 0.002,
        *,
        steps: int,
        gain: float | None = None,
        smoothing: float | None = None,
        fix_steps: bool = True,
    ) -> None:
        if not 0.0 < first < 1.0:
            raise UsageError(f"TransitionRate: first={first!r}; give the share of weights that change, e.g. 0.002")
        if type(steps) is not int or steps < 1:
            raise UsageError(f"TransitionRate: steps={steps!r}; give the optimizer steps of the whole schedule")
        if gain is not None and not 0.0 < gain < math.inf:
            raise UsageError(f"TransitionRate: gain={gain!r}; it must be a number above 0")
        if smoothing is not None and not 0.0 <= smoothing < 1.0:
            raise UsageError(f"TransitionRate: smoothing={smoothing!r}; m lies in 0 .. 1, e.g. 0.99")
        if first > LARGE:
            warnings.warn(
                f"TransitionRate: first={first:g} lets {first:.0%} of the weights change code in a step; it is "
                "a share, not percent: 0.002 is usual",
                stacklevel=2,
            )
        self.optimizer = unwrapped(optimizer)
        if not isinstance(self.optimizer, OPTIMIZERS):
            raise UsageError(
                f"TransitionRate: the optimizer is a {type(self.optimizer).__name__}; it is for SGD, Adam and AdamW"
            )
        if any(isinstance(getattr(hook, "__self__", None), TransitionRate) for hook in _pre_hooks(self.optimizer)):
            raise UsageError("TransitionRate: this optimizer has one already; call its close() first")
        groups = [g for g in self.optimizer.param_groups if str(g.get("name", "")).partition("/")[0] == LOW_BIT]
        self.layers = _low_bit_layers(model, groups)
        self.weights = sum(layer.weight.numel() for layer, _ in self.layers)
        self._held = {id(layer.weight) for layer, _ in self.layers}
        rates = {float(group.get("initial_lr", group["lr"])) for group in groups}
        if len(rates) != 1 or not min(rates) > 0.0:
            found = sorted(rates)
            raise UsageError(f"TransitionRate: the groups {LOW_BIT!r} need one learning rate above 0, not {found}")
        self.first, self.steps, self.fix_steps = first, steps, fix_steps
        self.lr = rates.pop()
        for group in groups:
            group.setdefault("initial_lr", self.lr)  # which the optimizer's state dict then has, as with schedulers
        self.gain = self.lr * PAPER_STEPS / max(steps, SHORT) if gain is None else gain
        self.smoothing = max(0.0, 1.0 - max(0.01, 40.0 / steps)) if smoothing is None else smoothing
        self.rate, self.done = 0.0, 0
        self.trace: list[tuple[int, float, float, float]] = []
        self._before: list[Tensor] = []
        self._fixed: list[Tensor] = []
        self._grids: list[ops.Grid] = []
        self._learned = [p for _, quantizer in self.layers for p in quantizer.parameters()]
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def target(self) -> float:
        """Return R for the next step."""
        return self.first * 0.5 * (1.0 + math.cos(math.pi * min(1.0, self.done / self.steps)))

    def numbers(self) -> dict[str, float]:
        """Return K, R and U for a log: ``transition_rate``, ``transition_target``, ``transition_lr``."""
        return {"transition_rate": self.rate, "transition_target": self.target, "transition_lr": self.lr}

    def close(self) -> None:
        """Remove the hooks: from the next step on a scheduler decides over the optimizer's groups, from U on."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints, with what is fixed at construction, to be compared."""
        return {
            "first": self.first, "steps": self.steps, "gain": self.gain, "smoothing": self.smoothing,
            "fix_steps": self.fix_steps, "done": self.done, "rate": self.rate, "lr": self.lr,
            "trace": [list(point) for point in self.trace],
        }  # fmt: skip

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. Raises: UsageError if it is of another schedule."""
        fixed = ("first", "steps", "gain", "smoothing", "fix_steps")
        found = Entry(dict(state_dict), "the state of TransitionRate").record((*fixed, "done", "rate", "lr", "trace"))
        for name in fixed:
            saved, here = found[name].value, getattr(self, name)
            if saved != here:
                raise UsageError(
                    f"TransitionRate: the saved state has {name}={shown(saved)}, this one {name}={here!r}; "
                    "resume with the schedule that was begun; make it before the optimizer's state is loaded"
                )
        done, rate, lr = found["done"].integer(0, 2**62), found["rate"].number(0.0, 1.0), found["lr"].number(0.0, 1e9)
        trace = [[n.number() for n in point.items(4)] for point in found["trace"].items(POINTS)]
        found["trace"].require(all(len(point) == 4 for point in trace), "a point has four numbers")
        self.done, self.rate, self.lr = done, rate, lr
        self.trace = [(int(t), k, r, u) for t, k, r, u in trace]
        self._set_lr()

    # ---- around every optimizer step ----

    def _groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's own dictionaries, looked up each time: its load_state_dict replaces them."""
        return [g for g in self.optimizer.param_groups if any(id(p) in self._held for p in g["params"])]

    def _set_lr(self) -> None:
        for group in self._groups():
            lr = group["lr"]
            # a tensor may be shared with other groups, so another takes its place
            group["lr"] = torch.full_like(lr, self.lr) if isinstance(lr, Tensor) else self.lr

    def _marks(self) -> list[Tensor]:
        """Return a tensor a layer that changes where a code does: while steps are fixed, the quantized weight."""
        if not self.fix_steps:
            return [_codes(layer, quantizer.grid()) for layer, quantizer in self.layers]
        layers = [layer for layer, _ in self.layers]
        return [ops.fake_quantize_with(layer.rows(), grid) for layer, grid in zip(layers, self._grids, strict=True)]

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if any(layer.weight_quantizer is not quantizer for layer, quantizer in self.layers):
            raise UsageError("TransitionRate: the model was prepared anew; close() this one and make another")
        self._set_lr()
        if self.fix_steps:
            self._fixed = torch._foreach_add(self._learned, 0.0)  # pyright: ignore  (copies)
            self._grids = [quantizer.grid() for _, quantizer in self.layers]
        self._before = self._marks()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.fix_steps:
            torch._foreach_copy_(self._learned, self._fixed)  # pyright: ignore
        before, self._before = self._before, []
        # a fused optimizer is called by the loss scaler even where it then skips the step itself
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            return
        # what is NaN has no code
        changed = [((old != new) & (new == new)).sum() for old, new in zip(before, self._marks(), strict=True)]
        self._count(int(torch.stack([count.to(changed[0].device) for count in changed]).sum()))

    def _count(self, changed: int) -> None:
        """Compute the equations above for one step, in which `changed` weights got another code."""
        target = self.target
        self.rate = self.smoothing * self.rate + (1.0 - self.smoothing) * (changed / self.weights)
        self.lr = max(0.0, self.lr + self.gain * (target - self.rate))
        if self.done % -(-self.steps // POINTS) == 0 and len(self.trace) < POINTS:
            self.trace.append((self.done, self.rate, target, self.lr))
        self.done += 1
        if self.done == self.steps + 1:
            warnings.warn(
                f"TransitionRate: more optimizer steps than steps={self.steps}; R is 0, so the low-bit weights stay as "
                "they are. steps counts those of the whole training",
                stacklevel=2,
            )


def _codes(layer: Any, grid: ops.Grid) -> Tensor:
    """Return the codes of a layer's weight as float32 integers; of NaN, NaN."""
    kind = {"axis": grid.axis, "group_size": grid.group_size, "offset": grid.offset}
    return reference.codes(layer.rows(), grid.step, grid.q_min, grid.q_max, **kind)


def _pre_hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    return list(optimizer._optimizer_step_pre_hooks.values())


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """Return the torch optimizer inside Accelerate's or Lightning's, whose own hooks are never called."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"TransitionRate: the optimizer is a {type(optimizer).__name__}; give a torch optimizer")
    return optimizer


def _low_bit_layers(model: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[Any, Quantizer]]:
    """Return the layers whose weights are in `groups`, a shared weight once.

    Raises: UsageError where `groups` do not hold the low-bit weights of `model` and nothing else.
    """
    held: set[Tensor] = {p for group in groups for p in group["params"] if p.requires_grad}
    if not any(is_low_bit(layer) for _, layer in weight_quantizers(model).values()):
        raise UsageError("TransitionRate: no weight here has fewer than 8 bits, so there is nothing to schedule")
    if not held:
        raise UsageError(
            f"TransitionRate: the optimizer has no group {LOW_BIT!r} with weights; build it over "
            "lsquant.param_groups(model, lr, low_bit=True), after prepare"
        )
    layers: dict[Tensor, tuple[Any, Quantizer]] = {}
    for quantizer, (name, layer) in weight_quantizers(model).items():
        if not is_low_bit(layer) or not layer.weight.requires_grad:
            continue
        if layer.weight not in held:
            raise UsageError(
                f"TransitionRate: the weight of layer {name!r} is not in the optimizer's group {LOW_BIT!r}; build the "
                "optimizer over lsquant.param_groups(model, lr, low_bit=True), after prepare"
            )
        layers.setdefault(layer.weight, (layer, quantizer.require_initialized()))
    if len(layers) != len(held):
        raise UsageError(
            f"TransitionRate: {len(held - layers.keys())} of the {len(held)} weights in the optimizer's group "
            f"{LOW_BIT!r} are not the model's low-bit weights: build the optimizer anew after prepare"
        )
    return list(layers.values())
