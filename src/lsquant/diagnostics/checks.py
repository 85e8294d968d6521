"""``check``: what is wrong with a prepared model, its optimizer or its data, in plain words, with the remedy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, evaluating, first_input, run_batch, take, unwrapped
from lsquant._util.errors import UsageError
from lsquant._util.products import Bypass, address
from lsquant.convert import disabled, stays_float
from lsquant.diagnostics import illnesses
from lsquant.diagnostics.collect import Tally
from lsquant.nn import QuantizedLayer, lone_quantizers, quantized_layers, quantized_type, quantizers
from lsquant.quantizer import Quantizer
from lsquant.reference import GUARD_FACTOR, initial_step

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")

GUARDED_OFTEN = 10  # training passes below the guard per step of a quantizer
ENOUGH = 16  # values per level from which on unused levels mean something
TOO_LARGE = 2.0  # times the paper's rule: a weight's step from which on unused levels are a finding
LARGE_SHARE = 0.1  # of the weights: a layer that stays float is a warning from here on, a note below

CODES: dict[str, tuple[Severity, str]] = {
    "not_prepared": ("error", "call lsquant.prepare(model, recipe), then lsquant.calibrate(model, batches)"),
    "step_unset": ("error", "call lsquant.calibrate(model, batches), or lsquant.load a checkpoint"),
    "step_not_finite": ("error", "go back to the last good checkpoint; lower the learning rate or clip gradients"),
    "tied_twice": ("error", "tie the weights before prepare, or call prepare again, so that they share a quantizer"),
    "step_below_guard": ("warning", "lower the learning rate of the steps: lsquant.param_groups(..., step_lr=...)"),
    "guarded_often": ("warning", "lower the learning rate of the steps: lsquant.param_groups(..., step_lr=...)"),
    "switched_off": ("warning", "set quantizer.enabled = True, or leave the block of lsquant.disabled"),
    "step_missing": ("error", "build the optimizer after prepare: Optimizer(lsquant.param_groups(model, lr))"),
    "stale_parameters": ("error", "build the optimizer anew, after prepare and after every change of parameters"),
    "weight_missing": ("warning", "build the optimizer from lsquant.param_groups(model, lr)"),
    "step_decayed": ("warning", "use lsquant.param_groups(model, lr, weight_decay), which never decays steps"),
    "step_frozen": ("warning", "let it learn: requires_grad_(True) and a learning rate above 0"),
    "values_not_finite": ("error", "look at the data, and at the first layer that has this finding"),
    "clipped": ("warning", "calibrate again on data like these; give the layer more bits, or see lsquant.sensitivity"),
    "unused_levels": ("warning", "the step is too large: calibrate again on data like these"),
    "signed_in_vain": ("warning", "leave signed=None in the recipe and calibrate again, or give signed=False"),
    "few_levels": (
        "warning",
        "look at its values on the page of lsquant report; fewer bits would do, or calibrate again",
    ),
    "negative_cut": (
        "warning",
        "leave signed=None in the recipe and calibrate again on data like these, or use offset=True",
    ),
    "calibration_poor": ("warning", "calibrate again on more data, and on data like these"),
    "step_collapsed": ("warning", "lower the learning rate of the steps: lsquant.param_groups(..., step_lr=...)"),
    "step_exploded": ("warning", "lower the learning rate of the steps: lsquant.param_groups(..., step_lr=...)"),
    "step_unmoved": ("warning", "let its layer take part in the loss; look for .detach(), no_grad and unused outputs"),
    "adam_step_lr": ("warning", "give steps a learning rate of their own: param_groups(..., step_lr=0.003 * step)"),
    "dead_channels": (
        "warning",
        "a step per channel, a smaller step, or a smaller layer: these channels give a constant",
    ),
    "oscillating": (
        "warning",
        "a lower learning rate at the end, averaged weights (WeightAverage, --ema), or more bits",
    ),
    "stale_batchnorm": ("warning", "estimate them anew: lsquant.training.reestimate_batchnorm, or --bn-batches"),
    "not_reached": ("warning", "give batches that reach the layer, or leave it in floating point (skip=)"),
    "bypassed": ("error", "call the layer instead of using its weight, or leave it in floating point (skip=)"),
    "stays_float": ("warning", "replace it by layers that lsquant knows, or accept that it stays in floating point"),
}
"""Code -> severity and remedy."""
WEIGHTS = "lower the learning rate of the steps; lsquant.calibrate(model, batches, weights='mse') sets this one anew"
"""The remedy for weights that do not fit their step: `calibrate` leaves weights as they are unless asked."""


DISTURBING = {"clipped", "unused_levels", "step_unset", "step_not_finite", "switched_off", "step_collapsed",
              "step_exploded", "step_below_guard", "negative_cut", "calibration_poor"}  # fmt: skip
"""Findings that change the values behind them, so that BatchNorm's statistics fit no more."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.  where: name of the quantizer, parameter or layer.  evidence: the numbers behind it."""

    code: str
    severity: Severity
    where: str
    message: str
    remedy: str
    evidence: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.severity}: {self.where or '(root)'}: {self.message} [{self.code}]\n    remedy: {self.remedy}"


