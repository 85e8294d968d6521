"""A sentence embedder of transformers at 8 or 4 bits: distilled on any text, shipped as ONNX, compared with float.

    python examples/sentence_embedder.py --model FOLDER --text TRAIN.txt --held-out OTHER.txt --recipe w8a8 --out OUT

FOLDER holds a BERT and its tokenizer as transformers saves them, for example all-MiniLM-L6-v2.  A sentence's embedding
is the mean of its last token states, normalised.  docs/quickstart-transformer.md has the numbers.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

import lsquant
from lsquant import QuantSpec, Recipe, Rule

LENGTH, BATCH, SENTENCES, REPEATS = 128, 16, 300, 15  # tokens in the files; samples; of each held-out text; timings

TABLES = Rule(nn.Embedding, QuantSpec(8, granularity="channel", step_dtype="float16"), None)  # a step per row
ROWS = {bits: QuantSpec(bits, granularity="channel") for bits in (4, 8)}
GROUPS = QuantSpec(4, granularity="group", group_size=32, step_dtype="float16")
INPUTS = QuantSpec(8, offset=True)  # what GELU leaves is hardly ever below 0: a zero point halves its step
CHOICES: dict[str, tuple[Recipe, str, int, float]] = {  # recipe, profile of the ONNX file, training steps, their rate
    "w8a8": (Recipe(ROWS[8], INPUTS, [TABLES]), "qdq", 200, 1e-4),
    "w4a8": (Recipe(ROWS[4], INPUTS, [TABLES]), "small", 200, 1e-4),
    "w4g32": (Recipe(GROUPS, None, [TABLES]), "small", 150, 1e-4),
}
Batch = dict[str, Tensor]


class Embedder(nn.Module):
    """(batch, length) tokens and their mask to (batch, width) vectors of length 1."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.bert = BertModel.from_pretrained(folder, add_pooling_layer=False)

    def states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return pooled(self.states(input_ids, attention_mask), attention_mask)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def sentences(path: str) -> list[str]:
    """The sentences of a file, each once."""
    text = Path(path).read_text(encoding="utf-8", errors="replace").replace("<|endoftext|>", "\n\n")
    found = (" ".join(part.split()) for part in re.split(r'(?<=[.!?])["\']?\s+|\n\s*\n', text))
    return list(dict.fromkeys(sentence for sentence in found if len(sentence.split()) > 3))


def distill(model: Embedder, teacher: Embedder, batches: Callable[[], Batch], steps: int, lr: float) -> None:
    """Learn the teacher's token states and embeddings.  Tables stay as they are: few of their rows are in any batch."""
    model.bert.embeddings.requires_grad_(False)
    optimizer = torch.optim.Adam(lsquant.param_groups(model, lr=lr, relative_step_lr=10 * lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):  # in eval mode, for the teacher has no dropout either
        batch = batches()
        with torch.no_grad():
            wanted = teacher.states(**batch)
        states, mask = model.states(**batch), batch["attention_mask"]
        error = ((states - wanted).square().sum(-1) / wanted.square().sum(-1))[mask.bool()].mean()
        angle = 1 - (pooled(states, mask) * pooled(wanted, mask)).sum(-1).mean()
        optimizer.zero_grad()
        (error + angle).backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}: tokens {error:.4f}, embeddings {angle:.5f}", flush=True)


