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
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lsquant._util.batches import unwrapped
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.rollback import unchanged_on_error
from lsquant._util.tensors import on_meta, read_tensors, write_tensors
from lsquant._version import __version__ as VERSION
from lsquant.convert import prepare, resolved_recipe
from lsquant.nn import quantized_layers, quantizers
from lsquant.recipe import Recipe
from lsquant.tying import stored_once

FORMAT = "1"


def save(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
    """Write a prepared model's weights, steps and recipe to one file.

    The file is written aside and renamed, so that it is whole or the old one.

    model: prepared.
    path: of the file, usually ``.safetensors``.
    metadata: more strings to keep in the file; keys beginning with "lsquant." are lsquant's own.
    Raises: UsageError for a model without quantized layers; MissingFile, DiskFull (the old file is then unchanged).
    """
    model = unwrapped(model)
    if not any(True for _ in quantized_layers(model)):
        raise UsageError("save: the model has no quantized layer; call lsquant.prepare(model, recipe) first")
    if empty := [name for name, t in model.state_dict().items() if t.is_meta]:
        raise UsageError(f"save: {empty[0]!r} is on the meta device and holds no values; load a state first")
    stored, aliases = stored_once(model)
    ours = {
        "lsquant.format": FORMAT,
        "lsquant.recipe": resolved_recipe(model).to_toml(),
        "lsquant.aliases": json.dumps(aliases),
        "lsquant.versions": json.dumps({"lsquant": VERSION, "torch": torch.__version__}),
    }
    write_tensors(path, stored, {**(metadata or {}), **ours})


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read the metadata of a file written by ``save``.

    Raises: MissingFile, DamagedFile; UsageError for a file of another kind.
    """
    return _read(path, with_tensors=False)[0]


def _read(path: str | os.PathLike[str], with_tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    metadata, tensors, sound = read_tensors(path, with_tensors=with_tensors)
    version = metadata.get("lsquant.format")
    if version is None:
        if "lsquant.packed" in metadata:
            raise UsageError(f"{path} is a packed file: use lsquant.load_packed(model, path)")
        raise UsageError(
            f"{path} was not written by lsquant.save: it has no recipe. For a float checkpoint use "
            "model.load_state_dict(safetensors.torch.load_file(path)), before or after prepare"
        )
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
    try:
        for name, first in json.loads(metadata.get("lsquant.aliases", "{}")).items():
            tensors[name] = tensors[first]
        recipe = Recipe.from_toml(metadata["lsquant.recipe"])
    except (KeyError, ValueError, AttributeError) as error:
        raise DamagedFile(f"{path}: its lsquant metadata is damaged: {error}") from error
    return restore(model, recipe, tensors, path)


def restore(model: nn.Module, recipe: Recipe, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> nn.Module:
    """Prepare a model by a recipe and load a state dict, or leave the model unchanged.

    tensors: name -> tensor, the state dict.
    path: of the file they come from, for messages.
    Returns: the model.
    Raises: UsageError for another architecture or a model on the meta device.
    """
    if empty := on_meta(model):
        raise UsageError(
            f"{path} cannot be loaded: {len(empty)} tensors of {type(model).__name__}, {empty[0]!r} the first, are on "
            "the meta device and hold no values; build the model outside torch.device('meta'), or call "
            "model.to_empty(device='cpu') first"
        )
    _check_architecture(model, tensors, path)
    try:
        with unchanged_on_error(model.modules()):
            prepare(model, recipe)
            model.load_state_dict(tensors)
    except (UsageError, RuntimeError) as error:
        raise UsageError(f"{path} does not fit {type(model).__name__}: {' '.join(str(error).split())}") from error
    return model


def _check_architecture(model: nn.Module, tensors: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise UsageError where the float parts of model and file differ; nothing is changed yet."""

    optional = {f"{name}.bounds" for name, _ in quantizers(model)}  # which files of earlier versions do not have

    def is_float_key(name: str) -> bool:
        parts = name.split(".")
        return name not in optional and not any(part in ("weight_quantizer", "input_quantizer") for part in parts)

    mine = {k: tuple(v.shape) for k, v in model.state_dict().items() if is_float_key(k)}
    theirs = {k: tuple(v.shape) for k, v in tensors.items() if is_float_key(k)}
    problems = [f"the file lacks {k}" for k in mine if k not in theirs]
    problems += [f"the model lacks {k}" for k in theirs if k not in mine]
    differ = [k for k, shape in mine.items() if theirs.get(k, shape) != shape]
    problems += [f"{k} is {theirs[k]} in the file and {mine[k]} in the model" for k in differ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        kind = type(model).__name__
        found = "; ".join(problems[:3]) + more
        raise UsageError(f"{path} is of another architecture than {kind}: {found}. Build the model that was saved")
