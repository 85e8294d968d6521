"""Runs of the fuzzer over many seeds: each network by itself, and the ONNX files of many together."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from helpers.fuzz_check import Failure, Refused, Trained, check, tags
from helpers.fuzz_draw import draw
from helpers.fuzz_nets import Case, Invalid
from helpers.fuzz_onnx import check_alone, check_together, goes_alone
from helpers.fuzz_shrink import shrink


def failure_of(case: Case, folder: Path, onnx: bool = True) -> Failure | None:
    """Return how one case fails, with an ONNX file of its own; None where it does not."""
    try:
        found = check(case, folder)
        if onnx:
            _onnx([found], folder)
    except Failure as failure:
        return failure
    except (Invalid, Refused):
        return None
    return None


def _onnx(group: list[Trained], folder: Path) -> None:
    path = folder / "model.onnx"
    if len(group) == 1 and goes_alone(group[0]):
        check_alone(group[0], path)
    else:
        check_together(group, path)


class Run:
    """What a run found.

    counts: "seeds", "invalid" (PyTorch cannot run the network), "refused" (all of it), "checked", "files", and a count
        for each stage at which something was refused.
    failures: (case, failure).
    """

    def __init__(self, folder: Path, onnx_every: int = 1, leave_out: Iterable[str] = (), loud: bool = False) -> None:
        self.folder, self.onnx_every, self.leave_out, self.loud = folder, onnx_every, set(leave_out), loud
        self.counts: Counter[str] = Counter()
        self.failures: list[tuple[Case, Failure]] = []

    def over(self, seeds: Iterable[int]) -> Run:
        """Check the networks of these seeds.  The ONNX files of one profile are one."""
        groups: dict[str, list[Trained]] = {}
        for seed in seeds:
            if self.loud:
                print(f"\rseed {seed}, {len(self.failures)} failed ", end="", file=sys.stderr, flush=True)
            case = draw(seed)
            if self.leave_out & tags(case):
                self.counts["left out"] += 1
                continue
            self.counts["seeds"] += 1
            found = self._checked(case)
            if found is None or seed % self.onnx_every:
                continue
            if goes_alone(found):
                self._files([found])
            else:
                groups.setdefault(case.profile, []).append(found)
        for group in groups.values():
            self._files(group)
        return self

    def _checked(self, case: Case) -> Trained | None:
        try:
            found = check(case, self.folder)
        except Failure as failure:
            self.failures.append((case, failure))
        except Invalid:
            self.counts["invalid"] += 1
        except Refused:
            self.counts["refused"] += 1
        else:
            self.counts["checked"] += 1
            self.counts.update(f"refused: {stage}" for stage in found.refused)
            return found
        return None

    def _files(self, group: list[Trained]) -> None:
        """Check a file of several networks; where it fails, one by one."""
        try:
            _onnx(group, self.folder)
            self.counts["files"] += len(group)
        except (Failure, Refused) as failure:
            if len(group) > 1:
                before = len(self.failures)
                for found in group:
                    self._files([found])
                if len(self.failures) == before and isinstance(failure, Failure):
                    self.failures.append((group[0].case, failure))  # only together
            elif isinstance(failure, Failure):
                self.failures.append((group[0].case, failure))
        if len(group) == 1:
            self.counts.update(f"refused: {stage}" for stage in group[0].refused if stage.startswith("onnx"))

    def report(self, shrink_first: int = 3) -> Iterator[str]:
        """Yield a paragraph for each failure; the first ones are shrunk."""
        for k, (case, failure) in enumerate(self.failures):
            yield f"seed {case.seed} fails: {failure}"
            if k < shrink_first:
                onnx = failure.stage in ("onnx", "onnx file", "verify")
                case, failure = shrink(case, failure, lambda smaller, onnx=onnx: failure_of(smaller, self.folder, onnx))
            yield f"{case.to_json()}\n{failure}\n"


def told(run: Run) -> str:
    """What a failing test prints."""
    parts = list(run.report(1))
    return "\n".join([f"{len(run.failures)} networks fail; reproduce: python tests/fuzz/run.py SEED", *parts])
