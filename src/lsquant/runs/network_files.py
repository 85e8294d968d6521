"""Networks from files: float checkpoints, teachers, saved and packed networks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from lsquant import checkpoint
from lsquant._util.errors import UsageError
from lsquant._util.tensors import read_tensors
from lsquant.formats import load_packed
from lsquant.nn import quantizers
from lsquant.runs.defaults import architectures
from lsquant.runs.task import Task
from lsquant.training.state import FORMAT as CHECKPOINT
from lsquant.training.state import load_model_part

Loader = Callable[[nn.Module, str | os.PathLike[str]], nn.Module]


def load_float(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a float checkpoint into `model` and return it.

    path: .safetensors with the keys of `model`, or all of them behind "module."

    Raises: MissingFile; DamagedFile; UsageError for another architecture; each names the file.
    """
    tensors = _float_tensors(path)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        found = _difference(model.state_dict(), tensors)
        raise UsageError(f"{path} is the checkpoint of another architecture: {found}") from error
    return model


def loader_of(path: str | os.PathLike[str]) -> Loader:
    """Return `load_packed`, `lsquant.load` or `load_float`: whichever reads the file, by its metadata."""
    metadata = read_tensors(path, with_tensors=False)[0]
    if "lsquant.packed" in metadata:
        return load_packed
    if "lsquant.format" in metadata:
        return checkpoint.load
    return load_float


def load_start(model: nn.Module, path: str | os.PathLike[str]) -> bool:
    """Load a file of `export_packed` or `save` into the prepared `model`; return whether it has the model's recipe.

    The model then has the file's recipe. A packed file has codes and no float weights: code * step, the same function.

    Raises: MissingFile; DamagedFile; UsageError for another file or architecture, naming the file.
    """
    if Path(path).is_dir():
        raise UsageError(f"start: {path} is a folder; of a run give its model.safetensors")
    wanted = {name: quantizer.requested for name, quantizer in quantizers(model)}
    load = loader_of(path)
    if load is load_float:
        load = checkpoint.load  # refuses a float checkpoint by its own message
    load(model, path)
    found = {name: quantizer.spec for name, quantizer in quantizers(model)}
    return wanted.keys() == found.keys() and all(wanted[n].decide(bool(s.signed)) == s for n, s in found.items())


def load_teacher(task: Task, path: str | os.PathLike[str]) -> nn.Module:
    """Build the float network in `path`, of the task's architectures the one that fits; in eval mode, not trained.

    Raises: MissingFile; DamagedFile; UsageError naming the file and the architectures if none fits.
    """
    known = architectures(task)
    shapes = {name: tensor.shape for name, tensor in _float_tensors(path).items()}
    fitting = [name for name, build in known.items() if _fits(build, shapes)]
    if known and not fitting:
        raise UsageError(f"teacher {path}: its tensors fit none of {', '.join(known)}")
    network = known[fitting[0]]() if fitting else task.model()
    return load_float(network, path).eval().requires_grad_(False)


def _fits(build: Callable[[], nn.Module], shapes: Mapping[str, torch.Size]) -> bool:
    """Tell whether the network has tensors of these names and shapes."""
    with torch.device("meta"):
        state = build().state_dict()
    # checkpoints of old PyTorch do not count batches
    wanted = {key: t.shape for key, t in state.items() if key in shapes or not key.endswith("num_batches_tracked")}
    return wanted == shapes


def _float_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    metadata, tensors, _ = read_tensors(path)
    if metadata.get("format") == CHECKPOINT:  # last/float.safetensors of a run
        tensors = load_model_part(path)["state"]
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _difference(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> str:
    """Say in one line how a float checkpoint differs from the model."""
    if any("quantizer" in name for name in found):
        return "it has quantizers, lsquant wrote it; a float checkpoint is wanted here"
    says = []
    for lacks, names in (
        ("it lacks", sorted(wanted.keys() - found.keys())),
        ("the model lacks", sorted(found.keys() - wanted.keys())),
    ):
        if names:
            says.append(f"{lacks} {names[0]} (and {len(names) - 1} more)")
    other = [name for name in wanted if name in found and wanted[name].shape != found[name].shape]
    if other:
        name = other[0]
        says.append(f"{name} is {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}")
    return "; ".join(says)
