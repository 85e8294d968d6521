"""``check``: what is wrong with a prepared model, its optimizer or its data, in plain words, with the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from lsquant._util.batches import Forward, trained_model, unwrapped
from lsquant._util.errors import UsageError
from lsquant._util.tensors import on_meta
from lsquant.dataflow import dataflow
from lsquant.diagnostics import symptoms
from lsquant.diagnostics.findings import SEVERITIES, Finding, Severity, finding, findings
from lsquant.diagnostics.optimizer_checks import check_optimizer, has_started
from lsquant.diagnostics.value_checks import check_values
from lsquant.joining import STORED
from lsquant.nn import float_type, quantized_layers, quantized_type, quantizers
from lsquant.program import program_of
from lsquant.quantizer import Quantizer
from lsquant.reference import GUARD_FACTOR
from lsquant.tying import weight_quantizers, weights_with_several_quantizers
from lsquant.unsupported import added_later, reason_for_layer, reason_for_module, unfit

GUARDED_OFTEN = 10
"""Training passes below the guard per step of a quantizer, from which on it is a finding."""
LARGE_SHARE = 0.1
"""Share of the weights from which on a layer that stays float is a warning; below it is a note."""

CHANGES_VALUES = {
    *("clipped", "unused_levels", "step_unset", "step_not_finite", "switched_off", "step_collapsed"),
    *("step_exploded", "step_below_guard", "negative_cut", "calibration_poor"),
}
"""Findings that change the values behind them, so that BatchNorm's statistics fit no more."""

SAID_BY = {
    "clipped": {"step_collapsed", "step_below_guard"},
    "unused_levels": {"step_exploded", "step_below_guard"},
    "dead_channels": {"unused_levels", "step_exploded"},
    "calibration_poor": {"clipped", "unused_levels", "negative_cut", "step_collapsed", "step_exploded"},
}
"""Code -> codes that say the same of a quantizer more precisely."""


