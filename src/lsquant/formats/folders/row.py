"""The rows of model folders in the table of formats."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lsquant._util.entry import read_json, shown
from lsquant._util.errors import LsquantError, UsageError
from lsquant.formats.base import FileFormat
from lsquant.formats.folders.content import CONFIG, KEY
from lsquant.formats.folders.reader import ModelFolder, read_compressed, read_floats
from lsquant.formats.folders.writer import config_of, export_compressed_tensors, export_hf, float_weights, floats_of
from lsquant.shipped import Pair, Shipped, paired


class FolderFormat(FileFormat):
    """Folders with config.json and model.safetensors, which are not run: ``verify`` compares codes and steps."""

    promise = "weights"
    suffix = ""
    is_folder = True

    def size(self, path: Path) -> int:
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())


def require_config(content: ModelFolder, record: Shipped) -> None:
    """Raise a UsageError for a folder whose config.json is not that of the model."""
    wanted, found = config_of(record), content.config
    keys = sorted((wanted.keys() | found.keys()) - {"transformers_version"})
    missing = object()
    if odd := [key for key in keys if wanted.get(key, missing) != found.get(key, missing)]:
        said, own = shown(found.get(odd[0])), shown(wanted.get(odd[0]))
        raise UsageError(f"{content.path} is of another model: its {CONFIG} has {odd[0]}={said}, the model {own}")


def _floats(content: ModelFolder, wanted: dict[str, Tensor], known: Collection[str] = ()) -> Iterator[Pair]:
    """Yield what stays in floating point, and what a folder holds besides."""
    for name, value in wanted.items():
        yield Pair(name, content.tensors.get(name), value)
    for name in sorted(content.tensors.keys() - wanted.keys() - set(known)):
        yield Pair(name, content.tensors[name], None)


class CompressedTensorsFormat(FolderFormat):
    """Codes as vLLM and transformers read them."""

    name = "compressed-tensors"
    about = "a folder for vLLM and transformers: codes in compressed-tensors' pack-quantized"
    options = ("tokenizer", "scale_dtype", "overwrite")

    def write(self, model: nn.Module, path: Path, example_inputs: Any, **options: Any) -> Path:
        self.require_options(options)
        return export_compressed_tensors(model, path, **options)

    def recognizes(self, path: Path) -> bool:
        """Tell whether a folder's config.json says that its weights are quantized."""
        try:
            return KEY in read_json(path / CONFIG).table()
        except LsquantError:
            return False

    def read(self, path: str | os.PathLike[str]) -> ModelFolder:
        return read_compressed(path)

    def weights(self, content: ModelFolder, record: Shipped) -> Iterator[Pair]:
        require_config(content, record)
        yield from paired(record, {f"{name}.weight_quantizer": stored for name, stored in content.layers.items()})
        yield from _floats(content, floats_of(record))


class HfFormat(FolderFormat):
    """Weights ``code * step`` in floating point, for everything that reads a model of transformers."""

    name = "hf"
    about = "a folder for transformers: the trained codes times their steps, in floating point"
    options = ("tokenizer", "overwrite")

    def write(self, model: nn.Module, path: Path, example_inputs: Any, **options: Any) -> Path:
        self.require_options(options)
        return export_hf(model, path, **options)

    def recognizes(self, path: Path) -> bool:
        """Tell whether a folder has a config.json, whatever is in it."""
        return (path / CONFIG).is_file()

    def read(self, path: str | os.PathLike[str]) -> ModelFolder:
        return read_floats(path)

    def weights(self, content: ModelFolder, record: Shipped) -> Iterator[Pair]:
        """Yield the float weights of a folder beside ``code * step`` in the type that the layer multiplies in."""
        require_config(content, record)
        own = float_weights(record)
        for quantizer, (name, wanted) in own.items():
            yield Pair(quantizer, content.tensors.get(name), wanted)
        quantized = {name for name, _ in own.values()}
        yield from _floats(content, floats_of(record), quantized)
