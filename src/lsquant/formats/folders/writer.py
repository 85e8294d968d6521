"""Writes model folders of transformers: trained codes for compressed-tensors, or ``code * step`` in floating point."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lsquant._util.entry import reason, shown
from lsquant._util.errors import LsquantError, MissingFile, UsageError
from lsquant._util.files import as_path, atomic_folder, write_json
from lsquant._util.optional import require
from lsquant._util.tensors import CHECKSUM, read_tensors, write_tensors
from lsquant.formats.folders.content import (
    CONFIG,
    FORMAT,
    KEY,
    LINEAR,
    METHOD,
    PACKED,
    SCALE,
    SCALE_DTYPES,
    SHAPE,
    WEIGHTS,
    Scheme,
    packed_rows,
)
from lsquant.shipped import Shipped, ShippedLayer, ShippedQuantizer, leftovers, ship

EXTRA = "compressed-tensors"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json"),
)
"""What is copied out of a tokenizer's folder."""
GENERATION = "generation_config.json"
HALF = (torch.float16, torch.bfloat16)


def export_compressed_tensors(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    scale_dtype: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that vLLM and transformers load: the trained codes and steps in compressed-tensors' layout.

    config.json has a ``quantization_config`` of format pack-quantized; model.safetensors has ``weight_packed``,
    ``weight_scale`` and ``weight_shape`` of each quantized layer, and the rest as it is.  Steps are never rounded.

    model: a trained model of transformers with quantized weights only, which is unchanged.
    folder: to be made.  Returned.
    tokenizer: a tokenizer of transformers, or a folder with its files; None writes none.
    scale_dtype: of the steps, "float16", "bfloat16", or "float32", which vLLM rounds; None: the first of the model's
        own, float16 and bfloat16 that has them all.
    overwrite: whether a model folder that exists is replaced.

    Raises: UsageError naming a layer that the format cannot hold, or with a step that is not a number of the type, for
        a model that is none of transformers, and for a folder that exists; MissingFile; MissingExtra; DiskFull,
        CannotWrite (an old folder is then unchanged).
    """
    record = _checked(model, "export_compressed_tensors")
    _require_held(record)
    dtype = _scale_dtype(record, scale_dtype)
    tensors, aliases = leftovers(record)
    _require_own_weights(record, tensors, aliases)
    schemes: dict[Scheme, list[str]] = {}
    for name, layer in record.layers.items():
        quantizer, codes = _weight(layer)
        scheme = Scheme.of(quantizer.spec)
        schemes.setdefault(scheme, []).append(name)
        tensors[f"{name}.{PACKED}"] = packed_rows(codes, scheme.bits)
        tensors[f"{name}.{SCALE}"] = quantizer.step.to(dtype).reshape(scheme.scale_shape(*codes.shape)).contiguous()
        tensors[f"{name}.{SHAPE}"] = torch.tensor(codes.shape, dtype=torch.int64)
    quantization = {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": _groups(schemes),
        "ignore": list(_left_float(record)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return _write(record, folder, _with_aliases(record, tensors, aliases), quantization, tokenizer, overwrite)


def export_hf(
    model: nn.Module, folder: str | os.PathLike[str], *, tokenizer: Any = None, overwrite: bool = False
) -> Path:
    """Write a folder that transformers loads as any other float model: its weights are ``code * step``.

    model: a trained model of transformers with quantized weights only, which is unchanged.
    folder, tokenizer, overwrite: as for ``export_compressed_tensors``.  The folder is returned.

    Raises: as ``export_compressed_tensors``.
    """
    record = _checked(model, "export_hf")
    tensors, aliases = leftovers(record)
    for quantizer, (name, value) in float_weights(record).items():
        if name in tensors:
            raise UsageError(
                f"{quantizer}: {name} is read in floating point by another layer, so it cannot be written as codes "
                "times steps: quantize both, or leave both in floating point"
            )
        tensors[name] = value
    return _write(record, folder, _with_aliases(record, tensors, aliases), None, tokenizer, overwrite)


def float_weights(record: Shipped) -> dict[str, tuple[str, Tensor]]:
    """Return by quantizer the name of its weight in a file, and ``code * step`` in the weight's own type and shape.

    Raises: UsageError naming a layer with a quantized input.
    """
    _, aliases = leftovers(record)
    found: dict[str, tuple[str, Tensor]] = {}
    for layer in record.layers.values():
        _require_weight_only(layer, "a float model")
        quantizer = layer.weight
        if quantizer is None or quantizer.weight is None or quantizer.name in found:
            continue
        name = quantizer.weight.name
        value = layer.source.dequantized_weight().to(layer.source.weight.dtype).contiguous()
        found[quantizer.name] = (aliases.get(name, name), value)
    return found


# ---- what the format holds ----


def _checked(model: nn.Module, caller: str) -> Shipped:
    """Return the record of a model of transformers.  Raises: UsageError, MissingExtra."""
    kind = require("transformers", extra=EXTRA).PreTrainedModel
    record = ship(model).require_layers(caller)
    if not isinstance(record.model, kind):
        raise UsageError(
            f"{caller}: {type(record.model).__name__} is no model of transformers (PreTrainedModel), whose config and "
            "names the folder needs; lsquant.export_packed writes any model"
        )
    if record.joins is not None or record.standalone():
        name = next(iter(record.standalone()), "joins")
        raise UsageError(
            f"{caller}: {name}: the folder holds weights alone; prepare with weight-only rules, as 'w4g32'"
        )
    _require_tied_as_said(record.model)
    return record


def _require_weight_only(layer: ShippedLayer, what: str) -> None:
    """Raise a UsageError naming a layer with a quantized input."""
    if layer.input is not None or layer.stored is not None:
        raise UsageError(
            f"{layer.label}: its input is quantized, and {what} holds weights alone; use a weight-only recipe, as "
            "Recipe.preset('w4g32'), or export_onnx"
        )


def _require_held(record: Shipped) -> None:
    """Raise a UsageError naming a layer that compressed-tensors cannot hold."""
    for layer in record.layers.values():
        _require_weight_only(layer, "compressed-tensors here")
        kind = layer.source.float_type
        if not issubclass(kind, nn.Linear):  # transformers 5.23 does not load quantized embeddings
            skip = "nn.Embedding" if issubclass(kind, nn.Embedding) else repr(layer.label)
            raise UsageError(
                f"{layer.label}: readers of compressed-tensors load quantized Linear layers, not {layer.kind}: leave "
                f"it in floating point, skip=[{skip}]"
            )
        spec = _weight(layer)[0].spec
        if not spec.signed:
            raise UsageError(
                f"{layer.label}: its weight has unsigned codes, {spec}, and the format's are symmetric about 0; use "
                f"QuantSpec({spec.bits}, signed=True)"
            )


def _require_own_weights(record: Shipped, tensors: dict[str, Tensor], aliases: dict[str, str]) -> None:
    """Raise a UsageError naming a quantized layer that shares its weight: the format has codes for one layer each."""
    taken: dict[str, str] = {}
    shared = {*aliases, *aliases.values(), *tensors}
    for layer in record.layers.values():
        quantizer = _weight(layer)[0]
        first = taken.setdefault(quantizer.name, layer.label)
        if first != layer.label or f"{layer.name}.weight" in shared:
            raise UsageError(
                f"{layer.label}: its weight is shared with another layer, and compressed-tensors has codes for one "
                "layer each; leave both in floating point, as skip=['lm_head', nn.Embedding] does for a tied head, or "
                "untie them before prepare"
            )


def _require_tied_as_said(model: Any) -> None:
    """Raise a UsageError where a loader would tie embedding and head that have weights of their own."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    if first is not None and last is not None and first.weight is not last.weight:
        raise UsageError(
            "config.tie_word_embeddings is True, and embedding and head have weights of their own: set "
            "model.config.tie_word_embeddings = False, or whoever loads the folder ties them"
        )


def _weight(layer: ShippedLayer) -> tuple[ShippedQuantizer, Tensor]:
    """Return a layer's quantizer and its codes."""
    quantizer = layer.weight
    assert quantizer is not None
    assert quantizer.weight is not None
    return quantizer, quantizer.weight.codes


def _scale_dtype(record: Shipped, asked: str | None) -> torch.dtype:
    """Return the type of the steps.  Raises: UsageError naming a layer with a step that is no number of it."""
    if asked is not None and (not isinstance(asked, str) or asked not in SCALE_DTYPES):
        raise UsageError(f"scale_dtype={shown(asked)}; use one of {', '.join(map(repr, SCALE_DTYPES))}")
    for layer in record.layers.values():  # transformers and vLLM read steps in the type of the model
        own = layer.source.weight.dtype
        if own in HALF and (step := _inexact(layer, own)) is not None:
            name = str(own).removeprefix("torch.")
            raise UsageError(
                f"{layer.label}: a step is {step:.9g}, which is no {name} number; readers round the steps to the type "
                f"of the model, so train with QuantSpec(step_dtype={name!r}), or call model.float() first"
            )
    own = next(iter(record.layers.values())).source.weight.dtype
    choices = [SCALE_DTYPES[asked]] if asked else [*(t for t in HALF if t == own), *HALF]
    failed = []
    for dtype in choices:
        steps = ((layer, _inexact(layer, dtype)) for layer in record.layers.values())
        unfit = next(((layer, step) for layer, step in steps if step is not None), None)
        if unfit is None:
            return dtype
        failed.append(unfit)
    layer, step = failed[0]
    either = "" if asked else ", nor does bfloat16 have all steps"
    raise UsageError(
        f"{layer.label}: a step is {step:.9g}, which is no {asked or 'float16'} number{either}, and steps are never "
        f"rounded; train with QuantSpec(step_dtype={(asked or 'float16')!r}), or give scale_dtype='float32', "
        "which vLLM rounds"
    )


def _inexact(layer: ShippedLayer, dtype: torch.dtype) -> float | None:
    """Return a step that a type does not have, None where it has all."""
    step = _weight(layer)[0].step
    wrong = step[step.to(dtype).to(torch.float32) != step]
    return float(wrong[0]) if wrong.numel() else None


# ---- the folder ----


def _groups(schemes: dict[Scheme, list[str]]) -> dict[str, Any]:
    """Return ``config_groups``: "Linear" where all layers are quantized alike, else the layers' names."""
    alike = len(schemes) == 1
    return {
        f"group_{i}": scheme.group([LINEAR] if alike else names) for i, (scheme, names) in enumerate(schemes.items())
    }


def _left_float(record: Shipped) -> Iterator[str]:
    """Yield the modules with a float weight of two dimensions or more that a reader might take for a linear layer.

    Routers and stacked experts of mixtures are among them: vLLM makes linear layers of them.
    """
    for name, module in record.model.named_modules():
        if name in record.layers or isinstance(module, nn.Embedding):
            continue
        if any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False)):
            yield name


