"""Reading CIFAR-10: three layouts give the images that were written; what is missing or damaged is named."""

from __future__ import annotations

import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.cifar_files import (
    joined,
    made_up,
    png,
    python2_batch,
    python3_batch,
    six_parts,
    write_binary,
    write_parquet,
    write_parquets,
    write_python,
)
from lsquant._util.errors import DamagedFile, LsquantError, MissingExtra, MissingFile
from lsquant.tasks.cifar_data import read_cifar10

PARTS = six_parts()


def needs_parquet() -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("PIL")


def assert_read(folder: Path, parts=PARTS) -> None:
    found = read_cifar10(folder)
    assert list(found) == ["train", "test"]
    for split, (images, labels) in joined(parts).items():
        assert (found[split][0].dtype, found[split][1].dtype) == (torch.uint8, torch.int64)
        np.testing.assert_array_equal(found[split][0].numpy(), images)
        np.testing.assert_array_equal(found[split][1].numpy(), labels)


# ---- what is read ----


def test_the_official_images(cifar10_folder):
    """Facts that are known of CIFAR-10: first labels and pixels, counts, means and deviations."""
    data = read_cifar10(cifar10_folder)
    (x, y), (x_test, y_test) = data["train"], data["test"]
    assert x.shape == (50_000, 3, 32, 32)
    assert x_test.shape == (10_000, 3, 32, 32)
    assert y[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert y_test[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert y.bincount().tolist() == [5000] * 10
    assert y_test.bincount().tolist() == [1000] * 10
    assert x[0, :, 0, :2].T.tolist() == [[59, 62, 63], [43, 46, 45]]
    shares = torch.stack([x[:, c].flatten().bincount(minlength=256) for c in range(3)]).double() / (50_000 * 32 * 32)
    levels = torch.arange(256, dtype=torch.float64) / 255
    means = shares @ levels
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=5e-5)
    np.testing.assert_allclose((shares @ levels**2 - means**2).sqrt(), [0.2470, 0.2435, 0.2616], atol=5e-5)


@pytest.mark.parametrize("place", ["", "cifar-10-batches-bin"])
def test_binary(place, tmp_path):
    write_binary(tmp_path / place, PARTS)
    assert_read(tmp_path)


@pytest.mark.parametrize(
    "place, columns",
    [
        ("", ("img", "label")),
        ("plain_text", ("image", "label")),
        ("data", ("img", "labels")),
        ("", ("image", "labels")),
    ],
)
def test_parquet(place, columns, tmp_path):
    needs_parquet()
    write_parquets(tmp_path / place, PARTS, columns)
    assert_read(tmp_path)


def test_parquet_without_numbers_in_the_names(tmp_path):
    needs_parquet()
    for split, (images, labels) in joined(PARTS).items():
        write_parquet(tmp_path / f"{split}-all.parquet", [png(image) for image in images], labels.tolist())
    assert_read(tmp_path)


@pytest.mark.parametrize("place", ["", "cifar-10-batches-py"])
def test_python(place, tmp_path):
    write_python(tmp_path / place, PARTS)
    assert_read(tmp_path)


def test_python_batches_are_what_pickle_would_read():
    images, labels = PARTS["data_batch_2"]
    batch = pickle.loads(python2_batch(images, labels), encoding="bytes")
    assert set(batch) == {b"batch_label", b"labels", b"data", b"filenames"}
    np.testing.assert_array_equal(batch[b"data"].reshape(images.shape), images)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_python_batches_that_were_written_anew(protocol, tmp_path):
    write_python(tmp_path, PARTS)
    (tmp_path / "data_batch_3").write_bytes(python3_batch(*PARTS["data_batch_3"], protocol))
    assert_read(tmp_path)


def test_the_first_layout_found_is_read(tmp_path):
    write_binary(tmp_path / "cifar-10-batches-bin", PARTS)
    other = {name: made_up(3, 5) for name in PARTS}
    write_python(tmp_path / "cifar-10-batches-py", other)
    assert_read(tmp_path)
    assert_read(tmp_path / "cifar-10-batches-py", other)


# ---- what is missing ----


def test_missing_folders_and_files(tmp_path):
    with pytest.raises(MissingFile, match=r"none of CIFAR-10 does not exist: --data DIR"):
        read_cifar10(tmp_path / "none")
    with pytest.raises(MissingFile, match=r"read are the official binary .*parquet.*Python version.* found: nothing$"):
        read_cifar10(tmp_path)
    for i in range(10):
        (tmp_path / f"cifar-10-{i}.tar.gz").write_bytes(b"")
    with pytest.raises(MissingFile, match=r"cifar-10-0\.tar\.gz, .* and 2 more; unpack the archive"):
        read_cifar10(tmp_path)
    write_binary(tmp_path, PARTS)
    (tmp_path / "data_batch_4.bin").unlink()
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(MissingFile, match=r"lacks data_batch_4\.bin, test_batch\.bin"):
        read_cifar10(tmp_path)


def test_missing_parquet_files(tmp_path):
    needs_parquet()
    write_parquets(tmp_path, PARTS)
    (tmp_path / "train-00000-of-00002.parquet").rename(tmp_path / "elsewhere")
    with pytest.raises(MissingFile, match=r"lacks files train-\*.* found: train-00001-of-00002\.parquet"):
        read_cifar10(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "train-00000-of-00002.parquet")
    (tmp_path / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(MissingFile, match=r"lacks files test-\*.* found: none"):
        read_cifar10(tmp_path)


@pytest.mark.parametrize("package", ["pyarrow.parquet", "PIL.Image"])
def test_parquet_without_its_packages(package, tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / f"{split}-0.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", np)  # any module
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"lsquant\[cifar\]"):
        read_cifar10(tmp_path)


# ---- what is damaged ----


def refused(folder: Path, name: str, says: str) -> None:
    with pytest.raises(DamagedFile, match=says) as caught:
        read_cifar10(folder)
    assert str(folder / name) in str(caught.value)


def test_damaged_binary_files(tmp_path):
    write_binary(tmp_path, PARTS)
    path = tmp_path / "data_batch_2.bin"
    whole = path.read_bytes()
    for data, says in (
        (whole[:-1], "has 18,437 bytes, no multiple of 3,073"),
        (b"", "has 0 bytes"),
        (whole[:3073] + b"\x0a" + whole[3074:], "the label of image 1 is 10, not 0 to 9"),
    ):
        path.write_bytes(data)
        refused(tmp_path, path.name, says)


def test_damaged_parquet_files(tmp_path):
    needs_parquet()
    write_parquets(tmp_path, PARTS)
    images, labels = PARTS["test_batch"]
    good = [png(image) for image in images]
    path = tmp_path / "test-00000-of-00001.parquet"
    for pngs, numbers, columns, says in (
        (good, labels.tolist(), ("picture", "label"), "no column img or image but picture, label"),
        (good, labels.tolist(), ("img", "fine_label"), "no column label or labels"),
        (good, [-1, *labels[1:].tolist()], ("img", "label"), "label of image 0 is -1, not 0 to 9"),
        (good, [None, *labels[1:].tolist()], ("img", "label"), "None"),
        (good, [0.5] * len(good), ("img", "label"), "float"),
        ([None, *good[1:]], labels.tolist(), ("img", "label"), "cannot be read"),
        ([good[0][:200], *good[1:]], labels.tolist(), ("img", "label"), "cannot be read"),
        ([png(np.zeros((3, 33, 32), np.uint8)), *good[1:]], labels.tolist(), ("img", "label"), "32 x 33 pixels"),
        ([], [], ("img", "label"), "0 images"),
    ):
        write_parquet(path, pngs, numbers, columns)
        refused(tmp_path, path.name, says)
    write_parquet(path, [good[0]] * 60_001, [0] * 60_001)
    refused(tmp_path, path.name, "60,001 rows of .* are more than CIFAR-10 has")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(tmp_path, path.name, "cannot be read as CIFAR-10")


def batch(**changes) -> bytes:
    images, labels = PARTS["test_batch"]
    content = {"data": images.reshape(-1, 3072), "labels": labels.tolist()} | changes
    return pickle.dumps({key: value for key, value in content.items() if value is not None}, protocol=2)


WRONG = {
    "data'": batch(data=None),
    "labels'": batch(labels=None),
    r"no array of \(images, 3072\)": batch(data=np.zeros((7, 3073), np.uint8)),
    r"no array of \(images, 3072\) bytes": batch(data=np.zeros((7, 3072), np.int16)),
    r"no array of \(images, 3072\) bytes$": batch(data=np.zeros((3072, 7), np.uint8).T),
    "7 images and 6 labels": batch(labels=[1] * 6),
    "label of image 6 is 10": batch(labels=[1] * 6 + [10]),
    "too (large|big)": batch(labels=[1] * 6 + [10**5000]),
    "str": batch(labels="1234567"),
    "no attribute 'state'": batch(data=[1, 2, 3]),
    "no batch of CIFAR-10": pickle.dumps([1, 2, 3]),
}


@pytest.mark.parametrize("says", WRONG)
def test_damaged_python_batches(says, tmp_path):
    write_python(tmp_path, PARTS)
    (tmp_path / "test_batch").write_bytes(WRONG[says])
    refused(tmp_path, "test_batch", says)


# ---- pickles that would do something ----


class Call:
    """Pickles into a call of a function when it is read."""

    def __init__(self, function, *arguments) -> None:
        self.how = (function, arguments)

    def __reduce__(self):
        return self.how


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("within", ["labels", "data", "other"])
def test_nothing_in_a_python_batch_is_run(within, protocol, tmp_path):
    mark = tmp_path / "mark"
    images, labels = PARTS["test_batch"]
    content = {"data": images.reshape(-1, 3072), "labels": labels.tolist(), within: Call(os.mkdir, str(mark))}
    data = pickle.dumps(content, protocol=protocol)
    pickle.loads(data)
    mark.rmdir()  # so it would have been made
    folder = write_python(tmp_path / "c", PARTS)
    (folder / "test_batch").write_bytes(data)
    refused(folder, "test_batch", r"it asks for posix\.mkdir, which no batch of CIFAR-10 does; nothing of it was run")
    assert not mark.exists()


NAMED = [
    *("os.system", "builtins.eval", "builtins.getattr", "__builtin__.eval", "subprocess.Popen", "numpy.load"),
    *("numpy.fromfile", "numpy.core.multiarray.scalar", "numpy.core.multiarray.ndarray", "_codecs.decode"),
    *("copyreg._reconstructor", "copy_reg._reconstructor", "io.open", "numpy.dtype.__class__", "numpy.ndarray.tofile"),
]  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_names_that_no_batch_has(name, tmp_path):
    folder = write_python(tmp_path, PARTS)
    module, _, attribute = name.rpartition(".")
    for data in (
        b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"(U\x01xtR.",
        b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(attribute)])
        + attribute.encode() + b"\x93(\x8c\x01xtR.",
    ):  # fmt: skip
        (folder / "test_batch").write_bytes(data)
        refused(folder, "test_batch", f"it asks for {name.replace('.', '[.]')}")


