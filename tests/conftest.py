"""What all tests share: fixed seeds that a failure shows, one thread for torch, the folder of real data."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

import lsquant
from lsquant import kernels

torch.set_num_threads(int(os.environ.get("LSQUANT_TEST_THREADS", "1")))
# engines of the tests: name -> module, as in lsquant.kernels.ENGINES
OWN_ENGINES = {"quantizer_only": "helpers.quantizer_only"}

# LSQUANT_TEST_SEED=n runs every test from other seeds
BASE_SEED = int(os.environ.get("LSQUANT_TEST_SEED", "0"))

# without a GPU the Triton engine is tested through Triton's interpreter; Triton reads this when it is imported
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the same examples in every run, unless other seeds are asked for; no deadline: machines differ
hypothesis.settings.register_profile("lsquant", deadline=None, derandomize=BASE_SEED == 0, print_blob=True)
hypothesis.settings.load_profile("lsquant")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter is slow: a third of the tests that run it, chosen by their names, is in the fast suite."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("engine") == "triton":
            long = hasattr(getattr(item, "obj", None), "hypothesis") or "many" in item.name or "threads" in item.name
            if long or zlib.crc32(item.name.encode()) % 3:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that depends on the test's name only, set for Python, NumPy and torch; shown when the test fails."""
    digest = hashlib.sha256(f"{BASE_SEED} {request.node.name}".encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  (for libraries that use the global generator)
    torch.manual_seed(value)
    request.node.add_report_section("call", "seed", f"{value} (LSQUANT_TEST_SEED={BASE_SEED})")
    return value


@pytest.fixture(autouse=True)
def _global_state() -> Iterator[None]:
    """A test that leaves torch's global settings changed fails itself, not the tests after it."""
    before = _settings()
    yield
    after = _settings()
    if after != before:
        torch.set_default_dtype(before["default dtype"])
        torch.set_num_threads(before["threads"])
        torch.set_grad_enabled(before["grad"])
        torch.use_deterministic_algorithms(before["deterministic"])
        pytest.fail(f"the test changed torch's global settings from {before} to {after}")


@pytest.fixture(autouse=True)
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A parameter `engine` that names an engine forces it; one that cannot run here is skipped."""
    callspec = getattr(request.node, "callspec", None)
    name = callspec.params.get("engine") if callspec is not None else None
    if name in OWN_ENGINES:
        monkeypatch.setitem(kernels.ENGINES, name, OWN_ENGINES[name])
    if name not in kernels.ENGINES:
        yield
        return
    if reason := kernels.why_not(name):
        pytest.skip(f"engine {name}: {reason}")
    # the interpreter computes with NumPy, which warns of what a GPU does silently
    quiet = np.errstate(all="ignore") if name == "triton" else contextlib.nullcontext()
    with quiet, lsquant.use_engine(name):
        yield


def _settings() -> dict:
    return {
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data named by LSQUANT_TEST_DATA; the test is skipped where there is none."""
    folder = os.environ.get("LSQUANT_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LSQUANT_TEST_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def cifar10_folder(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official binary version of CIFAR-10, unpacked from the real data."""
    pytest.importorskip("PIL")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(data_folder / "unpack_cifar10.py"), str(folder)], check=True)
    return folder


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
