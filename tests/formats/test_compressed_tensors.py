"""Folders for vLLM and transformers, read by the official packages; ``verify`` on them; everything that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.edited_files import read_safetensors, write_safetensors
from helpers.language_models import FLOAT, RECIPES, VOCABULARY, language_model, quantized, snap
from lsquant import Quantizer, QuantSpec, Recipe, Rule, UsageError
from lsquant._util.errors import DamagedFile, MissingFile
from lsquant.cli.main import main
from lsquant.formats import profile_of
from lsquant.formats.folders.content import packed_rows, unpacked_rows

transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # third parties' own affairs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
W4G32 = RECIPES["w4g32"]
TOKENS = torch.arange(24).reshape(2, 12)


def loaded(folder: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def weights(model: nn.Module) -> dict[str, Any]:
    """The quantized layers by name."""
    found = dict(lsquant.nn.quantized_layers(model))
    return {name: layer for name, layer in found.items() if layer.weight_quantizer is not None}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# ---- packing ----


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_thousand_matrices_come_back_from_the_official_unpacker(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    for seed in range(1000):
        generator = torch.Generator().manual_seed(1000 * bits + seed)
        rows, columns = (int(torch.randint(1, most, (), generator=generator)) for most in (9, 140))
        shape = (rows, columns)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
        codes = torch.randint(low, high, shape, generator=generator, dtype=torch.int8)
        packed = packed_rows(codes, bits)
        assert (packed.dtype, packed.shape) == (torch.int32, (rows, -(-columns * bits // 32)))
        assert torch.equal(packed, pack_to_int32(codes, bits))
        assert torch.equal(unpack_from_int32(packed, bits, torch.Size(shape)), codes)
        assert torch.equal(unpacked_rows(packed, bits, columns), codes)


def test_packing_in_literal_numbers() -> None:
    assert packed_rows(torch.tensor([[-8, 7, 0, 1]], dtype=torch.int8), 4).tolist() == [[0x98F0]]
    row = torch.tensor([[-4] * 10 + [3, -4]], dtype=torch.int8)  # code 10 is at bits 30, 31 and 0 of the next word
    assert packed_rows(row, 3).tolist() == [[0xC0000000 - 2**32, 1]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_official_decompressor_gives_codes_times_steps(bits: int) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 96), generator=generator, dtype=torch.int8)
        step = torch.rand(6, 3, generator=generator).half()
        args = QuantizationArgs(num_bits=bits, strategy="group", group_size=32)
        found = compressor.decompress(
            {
                "weight_packed": packed_rows(codes, bits),
                "weight_scale": step.float(),
                "weight_shape": torch.tensor([6, 96]),
            },
            QuantizationScheme(targets=["Linear"], weights=args),
        )["weight"]
        assert torch.equal(found, codes * step.float().repeat_interleave(32, 1))


# ---- read by transformers ----


@pytest.mark.parametrize("kind", ("llama", "qwen2"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_transformers_loads_what_was_trained(kind: str, recipe: str, tmp_path: Path) -> None:
    snapped = torch.bfloat16 if recipe in ("w8", "w2g64") else torch.float16
    settings = {"hidden_size": 128, "num_key_value_heads": 4} if recipe == "w4g128" else {}
    model = quantized(language_model(kind, tie_word_embeddings=kind == "qwen2", **settings), RECIPES[recipe], snapped)
    folder = tmp_path / "folder"
    assert lsquant.export_compressed_tensors(model, folder) == folder
    names = ["config.json", "generation_config.json", "model.safetensors"]
    assert sorted(f.name for f in folder.iterdir()) == names

    other = loaded(folder)
    assert (other.dtype, type(other)) == (torch.float32, type(model))
    assert isinstance(other.model.layers[0].mlp.gate_proj.weight_packed, torch.Tensor)  # compressed until it runs
    assert torch.allclose(logits(other), logits(model), rtol=1e-5, atol=1e-6)
    for name, layer in weights(model).items():
        assert torch.equal(other.get_submodule(name).weight, layer.dequantized_weight())
    for name, tensor in model.state_dict().items():
        if "quantizer" not in name and name.removesuffix(".weight") not in weights(model):
            assert torch.equal(other.state_dict()[name], tensor)

    verdict = lsquant.verify(model, folder, [])
    assert (verdict.level, verdict.profile, profile_of(folder)) == (
        "weights",
        "compressed-tensors",
        "compressed-tensors",
    )
    codes = sum(layer.weight.numel() for layer in weights(model).values())
    steps = sum(layer.weight_quantizer.step.numel() for layer in weights(model).values())
    stored, _ = read_safetensors(folder / "model.safetensors")
    floats = sum(t.numel() for name, t in stored.items() if name.rpartition(".")[2] in ("weight", "bias"))
    assert verdict.checks[0].compared == codes + steps + floats


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_models_of_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Readers multiply in the type of the model: one rounding, as in the trained layer."""
    model = quantized(language_model(dtype=dtype).to(dtype), W4G32, dtype)
    folder = lsquant.export_compressed_tensors(model, tmp_path / "f")
    name = str(dtype).removeprefix("torch.")
    assert config_of(folder)["dtype"] == name
    tensors, _ = read_safetensors(folder / "model.safetensors")
    assert {t.dtype for key, t in tensors.items() if key.endswith("weight_scale")} == {dtype}
    other = loaded(folder)
    assert torch.allclose(logits(other).float(), logits(model).float(), atol=0.02)
    for key, layer in weights(model).items():
        assert torch.equal(other.get_submodule(key).weight, layer.dequantized_weight().to(dtype))
    assert lsquant.verify(model, folder, []).level == "weights"


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("scale", ("float16", "float32"))
def test_float_weights_while_loading(scale: str, tmp_path: Path) -> None:
    """``dequantize=True`` multiplies in the type of the steps in the file."""
    model = quantized(language_model(), W4G32)
    folder = lsquant.export_compressed_tensors(model, tmp_path / "f", scale_dtype=scale)
    other = loaded(folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    for name, layer in weights(model).items():
        wanted = layer.dequantized_weight().to(getattr(torch, scale)).float()
        assert torch.equal(other.get_submodule(name).weight, wanted)


def test_a_quantized_head_and_training_go_along(tmp_path: Path) -> None:
    """A few steps of training, then what was trained is shipped, head and all."""
    model = language_model(tie_word_embeddings=False)
    spec = QuantSpec(4, True, granularity="group", group_size=32, step_dtype="float16")
    lsquant.prepare(model, Recipe(spec, rules=[Rule(nn.Embedding, None)]))
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.05), momentum=0.9)
    for _ in range(3):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = lsquant.export_compressed_tensors(model, tmp_path / "f")
    assert config_of(folder)["quantization_config"]["ignore"] == []
    other = loaded(folder)
    assert torch.allclose(logits(other), logits(model), rtol=1e-4, atol=1e-5)
    assert torch.equal(other.lm_head.weight, model.lm_head.dequantized_weight())


