"""GGUF files: what is in them, read by gguf's own reader and by formulas of their own, is what was trained."""

from __future__ import annotations

import contextlib
import ctypes
import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import DamagedFile, UsageError
from lsquant.cli.main import main
from lsquant.formats import format_of
from lsquant.formats.gguf import Vocabulary, read_gguf
from lsquant.formats.gguf.blocks import TYPES

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
LARGE = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 48}


def language_model(recipe: Recipe, kind: str = "Llama", **sizes: Any) -> nn.Module:
    """A prepared model with random weights, biases and norms, and steps that float16 holds."""
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **sizes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.copy_(torch.randn(p.shape))
    lsquant.prepare(model, recipe)
    return snapped(model)


def snapped(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for _, quantizer in lsquant.quantizers(model):
            quantizer.step.copy_(quantizer.step.half().float())
    return model


def exported(model: nn.Module, path: Path, warns: str | None = "not in", **options: Any) -> Path:
    with pytest.warns(UserWarning, match=warns) if warns else contextlib.nullcontext():
        return lsquant.export_gguf(model, path, **options)


def official(path: Path) -> dict[str, np.ndarray]:
    """Name in the file -> float32, by gguf's reader."""
    return {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def kinds(path: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of the rows of a projection: row 2 i of a head was row i, row 2 i + 1 row i + half."""
    found, size = rows.copy(), len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            found[head * size + i] = rows[head * size + 2 * i]
            found[head * size + size // 2 + i] = rows[head * size + 2 * i + 1]
    return found


def names(layers: int) -> dict[str, str]:
    """Name in the model -> name in the file, written down here."""
    found = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for n in range(layers):
        parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
                 "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
                 "self_attn.k_norm": "attn_k_norm",
                 "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
                 "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
        found |= {f"model.layers.{n}.{theirs}": f"blk.{n}.{ours}" for theirs, ours in parts.items()}
    return found


def assert_same_values(model: nn.Module, values: dict[str, np.ndarray], permuted: bool) -> None:
    """Every tensor of a file equals the model's, ``code * step`` for quantized ones, bit for bit; none is left over."""
    config, left = model.config, dict(values)
    wanted: dict[str, np.ndarray] = {}
    for theirs, ours in names(config.num_hidden_layers).items():
        with contextlib.suppress(AttributeError):
            layer = model.get_submodule(theirs)
            for kind in ("weight", "bias"):
                if isinstance(getattr(layer, kind, None), torch.Tensor):
                    wanted[f"{theirs} {ours}.{kind}"] = of_layer(layer, kind)
    for name, expected in wanted.items():
        theirs, ours = name.split(" ")
        if ours not in left and config.tie_word_embeddings and theirs == "lm_head":
            continue
        found = left.pop(ours)
        if permuted and theirs.endswith(("q_proj", "k_proj")):
            found = halves(found, config.num_attention_heads if "q_proj" in theirs else config.num_key_value_heads)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32)), name
    assert left == {}


def of_layer(layer: Any, kind: str) -> np.ndarray:
    """A weight as NumPy computes it of codes and steps, or what is in floating point."""
    if kind == "bias" or getattr(layer, "weight_quantizer", None) is None:
        return getattr(layer, kind).detach().numpy()
    codes, step, _ = layer.integer_weight()
    rows = codes.numpy().astype(np.float32).reshape(step.numel(), -1) * step.detach().numpy().reshape(-1, 1)
    return np.ascontiguousarray(rows.reshape(codes.shape))


# ---- blocks ----


def random_weights(name: str, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    kind, random = TYPES[name], np.random.default_rng(7)
    for _ in range(count):
        rows, blocks = random.integers(1, 4), random.integers(1, 3)
        codes = random.integers(kind.low, kind.high + 1, (rows, blocks * kind.block)).astype(np.int8)
        step = np.exp(random.uniform(-16, 6, (rows, blocks))).astype(np.float16)  # subnormal ones as well
        yield codes, np.maximum(step, np.float16(6e-8)).astype(np.float32)


def by_definition(data: np.ndarray, columns: int) -> np.ndarray:
    """q2_0 as llama.cpp defines it: 64 elements in 18 bytes, (q - 1) * d."""
    found = []
    for row in data.reshape(-1, columns // 64 * 18):
        for block in row.reshape(-1, 18):
            d = np.float32(struct.unpack("<e", block[:2].tobytes())[0])
            found += [d * np.float32(int(block[2 + j // 4] >> 2 * (j % 4) & 3) - 1) for j in range(64)]
    return np.array(found, np.float32).reshape(-1, columns)


@pytest.mark.parametrize("name", TYPES)
def test_a_thousand_random_tensors_come_back(name: str, tmp_path: Path) -> None:
    kind, weights = TYPES[name], list(random_weights(name, 1000))
    writer = gguf.GGUFWriter(tmp_path / "f", "llama")
    for number, (codes, step) in enumerate(weights):
        data = kind.pack(codes, step)
        assert data.shape == (len(codes), codes.shape[1] // kind.block * kind.size)
        writer.add_tensor(str(number), data.view(np.int8), raw_shape=codes.shape, raw_dtype=kind.number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    own = read_gguf(tmp_path / "f").tensors
    theirs = official(tmp_path / "f") if name != "q2_0" else None
    for number, (codes, step) in enumerate(weights):
        found = own[str(number)]
        got_codes, got_step = found.codes()
        assert np.array_equal(got_codes, codes)
        assert np.array_equal(got_step, step)
        expected = codes.astype(np.float32) * np.repeat(step, kind.block, axis=1)
        if theirs is not None:
            assert np.array_equal(theirs[str(number)].view(np.uint32), expected.view(np.uint32))
        elif number < 100:
            assert np.array_equal(by_definition(found.data, codes.shape[1]), expected)  # -0.0 for 0


def test_bytes_of_each_type() -> None:
    """Written down by hand, from the layouts in ggml: 0.5 is 00 38 in float16, -0.5 is 00 b8."""
    half = np.full((1, 1), 0.5, np.float32)
    ramp = (np.arange(32) % 16 - 8).astype(np.int8).reshape(1, 32)
    nibbles = "".join(f"{i:x}{i:x}" for i in range(16))  # elements i and i + 16
    assert TYPES["q4_0"].pack(ramp, half).tobytes().hex() == "0038" + nibbles
    assert TYPES["q8_0"].pack(ramp, half).tobytes().hex() == "0038" + ramp.tobytes().hex()
    two = np.tile(np.array([1, 0, -1, -2], np.int8), 16).reshape(1, 64)  # q = 0, 1, 2, 3, lowest bits first
    assert TYPES["q2_0"].pack(two, half).tobytes().hex() == "00b8" + "e4" * 16
    three = np.repeat(np.array([-1, 0, 1, 0], np.int8), 32)  # a byte has elements i, i + 32, i + 64, i + 96
    assert TYPES["tq2_0"].pack(np.tile(three, 2).reshape(1, 256), half).tobytes().hex() == "64" * 64 + "0038"


# ---- models ----

TERNARY = QuantSpec(2, narrow=True, granularity="channel")
TERNARY_GROUPS = QuantSpec(2, narrow=True, granularity="group", group_size=256)
MODELS = {
    "groups of 32": ("q4_0", Recipe.preset("w4g32", first_last=None), {}),
    "groups of 64": ("q4_0", Recipe(QuantSpec(4, granularity="group", group_size=64), None), {}),
    "channels": ("q4_0", Recipe(QuantSpec(4, granularity="channel"), None), {}),
    "a tensor": ("q4_0", Recipe(QuantSpec(3), None), {}),
    "8 bits": ("q8_0", Recipe(QuantSpec(8, granularity="channel"), None), {}),
    "3 bits in q8_0": ("q8_0", Recipe(QuantSpec(3, granularity="group", group_size=32), None), {}),
    "ternary": ("tq2_0", Recipe(TERNARY, None), LARGE),
    "ternary groups of 256": ("tq2_0", Recipe(TERNARY_GROUPS, None), LARGE),
    "head and embedding in 8 bits": ("q4_0", Recipe.preset("w4g32", first_last=8), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_come_back_from_the_official_reader(name: str, tmp_path: Path) -> None:
    wanted, recipe, sizes = MODELS[name]
    model = language_model(recipe, **sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        path = lsquant.export_gguf(model, tmp_path / "m.gguf", type=wanted)
    assert_same_values(model, official(path), permuted=True)
    found = kinds(path)
    assert found["blk.1.ffn_up.weight"] == wanted.upper()
    assert found["output_norm.weight"] == "F32"
    verdict = lsquant.verify(model, path, [])
    assert (verdict.level, verdict.profile, verdict.reaches("weights")) == ("weights", "gguf", True)
    assert format_of(path).name == "gguf"


@pytest.mark.parametrize("size", [64, 128])
def test_two_bits_by_the_definition(size: int, tmp_path: Path) -> None:
    model = language_model(Recipe(QuantSpec(2, granularity="group", group_size=size), None), **LARGE)
    path = exported(model, tmp_path / "m.gguf", None, type="q2_0")
    tensors = read_gguf(path).tensors
    assert tensors["blk.0.ffn_down.weight"].kind == 42
    values = {
        name: by_definition(t.data, t.shape[-1]) + np.float32(0) if t.kind == 42 else t.values()
        for name, t in tensors.items()
    }
    assert_same_values(model, values, permuted=True)
    assert lsquant.verify(model, path, []).level == "weights"


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen2", {}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32}),
    ],
)
@pytest.mark.parametrize("skip", [[], [nn.Embedding, "lm_head"]])
def test_kinds_of_models(kind: str, sizes: dict[str, Any], skip: list[Any], tmp_path: Path) -> None:
    model = language_model(Recipe.preset("w4g32", first_last=None, skip=skip), kind, **sizes)
    path = exported(model, tmp_path / "m.gguf", "token_embd.weight" if skip else None)
    assert_same_values(model, official(path), permuted=kind == "Llama")
    assert ("output.weight" in kinds(path)) != sizes.get("tie_word_embeddings", False)
    assert lsquant.verify(model, path, []).level == "weights"


def test_hyper_parameters(tmp_path: Path) -> None:
    model = language_model(Recipe.preset("w4g32", first_last=None), rms_norm_eps=3e-5, head_dim=32)
    fields = gguf.GGUFReader(exported(model, tmp_path / "m.gguf", None)).fields
    wanted = {
        "general.architecture": "llama", "general.file_type": 2, "general.quantization_version": 2,
        "llama.context_length": 64, "llama.embedding_length": 64, "llama.block_count": 2,
        "llama.feed_forward_length": 128, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(3e-5)), "llama.attention.key_length": 32,
        "llama.attention.value_length": 32, "llama.vocab_size": 96, "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0, "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")} == wanted


def test_rotary_embeddings(tmp_path: Path) -> None:
    recipe = Recipe.preset("w4g32", first_last=None)
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}  # fmt: skip
    model = language_model(recipe, rope_parameters=rope, max_position_embeddings=256)
    path = exported(model, tmp_path / "m.gguf", None)
    factors = official(path)["rope_freqs.weight"]
    plain = 1 / (5e5 ** (np.arange(0, 16, 2) / 16))
    assert np.allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6)
    assert factors.min() >= 1
    assert factors.max() > 4
    assert lsquant.verify(model, path, []).level == "weights"

    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    fields = gguf.GGUFReader(exported(language_model(recipe, "Qwen2", rope_parameters=linear), path, None)).fields
    assert fields["qwen2.rope.scaling.type"].contents() == "linear"
    assert fields["qwen2.rope.scaling.factor"].contents() == 4.0
    for kind, other in (("Llama", {**linear, "rope_type": "dynamic"}), ("Qwen2", rope)):
        with pytest.raises(UsageError, match=r"the rotary embedding .* is not written"):
            lsquant.export_gguf(language_model(recipe, kind, rope_parameters=other), path)


# ---- what goes to a wider type ----


def test_wider_types_are_named(tmp_path: Path) -> None:
    """172 inputs have no block, an 8-bit head no 4-bit type, a group of 16 none, a float layer no codes."""
    four, groups = QuantSpec(4, granularity="channel"), QuantSpec(4, granularity="group", group_size=16)
    rules = [
        Rule("lm_head", 8), Rule("*.0.self_attn.v_proj", groups), Rule("*.1.self_attn.v_proj", None),
        Rule("*.mlp.down_proj", four),
    ]  # fmt: skip
    model = language_model(Recipe(QuantSpec(4, granularity="group", group_size=32), None, rules), intermediate_size=172)
    with pytest.warns(UserWarning, match="not in q4_0: ") as seen:
        path = lsquant.export_gguf(model, tmp_path / "m.gguf")
    head, _, parts = str(seen[0].message).partition(": ")[2].partition(": ")
    assert head == "not in q4_0"
    assert sorted(parts.split("; ")) == [
        "f32 (172 inputs, blocks of 32): blk.0.ffn_down.weight, blk.1.ffn_down.weight",
        "f32 (groups of 16, blocks of 32): blk.0.attn_v.weight",
        "f32 (not quantized): blk.1.attn_v.weight",
        "q8_0 (codes -128 to 127): output.weight",
    ]
    found = kinds(path)
    assert [found[f"{n}.weight"] for n in ("blk.0.attn_v", "blk.0.ffn_down", "output", "blk.1.attn_v")] == [
        "F32", "F32", "Q8_0", "F32",
    ]  # fmt: skip
    assert_same_values(model, official(path), permuted=True)
    assert lsquant.verify(model, path, []).level == "weights"
    half = exported(model, tmp_path / "h.gguf", float_type="f16")
    assert kinds(half)["blk.1.attn_v.weight"] == "F16"
    assert kinds(half)["blk.0.ffn_down.weight"] == "F32"  # code * step is exact in F32 only
    assert lsquant.verify(model, half, []).level == "weights"


def test_two_bit_types_do_not_become_each_other(tmp_path: Path) -> None:
    model = language_model(Recipe(TERNARY, None))  # 64 and 128 inputs: no block of 256
    assert set(kinds(exported(model, tmp_path / "m.gguf", type="tq2_0")).values()) == {"Q4_0", "F32"}
    assert lsquant.verify(model, tmp_path / "m.gguf", []).level == "weights"


# ---- what is refused ----


def test_steps_that_float16_does_not_hold(tmp_path: Path) -> None:
    model = language_model(Recipe.preset("w4g32", first_last=None))
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.weight_quantizer.step[3] = 0.1
    with pytest.raises(
        UsageError, match=r'layers\.1\.mlp\.up_proj: 1 of 256 steps, 0\.1\d+ the .*step_dtype="float16"'
    ):
        lsquant.export_gguf(model, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    path, recipe = tmp_path / "m.gguf", Recipe.preset("w4g32", first_last=None)
    with pytest.raises(UsageError, match=r"Sequential is not written as GGUF; LlamaForCausalLM, Qwen2ForCausalLM"):
        lsquant.export_gguf(lsquant_ready(nn.Sequential(nn.Linear(32, 4))), path)
    with pytest.raises(UsageError, match="no quantized layer"):
        lsquant.export_gguf(nn.Linear(32, 4), path)
    model = language_model(recipe)
    for options, said in (
        ({"type": "q4_k"}, "type='q4_k'; choose from 'q4_0'"),
        ({"float_type": "bf16"}, "float_type="),
    ):
        with pytest.raises(UsageError, match=said):
            lsquant.export_gguf(model, path, **options)
    model.model.layers[0].mlp.up_proj.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(UsageError, match=r"'model\.layers\.0\.mlp\.up_proj\.extra' has no place"):
        lsquant.export_gguf(model, path)
    with pytest.raises(UsageError, match=r"config\.hidden_act is 'gelu'"):
        lsquant.export_gguf(language_model(recipe, hidden_act="gelu"), path)
    sliding = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    with pytest.raises(UsageError, match="sliding window"):
        lsquant.export_gguf(language_model(recipe, "Qwen2", **sliding), path)
    model = language_model(recipe)
    lsquant.prepare(model, Recipe.preset("w4a8", first_last=None, skip=["lm_head"]))
    lsquant.calibrate(model, [{"input_ids": torch.randint(96, (2, 8))}])
    first = r"model\.layers\.0\.self_attn\.q_proj quantizes activations.*weight-only recipe"
    with pytest.raises(UsageError, match=first):
        lsquant.export_gguf(snapped(model), path)
    model = language_model(recipe)
    model.model.norm.double()
    with pytest.raises(UsageError, match="float64"):
        lsquant.export_gguf(model, path)
    assert list(tmp_path.iterdir()) == []


def lsquant_ready(model: nn.Module) -> nn.Module:
    lsquant.prepare(model, Recipe.preset("w4g32", first_last=None))
    return model


# ---- verify ----


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(3)
    model = language_model(Recipe.preset("w4g32", first_last=None, skip=[nn.Embedding]))
    return model, exported(model, tmp_path_factory.mktemp("gguf") / "m.gguf", "token_embd")


def test_a_changed_file_is_caught(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = base
    data = path.read_bytes()
    starts = {t.name: t.data_offset for t in gguf.GGUFReader(path).tensors}
    for name, at, worst in (
        ("blk.1.attn_k.weight", 5, "model.layers.1.self_attn.k_proj.weight"),  # a code
        ("blk.1.attn_k.weight", 0, "model.layers.1.self_attn.k_proj.weight_quantizer"),  # a step
        ("output_norm.weight", 2, "model.norm.weight"),
        ("token_embd.weight", 9, "model.embed_tokens.weight"),
    ):
        changed = bytearray(data)
        changed[starts[name] + at] ^= 1
        (tmp_path / "c.gguf").write_bytes(changed)
        verdict = lsquant.verify(model, tmp_path / "c.gguf", [])
        assert (verdict.level, verdict.checks[0].mismatches, verdict.checks[0].worst) == ("none", 1, worst)
    key = b"llama.rope.freq_base" + struct.pack("<I", 6)
    at = data.index(key) + len(key)
    (tmp_path / "c.gguf").write_bytes(data[:at] + struct.pack("<f", 5e5) + data[at + 4 :])
    with pytest.raises(UsageError, match=r"of another model: its llama\.rope\.freq_base is 500000"):
        lsquant.verify(model, tmp_path / "c.gguf", [])
    other = language_model(Recipe.preset("w4g32", first_last=None), "Qwen2")
    with pytest.raises(UsageError, match=r"its general\.architecture is 'llama', this model's 'qwen2'"):
        lsquant.verify(other, path, [])
    other = language_model(Recipe.preset("w4g32", first_last=None))
    assert lsquant.verify(other, path, []).level == "none"


def test_damaged_files(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, path = base
    data = path.read_bytes()
    bad = {
        "a name": data[:4] + struct.pack("<IQQQ", 3, 1, 1, 1 << 40),
        "a number of texts": data[:4] + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 1 << 62),
        "a list in a list": data[:4] + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),
        "numbers": data[:4] + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 10, 1 << 60),
        "a shape": data[:4] + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 32, 1 << 62, 2, 0),
        "no rows": data[:4] + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 32, 0, 2, 0),
        "no block": data[:4] + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 33, 1, 2, 0),
        "dimensions": data[:4] + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 1 << 31),
        "the middle": data[: len(data) // 2],
    }
    for why, content in bad.items():
        (tmp_path / "d.gguf").write_bytes(content)
        with pytest.raises(DamagedFile, match=r"d\.gguf is damaged"):
            raise AssertionError(f"{why} was read: {read_gguf(tmp_path / 'd.gguf')}")
    (tmp_path / "d.gguf").write_bytes(b"")
    with pytest.raises(DamagedFile):
        read_gguf(tmp_path / "d.gguf")
    (tmp_path / "d.gguf").write_bytes(data[:4] + struct.pack(">I", 3) + data[8:])
    with pytest.raises(UsageError, match="little-endian"):
        read_gguf(tmp_path / "d.gguf")
    of_type = struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 256, 1, 12, 0)
    (tmp_path / "d.gguf").write_bytes(data[:4] + of_type + bytes(400))
    with pytest.raises(UsageError, match="'t' has the type 12; lsquant reads F32, F16, Q4_0, Q8_0, Q2_0, TQ2_0"):
        read_gguf(tmp_path / "d.gguf")


# ---- vocabularies ----


def test_no_more_tokens_than_rows_and_what_is_none(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, _ = base
    tokens = [f"t{n}" for n in range(97)]
    with pytest.raises(UsageError, match="the tokenizer has 97 tokens, the model's embedding 96"):
        lsquant.export_gguf(model, tmp_path / "m", tokenizer=Vocabulary("llama", tokens, [0.0] * 97, [1] * 97))
    with pytest.raises(UsageError, match="96 scores of 97 tokens"):
        Vocabulary("llama", tokens, [0.0] * 96, [1] * 97)
    with pytest.raises(UsageError, match="eos=97 is no number of one of 97 tokens"):
        Vocabulary("llama", tokens, [0.0] * 97, [1] * 97, eos=97)
    with pytest.raises(UsageError, match="needs merges"):
        Vocabulary("gpt2", tokens, (), [1] * 97)
    with pytest.raises(UsageError, match="give a folder"):
        lsquant.export_gguf(model, tmp_path / "m", tokenizer=5)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        lsquant.export_gguf(model, tmp_path / "m", tokenizer=tmp_path / "empty")


def text_fields(model: nn.Module, path: Path, tokenizer: Any) -> dict[str, Any]:
    """What gguf's reader finds of a vocabulary."""
    fields = gguf.GGUFReader(exported(model, path, "token_embd", tokenizer=tokenizer)).fields
    head = "tokenizer.ggml."
    return {key.removeprefix(head): field.contents() for key, field in fields.items() if key.startswith(head)}


def test_byte_level_tokenizer(base: tuple[nn.Module, Path], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4}
    merges = [("a", "b"), ("Ġ", "ab")]
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<end>"])
    made.add_tokens(["own"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
    expected = {
        "model": "gpt2", "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "Ġ", "Ġab", "<end>", "own", *[f"[PAD{n}]" for n in range(7, 96)]],
        "token_type": [1, 1, 1, 1, 1, 3, 4, *[5] * 89], "merges": ["a b", "Ġ ab"],
        "bos_token_id": 1, "eos_token_id": 5, "add_bos_token": False,
    }  # fmt: skip
    assert text_fields(base[0], tmp_path / "m.gguf", fast) == expected  # bos: that of the model's config
    fast.save_pretrained(tmp_path / "folder")
    assert text_fields(base[0], tmp_path / "m.gguf", tmp_path / "folder") == expected
    assert text_fields(base[0], tmp_path / "m.gguf", tmp_path / "folder" / "tokenizer.json")["eos_token_id"] == 2

    path = tmp_path / "folder" / "tokenizer.json"
    document = json.loads(path.read_text())
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for pattern, name in ((llama3, "llama-bpe"), (llama3.replace("{1,3}", ""), "qwen2")):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        document["pre_tokenizer"] = {
            "type": "Sequence",
            "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}],
        }
        path.write_text(json.dumps(document))
        assert Vocabulary.of(path).pre == name
    document["pre_tokenizer"] = {"type": "Whitespace"}
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="neither GPT-2's, Llama 3's nor Qwen 2's"):
        Vocabulary.of(path)
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.0]]}}))
    with pytest.raises(UsageError, match="a tokenizer of the type 'Unigram'; only BPE is written"):
        Vocabulary.of(path)
    path.write_text("{")
    with pytest.raises(DamagedFile):
        Vocabulary.of(path)


