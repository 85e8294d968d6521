"""Writes the program of an integer-only network: its steps as JSON, its codes and constants as tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsquant import nn as lnn
from lsquant._util.bits import pack
from lsquant._util.errors import UsageError
from lsquant._util.tensors import write_tensors
from lsquant._version import __version__
from lsquant.dataflow import Node
from lsquant.formats.subpixel import as_written, spread_of
from lsquant.fusion.functions import all_codes, function_quotients
from lsquant.fusion.network import FusedNetwork, Run, fuse, limits_of
from lsquant.nn.pool import is_windowed, sizes_of, window_geometry
from lsquant.program import Kind, Step, gives_parts, output_nodes, whole
from lsquant.shipped import require_all_shippable

FORMAT, WITH_ZEROS = 1, 2
"""Of a program, and of one with zero points, which readers of the first would take for 0."""
KEY = "lsquant.program"
Entry = dict[str, Any]


def export_program(network: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write an integer-only network as a program that needs no runtime: docs/integer-only.md has a reader.

    network: a fused network, or a trained model, which is fused.
    path: of the file, usually ``.safetensors``.  Returned.

    Raises: UsageError naming a step that is in floating point, or has no form; MissingFile; DiskFull (the old file is
        then unchanged).
    """
    fused = network if isinstance(network, FusedNetwork) else fuse(network)
    document, tensors = program_content(fused)
    versions = {"lsquant": __version__, "torch": torch.__version__}
    write_tensors(path, tensors, {KEY: json.dumps({**document, "versions": versions}, separators=(",", ":"))})
    return Path(path)


@torch.no_grad()
def program_content(network: FusedNetwork) -> tuple[Entry, dict[str, Tensor]]:
    """Return (document, tensors) of a fused network.  Raises: UsageError naming a step that has no form."""
    program = network.program
    require_all_shippable(network.model)
    if program.floats:
        step = program.floats[0]
        raise UsageError(
            f"{step.name}: {type(step.module).__name__} is computed in floating point, and a program has codes only; "
            "use profile='integer'"
        )
    run = network.run()
    tensors = {f"{name}.step": step.clone() for name, step in network.stored_steps().items()}
    steps = [entry for step in program.steps for entry in _entries(run, step, tensors)]
    document = {
        "format": WITH_ZEROS if any("zero" in entry for entry in steps) else FORMAT,
        "inputs": [node.name for node in program_inputs(network)],
        "outputs": [node.name for node in output_nodes(program.flow)],
        "steps": steps,
    }
    return document, tensors


def program_inputs(network: FusedNetwork) -> list[Node]:
    """Return the inputs that a step reads, in the order in which the model takes them."""
    read = {step.node for step in network.program.steps if step.kind is Kind.QUANTIZE}
    return [node for node in network.program.flow.nodes if node.kind == "input" and node in read]


def _entries(run: Run, step: Step, tensors: dict[str, Tensor]) -> list[Entry]:
    """Return what the document says of a step, one entry or several; constants join the tensors."""
    module = step.module
    if gives_parts(step.node):
        return []
    entry = _entry(run, step, tensors)
    spread = spread_of(module, step.name, "export_program")
    if spread is None:
        return [entry]
    if "high" not in entry or len(spread.kernel) != 2:
        raise UsageError(f"{step.name}: {type(module).__name__} whose output is real, or not an image, has no form")
    name, made = step.end.name, f"{step.end.name}/channels"
    tensors[f"{made}.step"] = tensors[f"{name}.step"].clone()
    moves: list[Entry] = [{"move": "pixel_shuffle", "factor": spread.block}]
    if any(map(any, spread.crop)):
        sides = [[before, -after or None, None] for before, after in spread.crop]
        moves.append({"move": "slice", "index": [[None, None, None]] * 2 + sides})
    names = [made, *(f"{name}/{i}" for i in range(len(moves) - 1)), name]
    others = [
        {"name": to, "op": "move", "reads": [of], **move}
        for of, to, move in zip(names, names[1:], moves, strict=False)
    ]  # fmt: skip
    return [{**entry, "name": made}, *others]


def _entry(run: Run, step: Step, tensors: dict[str, Tensor]) -> Entry:
    """Return what the document says of a step; its constants join the tensors."""
    quantizes = step.kind is Kind.QUANTIZE
    reads = [step.node.name] if quantizes else [whole(source).name for source in step.node.inputs]
    entry: Entry = {"name": step.end.name, "op": step.kind.value, "reads": reads}
    if step.kind is Kind.CAT:
        return {**entry, "op": "concat", "axis": step.module.dim}
    if step.kind is Kind.MOVE:
        return {**entry, **_move(step)}
    if run.program.stored[step.end] is not None:
        grid = run.limited(step)
        entry |= {"low": grid.low + grid.zero, "high": grid.high + grid.zero}
        entry |= {"zero": grid.zero} if grid.zero else {}
    elif step.limit is not None:
        entry["limit"] = list(limits_of(step.limit))
    return {**entry, **_OF_KIND[step.kind](run, step, tensors)}