def _finding(code: str, where: str, message: str, severity: Severity | None = None, **evidence: Any) -> Finding:
    usual, remedy = CODES[code]
    of_weight = code in ("clipped", "unused_levels") and where.endswith("weight_quantizer")
    return Finding(code, severity or usual, where, message, WEIGHTS if of_weight else remedy, evidence)


def _ill(where: str, found: Iterable[illnesses.Ill]) -> Iterator[Finding]:
    return (_finding(code, where, text, **evidence) for code, text, evidence in found)


def check(
    model: nn.Module,
    optimizer: Any = None,
    batches: Iterable[Any] | None = None,
    *,
    max_batches: int | None = 8,
    forward: Forward | None = None,
) -> list[Finding]:
    """What is wrong with a prepared model; an empty list when nothing is.  Errors first, then warnings, then notes.

    optimizer: a torch optimizer or a list of them: do they train every step, undecayed?  batches: as for ``calibrate``;
    looks at clipped values, unused levels and layers that are not called.  The model runs in eval mode, and is left as
    it was.  R is not judged: far below 1 is healthy for activation steps.
    Raises: UsageError for a model, optimizer or batches that are none.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"check: the model is a {type(model).__name__}, not an nn.Module")
    model = unwrapped(model)
    if not any(True for _ in quantizers(model)):
        return [_finding("not_prepared", "", f"{type(model).__name__} has no quantizers, it is a float model")]
    found = [*_steps(model), *_ties(model), *_floats(model), *_fast_paths(model)]
    if optimizer is not None:
        found += _optimizer(model, optimizer)
    started = None if optimizer is None else any(getattr(one, "state", None) for one in _several(optimizer))
    sound = {name: q for name, q in quantizers(model) if _is_sound(q)}
    for name, ill in illnesses.unmoved(sound, started):
        found += _ill(name, [ill])
    if batches is not None:
        found += _batches(model, batches, max_batches, forward)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted(_causes(found, order), key=lambda f: SEVERITIES.index(f.severity))


def _causes(found: list[Finding], order: dict[str, int]) -> list[Finding]:
    """Without what other findings say more precisely, or bring about in BatchNorm behind them.  order: of modules."""
    where: dict[str, set[str]] = {}
    for f in found:
        where.setdefault(f.code, set()).add(f.where)
    same = {
        "clipped": {"step_collapsed", "step_below_guard"},
        "unused_levels": {"step_exploded", "step_below_guard"},
        "dead_channels": {"unused_levels", "step_exploded"},
        "calibration_poor": {"clipped", "unused_levels", "negative_cut", "step_collapsed", "step_exploded"},
    }
    said = {code: set().union(*(where.get(other, set()) for other in others)) for code, others in same.items()}
    disturbed = min((order.get(f.where, len(order)) for f in found if f.code in DISTURBING), default=len(order))
    said["stale_batchnorm"] = {name for name in where.get("stale_batchnorm", ()) if order[name] > disturbed}
    return [f for f in found if f.where not in said.get(f.code, ())]


def _is_sound(quantizer: Quantizer) -> bool:
    return quantizer.is_initialized and all(bool(torch.isfinite(p).all()) for p in quantizer.parameters())


def _steps(model: nn.Module) -> Iterator[Finding]:
    for name, q in quantizers(model):
        step, total = q.step.detach(), q.step.numel()
        if not q.enabled:
            yield _finding("switched_off", name, "it is switched off, values pass in floating point")
        if not q.is_initialized:
            yield _finding("step_unset", name, "no step is set")
            continue
        if not _is_sound(q):
            bad = int((~torch.isfinite(step)).sum())
            yield _finding("step_not_finite", name, f"{bad} of {total} steps are NaN or infinite (or offsets)", bad=bad)
            continue
        low, guarded = int((step < GUARD_FACTOR * q.initial_step).sum()), int(q.guarded)
        if low:
            text = f"{low} of {total} steps fell below 2^-10 of their start, the guard holds them there"
            yield _finding("step_below_guard", name, text, below=low, steps=total, smallest=float(step.min()))
        if guarded > GUARDED_OFTEN * total:
            text = f"the guard held its {total} step(s) {guarded} times in training: they jump to 0 again and again"
            yield _finding("guarded_often", name, text, guarded=guarded, steps=total)
        yield from _ill(name, illnesses.of_step(q))


def _ties(model: nn.Module) -> Iterator[Finding]:
    owners: dict[int, tuple[str, QuantizedLayer]] = {}
    for name, layer in quantized_layers(model):
        first, other = owners.setdefault(id(layer.weight), (name, layer))
        if layer.weight_quantizer is not other.weight_quantizer:
            text = f"it shares its weight with {first!r}, but not the quantizer"
            yield _finding("tied_twice", name, text, tied=first)


def _floats(model: nn.Module) -> Iterator[Finding]:
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    outer: list[str] = []
    kinds = {module: kind for module in model.modules() if (kind := quantized_type(module)) is not None}
    # layers that the recipe leaves in floating point are no part of what stays float around them
    layers = [m for _, m in quantized_layers(model)] + [m for m, kind in kinds.items() if not kind.unsupported(m)]
    known = {p for layer in layers for p in layer.parameters()}
    for name, module in model.named_modules():
        reason = kinds[module].unsupported(module) if module in kinds else stays_float(module)
        alone = reason.startswith("it holds")  # parameters of its own: its children are looked at by themselves
        size = sum(p.numel() for p in module.parameters(not alone) if p.dim() > 1 and p not in known)
        if reason and size and not any(name.startswith(o) for o in outer):
            outer += [] if alone else [f"{name}.".lstrip(".")]
            severity: Severity = "warning" if size > LARGE_SHARE * total else "note"
            text = f"it stays float, with {size / total:.1%} of the weights: {reason}"
            yield _finding("stays_float", name, text, severity, weights=size, share=size / total)


_Block = nn.TransformerEncoderLayer


def _fast_paths(model: nn.Module) -> Iterator[Finding]:
    """prepare takes the fast path from torch's own encoder layer; a subclass keeps it."""
    for name, module in model.named_modules():
        if isinstance(module, _Block) and type(module).forward is _Block.forward:
            inner = [n for n, _ in quantized_layers(module)]
            if inner and module.activation_relu_or_gelu and module.self_attn.batch_first:
                text = f"its fast path in eval mode uses the float weights of {', '.join(inner)} without calling them"
                yield _finding("bypassed", name, text, layers=inner)


