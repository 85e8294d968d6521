"""Writing TOML: strings, numbers, booleans, lists of these, and tables. Reading is the standard library's tomllib."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def toml_text(table: Mapping[str, Any]) -> str:
    """TOML of `table`, whose values may be tables themselves; an entry that is None is left out.

    Raises: TypeError for a value that TOML has not.
    """
    return "\n".join(_lines(table, ())) + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = [f"{_key(k)} = {_value(v)}" for k, v in table.items() if v is not None and not isinstance(v, Mapping)]
    lines = [f"[{'.'.join(map(_key, path))}]", *plain, ""] if path else ([*plain, ""] if plain else [])
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _lines(value, (*path, str(key)))
    return lines


def _key(key: Any) -> str:
    text = str(key)
    bare = text.isascii() and text.replace("-", "").replace("_", "").isalnum()
    return text if bare else _value(text)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # inf, -inf and nan are written the same way in TOML
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    raise TypeError(f"TOML has no {type(value).__name__}")
