"""The verdict: four levels, each with counts, the largest difference and the worst layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

LEVELS = ("none", "weights", "layers", "codes", "outputs")
"""From weakest to strongest; a level holds only if all lower ones hold."""


@dataclass(frozen=True)
class Check:
    """One comparison of a file with the trained model.

    level: which level it belongs to.
    what: what was compared.
    compared, mismatches: elements; a mismatch is any difference in the bits of the value (two NaN are equal).
    largest: largest absolute difference, infinite where shapes or finiteness differ.
    worst: name of the layer (or output) with the most mismatches, "" where there are none.
    failing: number of layers (or outputs) with a mismatch, of ``parts``.
    """

    level: str
    what: str
    compared: int = 0
    mismatches: int = 0
    largest: float = 0.0
    worst: str = ""
    failing: int = 0
    parts: int = 0


@dataclass
class Differences:
    """Counts the differences of one comparison, part by part; ``check`` sums them up.

    level, what: as in Check.
    parts: name -> [compared, mismatches, largest].
    """

    level: str
    what: str
    parts: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, got: np.ndarray, expected: np.ndarray) -> None:
        """Compare two arrays of one dtype bit by bit."""
        part = self.parts.setdefault(name, [0, 0, 0.0])
        part[0] += expected.size
        if got.shape != expected.shape or got.dtype != expected.dtype:
            part[1] += max(expected.size, 1)
            part[2] = float("inf")
            return
        wrong = different(got, expected)
        count = int(np.count_nonzero(wrong))
        part[1] += count
        if count:
            a, b = got[wrong].astype(np.float64), expected[wrong].astype(np.float64)
            gap = np.abs(a - b)
            part[2] = max(part[2], float("inf") if np.isnan(gap).any() else float(gap.max()))

    def check(self) -> Check:
        """Return the sum over all parts."""
        failing = {name: part for name, part in self.parts.items() if part[1]}
        worst = max(failing, key=lambda name: (failing[name][1], failing[name][2]), default="")
        return Check(
            self.level,
            self.what,
            int(sum(part[0] for part in self.parts.values())),
            int(sum(part[1] for part in self.parts.values())),
            max((part[2] for part in self.parts.values()), default=0.0),
            worst or ("(the model)" if failing else ""),
            len(failing),
            len(self.parts),
        )


def different(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return where two arrays of one shape and dtype differ in their bits; NaN equals NaN, +0 differs from -0."""
    if not np.issubdtype(a.dtype, np.floating):
        return a != b
    bits = np.dtype(f"uint{8 * a.dtype.itemsize}")
    return (np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)) & ~(np.isnan(a) & np.isnan(b))


@dataclass(frozen=True)
class Verdict:
    """At which level a file agrees with the trained model in one runtime.

    level: the strongest level that holds.
    exact: whether that is "outputs".
    path, profile: the file, and the format it has.
    runtime: with its version.
    session: the options used.
    layers, batches, samples: how many were compared.
    checks: in the order of the levels; a level without a check was not compared and does not hold.
    plain: the verdict of the same file in a session without any option.
    """

    path: str
    profile: str
    runtime: str
    session: dict[str, str]
    layers: int
    batches: int
    samples: int
    checks: tuple[Check, ...]
    plain: Verdict | None = None

    @property
    def level(self) -> str:
        """The strongest level at which, and below which, nothing differs."""
        reached = "none"
        for level in LEVELS[1:]:
            checks = [check for check in self.checks if check.level == level]
            if not checks or any(check.mismatches for check in checks):
                break
            reached = level
        return reached

    @property
    def exact(self) -> bool:
        """Bit-equal outputs, and everything below."""
        return self.level == LEVELS[-1]

    def reaches(self, level: str) -> bool:
        """Tell whether ``level``, one of LEVELS, holds."""
        return LEVELS.index(self.level) >= LEVELS.index(level)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        fields = {name: getattr(self, name) for name in ("level", "exact", "path", "profile", "runtime", "session")}
        counts = {name: getattr(self, name) for name in ("layers", "batches", "samples")}
        checks = [asdict(check) for check in self.checks]
        return {**fields, **counts, "checks": checks, "plain": None if self.plain is None else self.plain.to_dict()}

    def __str__(self) -> str:
        said = "exact: equal outputs, bit for bit" if self.exact else f"not exact; level reached: {self.level}"
        lines = [
            f"{self.path} (profile {self.profile}) in {self.runtime}: {said}",
            f"{self.layers} quantized layers, {self.samples} samples in {self.batches} batches",
            *_table(self.checks),
        ]
        options = " ".join(f"{k}={v}" for k, v in self.session.items()) or "no options"
        lines.append(f"session: {options}")
        if self.plain is not None and self.plain.checks == self.checks:
            lines.append("plain session: the same in every count")
        elif self.plain is not None:
            lines += [f"plain session: level {self.plain.level}", *_table(self.plain.checks)]
        return "\n".join(lines)


def _table(checks: tuple[Check, ...]) -> list[str]:
    rows = [("level", "compared", "elements", "mismatches", "largest difference", "worst layer")]
    for check in checks:
        worst = f"{check.worst} ({check.failing} of {check.parts} differ)" if check.mismatches else ""
        counts = (f"{check.compared:,}", f"{check.mismatches:,}", f"{check.largest:.3g}")
        rows.append((check.level, check.what, *counts, worst))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    align = [str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
    return ["  " + "  ".join(f(c, w) for f, c, w in zip(align, row, widths, strict=True)).rstrip() for row in rows]
