"""Read CIFAR-10 from the files that users have.

Nothing in a file is executed.  Memory is bounded by the files' sizes, or for parquet by what CIFAR-10 can hold.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Iterable
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lsquant._util.errors import DamagedFile, MissingFile
from lsquant._util.optional import require

PIXELS = 3 * 32 * 32
MOST = 60_000  # images that CIFAR-10 has: a file that claims more is another one
LAYOUTS = """the official binary version (cifar-10-batches-bin: data_batch_1.bin to data_batch_5.bin, test_batch.bin), \
Hugging Face parquet (train-*.parquet, test-*.parquet) or the official Python version (cifar-10-batches-py: \
data_batch_1 to data_batch_5, test_batch)"""


def read_cifar10(folder: str | Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Load "train" and "test": images (N, 3, 32, 32) uint8, red, green, blue; and labels (N,) int64, 0 to 9.

    folder: holds the files of one of `LAYOUTS`, itself or in the sub-folder cifar-10-batches-bin, plain_text, data
    (both parquet) or cifar-10-batches-py; the first that is found is read

    Raises: MissingFile saying what was found; DamagedFile naming the file; MissingExtra for parquet.
    """
    root = Path(folder)
    if not root.is_dir():
        raise MissingFile(f"the folder {folder} of CIFAR-10 does not exist: --data DIR says where it is")
    for place in (root / name for name in ("", "cifar-10-batches-bin", "plain_text", "data", "cifar-10-batches-py")):
        for suffix, read in ((".bin", _binary), (".parquet", _parquet), ("", _python)):
            files = _shards(place) if read is _parquet else _batches(place, suffix)
            if files:
                return {split: _joined([read(path) for path in paths]) for split, paths in files.items()}
    names = sorted(path.name for path in root.iterdir())
    found = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
    hint = "; unpack the archive" if any(name.endswith((".gz", ".zip", ".tar")) for name in names) else ""
    raise MissingFile(f"{folder} has no CIFAR-10 in it: read are {LAYOUTS}; found: {found}{hint}")


def _batches(place: Path, suffix: str) -> dict[str, list[Path]]:
    """Return the six files of an official version; none if all are missing."""
    names = {"train": [f"data_batch_{i}{suffix}" for i in range(1, 6)], "test": [f"test_batch{suffix}"]}
    files = {split: [place / name for name in part] for split, part in names.items()}
    missing = [path.name for part in files.values() for path in part if not path.is_file()]
    if len(missing) == 6:
        return {}
    if missing:
        raise MissingFile(f"{place} lacks {', '.join(missing)} of CIFAR-10")
    return files


def _shards(place: Path) -> dict[str, list[Path]]:
    """Return the parquet files; where they are numbered, as train-00000-of-00002.parquet, all must be there."""
    files = {split: sorted(place.glob(f"{split}-*.parquet")) for split in ("train", "test")}
    for split, paths in files.items():
        totals = {path.stem.rpartition("-of-")[2] for path in paths}
        complete = {str(len(paths)).zfill(5)} if any("-of-" in path.stem for path in paths) else totals
        if any(files.values()) and (not paths or totals != complete):
            there = ", ".join(path.name for path in paths) or "none"
            raise MissingFile(f"{place} lacks files {split}-*.parquet of CIFAR-10; found: {there}")
    return files if any(files.values()) else {}


def _joined(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, Tensor]:
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return torch.from_numpy(images).reshape(-1, 3, 32, 32), torch.from_numpy(labels)


