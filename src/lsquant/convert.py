"""``prepare`` and ``revert``: a float model becomes a quantized one in place, and back.

A layer's class is exchanged (as ``torch.nn.utils.parametrize`` does) and quantizers are added to it, so that the root
module, shared and tied layers, hooks, Parameter objects and references all survive.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lsquant._util.batches import evaluating, first_input, require_one_process, run_batch, uncompiled, unwrapped
from lsquant._util.bypass import BypassDetector, address
from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant._util.products import ProductCounter, recurrent_products
from lsquant._util.rollback import unchanged_on_error
from lsquant.changes import Change, Changes
from lsquant.dataflow import Flow, dataflow
from lsquant.joining import STORED, connect, require_outermost, separate
from lsquant.nn import (
    EXACT_TYPES,
    QUANTIZED_TYPES,
    UNFUSED_TYPES,
    QuantizedLayer,
    float_type,
    input_elements,
    quantized_layers,
    quantized_type,
    quantizers,
    row_shape,
    stored_layout,
    weight_steps,
)  # fmt: skip
from lsquant.program import program_of
from lsquant.quantizer import Quantizer
from lsquant.recipe import Recipe, Rule, glob_of, target_of
from lsquant.spec import QuantSpec
from lsquant.tying import layers_by_weight, share_weight_quantizers
from lsquant.unsupported import SEEN, not_its_own, note_seen, reason_for_layer, reason_for_module, writers_without_form

Steps = Literal["rescale", "recalibrate"]
Names = dict[nn.Module, list[str]]
"""Layers that can be quantized, float or prepared, in order of definition -> all their names."""
Plan = dict[nn.Module, tuple[QuantSpec | None, QuantSpec | None]]
"""Layer -> specification of its weight and of its input; None is floating point."""


def prepare(model: nn.Module, recipe: Recipe, example_inputs: Any = None, *, steps: Steps = "recalibrate") -> Changes:
    """Quantize the layers of a model in place, as the recipe says.

    model: any nn.Module, float or already prepared.
    recipe: which layer gets which bits.
    example_inputs: one batch (a tensor; a tuple or list, whose first element counts; a mapping).  With it the first and
        last layer that multiply are known by execution, multiplications are counted, and lazy layers get their shape;
        without it first and last are taken by order of definition, and ``calibrate`` raises where that was wrong.
    steps: for a prepared model whose bits change: "recalibrate" sets weight steps anew and marks activation steps as
        not set, so that ``calibrate`` has to follow; "rescale" keeps ``s * q_max_old / q_max_new`` (docs/recipes.md).
    Returns: Changes, a row per layer.
    Raises: UsageError naming the rule or layer.  The model is then unchanged, as it is after any other exception.
    """
    model = _check_arguments(model, recipe, steps)
    with _all_or_nothing(model), torch.inference_mode(False):  # in which steps could never be trained
        return _prepare(model, recipe, example_inputs, steps)


def _prepare(model: nn.Module, recipe: Recipe, example_inputs: Any, steps: Steps) -> Changes:
    _require_own_classes("prepare", model)
    _give_shapes(model, example_inputs)
    layers = _layers(model)
    if not layers:
        raise UsageError(
            f"prepare: {type(model).__name__} has no layer that can be quantized "
            f"({', '.join(t.__name__ for t in QUANTIZED_TYPES)})"
        )
    if example_inputs is None:
        executed = Executed({layer: None for layer in layers if multiplies(layer)}, {}, None)
    else:
        executed = execution_order(model, example_inputs)
    positions = _positions(list(executed.order))
    reasons = {layer: reason_for_layer(layer, executed.bypassed) for layer in layers}
    _check_rules(recipe, model, layers, positions)
    plan = _plan(recipe, layers, positions, reasons)
    former = separate(model)
    for layer, (weight, activation) in reversed(plan.items()):  # a shared quantizer bears the first layer's name
        _convert(layer, layers[layer][0], weight, activation, steps)
    share_weight_quantizers(layers)
    _note_assumed_positions(recipe if example_inputs is None else None, plan, positions)
    integer_layers = any(weight is not None and activation is not None for weight, activation in plan.values())
    _convert_others(model, integer_layers)
    floats: list[Change] = []
    if recipe.joins is not None:
        assert isinstance(recipe.joins, QuantSpec)
        flow = dataflow(model, "prepare with joins")
        connect(model, flow, recipe.joins, former)
        floats = _float_steps(flow, recipe.joins)
        _note_lost_offsets(plan, reasons)
    note_seen(model, (layer for layer in layers if not isinstance(layer, QuantizedLayer)))
    rows = _rows(model, layers, plan, reasons, executed.products)
    known = {row.name for row in rows}
    return Changes([*rows, *(row for row in floats if row.name not in known)])


@contextmanager
def _all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Put the model back as it was where the ``with`` block raises anything.

    Of the tensors only those of quantizers are changed in place here, and lazy ones, which become lazy again.
    """
    lazy = [t for t in (*model.parameters(), *model.buffers()) if is_lazy(t)]
    kinds = [type(t) for t in lazy]
    own = [q for _, q in quantizers(model)]
    with unchanged_on_error(own), unchanged_on_error(model.modules(), values=False):
        try:
            yield
        except BaseException:
            for t, kind in zip(lazy, kinds, strict=True):
                if type(t) is not kind:
                    t.data = torch.empty(0, dtype=t.dtype, device=t.device)
                    t.__class__ = kind  # type: ignore[assignment]
            raise


