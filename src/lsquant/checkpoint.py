"""``save`` and ``load``: weights, steps and recipe of a quantized model in one safetensors file.

Nothing in the file is executed.  The tensors are the state dict; tied tensors are stored once.  Metadata keys:

- ``lsquant.format``: 1
- ``lsquant.recipe``: TOML, one rule per layer
- ``lsquant.aliases``: JSON, second name -> stored name
- ``lsquant.versions``: JSON
- ``lsquant.checksum``: of all names, tensors and metadata; a file that does not fit it is refused
- whatever the caller adds
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.batches import require_one_process, unwrapped
from lsquant._util.entry import parse_json, shown
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.rollback import unchanged_on_error
from lsquant._util.tensors import on_meta, read_tensors, write_tensors
from lsquant._version import __version__ as VERSION
from lsquant.convert import prepare, resolved_recipe
from lsquant.joining import require_outermost
from lsquant.nn import QuantizedLayer, quantized_layers, quantizers
from lsquant.recipe import Recipe, recipe_of_file
from lsquant.tied import TiedQuantizer
from lsquant.tying import require_one_quantizer_each, stored_once
from lsquant.unsupported import require_fit, warn_of_added

FORMAT = "1"
QUANTIZERS = frozenset({"weight_quantizer", "input_quantizer", "stored_quantizer", "input_quantizers"})
BUFFERS: dict[str, Callable[[Tensor], bool]] = {
    "step": lambda t: t.dtype == torch.float32 and t.dim() == 1,
    "offset": lambda t: t.dtype == torch.float32 and t.dim() == 1,
    "initial_step": lambda t: t.dtype == torch.float32 and t.dim() == 1,
    "signed": lambda t: t.dtype == torch.int8 and t.dim() == 0 and -1 <= int(t) <= 1,
    "count": lambda t: t.dtype == torch.int64 and t.dim() == 0 and int(t) >= 0,
    "initialized": lambda t: t.dtype == torch.bool and t.dim() == 0,
    "bounds": lambda t: t.dtype == torch.int32 and t.shape == (2,),
}
"""What a quantizer's tensors in a file have to be; the values of steps are the guard's business."""


def save(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a prepared model's weights, steps and recipe to one file.

    The file is written aside and renamed, so that it is whole or the old one.

    model: prepared.
    path: of the file, usually ``.safetensors``.
    metadata: more strings to keep in the file; keys beginning with "lsquant." are lsquant's own.
    Raises: UsageError for a model without quantized layers, for a layer whose weight is made by a hook, does not fit
        its steps, is not finite or was tied to another after ``prepare``, and for a value in the state dict that is no
        tensor; MissingFile, DiskFull (the old file is then
        unchanged).
    Warns: UserWarning naming layers that came into the model after ``prepare``.
    """
    model = unwrapped(model)
    if not any(True for _ in quantized_layers(model)):
        raise UsageError("save: the model has no quantized layer; call lsquant.prepare(model, recipe) first")
    require_outermost(model, "save")
    if empty := on_meta(model):
        raise UsageError(f"save: {empty[0]!r} is on the meta device and holds no values; load a state first")
    require_one_quantizer_each(model)
    for name, layer in quantized_layers(model):
        require_fit(name, layer)
        _require_finite(name, layer)
    warn_of_added(model)
    more = dict(metadata) if isinstance(metadata, Mapping) else {}
    if metadata is not None and (more != metadata or not all(_is_text(t) for item in more.items() for t in item)):
        raise UsageError("save: metadata has to be a mapping of texts to texts; write other values as JSON")
    stored, aliases = stored_once(model)
    ours = {
        "lsquant.format": FORMAT,
        "lsquant.recipe": resolved_recipe(model).to_toml(),
        "lsquant.aliases": json.dumps(aliases),
        "lsquant.versions": json.dumps({"lsquant": VERSION, "torch": torch.__version__}),
    }
    write_tensors(path, stored, {**more, **ours})


def _is_text(value: Any) -> bool:
    """Whether a value is a text that UTF-8 can hold."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _require_finite(name: str, layer: QuantizedLayer) -> None:
    """Raise UsageError for weights that are NaN or infinite: they have no codes."""
    if layer.weight_quantizer is None or bool(torch.isfinite(layer.weight.detach()).all()):
        return
    bad = int((~torch.isfinite(layer.weight.detach())).sum())
    raise UsageError(
        f"save: {bad} of the weights of layer {name!r} are NaN or infinite; go back to the last good checkpoint, lower "
        "the learning rate or clip gradients"
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a file written by ``save``.

    Raises: MissingFile, DamagedFile; UsageError for a file of another kind.
    """
    return _read(path, with_tensors=False)[0]


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise what ``load`` raises for the content of a file: MissingFile, DamagedFile, UsageError for another kind."""
    _read(path, with_tensors=True)


def _read(path: str | os.PathLike[str], with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    metadata, tensors, sound = read_tensors(path, with_tensors=with_tensors)
    version = metadata.get("lsquant.format")
    if version is None:
        if "lsquant.packed" in metadata:
            raise UsageError(f"{path} is a packed file: use lsquant.load_packed(model, path)")
        raise UsageError(
            f"{path} was not written by lsquant.save: it has no recipe. Use "
            "model.load_state_dict(safetensors.torch.load_file(path)): before or after prepare for a float checkpoint, "
            "after prepare by the recipe that it was made with for one with quantizers"
        )
    if not re.fullmatch("[0-9]{1,6}", version, re.ASCII):
        raise DamagedFile(f"{path} is damaged: lsquant.format is {shown(version)}; needed is a number")
    if version != FORMAT:
        raise UsageError(f"{path} has format {version}; lsquant {VERSION} reads format {FORMAT}: update lsquant")
    if with_tensors and not sound:
        raise DamagedFile(f"{path} is damaged: its checksum does not fit its content")
    return metadata, tensors


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Prepare a model by a file's recipe and load its weights and steps; nothing is left to calibrate.

    model: the float architecture, or the prepared one.
    path: of a file written by ``save``.
    Returns: the model.
    Raises: MissingFile, DamagedFile; UsageError for another architecture, and for a model on the meta device.  Whatever
        is raised, a KeyboardInterrupt too, the model is then unchanged, bit for bit.
    """
    metadata, tensors = _read(path, with_tensors=True)
    recipe, state = _content(metadata, tensors, os.fspath(path))
    return restore(model, recipe, state, path)