def test_byte_fallback_tokenizer() -> None:
    """Llama 2's kind: the score of a token is minus the rank of the first merge that gives it."""
    tokenizers = pytest.importorskip("tokenizers")
    texts = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"]
    model = tokenizers.models.BPE(
        {text: n for n, text in enumerate(texts)}, [("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Sequence([
        tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁"),
    ])  # fmt: skip
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    found = Vocabulary.of(
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    )
    assert list(found.tokens) == texts
    assert list(found.types) == [2, 3, 3, 6, 1, 1, 1, 1, 1]
    assert list(found.scores) == [0, 0, 0, 0, -2, -2, -2, 0, -1]
    assert (found.model, found.bos, found.eos, found.unk, found.add_bos, found.space_prefix) == (
        "llama",
        1,
        2,
        0,
        True,
        True,
    )


def varint(value: int) -> bytes:
    found = b""
    while value > 127:
        found, value = found + bytes([value & 127 | 128]), value >> 7
    return found + bytes([value])


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a message of protobuf."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def test_sentencepiece_model(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x00>", 0.0, 6), ("▁t", -0.5, 1), ("é", -1.0, 4)]
    data = b"".join(
        field(1, field(1, t.encode()) + field(2, s) + (field(3, k) if k != 1 else b"")) for t, s, k in pieces
    )
    data += field(2, field(3, 2) + field(42, 2**64 - 1)) + field(3, field(1, b"identity") + field(3, 0))
    (tmp_path / "tokenizer.model").write_bytes(data)
    for place in (tmp_path, tmp_path / "tokenizer.model"):
        found = Vocabulary.of(place)
        assert list(zip(found.tokens, found.scores, found.types, strict=True)) == pieces
        assert (found.model, found.bos, found.eos, found.unk, found.space_prefix) == ("llama", 1, None, 0, False)
    for length in range(1, len(data)):  # cut anywhere, it is read as far as it goes, or refused
        (tmp_path / "tokenizer.model").write_bytes(data[:length])
        with contextlib.suppress(DamagedFile, UsageError):
            Vocabulary.of(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(data.replace(field(2, field(3, 2) + field(42, 2**64 - 1)), b""))
    with pytest.raises(UsageError, match="is no BPE"):
        Vocabulary.of(tmp_path)


def test_llama2c_tokenizer(tmp_path: Path) -> None:
    texts = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *[f"<0x{n:02X}>".encode() for n in range(256)], b" the", b"e"]
    data = struct.pack("<i", 7) + b"".join(struct.pack("<fi", -float(n), len(t)) + t for n, t in enumerate(texts))
    (tmp_path / "tok.bin").write_bytes(data)
    found = Vocabulary.of(tmp_path / "tok.bin")
    assert list(found.tokens[:4]) == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert list(found.tokens[258:]) == ["<0xFF>", "▁the", "e"]
    assert list(found.types) == [2, 3, 3, *[6] * 256, 1, 1]
    assert (found.scores[260], found.bos, found.eos, found.unk, found.add_bos) == (-260.0, 1, 2, 0, True)
    for cut in (data[:-1], data + b"\0", data[:40], b""):
        (tmp_path / "tok.bin").write_bytes(cut)
        with pytest.raises(DamagedFile):
            Vocabulary.of(tmp_path / "tok.bin")


