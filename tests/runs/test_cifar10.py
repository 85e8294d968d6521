"""The task cifar10: networks, augmentation, batches, and a run on made-up images from the command line to a verdict."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lsquant
from helpers.cifar_files import made_up, six_parts, write_binary
from helpers.report_pages import page_data
from lsquant._util.errors import MissingFile, UsageError
from lsquant.cli import main
from lsquant.tasks import get_task, load_float, open_run
from lsquant.tasks.cifar10 import Cifar10, crop_and_flip, normalized
from lsquant.tasks.resnet import DEPTHS

NETS = ("resnet20", "resnet32", "resnet44", "resnet56")
LAST = torch.channels_last


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """205 training and 41 test images that were made up."""
    parts = six_parts(38)
    return write_binary(tmp_path_factory.mktemp("made-up"), parts)


# ---- the networks ----


@pytest.mark.parametrize("name, accuracy", [
    ("resnet20", 91.73), *(pytest.param(name, accuracy, marks=pytest.mark.slow) for name, accuracy in
    (("resnet32", 92.63), ("resnet44", 93.10), ("resnet56", 93.39))),
])  # fmt: skip
def test_public_float_networks_have_their_accuracy_on_the_10_000_test_images(
    name, accuracy, cifar10_folder, data_folder
):
    task = get_task("cifar10", data=str(cifar10_folder), model=name)
    model = load_float(task.model(), data_folder / "checkpoints" / f"cifar10_{name}.safetensors")
    assert round(task.metric(model)["accuracy"], 2) == accuracy


@pytest.mark.parametrize("name", NETS)
def test_public_checkpoints_fit_strictly(name, data_folder):
    tensors = load_file(data_folder / "checkpoints" / f"cifar10_{name}.safetensors")
    model = get_task("cifar10", data="-", model=name).model()
    assert model.load_state_dict(tensors, strict=True).missing_keys == []
    assert len([m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]) == int(name[-2:]) - 1


def test_a_checkpoint_of_data_parallel_training(tmp_path):
    model = get_task("cifar10", data="-").model()
    state = {f"module.{key}": value.contiguous() for key, value in model.state_dict().items()}
    save_file(state, tmp_path / "f.safetensors", {"epoch": "200"})
    other = load_float(get_task("cifar10", data="-").model(), tmp_path / "f.safetensors")
    assert torch.equal(other.linear.weight, model.linear.weight)
    assert torch.equal(other.layer3[1].conv2.weight, model.layer3[1].conv2.weight)


def test_the_shortcut_halves_the_image_and_adds_channels_of_zeros():
    x = torch.randn(2, 16, 8, 8)
    y = Cifar10("-").model().layer2[0].shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    for c in range(32):
        for i in range(4):
            wanted = x[:, c - 8, 2 * i, 0:8:2] if 8 <= c < 24 else torch.zeros(2, 4)
            assert torch.equal(y[:, c, i], wanted)


def test_weights_and_images_are_in_channels_last(folder):
    task = Cifar10(str(folder), "resnet32")
    for weight in (m.weight for m in task.model().modules() if isinstance(m, torch.nn.Conv2d)):
        assert weight.is_contiguous(memory_format=LAST)
    for split in ("train", "calibration", "test"):
        for x, _ in task.batches(split, batch_size=50):
            assert x.is_contiguous(memory_format=LAST)
    assert task.example_input().is_contiguous(memory_format=LAST)
    assert set(task.architectures()) == set(DEPTHS) == set(NETS)
    assert len(task.architectures()["resnet44"]().layer1) == 7


# ---- images ----


def test_crops_and_flips_are_those_of_a_loop_over_images(seed):
    rng = random.Random(seed)
    x = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    crops = torch.tensor([[rng.randrange(9), rng.randrange(9)] for _ in range(36)] + [[0, 0], [8, 8], [0, 8], [4, 4]])
    flips = torch.tensor([rng.random() < 0.5 for _ in range(38)] + [True, False])
    got = crop_and_flip(x, crops, flips)
    assert got.dtype == torch.uint8
    for i in range(40):
        padded = np.zeros((3, 40, 40), np.uint8)
        padded[:, 4:36, 4:36] = x[i]
        top, left = crops[i].tolist()
        cut = padded[:, top : top + 32, left : left + 32]
        np.testing.assert_array_equal(got[i], cut[:, :, ::-1] if flips[i] else cut)
    assert torch.equal(got[39], x[39])


def test_pixels_are_scaled_by_the_statistics_of_imagenet():
    x = torch.tensor([0, 1, 128, 255], dtype=torch.uint8).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    y = normalized(x)
    assert y.dtype == torch.float32
    for c, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        wanted = [(p / 255 - mean) / std for p in (0, 1, 128, 255)]
        np.testing.assert_allclose(y[0, c].flatten(), wanted, rtol=1e-6, atol=1e-6)


def test_training_batches_are_augmented_images_each_once_an_epoch(folder):
    """An image is found again by its label and its middle, which every crop keeps."""
    task = Cifar10(str(folder))
    images, labels = task.data["train"]
    batches = list(task.batches("train", batch_size=64, seed=1, epoch=2))
    assert [len(y) for _, y in batches] == [64, 64, 64, 13]
    assert task.steps_per_epoch(64) == 4
    x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    clean = normalized(images)
    found, shifts, flipped = [], set(), 0
    for image, label in zip(x, y, strict=True):
        for top in range(9):
            for left in range(9):
                for flip in (False, True):
                    at = [slice(max(0, s - 4), 32 + min(0, s - 4)) for s in (top, left)]
                    to = [slice(max(0, 4 - s), 32 + min(0, 4 - s)) for s in (top, left)]
                    part = (image.flip(-1) if flip else image)[0, to[0], to[1]]
                    hit = torch.nonzero((clean[:, 0, at[0], at[1]][:, 8, 8:12] == part[8, 8:12]).all(-1)).flatten()
                    for i in hit.tolist():
                        if torch.equal(clean[i, 0, at[0], at[1]], part):
                            assert labels[i] == label
                            found.append(i)
                            shifts.add((top, left))
                            flipped += flip
    assert sorted(found) == list(range(205))
    assert len(shifts) > 60  # of 81
    assert 70 < flipped < 135


def test_calibration_batches_are_shuffled_training_images_and_test_batches_all_in_order(folder):
    task = Cifar10(str(folder))
    images, labels = task.data["train"]
    x, y = (torch.cat(parts) for parts in zip(*task.batches("calibration", batch_size=64, seed=3), strict=True))
    clean = normalized(images)
    order = [int(torch.nonzero((clean == image).flatten(1).all(1))) for image in x]
    assert sorted(order) == list(range(205))
    assert order != list(range(205))
    assert torch.equal(labels[order], y)
    x, y = (torch.cat(parts) for parts in zip(*task.batches("test", batch_size=10, seed=3), strict=True))
    assert torch.equal(x, normalized(task.data["test"][0]))
    assert torch.equal(y, task.data["test"][1])


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_the_same_seed_gives_the_same_batches_and_another_epoch_or_seed_others(split, folder):
    def first(**changes) -> torch.Tensor:
        options = {"batch_size": 32, "seed": 0, "epoch": 0} | changes
        return next(iter(Cifar10(str(folder)).batches(split, **options)))[0]

    assert torch.equal(first(), first())
    assert torch.equal(first(), first(batch_size=16 + 48)[:32])
    assert not torch.equal(first(), first(epoch=1))
    assert not torch.equal(first(), first(seed=1))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    first()
    assert torch.equal(before, torch.get_rng_state())


# ---- bits of the logits ----


@pytest.fixture(scope="module")
def quantized(folder: Path) -> torch.nn.Module:
    """ResNet-20 at 4 bits with random weights and running statistics of its own data, in channels_last."""
    task = Cifar10(str(folder))
    torch.manual_seed(0)
    model = task.model()
    batches = [x for x, _ in task.batches("train", batch_size=64)]
    for x in batches:
        model(x)
    lsquant.prepare(model, lsquant.Recipe.preset("w4a4"), example_inputs=task.example_input())
    lsquant.calibrate(model, batches)
    return model.eval()


def test_memory_format_batch_size_and_threads_change_no_bit_of_the_logits(quantized, folder, tmp_path):
    x = torch.cat([x for x, _ in Cifar10(str(folder)).batches("test", batch_size=41)])
    lsquant.save(quantized, tmp_path / "q.safetensors")
    plain = (
        lsquant.load(Cifar10(str(folder)).model(), tmp_path / "q.safetensors")
        .to(memory_format=torch.contiguous_format)
        .eval()
    )
    assert not plain.conv1.weight.is_contiguous(memory_format=LAST)
    threads = torch.get_num_threads()
    with torch.no_grad():
        wanted = quantized(x)
        assert len(wanted.unique()) > 300  # not all the same
        try:
            for number, sizes in ((1, (1, 7, 41)), (2, (7, 41)), (3, (41,))):
                torch.set_num_threads(number)
                for model in (quantized, plain):
                    for form in (torch.contiguous_format, LAST):
                        for size in sizes:
                            got = torch.cat([model(part.contiguous(memory_format=form)) for part in x.split(size)])
                            assert torch.equal(got, wanted), (number, model is plain, form, size)
        finally:
            torch.set_num_threads(threads)


# ---- what is refused ----


def test_wrong_options_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"no model 'resnet65': did you mean 'resnet56'.*; models: resnet20, resnet32"):
        get_task("cifar10", data="x", model="resnet65")
    with pytest.raises(UsageError, match="no model 'vgg'; models: resnet20"):
        get_task("cifar10", data="x", model="vgg")
    with pytest.raises(UsageError, match="needs --data DIR"):
        get_task("cifar10")
    with pytest.raises(UsageError, match="task 'cifar10' takes no depth; it takes data, model"):
        get_task("cifar10", depth=3)
    with pytest.raises(MissingFile, match="none of CIFAR-10 does not exist: --data DIR"):
        get_task("cifar10", data=str(tmp_path / "none")).metric(torch.nn.Identity())


# ---- the command line ----


def run(capsys, *arguments, code: int = 0) -> str:
    """What a command printed: on stdout, or where it failed on stderr."""
    assert main([str(a) for a in arguments]) == code, capsys.readouterr().err
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.out if code < 2 else printed.err


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[Path, Path]:
    """(run, float checkpoint) of a short training; read only."""
    where = tmp_path_factory.mktemp("runs")
    torch.manual_seed(3)
    model = Cifar10("-", "resnet20").model()
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, where / "float.safetensors")
    options = ["--weight-bits", "3", "--activation-bits", "4", "--epochs", "1", "--lr", "0.02", "--threads", "1"]
    arguments = ["--data", folder, "--init", where / "float.safetensors", *options, "--out", where / "a", "--quiet"]
    assert main(["train", "cifar10", *map(str, arguments)]) == 0
    return where / "a", where / "float.safetensors"


def test_train(started, folder):
    run_ = open_run(started[0])
    assert run_.task.name == "cifar10"
    assert run_.task.options == {"data": str(folder), "model": "resnet20"}
    assert run_.recipe == lsquant.Recipe.preset("w3a4")
    assert (run_.settings.batch_size, run_.settings.lr, run_.settings.weight_decay) == (128, 0.02, 1e-4)
    rows = [json.loads(line) for line in run_.file("log.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["epoch"], row["iteration"]) for row in rows] == [("lsq", 1, 2)]  # no float phase


def test_eval_of_a_run_of_a_float_checkpoint_and_of_saved_and_packed_models(started, folder, capsys):
    path, checkpoint = started
    metrics = json.loads((path / "metrics.json").read_text())
    task = ["--task", "cifar10", "--data", folder]
    assert json.loads(run(capsys, "eval", path, "--json")) == metrics["lsq"]
    assert json.loads(run(capsys, "eval", path / "model.safetensors", *task, "--json")) == metrics["lsq"]
    run(capsys, "export", path, "--profile", "packed")
    assert json.loads(run(capsys, "eval", path / "export/packed.safetensors", *task, "--json")) == metrics["lsq"]
    assert json.loads(run(capsys, "eval", checkpoint, *task, "--model", "resnet20", "--json")) == metrics["float"]
    assert metrics["float"] != metrics["lsq"]
    text = f"accuracy {metrics['float']['accuracy']:.2f} %, test_loss {metrics['float']['test_loss']:.4f}\n"
    assert run(capsys, "eval", checkpoint, *task) == text


def test_eval_refuses(started, folder, tmp_path, capsys):
    path, checkpoint = started
    task = ["--task", "cifar10", "--data", folder]
    for says, arguments, code in (
        ("needs --task TASK", [checkpoint], 2),
        ("another architecture", [checkpoint, *task, "--model", "resnet32"], 2),
        ("another architecture", [path / "model.safetensors", *task, "--model", "resnet32"], 2),
        ("no model 'resnet9'", [checkpoint, *task, "--model", "resnet9"], 2),
        ("needs --data", [checkpoint, "--task", "cifar10"], 2),
        ("is a run and brings its own model: leave out --task", [path, *task], 2),
        ("is a run and brings its own model", [path, "--model", "resnet20"], 2),
        ("none.safetensors does not exist", [tmp_path / "none.safetensors", *task], 3),
        ("is damaged", [Path(__file__), *task], 3),
        ("task 'digits' takes no data; it takes width", [checkpoint, "--task", "digits", "--data", folder], 2),
    ):
        assert says in run(capsys, "eval", *arguments, code=code)


def test_train_refuses_and_leaves_nothing(folder, tmp_path, capsys):
    out = ["--bits", "4", "--out", tmp_path / "r"]
    for says, arguments, code in (
        ("needs --data", ["cifar10"], 2),
        ("no model 'resnet18'", ["cifar10", "--data", folder, "--model", "resnet18"], 2),
        ("does not exist: --data DIR", ["cifar10", "--data", tmp_path / "none"], 3),
        ("has no CIFAR-10 in it", ["cifar10", "--data", tmp_path], 3),
        ("takes no data; it takes width", ["digits", "--data", folder], 2),
        ("takes no model", ["digits", "--model", "resnet20"], 2),
        ("takes no data: it brings its own", ["mine.py:task", "--data", folder], 2),
    ):
        assert says in run(capsys, "train", *arguments, *out, code=code)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_data_has_moved(folder, tmp_path, capsys):
    there, here = tmp_path / "there", tmp_path / "here now"
    write_binary(there, {name: made_up(5, i) for i, name in enumerate(six_parts())})
    path = tmp_path / "r"
    run(
        capsys,
        "train",
        "cifar10",
        "--data",
        there,
        "--bits",
        "4",
        "--float-epochs",
        "0",
        "--epochs",
        "1",
        "--out",
        path,
    )
    assert main(["export", str(path)]) == 0
    there.rename(here)
    for command in ("eval", "verify", "check"):
        assert f"{there} of CIFAR-10 does not exist: --data DIR" in run(capsys, command, path, code=3)
    accuracy = run(capsys, "eval", path, "--data", here)
    assert "outputs, bit for bit" in run(capsys, "verify", path, "--data", here)
    assert "findings" in run(capsys, "check", path, "--data", here, "--json")
    run(capsys, "report", path)
    (shown,) = page_data(path / "report.html")["runs"]
    assert [text for text in shown["missing"] if f"no activations: the folder {there} of CIFAR-10" in text]
    assert {row["kind"] for row in shown["quantizers"]} == {"weight"}
    run(capsys, "report", path, "--data", here)
    (shown,) = page_data(path / "report.html")["runs"]
    assert f"--data '{here}'" in shown["commands"][0]
    assert {row["kind"] for row in shown["quantizers"]} == {"weight", "input"}
    (path / "metrics.json").unlink()
    assert str(there) in run(capsys, "train", "--resume", "--out", path, code=3)
    run(capsys, "train", "--resume", "--out", path, "--data", here)
    assert run(capsys, "eval", path, "--data", here) == accuracy
    assert "model is 'resnet20', not 'resnet32'" in run(
        capsys, "train", "--resume", "--out", path, "--data", here, "--model", "resnet32", code=2
    )


def test_export_and_verify_are_exact_and_the_report_tells_the_command(started, folder, tmp_path, capsys):
    path, checkpoint = started
    file = tmp_path / "m.onnx"
    run(capsys, "export", path, "--out", file)
    verdict = json.loads(run(capsys, "verify", path, "--file", file, "--json"))
    assert (verdict["level"], verdict["exact"], verdict["samples"]) == ("outputs", True, 41)
    assert verdict["plain"]["level"] == "outputs"
    run(capsys, "report", path, "--out", tmp_path / "page.html")
    command = page_data(tmp_path / "page.html")["runs"][0]["commands"][0]
    assert f"lsquant train cifar10 --recipe {path}/recipe.toml --out DIR --epochs 1 --lr 0.02 --threads 1" in command
    assert f"--data {folder} --model resnet20 --init {checkpoint}" in command
