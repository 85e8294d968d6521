"""What ``check`` says of an optimizer: does it train every step and weight, and decay no step?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lsquant._util.errors import UsageError
from lsquant.diagnostics import symptoms
from lsquant.diagnostics.findings import Finding, finding, findings
from lsquant.nn import quantized_layers, quantizers
from lsquant.quantizer import Quantizer


def has_started(optimizer: Any) -> bool:
    """Tell whether an optimizer, or one of a list, has state: it has made a step."""
    return any(getattr(one, "state", None) for one in _listed(optimizer))


def check_optimizer(model: nn.Module, optimizer: Any, sound: dict[str, Quantizer]) -> Iterator[Finding]:
    """Compare what an optimizer holds with the parameters of the model.

    optimizer: a torch optimizer or a list of them.
    sound: quantizers by name whose steps are set and finite.
    Raises: UsageError for an invalid optimizer.
    """
    groups = [group for one in _listed(optimizer) for group in one.param_groups]
    held: dict[Tensor, dict[str, Any]] = {p: group for group in groups for p in group["params"]}
    for name, q in sound.items():
        if q.step.requires_grad and q.step in held:
            yield from findings(name, symptoms.of_learning_rate(q, held[q.step]))
    steps = [(f"{n}.{k}", p) for n, q in quantizers(model) for k, p in q.named_parameters(recurse=False)]
    without = [name for name, p in steps if p.requires_grad and p not in held]
    none_held = len(without) > 1 and not any(p in held for _, p in steps)
    if none_held:  # one reason, one finding
        text = f"it has none of the model's {len(without)} steps and offsets, {without[0]!r} the first: none is learned"
        yield finding("step_missing", "optimizer", f"{text}; it was built before prepare", steps=without)
    missing = none_held
    learning = any(_rate(group) > 0 for group in groups)
    for name, q in quantizers(model):
        for key, p in q.named_parameters(recurse=False):
            where, group = f"{name}.{key}", held.get(p, {})
            if not p.requires_grad:
                yield finding("step_frozen", where, "it does not require a gradient, so it is not learned")
            elif not group:
                missing = True
                if none_held:
                    continue
                yield finding("step_missing", where, "the optimizer does not have it: it is never learned")
            elif learning and not _rate(group):
                yield finding("step_frozen", where, "its learning rate is 0 while others learn", lr=0.0)
            if decay := float(group.get("weight_decay", 0.0)):
                yield finding("step_decayed", where, f"weight decay {decay:g} pulls it to 0", weight_decay=decay)
    for name, layer in quantized_layers(model):
        if layer.weight.requires_grad and layer.weight not in held:
            missing = True
            yield finding("weight_missing", f"{name}.weight".lstrip("."), "the optimizer does not have it")
    parameters = set(model.parameters())
    stale = [tuple(p.shape) for group in groups for p in group["params"] if p not in parameters]
    if stale:
        text = f"{len(stale)} of its parameters are not the model's (shapes {', '.join(map(str, stale[:3]))})"
        text += ", and some of the model's are not in it" if missing else ": right only if another module owns them"
        yield finding("stale_parameters", "optimizer", text, None if missing else "note", shapes=stale)


def _rate(group: dict[str, Any]) -> float:
    return float(group.get("lr", 1.0))


def _listed(optimizer: Any) -> list[Any]:
    several = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in several:
        if not hasattr(one, "param_groups"):
            kind = type(one).__name__
            raise UsageError(f"check: the optimizer is a {kind}; give a torch optimizer, or a list of them")
    return several
