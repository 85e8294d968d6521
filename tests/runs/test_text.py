"""Task text: language models of transformers from the command line to files; accumulation, autocast, resuming."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
from lsquant import UsageError
from lsquant._util.errors import MissingFile
from lsquant.cli.main import main
from lsquant.runs import Run, run_training
from lsquant.tasks import get_task
from lsquant.tasks.text import next_token_loss
from lsquant.training.loop import fit, parts_of

transformers = pytest.importorskip("transformers")
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "kill_and_resume.py"

WORDS = ["the", "cat", "saw", "a", "dog", "and", "ran", "home", "."]


def tokenizer_json() -> dict[str, Any]:
    """Words, each a token, and two special ones."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{w: 3 + i for i, w in enumerate(WORDS)}}
    special = [{"id": i, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
                "special": True} for t, i in list(vocabulary.items())[:3]]  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip


def sentences(seed: int, count: int) -> str:
    rng = np.random.default_rng(seed)
    animals = rng.choice(["cat", "dog"], (count, 2))
    return "<|endoftext|>".join(f"the {a} saw a {b} and ran home ." for a, b in animals)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model of a Llama's architecture, with weights and without, and text files."""
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder / "model")
    config.save_pretrained(folder / "empty")
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    for name in ("model", "empty"):
        (folder / name / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "train.txt").write_text(sentences(0, 120))
    (folder / "more.txt").write_text(sentences(1, 40))
    (folder / "valid.txt").write_text(sentences(2, 30))
    return folder


def task(place: Path, **options: Any) -> Any:
    return get_task("text", **{
        "model": str(place / "model"), "data": [str(place / "train.txt"), str(place / "more.txt")],
        "valid": str(place / "valid.txt"), "sequence": 12, **options,
    })  # fmt: skip


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    return [
        "train", "text", "--model", str(place / "model"), "--data", str(place / "train.txt"), str(place / "more.txt"),
        "--valid", str(place / "valid.txt"), "--sequence", "12", "--batch-size", "8", "--epochs", "1", "--quiet",
        "--threads", "1", "--out", str(out), *more,
    ]  # fmt: skip


