"""Values out of files: type and bounds of each are checked before it is used, and an error names file and key."""

from __future__ import annotations

import json
import math
import os
import stat
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from lsquant._util.errors import DamagedFile, LsquantError, MissingFile

DEPTH = 64
"""Levels of nesting, at most: enough for every file that lsquant writes, and no recursion over it can fail."""
LARGEST = 1 << 26
"""Bytes of a JSON text, at most."""
LARGEST_TOML = 1 << 23
"""Bytes of a TOML text, at most."""
ITEMS = 1 << 20
"""Items of a list or keys of a table, at most."""
TEXT = 1 << 12
"""Characters of a text, at most."""
DIGITS = 20
"""Digits of an integer, at most: 64 bits."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A value as a parser gave it; each method returns it in one type, or raises ``error``.

    value: of JSON or TOML.
    file: as messages name it.
    key: the way to the value, e.g. "layers[2].weights"; "" for the whole.
    error: DamagedFile, or UsageError for what a user wrote by hand.
    """

    value: Any
    file: str
    key: str = ""
    error: type[LsquantError] = DamagedFile

    def wrong(self, wanted: str) -> LsquantError:
        """Return the error to raise.  wanted: what had to be there."""
        return self.error(f"{self._head()}: {self.key or 'its content'} is {shown(self.value)}; needed is {wanted}")

    def refuse(self, why: str) -> NoReturn:
        """Raise the error with a reason instead of the value."""
        raise self.error(f"{self._head()}: {f'{self.key}: ' if self.key else ''}{why}")

    def require(self, condition: bool, why: str) -> None:
        """Raise the error with a reason unless the condition holds."""
        if not condition:
            self.refuse(why)

    def _head(self) -> str:
        return f"{self.file} is damaged" if self.error is DamagedFile else self.file

    def at(self, key: str, value: Any) -> Entry:
        """Return a value inside this one."""
        return Entry(value, self.file, f"{self.key}.{key}" if self.key else key, self.error)

    def text(self, longest: int = TEXT) -> str:
        """Return a text without NUL and lone surrogates, which no file or terminal takes."""
        value = self.value
        if not isinstance(value, str) or len(value) > longest or "\0" in value or not _is_unicode(value):
            raise self.wrong(f"a text of at most {longest} characters")
        return value

    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high; a truth value is none."""
        if type(self.value) is not int or not low <= self.value <= high:
            raise self.wrong(f"an integer from {low} to {high}")
        return self.value

    def number(self, low: float = -math.inf, high: float = math.inf) -> float:
        """Return a finite number from low to high, an integer as float; a truth value is none."""
        value = self.value
        if type(value) not in (int, float) or abs(value) > 1e300 or not (math.isfinite(value) and low <= value <= high):
            bounds = "" if math.isinf(low) and math.isinf(high) else f" from {low:g} to {high:g}"
            raise self.wrong(f"a finite number{bounds}")
        return float(value)

    def boolean(self) -> bool:
        """Return true or false; nothing else stands for them."""
        if type(self.value) is not bool:
            raise self.wrong("true or false")
        return self.value

    def choice(self, known: Collection[Any]) -> Any:
        """Return a value that is one of ``known``, of the same type."""
        for one in known:
            if type(one) is type(self.value) and one == self.value:
                return one
        raise self.wrong(f"one of {', '.join(map(repr, known))}")

    def items(self, most: int = ITEMS) -> list[Entry]:
        """Return the entries of a list."""
        if not isinstance(self.value, list) or len(self.value) > most:
            raise self.wrong(f"a list of at most {most} items")
        return [Entry(item, self.file, f"{self.key}[{i}]", self.error) for i, item in enumerate(self.value)]

    def table(self, most: int = ITEMS) -> dict[str, Entry]:
        """Return the entries of a table with keys of any name."""
        if not isinstance(self.value, dict) or len(self.value) > most:
            raise self.wrong(f"a table of at most {most} keys")
        return {self.at("key", name).text(): self.at(name[:80], item) for name, item in self.value.items()}

    def record(self, needed: Collection[str], optional: Collection[str] = ()) -> dict[str, Entry]:
        """Return the entries of a table whose keys are known; those of ``optional`` may be missing."""
        found = self.table()
        known = [*needed, *optional]
        if unknown := [name for name in found if name not in known]:
            self.refuse(f"unknown key {shown(unknown[0])}; known are {', '.join(map(repr, sorted(known)))}")
        return self.parts(*needed)

    def parts(self, *needed: str) -> dict[str, Entry]:
        """Return the entries of a table that has these keys, and maybe others."""
        found = self.table()
        if missing := [name for name in needed if name not in found]:
            self.refuse(f"the key {missing[0]!r} is missing")
        return found

    def texts(self) -> list[str]:
        """Return a list of texts."""
        return [item.text() for item in self.items()]

    def text_table(self) -> dict[str, str]:
        """Return a table of texts."""
        return {name: item.text() for name, item in self.table().items()}


def shown(value: Any) -> str:
    """Return a value for a message, in a few characters whatever its size."""
    if isinstance(value, dict):
        return f"a table of {len(value)} keys"
    if isinstance(value, (list, tuple)) and (len(value) > 4 or any(isinstance(v, (dict, list)) for v in value)):
        return f"a list of {len(value)} items"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    said = repr(value[:100] if isinstance(value, (str, bytes)) else value)
    return said if len(said) <= 80 else f"{said[:77]}..."


def parse_json(text: str | bytes, file: str, key: str = "", largest: int = LARGEST) -> Entry:
    """Parse JSON without NaN, infinities, integers beyond 64 bits and deep nesting.

    file, key: of the text, for messages.
    Raises: DamagedFile.
    """
    where = Entry(None, file, key)
    if len(text) > largest:
        where.refuse(f"{len(text):,} bytes of JSON are more than the {largest:,} that are read")
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_int=_integer)
    except (ValueError, RecursionError) as error:
        where.refuse(f"not valid JSON: {reason(error)}")
    return _shallow(Entry(value, file, key))


def parse_toml(text: str, file: str, error: type[LsquantError] = DamagedFile) -> Entry:
    """Parse TOML without deep nesting.  Raises: ``error`` naming ``file``."""
    where = Entry(None, file, "", error)
    if len(text) > LARGEST_TOML:
        where.refuse(f"{len(text):,} bytes of TOML are more than the {LARGEST_TOML:,} that are read")
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as problem:
        where.refuse(f"not valid TOML: {reason(problem)}")
    return _shallow(Entry(value, file, "", error))


def read_text(path: str | os.PathLike[str], largest: int = LARGEST) -> str:
    """Read a file of UTF-8.

    Raises: MissingFile; DamagedFile for one that is larger, no plain file, cannot be read or is no UTF-8.
    """
    try:
        with open(path, "rb", opener=without_waiting) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise DamagedFile(f"{path} is no plain file")
            if about.st_size > largest:
                raise DamagedFile(f"{path} has {about.st_size:,} bytes, more than the {largest:,} that are read")
            return file.read(largest + 1).decode()
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is not UTF-8: {reason(error)}") from error
    except FileNotFoundError as error:
        raise MissingFile(f"{path} does not exist") from error
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error


def read_json(path: str | os.PathLike[str]) -> Entry:
    """Read a file of JSON.  Raises: MissingFile, DamagedFile."""
    return parse_json(read_text(path), os.fspath(path))


def read_toml(path: str | os.PathLike[str]) -> Entry:
    """Read a file of TOML.  Raises: MissingFile, DamagedFile."""
    return parse_toml(read_text(path, LARGEST_TOML), os.fspath(path))


def reason(error: BaseException) -> str:
    """Return the first line of a message of a parser, or the kind of error, in at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def without_waiting(path: str, flags: int) -> int:
    """Open a named pipe without waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _shallow(entry: Entry) -> Entry:
    """Return the entry.  Raises: its error where it is nested deeper than DEPTH."""
    level: list[Any] = [entry.value]
    for _ in range(DEPTH + 1):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return entry
    entry.refuse(f"it is nested deeper than {DEPTH} levels")


def _inside(value: Any) -> Iterator[Any]:
    """Yield the containers in a container."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (part for part in parts if isinstance(part, (dict, list)))
