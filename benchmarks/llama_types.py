"""Learned GGUF files beside llama.cpp's own types of the same float model, all of them run by llama.cpp.

    python benchmarks/llama_types.py --model FOLDER --data TEXT.txt --valid OTHER.txt --runs runs/text
    python benchmarks/llama_types.py                       # the table of docs/gguf.md alone, from results/llama

--model, --data, --valid, --runs: as given to benchmarks/language_models.py, whose runs are exported.  Embeddings and
head are Q8_0 in every file but the float one, so that types are compared, not mixes.  What is measured is what
llama.cpp's own tools report: perplexity, the share of equal top tokens and the mean KL divergence against the float
model, teacher-forced on windows of the held-out text.  --speed also times the writing of 64 tokens, in turns; nothing
else should run then.  Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_models import parser_of
from tables import ROOT, replaced, table

import lsquant
from lsquant._util.files import atomic_write_text, read_json, write_json
from lsquant.diagnostics.environment import environment
from lsquant.formats.gguf.writer import write_record
from lsquant.shipped import ship
from lsquant.tasks import get_task, is_run, open_run

RESULTS = ROOT / "results" / "llama"
STOCK = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15, "Q3_K_M": 12, "Q2_K": 10, "Q2_0": 41, "TQ2_0": 37}
"""llama.cpp's own types -> its number of a file type."""
LEARNED = {"w8g32": "q8_0", "w4g32": "q4_0", "w3g32": "q4_0", "w2g32": "q4_0", "w2g64": "q2_0", "ternaryg256": "tq2_0"}
"""Recipe -> the type that holds its codes."""
Q8_0 = 8
WRITTEN, ROUNDS = 64, 7


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=20_000, help="of the held-out text (default 20,000)")
    parser.add_argument("--speed", action="store_true", help="also tokens a second, on one thread")
    parser.add_argument("--story", metavar="TEXT", help="print how each learned file goes on with it")
    a = parser.parse_args()
    if a.model:
        measure(a)
    place = ROOT / "docs" / "gguf.md"
    atomic_write_text(place, replaced(place.read_text(encoding="utf-8"), {"llama": page()}.__getitem__))


def page() -> str:
    """Return the table of what is in results/llama."""
    head = [
        "model",
        "file",
        "bytes",
        "loss, nats a token",
        "perplexity",
        "equal top tokens",
        "mean KL",
        "tokens a second",
    ]
    lines = []
    for result in map(read_json, sorted(RESULTS.glob("*.json"))):
        for name, row in result["files"].items():
            first = [result["model"], f"**{name}**" if row["learned"] else name, f"{row['bytes']:,}"]
            speed = f"{row['tokens_a_second']:,.0f}" if row.get("tokens_a_second") else ""
            cells = [
                f"{row['loss']:.4f}",
                f"{row['perplexity']:.3f}",
                f"{100 * row['equal_top']:.1f} %",
                f"{row['kl']:.4f}",
            ]
            lines.append([*first, *cells, speed])
    return "\n".join(table(head, lines))


def files(a: argparse.Namespace, task: Any, folder: Path) -> dict[str, tuple[Path, bool]]:
    """Return name -> (file, whether its steps were learned)."""
    model = task.model().eval()
    found = {"F32": (write_record(ship(model), folder / "f32.gguf", "q8_0", a.model, "f32"), False)}
    for name, number in STOCK.items():
        path = folder / f"{name}.gguf"
        if quantized(found["F32"][0], path, number):
            found[f"llama.cpp {name}"] = (path, False)
    for recipe, kind in LEARNED.items():
        run = a.runs / f"{Path(a.model).name}-{recipe}"
        if is_run(run) and (run / "model.safetensors").is_file():
            path = folder / f"learned-{recipe}.gguf"
            lsquant.export_gguf(open_run(run).model(), path, type=kind, tokenizer=a.model)
            found[f"learned {recipe}, {kind.upper()}"] = (path, True)
    return found


def quantized(source: Path, target: Path, number: int) -> bool:
    """Let llama.cpp quantize a file; False where it refuses the type for these sizes."""
    library = __import__("llama_cpp")
    params = library.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, 1
    params.token_embedding_type = params.output_tensor_type = Q8_0
    failed = library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    return failed == 0


class Loaded:
    """A file in llama.cpp, on one thread."""

    def __init__(self, path: Path, context: int) -> None:
        options = {"n_ctx": context, "n_batch": context, "logits_all": True, "n_threads": 1, "n_threads_batch": 1}
        self.run = __import__("llama_cpp").Llama(str(path), verbose=False, **options)

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Return the logits behind each of some tokens, (n, vocabulary)."""
        self.run.reset()
        self.run.eval(tokens)
        return np.array(self.run.scores[: len(tokens)], dtype=np.float64)

    def written(self) -> float:
        """Return seconds for WRITTEN tokens, one after the other."""
        self.run.reset()
        self.run.eval([1])
        start = time.perf_counter()
        for _ in range(WRITTEN):
            self.run.eval([int(self.run.scores[self.run.n_tokens - 1].argmax())])
        return time.perf_counter() - start


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def measure(a: argparse.Namespace) -> None:
    """Measure all files of one model."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    library = __import__("llama_cpp")
    quiet = library.llama_log_callback(lambda *_: None)
    library.llama_log_set(quiet, None)
    task = get_task("text", model=a.model, data=a.data, valid=a.valid, eval_tokens=a.tokens)
    windows = [(x[0].tolist(), y[0].numpy()) for x, y in task.batches("test", batch_size=1)]
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        found = files(a, task, Path(folder))
        loaded = {name: Loaded(path, task.options["sequence"]) for name, (path, _) in found.items()}
        sums = {name: np.zeros(3) for name in found}
        count = 0
        for tokens, targets in windows:
            count += len(tokens)
            plain = log_softmax(loaded["F32"].logits(tokens))
            for name, one in loaded.items():
                own = log_softmax(one.logits(tokens))
                loss = -own[np.arange(len(tokens)), targets].sum()
                sums[name] += (loss, (own.argmax(1) == plain.argmax(1)).sum(), (np.exp(plain) * (plain - own)).sum())
        speeds: dict[str, list[float]] = {name: [] for name in found}
        for _ in range(ROUNDS if a.speed else 0):
            for name, one in loaded.items():
                speeds[name].append(one.written())
        for name, (path, learned) in found.items():
            loss, equal, divergence = (float(v) / count for v in sums[name])
            speed = WRITTEN / float(np.median(speeds[name])) if a.speed else None
            rows[name] = {
                "learned": learned, "bytes": path.stat().st_size, "loss": loss, "perplexity": float(np.exp(loss)),
                "equal_top": equal, "kl": divergence, "tokens_a_second": speed,
            }  # fmt: skip
            print(name, rows[name], flush=True)
            if a.story and learned:
                print(loaded[name].run(a.story, max_tokens=100, temperature=0.0)["choices"][0]["text"])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    RESULTS.mkdir(parents=True, exist_ok=True)
    model = Path(a.model).name
    about = {"model": model, "tokens": count, "commit": commit.strip(), "hardware": environment(), "files": rows}
    about["llama_cpp"] = __import__("llama_cpp").__version__
    write_json(RESULTS / f"{model}.json", about)


if __name__ == "__main__":
    main()