ODD = {
    "a number of a persistent object": b"\x80\x02K\x01Q.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a string longer than the file": b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "state for a class": b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
    "attributes for a class": b"\x80\x02cnumpy\nndarray\nN}U\x01aK\x01s\x86b.",
    "an object of a class": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "arguments that no array has": b"\x80\x02cnumpy\nndarray\nK\x05\x85R.",
    "an empty stack": b"\x80\x02.",
    "a list inside itself": b"\x80\x02]q\x00h\x00a.",
    "no end": b"\x80\x02}",
    "another format": b"PK\x03\x04",
    "nothing": b"",
}


@pytest.mark.parametrize("what", ODD)
def test_odd_pickles(what, tmp_path):
    folder = write_python(tmp_path, PARTS)
    (folder / "test_batch").write_bytes(ODD[what])
    refused(folder, "test_batch", "no batch of CIFAR-10, or damaged")
    (folder / "test_batch").write_bytes(python2_batch(*PARTS["test_batch"]))
    assert_read(folder)  # and nothing is left of it


def test_a_batch_cannot_make_the_unpickler_take_memory_by_the_number_of_a_memo(tmp_path):
    folder = write_python(tmp_path, PARTS)
    (folder / "test_batch").write_bytes(b"\x80\x02}r" + (2**24).to_bytes(4, "little") + b".")
    refused(folder, "test_batch", "its memo is out of order")


