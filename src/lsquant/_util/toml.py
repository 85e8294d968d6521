"""Writing of TOML: strings, numbers, booleans, lists and tables.  Reading is the standard library's tomllib."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def to_toml(table: Mapping[str, Any]) -> str:
    """Write a table as TOML; its values may be tables or lists of tables, an entry that is None is left out.

    Raises: TypeError for a value that TOML has not.

    >>> print(to_toml({"bits": 4, "rule": {"which": "first"}}), end="")
    bits = 4
    <BLANKLINE>
    [rule]
    which = "first"
    """
    return "\n".join(_lines(table, ())).strip("\n") + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines, below = [], []
    for key, value in table.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            below += [f"[{'.'.join(map(_key, here))}]", *_lines(value, here)]
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            for item in value:
                below += [
                    f"[[{'.'.join(map(_key, here))}]]",
                    *(f"{_key(k)} = {_value(v)}" for k, v in item.items()),
                    "",
                ]
        elif value is not None:
            lines.append(f"{_key(key)} = {_value(value)}")
    return [*lines, "", *below]


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
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{_key(k)} = {_value(v)}' for k, v in value.items() if v is not None)} }}"
    raise TypeError(f"TOML has no {type(value).__name__}")