# ---- the optimizer ----


def _several(optimizer: Any) -> list[Any]:
    several = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in several:
        if not hasattr(one, "param_groups"):
            kind = type(one).__name__
            raise UsageError(f"check: the optimizer is a {kind}; give a torch optimizer, or a list of them")
    return several


def _optimizer(model: nn.Module, optimizer: Any) -> Iterator[Finding]:
    several = _several(optimizer)
    groups = [group for one in several for group in one.param_groups]
    held = {id(p): group for group in groups for p in group["params"]}
    learning = any(float(group.get("lr", 1.0)) > 0 for group in groups)
    names = {id(p) for p in model.parameters()}
    missing = False
    for name, q in quantizers(model):
        if _is_sound(q) and q.step.requires_grad and id(q.step) in held:
            yield from _ill(name, illnesses.of_learning(q, held[id(q.step)]))
    for name, q in quantizers(model):
        for where, p in ((f"{name}.{key}", p) for key, p in q.named_parameters(recurse=False)):
            group = held.get(id(p), {})
            if not p.requires_grad:
                yield _finding("step_frozen", where, "it does not require a gradient, so it is not learned")
            elif not group:
                missing = True
                yield _finding("step_missing", where, "the optimizer does not have it: it is never learned")
            elif learning and not float(group.get("lr", 1.0)):
                yield _finding("step_frozen", where, "its learning rate is 0 while others learn", lr=0.0)
            if decay := float(group.get("weight_decay", 0.0)):
                text = f"weight decay {decay:g} pulls it to 0"
                yield _finding("step_decayed", where, text, weight_decay=decay)
    for name, layer in quantized_layers(model):
        if layer.weight.requires_grad and id(layer.weight) not in held:
            missing = True
            yield _finding("weight_missing", f"{name}.weight".lstrip("."), "the optimizer does not have it")
    stale = [tuple(p.shape) for group in groups for p in group["params"] if id(p) not in names]
    if stale:
        text = f"{len(stale)} of its parameters are not the model's (shapes {', '.join(map(str, stale[:3]))})"
        text += ", and some of the model's are not in it" if missing else ": right only if another module owns them"
        yield _finding("stale_parameters", "optimizer", text, None if missing else "note", shapes=stale)


