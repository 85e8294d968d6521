"""What a task is: a network, its data and its measure; and the settings a run of it is described by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol

import torch
from torch import nn

from lsquant._util.errors import UsageError

Split = Literal["train", "calibration", "test"]


@dataclass(frozen=True)
class Settings:
    """Everything beside the task and the recipe that decides a run's numbers; written to config.toml.

    The float phase is left out when a float checkpoint is given. Learning rates fall to zero along a cosine;
    `step_lr` None means `lr`; `warmup` counts iterations; `distill` trains against the float network as well;
    `calibration_batches`: how many batches set the activation steps; `threads`: a run's bits depend on it, None takes
    torch's present number.
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
    distill: bool = False
    clip_norm: float | None = None
    calibration_batches: int = 32
    threads: int | None = None

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "float_epochs": 0, "epochs": 0, "calibration_batches": 1, "threads": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"{name}={value}: it must be at least {low}")
        for name in ("lr", "float_lr", "step_lr", "momentum", "weight_decay", "float_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise UsageError(f"{name}={value}: it must be a number from 0")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Raises: UsageError naming an unknown setting."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"unknown setting {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**values)


class Task(Protocol):
    """A reproducible job. `name`: as on the command line; `options`: what else it was made from, for config.toml."""

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
