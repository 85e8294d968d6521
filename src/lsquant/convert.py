"""``prepare`` and ``revert``: a float model becomes a quantized one in place, and back.

A layer's class is exchanged (as ``torch.nn.utils.parametrize`` does) and quantizers are added to it, so that the root
module, shared and tied layers, hooks, Parameter objects and references all survive.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lsquant._util.batches import evaluating, run_batch, unwrapped
from lsquant._util.errors import UsageError
from lsquant._util.products import Bypass, address
from lsquant.changes import Change, Changes
from lsquant.nn import (
    EXACT_TYPES,
    QUANTIZED_TYPES,
    UNFUSED_TYPES,
    QuantizedLayer,
    float_type,
    quantized_layers,
    quantized_type,
    quantizers,
    row_shape,
    weight_steps,
)  # fmt: skip
from lsquant.quantizer import Quantizer
from lsquant.recipe import Recipe, Rule
from lsquant.spec import QuantSpec

Steps = Literal["rescale", "recalibrate"]


def _layers(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Layers that can be quantized, float or prepared, in order of definition, with all their names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if quantized_type(module) is not None:
            found.setdefault(module, []).append(name)
    return found


def multiplies(module: nn.Module) -> bool:
    """Whether this is a layer that can be the first or the last one of a recipe: it multiplies its input."""
    kind = quantized_type(module)
    return kind is not None and kind.takes_codes


def execution_order(model: nn.Module, batch: Any) -> tuple[dict[nn.Module, int], dict[nn.Module, str]]:
    """(layers that multiply in the order in which one batch first reaches them -> multiplications, layers gone round).

    The second: each layer that nothing calls -> the function that uses its weight, "" where none does.
    """
    seen: dict[nn.Module, int] = {}
    inside: list[nn.Module] = []
    layers, hooks = list(_layers(model)), []
    places = {address(m.weight): address(m.weight) for m in layers}  # type: ignore[arg-type]

    def enter(module: nn.Module, _: Any) -> None:
        seen.setdefault(module, 0)
        inside.append(module)

    def leave(module: Any, args: tuple[Any, ...], output: Any) -> None:
        del inside[-1:]
        if isinstance(output, Tensor) and args:  # a transposed convolution spreads each input over its outputs
            spread = getattr(module, "transposed", False)
            terms = module.weight.shape[1:] if spread else row_shape(module)[1:]
            seen[module] += (args[0] if spread else output).numel() * terms.numel()

    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(enter))
        hooks.append(layer.register_forward_hook(leave, always_call=True))
    try:
        with disabled(model), evaluating(model), Bypass(places, inside, values=True) as bypass:  # type: ignore[arg-type]
            run_batch(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    functions = {m: bypass.found.get(address(m.weight), "") for m in layers if m not in seen}  # type: ignore[arg-type]
    return {m: count for m, count in seen.items() if multiplies(m)}, functions


def prepare(model: nn.Module, recipe: Recipe, example_inputs: Any = None, *, steps: Steps = "recalibrate") -> Changes:
    """Quantize the layers of a model in place, as the recipe says.

    model: any nn.Module, float or already prepared.  example_inputs: one batch (tensor; tuple or list, whose first
    element counts; mapping); with it the first and last layer that multiply are known by execution, without it by
    order of definition, and ``calibrate`` raises where that was wrong.
    steps: for a prepared model, where the bits change: "recalibrate" sets weight steps anew and marks activation steps
    as not set, so that ``calibrate`` has to follow; "rescale" keeps ``s * q_max_old / q_max_new`` (docs/recipes.md).
    Returns: Changes.  Raises: UsageError naming the rule or layer; the model is then unchanged.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"prepare: the model is a {type(model).__name__}, not an nn.Module")
    if not isinstance(recipe, Recipe):
        raise UsageError(f"prepare: recipe is {recipe!r}; give lsquant.Recipe(...) or lsquant.Recipe.preset('w4a4')")
    if unwrapped(model) is not model:
        raise UsageError(f"prepare: prepare the model before it is wrapped in {type(model).__name__}")
    if steps not in ("rescale", "recalibrate"):
        raise UsageError(f"prepare: steps={steps!r}; use 'rescale' or 'recalibrate'")
    layers = _layers(model)
    if not layers:
        raise UsageError(
            f"prepare: {type(model).__name__} has no layer that can be quantized "
            f"({', '.join(t.__name__ for t in QUANTIZED_TYPES)})"
        )
    counts, gone_round = dict[nn.Module, int](), dict[nn.Module, str]()
    if example_inputs is not None:
        counts, gone_round = execution_order(model, example_inputs)
    order = [m for m in layers if multiplies(m)] if example_inputs is None else list(counts)
    reasons = {m: _reason(m, gone_round) for m in layers}
    positions: dict[nn.Module, list[str]] = {}
    if order:
        positions.setdefault(order[0], []).append("first")
        positions.setdefault(order[-1], []).append("last")
    _check_rules(recipe, model, layers, positions)
    plan = _plan(recipe, layers, positions, reasons)
    assumed = {rule.which for rule in recipe.all_rules()} if example_inputs is None else ()
    for layer, (weight, activation) in reversed(plan.items()):  # a shared quantizer bears the first layer's name
        _apply(layer, layers[layer][0], weight, activation, steps)
        if isinstance(layer, QuantizedLayer):
            layer.assumed_position = tuple(p for p in positions.get(layer, ()) if p in assumed)  # type: ignore[assignment]
    _share_tied(layers)
    both = any(w is not None and a is not None for w, a in plan.values())
    owners: dict[int, str] = {}
    rows = [_row(m, names[0], *plan.get(m, (None, None)), reasons[m], owners) for m, names in layers.items()]
    if example_inputs is not None:
        rows = [replace(row, multiplications=counts.get(m, 0)) for row, m in zip(rows, layers, strict=True)]
    for name, module in list(model.named_modules()):
        if both and type(module) in EXACT_TYPES and not EXACT_TYPES[type(module)].unsupported(module):
            module.__class__ = EXACT_TYPES[type(module)]
        elif not both and type(module) in EXACT_TYPES.values():
            module.__class__ = float_type(module)  # type: ignore[assignment]
        elif type(module) in UNFUSED_TYPES:
            module.__class__ = UNFUSED_TYPES[type(module)]
        elif module not in layers and (reason := stays_float(module)):
            parametrized = getattr(module, "parametrizations", nn.Module()).parameters()
            weights = sum(p.numel() for p in (*module.parameters(recurse=False), *parametrized))
            shares = owners.get(id(getattr(module, "weight", None)))
            rows.append(Change(name, type(module).__name__, "float", "float", weights, reason, shares))
    return Changes(rows)


