"""ONNX files of networks of the fuzzer, many networks in one graph, because writing a graph is what takes time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

import lsquant
from helpers.fuzz_check import Failure, Refused, Trained, compare, extra_of_a_stride, flat, run, stage, tags
from helpers.fuzz_nets import ACTIVATIONS, POOLS, QUANTIZED, data

EXACT, CLOSE, ANY = 0, 1, 2
"""A value in a runtime: equal bit for bit; within the tolerance; behind a code that may be another one."""
TOLERANCE = 2e-3
FLOAT_OPERATIONS = {
    "mean", "matmul", "sdpa", "attention", "recurrent", "encoder", "layernorm", "groupnorm", "instancenorm",
    *ACTIVATIONS,
} - {"relu", "relu6", "leaky", "hardtanh", "identity"}  # fmt: skip
"""Kinds that a runtime computes in an order of its own."""


class Side(nn.Module):
    """Networks side by side."""

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)

    def forward(self, inputs: list[list[Tensor]]) -> list[list[Tensor]]:
        return [flat(net(*mine)) for net, mine in zip(self.nets, inputs, strict=True)]


def precision(found: Trained) -> list[int]:
    """Return for each output how near a runtime must come."""
    case, model = found.case, found.model
    levels = [EXACT] * len(case.inputs)
    for i, node in enumerate(case.nodes):
        level = max(levels[k] for k in node.of)
        module: Any = getattr(model, case.name(i), None)
        if node.kind in QUANTIZED or node.kind == "quantizer":
            weight, source = getattr(module, "weight_quantizer", None), getattr(module, "input_quantizer", None)
            if level and (source is not None or node.kind == "quantizer"):
                level = ANY
            in_blocks = weight is not None and weight.spec.group_size is not None and node.kind == "conv2d"
            if node.kind != "quantizer" and (weight is None or source is None or in_blocks or case.profile == "qdq"):
                level = max(level, CLOSE)
        elif node.kind == "encoder":
            level = ANY  # quantized layers inside, behind a softmax
        elif node.kind in ("mlp", "twice", "unbatched", "subclass"):
            level = max(level, _of_parts(module, level, case.profile))
        elif node.kind in ("layernorm", "groupnorm", "instancenorm") and case.strange == "expanded":
            level = ANY  # equal values have no variance: what is normalized is the noise of rounding
        elif node.kind in FLOAT_OPERATIONS:
            level = max(level, CLOSE)
        elif node.kind == "batchnorm" or ("Avg" in node.kind and node.kind in POOLS):
            level = level if type(module).__name__.startswith("Exact") else max(level, CLOSE)
        levels.append(level)
    return [levels[i] for i in case.leaves()]


def _of_parts(module: nn.Module, level: int, profile: str) -> int:
    """How near the output of a module of several layers must come, given its input."""
    layers = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]
    for layer in layers * (2 if len(layers) == 1 else 1):  # one layer may be called twice
        weight, source = getattr(layer, "weight_quantizer", None), getattr(layer, "input_quantizer", None)
        level = ANY if level and source is not None else level
        level = max(level, CLOSE if weight is None or source is None or profile == "qdq" else EXACT)
    return level


def goes_alone(found: Trained) -> bool:
    """Tell whether a network has a file of its own: where it may be refused, and where its batch is free."""
    mine = tags(found.case)
    risky = {"value hook", "weight made by hooks", "shared layouts", "late", "groups of conv2d"}
    unknown = any(
        tag.startswith(("kind AdaptiveMaxPool", "kind AdaptiveAvgPool3d")) for tag in mine
    )  # to torch's exporter
    odd = any(node.options.get("ceil_mode") or extra_of_a_stride(node) for node in found.case.nodes)
    return found.case.dynamic or found.case.dtype != "float32" or unknown or odd or bool(risky & mine)


def check_alone(found: Trained, path: Path) -> None:
    """Check the file of one network, written and run as a user does.  Raises: Failure."""
    case = found.case
    example = data(case, 0, 4)
    batch: Any = example[0] if len(example) == 1 else {f"x{i}": x for i, x in enumerate(example)}
    try:
        with stage("onnx", found, case, found.model):
            lsquant.export_onnx(found.model, path, batch, profile=case.profile)
    except Refused:
        return
    with stage("onnx file", found, case, found.model):
        session = lsquant.onnx_session(path)
        for inputs in found.batches:
            compare_outputs([found], session, inputs)


def check_together(group: list[Trained], path: Path) -> None:
    """Check one file of several networks with one profile.  Raises: Failure naming the network."""
    side = Side([found.model for found in group]).eval()
    profile, first = group[0].case.profile, group[0]
    examples = [[data(found.case, k, 3) for found in group] for k in (0, 1)]
    with stage("onnx", first, first.case, side):
        from lsquant.formats.onnx import onnx_model

        proto = onnx_model(side, (examples[0],), profile=profile, dynamic_batch=False)
        path.write_bytes(proto.SerializeToString())
    with stage("onnx file", first, first.case, side):
        session = lsquant.onnx_session(path)
        for inputs in examples:
            compare_outputs(group, session, [x for mine in inputs for x in mine], inputs)
    with stage("verify", first, first.case, side):
        verdict = lsquant.verify(side, path, [(inputs,) for inputs in examples], forward=lambda m, b: m(b[0]))
        if verdict.level == "none":
            raise Failure("verify", "not the trained weights", str(verdict))
        if all(level == EXACT for found in group for level in precision(found)) and not verdict.exact:
            raise Failure("verify", "not exact", str(verdict))


def compare_outputs(
    group: list[Trained], session: Any, inputs: list[Tensor], each: list[list[Tensor]] | None = None
) -> None:
    """Compare what a session gives with what the networks give, as near as each output must come."""
    feeds = {place.name: x.numpy() for place, x in zip(session.get_inputs(), inputs, strict=True)}
    got = iter(session.run(None, feeds))
    for found, mine in zip(group, each or [inputs], strict=True):
        want = run(found.model, mine)
        for level, y in zip(precision(found), want, strict=True):
            out = next(got)
            name = "onnx file"
            try:
                if level == ANY:
                    if out.shape != y.shape or out.dtype != y.dtype or not np.isfinite(out).all():
                        raise Failure(
                            name, "other shapes or values", f"{out.shape} {out.dtype}, not {y.shape} {y.dtype}"
                        )
                else:
                    compare(name, [out], [y], tolerance=TOLERANCE if level == CLOSE else 0.0)
            except Failure as failure:
                raise Failure(failure.stage, failure.what, f"seed {found.case.seed}: {failure}") from failure
    assert next(got, None) is None
