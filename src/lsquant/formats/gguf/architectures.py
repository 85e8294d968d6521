"""Language models of transformers as llama.cpp knows them: architectures, hyper-parameters, names, order of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lsquant._util.entry import shown
from lsquant._util.errors import UsageError
from lsquant._util.optional import require


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a class of models.

    name: ``general.architecture``.
    neighbours: whether rotary embeddings turn neighbours in a head instead of its two halves, as transformers does.
    factors: whether it reads the tensor ``rope_freqs``.
    """

    name: str
    neighbours: bool
    factors: bool


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", True, True),
    "Qwen2ForCausalLM": Architecture("qwen2", False, False),
    "Qwen3ForCausalLM": Architecture("qwen3", False, False),
}
"""Class of transformers -> architecture."""


@dataclass(frozen=True)
class LanguageModel:
    """A model as llama.cpp knows it.

    architecture: of its class.
    heads, key_heads, head_size: of the attention.
    parameters: key of the metadata -> int, float or text: what llama.cpp needs beside tensors and vocabulary.
    vocabulary_size: rows of the embedding.
    factors: (head_size / 2,) float32, by which the frequencies of the rotary embedding are divided; None for 1.
    """

    architecture: Architecture
    heads: int
    key_heads: int
    head_size: int
    parameters: dict[str, Any]
    vocabulary_size: int
    factors: Tensor | None

    def names(self) -> Callable[[str], str]:
        """Return a function from a name in the state dict to that in a file.

        It raises a UsageError for a name without a place.  Raises: MissingExtra.
        """
        gguf = require("gguf", extra="gguf")
        kind = gguf.MODEL_ARCH[self.architecture.name.upper()]
        known = gguf.get_tensor_name_map(kind, self.parameters[f"{self.architecture.name}.block_count"])

        def place(name: str) -> str:
            found = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if found is None or not name.endswith((".weight", ".bias")):
                raise UsageError(
                    f"export_gguf: {name!r} has no place in a GGUF file of the architecture {self.architecture.name}; "
                    "merge adapters and leave out what transformers' own class does not have"
                )
            return found

        return place

    def order(self, name: str, rows: int) -> np.ndarray | None:
        """Return the rows of a tensor in the order of a file, None where they keep theirs.

        name: in the state dict.
        """
        if not self.architecture.neighbours:
            return None
        for projection, heads in ((".self_attn.q_proj.", self.heads), (".self_attn.k_proj.", self.key_heads)):
            if projection in name:
                if rows != heads * self.head_size:
                    raise UsageError(f"export_gguf: {name} has {rows} rows for {heads} heads of {self.head_size}")
                return half_to_neighbours(heads, self.head_size)
        return None


def half_to_neighbours(heads: int, size: int) -> np.ndarray:
    """Return the rows of a projection in llama.cpp's order.

    transformers turns rows i and i + size / 2 of a head together, llama.cpp rows 2 i and 2 i + 1.

    >>> half_to_neighbours(1, 4)
    array([0, 2, 1, 3])
    """
    return np.arange(heads * size).reshape(heads, 2, size // 2).swapaxes(1, 2).reshape(-1)


def language_model(model: nn.Module) -> LanguageModel:
    """Return what llama.cpp needs to know of a model.

    Raises: UsageError for another class, or a setting that llama.cpp computes otherwise.
    """
    kind: Any = type(model)
    architecture = ARCHITECTURES.get(kind.__name__)
    if architecture is None or not kind.__module__.startswith("transformers."):
        known = ", ".join(ARCHITECTURES)
        raise UsageError(f"export_gguf: {kind.__name__} is not written as GGUF; {known} of transformers are")
    config: Any = model.config
    if config.hidden_act != "silu":
        said = shown(config.hidden_act)
        raise UsageError(
            f"export_gguf: config.hidden_act is {said}; llama.cpp computes {architecture.name} with 'silu'"
        )
    if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or ()):
        raise UsageError("export_gguf: config.layer_types has a sliding window, which is not written")
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope, factors = _rotary(model, config, architecture, size)
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": key_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": size,
        "attention.value_length": size,
        "vocab_size": rows,
        **rope,
    }
    parameters = {f"{architecture.name}.{key}": value for key, value in own.items()}
    return LanguageModel(architecture, heads, key_heads, size, parameters, rows, factors)


def _rotary(
    model: nn.Module, config: Any, architecture: Architecture, size: int
) -> tuple[dict[str, Any], Tensor | None]:
    """Return the parameters of the rotary embedding, and the factors of its frequencies."""
    said = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    base = float(said.get("rope_theta") or getattr(config, "rope_theta", 0) or 10000.0)
    found: dict[str, Any] = {"rope.dimension_count": size, "rope.freq_base": base}
    kind = said.get("rope_type", "default")
    known = ("default", "linear", "llama3") if architecture.factors else ("default", "linear")
    if kind not in known or said.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"export_gguf: the rotary embedding {shown(said)} of type {shown(kind)} is not written; for "
            f"{type(model).__name__} {', '.join(known)} over whole heads are"
        )
    if kind == "linear":
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(said["factor"])}
    if kind != "llama3":
        return found, None
    own: Any = model
    frequencies = own.model.rotary_emb.inv_freq.detach().double().cpu()
    plain = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return found, (plain / frequencies).float()