def _plan(
    recipe: Recipe, layers: dict[nn.Module, list[str]], positions: dict[nn.Module, list[str]],
    reasons: dict[nn.Module, str],
) -> dict[nn.Module, tuple[QuantSpec | None, QuantSpec | None]]:  # fmt: skip
    """What each layer becomes; raises before anything is changed."""
    wanted = {m: recipe.resolve(names, m, positions.get(m, ())) for m, names in layers.items()}
    # of layers that share a weight the one whose bits were asked for most explicitly decides
    by_weight: dict[int, nn.Module] = {}
    for layer, (weight, _, strength) in wanted.items():
        other = by_weight.setdefault(id(layer.weight), layer)
        spec, _, strongest = wanted[other]
        if spec != weight and strength == strongest:
            raise UsageError(
                f"layers {layers[other][0]!r} and {layers[layer][0]!r} share one weight, but the recipe asks for "
                f"{spec or 'float'} and {weight or 'float'}; give both the same rule"
            )
        if strength > strongest:
            by_weight[id(layer.weight)] = layer
    plan = {}
    for layer, names in layers.items():
        kind = quantized_type(layer)
        assert kind is not None
        weight = wanted[by_weight[id(layer.weight)]][0]
        activation = wanted[layer][1] if kind.takes_codes else None
        if weight is not None and not reasons[layer]:
            if weight.granularity == "group" and not kind.takes_groups:
                raise UsageError(f"layer {names[0]!r}: {kind.__name__} has no group-wise steps; use 'channel' for it")
            weight_steps(row_shape(layer), weight.granularity, weight.group_size, names[0])
        if (weight is not None or activation is not None) and not reasons[layer]:
            plan[layer] = (weight, activation)
        elif isinstance(layer, QuantizedLayer):
            plan[layer] = (None, None)
    return plan