def compared(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Mean cosine to the float embeddings, and the share of sentences whose nearest other one is the same."""
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (found, wanted)]
    return float((found * wanted).sum(1).mean()), float((nearest[0] == nearest[1]).float().mean())


def milliseconds(sessions: list[Any], feeds: dict[str, Any]) -> list[float]:
    """Medians of interleaved runs; the first ones do not count."""
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(REPEATS + 1):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, feeds)
            taken.append(1000 * (time.perf_counter() - start))
    return [median(taken[1:]) for taken in times]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a BERT and its tokenizer")
    parser.add_argument("--text", required=True, help="text to train on")
    parser.add_argument("--held-out", nargs="*", default=[], help="texts to measure on (default: the end of --text)")
    parser.add_argument("--recipe", choices=CHOICES, default="w8a8")
    parser.add_argument("--steps", type=int, help="of training (default: by recipe)")
    parser.add_argument("--out", required=True, help="folder for the files")
    given = parser.parse_args(arguments)
    recipe, profile, steps, lr = CHOICES[given.recipe]
    out, tokenizer, draw = Path(given.out), AutoTokenizer.from_pretrained(given.model), random.Random(0)
    out.mkdir(parents=True, exist_ok=True)
    train, texts = sentences(given.text), {path: sentences(path)[:SENTENCES] for path in given.held_out}
    if not texts:
        train, texts = train[:-SENTENCES], {given.text: train[-SENTENCES:]}

    def tokens(chosen: list[str], padding: Any = True) -> Batch:
        found = tokenizer(chosen, truncation=True, max_length=LENGTH, padding=padding, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def passages() -> Batch:
        """Each is one to four sentences that follow each other."""
        starts = [draw.randrange(len(train)) for _ in range(BATCH)]
        return tokens([" ".join(train[at : at + draw.randint(1, 4)]) for at in starts])

    def measured(run: Callable[[Batch], Tensor], padding: Any = True) -> dict[str, Tensor]:
        pieces = {path: [held[at : at + BATCH] for at in range(0, len(held), BATCH)] for path, held in texts.items()}
        with torch.no_grad():
            return {path: torch.cat([run(tokens(piece, padding)) for piece in held]) for path, held in pieces.items()}

    teacher, model = Embedder(given.model).eval(), Embedder(given.model).eval()
    found = {"float": measured(lambda batch: teacher(**batch))}

    # ---- with lsquant ----
    print(lsquant.prepare(model, recipe, example_inputs=passages()))
    if recipe.activation is not None:  # weights alone have their steps
        lsquant.calibrate(model, [passages() for _ in range(2)], weights="mse")
    found["rounded"] = measured(lambda batch: model(**batch))
    distill(model, teacher, passages, steps if given.steps is None else given.steps, lr)
    lsquant.save(model, out / "embedder.safetensors")
    example = tokens([" ".join(train[:40])] * 2, "max_length")
    lsquant.export_onnx(model, out / "embedder.onnx", example, profile=profile)
    print(verdict := lsquant.verify(model, out / "embedder.onnx", [example]))

    # ---- the float file, and both in ONNX Runtime ----
    free = {name: {0: torch.export.Dim("batch")} for name in example}
    options: dict[str, Any] = {"dynamo": True, "external_data": False, "verbose": False, "dynamic_shapes": free}
    torch.onnx.export(teacher, (), out / "float.onnx", kwargs=example, **options)
    files = [out / "float.onnx", out / "embedder.onnx"]
    plain = onnxruntime.SessionOptions()
    plain.intra_op_num_threads = 1
    session = lsquant.onnx_session(files[1], intra_op_num_threads=1)
    sessions = [onnxruntime.InferenceSession(str(files[0]), plain), session]
    times = milliseconds(sessions, {name: x[:1].numpy() for name, x in example.items()})

    def shipped(batch: Batch) -> Tensor:
        return torch.tensor(session.run(None, {name: x.numpy() for name, x in batch.items()})[0])

    found["learned"] = measured(shipped, "max_length")

    sizes = [file.stat().st_size for file in files]
    result = {"recipe": given.recipe, "profile": profile, "level": verdict.level, "bytes": sizes, "milliseconds": times}
    print("\ntext                          embeddings  cosine  same nearest neighbour")
    for path in texts:
        for how in ("rounded", "learned"):
            cosine, nearest = result[f"{Path(path).name}, {how}"] = compared(found[how][path], found["float"][path])
            print(f"{Path(path).name:30}{how:12}{cosine:.4f}  {nearest:.1%}")
    print(f"{given.recipe}, profile {profile}, level {verdict.level}: {sizes[1]:,} bytes, {sizes[1] / sizes[0]:.3f} of")
    print(f"float; {times[1]:.1f} ms, {times[1] / times[0]:.2f} of float, for 1 x {LENGTH} tokens in 1 thread")
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
