"""What one quantizer is asked to do: bits, sign, granularity.  Frozen, validated on construction."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from lsquant._util.entry import shown
from lsquant._util.errors import UsageError

MIN_BITS, MAX_BITS = 2, 8
MAX_GROUP = 2**40
GRANULARITIES = ("tensor", "channel", "group")
FORMER = {"dynamic": False}
"""Fields that earlier versions had, each with the only value it could take; files that contain them are read."""
Granularity = Literal["tensor", "channel", "group"]
STEP_DTYPES = ("float32", "float16", "bfloat16")
StepDtype = Literal["float32", "float16", "bfloat16"]
CONTAINERS = ("uint8", "int8", "symmetric")
SYMMETRIC_BITS = 7
"""Unsigned codes in int8 with zero point 0 have at most so many bits."""
Container = Literal["uint8", "int8", "symmetric"]


@dataclass(frozen=True)
class QuantSpec:
    """The specification of a quantizer.

    signed b bits: codes ``-2^(b-1) .. 2^(b-1)-1``; unsigned: ``0 .. 2^b-1``.

    bits: 2 to 8.
    signed: True, False, or None: calibration decides, True when any value is below 0.
    narrow: drop the lowest signed code (2 bits narrow = ternary); implies signed.
    granularity: one step per "tensor", per output "channel", or per "group".
    group_size: neighbours along the flattened input dimension of a weight that share a step, for "group".
    offset: LSQ+'s learned offset; implies unsigned unless ``signed=True``.
    step_dtype: the type in which a file will hold the step, "float32", "float16" (GGUF) or "bfloat16".  Every forward
        pass uses the step rounded to it, so that what ships is what was trained; the parameter stays float32.
    container: how files of integer-only networks hold stored tensors: "uint8"; "int8", the same codes; or "symmetric",
        int8 with zero point 0, in which unsigned codes have at most 7 bits.  ``Recipe(target=...)`` sets it.
    Raises: UsageError naming the field, its value and what is allowed.

    >>> QuantSpec(4, signed=True).q_min, QuantSpec(4, signed=True).q_max
    (-8, 7)
    """

    bits: int
    signed: bool | None = None
    narrow: bool = False
    granularity: Granularity = "tensor"
    group_size: int | None = None
    offset: bool = False
    step_dtype: StepDtype = "float32"
    container: Container = "uint8"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise UsageError(
                f"QuantSpec: bits={shown(self.bits)}; bits must be an integer from {MIN_BITS} to {MAX_BITS}. "
                "To leave a layer in floating point give None instead of a QuantSpec."
            )
        if self.signed is not None and type(self.signed) is not bool:
            said = shown(self.signed)
            raise UsageError(f"QuantSpec: signed={said}; use True, False or None (decided by calibration)")
        for name in ("narrow", "offset"):
            if type(value := getattr(self, name)) is not bool:
                raise UsageError(f"QuantSpec: {name}={shown(value)}; use True or False")
        if self.narrow and self.signed is False:
            raise UsageError("QuantSpec: narrow=True drops the lowest signed level and cannot go with signed=False")
        if not isinstance(self.granularity, str) or self.granularity not in GRANULARITIES:
            raise UsageError(f"QuantSpec: granularity={shown(self.granularity)}; use one of {', '.join(GRANULARITIES)}")
        if not isinstance(self.step_dtype, str) or self.step_dtype not in STEP_DTYPES:
            raise UsageError(f"QuantSpec: step_dtype={shown(self.step_dtype)}; use one of {', '.join(STEP_DTYPES)}")
        if self.offset and self.step_dtype != "float32":
            raise UsageError(f"QuantSpec: step_dtype={self.step_dtype!r} and offset=True do not go together")
        if (self.granularity == "group") != (self.group_size is not None):
            raise UsageError(
                f"QuantSpec: granularity={self.granularity!r} with group_size={shown(self.group_size)}; "
                "group_size goes with granularity='group' and only with it"
            )
        if self.group_size is not None and (type(self.group_size) is not int or not 1 <= self.group_size <= MAX_GROUP):
            raise UsageError(f"QuantSpec: group_size={shown(self.group_size)}; it must be a positive integer")
        if self.signed is None and (self.narrow or self.offset):
            object.__setattr__(self, "signed", bool(self.narrow))
        self._check_container()

    def _check_container(self) -> None:
        container = self.container
        if not isinstance(container, str) or container not in CONTAINERS:
            raise UsageError(f"QuantSpec: container={shown(container)}; use one of {', '.join(CONTAINERS)}")
        if container == "symmetric" and self.offset:
            raise UsageError(
                "QuantSpec: offset=True does not go with zero points that are all 0 (container='symmetric', "
                "target='tensorrt'); leave the offset out, or use target='onnxruntime' or 'xnnpack'"
            )
        if container == "symmetric" and self.signed is False and self.bits > SYMMETRIC_BITS:
            raise UsageError(
                f"QuantSpec: {self.bits} unsigned bits do not fit int8 with zero point 0 (container='symmetric', "
                f"target='tensorrt'); use bits={SYMMETRIC_BITS}, or signed=None: calibration then takes "
                f"{SYMMETRIC_BITS} bits where no value is below 0"
            )

    @property
    def q_min(self) -> int:
        """Return the lowest code.  Raises: UsageError while the sign is undecided."""
        if not self._decided():
            return 0
        return -(2 ** (self.bits - 1)) + int(self.narrow)

    @property
    def q_max(self) -> int:
        """Return the highest code.  Raises: UsageError while the sign is undecided."""
        return 2 ** (self.bits - 1) - 1 if self._decided() else 2**self.bits - 1

    def _decided(self) -> bool:
        if self.signed is None:
            raise UsageError(
                f"QuantSpec(bits={self.bits}): the sign is undecided, so there are no bounds yet; "
                "calibrate first, or give signed=True or signed=False"
            )
        return self.signed

    def decide(self, signed: bool) -> QuantSpec:
        """Return the same specification with the sign decided; a sign that was asked for stays.

        Unsigned in the container "symmetric" has at most 7 bits.

        >>> QuantSpec(8, container="symmetric").decide(False).q_max
        127
        """
        if self.signed is not None:
            return self
        bits = self.bits if signed or self.container != "symmetric" else min(self.bits, SYMMETRIC_BITS)
        return replace(self, bits=bits, signed=signed)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that differ from the defaults, and always ``bits``."""
        defaults = {f.name: f.default for f in fields(self)}
        return {k: v for k, v in asdict(self).items() if k == "bits" or v != defaults[k]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> QuantSpec:
        """Read what ``to_dict`` wrote, this version's or an earlier one's.

        Raises: UsageError for an unknown field, one of ``FORMER`` with another value, or a value that is not allowed.
        """
        former = {k for k, v in FORMER.items() if type(values.get(k)) is type(v) and values[k] == v}
        values = {k: v for k, v in values.items() if k not in former}
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise UsageError(f"QuantSpec: unknown field {shown(unknown[0])}; known are {', '.join(sorted(known))}")
        if "bits" not in values:
            raise UsageError("QuantSpec: the field 'bits' is missing")
        return cls(**values)

    def __str__(self) -> str:
        sign = {True: "signed", False: "unsigned", None: "sign undecided"}[self.signed]
        parts = [f"{self.bits} bit", sign + (" narrow" if self.narrow else "")]
        parts.append(f"per {self.granularity}" + (f" of {self.group_size}" if self.group_size else ""))
        parts += ["offset"] if self.offset else []
        parts += [f"steps in {self.step_dtype}"] if self.step_dtype != "float32" else []
        parts += [self.container] if self.container != "uint8" else []
        return ", ".join(parts)