def test_the_config_in_literal_values(tmp_path: Path) -> None:
    model = quantized(language_model(), W4G32)
    before = model.config.to_dict()
    config = config_of(lsquant.export_compressed_tensors(model, tmp_path / "f"))
    assert model.config.to_dict() == before
    assert (config["architectures"], config["dtype"], config["hidden_size"]) == (["LlamaForCausalLM"], "float32", 64)
    arguments = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "dynamic": False,
    }
    group = {"targets": ["Linear"], "weights": arguments, "format": "pack-quantized"}
    assert config["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**group, "input_activations": None, "output_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    mixed = lsquant.export_compressed_tensors(quantized(language_model(), RECIPES["mixed"]), tmp_path / "mixed")
    found = config_of(mixed)["quantization_config"]
    assert found["ignore"] == ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "lm_head"]
    five = [g for g in found["config_groups"].values() if g["weights"]["num_bits"] == 5]
    assert five[0]["targets"] == ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]
    assert five[0]["weights"]["strategy"] == "channel"


def test_the_float_folder(tmp_path: Path) -> None:
    """Any layer, tied weights too: the loaded weights are code * step, bit for bit."""
    for dtype in (torch.float32, torch.bfloat16):
        model = quantized(language_model(tie_word_embeddings=True).to(dtype), Recipe.preset("w4g32"), None)
        folder = lsquant.export_hf(model, tmp_path / f"hf-{dtype}")
        other = loaded(folder)
        assert "quantization_config" not in config_of(folder)
        assert other.dtype == dtype
        for name, layer in weights(model).items():
            assert torch.equal(other.get_submodule(name).weight, layer.dequantized_weight().to(dtype))
        assert torch.allclose(
            logits(other).float(), logits(model).float(), atol=1e-6 if dtype == torch.float32 else 0.02
        )
        verdict = lsquant.verify(model, folder, [])
        assert (verdict.level, verdict.profile) == ("weights", "hf")
        tensors, metadata = read_safetensors(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
        write_safetensors(folder / "model.safetensors", tensors, metadata, True)
        check = lsquant.verify(model, folder, []).checks[0]
        assert (check.mismatches, check.worst) == (1, "model.layers.1.mlp.up_proj.weight_quantizer")


# ---- the type of the steps ----


def scale_dtypes(folder: Path) -> set[torch.dtype]:
    tensors, _ = read_safetensors(folder / "model.safetensors")
    return {t.dtype for name, t in tensors.items() if name.endswith("weight_scale")}


def test_steps_are_written_in_a_type_that_has_them(tmp_path: Path) -> None:
    export = lsquant.export_compressed_tensors
    model = quantized(language_model(), W4G32, None)
    first = "model.layers.0.self_attn.q_proj: a step is 0.0"
    with pytest.raises(UsageError, match=rf"{first}.* no float16 number, nor .*step_dtype='float16'.*='float32'"):
        export(model, tmp_path / "f")
    with pytest.raises(UsageError, match=rf"{first}.* is no bfloat16 number.*step_dtype='bfloat16'"):
        export(model, tmp_path / "f", scale_dtype="bfloat16")
    with pytest.raises(UsageError, match=r"scale_dtype='float64'; use one of 'float16', 'bfloat16', 'float32'"):
        export(model, tmp_path / "f", scale_dtype="float64")
    assert list(tmp_path.iterdir()) == []

    folder = export(model, tmp_path / "32", scale_dtype="float32")  # which the official reader takes as it is
    assert scale_dtypes(folder) == {torch.float32}
    other = loaded(folder)
    assert torch.allclose(logits(other), logits(model), rtol=1e-5, atol=1e-6)
    for name, layer in weights(model).items():
        assert torch.equal(other.get_submodule(name).weight, layer.dequantized_weight())
    assert lsquant.verify(model, folder, []).level == "weights"

    snap(model, torch.bfloat16)  # 8 bits of mantissa: numbers of float16 too where they are not small
    assert scale_dtypes(export(model, tmp_path / "16")) == {torch.float16}
    assert scale_dtypes(export(model, tmp_path / "b16", scale_dtype="bfloat16")) == {torch.bfloat16}
    with torch.no_grad():
        quantizer = model.model.layers[1].mlp.down_proj.weight_quantizer
        quantizer.step[3], quantizer.initial_step[3] = 2.0**-30, 2.0**-30
    assert scale_dtypes(export(model, tmp_path / "small")) == {torch.bfloat16}

    half = quantized(language_model().bfloat16(), W4G32, torch.float16)
    for asked in (None, "float16", "float32"):
        with pytest.raises(UsageError, match=r"no bfloat16 number; readers round .*step_dtype='bfloat16'.*model.float"):
            export(half, tmp_path / "x", scale_dtype=asked)


# ---- the folder ----


def test_folders_are_replaced_on_demand_only(tmp_path: Path) -> None:
    model, folder = quantized(language_model(), W4G32), tmp_path / "f"
    lsquant.export_hf(model, folder)
    with pytest.raises(UsageError, match="f exists: give another folder, or overwrite=True"):
        lsquant.export_compressed_tensors(model, folder)
    assert profile_of(folder) == "hf"
    lsquant.export_compressed_tensors(model, folder, overwrite=True)
    assert profile_of(folder) == "compressed-tensors"
    (folder / "notes").write_text("x")
    with pytest.raises(UsageError, match="'notes' in it was not written here; give another folder"):
        lsquant.export_hf(model, folder, overwrite=True)
    (folder / "notes").unlink()
    language_model().save_pretrained(tmp_path / "theirs")
    with pytest.raises(UsageError, match=r"theirs is not replaced: lsquant has not written its model.safetensors"):
        lsquant.export_hf(model, tmp_path / "theirs", overwrite=True)
    shutil.rmtree(tmp_path / "theirs")
    (folder / "more").mkdir()
    with pytest.raises(UsageError, match=r"'more' in it was not written here"):
        lsquant.export_hf(model, folder, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").write_text("dear")
    with pytest.raises(UsageError, match="'letter' in it was not written here"):
        lsquant.export_hf(model, tmp_path / "other", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file: give the name of a folder"):
        lsquant.export_hf(model, tmp_path / "file", overwrite=True)
    with pytest.raises(MissingFile, match="does not exist: create it first"):
        lsquant.export_hf(model, tmp_path / "no" / "f")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f", "file", "other"]


def test_a_folder_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(language_model(), W4G32)
    folder = lsquant.export_hf(model, tmp_path / "f")
    before = (folder / "model.safetensors").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.generation_config), "save_pretrained", full)
    with pytest.raises(lsquant.LsquantError, match=r"no space left on the disk while writing .*f; the old"):
        lsquant.export_compressed_tensors(model, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_generation_config_that_cannot_be_written(tmp_path: Path) -> None:
    model = quantized(language_model(), W4G32)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = False
    model.generation_config.num_return_sequences = 3
    with pytest.raises(UsageError, match=r"model\.generation_config cannot be saved: "):
        lsquant.export_hf(model, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_tokenizers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    model = quantized(language_model(), W4G32)
    first = lsquant.export_compressed_tensors(model, tmp_path / "a", tokenizer=tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(first)("a").input_ids == [1]
    second = lsquant.export_hf(model, tmp_path / "b", tokenizer=str(first))
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert "quantization_config" not in config_of(second)  # nothing but the tokenizer is copied
    (tmp_path / "empty").mkdir()
    for tokenizer, said in ((tmp_path / "empty", "has none of a tokenizer's files"), ("no/such", "is no folder")):
        with pytest.raises(MissingFile, match=said):
            lsquant.export_hf(model, tmp_path / "c", tokenizer=tokenizer)
    assert not (tmp_path / "c").exists()


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lsquant.save(quantized(language_model(), W4G32), tmp_path / "m.safetensors")
    (tmp_path / "own.py").write_text(
        "from helpers.language_models import language_model as build\n"
        "import torch\n\ndef data():\n    return [{'input_ids': torch.arange(6)[None]}]\n"
    )
    own = [f"--model={tmp_path / 'own.py'}:build", f"--data={tmp_path / 'own.py'}:data"]
    for profile in ("compressed-tensors", "hf"):
        for _ in range(2):  # the second replaces the first
            assert main(["export", str(tmp_path / "m.safetensors"), *own, f"--profile={profile}"]) == 0
        path = tmp_path / f"m.{profile}"
        size = sum(f.stat().st_size for f in path.iterdir())
        assert capsys.readouterr().out.splitlines()[-1] == f"{path}: {size:,} bytes"
        verify = ["verify", str(tmp_path / "m.safetensors"), *own, f"--profile={profile}"]
        assert main([*verify, "--require=weights"]) == 0
        assert "level reached: weights" in capsys.readouterr().out
        assert json.loads((tmp_path / f"m.{profile}.verdict.json").read_text())["profile"] == profile
        assert main([*verify, f"--file={path}"]) == 1
        assert f"(profile {profile} promises weights: --require weights)" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "m.safetensors"), *own, "--profile=hf", "--tokenizer=no"]) == 3
    assert main(["export", str(tmp_path / "m.safetensors"), *own, "--tokenizer=no"]) == 2
    assert "--tokenizer is an option of the profiles compressed-tensors, hf" in capsys.readouterr().err


# ---- what is refused ----


def refused(model: Any, tmp_path: Path, match: str, export: Any = lsquant.export_compressed_tensors) -> None:
    with pytest.raises(UsageError, match=match):
        export(model, tmp_path / "refused")
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    untied = {"tie_word_embeddings": False}
    refused(nn.Linear(4, 4), tmp_path, "the model has no quantized layer")
    plain = nn.Sequential(nn.Linear(4, 4))
    lsquant.prepare(plain, Recipe(4))
    refused(plain, tmp_path, "Sequential is no model of transformers .*export_packed writes any model")
    everything = quantized(language_model(**untied), Recipe.preset("w4g32"))
    refused(everything, tmp_path, r"embed_tokens: .* Linear layers, not Embedding: .*skip=\[nn.Embedding\]")
    unsigned = quantized(language_model(), Recipe(4, rules=[*FLOAT, Rule("*.1.mlp.up_proj", QuantSpec(4, False))]))
    refused(unsigned, tmp_path, r"layers.1.mlp.up_proj: its weight has unsigned codes.*QuantSpec\(4, signed=True\)")
    late = quantized(language_model(**untied), Recipe(4, rules=[Rule(nn.Embedding, None)]))
    late.model.embed_tokens.weight = late.lm_head.weight
    refused(late, tmp_path, "lm_head: its weight is shared with another layer.*skip=")
    refused(
        late, tmp_path, "lm_head.weight_quantizer: .* is read in floating point by another layer", lsquant.export_hf
    )
    shared = language_model(**untied)
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    refused(quantized(shared, W4G32), tmp_path, "layers.[01].mlp.up_proj: its weight is shared with another layer")

    both = language_model()
    lsquant.prepare(both, Recipe(4, 8, rules=FLOAT), example_inputs={"input_ids": TOKENS})
    lsquant.calibrate(both, [{"input_ids": TOKENS}])
    for export in (lsquant.export_compressed_tensors, lsquant.export_hf):
        refused(both, tmp_path, r"q_proj: its input is quantized.*Recipe.preset\('w4g32'\)", export)
    lone = language_model()
    lone.extra = Quantizer(QuantSpec(8, True), count=1)
    lone.extra.initialize(torch.ones(3))
    refused(quantized(lone, W4G32), tmp_path, "extra: the folder holds weights alone", lsquant.export_hf)

    apart = quantized(language_model(**untied), W4G32)
    apart.config.tie_word_embeddings = True
    refused(apart, tmp_path, "embedding and head have weights of their own: set .* = False")
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    )
    refused(quantized(gpt, Recipe(4, rules=FLOAT)), tmp_path, r"c_attn: .* Linear layers, not Conv1D: .*skip=\['tr")
    assert lsquant.verify(gpt, lsquant.export_hf(gpt.eval(), tmp_path / "gpt"), []).level == "weights"


