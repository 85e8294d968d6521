"""Runs the model types of `model_table.py`, and writes what came of it: python tests/helpers/model_types.py --write"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lsquant
from helpers.model_table import KNOWN, TYPES, Batch, Result
from lsquant.nn import quantized_layers


def build(name: str) -> nn.Module:
    """A fresh float model in eval mode.  Raises: ImportError where transformers does not know it."""
    import transformers

    entry = TYPES[name]
    cls = getattr(transformers, entry.cls, None)
    if cls is None:
        raise ImportError(f"transformers {transformers.__version__} has no {entry.cls}")
    return cls(cls.config_class(**entry.config)).eval()


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors of a model's output, in order."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for one in output.values() if isinstance(output, Mapping) else output:
            yield from tensors(one)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    model.eval()
    torch.manual_seed(1)  # for models that draw, patches for instance, in eval mode too
    return [t.clone() for t in tensors(model(**batch))]


def loss_of(output: Any) -> Tensor:
    """The model's own loss where it has one, else the mean square of all it gives."""
    loss = getattr(output, "loss", None)
    return torch.stack([t.square().mean() for t in tensors(output)]).sum() if loss is None else loss


def run(name: str, folder: Path) -> Result:
    """The whole way of one model type; an AssertionError or lsquant's own error says where it ends."""
    torch.manual_seed(0)
    model, batch = build(name), TYPES[name].batch()
    keys = list(model.state_dict())
    as_float = outputs(model, batch)
    assert all(bool(torch.isfinite(t).all()) for t in as_float), "the float model is not finite"

    changes = lsquant.prepare(model, lsquant.Recipe.preset("w4a8", skip=TYPES[name].skip), example_inputs=batch)
    lsquant.calibrate(model, [batch, TYPES[name].batch()])
    assert not same(outputs(model, batch), as_float), "quantization changes nothing"

    layers = dict(quantized_layers(model))
    reached = train_one_step(model, batch)
    quantized = outputs(model, batch)
    lsquant.save(model, folder / "model.safetensors")
    loaded = lsquant.load(build(name), folder / "model.safetensors")
    assert same(outputs(loaded, batch), quantized), "the loaded model's outputs differ"

    lsquant.revert(model)
    assert list(model.state_dict()) == keys, "revert leaves other keys"
    fresh = build(name)
    fresh.load_state_dict(model.state_dict())
    assert same(outputs(model, batch), outputs(fresh, batch)), "the reverted model's outputs differ"
    assert reached, "no layer was reached"
    return Result(changes, len(layers))


def train_one_step(model: nn.Module, batch: Batch) -> set[str]:
    """Forward, backward, SGD; names of the layers reached, whose steps have gradients where the weight has."""
    model.train()
    reached: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, n=n: reached.add(n)) for n, layer in quantized_layers(model)]
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=1e-3))
    loss = loss_of(model(**batch))
    assert bool(torch.isfinite(loss)), f"the loss is {loss}"
    loss.backward()
    for hook in hooks:
        hook.remove()
    for name, layer in quantized_layers(model):
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if name in reached and quantizer is not None and layer.weight.grad is not None:
                gradient = quantizer.step.grad
                assert gradient is not None, f"{quantizer.name} has no gradient"
                assert bool(torch.isfinite(gradient).all()), f"{quantizer.name}'s gradient is not finite"
    optimizer.step()
    return reached


# ---- the table of docs/support.md ----

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
BEGIN, END = "<!-- begin: model types (generated) -->", "<!-- end: model types -->"
HEAD = ("type", "kind", "class", "layers quantized", "share of weights", "passes", "stays float")


def _kind_of_reason(change: Any) -> str:
    """The reason of a row, short."""
    kind, reason = change.kind, change.reason
    if "without calling the layer" in reason:
        return f"{kind} whose weight is used without calling it"
    if "uses its weights" in reason:
        return kind
    if "it holds" in reason:
        return f"own parameters of {kind}"
    if "parametrized" in reason:
        return f"parametrized {kind.removeprefix('Parametrized')}"
    if "the recipe" in reason:
        return f"`{change.name}` (`skip=`)"
    return kind


def row(name: str, result: Result | None) -> tuple[str, ...]:
    """The cells of one type; None: the type is one of KNOWN."""
    entry = TYPES[name]
    cells = name, entry.kind, f"`{entry.cls}`"
    if result is None:
        return *cells, "", "", "no", KNOWN[name]
    floats = dict.fromkeys(_kind_of_reason(c) for c in result.changes if c.weight == "float" and c.weights)
    passes = "yes" + (f", `skip={list(entry.skip)}`" if entry.skip else "")
    return *cells, str(result.layers), f"{result.changes.weight_share:.0%}", passes, "; ".join(floats)


def rows_of_page() -> dict[str, tuple[str, ...]]:
    """Type -> the cells of its row, as the page has them."""
    text = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    rows = [tuple(cell.strip() for cell in line[1:-1].split("|")) for line in lines]
    return {cells[0]: cells for cells in rows}


def same_version() -> bool:
    """Whether the page was made with the transformers that is installed, but for the last number."""
    import transformers

    return f"transformers {_short(transformers.__version__)}" in PAGE.read_text().partition(BEGIN)[2]


def _short(version: str) -> str:
    return ".".join(version.split(".")[:2])


def write_page() -> None:
    """Run all types and renew the page's table."""
    import tempfile

    rows = []
    for name in TYPES:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, None if name in KNOWN else run(name, Path(folder))))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    render(rows)


def render(rows: Sequence[tuple[str, ...]]) -> None:
    """Put the rows on the page, between its markers."""
    import transformers

    little = [cells[0] for cells in rows if cells[4] and int(cells[4].rstrip("%")) < 50]
    passing = len(TYPES) - len(KNOWN)
    text = (
        f"{passing} of {len(TYPES)} model types pass ({passing / len(TYPES):.0%}), with transformers "
        f"{_short(transformers.__version__)}, tiny configurations, preset `w4a8`, on a CPU. *Passes*: `prepare` with "
        "example inputs, `calibrate`, one training step in which a layer's steps get gradients where its weight does, "
        "`save`; `load` into a fresh model gives equal outputs, and after `revert` they equal those of a float model "
        "with the same weights. *Share of weights*: quantized ones over all that `Changes` lists, embeddings included; "
        "in a tiny model embeddings weigh more than in a real one. *Stays float*: what `Changes` names, with reasons; "
        "a weight shared with a quantized layer counts as quantized. Passing says nothing about how much is quantized: "
        f"less than half of the weights in {', '.join(little)}."
    )
    lines = [
        BEGIN,
        *textwrap.wrap(text, 120, break_on_hyphens=False),
        "",
        "| " + " | ".join(HEAD) + " |",
        "|" + "---|" * len(HEAD),
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        "`PYTHONPATH=tests python tests/helpers/model_types.py --write` makes this table; "
        "`tests/convert/test_model_types.py` compares each row.",
        END,
    ]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + "\n".join(lines) + rest.partition(END)[2])


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/helpers/model_types.py --write")
    write_page()
