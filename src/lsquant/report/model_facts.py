"""Collect what the page says of a model: a row per quantizer, the size of each layer, the findings of ``check``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.batches import Forward, take, trained_model, unwrapped
from lsquant._util.bits import packed_size
from lsquant.convert import resolved_recipe
from lsquant.diagnostics import check
from lsquant.diagnostics.collect import value_statistics
from lsquant.nn import QuantizedLayer, quantized_layers, quantizers
from lsquant.quantizer import Quantizer
from lsquant.report.values import Values
from lsquant.tying import weight_quantizers

CHECKED = 8  # batches that ``check`` sees again


def model_facts(
    model: nn.Module, batches: Iterable[Any] | None, *, max_batches: int | None = 32, forward: Forward | None = None
) -> dict[str, Any]:
    """Return quantizers, layers, sizes, bits, findings and recipe of a model, as the page's script takes them.

    batches: as for ``calibrate``; without them the facts are of weights only

    Raises: UsageError for a step that is not set.
    """
    model = trained_model(unwrapped(model))
    kept: list[Any] = []

    def watched() -> Iterator[Any]:
        for batch in take(batches or (), max_batches):
            if len(kept) < CHECKED:
                kept.append(batch)
            yield batch

    data = None if batches is None else watched()
    found = value_statistics(model, data, Values, max_batches=None, forward=forward)
    facts = [quantizer_row(name, kind, tally, layer) for (name, kind), (tally, layer) in found.items()]
    layers, sizes = _sizes(model)
    findings = check(model, batches=kept or None, forward=forward)
    return {
        "quantizers": facts,
        "layers": layers,
        "sizes": sizes,
        "bits": bits_in_words(model),
        "findings": [asdict(f) for f in findings],
        "recipe": resolved_recipe(model).to_toml(),
    }


def quantizer_row(name: str, kind: str, tally: Values, layer: QuantizedLayer | None) -> dict[str, Any]:
    """Return ``QuantizerFacts`` as a dictionary, with bounds, sign, granularity and drawings."""
    q, facts = tally.quantizer, tally.facts(name, kind, layer)
    row = asdict(facts) | {"name": facts.name, "signed": bool(q.spec.signed), "q_min": q.q_min, "q_max": q.q_max}
    size = f" of {q.spec.group_size}" if q.spec.group_size else ""
    row |= {"granularity": q.spec.granularity + size, "lsq_plus": q.offset is not None}
    row |= {"sqnr": facts.sqnr if math.isfinite(facts.sqnr) else "inf" if facts.sqnr > 0 else None}
    return row | {"oscillation": None, "views": tally.views(), "damage": tally.damage}


def bits_in_words(model: nn.Module) -> list[list[Any]]:
    """Return ["weight bits/input bits", number of layers], the most frequent first."""

    def bits(q: Quantizer | None) -> str:
        return "float" if q is None else str(q.spec.bits)

    pairs = Counter(f"{bits(m.weight_quantizer)}/{bits(m.input_quantizer)}" for _, m in quantized_layers(model))
    return [list(pair) for pair in pairs.most_common()]


def _sizes(model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return sizes in bytes, per layer with a quantized weight and in all: as float32, and as packed codes and steps.

    `rest` is that of all other tensors in float32. A shared weight counts once.
    """
    layers, seen = [], set[Tensor]()
    for q, (name, layer) in weight_quantizers(model).items():
        elements = layer.weight.numel()
        seen.add(layer.weight)
        packed = packed_size(elements, q.spec.bits, q.step.numel(), 0 if q.offset is None else q.step.numel())
        layers.append(
            {"layer": name, "weights": elements, "bits": q.spec.bits, "float": 4 * elements, "packed": packed}
        )
    seen |= {t for _, q in quantizers(model) for t in (*q.parameters(), *q.buffers())}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if torch.is_floating_point(t) and t not in seen]
    rest = sum(4 * t.numel() for t in tensors)
    float_, packed = (sum(row[key] for row in layers) for key in ("float", "packed"))
    return layers, {"float": float_, "packed": packed, "rest": rest}
