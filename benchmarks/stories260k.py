"""Write the llama2.c model stories260K as a folder of transformers: config.json, model.safetensors, tokenizer.json.

    python benchmarks/stories260k.py --data DIR --out FOLDER

DIR: has stories260K.safetensors (names of llama2.c) and tok512.bin.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

NAMES = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
HEADS, KEY_HEADS = 8, 4


def halves(weight: Tensor, heads: int) -> Tensor:
    """Return rows of a head in the order of transformers, first halves of the rotated pairs first."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def state_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of transformers."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            own = rest.removesuffix(".weight")
            if own in ("attention.wq", "attention.wk"):
                tensor = halves(tensor, HEADS if own.endswith("q") else KEY_HEADS)
            found[f"model.layers.{layer}.{NAMES[own]}.weight"] = tensor.contiguous()
        elif name in ("norm.weight", "tok_embeddings.weight"):
            found[{"norm.weight": "model.norm.weight"}.get(name, "model.embed_tokens.weight")] = tensor
    return found


def tokenizer_of(data: bytes) -> dict:
    """Return tokenizer.json of a llama2.c vocabulary: pairs are joined in the order of the scores of what they give."""
    at, tokens, scores = 4, [], []
    while at < len(data):
        score, size = struct.unpack_from("<fi", data, at)
        tokens.append(data[at + 8 : at + 8 + size])
        scores.append(score)
        at += 8 + size
    texts: list[str] = []
    for i, token in enumerate(tokens):
        special = {0: "<unk>", 1: "<s>", 2: "</s>"}.get(i)
        texts.append(special or (f"<0x{i - 3:02X}>" if i < 259 else token.decode().replace(" ", "▁")))
    vocabulary = {text: i for i, text in enumerate(texts)}
    merges = []
    for i in sorted(range(259, len(texts)), key=lambda i: -scores[i]):
        text = texts[i]
        pairs = [(text[:k], text[k:]) for k in range(1, len(text))]
        merges += [list(p) for p in pairs if p[0] in vocabulary and p[1] in vocabulary]
    added = [
        {"id": i, "content": texts[i], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i in range(3)
    ]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
                  "vocab": vocabulary, "merges": merges},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, metavar="DIR")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5, num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float32)
    missing, unexpected = model.load_state_dict(state_of(load_file(arguments.data / "stories260K.safetensors")), False)
    assert (missing, unexpected) == (["lm_head.weight"], []), (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(arguments.out)
    tokenizer = tokenizer_of((arguments.data / "tok512.bin").read_bytes())
    (arguments.out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "model_max_length": 512}
    (arguments.out / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


if __name__ == "__main__":
    main()