# ---- values ----


class _Values(Tally):
    """A tally that also knows the lowest value, and how many are exactly 0."""

    lowest, zeros = float("inf"), 0

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.untrained = illnesses.Untrained(quantizer)

    def add(self, x: Tensor) -> None:
        super().add(x)
        if x.numel():
            self.lowest = min(self.lowest, float(x.detach().min()))
            self.zeros += int((x.detach() == 0).sum())


def _batches(
    model: nn.Module, batches: Iterable[Any], max_batches: int | None, forward: Forward | None
) -> Iterator[Finding]:
    """Run the batches, watching the values of every quantizer, and every product for layers that are gone round."""
    layers, names = dict(quantized_layers(model)), {q: name for name, q in quantizers(model)}
    tallies = {q: _Values(q) for q in names if _is_sound(q)}
    owners: dict[Quantizer, QuantizedLayer] = {}
    calls, inside, hooks, in_float = dict[str, int](), list[str](), list[Any](), False
    calibrated = any(tally.untrained.watches for tally in tallies.values())

    def watch(name: str, module: nn.Module, quantizer: Quantizer | None) -> None:
        calls[name], tally = 0, tallies.get(quantizer) if quantizer is not None else None

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inside.append(name)
            if tally is not None and in_float:
                tally.untrained.add(first_input(args, kwargs))
            elif tally is not None:
                tally.add(first_input(args, kwargs))
            calls[name] += not in_float

        def leave(*_: Any) -> None:
            del inside[-1:]

        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave, always_call=True))

    for name, layer in layers.items():
        weight = layer.weight_quantizer
        if weight in tallies and weight not in owners:
            tallies[weight].add(layer.rows())
            owners[weight] = layer
        watch(name, layer, layer.input_quantizer)
    for name, q in lone_quantizers(model):
        watch(name, q, q)
    norms = {name: s for name, module in model.named_modules() if (s := illnesses.statistics(module)) is not None}
    for one in norms.values():
        hooks.append(
            one.module.register_forward_pre_hook(lambda _, args, one=one: None if in_float else one.add(args[0]))
        )
    ill = [q for q in names if q.enabled and q not in tallies]  # they would stop the run, or make it all NaN
    bypass = Bypass({address(m.weight): n for n, m in layers.items() if m.weight_quantizer is not None}, inside)
    try:
        for q in ill:
            q.enabled = False
        with evaluating(model), torch.compiler.set_stance("force_eager"), bypass:
            for batch in take(batches, max_batches):
                if in_float := calibrated:  # as calibrate saw it
                    with disabled(model):
                        run_batch(model, batch, forward)
                in_float = False
                run_batch(model, batch, forward)
    finally:
        for q in ill:
            q.enabled = True
        for hook in hooks:
            hook.remove()
    reached = {q for name, count in calls.items() if count and name in layers for q in layers[name].own_quantizers()}
    for name, count in calls.items():
        if name in bypass.found:
            text = f"its quantized weight is used by {bypass.found[name]} without calling the layer, in floating point"
            yield _finding("bypassed", name, text, function=bypass.found[name], calls=count)
        elif not count and not (
            name in layers and set(layers[name].own_quantizers()) <= reached
        ):  # a tied layer may stand in for it
            yield _finding("not_reached", name, "no batch reaches it, its steps get no gradient from such data")
    for q, tally in tallies.items():
        if tally.elements:
            yield from _judge(names[q], q, tally, owners.get(q))
    for name, one in norms.items():
        yield from _ill(name, one.ill())


