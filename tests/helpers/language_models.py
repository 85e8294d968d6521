"""Small language models of transformers, quantized in their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule

VOCABULARY = 96
FLOAT = (Rule(nn.Embedding, None), Rule("lm_head", None))
RECIPES = {
    "w4g32": Recipe.preset("w4g32", first_last=None, rules=FLOAT),
    "w4g128": Recipe.preset("w4g128", first_last=None, rules=[*FLOAT, Rule("*.down_proj", QuantSpec(4, True))]),
    "w8": Recipe(QuantSpec(8, True, granularity="channel"), rules=FLOAT),
    "w3g64": Recipe.preset("w3g64", first_last=None, rules=FLOAT),
    "w2g64": Recipe.preset("w2g64", first_last=None, rules=FLOAT),
    "mixed": Recipe(
        QuantSpec(4, True, granularity="group", group_size=16),
        rules=[
            *FLOAT,
            Rule("*.k_proj", None),
            Rule("*.o_proj", QuantSpec(5, True, True, granularity="channel")),
            Rule("*.up_proj", QuantSpec(6, True)),
            Rule("*.1.mlp.down_proj", QuantSpec(7, True, granularity="group", group_size=8)),
        ],
    ),
}


def language_model(kind: str = "llama", **settings: Any) -> Any:
    """An untrained LlamaForCausalLM or Qwen2ForCausalLM with 2 layers, in eval mode."""
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    }[kind]
    return model(config(**{**sizes, **settings})).eval()


def quantized(model: Any, recipe: Recipe, snapped: torch.dtype | None = torch.float16) -> Any:
    """Prepare a model, with steps that are numbers of a type."""
    lsquant.prepare(model, recipe)
    if snapped is not None:
        snap(model, snapped)
    return model


@torch.no_grad()
def snap(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every step to a type."""
    for name, parameter in model.named_parameters():
        if name.endswith(".step"):
            parameter.copy_(parameter.to(dtype).float())