def _reason(layer: nn.Module, gone_round: dict[nn.Module, str]) -> str:
    """Why a layer of a known type stays float; empty where it can be quantized."""
    if function := gone_round.get(layer):
        return f"its weight is used by {function} without calling the layer: not quantized"
    if not layer.weight.numel():  # type: ignore[union-attr, operator]
        return "it has no weights"
    kind = quantized_type(layer)
    return kind.unsupported(layer) if kind else ""


def _check_rules(
    recipe: Recipe, model: nn.Module, layers: dict[nn.Module, list[str]], positions: dict[nn.Module, list[str]]
) -> None:
    for rule in recipe.rules:
        if any(rule.matches(names, layer, positions.get(layer, ())) for layer, names in layers.items()):
            continue
        found = [(n, m) for n, m in model.named_modules() if n and rule.matches([n], m)]
        inside = [(n, layers[m][0]) for n, module in found for m in module.modules() if m in layers]
        if inside:
            name, layer = inside[0]
            raise UsageError(
                f"prepare: the rule for {rule.which!r} matches {name!r}, which is no layer but holds {layer!r}; "
                f"use {name + '.*'!r} for all inside"
            )
        if found and rule.weight is None and rule.activation is None:
            continue  # skipping something that would stay float anyway
        known = [name for names in layers.values() for name in names]
        near = difflib.get_close_matches(str(rule.which), known, 3, 0.3) or known[:3]
        raise UsageError(f"prepare: the rule for {rule.which!r} matches no layer; near names: {', '.join(near)}")


def _apply(layer: nn.Module, name: str, weight: QuantSpec | None, activation: QuantSpec | None, steps: Steps) -> None:
    if weight is None and activation is None:
        _revert_layer(layer)
        return
    old: list[Quantizer | None] = [None, None]
    if isinstance(layer, QuantizedLayer):
        old = [layer.weight_quantizer, layer.input_quantizer]
    weight_quantizer = input_quantizer = None
    device = next(layer.parameters(recurse=False)).device
    kind = quantized_type(layer)
    assert kind is not None
    if weight is not None:
        count, share = weight_steps(row_shape(layer), weight.granularity, weight.group_size, name)
        weight_quantizer = _reuse(old[0], weight, count, steps) or Quantizer(
            weight, (count,), axis=0 if weight.granularity == "channel" else None, count=share
        ).to(device)
        weight_quantizer.name = f"{name}.weight_quantizer".lstrip(".")
    if activation is not None:
        features = getattr(layer, "in_features", None)
        input_quantizer = _reuse(old[1], activation, 1, steps) or Quantizer(activation, count=features).to(device)
        input_quantizer.name = f"{name}.input_quantizer".lstrip(".")
    layer.__class__ = kind
    layer.attach(weight_quantizer, input_quantizer)  # type: ignore[operator]
    for quantizer in (weight_quantizer, input_quantizer):
        if quantizer is not None:
            quantizer.train(layer.training)


def _reuse(old: Quantizer | None, spec: QuantSpec, count: int, steps: Steps) -> Quantizer | None:
    """The quantizer that is there, with new bits, when its step keeps its shape."""
    if old is None or old.step.numel() != count or old.spec.offset != spec.offset:
        return None
    if (old.spec.granularity, old.spec.group_size) != (spec.granularity, spec.group_size):
        return None
    keep = steps == "rescale" or spec in (old.requested, old.spec)  # a step whose levels stay is kept
    old.respecify(spec, rescale=keep)
    return old


def _share_tied(layers: Iterable[nn.Module]) -> None:
    """Layers with one weight have one weight quantizer."""
    owners: dict[int, Quantizer] = {}
    for layer in layers:
        quantizer = getattr(layer, "weight_quantizer", None)
        if quantizer is not None:
            layer.weight_quantizer = owners.setdefault(id(layer.weight), quantizer)