def _judge(name: str, q: Quantizer, tally: _Values, owner: QuantizedLayer | None) -> Iterator[Finding]:
    """Clipped values and unused levels of one quantizer.  owner: the layer, for a weight."""
    bits, step = q.spec.bits, float(q.step.detach().median())
    used = torch.nonzero(tally.codes).flatten() + q.q_min
    if not math.isfinite(tally.signal + tally.noise):
        yield _finding("values_not_finite", name, "some of its values are NaN or infinite")
        return
    if owner is not None:
        yield from _ill(name, illnesses.of_weight(q, owner.rows().detach()))
    else:
        yield from _ill(name, tally.untrained.ill())
    others = max(tally.elements - tally.zeros, 1)
    low, high = tally.low / others, tally.high / others
    if negative := list(_ill(name, illnesses.of_sign(q, tally, tally.lowest))):
        yield from negative
    elif low + high > max(0.2, 2.0 ** (1 - bits)):
        text = f"{low + high:.0%} of its values other than 0 lie beyond the outermost of its {len(tally.codes)} levels"
        yield _finding("clipped", name, text, clip_low=low, clip_high=high, bits=bits, step=step)
    # without loss at these bits (10 log10(4^bits) dB and better): few levels are enough, as for 8-bit pixels
    if tally.elements < ENOUGH * len(tally.codes) or not len(used) or tally.noise * 4.0**bits < tally.signal:
        return
    first, last = int(used[0]), int(used[-1])
    span = f"its codes go from {first} to {last} only, of {q.q_min} to {q.q_max}"
    evidence = {"lowest": first, "highest": last, "levels": len(tally.codes), "step": step}
    if q.offset is not None:
        reach = (last - first + 1) / len(tally.codes)
    else:
        reach = max(last / q.q_max, first / q.q_min if q.q_min else 0.0)
    if owner is not None:
        usual = initial_step(owner.rows().detach(), q.q_max, axis=q.axis, group_size=q.spec.group_size)
        if float((q.effective_step().detach() / usual.to(q.step)).median()) <= TOO_LARGE:
            return
    if reach <= 0.5:
        yield _finding("unused_levels", name, span, **evidence)
    elif few := list(_ill(name, illnesses.of_levels(q, tally))):
        yield from few
    elif owner is None and q.q_min < 0 <= tally.lowest and q.offset is None:
        yield _finding("signed_in_vain", name, f"{span}: its values are never below 0, but it is signed", **evidence)