def _layer(run: Run, step: Step, tensors: dict[str, Tensor]) -> Entry:
    layer = step.module
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise UsageError(f"{step.name}: {type(layer).__name__} with these options has no form in a program")
    constants = as_written(layer, run.folded(step), step.name, "export_program")
    codes = constants.codes.to(torch.int64).cpu().numpy()
    bits = max(2, 1 + int(max(codes.max(initial=0), -1 - codes.min(initial=0))).bit_length())
    tensors[f"{step.name}.codes"] = torch.from_numpy(pack(codes, bits))
    tensors[f"{step.name}.weight_step"] = constants.step.clone()
    tensors[f"{step.name}.bias"] = constants.bias.to(torch.int32)
    entry: Entry = {"layer": step.name, "bits": bits, "shape": list(codes.shape)}
    if layer.stored_quantizer is not None:
        grid = run.read_grid(step)
        tensors[f"{step.name}.read_step"] = grid.step.detach().clone()
        entry["reader"] = [grid.low, grid.high]
    if isinstance(layer, nn.Linear):
        return entry
    spread = spread_of(layer, step.name, "export_program")
    sides = [list(pair) for pair in (layer.padding_sides() if spread is None else spread.padding)]
    stride = list(layer.stride) if spread is None else [1] * len(sides)
    geometry = {"stride": stride, "padding": sides, "dilation": list(layer.dilation)}
    return {**entry, **geometry, "groups": layer.groups}


def _average(run: Run, step: Step, tensors: dict[str, Tensor]) -> Entry:
    module = step.module
    if is_windowed(module):
        kernel, stride, padding = window_geometry(module)
        sides = [[side, side] for side in padding]
        return {"kernel": kernel, "stride": stride, "padding": sides, "dilation": [1] * module.dims}
    if isinstance(module, lnn.Mean):
        return {"axes": list(module.dim), "keep": module.keepdim}
    return {"axes": list(range(-module.dims, 0)), "keep": True}


def _function(run: Run, step: Step, tensors: dict[str, Tensor]) -> Entry:
    read, out = run.grid(step.node.inputs[0]), run.grid(step.end)
    every = all_codes(read.low, read.high, read.step.device)
    quotients = function_quotients(step.module, every, read.step.detach(), out.step.detach())
    tensors[f"{step.end.name}.table"] = torch.round(quotients).clamp(out.low, out.high).to(torch.int32)
    return {"first": read.low}


def _part(step: Step) -> Entry:
    """Return what is said of a part of what Chunk or Split cuts, or of an index."""
    cutter, index = step.node.inputs[0].module, step.node.call.args[1]
    if isinstance(cutter, lnn.Chunk) and isinstance(index, int) and index >= 0 and cutter.dim >= 0:
        return {"move": "chunk", "chunks": cutter.chunks, "axis": cutter.dim, "part": index}
    if (
        isinstance(cutter, lnn.Split)
        and isinstance(index, int)
        and not isinstance(cutter.sizes, int)
        and cutter.dim >= 0
    ):
        index %= len(cutter.sizes)
        start, others = sum(cutter.sizes[:index]), [[None, None, None]] * cutter.dim
        return {"move": "slice", "index": [*others, [start, start + cutter.sizes[index], None]]}
    parts: Any = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(part, slice) for part in parts):
        raise UsageError(
            f"{step.name}: the index {index} has no form in a program; use Chunk or Split with a dimension and places "
            "from the front, or lsquant.nn.Slice"
        )
    return {"move": "slice", "index": [[part.start, part.stop, part.step] for part in parts]}


def _move(step: Step) -> Entry:
    module, kind = step.module, type(step.module).__name__
    if module is None:
        return _part(step)
    n = int(kind[-2]) if kind.endswith("d") and kind[-2].isdigit() else 0
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return {"move": "flatten"}
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) and not module.ceil_mode:
        options = (module.kernel_size, module.stride, module.padding, module.dilation)
        kernel, stride, padding, dilation = (list(sizes_of(option, n) or ()) for option in options)
        sides = [[side, side] for side in padding]
        return {"move": "max_pool", "kernel": kernel, "stride": stride, "padding": sides, "dilation": dilation}
    if isinstance(module, lnn.Slice) and all(isinstance(part, slice) for part in module.index):
        slices: Any = module.index
        return {"move": "slice", "index": [[part.start, part.stop, part.step] for part in slices]}
    if isinstance(module, nn.Upsample) and module.size is None:
        factor: Any = module.scale_factor
        factors = list(factor) if isinstance(factor, tuple) else [factor]
        if all(f == int(f) for f in factors):
            return {"move": "upsample", "factors": [int(f) for f in factors]}
    if isinstance(module, nn.PixelShuffle):
        return {"move": "pixel_shuffle", "factor": module.upscale_factor}
    if n and kind.endswith(f"Pad{n}d") and min(vars(module)["padding"]) >= 0:
        pairs = list(vars(module)["padding"])
        last = [[pairs[i], pairs[i + 1]] for i in reversed(range(0, len(pairs), 2))]
        return {"move": "pad", "padding": last}  # of the last dimensions, which may be the channels, too
    raise UsageError(f"{step.name}: {kind} with these options has no form in a program")


def _nothing(run: Run, step: Step, tensors: dict[str, Tensor]) -> Entry:
    return {}


_OF_KIND: dict[Kind, Callable[[Run, Step, dict[str, Tensor]], Entry]] = {
    Kind.QUANTIZE: _nothing,
    Kind.LAYER: _layer,
    Kind.ADD: _nothing,
    Kind.MULTIPLY: _nothing,
    Kind.AVERAGE: _average,
    Kind.FUNCTION: _function,
}