def check(
    model: nn.Module,
    optimizer: Any = None,
    batches: Iterable[Any] | None = None,
    *,
    max_batches: int | None = 8,
    forward: Forward | None = None,
) -> list[Finding]:
    """Look for problems of a prepared model; an empty list says that none was found.

    The model runs in eval mode, and is left as it was.  R is not judged: far below 1 is healthy for activation steps.

    model: prepared.
    optimizer: a torch optimizer or a list of them, to check that every step is trained, and not decayed.
    batches: as for ``calibrate``, to check for clipped values, unused levels and layers that are not called.
    max_batches: read at most so many; None: all.
    forward: ``forward(model, batch)`` runs the model on one batch.
    Returns: errors first, then warnings, then notes.
    Raises: UsageError for an invalid model, optimizer or batches.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"check: the model is a {type(model).__name__}, not an nn.Module")
    compiled = any(_is_compiled(module) for module in model.modules())  # the wrapper is such a module
    model = trained_model(unwrapped(model))
    if not any(True for _ in quantizers(model)):
        return [finding("not_prepared", "", f"{type(model).__name__} has no quantizers, it is a float model")]
    if empty := on_meta(model):
        text = f"{len(empty)} of its tensors, {empty[0]!r} the first, are on the meta device and hold no values"
        return [finding("on_meta", "", text, tensors=empty)]
    stale = list(_check_state(model, compiled))  # before anything else reads the buffers
    sound = {name: q for name, q in quantizers(model) if _is_sound(q)}
    found = [*stale, *_check_steps(model), *_check_few_values(sound, model)]
    found += _check_weights(model) if batches is None else []  # else `check_values` says it of the quantizer
    found += [*_check_ties(model), *_check_float_modules(model), *_check_fast_paths(model), *_check_what_ships(model)]
    found += _check_integer_only(model)
    if optimizer is not None:
        found += check_optimizer(model, optimizer, sound)
    started = None if optimizer is None else has_started(optimizer)
    on_levels: set[str] = set()
    if batches is not None:
        found += check_values(model, batches, sound, max_batches, forward, on_levels)
    for name, symptom in symptoms.unmoved(sound, started):
        if name not in on_levels:  # such values give the step no gradient
            found += findings(name, [symptom])
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(_without_consequences(found, order), key=lambda f: SEVERITIES.index(f.severity))


def _without_consequences(found: list[Finding], order: dict[str, int]) -> list[Finding]:
    """Drop what other findings say more precisely, or bring about in BatchNorm behind them.

    order: name of a module -> its place in the order of definition.
    """
    places: dict[str, set[str]] = {}
    for f in found:
        places.setdefault(f.code, set()).add(f.where)
    dropped = {code: set().union(*(places.get(other, set()) for other in others)) for code, others in SAID_BY.items()}
    changed = [order.get(f.where, len(order)) for f in found if f.code in CHANGES_VALUES]
    first_changed = min(changed, default=len(order))
    dropped["stale_batchnorm"] = {name for name in places.get("stale_batchnorm", ()) if order[name] > first_changed}
    return [f for f in found if f.where not in dropped.get(f.code, ())]


def _is_sound(quantizer: Quantizer) -> bool:
    return quantizer.is_initialized and all(bool(torch.isfinite(p).all()) for p in quantizer.parameters())


def _check_state(model: nn.Module, compiled: bool) -> Iterator[Finding]:
    """Yield buffers that Python, compiled code or the recipe know otherwise."""
    for name, q in quantizers(model):
        if differs := q._stale_state(compiled):
            text = f"it computes with what its buffers said before ({differs}): a write that nothing shows changed them"
            yield finding("stale_state", name, text)
        if differ := q._other_bounds():
            found, wanted = differ
            truncated = all(0 <= abs(w) - abs(f) <= 1 for f, w in zip(found, wanted, strict=True))
            if not truncated:  # by an average of models
                text = f"its state was copied from codes {found[0]} to {found[1]}, it has {wanted[0]} to {wanted[1]}"
                yield finding("other_bounds", name, f"{text} ({q.spec})", state=found, model=wanted)


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")


def _check_integer_only(model: nn.Module) -> Iterator[Finding]:
    """Yield what still computes in floating point in a model whose joins are quantized."""
    joins = vars(model).get(STORED)
    if joins is None:
        return
    for step in program_of(dataflow(model, "check"), joins).floats:
        kind = "a function" if step.module is None else (float_type(step.module) or type(step.module)).__name__
        yield finding("not_integer", step.name, f"{kind} computes in floating point in the fused network")


def _check_weights(model: nn.Module) -> Iterator[Finding]:
    """Yield quantized weights that are not finite: they have no codes."""
    for name, layer in quantized_layers(model):
        bad = int((~torch.isfinite(layer.weight.detach())).sum()) if layer.weight_quantizer is not None else 0
        if bad:
            yield finding("weights_not_finite", name, f"{bad} of its weights are NaN or infinite", bad=bad)


def _check_few_values(sound: dict[str, Quantizer], model: nn.Module) -> Iterator[Finding]:
    """Find weights of integers or few values that become others, such as box decoders and one-hot projections."""
    owners = weight_quantizers(model)
    for name, q in sound.items():
        if q in owners:
            yield from findings(name, symptoms.of_few_values(q, owners[q][1].rows().detach()))


def _check_steps(model: nn.Module) -> Iterator[Finding]:
    for name, q in quantizers(model):
        step, total = q.step.detach(), q.step.numel()
        if not q.enabled:
            yield finding("switched_off", name, "it is switched off, values pass in floating point")
        if not q.is_initialized:
            yield finding("step_unset", name, "no step is set")
            continue
        if not _is_sound(q):
            bad = int((~torch.isfinite(step)).sum())
            offsets = 0 if q.offset is None else int((~torch.isfinite(q.offset.detach())).sum())
            text = f"{bad} of {total} steps are NaN or infinite" + (f", and {offsets} offsets" if offsets else "")
            yield finding("step_not_finite", name, text, bad=bad + offsets)
            continue
        below, guarded = int((step < GUARD_FACTOR * q.initial_step).sum()), int(q.guarded)
        if below:
            text = f"{below} of {total} steps fell below 2^-10 of their start, the guard holds them there"
            yield finding("step_below_guard", name, text, below=below, steps=total, smallest=float(step.min()))
        if guarded > GUARDED_OFTEN * total:
            text = f"the guard held its {total} step(s) {guarded} times in training: they jump to 0 again and again"
            yield finding("guarded_often", name, text, guarded=guarded, steps=total)
        yield from findings(name, symptoms.of_step(q))


def _check_ties(model: nn.Module) -> Iterator[Finding]:
    for name, first in weights_with_several_quantizers(model):
        text = f"it shares its weight with {first!r}, but not the quantizer"
        yield finding("tied_twice", name, text, tied=first)


def _check_float_modules(model: nn.Module) -> Iterator[Finding]:
    """Yield modules that stay float; layers that the recipe leaves in floating point are no part of these."""
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    known_types = {m: reason_for_layer(m, {}) for m in model.modules() if quantized_type(m) is not None}
    known_types |= {m: "" for _, m in quantized_layers(model)}
    layers = [m for m, reason in known_types.items() if not reason]
    known = {p for layer in layers for p in layer.parameters()}
    reported: list[str] = []  # prefixes of modules whose children are counted with them
    for name, module in model.named_modules():
        reason = known_types[module] if module in known_types else reason_for_module(module)
        alone = reason.startswith("it holds")  # parameters of its own: its children are looked at by themselves
        size = sum(p.numel() for p in module.parameters(not alone) if p.dim() > 1 and p not in known)
        if not reason or not size or any(name.startswith(prefix) for prefix in reported):
            continue
        if not alone:
            reported.append(f"{name}.".lstrip("."))
        severity: Severity = "warning" if size > LARGE_SHARE * total else "note"
        text = f"it stays float, with {size / total:.1%} of the weights: {reason}"
        yield finding("stays_float", name, text, severity, weights=size, share=size / total)


def _check_what_ships(model: nn.Module) -> Iterator[Finding]:
    """Yield quantized layers that no writer takes as they are, and layers that came after ``prepare``."""
    for name, layer in quantized_layers(model):
        if reason := unfit(layer):
            yield finding("unfit", name, reason)
    modules, total = dict(model.named_modules()), sum(p.numel() for p in model.parameters() if p.dim() > 1)
    for name in added_later(model):
        size = sum(p.numel() for p in modules[name].parameters() if p.dim() > 1)
        text = f"it came into the model after prepare, so it is not quantized, with {size / total:.1%} of the weights"
        yield finding("added_later", name, text, "warning" if size > LARGE_SHARE * total else "note", weights=size)


_Block = nn.TransformerEncoderLayer


def _check_fast_paths(model: nn.Module) -> Iterator[Finding]:
    """Yield subclasses of torch's encoder layer, which keep the fast path that ``prepare`` takes from torch's own."""
    for name, module in model.named_modules():
        if isinstance(module, _Block) and type(module).forward is _Block.forward:
            inner = [n for n, _ in quantized_layers(module)]
            if inner and module.activation_relu_or_gelu and module.self_attn.batch_first:
                text = f"its fast path in eval mode uses the float weights of {', '.join(inner)} without calling them"
                yield finding("bypassed", name, text, layers=inner)
