"""A failing network made smaller while it fails in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

from helpers.fuzz_check import Failure
from helpers.fuzz_nets import Case, Node, without

SIMPLER: dict[str, Any] = {
    "groups": 1, "bias": False, "mode": "zeros", "padding": 0, "stride": 1, "dilation": 1, "extra": 0, "kernel": 1,
    "out": 2, "lists": False, "ceil_mode": False, "count_include_pad": True, "divisor_override": None,
    "padding_idx": None, "granularity": "tensor", "narrow": False, "offset": False, "signed": None, "bits": 4,
}  # fmt: skip
"""Option -> its simplest value; for a list, that of each entry."""


def shrink(
    case: Case, failure: Failure, fails: Callable[[Case], Failure | None], tries: int = 300
) -> tuple[Case, Failure]:
    """Return the smallest case found, and how it fails.

    fails: what a case does; a case fails in the same way with an equal ``stage`` and ``what``.
    tries: the number of cases to look at.
    """
    found = True
    while found and tries > 0:
        found = False
        for smaller in simpler(case):
            tries -= 1
            again = fails(smaller)
            if again is not None and (again.stage, again.what) == (failure.stage, failure.what):
                case, failure, found = smaller, again, True
                break
            if tries <= 0:
                break
    return case, failure


def simpler(case: Case) -> Iterator[Case]:
    """Yield cases with one thing less, those with most taken away first."""
    for i in reversed(range(len(case.nodes))):
        if len(case.nodes) > 1:
            yield without(case, i)
    usual = Case(0, (), ())
    for field in fields(Case):
        if field.name not in ("seed", "inputs", "nodes") and getattr(case, field.name) != getattr(usual, field.name):
            yield replace(case, **{field.name: getattr(usual, field.name)})
    if len(case.inputs) == 2 and not any(1 in node.of for node in case.nodes):
        moved = [replace(n, of=tuple(k - (k > 1) for k in n.of)) for n in case.nodes]
        yield replace(case, inputs=case.inputs[:1], nodes=tuple(moved))
    for i, node in enumerate(case.nodes):
        for smaller in _simpler_nodes(node):
            yield replace(case, nodes=(*case.nodes[:i], smaller, *case.nodes[i + 1 :]))
    for i, (shape, count) in enumerate(case.inputs):
        for k, size in enumerate(shape):
            for less in {size // 2, size - 1} - {0, size}:
                small = ((*shape[:k], less, *shape[k + 1 :]), count)
                yield replace(case, inputs=(*case.inputs[:i], small, *case.inputs[i + 1 :]))


def _simpler_nodes(node: Node) -> Iterator[Node]:
    plain = Node("", ())
    for name in ("hook", "made_by", "share", "same", "weight", "activation"):
        if getattr(node, name) != getattr(plain, name):
            yield replace(node, **{name: getattr(plain, name)})
    for options in _simpler_options(node.options):
        yield replace(node, options=options)
    for half in ("weight", "activation"):
        spec = getattr(node, half)
        for smaller in _simpler_options(spec) if isinstance(spec, dict) else ():
            if smaller.get("granularity") != "group":
                smaller = {k: v for k, v in smaller.items() if k != "group_size"}
            yield replace(node, **{half: smaller})


def _simpler_options(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name, value in options.items():
        simple = SIMPLER.get(name, value)
        if isinstance(value, list) and name in SIMPLER:
            simple = [SIMPLER[name]] * len(value)
        elif isinstance(value, str) and name == "padding":
            continue
        if simple != value:
            yield {**options, name: simple}