def stays_float(module: nn.Module) -> str:
    """Why a module that multiplies is not touched; empty for everything else."""
    if isinstance(module, (QuantizedLayer, Quantizer)):
        return ""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return f"{type(module).__name__} uses its weights without calling a layer: not quantized"
    if isinstance(module, tuple(QUANTIZED_TYPES)):
        if is_parametrized(module):
            return (
                f"{type(module).__mro__[1].__name__} with a parametrized weight, made anew for each use: not quantized"
            )
        return f"a subclass of {type(module).__mro__[1].__name__} may compute otherwise: not quantized"
    if type(module) in EXACT_TYPES and (reason := EXACT_TYPES[type(module)].unsupported(module)):
        return f"not bit-exact in runtimes: {reason}"
    known = type(module).__module__.startswith("torch.nn.modules.")
    if known and isinstance(getattr(module, "weight", None), nn.Parameter):
        return "" if "Norm" in type(module).__name__ else f"{type(module).__name__} is not supported yet"
    own = _own_matrices(module)
    return f"it holds {', '.join(own)} itself, used without a layer that lsquant knows: not quantized" if own else ""


def _own_matrices(module: nn.Module) -> list[str]:
    """Names of a module's own parameters with two dimensions or more, where no stand-alone Quantizer is beside them."""
    lists = isinstance(module, (nn.ParameterList, nn.ParameterDict))
    if not lists and type(module).__module__.startswith("torch.nn."):
        return []
    if any(isinstance(child, Quantizer) for child in module.children()):
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, p in own if sum(size > 1 for size in p.shape) > 1]


def _row(
    layer: nn.Module, name: str, weight: QuantSpec | None, activation: QuantSpec | None, reason: str,
    owners: dict[int, str],
) -> Change:  # fmt: skip
    """reason: why it cannot be quantized.  owners: id of a weight -> the layer that had it first."""
    kind = (float_type(layer) or type(layer)).__name__
    notes = [reason or ("" if weight or activation else "the recipe leaves it in floating point")]
    if (first := owners.setdefault(id(layer.weight), name)) != name:
        notes.append(f"one weight with {first!r}")
    said, shares = "; ".join(filter(None, notes)), first if first != name else None
    return Change(name, kind, str(weight or "float"), str(activation or "float"), layer.weight.numel(), said, shares)  # type: ignore[union-attr, operator]


def revert(model: nn.Module) -> nn.Module:
    """Give back the float model, in place: classes, state-dict keys and Parameter objects as before ``prepare``.

    The weights are the trained float weights, not their quantized values.  Returns the model.
    """
    for module in list(model.modules()):
        _revert_layer(module)
    return model


def _revert_layer(module: nn.Module) -> None:
    if isinstance(module, QuantizedLayer):
        module.detach_quantizers()
        vars(module).pop("assumed_position", None)
    if (kind := float_type(module)) is not None:
        module.__class__ = kind  # type: ignore[assignment]


@contextmanager
def disabled(model: nn.Module, *patterns: str) -> Iterator[None]:
    """Switch quantizers off inside the ``with`` block: all, or those whose name or layer's name matches a glob.

    Raises: UsageError for a pattern that matches no quantizer.
    """
    everyone = list(quantizers(model))
    chosen = [q for name, q in everyone if not patterns or any(_named(name, p) for p in patterns)]
    for pattern in patterns:
        if not any(_named(name, pattern) for name, _ in everyone):
            near = difflib.get_close_matches(pattern, [n for n, _ in everyone], 3, 0.3)
            raise UsageError(f"disabled: {pattern!r} matches no quantizer; near names: {', '.join(near) or 'none'}")
    before = [q.enabled for q in chosen]
    for quantizer in chosen:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer, state in zip(chosen, before, strict=True):
            quantizer.enabled = state


def _named(quantizer: str, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (quantizer, quantizer.rpartition(".")[0]))


def resolved_recipe(model: nn.Module) -> Recipe:
    """The recipe of a prepared model, one rule per layer by exact name: what a checkpoint keeps.

    Signs decided by calibration stay undecided in it; they are in the state dict.
    """
    rules = []
    for name, layer in quantized_layers(model):
        weight, activation = layer.weight_quantizer, layer.input_quantizer
        rules.append(
            Rule(
                "re:" + re.escape(name),
                None if weight is None else weight.requested,
                None if activation is None else activation.requested,
            )
        )
    return Recipe(None, None, rules)
