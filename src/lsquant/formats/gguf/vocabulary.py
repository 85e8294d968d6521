"""The vocabulary of a GGUF file, from tokenizers of transformers, sentencepiece and llama2.c."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lsquant._util.entry import Entry, parse_json, read_text, reason, shown
from lsquant._util.errors import DamagedFile, UsageError
from lsquant._util.files import require_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, in GGUF as in sentencepiece."""
LARGEST, LARGEST_BINARY = 1 << 28, 1 << 25
"""Bytes of a tokenizer's file of JSON, and of another kind, at most."""
MOST = 1 << 22
"""Tokens, at most."""
SPACE = "\u2581"
"""What sentencepiece writes for a space."""
_START = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_END = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_START + r"\p{N}{1,3}" + _END: "llama-bpe", _START + r"\p{N}" + _END: "qwen2"}
"""How a byte-level tokenizer splits text before it merges -> llama.cpp's name of it."""
INNER = ("normalizers", "pretokenizers", "processors")
PREFIXES = ("Prepend", "Metaspace")
"""Steps of a tokenizer that put a space before a text."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens of a language model as llama.cpp takes them.

    model: "gpt2", byte-level BPE with merges, or "llama", BPE of sentencepiece with scores.
    tokens: texts; of "llama" with U+2581 for a space and ``<0x0A>`` for a byte.
    scores: of "llama": the pair whose merged token has the highest score is merged first.
    types: 1 normal, 2 unknown, 3 control, 4 defined by the user, 5 unused, 6 a byte.
    merges: of "gpt2": pairs with a space between, the first is merged first.
    bos, eos, unk: numbers of the special tokens, None where there is none.
    pre: of "gpt2", llama.cpp's name of how text is split: "gpt-2", "llama-bpe" or "qwen2".
    add_bos: whether a text begins with ``bos``.
    space_prefix: of "llama", whether a space is put before a text.
    Raises: UsageError for lists of different lengths, and numbers of no token.
    """

    model: str
    tokens: Sequence[str]
    scores: Sequence[float] = ()
    types: Sequence[int] = ()
    merges: Sequence[str] = ()
    bos: int | None = None
    eos: int | None = None
    unk: int | None = None
    pre: str | None = None
    add_bos: bool = False
    space_prefix: bool | None = None

    def __post_init__(self) -> None:
        if self.model not in ("gpt2", "llama"):
            raise UsageError(f"Vocabulary: model={shown(self.model)}; use 'gpt2' or 'llama'")
        for name, needed in (("scores", self.model == "llama"), ("types", True)):
            if (needed or getattr(self, name)) and len(getattr(self, name)) != len(self.tokens):
                raise UsageError(f"Vocabulary: {len(getattr(self, name))} {name} of {len(self.tokens)} tokens")
        if self.model == "gpt2" and not (self.merges and self.pre):
            raise UsageError("Vocabulary: model 'gpt2' needs merges, and pre, the way text is split")
        for name in ("bos", "eos", "unk"):
            number = getattr(self, name)
            if number is not None and not (type(number) is int and 0 <= number < len(self.tokens)):
                raise UsageError(f"Vocabulary: {name}={shown(number)} is no number of one of {len(self.tokens)} tokens")

    @classmethod
    def of(cls, tokenizer: Any, model: nn.Module | None = None) -> Vocabulary:
        """Return the vocabulary of a tokenizer.

        tokenizer: a Vocabulary; a folder with tokenizer.json or tokenizer.model; one of these files, or a ``.bin`` of
            llama2.c; a tokenizer of transformers.
        model: whose config names bos and eos where the tokenizer does not.
        Raises: UsageError for a kind of tokenizer that llama.cpp would follow otherwise; MissingFile; DamagedFile.
        """
        if isinstance(tokenizer, Vocabulary):
            return tokenizer
        if isinstance(tokenizer, (str, os.PathLike)):
            found = cls._of_path(Path(tokenizer))
        elif (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            special = {key: getattr(tokenizer, f"{key}_token", None) for key in ("bos", "eos", "unk")}
            found = of_json(parse_json(backend.to_str(), "the tokenizer", largest=LARGEST), special)
        elif (file := getattr(tokenizer, "vocab_file", None)) is not None:
            found = cls._of_path(Path(file))
        else:
            raise UsageError(
                f"export_gguf: tokenizer is {shown(tokenizer)}; give a folder, a tokenizer of transformers, or a "
                "Vocabulary"
            )
        config = getattr(model, "config", None)
        for key in ("bos", "eos"):
            number = getattr(config, f"{key}_token_id", None)
            number = number[0] if isinstance(number, list) and number else number
            if getattr(found, key) is None and type(number) is int and 0 <= number < len(found.tokens):
                found = replace(found, **{key: number})
        return found

    @classmethod
    def _of_path(cls, path: Path) -> Vocabulary:
        if path.is_dir():
            settings = path / "tokenizer_config.json"
            special = _special(settings) if settings.is_file() else {}
            for name in ("tokenizer.json", "tokenizer.model"):
                if (path / name).is_file():
                    return cls._of_file(path / name, special)
            raise UsageError(f"{path} has no tokenizer.json and no tokenizer.model")
        return cls._of_file(require_file(path), {})

    @classmethod
    def _of_file(cls, path: Path, special: dict[str, Any]) -> Vocabulary:
        if path.suffix == ".json":
            return of_json(parse_json(read_text(path, LARGEST), str(path), largest=LARGEST), special)
        if (size := path.stat().st_size) > LARGEST_BINARY:
            raise DamagedFile(f"{path} has {size:,} bytes, more than the {LARGEST_BINARY:,} that are read")
        return of_llama2c(path) if path.suffix == ".bin" else of_sentencepiece(path)

    def fields(self, size: int) -> dict[str, Any]:
        """Return what a file says of the vocabulary, filled up with unused tokens.

        size: rows of the embedding.
        Raises: UsageError for more tokens than rows.
        """
        missing = size - len(self.tokens)
        if missing < 0:
            raise UsageError(f"export_gguf: the tokenizer has {len(self.tokens)} tokens, the model's embedding {size}")
        unused = [f"[PAD{number}]" for number in range(len(self.tokens), size)]
        scores = [*map(float, self.scores), *[-1e4] * missing] if self.scores else []
        special = {"bos_token_id": self.bos, "eos_token_id": self.eos, "unknown_token_id": self.unk}
        found = {
            "model": self.model,
            "pre": self.pre or "default",
            "tokens": [*self.tokens, *unused],
            "scores": scores,
            "token_type": [*map(int, self.types), *[UNUSED] * missing],
            "merges": list(self.merges),
            **special,
            "add_bos_token": self.add_bos,
            "add_space_prefix": self.space_prefix,
        }
        return {f"tokenizer.ggml.{key}": value for key, value in found.items() if value is not None}


# ---- tokenizer.json of transformers ----


def of_json(document: Entry, special: dict[str, Any]) -> Vocabulary:
    """Return the vocabulary of a tokenizer.json with BPE: byte-level, or with byte fallback.

    special: "bos", "eos", "unk" -> text of the token, or a table with it.
    Raises: UsageError for another kind; DamagedFile.
    """
    parts = document.parts("model")
    model = parts["model"].table()
    kind = model["type"].value if "type" in model else None
    if kind != "BPE":
        raise UsageError(
            f"{document.file}: a tokenizer of the type {shown(kind)}; only BPE is written, for llama.cpp would split "
            "text otherwise"
        )
    vocabulary = parts["model"].parts("vocab")["vocab"].table(MOST)
    numbers = {text: entry.integer(0, (1 << 31) - 1) for text, entry in vocabulary.items()}
    types = dict.fromkeys(numbers, NORMAL)
    for entry in parts["added_tokens"].items() if "added_tokens" in parts else ():
        added = entry.parts("id", "content")
        text = added["content"].text()
        numbers[text] = added["id"].integer(0, (1 << 31) - 1)
        types[text] = CONTROL if "special" in added and added["special"].value is True else USER_DEFINED
    texts = {number: text for text, number in numbers.items()}
    document.require(len(texts) == len(numbers), "two tokens have one number")
    dense = bool(texts) and max(texts) < 2 * len(texts) + (1 << 16)
    document.require(dense, "its tokens have numbers with large gaps, or there are none")
    merges = [_merge(entry) for entry in model["merges"].items(MOST)] if "merges" in model else []
    fallback = "byte_fallback" in model and model["byte_fallback"].value is True
    unk = model["unk_token"].value if "unk_token" in model else None
    named = {"unk": unk, **{key: value for key, value in special.items() if value is not None}}
    found: dict[str, Any] = {key: _number(value, numbers) for key, value in named.items()}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(max(texts) + 1)]
    kinds = [types[texts[number]] if number in texts else UNUSED for number in range(len(tokens))]
    opens = _opens_with_special(parts)
    if not fallback:
        pairs, pre = [f"{a} {b}" for a, b in merges], _split(document, parts)
        return Vocabulary("gpt2", tokens, (), kinds, pairs, **found, pre=pre, add_bos=opens)
    if (unknown := found.get("unk")) is not None:
        kinds[unknown] = UNKNOWN
    kinds = [BYTE if kind == NORMAL and _is_byte(text) else kind for kind, text in zip(kinds, tokens, strict=True)]
    ranks: dict[str, int] = {}
    for rank, (a, b) in enumerate(merges):
        ranks.setdefault(a + b, rank)
    scores = [
        -float(ranks.get(text, len(merges))) if kind == NORMAL else 0.0
        for kind, text in zip(kinds, tokens, strict=True)
    ]
    prefix = any(step.get("type") in PREFIXES and step.get("prepend_scheme") != "never" for step in _steps(parts))
    return Vocabulary("llama", tokens, scores, kinds, (), **found, add_bos=opens, space_prefix=prefix)


