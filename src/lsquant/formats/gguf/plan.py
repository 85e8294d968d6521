"""What a GGUF file has of a model: which tensor, under which name, in which type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lsquant._util.errors import UsageError
from lsquant.formats.gguf.architectures import LanguageModel, language_model
from lsquant.formats.gguf.blocks import TYPES, BlockType
from lsquant.shipped import Shipped, ShippedQuantizer, leftovers

WIDER = ("q4_0", "q8_0")
"""The types that take what another one does not hold, in their order; after them F32."""


@dataclass(frozen=True)
class Planned:
    """A tensor of a file.

    name: in the file.
    source: in the state dict.
    quantizer: of a weight with codes, else None.
    floats: of a tensor in floating point, else None.
    order: the model's rows in the file's order, None for their own.
    """

    name: str
    source: str
    quantizer: ShippedQuantizer | None
    floats: Tensor | None
    order: np.ndarray | None

    @property
    def layer(self) -> str:
        """The name of its layer, for messages."""
        return self.source.rpartition(".")[0]

    def codes(self) -> np.ndarray:
        """Return the codes in the file's order of rows, (rows, columns) int8.  Unsigned ones have at most 7 bits."""
        assert self.quantizer is not None
        assert self.quantizer.weight is not None
        return self._ordered(self.quantizer.weight.codes.cpu().to(torch.int8).numpy())

    def steps(self, block: int) -> np.ndarray:
        """Return the step of each block in the file's order of rows, (rows, columns / block) float32."""
        quantizer, (rows, columns) = self.quantizer, self.shape
        assert quantizer is not None
        per_step = rows * columns // quantizer.step.numel()
        steps = quantizer.step.cpu().repeat_interleave(per_step // block).reshape(rows, columns // block)
        return self._ordered(steps.numpy())

    def values(self) -> np.ndarray:
        """Return the values in floating point in the file's order of rows, float32: ``code * step`` where quantized."""
        if self.floats is not None:
            return self._ordered(self.floats.detach().to(torch.float32).cpu().numpy())
        assert self.quantizer is not None
        assert self.quantizer.weight is not None
        codes = self.quantizer.weight.codes.cpu().to(torch.float32)
        rows = codes.reshape(self.quantizer.step.numel(), -1) * self.quantizer.step.cpu().unsqueeze(1)
        return self._ordered(rows.reshape(codes.shape).numpy())

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        if self.floats is not None:
            return tuple(self.floats.shape)
        assert self.quantizer is not None
        assert self.quantizer.weight is not None
        return tuple(self.quantizer.weight.codes.shape)

    def misfit(self, kind: BlockType) -> str | None:
        """Return why a type of blocks does not hold the codes as they are, None where it does."""
        quantizer, (rows, columns) = self.quantizer, self.shape
        assert quantizer is not None
        if quantizer.q_min < kind.low or quantizer.q_max > kind.high:
            return f"codes {quantizer.q_min} to {quantizer.q_max}"
        if columns % kind.block:
            return f"{columns} inputs, blocks of {kind.block}"
        if rows * columns // quantizer.step.numel() % kind.block:
            return f"groups of {quantizer.group_size}, blocks of {kind.block}"
        return None

    def _ordered(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values if self.order is None else values[self.order])


def chosen(tensor: Planned, wanted: str) -> tuple[BlockType | None, str]:
    """Return the type of a weight with codes, None for F32, and why it is not ``wanted``, "" where it is."""
    reason = tensor.misfit(TYPES[wanted])
    if reason is None:
        return TYPES[wanted], ""
    wider = WIDER[WIDER.index(wanted) + 1 :] if wanted in WIDER else WIDER
    return next((TYPES[name] for name in wider if tensor.misfit(TYPES[name]) is None), None), reason


def planned(record: Shipped) -> tuple[LanguageModel, list[Planned]]:
    """Return what a model is to llama.cpp, and the tensors of its file, in the order of its state dict.

    Raises: UsageError for a model that GGUF does not hold; MissingExtra.
    """
    language = language_model(record.model)
    _require_weights_only(record)
    return language, list(_tensors(record, language))


def _tensors(record: Shipped, language: LanguageModel) -> Iterator[Planned]:
    floats, aliases = leftovers(record)
    quantized = {f"{name}.weight": layer.weight for name, layer in record.layers.items() if layer.weight is not None}
    held = {**floats, **{name: floats[first] for name, first in aliases.items() if first in floats}}
    own: dict[str, ShippedQuantizer | Tensor] = {**held, **quantized}
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if own.get(embedding) is own.get(head):  # llama.cpp takes the embedding where there is no output
        own.pop(head, None)
    place = language.names()
    for name, value in own.items():
        quantizer, tensor = (None, value) if isinstance(value, Tensor) else (value, None)
        found = Planned(place(name), name, quantizer, tensor, None)
        if tensor is not None and tensor.dtype == torch.float64:
            raise UsageError(
                f"export_gguf: {name} is float64, for which llama.cpp has no place; call model.float() first"
            )
        yield Planned(found.name, name, quantizer, tensor, language.order(name, found.shape[0]))
    if language.factors is not None:
        yield Planned("rope_freqs.weight", "rope_freqs.weight", None, language.factors, None)


def _require_weights_only(record: Shipped) -> None:
    """Raise a UsageError that names the first layer whose input is quantized."""
    names = [layer.label for layer in record.layers.values() if layer.input is not None or layer.stored is not None]
    if names := [*names, *record.standalone()]:
        raise UsageError(
            f"export_gguf: {names[0]} quantizes activations, and a GGUF file holds weights only; prepare the model "
            "with a weight-only recipe, Recipe(QuantSpec(4, signed=True, granularity='group', group_size=32, "
            "step_dtype='float16'))"
        )


def require_half(tensor: Planned, kind: BlockType) -> None:
    """Raise a UsageError that names a layer with a step that float16, in which GGUF stores steps, does not hold."""
    assert tensor.quantizer is not None
    step = tensor.quantizer.step
    exact = step.to(torch.float16).to(torch.float32) == step
    if not bool(exact.all()):
        raise UsageError(
            f"export_gguf: {tensor.layer}: {int((~exact).sum())} of {step.numel()} steps, {step[~exact][0]:.9g} the "
            f"first, are not exact in float16, in which {kind.name} stores them; train with "
            'QuantSpec(..., step_dtype="float16"), so that what is trained is what is written'
        )
