"""The row of GGUF files in the table of formats."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lsquant._util.errors import UsageError
from lsquant.formats.base import FileFormat
from lsquant.formats.gguf.architectures import LanguageModel
from lsquant.formats.gguf.container import FLOATS, MAGIC, GgufFile, GgufTensor, read_gguf
from lsquant.formats.gguf.plan import Planned, planned
from lsquant.formats.gguf.writer import export_gguf
from lsquant.shipped import Pair, Shipped


class GgufFormat(FileFormat):
    """GGUF files of language models.  ``verify`` compares what they hold; they are run by llama.cpp, not here."""

    name = "gguf"
    about = "codes of a language model's weights in the blocks of llama.cpp"
    promise = "weights"
    suffix = ".gguf"
    options = ("type", "tokenizer", "float_type")

    def write(self, model: nn.Module, path: Path, example_inputs: Any, **options: Any) -> Path:
        self.require_options(options)
        return export_gguf(model, path, **options)

    def recognizes(self, path: Path) -> bool:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC

    def read(self, path: str | os.PathLike[str]) -> GgufFile:
        return read_gguf(path)

    def header_size(self, path: Path) -> int:
        return read_gguf(path).start

    def weights(self, content: GgufFile, record: Shipped) -> Iterator[Pair]:
        """Yield codes, steps of blocks, and what is in floating point, in the file's order of rows."""
        language, tensors = planned(record)
        _require_parameters(content, language)
        for tensor in tensors:
            yield from _pairs(content.tensors.get(tensor.name), tensor)
        for name in sorted(set(content.tensors) - {tensor.name for tensor in tensors}):
            yield Pair(name, content.tensors[name].data, None)


def _pairs(found: GgufTensor | None, tensor: Planned) -> Iterator[Pair]:
    """Yield what a file holds of a tensor beside the model's."""
    if tensor.quantizer is not None and (found is None or found.block_type is not None):
        fits = found is not None and found.block_type is not None and tensor.misfit(found.block_type) is None
        if found is None or found.block_type is None or not fits or found.shape != tensor.shape:
            yield Pair(tensor.source, None, tensor.values())
            return
        codes, steps = found.codes()
        yield Pair(tensor.source, codes, tensor.codes())
        yield Pair(f"{tensor.layer}.weight_quantizer", steps, tensor.steps(found.block_type.block))
        return
    expected = tensor.values()
    if found is None or found.block_type is not None:
        yield Pair(tensor.source, None, expected)
        return
    half = tensor.quantizer is None and expected.ndim > 1 and np.dtype(FLOATS[found.kind]) == np.float16
    with np.errstate(over="ignore"):
        yield Pair(tensor.source, found.values(), expected.astype(np.float16) if half else expected)


def _require_parameters(content: GgufFile, language: LanguageModel) -> None:
    """Raise a UsageError for a file of another architecture, or with other hyper-parameters."""
    for key, value in {"general.architecture": language.architecture.name, **language.parameters}.items():
        found = content.metadata.get(key)
        wanted = float(np.float32(value)) if isinstance(value, float) else value
        if type(found) is not type(wanted) or found != wanted:
            raise UsageError(f"{content.path} is of another model: its {key} is {found!r:.80}, this model's {wanted!r}")
    own = f"{language.architecture.name}."
    if more := sorted(k for k in content.metadata if k.startswith(own) and k not in language.parameters):
        raise UsageError(f"{content.path} is of another model: it has {more[0]!r:.80}, which this model has not")
