"""Training checkpoints, the state of the random generators, seeds."""

# ruff: noqa: NPY002  (numpy's global generator is what must be restored)
from __future__ import annotations

import json
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

import lsquant.training.state as state_module
from lsquant._util.errors import DamagedFile, MissingFile, UsageError
from lsquant.training import load_state, save_state  # fmt: skip
from lsquant.training.seeds import derive_seed, rng_state, seed_everything, set_rng_state
from lsquant.training.state import decode, encode


def test_codec_round_trip(tmp_path):
    tied = torch.randn(3)
    value: Any = {
        "a": [1, 2.5, None, True, "text", (1, (2,))],
        3: {"nan": float("nan"), "inf": -math.inf, "tiny": 5e-324, "third": 1 / 3},
        "tensors": [torch.tensor(1.5), torch.zeros(0), tied, tied, tied[1:], torch.ones(2, 3).T],
        "types": [
            torch.tensor([1], dtype=t) for t in (torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)
        ],
    }
    structure, tensors = encode(value)
    json.loads(json.dumps(structure, allow_nan=False))
    again = decode(structure, tensors)
    assert again["a"] == value["a"]
    assert isinstance(again["a"][5], tuple)
    assert math.isnan(again[3]["nan"])
    assert again[3]["inf"] == -math.inf
    save_state(tmp_path / "c.safetensors", value)
    loaded: Any = load_state(tmp_path / "c.safetensors")
    assert loaded["a"] == value["a"]
    assert loaded[3]["tiny"] == 5e-324
    assert loaded[3]["third"] == 1 / 3
    for key in ("tensors", "types"):
        for old, new in zip(value[key], loaded[key], strict=True):
            assert old.dtype == new.dtype
            assert torch.equal(old, new)


def test_codec_refuses_other_types(tmp_path):
    with pytest.raises(UsageError, match=r"cannot hold a set \(at a\.0\)"):
        save_state(tmp_path / "c.safetensors", {"a": [{1}]})
    with pytest.raises(UsageError, match="keys"):
        save_state(tmp_path / "c.safetensors", {"a": {(1, 2): 3}})
    assert not list(tmp_path.iterdir())


def test_every_damage_is_noticed_and_names_the_file(tmp_path):
    path = tmp_path / "c.safetensors"
    with pytest.raises(MissingFile, match=r"c\.safetensors"):
        load_state(path)
    save_state(path, {"a": torch.arange(50.0), "b": [1, 2]})
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        position = rng.randrange(len(whole))
        flipped = bytes([whole[position] ^ (1 << rng.randrange(8))])
        path.write_bytes(whole[:position] + (b"" if rng.random() < 0.5 else flipped + whole[position + 1 :]))
        with pytest.raises(DamagedFile, match=r"c\.safetensors"):
            load_state(path)


def test_another_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "VERSION", 99)
        save_state(tmp_path / "c.safetensors", {})
    with pytest.raises(DamagedFile, match="version '99'"):
        load_state(tmp_path / "c.safetensors")


def test_rng_state_round_trip(tmp_path):
    seed_everything("here")
    for draw in (torch.rand, np.random.rand, np.random.randn):
        draw(3)
    random.gauss(0, 1)
    save_state(tmp_path / "c.safetensors", rng_state())
    expected = torch.randn(5), np.random.rand(), np.random.randn(), random.gauss(0, 1)
    seed_everything("elsewhere")
    set_rng_state(load_state(tmp_path / "c.safetensors"))
    again = torch.randn(5), np.random.rand(), np.random.randn(), random.gauss(0, 1)
    assert torch.equal(expected[0], again[0])
    assert expected[1:] == again[1:]


def test_derived_seeds_are_fixed_numbers():
    assert derive_seed(0, "shuffle", 1) == 6589058160304026109
    assert derive_seed(1, 23) != derive_seed(12, 3)
