"""A sentence embedder of transformers at 8 or 4 bits: distilled on any text, shipped as ONNX, compared with float.

    python examples/sentence_embedder.py --model FOLDER --text TRAIN.txt --held-out OTHER.txt --recipe w8a8 --out OUT

FOLDER holds a BERT and its tokenizer as transformers saves them, for example all-MiniLM-L6-v2.  Sentences are embedded
by the mean of the last token states, normalised.  docs/quickstart-transformer.md has the numbers.
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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertModel

import lsquant
from lsquant import QuantSpec, Recipe, Rule


class Choice(NamedTuple):
    """A recipe, the profile of its ONNX file, and how it is trained."""

    recipe: Recipe
    profile: str
    steps: int
    lr: float


LENGTH = 128  # tokens of a sentence in the ONNX files
TABLES = Rule(nn.Embedding, QuantSpec(8, granularity="channel", step_dtype="float16"), None)  # a step per row
ROWS = {bits: QuantSpec(bits, granularity="channel") for bits in (4, 8)}
GROUPS = QuantSpec(4, granularity="group", group_size=32, step_dtype="float16")  # two bytes a step in the file
INPUTS = QuantSpec(8, offset=True)  # what GELU leaves is hardly ever below 0: a learned zero point halves its step
CHOICES = {
    "w8a8": Choice(Recipe(ROWS[8], INPUTS, [TABLES]), "exact", 100, 1e-4),
    "w4a8": Choice(Recipe(ROWS[4], INPUTS, [TABLES]), "small", 200, 1e-4),
    "w4g32": Choice(Recipe(GROUPS, None, [TABLES]), "small", 150, 1e-4),
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
    text = Path(path).read_text(encoding="utf-8", errors="replace").replace("<|endoftext|>", "\n")
    found = (" ".join(part.split()) for part in re.split(r'(?<=[.!?])["\']?\s+|\n\s*\n', text))
    return list(dict.fromkeys(sentence for sentence in found if len(sentence.split()) > 3))


def distill(model: Embedder, teacher: Embedder, batches: Callable[[], Batch], steps: int, lr: float) -> None:
    """Learn token states and embeddings of the teacher.  The tables of embeddings stay as they are rounded."""
    model.bert.embeddings.requires_grad_(False)
    optimizer = torch.optim.Adam(lsquant.param_groups(model, lr=lr, relative_step_lr=10 * lr))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.eval()  # no dropout: the teacher has none
    for step in range(steps):
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


def compared(found: Tensor, wanted: Tensor) -> dict[str, float]:
    """Mean cosine to the float embeddings, and the share of sentences whose nearest other one is the same."""
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (found, wanted)]
    return {
        "cosine": float((found * wanted).sum(1).mean()),
        "nearest": float((nearest[0] == nearest[1]).float().mean()),
    }


def milliseconds(sessions: list[Any], feeds: dict[str, Any], repeats: int) -> list[float]:
    """Medians of interleaved runs."""
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(repeats + 1):  # the first is no measurement
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
    parser.add_argument("--out", required=True, help="folder for the files")
    parser.add_argument("--profile", help="of the ONNX file (default: by recipe)")
    parser.add_argument("--steps", type=int, help="of training (default: by recipe)")
    for name, value in (("batch-size", 16), ("sentences", 300), ("repeats", 15)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{value} unless given")
    given = parser.parse_args(arguments)
    out, name, (recipe, profile, steps, lr) = Path(given.out), given.recipe, CHOICES[given.recipe]
    profile, steps = given.profile or profile, steps if given.steps is None else given.steps
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, draw = AutoTokenizer.from_pretrained(given.model), random.Random(0)
    torch.manual_seed(0)

    def tokens(texts: list[str], padding: Any = True) -> Batch:
        found = tokenizer(texts, truncation=True, max_length=LENGTH, padding=padding, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def passages() -> Batch:
        """Each is one to four sentences that follow each other."""
        starts = [draw.randrange(len(train)) for _ in range(given.batch_size)]
        return tokens([" ".join(train[at : at + draw.randint(1, 4)]) for at in starts])

    @torch.no_grad()
    def embedded(model: nn.Module, texts: list[str]) -> Tensor:
        return torch.cat([model(**tokens(texts[at : at + 16])) for at in range(0, len(texts), 16)])

    train, held_out = sentences(given.text), {path: sentences(path)[: given.sentences] for path in given.held_out}
    if not held_out:
        train, held_out = train[: -given.sentences], {given.text: train[-given.sentences :]}
    teacher, model = Embedder(given.model).eval(), Embedder(given.model).eval()
    wanted = {path: embedded(teacher, texts) for path, texts in held_out.items()}

    # ---- with lsquant ----
    print(lsquant.prepare(model, recipe, example_inputs=passages()))
    if recipe.activation is not None:  # weights alone have their steps
        lsquant.calibrate(model, [passages() for _ in range(2)], weights="mse")
    rounded = {path: compared(embedded(model, texts), wanted[path]) for path, texts in held_out.items()}
    distill(model, teacher, passages, steps, lr)
    lsquant.save(model, out / "embedder.safetensors")
    example = tokens(held_out[next(iter(held_out))][:2], "max_length")
    file = out / "embedder.onnx"
    lsquant.export_onnx(model, file, example, profile=profile)
    verdict = lsquant.verify(model, file, [example])
    print(verdict)

    # ---- the float file, and both in ONNX Runtime ----
    batch = torch.export.Dim("batch")
    torch.onnx.export(teacher, (), out / "float.onnx", kwargs=example, dynamo=True, external_data=False, verbose=False,
                      dynamic_shapes={name: {0: batch} for name in example})  # fmt: skip
    float_session, session = (plain_session(path) for path in (out / "float.onnx", file))
    long = tokens([" ".join(train[:40])], "max_length")  # no padding in it
    times = milliseconds([float_session, session], {k: v.numpy() for k, v in long.items()}, given.repeats)

    def shipped(texts: list[str]) -> Tensor:
        feeds = [tokens(texts[at : at + 16], "max_length") for at in range(0, len(texts), 16)]
        return torch.cat([torch.tensor(session.run(None, {k: v.numpy() for k, v in f.items()})[0]) for f in feeds])

    learned = {path: compared(shipped(texts), wanted[path]) for path, texts in held_out.items()}
    size, full = file.stat().st_size, (out / "float.onnx").stat().st_size
    for path in held_out:
        for how, row in (("rounded", rounded[path]), ("learned", learned[path])):
            print(f"{name} {how}: cosine {row['cosine']:.4f}, same neighbour {row['nearest']:.1%} ({Path(path).name})")
    print(f"{size:,} bytes of {full:,}: {size / full:.3f}")
    print(f"{times[1]:.1f} ms of {times[0]:.1f}: {times[1] / times[0]:.2f} (profile {profile}, 1 x {LENGTH} tokens)")
    print(f"level: {verdict.level}")
    names = {path: Path(path).name for path in held_out}
    result = {"recipe": name, "profile": profile, "steps": steps, "level": verdict.level, "bytes": [size, full],
              "milliseconds": times, "rounded": {names[path]: row for path, row in rounded.items()},
              "learned": {names[path]: row for path, row in learned.items()}}  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def plain_session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


if __name__ == "__main__":
    main()