def test_from_the_command_line_to_a_folder(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert (
        main([*arguments(place, out, "--recipe", "w2g32", "--epochs", "3", "--lr", "5e-3"), "--no-distill", "--json"])
        == 0
    )
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["rounded"]["loss"] > metrics["lsq"]["loss"]
    assert metrics["lsq"]["perplexity"] == pytest.approx(math.exp(metrics["lsq"]["loss"]))
    run = lsquant.tasks.open_run(out)
    model: Any = run.model()
    assert run.task.metric(model) == metrics["lsq"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["targets_per_second"] == pytest.approx(12 * rows[-1]["samples_per_second"], rel=0.01)
    layer = model.model.layers[0].mlp.down_proj  # 40 inputs, which no group of 32 divides
    assert (layer.weight_quantizer.spec.granularity, layer.weight_quantizer.spec.bits) == ("channel", 2)
    assert model.model.layers[0].mlp.up_proj.weight_quantizer.spec.group_size == 32
    assert model.lm_head.weight_quantizer is model.model.embed_tokens.weight_quantizer
    assert model.lm_head.weight_quantizer.spec.bits == 8
    for _, quantizer in lsquant.quantizers(model):
        step = quantizer.effective_step()
        assert torch.equal(step, step.half().float())
    assert main(["eval", str(out)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0
    assert main(["check", str(out)]) in (0, 1)
    capsys.readouterr()
    assert main(["export", str(out), "--profile", "packed"]) == 0
    assert main(["verify", str(out), "--profile", "packed", "--require", "weights"]) == 0


def test_a_run_that_is_stopped_ends_with_the_same_bits(place: Path, tmp_path: Path) -> None:
    how = ("--recipe", "w3g32", "--accumulate", "2", "--checkpoint-every", "1")
    assert main(arguments(place, tmp_path / "whole", *how)) == 0
    whole = lsquant.tasks.open_run(tmp_path / "whole")
    steps = whole.task.steps_per_epoch(8)
    assert steps > 4

    class Stop(Exception):
        pass

    calls = 0
    chosen = task(place)
    before = type(chosen).make_loss

    def make_loss(self: Any, settings: Any) -> Any:
        inner = before(self, settings)

        def loss(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 7:
                raise Stop
            return inner(*given)

        return loss

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(chosen), "make_loss", make_loss)
        with pytest.raises(Stop):
            main(arguments(place, tmp_path / "part", *how))
    assert main(["train", "--out", str(tmp_path / "part"), "--resume", "--quiet"]) == 0
    files = [(tmp_path / name / "model.safetensors") for name in ("whole", "part")]
    a, b = (lsquant.tasks.open_run(file.parent).model().state_dict() for file in files)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_from_scratch(place: Path, tmp_path: Path) -> None:
    chosen = task(place, model=str(place / "empty"))
    assert chosen.settings.float_epochs == 5
    settings = chosen.settings.__class__(**{
        **chosen.settings.to_dict(), "batch_size": 8, "epochs": 1, "float_epochs": 4, "float_lr": 1e-2, "threads": 1,
    })  # fmt: skip
    metrics = run_training(Run(tmp_path / "run", chosen, chosen.preset("w4g32"), settings), quiet=True)
    assert metrics["float"]["loss"] < 0.6 * math.log(16)  # far better than chance
    assert metrics["lsq"]["loss"] < metrics["float"]["loss"] + 0.2


def test_parts_of_a_batch_give_the_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    layer, x, y = nn.Linear(6, 5), torch.randn(10, 3, 6), torch.randint(5, (10, 3))
    next_token_loss(layer(x), (x, y)).backward()
    whole = layer.weight.grad.clone()  # type: ignore[union-attr]
    for count in (1, 3, 4, 20):
        layer.zero_grad()
        parts = list(parts_of((x, y), count))
        assert sum(share for _, share in parts) == pytest.approx(1)
        assert len(parts) == min(count, 10)
        for part, share in parts:
            (next_token_loss(layer(part[0]), part) * share).backward()
        torch.testing.assert_close(layer.weight.grad, whole)
    assert [len(t) for t, _ in parts_of(x, 4)] == [3, 3, 2, 2]
    assert [p["a"].shape[0] for p, _ in parts_of({"a": x, "b": y}, 2)] == [5, 5]
    with pytest.raises(UsageError, match="accumulate: a batch has to be"):
        list(parts_of((x, "labels"), 2))


def test_losses_by_hand() -> None:
    """Two classes, one token: probabilities 1/4 and 3/4 against 1/2 and 1/2."""
    mine, target = torch.log(torch.tensor([[[0.25, 0.75]]])), torch.tensor([[0]])
    teacher = torch.zeros(1, 1, 2)
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    batch = (target, target)
    assert next_token_loss(mine, batch).item() == pytest.approx(math.log(4))
    assert next_token_loss(mine, batch, teacher).item() == pytest.approx(divergence, rel=1e-5)
    assert next_token_loss(mine, batch, teacher, share=0.25).item() == pytest.approx(
        0.75 * math.log(4) + 0.25 * divergence, rel=1e-5
    )
    hot = torch.softmax(mine[0, 0] / 2, -1)
    warm = 4 * (0.5 * (math.log(0.5) - hot.log()).sum()).item()
    assert next_token_loss(mine, batch, teacher, temperature=2.0).item() == pytest.approx(warm, rel=1e-5)


def test_windows_and_what_is_measured(place: Path) -> None:
    chosen = task(place)
    tokens = chosen.tokens["test"].tolist()
    assert tokens[:3] == [0, 3, tokens[2]]  # begins with <s>, "the"
    assert len(tokens) == 30 * 10
    found = [(x, y) for x, y in chosen.batches("test", batch_size=4)]
    assert torch.cat([y.flatten() for _, y in found]).tolist() == tokens[1:]  # every token but the first, once
    assert max(len(x) for x, _ in chosen.batches("test", batch_size=250)) == 16
    assert (
        sum(len(x) for x, _ in chosen.batches("calibration", batch_size=250)) == (len(chosen.tokens["train"]) - 1) // 12
    )
    epochs = [list(chosen.batches("train", batch_size=8, seed=0, epoch=e)) for e in (0, 0, 1)]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert not torch.equal(epochs[0][0][0], epochs[2][0][0])
    assert {len(e) for e in epochs} == {chosen.steps_per_epoch(8)}
    for x, y in epochs[0]:
        assert x.shape == y.shape == (8, 12)
        assert torch.equal(x[:, 1:], y[:, :-1])

    class Uniform(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*x.shape, 16)

    assert chosen.metric(Uniform())["perplexity"] == pytest.approx(16)
    assert task(place, eval_tokens=50).metric(Uniform())["loss"] == pytest.approx(math.log(16))
    held = task(place, valid=None)
    assert len(held.tokens["test"]) == len(chosen.tokens["train"]) - int(0.95 * len(chosen.tokens["train"]))


@pytest.mark.parametrize("autocast", ["bfloat16", None])
def test_autocast_and_activation_checkpointing(place: Path, tmp_path: Path, autocast: Any) -> None:
    how = [] if autocast is None else ["--autocast", autocast]
    assert main(arguments(place, tmp_path / "run", "--recipe", "w4", *how, "--activation-checkpointing")) == 0
    run = lsquant.tasks.open_run(tmp_path / "run")
    assert run.settings.autocast == autocast
    assert run.task.options["activation_checkpointing"]
    if autocast is None:  # computed twice, the same bits
        assert main(arguments(place, tmp_path / "kept", "--recipe", "w4")) == 0
        a, b = (lsquant.tasks.open_run(tmp_path / name).model().state_dict() for name in ("run", "kept"))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_presets(place: Path) -> None:
    chosen = task(place)
    ternary = chosen.preset("ternaryG32")
    assert (ternary.weight.bits, ternary.weight.narrow, ternary.weight.group_size) == (2, True, 32)
    rows = chosen.preset("w3")
    assert (rows.weight.bits, rows.weight.granularity, rows.activation) == (3, "channel", None)
    both = chosen.preset("w4a8")
    assert both.activation.bits == 8
    model = chosen.model()
    lsquant.prepare(model, both, example_inputs=chosen.example_input())
    lsquant.calibrate(model, chosen.batches("calibration", batch_size=4), max_batches=2)
    assert model(chosen.example_input()).logits.isfinite().all()
    with pytest.raises(UsageError, match="no such preset"):
        chosen.preset("w4k")


def test_what_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": None}, "needs --model FOLDER"),
        ({"model": str(tmp_path)}, "has no config.json"),
        ({"data": None}, "data=None; give text files"),
        ({"data": [3]}, "data holds 3, no name of a file"),
        ({"sequence": 1}, "sequence=1; a whole number from 2"),
        ({"eval_tokens": True}, "eval_tokens=True"),
        ({"activation_checkpointing": "yes"}, "activation_checkpointing='yes'"),
    ]
    for options, says in cases:
        with pytest.raises((UsageError, MissingFile), match=says):
            task(place, **options)
    with pytest.raises(MissingFile, match=r"nowhere.txt does not exist"):
        task(place, data="nowhere.txt").steps_per_epoch(2)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"bytes.txt is not text in UTF-8"):
        task(place, data=str(tmp_path / "bytes.txt")).steps_per_epoch(2)
    with pytest.raises(UsageError, match="windows of 12, fewer than batch_size=1000"):
        task(place).steps_per_epoch(1000)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds no causal language model"):
        task(place, model=str(tmp_path)).model()
    with pytest.raises(UsageError, match="has no tokenizer"):
        task(place, model=str(tmp_path)).steps_per_epoch(2)
    chosen = task(place)
    with pytest.raises(UsageError, match=r"distill_weight=2.0; a share"):
        chosen.make_loss(chosen.settings.__class__(distill_weight=2.0))
    assert main(arguments(place, tmp_path / "run", "--recipe", "w4q")) == 2
    assert "no such preset" in capsys.readouterr().err


def test_the_name_of_a_task_behind_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--data takes several files; a task's name behind them is the task, as it was when it took one."""
    assert (
        main(["train", "--out", str(tmp_path / "r"), "--bits", "4", "--data", str(tmp_path / "none"), "cifar10"]) == 3
    )
    assert "none" in capsys.readouterr().err


def test_code_in_a_models_folder_is_never_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers would ask, and a y would run it."""
    monkeypatch.setattr("builtins.input", lambda *a: "y")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
    for call in (lambda t: t.model(), lambda t: t.preset("w4"), lambda t: t.steps_per_epoch(2)):
        with pytest.raises(UsageError, match=r"holds no causal language model|has no tokenizer"):
            call(task(place, model=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_weights_in_another_form_are_not_passed_over(place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((place / "empty" / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"has pytorch_model.bin, and weights are read from model.safetensors only"):
        task(place, model=str(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_20_random_points_resumes_to_the_same_bits(place: Path) -> None:
    _, *how = arguments(
        place, place, "--recipe", "w3g32", "--accumulate", "2", "--checkpoint-every", "2", "--epochs", "4"
    )
    at = how.index("--out")
    command = [sys.executable, str(BENCHMARK), "--kills", "20", *how[:at], *how[at + 2 :]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("20 of 20 runs ended with the bits of the run that was not killed\n")


def test_another_text_on_resume(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text(sentences(0, 120))
    how = ["train", "text", "--model", str(place / "model"), "--sequence", "12", "--batch-size", "8", "--epochs", "1"]
    how += ["--data", str(tmp_path / "t.txt"), "--recipe", "w4", "--quiet", "--out", str(tmp_path / "run")]
    assert main(how) == 0
    (tmp_path / "t.txt").write_text(sentences(7, 120))
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--quiet"]) == 2
    assert "the text is another one than the run was started with" in capsys.readouterr().err


def test_texts_that_are_too_short_or_of_another_model(place: Path, tmp_path: Path) -> None:
    assert task(place, eval_tokens=5).metric(task(place).model())["loss"] > 0  # shorter than a window
    for name, content, says in (("a.txt", "", "there is no text in"), ("b.txt", "<|endoftext|>", "there is no text")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match=says):
            task(place, data=str(tmp_path / name)).steps_per_epoch(2)
    (tmp_path / "c.txt").write_text("cat")
    with pytest.raises(UsageError, match="fewer than two tokens are left"):
        task(place, valid=None, data=str(tmp_path / "c.txt")).steps_per_epoch(2)
    with pytest.raises(UsageError, match="cannot be read as a text file"):
        task(place, data=str(tmp_path)).steps_per_epoch(2)
    larger = tokenizer_json()
    larger["model"]["vocab"] = {w: i + (20 if w == "cat" else 0) for w, i in larger["model"]["vocab"].items()}
    for file in (place / "model").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(larger))
    with pytest.raises(UsageError, match="the tokenizer gives the token 24, the model knows 16"):
        task(place, model=str(tmp_path)).steps_per_epoch(2)


def test_embeddings_in_floating_point_reach_vllm(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    assert main(arguments(place, tmp_path / "run", "--recipe", "w4g8", "--float-embeddings")) == 0
    out = tmp_path / "folder"
    how = ["export", str(tmp_path / "run"), "--profile", "compressed-tensors", "--tokenizer", str(place / "model")]
    assert main([*how, "--out", str(out)]) == 0
    assert (out / "tokenizer.json").is_file()
    assert (
        main(
            [
                "verify",
                str(tmp_path / "run"),
                "--profile",
                "compressed-tensors",
                "--file",
                str(out),
                "--require",
                "weights",
            ]
        )
        == 0
    )


def test_presets_that_fit_no_layer(place: Path) -> None:
    with pytest.raises(UsageError, match="groups of 3 divide the inputs of no layer"):
        task(place).preset("ternaryg3")
    with pytest.raises(UsageError, match="group_size=0"):
        task(place).preset("w4g0")


@pytest.mark.parametrize(
    "wrong,says",
    [({"accumulate": 0}, "accumulate=0"), ({"accumulate": 2.5}, "accumulate=2.5"), ({"autocast": "float16"}, "float16"),
     ({"accumulate": 2}, "0 normalizes over the batch")],
)  # fmt: skip
def test_what_fit_cannot_do(wrong: dict[str, Any], says: str) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = (torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UsageError, match=says):
        fit(model, lambda epoch: [batch], optimizer, epochs=1, steps_per_epoch=1, quiet=True, **wrong)


def test_parts_have_the_form_of_the_batch() -> None:
    Named = namedtuple("Named", ["x", "y"])
    batch = Named(torch.zeros(4, 2), torch.zeros(4))
    assert all(isinstance(part, Named) and len(part.x) == 2 for part, _ in parts_of(batch, 2))
    assert all(isinstance(part, list) for part, _ in parts_of([torch.zeros(4)], 2))
    with pytest.raises(UsageError, match="an empty batch"):
        list(parts_of(torch.zeros(0, 2), 2))
