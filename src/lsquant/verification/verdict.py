"""The verdict: four levels, each with counts, the largest difference and the worst layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

LEVELS = ("none", "weights", "layers", "codes", "outputs")
"""From lowest to highest; a level holds only if all lower ones hold."""


@dataclass(frozen=True)
class Check:
    """One comparison of a file with the trained model.

    level: which level it belongs to.
    what: what was compared.
    compared, mismatches: elements; a mismatch is any difference in the bits of the value (two NaN are equal).
    largest: largest absolute difference, infinite where shapes, types or finiteness differ.
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

    @property
    def found(self) -> bool:
        """Whether anything differs."""
        return any(part[1] for part in self.parts.values())

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

    level: the highest level that holds.
    exact: whether that is "outputs".
    path, profile: the file, and the format it has.
    runtime: with its version.
    session: the options used.
    layers, batches, samples: how many were compared.
    checks: in the order of the levels; a level of which no element was compared does not hold.
    not_compared: layers that no batch reached, or that are not in the file because no output depends on them.
    remarks: what differs first, and what had nothing to compare.
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
    not_compared: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def level(self) -> str:
        """The highest level for which elements were compared and it and all lower ones show no difference.

        A model without a quantized input has no codes: there the level ``codes`` is passed over.
        """
        reached = "none"
        for level in LEVELS[1:]:
            checks = [check for check in self.checks if check.level == level]
            if not checks or any(check.mismatches for check in checks):
                break
            if any(check.compared for check in checks):
                reached = level
            elif level != "codes" or any(check.parts for check in checks):
                break
        return reached

    @property
    def exact(self) -> bool:
        """Bit-equal outputs, and everything below."""
        return self.level == LEVELS[-1]

    def reaches(self, level: str) -> bool:
        """Tell whether ``level``, one of LEVELS, holds."""
        return LEVELS.index(self.level) >= LEVELS.index(level)

    @property
    def other_training(self) -> bool:
        """Whether most layers hold other codes or steps in the same shapes: those of another state of this network."""
        weights = [check for check in self.checks if check.level == "weights"]
        return any(2 * check.failing > check.parts and check.largest != float("inf") for check in weights)

    def statements(self) -> list[str]:
        """Return in sentences what the counts do not say."""
        said = list(self.remarks)
        if self.other_training:
            said.append("the file holds other trained values: exported from another state of this network?")
        if self.not_compared:
            names = ", ".join(map(repr, self.not_compared[:5])) + (", ..." if len(self.not_compared) > 5 else "")
            said.append(f"not compared, for no batch or no output of the file needs them: layers {names}")
        return said

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        fields = {name: getattr(self, name) for name in ("level", "exact", "path", "profile", "runtime", "session")}
        counts = {name: getattr(self, name) for name in ("layers", "batches", "samples")}
        checks = [asdict(check) for check in self.checks]
        said = {"statements": self.statements(), "not_compared": list(self.not_compared)}
        plain = None if self.plain is None else self.plain.to_dict()
        return {**fields, **counts, "checks": checks, **said, "plain": plain}

    def __str__(self) -> str:
        said = "exact: equal outputs, bit for bit" if self.exact else f"not exact; level reached: {self.level}"
        lines = [
            f"{self.path} (profile {self.profile}) in {self.runtime}: {said}",
            f"{self.layers} quantized layers, {self.samples} samples in {self.batches} batches",
            *_table(self.checks),
            *self.statements(),
        ]
        options = " ".join(f"{k}={v}" for k, v in self.session.items()) or "no options"
        lines.append(f"session: {options}")
        if self.plain is not None and self.plain.checks == self.checks:
            lines.append("plain session: the same in every count")
        elif self.plain is not None:
            lines += [f"plain session: level {self.plain.level}", *_table(self.plain.checks), *self.plain.remarks]
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