def _labelled(path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check and reshape images, (N, 3072) uint8, and labels, (N,) integers."""
    if not len(images) == len(labels) > 0:
        raise DamagedFile(f"{path} has {len(images)} images and {len(labels)} labels")
    wrong = (labels < 0) | (labels > 9)
    if wrong.any():
        i = wrong.argmax()
        raise DamagedFile(f"{path}: the label of image {i} is {labels[i]}, not 0 to 9")
    return images, labels.astype(np.int64)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MissingFile(f"{path} cannot be read: {error}") from error


# ---- the official binary version ----


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of 3,073 bytes: the label, then 1,024 bytes each of red, green and blue."""
    data = _bytes(path)
    if not data or len(data) % (PIXELS + 1):
        raise DamagedFile(f"{path} has {len(data):,} bytes, no multiple of 3,073: it is truncated or another file")
    records = np.frombuffer(data, np.uint8).reshape(-1, PIXELS + 1)
    return _labelled(path, records[:, 1:], records[:, 0])


# ---- Hugging Face parquet ----


def _parquet(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the columns img or image, a struct whose `bytes` are a PNG file, and label or labels."""
    parquet, image = require("pyarrow.parquet", extra="cifar"), require("PIL.Image", extra="cifar")
    images, labels = [], []
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            facts = file.metadata
            size = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
            if facts.num_rows > MOST or size > 2 * MOST * PIXELS:
                raise ValueError(f"{facts.num_rows:,} rows of {size:,} bytes are more than CIFAR-10 has")
            img, label = (_column(file.schema_arrow.names, *names) for names in (("img", "image"), ("label", "labels")))
            for batch in file.iter_batches(batch_size=100, columns=[img, label]):
                rows = batch.to_pydict()
                images += [_pixels(image, row["bytes"]) for row in rows[img]]
                labels += rows[label]
        pixels, numbers = np.array(images, np.uint8).reshape(-1, PIXELS), _integers(labels)
    except Exception as error:
        raise DamagedFile(f"{path} cannot be read as CIFAR-10: {error or type(error).__name__}") from error
    return _labelled(path, pixels, numbers)


def _column(names: list[str], *wanted: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"it has no column {' or '.join(wanted)} but {', '.join(names)}")


def _integers(labels: Iterable[Any]) -> np.ndarray:
    """Convert labels to (N,) int64. Raises: TypeError, OverflowError for anything else."""
    return np.fromiter(map(index, labels), np.int64)


def _pixels(image: Any, png: bytes) -> np.ndarray:
    """Decode an image to (3, 32, 32) uint8; nothing is decoded unless it has the right size."""
    with image.open(io.BytesIO(png), formats=("PNG",)) as picture:
        if picture.size != (32, 32):
            raise ValueError(f"an image of {picture.size[0]} x {picture.size[1]} pixels, not 32 x 32")
        return np.asarray(picture.convert("RGB")).transpose(2, 0, 1)


# ---- the official Python version ----


class _Inert:
    """Stand for every function and class that a batch names: it keeps its arguments and state, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Unpickle dicts, lists, tuples, strings and numbers; the few names that an array brings along become `_Inert`."""

    named = (
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray._reconstruct",
        "numpy.ndarray",
        "numpy.dtype",
        "_codecs.encode",
    )

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.named:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which no batch of CIFAR-10 does; nothing of it was run"
            )
        return _Inert


def _python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a pickled dict: `data`, an array (N, 3072) uint8, and `labels`, a list."""
    data = _bytes(path)
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
            if "PUT" in operation.name and int(argument or 0) > count:
                raise ValueError("its memo is out of order")  # the unpickler would take memory for it
        batch = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        array, labels = (batch[name if name in batch else name.encode()] for name in ("data", "labels"))
        _, shape, dtype, fortran, raw = array.state
        if isinstance(raw, _Inert):  # as Python 3 writes bytes in protocol 2
            raw = raw.arguments[0].encode("latin1")
        if dtype.arguments[0] not in ("u1", b"u1") or fortran or len(shape) != 2 or shape[1] != PIXELS:
            raise ValueError("its data are no array of (images, 3072) bytes")
        images, numbers = np.frombuffer(raw, np.uint8).reshape(shape), _integers(labels)
    except Exception as error:
        raise DamagedFile(f"{path} is no batch of CIFAR-10, or damaged: {error or type(error).__name__}") from error
    return _labelled(path, images, numbers)
