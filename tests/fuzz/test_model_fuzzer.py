"""Random networks: every shipped form is equal to the trained network, or refused by a message that names the cause.

By hand, for other seeds, and to make a failing network smaller: ``python tests/fuzz/run.py`` (CONTRIBUTING.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers import fuzz_check
from helpers.fuzz_check import Failure, tags
from helpers.fuzz_draw import draw
from helpers.fuzz_nets import MODULES, OPERATIONS, Case, Node, build, data, without
from helpers.fuzz_run import Run, failure_of, told
from helpers.fuzz_shrink import shrink, simpler
from lsquant.shipped import frozen, record

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

# a drawn InstanceNorm need not fit the channels of what it reads
pytestmark = pytest.mark.filterwarnings("ignore:input's size at dim=")

FAST, PER_TEST = 200, 20
LINEAR = Node("linear", (0,), {"out": 4, "bias": True}, {"bits": 4}, {"bits": 4, "signed": True})
SMALL = Case(0, (((4,), 0),), (LINEAR, replace(LINEAR, of=(1,))))


@pytest.mark.parametrize("first", range(0, FAST, PER_TEST))
def test_every_form_is_equal_or_refused(first: int, tmp_path: Path) -> None:
    run = Run(tmp_path, onnx_every=4).over(range(first, first + PER_TEST))
    assert not run.failures, told(run)
    assert run.counts["checked"] > PER_TEST // 2


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, FAST + 5000, 50))
def test_more_seeds(first: int, tmp_path: Path) -> None:
    run = Run(tmp_path).over(range(first, first + 50))
    assert not run.failures, told(run)


# ---- the fuzzer itself ----


def test_a_seed_is_one_network_and_goes_through_json() -> None:
    for seed in range(50):
        case = draw(seed)
        assert draw(seed) == case
        assert Case.from_json(case.to_json()) == case


def test_the_seeds_draw_what_they_should() -> None:
    """The seeds of the fast test have every kind of layer, join and recipe, and few networks that cannot run."""
    seen: Counter[str] = Counter()
    for seed in range(FAST):
        case = draw(seed)
        seen.update(tags(case))
        for node in case.nodes:
            for spec in (node.weight, node.activation):
                if isinstance(spec, dict):
                    seen.update(f"{key} {value}" for key, value in spec.items() if key != "group_size")
            seen.update(f"{name} {node.options[name]}" for name in ("mode", "groups", "bias") if name in node.options)
            seen.update(["same"] * (node.same is not None))
        flags = {"autocast": case.autocast, "channels_last": case.channels_last, "guarded": case.guarded}
        flags |= {"again": case.again, "dynamic": case.dynamic, "first_last": case.first_last, "preset": case.preset}
        seen.update(name for name, value in flags.items() if value)
    wanted = {
        f"kind {kind}" for kind in ("linear", "embedding", "batchnorm", "add", "cat", "mul", "encoder", "quantizer")
    }
    wanted |= {f"kind {kind}{n}d" for kind in ("conv", "convt", "AvgPool") for n in (1, 2, 3)}
    wanted |= {f"bits {bits}" for bits in range(2, 9)} | {f"granularity {g}" for g in ("tensor", "channel", "group")}
    wanted |= {
        "signed True",
        "signed False",
        "narrow True",
        "offset True",
        "share",
        "same",
        "shared layouts",
        "value hook",
    }
    wanted |= {"hook", "made weight", "weight made by hooks", "late", "bfloat16", "float16", "float32", "groups 2"}
    wanted |= {"mode reflect", "mode replicate", "mode circular", "expanded", "transposed", "sliced", "profile qdq"}
    wanted |= {"autocast", "channels_last", "guarded", "again", "dynamic", "first_last", "preset", "weight-only linear"}
    assert sorted(wanted - set(seen)) == []


def test_nodes_can_be_taken_out() -> None:
    """A network without a node is one that runs, or one that PyTorch refuses."""
    ran = 0
    for seed in range(30):
        case = draw(seed)
        for i in range(len(case.nodes) if len(case.nodes) > 1 else 0):
            smaller = without(case, i)
            assert len(smaller.nodes) == len(case.nodes) - 1
            try:
                build(smaller)(*data(smaller, 0, 2))
            except (fuzz_check.Invalid, RuntimeError, ValueError):
                continue
            ran += 1
    assert ran > 30


def test_shrinking_keeps_what_fails() -> None:
    """A failure that needs one node, one option and one setting is brought down to these."""
    case = next(c for c in map(draw, range(1000)) if len(c.nodes) > 5 and c.autocast and _has_groups(c))

    def fails(smaller: Case) -> Failure | None:
        return Failure("a", "b") if smaller.autocast and _has_groups(smaller) else None

    small, _ = shrink(case, Failure("a", "b"), fails)
    assert len(small.nodes) == 1
    assert small.nodes[0].options["groups"] == 2
    assert replace(small, nodes=(), inputs=(), autocast=False, seed=0) == Case(0, (), ())


def _has_groups(case: Case) -> bool:
    return any(node.options.get("groups") == 2 for node in case.nodes)


def test_simpler_cases_are_simpler() -> None:
    for seed in range(30):
        case = draw(seed)
        assert all(smaller != case for smaller in simpler(case))


def _broken(name: str) -> tuple[Any, str, Callable[..., Any]]:
    """(object, attribute, broken attribute) of something that the fuzzer must see."""
    values, step = frozen.FrozenQuantizer.values, record.Quantizer.effective_step
    load, load_packed, revert = lsquant.load, lsquant.load_packed, lsquant.revert

    def shifted(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        with torch.no_grad():
            [q for _, q in lsquant.quantizers(model)][-1].step.mul_(1 + 1e-6)
        return model

    def halved(*args: Any, **kwargs: Any) -> Any:
        model = load_packed(*args, **kwargs)
        with torch.no_grad():
            next(m for m in model.modules() if isinstance(m, nn.Linear)).bias.mul_(0.5)
        return model

    def half_reverted(model: nn.Module) -> nn.Module:
        kinds = {m: type(m) for m in model.modules()}
        revert(model)
        for m, kind in kinds.items():
            if kind.__name__ == "ExactAvgPool2d":
                m.__class__ = kind
        return model

    return {
        "codes": (frozen.FrozenQuantizer, "values", lambda self: values(self) * 1.5),
        "guard": (record.Quantizer, "effective_step", lambda self: step(self) * 2),
        "load": (lsquant, "load", shifted),
        "packed": (lsquant, "load_packed", halved),
        "revert": (lsquant, "revert", half_reverted),
    }[name]


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("codes", "integer model"), ("guard", "integer model"), ("load", "load"), ("packed", "load_packed"),
        ("revert", "revert"),
    ],
)  # fmt: skip
def test_what_is_broken_is_found(name: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = SMALL
    if name == "revert":
        conv = Node("conv2d", (0,), {
            "out": 4, "kernel": [3, 3], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1,
            "bias": True, "mode": "zeros",
        })  # fmt: skip
        case = Case(0, (((4, 6, 6), 0),), (conv, Node("AvgPool2d", (1,), {"kernel_size": 2, "stride": None})))
    assert failure_of(case, tmp_path) is None
    monkeypatch.setattr(*_broken(name))
    failure = failure_of(case, tmp_path, onnx=False)
    assert failure is not None
    assert failure.stage == stage


def test_a_refusal_without_a_cause_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise lsquant.UsageError("linear0: not today")

    monkeypatch.setattr(lsquant, "export_packed", refuse)
    failure = failure_of(SMALL, tmp_path, onnx=False)
    assert failure is not None
    assert (failure.stage, failure.what[:8]) == ("packed file", "refused:")


def test_all_kinds_can_be_built() -> None:
    """No kind is drawn that cannot be built; what is never drawn is no kind."""
    drawn = {node.kind for seed in range(600) for node in draw(seed).nodes}
    assert sorted(drawn ^ (MODULES.keys() | OPERATIONS.keys())) == []
