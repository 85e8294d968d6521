"""What the tests of long runs share with others."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers.cifar_files import six_parts, write_binary
from lsquant.tasks.resnet import cifar_resnet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/ or studies/ as a script does."""
    for folder in ("benchmarks", "studies"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--data, --init and --teacher of made-up files."""
    folder = tmp_path_factory.mktemp("made up")
    write_binary(folder, six_parts(0))
    torch.manual_seed(0)
    for name in ("resnet20", "resnet32"):
        save_file(cifar_resnet(name).state_dict(), folder / f"{name}.safetensors")
    files = [str(folder / f"{name}.safetensors") for name in ("resnet20", "resnet32")]
    return ["--data", str(folder), "--init", files[0], "--teacher", files[1]]