def test_verify_of_other_things(tmp_path: Path) -> None:
    model = quantized(language_model(), W4G32)
    folder = lsquant.export_compressed_tensors(model, tmp_path / "f")
    for other in (quantized(language_model(), W4G32), quantized(language_model(), RECIPES["w2g64"])):
        snap(other, torch.float16)
        assert lsquant.verify(other, folder, []).level == "none"
    with pytest.raises(UsageError, match="which no runtime runs"):
        lsquant.verify(model, folder, [], runtime="onnxruntime")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="nothing is a folder: give the name of a file"):
        lsquant.verify(model, tmp_path / "nothing", [])
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(MissingFile, match=r"model\.safetensors does not exist"):
        lsquant.verify(model, folder, [])


@pytest.mark.parametrize("write", [lsquant.export_compressed_tensors, lsquant.export_hf])
def test_what_stays_float_and_the_config_are_compared(write: Any, tmp_path: Path) -> None:
    model = quantized(language_model(), W4G32)
    folder = write(model, tmp_path / "f")
    assert lsquant.verify(model, folder, []).level == "weights"
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    verdict = lsquant.verify(model, folder, [])
    assert (verdict.level, verdict.checks[0].mismatches, verdict.checks[0].worst) == ("none", 1, "model.norm.weight")
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.ones(64))
    assert lsquant.verify(model, folder, []).level == "weights"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(UsageError, match=r"its config.json has rms_norm_eps=0.5, the model 1e-06"):
        lsquant.verify(model, folder, [])


