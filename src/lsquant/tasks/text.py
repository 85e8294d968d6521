"""Task `text`: a causal language model of transformers, trained on text files.

The model is a folder as transformers saves one: config.json, the tokenizer's files, and model.safetensors.  With
weights it is the float network of the run, and the low-bit network learns its answers (distillation); without, the
float network is trained from scratch first.  A sample is a window of neighbouring tokens; at every position the next
one is predicted.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lsquant._util.batches import evaluating
from lsquant._util.entry import shown
from lsquant._util.errors import LsquantError, MissingFile, UsageError
from lsquant._util.optional import require
from lsquant.recipe import Recipe, Rule, glob_of
from lsquant.runs.defaults import FLOAT, low_bit_optimizer
from lsquant.runs.settings import Settings
from lsquant.runs.task import Split
from lsquant.spec import QuantSpec
from lsquant.training import param_groups
from lsquant.training.loop import Loss, logits_of
from lsquant.training.seeds import generator

END_OF_TEXT = "<|endoftext|>"
"""Separates documents in a file; the tokenizer's own first or last token stands for it."""
HELD_OUT = 0.05
"""The last part of the text that is not trained on, where no file is given for it."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TERNARY = re.compile(r"ternary(?:g(\d{1,9}))?", re.ASCII)
AT_ONCE = 16
"""Windows of a batch that is not trained on, at most: logits over a vocabulary are large."""
BLOCK = 32
"""Neighbours that share a step in embeddings and head beside weights in groups: a block of GGUF's Q8_0."""