def _with_aliases(record: Shipped, tensors: dict[str, Tensor], aliases: dict[str, str]) -> dict[str, Tensor]:
    """Return the tensors, and where a loader ties nothing by itself a copy of each under its further names."""
    model: Any = record.model
    if getattr(model.config, "tie_word_embeddings", False):
        return tensors
    return tensors | {name: tensors[first].clone() for name, first in aliases.items() if first in tensors}


def _config(model: Any, quantization: dict[str, Any] | None) -> dict[str, Any]:
    """Return the content of config.json."""
    config = json.loads(model.config.to_json_string())
    for key in (KEY, "_name_or_path"):
        config.pop(key, None)
    kinds = [kind for kind in type(model).__mro__ if not kind.__module__.startswith("lsquant.")]
    config |= {"architectures": [kinds[0].__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    return config if quantization is None else {**config, KEY: quantization}


def _write(
    record: Shipped,
    folder: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    quantization: dict[str, Any] | None,
    tokenizer: Any,
    overwrite: bool,
) -> Path:
    """Write the folder aside and rename it."""
    model: Any = record.model
    files = _tokenizer_files(tokenizer)
    if overwrite:
        _require_own(as_path(folder))
    with atomic_folder(folder, replace=CONFIG if overwrite else None) as temporary:
        write_tensors(temporary / WEIGHTS, tensors, {"format": "pt"})
        write_json(temporary / CONFIG, _config(model, quantization))
        if model.can_generate() and model.generation_config is not None:
            _save_generation_config(model.generation_config, temporary)
        if files is None and tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        for file in files or ():
            shutil.copyfile(file, temporary / file.name)
    return Path(folder)


def _require_own(folder: Path) -> None:
    """Raise a UsageError for a folder with anything in it that is not of an earlier call."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    known = {CONFIG, WEIGHTS, GENERATION, *TOKENIZER_FILES}
    if foreign := sorted(file.name for file in folder.iterdir() if file.name not in known):
        raise UsageError(f"{folder} is not replaced: {foreign[0]!r} in it was not written here; give another folder")
    try:
        is_own = CHECKSUM in read_tensors(folder / WEIGHTS, with_tensors=False)[0]
    except LsquantError:
        is_own = False
    if not is_own:
        raise UsageError(f"{folder} is not replaced: lsquant has not written its {WEIGHTS}; give another folder")


def config_of(record: Shipped) -> dict[str, Any]:
    """Return what config.json says of a model but for its quantization."""
    return _config(record.model, None)


def floats_of(record: Shipped) -> dict[str, Tensor]:
    """Return the tensors that stay in floating point, under all names that a folder has for them."""
    return _with_aliases(record, *leftovers(record))


def _save_generation_config(config: Any, folder: Path) -> None:
    """Write generation_config.json.  Raises: UsageError for settings that transformers refuses to write."""
    try:
        config.save_pretrained(folder)
    except ValueError as error:
        raise UsageError(f"model.generation_config cannot be saved: {reason(error)}; correct it first") from error


def _tokenizer_files(tokenizer: Any) -> list[Path] | None:
    """Return the files of a tokenizer's folder; None for a tokenizer, which writes them itself, and for none."""
    if tokenizer is None or hasattr(tokenizer, "save_pretrained"):
        return None
    folder = as_path(tokenizer)
    if not folder.is_dir():
        raise MissingFile(f"tokenizer: {folder} is no folder: give a tokenizer, or a folder with its files")
    if found := [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]:
        return found
    raise MissingFile(f"tokenizer: {folder} has none of a tokenizer's files ({', '.join(TOKENIZER_FILES[:3])}, ...)")