def _content(metadata: Mapping[str, str], tensors: dict[str, Tensor], file: str) -> tuple[Recipe, dict[str, Tensor]]:
    """Return the recipe and the state dict of a file, checked.  Raises: DamagedFile naming file and key."""
    aliases = parse_json(metadata.get("lsquant.aliases", "{}"), file, "lsquant.aliases")
    state = dict(tensors)
    for name, entry in aliases.table().items():
        first = entry.text()
        entry.require(first in tensors, f"it names {shown(first)}, which is not there")
        entry.require(name not in tensors, "it is a tensor of its own")
        state[name] = tensors[first]
    if "lsquant.recipe" not in metadata:
        aliases.at("lsquant.recipe", None).refuse("it is missing")
    for name, tensor in state.items():
        kind = name.rpartition(".")[2] if QUANTIZERS.intersection(name.split(".")) else ""
        if kind in BUFFERS and not BUFFERS[kind](tensor):
            raise DamagedFile(f"{file} is damaged: {shown(name)} has a type or a value that no quantizer has")
    return recipe_of_file(metadata["lsquant.recipe"], f"{file}: lsquant.recipe"), state


def restore(model: nn.Module, recipe: Recipe, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> nn.Module:
    """Prepare a model by a recipe and load a state dict, or leave the model unchanged.

    tensors: name -> tensor, the state dict.
    path: of the file they come from, for messages.
    Returns: the model.
    Raises: UsageError for another architecture or a model on the meta device.
    """
    given, model = model, require_one_process(model, "load")
    if empty := on_meta(model):
        raise UsageError(
            f"{path} cannot be loaded: {len(empty)} tensors of {type(model).__name__}, {empty[0]!r} the first, are on "
            "the meta device and hold no values; build the model outside torch.device('meta'), or call "
            "model.to_empty(device='cpu') first"
        )
    _check_architecture(model, tensors, path)
    _check_ties(model, tensors, path)
    try:
        with unchanged_on_error(model.modules()):
            prepare(model, recipe)
            for name, quantizer in quantizers(model):
                needed = f"{name}.{'signed' if isinstance(quantizer, TiedQuantizer) else 'step'}"
                if needed not in tensors:
                    raise UsageError(f"the file lacks {needed}, which its recipe needs")
            model.load_state_dict(tensors)
    except (UsageError, RuntimeError) as error:
        hint = "" if recipe.joins is None else "; call lsquant.trace(model, example_inputs) first, if it was traced"
        raise UsageError(f"{path} does not fit {type(model).__name__}: {' '.join(str(error).split())}{hint}") from error
    return given


def _check_architecture(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise UsageError where the float parts of model and file differ; nothing is changed yet."""

    optional = {f"{name}.bounds" for name, _ in quantizers(model)}  # which files of earlier versions do not have

    def is_float_key(name: str) -> bool:
        parts = name.split(".")
        return name not in optional and not QUANTIZERS.intersection(parts)

    kinds = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}  # an extra state may be anything
    mine = {k: tuple(v.shape) for k, v in kinds.items() if is_float_key(k)}
    theirs = {k: tuple(v.shape) for k, v in tensors.items() if is_float_key(k)}
    problems = [f"the file lacks {k}" for k in mine if k not in theirs]
    problems += [f"the model lacks {k}" for k in theirs if k not in mine]
    differ = [k for k, shape in mine.items() if theirs.get(k, shape) != shape]
    problems += [f"{k} is {theirs[k]} in the file and {mine[k]} in the model" for k in differ]
    differ = [k for k in mine if k in tensors and _kind(tensors[k]) != _kind(kinds[k])]
    problems += [f"{k} is {tensors[k].dtype} in the file and {kinds[k].dtype} in the model" for k in differ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        kind = type(model).__name__
        found = "; ".join(problems[:3]) + more
        raise UsageError(f"{path} is of another architecture than {kind}: {found}. Build the model that was saved")


def _check_ties(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise UsageError where the model has one tensor and the file two different ones, of which one would be lost."""
    for second, first in stored_once(model)[1].items():
        mine, other = tensors.get(first), tensors.get(second)
        if mine is None or other is None or mine is other or _same_bits(mine, other):
            continue
        raise UsageError(
            f"{path} does not fit {type(model).__name__}: {first!r} and {second!r} are one tensor in the model and two "
            "different ones in the file; load it into a model that is not tied, as the saved one was"
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """Return what a copy does not change silently: whether numbers are floating and whether they are complex."""
    return tensor.is_floating_point(), tensor.is_complex()
