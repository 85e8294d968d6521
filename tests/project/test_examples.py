"""The examples run as scripts run: their main function, in an empty folder, with less training."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lsquant
from lsquant.tasks import Task
from lsquant.verification.verdict import LEVELS

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def example(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_run_here():
    text = Path(__file__).read_text()
    for path in FOLDER.glob("*.py"):
        assert f'example("{path.stem}"' in text


def test_own_cnn(in_tmp, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    own = example("own_cnn", monkeypatch)
    result = own.main(epochs=3)
    assert result["float32"] > 0.8
    assert result["2 bits, learned steps"] > result["2 bits, not trained"]
    assert lsquant.load(own.network(), "own_cnn.safetensors")[3].weight_quantizer.spec.bits == 2
    if Path("own_cnn.onnx").exists():
        assert "exact: equal outputs" in capsys.readouterr().out


def test_own_loop_transformer(in_tmp, monkeypatch):
    own = example("own_loop_transformer", monkeypatch)
    result = own.main(steps=60)
    assert result["float32"] > 0.5
    assert result["3 bits, learned steps"] > result["3 bits, not trained"]
    symbols = own.task.example_input()
    loaded = lsquant.load(own.Network(), "own_transformer.safetensors").eval()
    assert loaded(symbols).shape == (1, own.SYMBOLS)


def test_the_transformer_as_a_task(monkeypatch):
    task: Task = example("own_loop_transformer", monkeypatch).task
    first = [x for x, _ in task.batches("train", batch_size=4, seed=1, epoch=2)]
    again = [x for x, _ in task.batches("train", batch_size=4, seed=1, epoch=2)]
    other = next(iter(task.batches("train", batch_size=4, seed=1, epoch=3)))[0]
    assert len(first) == task.steps_per_epoch(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other)
    model = task.model().train()
    assert 0.0 <= task.metric(model)["accuracy"] <= 100.0
    assert model.training


def tiny_bert(folder: Path) -> None:
    """A random BERT of one layer and its tokenizer, as transformers saves them."""
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)


WORDS = ["red", "blue", "cat", "dog", "sees", "likes", "big", "small", "house", "tree", "old", "new"]


@pytest.mark.filterwarnings("ignore:# The axis name:UserWarning")
@pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")  # of torch's exporter
@pytest.mark.parametrize("recipe,level", [("w8a8", "layers"), ("w4g32", "weights")])
def test_sentence_embedder(recipe, level, in_tmp, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    tiny_bert(Path("bert"))
    draw = random.Random(0)
    Path("text.txt").write_text(" ".join(" ".join(draw.choices(WORDS, k=6)) + "." for _ in range(60)))
    own = example("sentence_embedder", monkeypatch)
    monkeypatch.setattr(own, "LENGTH", 16)
    for name, value in (("BATCH", 4), ("SENTENCES", 12), ("REPEATS", 2)):
        monkeypatch.setattr(own, name, value)
    options = ["--recipe", recipe, "--steps", "3", "--out", "out"]
    result = own.main(["--model", "bert", "--text", "text.txt", *options])
    assert LEVELS.index(result["level"]) >= LEVELS.index(level)
    assert result["text.txt, learned"][0] > 0.9
    assert result["bytes"] == [Path(f"out/{name}.onnx").stat().st_size for name in ("float", "embedder")]
    loaded = lsquant.load(own.Embedder("bert"), "out/embedder.safetensors").eval()
    quantizer = loaded.bert.embeddings.word_embeddings.weight_quantizer
    assert (quantizer.spec.bits, quantizer.step.numel()) == (8, 6 + len(WORDS))
