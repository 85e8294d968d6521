"""The settings of a run: every number beside the task and the recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant.quantizer import Method

Optimizer = Literal["sgd", "adam", "adamw"]
Autocast = Literal["bfloat16"]
"""float16 would need a loss scaler: gradients of a distillation over a vocabulary are 0 in it."""
MOST = 2**63
"""Whole numbers are below it."""

_LEAST = {
    "batch_size": 1,
    "float_epochs": 0,
    "epochs": 0,
    "calibration_batches": 1,
    "threads": 1,
    "warmup": 0,
    "bn_batches": 0,
    "progressive_epochs": 1,
    "fold_epochs": 0,
    "accumulate": 1,
}
LARGEST = 1e30
"""Of a rate or a factor: PyTorch's optimizers fail where it leaves float32."""
MOST_THREADS = 1024
"""With many more the process may crash: each needs a stack, and the operating system has a limit."""
_FROM_ZERO = (
    "lr", "float_lr", "fold_lr", "step_lr", "momentum", "weight_decay", "float_weight_decay", "distill_weight",
)  # fmt: skip
_ABOVE_ZERO = ("clip_norm", "distill_temperature")


@dataclass(frozen=True)
class Settings:
    """Hold everything beside the task and the recipe that decides a run's numbers; written to config.toml.

    A run has a float phase (left out when a float checkpoint is given) and low-bit phases. In each of them the learning
    rates rise linearly for `warmup` iterations and then fall to zero along a cosine.

    Both phases:
        seed: of every random choice
        batch_size: samples in a training batch
        momentum: of SGD
        warmup: iterations
        threads: torch's; the bits of a run depend on it; None takes the present number

    Float phase:
        float_epochs, float_lr, float_weight_decay: its length, learning rate and weight decay

    Low-bit phases:
        epochs: their number, `progressive` and `fold_epochs` included
        lr, weight_decay: of everything but the steps
        step_lr: learning rate of the steps; None means `lr` for SGD, and for Adam and AdamW 3 * `lr` times the size of
            the step (`relative_step_lr` of `param_groups`)
        weight_decay_by_bits: less decay for weights of 2 and 3 bits (`param_groups`)
        clip_norm: largest norm of the gradient; None does not clip
        accumulate: cut every batch into so many parts and add their gradients, for less memory; of both phases
        autocast: "bfloat16", the type of forward passes in training; of both phases
        optimizer: "sgd"; "adam" or "adamw", which want `lr` near 0.001
        transition_rate: share of the low-bit weights that change code in a step at the beginning, e.g. 0.002; it falls
            to 0 along a cosine and decides the learning rate of these weights (`TransitionRate`); None: `lr` does
        distill: distill from the run's own float network
        distill_weight, distill_temperature: as for `distillation_loss`; they count for another teacher too
        progressive: more bits first, e.g. (8, 4)
        progressive_epochs: epochs at each of these, taken from `epochs`
        fold_epochs: the last of `epochs`, in the integer-only form of `lsquant.fuse`; for a recipe with joins
        fold_lr: learning rate of these
        ema: decay of an average of the weights (`WeightAverage`) at the recipe's bits before `fold_epochs`, which is
            evaluated and kept
        bn_batches: training batches on which BatchNorm statistics are estimated anew at the end; 0 leaves them
        weight_init, activation_init: rule of the initial steps
        calibration_batches: batches that set the activation steps

    Raises: UsageError naming the setting that is out of range.
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
    accumulate: int = 1
    autocast: Autocast | None = None
    optimizer: Optimizer = "sgd"
    transition_rate: float | None = None
    distill: bool = False
    distill_weight: float = 1.0
    distill_temperature: float = 1.0
    progressive: tuple[int, ...] = ()
    progressive_epochs: int = 1
    fold_epochs: int = 0
    fold_lr: float = 1e-3
    ema: float | None = None
    bn_batches: int = 0
    weight_init: Method = "paper"
    activation_init: Method = "mse"
    calibration_batches: int = 32
    threads: int | None = None

    def __post_init__(self) -> None:
        self._check_types()
        object.__setattr__(self, "progressive", tuple(self.progressive))
        self._check_numbers()
        self._check_shares()
        self._check_progressive()
        words = (("weight_init", Method), ("activation_init", Method), ("optimizer", Optimizer), ("autocast", Autocast))
        for name, kind in words:
            if getattr(self, name) not in (*get_args(kind), *([None] if name == "autocast" else [])):
                raise UsageError(f"{name}={getattr(self, name)!r}: one of {', '.join(get_args(kind))}")

    def _check_types(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
            if value is None and NoneType in kinds:
                continue
            if name == "progressive":
                good = isinstance(value, (list, tuple)) and len(value) < 8 and all(type(b) is int for b in value)
                wanted = "a list of bits, e.g. [8, 4]"
            elif bool in kinds:
                good, wanted = type(value) is bool, "true or false"
            elif int in kinds:
                good, wanted = type(value) is int and abs(value) < MOST, "a whole number"
            elif float in kinds:
                good, wanted = type(value) is float or (type(value) is int and abs(value) < MOST), "a number"
            else:
                good, wanted = isinstance(value, str), "a word"
            if not good:
                raise UsageError(f"{name}={shown(value)}: it must be {wanted}")

    def _check_numbers(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name}={value}: it must be at least {least}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UsageError(f"threads={self.threads}: it must be at most {MOST_THREADS}")
        for name in _FROM_ZERO:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= LARGEST:
                raise UsageError(f"{name}={value}: it must be a number from 0 to {LARGEST:g}")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and not 0.0 < value <= LARGEST:
                raise UsageError(f"{name}={value}: it must be a number above 0, at most {LARGEST:g}")

    def _check_shares(self) -> None:
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise UsageError(f"ema={self.ema}: a decay lies between 0 and 1, e.g. 0.999")
        if self.transition_rate is not None and not 0.0 < self.transition_rate < 1.0:
            raise UsageError(f"transition_rate={self.transition_rate}: a share between 0 and 1, e.g. 0.002")

    def _check_progressive(self) -> None:
        bits = self.progressive
        if any(not 2 <= b <= 8 for b in bits) or any(a <= b for a, b in pairwise(bits)):
            raise UsageError(f"progressive={bits}: bits from 8 to 2, each fewer than before")
        if self.fold_epochs and self.last_epochs < 0:
            raise UsageError(
                f"fold_epochs={self.fold_epochs}: they are the last of epochs={self.epochs}, of which the other phases "
                "leave fewer"
            )
        if bits and self.last_epochs < 1:
            raise UsageError(
                f"progressive={bits}: {self.progressive_epochs} epochs each leave none of epochs={self.epochs} for the "
                "last bits"
            )

    @property
    def last_epochs(self) -> int:
        """Epochs at the recipe's own bits before `fold_epochs`."""
        return self.epochs - len(self.progressive) * self.progressive_epochs - self.fold_epochs

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Read the settings of a config.toml, which leaves out None. Raises: UsageError naming an unknown one."""
        known = {item.name for item in fields(cls)}
        if unknown := sorted(set(values) - known):
            said = ", ".join(name[:40] for name in unknown[:3])
            raise UsageError(f"unknown setting {said}; known are {', '.join(sorted(known))}")
        none: dict[str, Any] = {item.name: None for item in fields(cls) if "None" in str(item.type)}
        return cls(**none | values)