def _require_own_classes(caller: str, model: nn.Module) -> None:
    """Raise UsageError for a quantized layer that was parametrized after ``prepare``: its class is torch's by now."""
    for name, layer in quantized_layers(model):
        if is_parametrized(layer):
            raise UsageError(
                f"{caller}: {name!r} was parametrized after prepare; call "
                "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight') first"
            )


def _give_shapes(model: nn.Module, example_inputs: Any) -> None:
    """Run the example where a layer is lazy.  Raises: UsageError naming a layer that is lazy without or after it."""

    def lazy() -> tuple[str, nn.Module] | None:
        for name, module in model.named_modules():
            if any(is_lazy(t) for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
                return name, module
        return None

    if (found := lazy()) is None:
        return
    if example_inputs is not None:
        with evaluating(model):
            run_batch(model, example_inputs)
        if (found := lazy()) is None:
            return
    name, module = found
    reached = "" if example_inputs is None else ", and example_inputs did not reach it"
    raise UsageError(
        f"prepare: {name!r} is a {type(module).__name__} and has no weight yet{reached}: run a batch first, "
        "model(batch), or give prepare(model, recipe, example_inputs=batch)"
    )


def _check_arguments(model: Any, recipe: Any, steps: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise UsageError(f"prepare: the model is a {type(model).__name__}, not an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"prepare: {type(model).__name__} is a TorchScript program, whose layers cannot be exchanged; give the "
            "model that it was made from"
        )
    if not isinstance(recipe, Recipe):
        raise UsageError(f"prepare: recipe is {recipe!r}; give lsquant.Recipe(...) or lsquant.Recipe.preset('w4a4')")
    if steps not in ("rescale", "recalibrate"):
        raise UsageError(f"prepare: steps={steps!r}; use 'rescale' or 'recalibrate'")
    inside = require_one_process(model, "prepare")
    require_outermost(inside, "prepare")
    return inside


def _layers(model: nn.Module) -> Names:
    found: Names = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if quantized_type(module) is not None:
            found.setdefault(module, []).append(name)
    return found


# ---- what is executed ----


def multiplies(module: nn.Module) -> bool:
    """Tell whether a module multiplies its input, so that it can be the "first" or the "last" layer of a recipe."""
    kind = quantized_type(module)
    return kind is not None and kind.takes_codes


class Executed(NamedTuple):
    """What one batch has shown of a model.

    order: the layers that multiply and are called, in execution order.
    bypassed: layer whose weight a function uses -> that function; layer that is neither called nor used -> "".
    products: module -> multiplications and functions; None where no batch was run.
    """

    order: dict[nn.Module, None]
    bypassed: dict[nn.Module, str]
    products: ProductCounter | None


def execution_order(model: nn.Module, batch: Any) -> Executed:
    """Run one batch in floating point, and see which layers are called and what multiplies."""
    called: dict[nn.Module, None] = {}
    layers = _layers(model)
    inside: list[nn.Module] = []  # layers that are being computed
    counter = ProductCounter(tuple({type(layer) for layer in layers}))

    def enter(module: nn.Module, _: Any) -> None:
        counter.running.append(module)
        if module in layers:
            called.setdefault(module)
            inside.append(module)

    def leave(module: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        del counter.running[-1:]
        if module in layers:
            del inside[-1:]
        if isinstance(module, nn.RNNBase):
            counter.add(module, recurrent_products(module, first_input(args, kwargs)), "its recurrence")

    weights = {layer: address(layer.weight) for layer in layers}  # type: ignore[arg-type]
    detector = BypassDetector({place: place for place in weights.values()}, inside, True, lambda: _own(counter.running))
    hooks = []
    try:
        for module in model.modules():
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True))
        with disabled(model), evaluating(model), uncompiled(), detector, counter:
            run_batch(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = {layer: detector.found.get(weights[layer], "") for layer in layers}
    bypassed = {  # an in-place function ("div_") makes the weight of a layer that is called, and is no use of it
        layer: function
        for layer, function in found.items()
        if layer not in called or (function and not function.endswith("_"))
    }
    return Executed({layer: None for layer in called if multiplies(layer)}, bypassed, counter)


def _own(running: list[nn.Module]) -> set[int]:
    """Return the addresses of the parameters of the module that computes now: it uses them by itself, in any form."""
    return {address(p) for p in running[-1].parameters(recurse=False)} if running else set()


def _positions(order: list[nn.Module]) -> dict[nn.Module, list[str]]:
    """Return layer -> "first" and/or "last"."""
    positions: dict[nn.Module, list[str]] = {}
    if order:
        positions.setdefault(order[0], []).append("first")
        positions.setdefault(order[-1], []).append("last")
    return positions


# ---- what each layer becomes ----


def _plan(recipe: Recipe, layers: Names, positions: dict[nn.Module, list[str]], reasons: dict[nn.Module, str]) -> Plan:
    """Decide what each layer becomes; raise before anything is changed."""
    wanted = {layer: recipe.resolve(names, layer, positions.get(layer, ())) for layer, names in layers.items()}
    weights: dict[nn.Module, QuantSpec | None] = {}
    for sharing in layers_by_weight(layers).values():
        spec = _shared_specification(sharing, wanted, layers)
        weights.update(dict.fromkeys(sharing, spec))
        if spec is not None:
            _require_one_layout([layer for layer in sharing if not reasons[layer]], layers)
    plan: Plan = {}
    for layer, names in layers.items():
        kind = quantized_type(layer)
        assert kind is not None
        weight = weights[layer]
        activation = wanted[layer][1] if kind.takes_codes else None
        if reasons[layer]:
            weight = activation = None
        if weight is not None:
            if weight.granularity == "group" and not kind.takes_groups:
                raise UsageError(f"layer {names[0]!r}: {kind.__name__} has no group-wise steps; use 'channel' for it")
            weight_steps(row_shape(layer), weight.granularity, weight.group_size, names[0])
        if weight is not None or activation is not None or isinstance(layer, QuantizedLayer):
            plan[layer] = (weight, activation)
    return plan


def _require_one_layout(sharing: list[nn.Module], layers: Names) -> None:
    """Raise UsageError where layers read one weight in different layouts, so that their channels differ."""
    for layer in sharing[1:]:
        if stored_layout(layer) != stored_layout(sharing[0]):
            first, second = layers[sharing[0]][0], layers[layer][0]
            kinds = [(float_type(m) or type(m)).__name__ for m in (sharing[0], layer)]
            raise UsageError(
                f"layers {first!r} ({kinds[0]}) and {second!r} ({kinds[1]}) share one weight in different layouts, so "
                "they cannot share its codes; give each a weight of its own before prepare, or leave both in floating "
                f"point: skip=[{first!r}, {second!r}]"
            )


def _shared_specification(
    sharing: list[nn.Module], wanted: dict[nn.Module, tuple[QuantSpec | None, Any, int]], layers: Names
) -> QuantSpec | None:
    """Return the specification of a weight: of the layers that share it, the most explicit rule decides."""
    decides = sharing[0]
    for layer in sharing[1:]:
        spec, _, strength = wanted[layer]
        strongest_spec, _, strongest = wanted[decides]
        if spec != strongest_spec and strength == strongest:
            raise UsageError(
                f"layers {layers[decides][0]!r} and {layers[layer][0]!r} share one weight, but the recipe asks for "
                f"{strongest_spec or 'float'} and {spec or 'float'}; give both the same rule"
            )
        if strength > strongest:
            decides = layer
    return wanted[decides][0]


def _check_rules(recipe: Recipe, model: nn.Module, layers: Names, positions: dict[nn.Module, list[str]]) -> None:
    """Raise UsageError for a rule of the user's that matches no layer."""
    known = {name for names in layers.values() for name in names}
    for rule in recipe.rules:
        if rule.name in known:
            continue
        if any(rule.matches(names, layer, positions.get(layer, ())) for layer, names in layers.items()):
            continue
        found = [(name, module) for name, module in model.named_modules() if name and rule.matches([name], module)]
        inside = [(name, layers[m][0]) for name, module in found for m in module.modules() if m in layers]
        if inside:
            name, layer = inside[0]
            raise UsageError(
                f"prepare: the rule for {rule.which!r} matches {name!r}, which is no layer but holds {layer!r}; "
                f"use {name + '.*'!r} for all inside"
            )
        if found and rule.weight is None and rule.activation is None:
            continue  # skipping something that would stay float anyway
        for name, module in found:
            if reason := reason_for_module(module):
                raise UsageError(f"prepare: the rule for {rule.which!r} has no effect, {name} stays float: {reason}")
        said = rule.which if rule.name is None else rule.name
        listed = [name for names in layers.values() for name in names]
        near = difflib.get_close_matches(said, listed, 3, 0.3) or listed[:3]
        raise UsageError(f"prepare: the rule for {rule.which!r} matches no layer; near names: {', '.join(near)}")


# ---- conversion ----


def _convert(layer: nn.Module, name: str, weight: QuantSpec | None, activation: QuantSpec | None, steps: Steps) -> None:
    """Make a layer quantized, or float where both specifications are None."""
    if weight is None and activation is None:
        _revert_layer(layer)
        return
    kind = quantized_type(layer)
    assert kind is not None
    parameter: Any = layer.weight
    device = parameter.device
    old_weight = layer.weight_quantizer if isinstance(layer, QuantizedLayer) else None
    old_input = layer.input_quantizer if isinstance(layer, QuantizedLayer) else None
    weight_quantizer = input_quantizer = None
    if weight is not None:
        number, elements = weight_steps(row_shape(layer), weight.granularity, weight.group_size, name)
        axis = 0 if weight.granularity == "channel" else None
        weight_quantizer = _reuse(old_weight, weight, number, steps, elements)
        if weight_quantizer is None:
            with device:
                weight_quantizer = Quantizer(weight, (number,), axis=axis, count=elements)
        weight_quantizer.name = f"{name}.weight_quantizer".lstrip(".")
    if activation is not None:
        input_quantizer = _reuse(old_input, activation, 1, steps)
        if input_quantizer is None:
            with device:
                input_quantizer = Quantizer(activation, count=input_elements(layer) or None)
        input_quantizer.name = f"{name}.input_quantizer".lstrip(".")
    layer.__class__ = kind
    layer.attach(weight_quantizer, input_quantizer)  # type: ignore[operator]
    for quantizer in (weight_quantizer, input_quantizer):
        if quantizer is not None:
            quantizer.train(layer.training)


def _reuse(old: Quantizer | None, spec: QuantSpec, number: int, steps: Steps, count: int = 0) -> Quantizer | None:
    """Give the present quantizer new bits, where its step keeps its shape; None where it does not.

    count: N of a weight, 0 for an input.
    """
    if old is None or old.step.numel() != number or old.spec.offset != spec.offset:
        return None
    if (old.spec.granularity, old.spec.group_size) != (spec.granularity, spec.group_size):
        return None
    same_levels = spec in (old.requested, old.spec)
    old.respecify(spec, rescale=steps == "rescale" or same_levels)
    if count and old.elements_per_step != count:  # a weight that was pruned or grown since
        old.set_count(count)
    return old


def _note_assumed_positions(guessed: Recipe | None, plan: Plan, positions: dict[nn.Module, list[str]]) -> None:
    """Keep at each layer which of "first" and "last" it was taken for unseen; ``calibrate`` compares.

    guessed: the recipe, where the order of definition stands for that of execution; None where that is known.
    """
    used = set[str]() if guessed is None else {rule.which for rule in guessed.all_rules()}
    for layer in plan:
        if isinstance(layer, QuantizedLayer):
            assumed = tuple(position for position in positions.get(layer, ()) if position in used)
            layer.assumed_position = assumed  # type: ignore[assignment]


def _convert_others(model: nn.Module, integer_layers: bool) -> None:
    """Exchange the class of modules that need no quantizer.

    BatchNorm and average pooling are computed in a fixed order, so that a runtime can repeat them bit for bit, where
    some layer is quantized in weight and input (``integer_layers``); torch's transformer encoder loses its fast path,
    which would bypass the layers inside it.
    """
    for module in list(model.modules()):
        kind = type(module)
        if integer_layers and kind in EXACT_TYPES and not EXACT_TYPES[kind].unsupported(module):
            if not_its_own(module):
                continue
            module.__class__ = EXACT_TYPES[kind]
        elif not integer_layers and kind in EXACT_TYPES.values():
            module.__class__ = float_type(module)  # type: ignore[assignment]
        elif kind in UNFUSED_TYPES:
            module.__class__ = UNFUSED_TYPES[kind]


# ---- what is reported ----


def _note_lost_offsets(plan: Plan, reasons: dict[nn.Module, str]) -> None:
    """Say of a layer that its input has no offset, because another tensor is added to it."""
    for layer, (weight, activation) in plan.items():
        quantizer = layer.input_quantizer if isinstance(layer, QuantizedLayer) else None
        if activation is not None and activation.offset and quantizer is not None and not quantizer.requested.offset:
            plan[layer] = weight, quantizer.requested
            reasons[layer] = "without the offset, for an addition reads the input too: its operands have z = 0"


def _rows(
    model: nn.Module, layers: Names, plan: Plan, reasons: dict[nn.Module, str], counter: ProductCounter | None
) -> list[Change]:
    """Return the rows of ``Changes``: layers of a known type, then other modules that compute, all float."""

    def products(module: nn.Module) -> int | None:
        return None if counter is None else counter.counts.get(module, 0)

    first_names = {weight: layers[sharing[0]][0] for weight, sharing in layers_by_weight(layers).items()}
    rows = []
    for layer, names in layers.items():
        weight, activation = plan.get(layer, (None, None))
        note = reasons[layer]
        if not note and weight is None and activation is None:
            note = "the recipe leaves it in floating point"
        tensor: Any = layer.weight
        first = first_names[tensor]
        shares = None if first == names[0] else first
        if shares is not None:
            note = "; ".join(filter(None, (note, f"shares its weight with {shares!r}")))
        kind = (float_type(layer) or type(layer)).__name__
        spoken = str(weight or "float"), str(activation or "float")
        unwritten = writers_without_form(layer, weight, activation)
        rows.append(Change(names[0], kind, *spoken, tensor.numel(), note, shares, products(layer), unwritten))
    for name, module in model.named_modules():
        if module in layers:
            continue
        kind = (float_type(module) or type(module)).__name__
        if reason := reason_for_module(module):
            parametrized = getattr(module, "parametrizations", nn.Module()).parameters()
            size = sum(p.numel() for p in (*module.parameters(recurse=False), *parametrized))
            weight = getattr(module, "weight", None)
            shares = first_names.get(weight) if isinstance(weight, nn.Parameter) else None
            rows.append(Change(name, kind, "float", "float", size, reason, shares, products(module)))
        elif counter is not None and (functions := counter.functions.get(module)):
            reason = f"{' and '.join(functions)} in its own forward pass, without a layer: not quantized"
            rows.append(Change(name, kind, "float", "float", 0, reason, None, products(module)))
    return rows


def _float_steps(flow: Flow, joins: QuantSpec) -> list[Change]:
    """Return a row for each part of an integer-only network that stays in floating point."""
    rows = []
    for step in program_of(flow, joins).floats:
        kind = "function" if step.module is None else (float_type(step.module) or type(step.module)).__name__
        advice = ": lsquant.trace makes modules of functions" if step.module is None else ""
        reason = f"no integer form, so it stays in floating point{advice}"
        rows.append(Change(step.name, kind, "float", "float", 0, reason))
    return rows


def revert(model: nn.Module) -> nn.Module:
    """Turn a prepared model back into the float model, in place.

    Classes, state-dict keys and Parameter objects are those before ``prepare``.  The weights are the trained float
    weights, not their quantized values.

    Returns: the model.
    Raises: UsageError naming a layer that was parametrized after ``prepare``.  The model is then unchanged, as it is
        after any other exception.
    """
    inside = require_one_process(model, "revert")
    require_outermost(inside, "revert")
    _require_own_classes("revert", inside)
    with _all_or_nothing(inside):
        separate(inside)
        for module in list(inside.modules()):
            _revert_layer(module)
            vars(module).pop(SEEN, None)
    return model


def _revert_layer(module: nn.Module) -> None:
    if isinstance(module, QuantizedLayer):
        module.detach_quantizers()
        vars(module).pop("assumed_position", None)
    if (kind := float_type(module)) is not None:
        module.__class__ = kind  # type: ignore[assignment]


@contextmanager
def disabled(model: nn.Module, *patterns: str) -> Iterator[None]:
    """Switch quantizers off inside the ``with`` block.

    patterns: globs on the name of a quantizer or of its layer; none: all quantizers.
    Raises: UsageError for a pattern that matches no quantizer.
    """
    known = list(quantizers(model))
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise UsageError(f"disabled: {shown(pattern)} is no pattern; give a glob on names of layers or quantizers")
        if not any(_matches(name, pattern) for name, _ in known):
            near = difflib.get_close_matches(pattern, [name for name, _ in known], 3, 0.3)
            raise UsageError(f"disabled: {pattern!r} matches no quantizer; near names: {', '.join(near) or 'none'}")
    chosen = [q for name, q in known if not patterns or any(_matches(name, pattern) for pattern in patterns)]
    before = [q.enabled for q in chosen]
    try:
        for quantizer in chosen:
            quantizer.enabled = False
        yield
    finally:
        for quantizer, state in zip(chosen, before, strict=True):
            quantizer.enabled = state


def _matches(quantizer: str, pattern: str) -> bool:
    layer = quantizer.rpartition(".")[0]
    return fnmatch.fnmatchcase(quantizer, pattern) or fnmatch.fnmatchcase(layer, pattern)


def resolved_recipe(model: nn.Module) -> Recipe:
    """Return the recipe of a prepared model, one rule per layer by exact name: what a checkpoint keeps.

    Signs decided by calibration stay undecided in it; they are in the state dict.
    """
    rules = []
    for name, layer in quantized_layers(model):
        weight = None if layer.weight_quantizer is None else layer.weight_quantizer.requested
        activation = None if layer.input_quantizer is None else layer.input_quantizer.requested
        rules.append(Rule(glob_of(name), weight, activation))
    joins = vars(unwrapped(model)).get(STORED)
    return Recipe(None, None, rules, joins=joins, target=target_of(joins))
