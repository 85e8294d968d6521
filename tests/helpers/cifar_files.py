"""Small made-up images written in the layouts of CIFAR-10 that users have."""

from __future__ import annotations

import io
import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np

Split = tuple[np.ndarray, np.ndarray]  # images (N, 3, 32, 32) uint8, labels (N,) int


def made_up(count: int, seed: int) -> Split:
    """Noise around a colour that tells the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count)
    centre = np.random.default_rng(0).integers(60, 196, (10, 3, 1, 1))[labels]
    images = (centre + rng.integers(-60, 60, (count, 3, 32, 32))).astype(np.uint8)
    return images, labels


def six_parts(per_batch: int = 4) -> dict[str, Split]:
    """By official name: data_batch_1 to data_batch_5, of different lengths, and test_batch."""
    parts = {f"data_batch_{i}": made_up(per_batch + i, i) for i in range(1, 6)}
    return parts | {"test_batch": made_up(per_batch + 3, 9)}


def joined(parts: dict[str, Split]) -> dict[str, Split]:
    """What a reader should give for all parts."""
    train = [part for name, part in parts.items() if name != "test_batch"]
    images, labels = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return {"train": (images, labels), "test": parts["test_batch"]}


def write_binary(folder: Path, parts: dict[str, Split]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in parts.items():
        records = [bytes([int(label)]) + image.tobytes() for image, label in zip(images, labels, strict=True)]
        (folder / f"{name}.bin").write_bytes(b"".join(records))
    return folder


def png(image: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, "PNG")
    return file.getvalue()


def write_parquet(path: Path, images: list[bytes], labels: list, columns: tuple[str, str] = ("img", "label")) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": data, "path": None} for data in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({columns[0]: pa.array(rows, kind), columns[1]: labels}), path)


def write_parquets(folder: Path, parts: dict[str, Split], columns: tuple[str, str] = ("img", "label")) -> Path:
    """train in two files, test in one, named as on the Hugging Face hub."""
    for split, (images, labels) in joined(parts).items():
        cuts = [0, 7, len(labels)] if split == "train" else [0, len(labels)]
        for i, (low, high) in enumerate(pairwise(cuts)):
            path = folder / f"{split}-0000{i}-of-0000{len(cuts) - 1}.parquet"
            write_parquet(path, [png(image) for image in images[low:high]], labels[low:high].tolist(), columns)
    return folder


def python2_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    """The bytes that Python 2's cPickle writes in protocol 2 for an official batch."""

    def text(word: bytes) -> bytes:
        return b"U" + bytes([len(word)]) + word

    def number(n: int) -> bytes:
        return b"K" + bytes([n]) if n < 256 else b"M" + n.to_bytes(2, "little")

    data = images.tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87R("
    array += b"K\x01" + number(len(images)) + number(3072) + b"\x86cnumpy\ndtype\nq\x09" + text(b"u1")
    array += b"K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
    array += b"T" + len(data).to_bytes(4, "little") + data + b"tb"
    names = b"".join(text(b"image_%d.png" % i) for i in range(len(images)))
    return (
        b"\x80\x02}q\x01(" + text(b"batch_label") + text(b"training batch 1 of 5") + text(b"labels")
        + b"]q\x05(" + b"".join(number(int(label)) for label in labels) + b"e" + text(b"data") + array
        + text(b"filenames") + b"](" + names + b"eu."
    )  # fmt: skip


def python3_batch(images: np.ndarray, labels: np.ndarray, protocol: int) -> bytes:
    """The same written by Python 3 and the present numpy."""
    data = np.ascontiguousarray(images.reshape(len(images), 3072))
    return pickle.dumps({"data": data, "labels": labels.tolist(), "batch_label": "x"}, protocol=protocol)


def write_python(folder: Path, parts: dict[str, Split]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        (folder / name).write_bytes(python2_batch(*part))
    return folder