# ---- fuzzing ----


@pytest.mark.parametrize("write, name", [
    (write_binary, "data_batch_1.bin"), (write_python, "data_batch_1"), (write_parquets, "test-00000-of-00001.parquet"),
])  # fmt: skip
def test_truncated_and_altered_files_give_images_or_one_clear_error(write, name, tmp_path, seed):
    if write is write_parquets:
        needs_parquet()
    folder = write(tmp_path, PARTS)
    path, rng, kinds = folder / name, random.Random(seed), set()
    whole = path.read_bytes()
    for trial in range(400):
        data = bytearray(whole)
        if trial % 4 == 0:
            del data[rng.randrange(len(data)) :]
        else:  # half of them among the first or last bytes, where the structure is
            places = (len(data), 400 if trial % 4 == 1 else len(data), 900)
            for _ in range(rng.choice((1, 1, 8))):
                data[rng.choice((0, -1)) * rng.randrange(1, places[trial % 3])] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            found = read_cifar10(folder)
        except LsquantError as error:
            kinds.add((type(error), name in str(error)))
        else:
            for images, labels in found.values():
                assert len(images) == len(labels) > 0
                assert labels.min() >= 0
                assert labels.max() <= 9
            kinds.add((dict, True))
    assert kinds == {(DamagedFile, True), (dict, True)}
