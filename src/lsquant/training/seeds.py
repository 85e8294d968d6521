"""Seeds: one number for the user, independent streams for every use of it."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch

from lsquant._util.entry import Entry, reason

_WORD, _WORDS = 2**32 - 1, 624  # of the Mersenne twister of numpy and python


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63), a fixed function of `parts`, e.g. derive_seed(seed, "shuffle", epoch)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a torch generator on the CPU, seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators of torch, numpy and python by `derive_seed(*parts)`."""
    seed = derive_seed(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  (what users' own code may draw from)
    random.seed(seed)


def rng_state() -> dict[str, Any]:
    """Return the state of the global generators of torch (CPU, and CUDA where it is in use), numpy and python."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002  # pyright: ignore
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [str(name), [int(key) for key in keys], int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any], file: str = "the state of the random generators", key: str = "") -> None:
    """Restore what `rng_state` returned.

    file, key: where it comes from, for messages

    Raises: DamagedFile for another state; numpy would read beyond its memory for some.
    """
    entry = Entry(state, file, key)
    found = entry.record(("torch", "numpy", "python"), ("cuda",))
    name, keys, position, has_gauss, gauss = _parts(found["numpy"], list, 5)
    keys = _words(keys, list, _WORDS)
    rest = (position.integer(0, _WORDS), has_gauss.integer(0, 1), gauss.number())
    found["numpy"].require(name.value == "MT19937", "it is of another generator")
    version, words, python_gauss = _parts(found["python"], tuple, 3)
    words = _words(words, tuple, _WORDS + 1)
    found["python"].require(words[-1] <= _WORDS, "its position is beyond its end")
    python_gauss = None if python_gauss.value is None else python_gauss.number()
    cuda = found["cuda"].items(1024) if "cuda" in found else []
    for one in (found["torch"], *cuda):
        good = isinstance(one.value, torch.Tensor) and one.value.dtype == torch.uint8 and one.value.dim() == 1
        one.require(good, "it is no tensor of bytes")
    try:
        torch.set_rng_state(found["torch"].value)
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([one.value for one in cuda])
    except RuntimeError as error:  # torch checks what it gets
        found["torch"].refuse(reason(error))
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    random.setstate((version.integer(3, 3), tuple(words), python_gauss))


def _parts(entry: Entry, kind: type, number: int) -> list[Entry]:
    """Return the parts of a list or tuple of that length."""
    if not isinstance(entry.value, kind) or len(entry.value) != number:
        raise entry.wrong(f"{number} parts")
    return [entry.at(str(i), part) for i, part in enumerate(entry.value)]


def _words(entry: Entry, kind: type, number: int) -> list[int]:
    """Return a list or tuple of so many words of 32 bits."""
    words = entry.value
    if not isinstance(words, kind) or len(words) != number:
        raise entry.wrong(f"{number} integers")
    entry.require(all(type(word) is int and 0 <= word <= _WORD for word in words), "an integer beyond 32 bits")
    return list(words)