def test_changed_folders_are_caught(tmp_path: Path) -> None:
    model = quantized(language_model(), W4G32)
    folder = lsquant.export_compressed_tensors(model, tmp_path / "f")
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, metadata = read_safetensors(file)
    tensors = {key: t.clone() for key, t in tensors.items()}  # they are of the file, which is written again
    text, name = config.read_text(), "model.layers.1.mlp.up_proj"

    def changed(**parts: Any) -> Any:
        write_safetensors(file, {**tensors, **{f"{name}.{k}": v for k, v in parts.items()}}, metadata, True)
        return lsquant.verify(model, folder, []).checks[0]

    packed, scale = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"]
    assert changed().mismatches == 0
    flipped = packed.clone()
    flipped[3, 2] ^= 1 << 9
    check = changed(weight_packed=flipped)
    assert (check.mismatches, check.worst) == (1, f"{name}.weight_quantizer")
    moved = scale.clone()
    moved[7, 1] *= 2
    assert changed(weight_scale=moved).mismatches == 1
    for parts, said in (
        ({"weight_packed": packed[:, :7].contiguous()}, r"256 x 64 codes of 4 bits take 256 x 8 words, not \[256, 7\]"),
        ({"weight_packed": packed.float()}, "weight_packed is no matrix of int32"),
        ({"weight_scale": scale[:, :1].contiguous()}, r"weight_scale is not \[256, 2\] of float16, bfloat16, float32"),
        ({"weight_scale": scale * 0}, "a step is not finite, too large, or not above 0"),
        ({"weight_scale": scale.double()}, "weight_scale is not"),
        ({"weight_shape": torch.tensor([256, 2**40])}, "a weight of 256 x 1099511627776"),
        ({"weight_shape": torch.tensor([256.0, 64.0])}, "weight_shape is not two integers"),
        ({"weight": torch.zeros(256, 64)}, "codes and a float weight"),
    ):
        with pytest.raises(DamagedFile, match=said):
            changed(**parts)
    write_safetensors(file, tensors, metadata, True)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedFile, match="its checksum does not fit its content"):
        lsquant.verify(model, folder, [])
    write_safetensors(file, tensors, metadata, True)

    for before, after, said in (
        ('"num_bits": 4', '"num_bits": 3', "codes of 3 bits take"),
        ('"num_bits": 4', '"num_bits": 9', "needed is an integer from 2 to 8"),
        ('"group_size": 32', '"group_size": 48', "groups of 48 in 256 columns"),
        ('"group_size": 32', '"group_size": 64', r"weight_scale is not \["),
        ('"group_size": 32', '"group_size": null', "needed is an integer from 1"),
        ('"strategy": "group"', '"strategy": "channel"', "group_size is 32"),
        ('"strategy": "group"', '"strategy": "block"', "needed is one of 'tensor', 'channel', 'group'"),
        ('"symmetric": true', '"symmetric": false', "needed is one of True"),
        ('"type": "int"', '"type": "float"', "needed is one of 'int'"),
        ('"Linear"', '"re:(a+)+$"', "is a pattern"),
        ('"Linear"', '"Other"', "does not count it among the quantized layers"),
        ('"lm_head"', f'"{name}"', "does not count it among the quantized layers"),
        ('"input_activations": null', '"input_activations": {}', "needed is one of None"),
        ('"pack-quantized"', '"int-quantized"', "needed is one of"),
        ('"quant_method": "compressed-tensors"', '"quant_method": "gptq"', "needed is one of 'compressed-tensors'"),
    ):
        assert before in text
        config.write_text(text.replace(before, after))
        with pytest.raises(DamagedFile, match=said):
            lsquant.verify(model, folder, [])
    config.write_text(text[:-9])
    with pytest.raises(DamagedFile, match=r"config\.json is damaged: not valid JSON"):
        lsquant.verify(model, folder, [])