def _special(path: Path) -> dict[str, Any]:
    """Return "bos", "eos" and "unk" of a tokenizer_config.json, which may have numbers beyond 64 bits.

    Raises: DamagedFile.
    """
    try:
        table = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, DamagedFile):
            raise
        raise DamagedFile(f"{path} is damaged: not valid JSON: {reason(error)}") from error
    return {key: table.get(f"{key}_token") for key in ("bos", "eos", "unk")} if isinstance(table, dict) else {}


def _merge(entry: Entry) -> tuple[str, str]:
    """Return a pair: "a b", or a list of two."""
    pair = entry.value.split(" ") if isinstance(entry.value, str) else [part.text() for part in entry.items(2)]
    entry.require(len(pair) == 2, "no pair of tokens")
    return pair[0], pair[1]


def _number(value: Any, numbers: dict[str, int]) -> int | None:
    """Return the number of a token that is named by its text, or by a table with it."""
    text = value.get("content") if isinstance(value, dict) else value
    return numbers.get(text) if isinstance(text, str) else None


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")


def _steps(parts: dict[str, Entry], *stages: str) -> list[dict[str, Any]]:
    """Return the parts of stages of a tokenizer, by default of those before the model, in their order."""
    found: list[dict[str, Any]] = []
    for stage in stages or ("normalizer", "pre_tokenizer"):
        value: Any = parts[stage].value if stage in parts else None
        if isinstance(value, dict):
            lists = [value[key] for key in INNER if isinstance(value.get(key), list)]
            found += [part for inner in lists or [[value]] for part in inner if isinstance(part, dict)]
    return found


