"""Writes GGUF files: the trained codes and steps of a language model in the blocks of llama.cpp."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant._util.files import atomic_write
from lsquant._util.optional import require
from lsquant.formats.gguf.blocks import TYPES
from lsquant.formats.gguf.plan import Planned, chosen, planned, require_half
from lsquant.formats.gguf.vocabulary import Vocabulary
from lsquant.shipped import Shipped, ship

FLOAT_TYPES = {"f32": 0, "f16": 1}
"""Name -> number of the type."""
DEFAULT_TYPE = "q4_0"
QUANTIZATION_VERSION = 2
NO_TEXTS = {"tokenizer.ggml.model": "none"}
"""What a file without a vocabulary says: llama.cpp then takes its size from ``vocab_size``."""


def export_gguf(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    type: str = DEFAULT_TYPE,
    tokenizer: Any = None,
    float_type: str = "f32",
) -> Path:
    """Write a language model as a GGUF file for llama.cpp: the trained codes and steps, none derived anew.

    A weight that ``type`` does not hold exactly goes to the next wider type that does, ``q4_0``, ``q8_0`` or F32.

    model: the trained model, which is unchanged: LlamaForCausalLM, Qwen2ForCausalLM or Qwen3ForCausalLM of
        transformers, with quantized weights and no quantized activations.
    path: of the file.  Returned.
    type: "q4_0", "q8_0", "q2_0" (llama.cpp's type 42, which gguf 0.19 cannot read) or "tq2_0" (ternary).
    tokenizer: a folder, a file or a tokenizer of transformers, or a ``Vocabulary``; None writes no vocabulary.
    float_type: "f32", or "f16" for matrices that are not quantized, which are rounded.

    Raises: UsageError naming a layer with a step that float16 does not hold (train with ``step_dtype="float16"``), with
        quantized activations, or without a place in GGUF, and for another class of model; MissingExtra; MissingFile;
        DiskFull (the old file is then unchanged).
    Warns: UserWarning naming the matrices that are not in ``type``, and why.
    """
    for name, value, known in (("type", type, TYPES), ("float_type", float_type, FLOAT_TYPES)):
        if not isinstance(value, str) or value not in known:
            raise UsageError(f"export_gguf: {name}={shown(value)}; choose from {', '.join(map(repr, known))}")
    return write_record(ship(model).require_layers("export_gguf"), path, type, tokenizer, float_type)


def write_record(record: Shipped, path: str | os.PathLike[str], type: str, tokenizer: Any, float_type: str) -> Path:
    """Write what a model ships; that of a float model is a float file.  The rest is as in ``export_gguf``."""
    language, tensors = planned(record)
    vocabulary = None if tokenizer is None else Vocabulary.of(tokenizer, record.model)
    gguf = require("gguf", extra="gguf")
    writer = gguf.GGUFWriter(None, language.architecture.name)
    texts = NO_TEXTS if vocabulary is None else vocabulary.fields(language.vocabulary_size)
    for key, value in {**general(type), **language.parameters, **texts}.items():
        add_value(writer, key, value)
    elsewhere: dict[tuple[str, str], list[str]] = {}
    for tensor in tensors:
        number, data, reason = encoded(tensor, type, float_type)
        if reason:
            elsewhere.setdefault((number_name(number), reason), []).append(tensor.name)
        writer.add_tensor(tensor.name, data, raw_shape=tensor.shape, raw_dtype=number)
    try:
        with atomic_write(path) as temporary:
            writer.write_header_to_file(temporary)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
    finally:
        if writer.fout is not None:
            writer.close()
    if elsewhere:
        warnings.warn(_told(type, elsewhere), UserWarning, stacklevel=3)
    return Path(path)


def encoded(tensor: Planned, wanted: str, float_type: str) -> tuple[int, np.ndarray, str]:
    """Return the type's number, the data and, for a matrix, why it is not in the wanted type, else "".

    Data of blocks are int8: gguf takes the shape of uint8 from the types that it knows.
    """
    if tensor.quantizer is None:
        values = tensor.values()
        if values.ndim < 2:
            return FLOAT_TYPES["f32"], values, ""
        if float_type == "f16":
            with np.errstate(over="ignore"):
                half = values.astype(np.float16)
            if not np.array_equal(np.isfinite(half), np.isfinite(values)):
                raise UsageError(f"export_gguf: {tensor.source} has values beyond float16; use float_type='f32'")
            values = half
        return FLOAT_TYPES[float_type], values, "not quantized"
    kind, reason = chosen(tensor, wanted)
    if kind is None:
        return FLOAT_TYPES["f32"], tensor.values(), reason
    require_half(tensor, kind)
    return kind.number, kind.pack(tensor.codes(), tensor.steps(kind.block)).view(np.int8), reason


def number_name(number: int) -> str:
    """Return the name of a type that is written."""
    return {kind.number: name for name, kind in TYPES.items()}.get(number) or ("f32", "f16")[number]


def general(wanted: str) -> dict[str, Any]:
    """Return what a file says of itself."""
    return {"general.quantization_version": QUANTIZATION_VERSION, "general.file_type": TYPES[wanted].file_type}


def add_value(writer: Any, key: str, value: Any) -> None:
    """Add a value of the metadata: text, truth value, float32, uint32, or a list of one kind."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _told(wanted: str, elsewhere: dict[tuple[str, str], list[str]]) -> str:
    """Return the warning about matrices that are not in the wanted type."""
    parts = [f"{kind} ({reason}): {', '.join(names)}" for (kind, reason), names in elsewhere.items()]
    return f"export_gguf: not in {wanted}: {'; '.join(parts)}"
