"""Made-up files for the long runs."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from helpers.cifar_files import six_parts, write_binary
from lsquant.tasks.resnet import cifar_resnet


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
