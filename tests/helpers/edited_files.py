"""Files of every format, edited at random: keys, types, nesting and bytes; what reads them, and what may come of it."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import resource
import signal
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

from lsquant import LsquantError
from lsquant._util.tensors import CHECKSUM, _checksum
from lsquant._util.toml import to_toml

VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 9, 255, 2**31, 2**40, 2**63, 2**64, 10**30, 0.0, -0.5, 1.5, 1e300, 1e999,
    float("nan"), "", "a",
    "no", "0.weight", "float", "inherit", "re:(a+)+$", "re:0", "first", "class:os.path", "*" * 50,
    "../x", "/etc/passwd", "x" * 5000, "\x00", "\ud800", [], [1], ["a"], [[]], [2**40] * 3, {}, {"a": 1}, {"bits": 4},
    {"tensor": "a"}, {"dict": [[1, 2, 3]]}, {"float": "x"}, {"tuple": 3}, [[[[[]]]]],
)  # fmt: skip
WORDS = ("[", "]", "{", "}", '"', "\\", ",", "=", ":", "\n", "#", "null", "nan", "-1", "1e999", "9" * 30, "9" * 5000,
         "0x" + "f" * 200, "true", "'", "é", "\ud7ff", "\x01", "[" * 3000, "[[rules]]\n", "a.b.c", "a." * 500,
         "1979-05-27", "which = ", '"re:((a*)*)*b"', "bits", '"class:nn"')  # fmt: skip


class Edits:
    """A source of edits that depends on its seed only."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, choices: Any) -> Any:
        return self.random.choice(list(choices))

    def value(self, document: Any) -> Any:
        """A copy with one to three changes: of a value, a key, or where it stands."""
        root = {"it": copy.deepcopy(document)}
        for _ in range(self.one((1, 1, 1, 2, 3))):
            self._change(root)
        return root.get("it")

    def _change(self, where: Any) -> None:
        r, key = self.random, "it"
        if key not in where:
            return
        while isinstance(where[key], (dict, list, tuple)) and len(where[key]) and r.random() < 0.85:
            if isinstance(where[key], tuple):
                where[key] = list(where[key])
            where = where[key]
            key = self.one(where) if isinstance(where, dict) else r.randrange(len(where))
        kind = r.random()
        if kind < 0.15:
            del where[key]
        elif kind < 0.25 and isinstance(where, dict):
            where[self.one(["x", "bits", "layer", "which", "shape", "lr", 5, "", key])] = where.pop(key)
        elif kind < 0.35:
            where[key] = [where[key]]
        elif kind < 0.45:
            where[key] = {"a": where[key]}
        elif kind < 0.6:
            where[key] = copy.deepcopy(where[self.one(where) if isinstance(where, dict) else r.randrange(len(where))])
        elif kind < 0.63:
            for _ in range(r.choice((70, 600, 3000))):
                where[key] = [where[key]]
        else:
            where[key] = copy.deepcopy(r.choice(VALUES))

    def text(self, text: str) -> str:
        """A text cut, extended or exchanged in places."""
        r = self.random
        for _ in range(r.choice((1, 1, 2, 4))):
            at, end = sorted((r.randrange(len(text) + 1), r.randrange(len(text) + 1)))
            end = min(end, at + r.choice((0, 1, 3, 20)))
            kind = r.random()
            if kind < 0.1:
                text = text[:at]
            elif kind < 0.5:
                text = text[:at] + r.choice(WORDS) + text[end:]
            elif kind < 0.7:
                text = text[:at] + text[end:]
            elif kind < 0.85:
                source = r.randrange(len(text) + 1)
                text = text[:at] + text[source : source + 40] + text[end:]
            else:
                lines = text.split("\n")
                r.shuffle(lines)
                text = "\n".join(lines)
        return text

    def data(self, data: bytes) -> bytes:
        """Bytes flipped, cut, exchanged or moved."""
        r, found = self.random, bytearray(data)
        for _ in range(r.choice((1, 1, 2, 8))):
            if not found:
                break
            at, kind = r.randrange(len(found)), r.random()
            if kind < 0.4:
                found[at] ^= 1 << r.randrange(8)
            elif kind < 0.6:
                found[at] = r.choice((0, 1, 0x7F, 0x80, 0xFF))
            elif kind < 0.7:
                del found[at:]
            elif kind < 0.8:
                del found[at : at + r.randrange(1, 20)]
            else:
                source = r.randrange(len(found))
                found[at:at] = found[source : source + r.randrange(1, 60)]
        return bytes(found)

    def json(self, text: str) -> str:
        if self.random.random() < 0.25:
            return self.text(text)
        try:
            return json.dumps(self.value(json.loads(text)))
        except (RecursionError, TypeError, ValueError):
            return "[" * 3000

    def toml(self, text: str) -> str:
        if self.random.random() < 0.4:
            return self.text(text)
        try:
            return to_toml(self.value(tomllib.loads(text)))
        except (RecursionError, TypeError, AttributeError, ValueError):
            return self.text(text)

    def tensors(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of which one has another shape, type, name or content."""
        r, found = self.random, dict(tensors)
        name = self.one(sorted(found))
        t = found.pop(name)
        shape = r.choice([(0,), (1,), (0, 2**40), (2, 3), (), (*t.shape, 1), tuple(t.shape), tuple(t.shape)])
        kinds = [torch.uint8, torch.int8, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64,
                 torch.float64, torch.bool, torch.complex64, t.dtype, t.dtype, t.dtype]  # fmt: skip
        if r.random() < 0.8:
            scale = r.choice([0.0, 1.0, -1.0, 100.0, float("inf"), float("nan")])
            noise = torch.full(shape, 1.0) if r.random() < 0.3 else torch.rand(shape)
            found[name if r.random() < 0.8 else self.one(("x", f"{name}.x", "a"))] = (noise * scale).to(r.choice(kinds))
        return found


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(str(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], signed: bool) -> None:
    """A file whose checksum fits, or is that of the file before it was edited."""
    metadata = {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()}
    names = {name.encode("utf-8", "replace").decode(): t.contiguous() for name, t in tensors.items()}
    if signed:
        metadata[CHECKSUM] = _checksum(metadata, names)
    path.write_bytes(safetensors.torch.save({n: t.clone() for n, t in names.items()}, metadata))


def edited_safetensors(
    edits: Edits, path: Path, parts: tuple[dict[str, torch.Tensor], dict[str, str]], document: str
) -> str:
    """An edited safetensors file.  document: the key of the metadata that is edited most.  What was done."""
    tensors, metadata = dict(parts[0]), dict(parts[1])
    kind = edits.one(("document", "document", "document", "key", "tensor", "bytes", "unsigned"))
    if kind == "bytes":
        write_safetensors(path, tensors, metadata, True)
        path.write_bytes(edits.data(path.read_bytes()))
        return kind
    if kind == "tensor":
        tensors = edits.tensors(tensors)
    elif kind == "key":
        key = edits.one(metadata)
        if edits.random.random() < 0.4:
            metadata[edits.one((f"{key}x", "lsquant.packed", "lsquant.format"))] = metadata.pop(key)
        else:
            metadata[key] = edits.text(metadata[key])
    else:
        text = metadata[document]
        metadata[document] = edits.toml(text) if "=" in text.split("\n")[0] else edits.json(text)
    write_safetensors(path, tensors, metadata, kind != "unsigned")
    return f"{kind}: {str(metadata)[:3000]}"


@dataclass
class Subject:
    """A format.

    edit: writes the next edited file and says what it did.
    read: does with it what users do.
    fine: errors besides LsquantError that are right: SystemExit of a script, with a message.
    """

    edit: Callable[[Edits], str]
    read: Callable[[], Any]
    fine: tuple[type[BaseException], ...] = ()
    found: Counter[str] = field(default_factory=Counter)


class TooLong(BaseException):
    """A file that takes longer than its limit."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Stop what takes more of the processor's time: the machine may be busy with other things."""

    def stop(*_: Any) -> None:
        raise TooLong(f"more than {seconds} s of the processor")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(subject: Subject, count: int, seed: int, seconds: float = 5.0, megabytes: int = 400) -> Counter[str]:
    """Edit and read; how often it went well and how often it was refused.  Anything else fails, with the edit."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        edits = Edits(seed * 1_000_003 + number)
        said = f"number {number} of seed {seed}: {subject.edit(edits)}"
        try:
            with limited(seconds), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                subject.read()
            subject.found["read"] += 1
        except LsquantError as error:
            text = str(error)
            assert 0 < len(text) < 5000, said
            text.encode()  # can be printed
            subject.found["refused"] += 1
        except subject.fine:
            subject.found["refused"] += 1
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{said}") from error
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
    assert grown < megabytes, f"{grown} MiB more memory was used"
    return subject.found