class Text:
    """The task `text`; the module says more.

    model: the folder of the model
    data: text files (UTF-8) to train on
    valid: text files to measure on; None: the last 5 % of `data`
    sequence: tokens of a window
    eval_tokens: measure on so many tokens at most, from the beginning
    activation_checkpointing: compute activations again in the backward pass instead of keeping them
    float_embeddings: whether presets leave embeddings and head in floating point, as vLLM wants them
    text_sha256: of the text that a run was started with; another text is an error

    Raises: UsageError for an option that is missing or out of range; MissingFile.
    """

    name = "text"

    def __init__(
        self,
        model: str | None = None,
        data: str | list[str] | None = None,
        valid: str | list[str] | None = None,
        sequence: int = 256,
        eval_tokens: int = 100_000,
        activation_checkpointing: bool = False,
        float_embeddings: bool = False,
        text_sha256: str | None = None,
    ) -> None:
        if model is None or not isinstance(model, (str, os.PathLike)):
            raise UsageError("task 'text' needs --model FOLDER, a model as transformers saves it (docs/text.md)")
        for name, value, least in (("sequence", sequence, 2), ("eval_tokens", eval_tokens, 2)):
            if type(value) is not int or not least <= value < 2**40:
                raise UsageError(f"task 'text': {name}={shown(value)}; a whole number from {least}")
        flags = (("activation_checkpointing", activation_checkpointing), ("float_embeddings", float_embeddings))
        for name, flag in flags:
            if type(flag) is not bool:
                raise UsageError(f"task 'text': {name}={shown(flag)}; True or False")
        folder = Path(model)
        if not (folder / "config.json").is_file():
            raise MissingFile(f"task 'text': {folder} has no config.json; --model is a folder of transformers")
        self.options: dict[str, Any] = {
            "model": str(model),
            "data": _names(data, "data"),
            "sequence": sequence,
            "eval_tokens": eval_tokens,
            "activation_checkpointing": activation_checkpointing,
            "float_embeddings": float_embeddings,
        }
        if valid is not None:
            self.options["valid"] = _names(valid, "valid")
        found = _sha256([*self.options["data"], *self.options.get("valid", ())])
        if text_sha256 is not None and found not in (None, text_sha256):
            raise UsageError(
                "task 'text': the text is another one than the run was started with; give the same files by --data"
            )
        if found or text_sha256:
            self.options["text_sha256"] = text_sha256 or found
        self.has_weights = any((folder / name).is_file() for name in WEIGHTS)
        others = [file for end in ("*.bin", "*.pt", "*.pth", "*.safetensors", "*.gguf") for file in folder.glob(end)]
        if not self.has_weights and others:
            raise UsageError(
                f"task 'text': {folder} has {others[0].name}, and weights are read from {WEIGHTS[0]} only; save the "
                "model by model.save_pretrained(folder), or remove that file to train from scratch"
            )
        self.settings = Settings(
            batch_size=16, float_epochs=0 if self.has_weights else 5, float_lr=1e-3, float_weight_decay=0.1, epochs=2,
            optimizer="adam", lr=3e-4, weight_decay=0.0, distill=True, clip_norm=1.0, calibration_batches=4,
        )  # fmt: skip

    # ---- model ----

    def model(self) -> nn.Module:
        model = self._built(self.has_weights)
        model.config.use_cache = False
        if self.options["activation_checkpointing"]:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
        return model

    def example_input(self) -> Tensor:
        return torch.zeros(1, min(8, self.options["sequence"]), dtype=torch.int64)

    def preset(self, name: str) -> Recipe:
        """Return the recipe of a name for this model: what llama.cpp, vLLM and the like store.

        name: as `Recipe.preset` takes it, and "ternary" or "ternaryg<size>".  Weights have a step per group or, without
        one in the name, per row; embeddings and head have 8 bits; steps are rounded to float16; a layer whose inputs no
        group divides has a step per row.
        """
        match = TERNARY.fullmatch(name.lower())
        if match is not None:
            size = None if match[1] is None else int(match[1])
            weight, activation = QuantSpec(2, narrow=True, step_dtype="float16"), None
        else:
            plain = Recipe.preset(name, first_last=None)
            assert isinstance(plain.weight, QuantSpec)
            size, activation = plain.weight.group_size, plain.activation
            weight = QuantSpec(plain.weight.bits, signed=True, step_dtype="float16")
        rows = replace(weight, granularity="channel")
        weight = rows if size is None else replace(weight, granularity="group", group_size=size)
        rules, fits = [], False
        with torch.device("meta"):
            model = self._built(False)
        ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
        for layer_name, layer in model.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Embedding)):
                continue
            inputs = layer.weight.shape[1]
            if id(layer) in ends or isinstance(layer, nn.Embedding):
                if self.options["float_embeddings"]:
                    rules.append(Rule(glob_of(layer_name), None, None))
                    continue
                wide = replace(rows, bits=8, narrow=False)
                if size is not None and inputs % BLOCK == 0:
                    wide = replace(wide, granularity="group", group_size=BLOCK)
                rules.append(Rule(glob_of(layer_name), wide, activation))
            elif size is not None and inputs % size:
                rules.append(Rule(glob_of(layer_name), rows))
            else:
                fits = True
        if not fits:
            raise UsageError(f"--recipe {name}: groups of {size} divide the inputs of no layer of this model")
        return Recipe(weight, activation, rules)

    def _built(self, with_weights: bool) -> Any:
        """Build the model.  Code in its folder is never run.  Raises: UsageError for a folder of no such model."""
        transformers = require("transformers", extra="integrations")
        folder, kind = self.options["model"], transformers.AutoModelForCausalLM
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if not with_weights:
                return kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
            with _no_bars(transformers.utils.logging):
                return kind.from_pretrained(
                    folder, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True,
                    trust_remote_code=False,
                )  # fmt: skip
        except Exception as error:
            if isinstance(error, (LsquantError, torch.OutOfMemoryError)):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
            raise UsageError(f"task 'text': {folder} holds no causal language model ({reason})") from error

    # ---- training ----

    def make_optimizer(self, model: nn.Module, settings: Settings, phase: str) -> torch.optim.Optimizer:
        if phase != FLOAT:
            return low_bit_optimizer(model, settings, phase)
        groups = param_groups(model, settings.float_lr, settings.float_weight_decay)
        return torch.optim.AdamW(groups, betas=(0.9, 0.95))

    def make_loss(self, settings: Settings) -> Loss:
        if not 0.0 <= settings.distill_weight <= 1.0:
            raise UsageError(f"task 'text': distill_weight={settings.distill_weight}; a share from 0 to 1")
        return partial(next_token_loss, share=settings.distill_weight, temperature=settings.distill_temperature)

    # ---- data ----

    @cached_property
    def tokens(self) -> dict[str, Tensor]:
        """Load "train" and "test": the tokens of all files, (n,) int64."""
        tokenizer = _tokenizer(self.options["model"])
        train = _encoded(tokenizer, self.options["data"])
        if "valid" in self.options:
            found = {"train": train, "test": _encoded(tokenizer, self.options["valid"])}
        else:
            cut = int(len(train) * (1.0 - HELD_OUT))
            found = {"train": train[:cut], "test": train[cut:]}
        if len(found["test"]) < 2:
            raise UsageError("task 'text': fewer than two tokens are left to measure on; give text by --valid FILE")
        largest, known = max(int(t.max()) for t in found.values() if len(t)), self._vocabulary()
        if largest >= known:
            raise UsageError(
                f"task 'text': the tokenizer gives the token {largest}, the model knows {known}; is it another model's?"
            )
        return found

    def _vocabulary(self) -> int:
        with torch.device("meta"):
            return self._built(False).get_input_embeddings().weight.shape[0]

    def batches(
        self, split: Split, *, batch_size: int, seed: int = 0, epoch: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.options["sequence"]
        if split == "test":
            tokens = self.tokens["test"][: self.options["eval_tokens"] + 1]
            starts = torch.arange(0, max(0, len(tokens) - size), size)
            for part in starts.split(min(batch_size, AT_ONCE)) if len(starts) else ():
                yield _windows(tokens, part, size)
            start = size * len(starts)
            if rest := max(0, len(tokens) - 1 - start):  # the last window is shorter
                yield _windows(tokens, torch.tensor([start]), rest)
            return
        tokens, draw = self.tokens["train"], generator(seed, self.name, split, epoch)
        if split == "train":
            offset, count = int(torch.randint(0, size, (), generator=draw)), self._count(batch_size) * batch_size
        else:
            offset, count, batch_size = 0, None, min(batch_size, AT_ONCE)
        room = (len(tokens) - 1 - offset) // size
        for part in (offset + size * torch.randperm(room, generator=draw)[:count]).split(batch_size):
            yield _windows(tokens, part, size)

    def _count(self, batch_size: int) -> int:
        """Return the batches of an epoch, whatever the offset of the windows."""
        windows = (len(self.tokens["train"]) - self.options["sequence"]) // self.options["sequence"]
        if windows < batch_size:
            raise UsageError(
                f"task 'text': {len(self.tokens['train'])} tokens are {max(0, windows)} windows of "
                f"{self.options['sequence']}, fewer than batch_size={batch_size}; give more text, or shorter windows"
            )
        return windows // batch_size

    def steps_per_epoch(self, batch_size: int) -> int:
        return self._count(batch_size)

    def metric(self, model: nn.Module) -> dict[str, float]:
        """Return perplexity, and loss: its logarithm, nats a token."""
        total, count = 0.0, 0
        with evaluating(model):
            for x, y in self.batches("test", batch_size=AT_ONCE):
                logits = logits_of(model(x))
                total += float(F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum"))
                count += y.numel()
        loss = total / max(count, 1)
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}


def next_token_loss(
    output: Any, batch: Any, teacher_output: Any = None, *, share: float = 1.0, temperature: float = 1.0
) -> Tensor:
    """Compute ``(1 - share) CE + share T^2 KL(teacher || model)``, the mean over all tokens; CE without a teacher.

    output, teacher_output: (batch, tokens, vocabulary) logits, or what transformers returns.
    batch: (tokens, next tokens), each (batch, tokens) int64.
    """
    logits = logits_of(output).flatten(0, 1).float()
    if teacher_output is None or not share:
        return F.cross_entropy(logits, batch[1].flatten())
    wanted = F.log_softmax(logits_of(teacher_output).detach().flatten(0, 1).float() / temperature, -1)
    soft = F.kl_div(F.log_softmax(logits / temperature, -1), wanted, reduction="batchmean", log_target=True)
    loss = share * temperature**2 * soft
    return loss if share == 1.0 else loss + (1.0 - share) * F.cross_entropy(logits, batch[1].flatten())


def _windows(tokens: Tensor, starts: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return (tokens, next tokens) of windows, each (windows, size) int64."""
    at = starts[:, None] + torch.arange(size)
    return tokens[at], tokens[at + 1]


def _names(given: Any, option: str) -> list[str]:
    names = [given] if isinstance(given, (str, os.PathLike)) else given
    if not isinstance(names, (list, tuple)) or not names:
        raise UsageError(f"task 'text': {option}={shown(given)}; give text files (--{option} FILE...)")
    for name in names:
        if not isinstance(name, (str, os.PathLike)):
            raise UsageError(f"task 'text': {option} holds {shown(name)}, no name of a file")
    return [str(name) for name in names]


@contextmanager
def _no_bars(logging: Any) -> Iterator[None]:
    """Show no progress of transformers' own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sha256(files: list[str]) -> str | None:
    """Return the SHA-256 of files one after the other; None where one cannot be read."""
    digest = hashlib.sha256()
    try:
        for file in files:
            with open(file, "rb") as data:
                while part := data.read(1 << 20):
                    digest.update(part)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


def _tokenizer(folder: str) -> Any:
    transformers = require("transformers", extra="integrations")
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UsageError(f"task 'text': {folder} has no tokenizer that transformers reads ({reason})") from error


def _encoded(tokenizer: Any, files: list[str]) -> Tensor:
    """Return the tokens of files, (n,) int64; each document begins or ends with a special one."""
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    found: list[int] = []
    for file in files:
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
        except FileNotFoundError as error:
            raise MissingFile(f"task 'text': the text file {file} does not exist") from error
        except (OSError, ValueError) as error:
            if isinstance(error, UnicodeDecodeError):
                place = f"{error.reason} at byte {error.start}"
                raise UsageError(f"task 'text': {file} is not text in UTF-8 ({place})") from error
            raise UsageError(f"task 'text': {shown(str(file))} cannot be read as a text file ({error})") from error
        documents = [part.strip() for part in text.split(END_OF_TEXT) if part.strip()]
        if not documents:
            raise UsageError(f"task 'text': there is no text in {file}")
        encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
        for tokens in encoded:
            found += [first, *tokens] if first is not None else [*tokens, *([] if last is None else [last])]
    return torch.tensor(found, dtype=torch.int64)
