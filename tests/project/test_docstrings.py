"""The examples in docstrings run and give what they show."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

import lsquant

PACKAGE = Path(lsquant.__file__).parent
WITH_EXAMPLES = sorted(file for file in PACKAGE.rglob("*.py") if ">>> " in file.read_text())


def dotted(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@pytest.mark.parametrize("name", [dotted(file) for file in WITH_EXAMPLES])
def test_examples_of_docstrings(name: str):
    module = importlib.import_module(name)
    given = {"lsquant": lsquant, "torch": torch, "nn": nn}
    failed, tried = doctest.testmod(module, extraglobs=given)
    assert tried > 0
    assert failed == 0


def test_there_are_examples():
    assert len(WITH_EXAMPLES) > 3