def _split(document: Entry, parts: dict[str, Entry]) -> str:
    """Return llama.cpp's name of how text is split.  Raises: UsageError where it has none."""
    steps = _steps(parts, "pre_tokenizer")
    for step in steps:
        pattern = step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        if step.get("type") == "Split" and isinstance(regex, str) and regex in SPLITS:
            return SPLITS[regex]
    if [step.get("type") for step in steps] == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    raise UsageError(
        f"{document.file}: it splits text in a way that is neither GPT-2's, Llama 3's nor Qwen 2's; give a "
        "Vocabulary(..., pre=NAME) with llama.cpp's name of it"
    )


def _opens_with_special(parts: dict[str, Entry]) -> bool:
    """Tell whether a text begins with a special token."""
    for step in _steps(parts, "post_processor"):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            return isinstance(single[0], dict) and "SpecialToken" in single[0]
    return False


# ---- tokenizer.model of sentencepiece ----


def of_sentencepiece(path: Path) -> Vocabulary:
    """Return the vocabulary of a model of sentencepiece with BPE: messages of protobuf, fields by their numbers.

    Raises: DamagedFile; UsageError for a model that is no BPE.
    """
    data, pieces, trainer, prefix = path.read_bytes(), [], {}, True
    for number, value in _fields(data, path):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value, path))
            text, score = piece.get(1, b""), piece.get(2, bytes(4))
            if not isinstance(text, bytes) or not isinstance(score, bytes) or len(score) != 4:
                raise DamagedFile(f"{path} is damaged: a piece without text and score")
            pieces.append((_decoded(text, path), struct.unpack("<f", score)[0], piece.get(3, NORMAL)))
        elif number == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value, path))
        elif number == 3 and isinstance(value, bytes):
            prefix = bool(dict(_fields(value, path)).get(3, 1))
    if not pieces or any(kind not in range(NORMAL, BYTE + 1) for _, _, kind in pieces):
        raise DamagedFile(f"{path} is damaged, or no model of sentencepiece")
    if trainer.get(3, 1) != 2:
        raise UsageError(f"{path} is no BPE: llama.cpp would split text otherwise")
    tokens, scores, types = zip(*pieces, strict=True)
    special = {"unk": trainer.get(40, 0), "bos": trainer.get(41, 1), "eos": trainer.get(42, 2)}
    known: dict[str, Any] = {
        key: n for key, n in special.items() if isinstance(n, int) and n < len(tokens)
    }  # -1 is 2^64 - 1
    return Vocabulary("llama", tokens, scores, types, (), **known, add_bos=True, space_prefix=prefix)


