"""Mistakes that users make: each gives an error or a finding that names the layer or argument and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import (
    mistakes_export,  # noqa: F401  (fills the table)
    mistakes_files,  # noqa: F401
    mistakes_model,  # noqa: F401
    mistakes_shipping,  # noqa: F401
    mistakes_strangers,  # noqa: F401
)
from helpers.mistakes import MISTAKES, Mistake
from lsquant import LsquantError


def test_there_are_eighty() -> None:
    assert len({function.__name__ for function, _, _ in MISTAKES}) == len(MISTAKES) >= 80


@pytest.mark.filterwarnings("ignore::UserWarning:torch.nn.parallel")
@pytest.mark.parametrize("function, names, remedy", MISTAKES, ids=[f.__name__ for f, _, _ in MISTAKES])
def test_mistake(function: Mistake, names: str, remedy: str, tmp_path: Path) -> None:
    """The words on the command line, of an error raised on purpose, or of the findings."""
    try:
        found = function(tmp_path)
    except LsquantError as error:
        message = str(error)
    else:
        assert found, "nothing was said"
        message = found if isinstance(found, str) else "\n".join(map(str, found))
    print(message)
    for part in (names, remedy):
        assert part in message, f"{part!r} is not in: {message}"
