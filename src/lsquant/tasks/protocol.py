"""What a task is: a network, its data and its measure; and the settings a run of it is described by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import inf
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

from lsquant._util.errors import UsageError
from lsquant.quantizer import Method

Split = Literal["train", "calibration", "test"]
Optimizer = Literal["sgd", "adam", "adamw"]


@dataclass(frozen=True)
class Settings:
    """Everything beside the task and the recipe that decides a run's numbers; written to config.toml.

    The float phase is left out when a float checkpoint is given. In every phase learning rates rise for `warmup`
    iterations and fall to zero along a cosine. `clip_norm`, the largest norm of the gradient, and all below are for low
    bits alone:
    optimizer: "sgd", with `momentum`; "adam" or "adamw", which want `lr` near 0.001. step_lr: of the steps; None means
        `lr` for SGD, and for the others 3 * `lr` times the size of the step (`relative_step_lr` of `param_groups`).
    transition_rate: the share of the low-bit weights that change code in a step at the beginning, e.g. 0.002; it falls
        to 0 along a cosine, and decides the learning rate of these weights (`TransitionRate`). None: `lr` does.
    distill: train against the float network as well; its weight and temperature are those of `distillation_loss`, and
        count for another teacher too.
    progressive, progressive_epochs: more bits first, e.g. (8, 4), each for so many of the `epochs`.
    ema: decay of an average of the weights (`WeightAverage`) in the last phase, which is evaluated and kept.
    bn_batches: BatchNorm statistics are estimated anew on so many training batches at the end; 0: they are not.
    weight_init, activation_init: the rule of the initial steps. calibration_batches: how many set those of activations.
    threads: a run's bits depend on it; None takes torch's present number.
    """

    seed: int = 0
    batch_size: int = 64
    momentum: float = 0.9
    float_epochs: int = 30
    float_lr: float = 0.1
    float_weight_decay: float = 1e-4
    epochs: int = 30
    lr: float = 0.01
    step_lr: float | None = None
    weight_decay: float = 1e-4
    weight_decay_by_bits: bool = False
    warmup: int = 0
    clip_norm: float | None = None
    optimizer: Optimizer = "sgd"
    transition_rate: float | None = None
    distill: bool = False
    distill_weight: float = 1.0
    distill_temperature: float = 1.0
    progressive: tuple[int, ...] = ()
    progressive_epochs: int = 1
    ema: float | None = None
    bn_batches: int = 0
    weight_init: Method = "paper"
    activation_init: Method = "mse"
    calibration_batches: int = 32
    threads: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "progressive", tuple(self.progressive))
        least = {"batch_size": 1, "float_epochs": 0, "epochs": 0, "calibration_batches": 1, "threads": 1}
        for name, low in (least | {"warmup": 0, "bn_batches": 0, "progressive_epochs": 1}).items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name}={value}: it must be at least {low}")
        rates = ("lr", "float_lr", "step_lr", "momentum", "weight_decay", "float_weight_decay", "distill_weight")
        for name in (*rates, "clip_norm", "distill_temperature"):
            value = getattr(self, name)
            if value is not None and not (0.0 <= value < inf and (value or name in rates)):
                raise UsageError(f"{name}={value}: it must be a number {'from' if name in rates else 'above'} 0")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise UsageError(f"ema={self.ema}: a decay lies between 0 and 1, e.g. 0.999")
        if self.transition_rate is not None and not 0.0 < self.transition_rate < 1.0:
            raise UsageError(f"transition_rate={self.transition_rate}: a share between 0 and 1, e.g. 0.002")
        bits = self.progressive
        if any(not 2 <= b <= 8 for b in bits) or any(a <= b for a, b in pairwise(bits)):
            raise UsageError(f"progressive={bits}: bits from 8 to 2, each fewer than before")
        if bits and self.last_epochs < 1:
            raise UsageError(
                f"progressive={bits}: {self.progressive_epochs} epochs each leave none of epochs={self.epochs} for the "
                "last bits"
            )
        for name, kind in (("weight_init", Method), ("activation_init", Method), ("optimizer", Optimizer)):
            if getattr(self, name) not in get_args(kind):
                raise UsageError(f"{name}={getattr(self, name)!r}: one of {', '.join(get_args(kind))}")

    @property
    def last_epochs(self) -> int:
        """Epochs at the recipe's own bits."""
        return self.epochs - len(self.progressive) * self.progressive_epochs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """From a config.toml, which leaves out what is None. Raises: UsageError naming an unknown setting."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        none: dict[str, Any] = {item.name: None for item in fields(cls) if "None" in str(item.type)}
        return cls(**none | values)


class Task(Protocol):
    """A reproducible job. `name`: as on the command line; `options`: what else it was made from, for config.toml.

    A task may have one method more, `architectures() -> dict[str, Callable[[], nn.Module]]`: by name, the networks that
    a teacher's checkpoint may be of; the one whose state dict has its keys and shapes is taken. Without it a teacher is
    a `model()`.
    """

    name: str
    options: dict[str, Any]
    settings: Settings

    def model(self) -> nn.Module:
        """A float network with fresh weights, drawn from torch's global generator."""
        ...

    def example_input(self) -> torch.Tensor:
        """One input: what `prepare` and the exporters are given."""
        ...

    def batches(self, split: Split, *, batch_size: int, seed: int = 0, epoch: int = 0) -> Iterable[Any]:
        """Batches (input, target). "train": shuffled, and augmented where the task does so, by (seed, epoch);
        "calibration": the training data in an order given by the seed, as in evaluation; "test": in order."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """The number of training batches of an epoch."""
        ...

    def metric(self, model: nn.Module) -> dict[str, float]:
        """The measures on the test data; the first one is what the task is judged by. The model's mode is restored."""
        ...
