"""What folding changed: the codes of the integer-only form against those of the model as it was trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, run_batch, take
from lsquant._util.nested import tensors_in
from lsquant.nn import StoredInputs
from lsquant.quantizer import Quantizer

Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class StoredChange:
    """One stored tensor.

    name: of the module that makes it.
    elements: codes that were compared.
    different: how many of them differ.
    largest: the largest difference, in codes.
    """

    name: str
    elements: int
    different: int
    largest: int

    @property
    def share(self) -> float:
        """Return the share of the codes that differ."""
        return self.different / max(self.elements, 1)


@dataclass(frozen=True)
class FoldChanges:
    """What ``fuse`` changed; prints as a table.

    stored: a row for each stored tensor that a layer or a join reads, in order of execution.
    raised: layer -> channels whose step was raised until their sums fit into int32, or their bias into float32.
    largest_output: the largest difference of an output.
    metric: (of the model as trained, of the integer-only form), means over the batches; None without a metric.
    clipped: layer -> codes -128 that became 127, negated because the target wants positive steps.
    """

    stored: tuple[StoredChange, ...]
    raised: dict[str, int]
    largest_output: float
    metric: tuple[float, float] | None
    clipped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [("stored tensor", "codes", "differ", "share", "largest")]
        for r in self.stored:
            rows.append((r.name, f"{r.elements:,}", f"{r.different:,}", f"{100 * r.share:.3f} %", str(r.largest)))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = []
        for first, *numbers in rows:
            cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        lines.append(f"largest difference of an output: {self.largest_output:.3g}")
        for name, count in self.raised.items():
            lines.append(f"{name}: the step of {count} channels was raised to keep sums in range")
        for name, count in self.clipped.items():
            lines.append(f"{name}: {count} codes of -128 became 127, negated for positive steps; narrow=True has none")
        if self.metric is not None:
            lines.append(f"metric: {self.metric[0]:.4g} as trained, {self.metric[1]:.4g} integer-only")
        return "\n".join(lines)


@torch.no_grad()
def changes(
    network: Any, batches: Iterable[Any], metric: Metric | None, max_batches: int | None, forward: Forward | None
) -> FoldChanges:
    """Run a fused network and the model in it, and compare codes and outputs; see ``FusedNetwork.changes``."""
    places = _readers(network)
    names = list(places)
    counts = {name: [0, 0, 0] for name in names}
    largest, sums, runs = 0.0, [0.0, 0.0], 0
    for batch in take(batches, max_batches):
        trained: dict[str, Tensor] = {}
        fused: dict[str, Tensor] = {}
        with ExitStack() as stack, evaluating(network), torch.compiler.set_stance("force_eager"):
            for name, (reader, place, quantizer) in places.items():
                hook = partial(_keep_codes, trained, name, place, quantizer)
                stack.callback(reader.register_forward_pre_hook(hook).remove)
                stack.callback(network.taps[name].register_forward_hook(partial(_keep, fused, name)).remove)
            outputs = run_batch(network.model, batch, forward), run_batch(network, batch, forward)
        for name in trained.keys() & fused.keys():
            distance = (trained[name].to(torch.int64) - fused[name].to(torch.int64)).abs()
            total = counts[name]
            total[0] += distance.numel()
            total[1] += int((distance > 0).sum())
            total[2] = max(total[2], int(distance.max()) if distance.numel() else 0)
        for a, b in zip(*map(tensors_in, outputs), strict=True):
            if a.numel():
                largest = max(largest, float((a.double() - b.double()).abs().max()))
        if metric is not None:
            sums = [total + float(metric(y, batch)) for total, y in zip(sums, outputs, strict=True)]
        runs += 1
    rows = tuple(StoredChange(name, *counts[name]) for name in names)
    constants = network.constants()
    raised = {name: folded.raised for name, folded in constants.items() if folded.raised}
    clipped = {name: folded.clipped for name, folded in constants.items() if folded.clipped}
    means = None if metric is None else (sums[0] / runs, sums[1] / runs)
    return FoldChanges(rows, raised, largest, means, clipped)


def _readers(network: Any) -> dict[str, tuple[nn.Module, int, Quantizer]]:
    """Return by the name of a stored tensor a module that reads it, at which place, and the tensor's quantizer."""
    found: dict[str, tuple[nn.Module, int, Quantizer]] = {}
    program, called = network.program, set()
    for reader, place, source in program.flow.ports():
        quantizer, module = program.stored[source], reader.module
        again = module in called and place == 0  # its hook would see two calls
        if place == 0 and module is not None:
            called.add(module)
        if quantizer is None or module is None or again or source.name not in network.taps:
            continue
        if isinstance(module, StoredInputs) or getattr(module, "input_quantizer", None) is not None:
            found.setdefault(source.name, (module, place, quantizer))
    return {name: found[name] for name in network.taps if name in found}


def _keep_codes(
    found: dict[str, Tensor], name: str, place: int, quantizer: Quantizer, module: nn.Module, args: tuple[Any, ...]
) -> None:
    if name not in found and len(args) > place and isinstance(args[place], Tensor):
        found[name] = quantizer.codes(args[place])


def _keep(found: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    found.setdefault(name, output)