def _fields(data: bytes, path: Path) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a message: number, and an integer or the bytes."""
    at = 0

    def integer() -> int:
        nonlocal at
        value = 0
        for shift in range(0, 70, 7):
            if at >= len(data):
                break
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise DamagedFile(f"{path} is damaged, or no model of sentencepiece")

    while at < len(data):
        number, kind = divmod(integer(), 8)
        if kind == 0:
            yield number, integer()
            continue
        size = {1: 8, 5: 4}.get(kind)
        size = integer() if kind == 2 else size
        if size is None or at + size > len(data):
            raise DamagedFile(f"{path} is damaged, or no model of sentencepiece")
        yield number, data[at : at + size]
        at += size


def _decoded(text: bytes, path: Path) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is damaged: a token is no UTF-8") from error


# ---- llama2.c ----


def of_llama2c(path: Path) -> Vocabulary:
    """Return the vocabulary of a tokenizer file of llama2.c.

    The file: the longest length as int32; for each token its score as float32, its length as int32, and its bytes.
    Tokens 0, 1 and 2 are unknown, begin and end, 3 to 258 the bytes.
    Raises: DamagedFile.
    """
    data, at = path.read_bytes(), 4
    tokens: list[str] = []
    scores: list[float] = []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at) if at + 8 <= len(data) else (0.0, -1)
        at += 8
        if length < 0 or at + length > len(data) or not math.isfinite(score):
            raise DamagedFile(f"{path} is damaged, or no tokenizer of llama2.c")
        tokens.append(_decoded(data[at : at + length], path).replace(" ", SPACE))
        scores.append(score)
        at += length
    if len(tokens) < 259:
        raise DamagedFile(f"{path} has {len(tokens)} tokens; a tokenizer of llama2.c has 259 and more")
    tokens[:3] = ["<unk>", "<s>", "</s>"]
    tokens[3:259] = [f"<0x{byte:02X}>" for byte in range(256)]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)]
    return Vocabulary("llama", tokens, scores, types, bos=1, eos=2, unk=0, add_bos=True, space_prefix=True)