# ---- the command line ----

OWN = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def build():
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                        num_attention_heads=4)).eval()

def data():
    return [torch.zeros(1, 4, dtype=torch.long)]
"""


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(OWN)
    sizes = {**SIZES, "vocab_size": 300, "num_hidden_layers": 1, "num_key_value_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    lsquant.prepare(model, Recipe(QuantSpec(8, granularity="channel"), None))
    lsquant.save(snapped(model), tmp_path / "m.safetensors")
    texts = [b"x"] * 259
    data = struct.pack("<i", 7) + b"".join(struct.pack("<fi", 0, len(t)) + t for t in texts)
    (tmp_path / "tok.bin").write_bytes(data)
    own = [f"--model={tmp_path / 'own.py'}:build", f"--data={tmp_path / 'own.py'}:data"]
    options = ["--type=q8_0", f"--tokenizer={tmp_path / 'tok.bin'}"]
    assert main(["export", str(tmp_path / "m.safetensors"), *own, "--profile=gguf", *options]) == 0
    path = tmp_path / "m.gguf.gguf"
    start = read_gguf(path).start
    assert capsys.readouterr().out == f"{path}: {path.stat().st_size:,} bytes, {start:,} of them header\n"
    assert kinds(path)["blk.0.attn_q.weight"] == "Q8_0"
    assert main(["verify", str(tmp_path / "m.safetensors"), *own, "--profile=gguf", "--require=weights"]) == 0
    assert "level reached: weights" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "m.safetensors"), *own, "--type=q8_0"]) == 2
    assert "--type is an option of the profiles gguf: leave it out" in capsys.readouterr().err


# ---- llama.cpp ----


def ggml() -> ctypes.CDLL:
    """The library of llama.cpp that has the types."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which builds for ten minutes")
    return ctypes.CDLL(str(next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.*"))))


@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_reads_a_thousand_random_tensors(name: str) -> None:
    """Of all types, q2_0 among them, which gguf's reader does not know."""
    kind, read = TYPES[name], getattr(ggml(), f"dequantize_row_{name}")
    for codes, step in random_weights(name, 1000):
        data = np.ascontiguousarray(kind.pack(codes, step))
        found = np.empty(codes.shape, np.float32)
        read(data.ctypes.data_as(ctypes.c_void_p), found.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(codes.size))
        expected = codes.astype(np.float32) * np.repeat(step, kind.block, axis=1)
        assert np.array_equal(found, expected)  # -0.0 for 0 in q2_0


@pytest.mark.parametrize(
    "kind, wanted, bits",
    [
        ("Llama", "q4_0", 4),
        ("Llama", "q8_0", 8),
        ("Qwen2", "q4_0", 3),
        ("Qwen3", "q4_0", 4),
        ("Llama", "q2_0", 2),
        ("Llama", "tq2_0", 2),
    ],
)
@pytest.mark.parametrize("with_vocabulary", [True, False])
def test_llama_cpp_agrees(kind: str, wanted: str, bits: int, with_vocabulary: bool, tmp_path: Path) -> None:
    """Fed the same tokens, its first choice is PyTorch's for 99 % of those where the first is clear of the second.

    The model is random, so many choices are close; llama.cpp quantizes activations to 8 bits.
    """
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which builds for ten minutes")
    sizes = {**(LARGE if wanted == "tq2_0" else SIZES), "vocab_size": 300, "max_position_embeddings": 512}
    spec = QuantSpec(bits, granularity="group", group_size=TYPES[wanted].block, narrow=wanted == "tq2_0")
    model = language_model(Recipe(spec, None), kind, **sizes)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    vocabulary = Vocabulary("llama", tokens, [0.0] * 259, [2, 3, 3, *[6] * 256], (), 1, 2, 0, add_bos=True)
    given = {"tokenizer": vocabulary} if with_vocabulary else {}
    path = exported(model, tmp_path / "m.gguf", None, type=wanted, **given)
    run = llama_cpp.Llama(str(path), n_ctx=512, n_batch=512, logits_all=True, verbose=False)
    numbers = torch.randint(300, (512,))
    run.eval(numbers.tolist())
    found = np.asarray(run.scores[:512])
    with torch.no_grad():
        expected = model(numbers.unsqueeze(0)).logits[0].numpy()
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > 0.1 * expected.std()
    assert clear.mean() > 0.5
    assert (found.argmax(1) == expected.argmax(1))[clear].mean() >= 0.99
    assert np.abs(found - expected).mean() < 0.05 * expected.std()
