"""save and load: equal outputs without calibration, tied weights once, and what damage costs: nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import lsquant
from helpers.checkpoint import RECIPES, VARIED, assert_equal, everything, trained
from helpers.convert import Tied, images, net, ready
from lsquant import Recipe, Rule, checkpoint
from lsquant._util.errors import DamagedFile, DiskFull, LsquantError, MissingFile, UsageError
from lsquant.nn import quantizers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A trained model and its file; read only."""
    torch.manual_seed(0)
    model, path = trained(), tmp_path_factory.mktemp("saved") / "model.safetensors"
    lsquant.save(model, path)
    return model, path


# ---- round trips ----


@pytest.mark.parametrize("into", ["float", "prepared equally", "prepared otherwise", "calibrated otherwise"])
@pytest.mark.parametrize("name", RECIPES)
def test_equal_outputs_without_calibration(name, into, tmp_path):
    model = trained(RECIPES[name])
    lsquant.save(model, tmp_path / "m.safetensors")
    other = net()
    if into != "float":
        lsquant.prepare(other, RECIPES[name] if "equally" in into else Recipe(6, 6, [Rule("0", None, None)]))
    if "calibrated" in into:
        lsquant.calibrate(other, [images()])
    assert lsquant.load(other, tmp_path / "m.safetensors") is other
    x = images(5)
    assert torch.equal(other.eval()(x), model(x))
    assert_equal(everything(other), everything(model))
    assert other.load_state_dict(model.state_dict()).missing_keys == []


def test_training_goes_on_equally(saved):
    model, path = saved
    found, x = [], images(8)
    for other in (lsquant.load(net(), path), lsquant.load(net(), path)):
        other.train()
        other(x).square().mean().backward()
        found.append({name: p.grad for name, p in other.named_parameters()})
        assert {n: q.gradient_scale for n, q in quantizers(other)} == {
            n: q.gradient_scale for n, q in quantizers(model)
        }
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())
    assert all(grad is not None for grad in found[0].values())


def test_the_file(saved):
    model, path = saved
    with safe_open(str(path), "pt") as file:
        metadata, names = file.metadata(), set(file.keys())
    assert names == set(model.state_dict())
    assert metadata["lsquant.format"] == "1"
    assert Recipe.from_toml(metadata["lsquant.recipe"]) == lsquant.resolved_recipe(model)
    assert json.loads(metadata["lsquant.versions"])["lsquant"] == lsquant.__version__
    assert checkpoint.read_metadata(path) == metadata


def test_metadata_of_the_caller(tmp_path):
    model = trained()
    lsquant.save(model, tmp_path / "m", {"task": "digits", "lsquant.format": "99"})
    metadata = checkpoint.read_metadata(tmp_path / "m")
    assert (metadata["task"], metadata["lsquant.format"]) == ("digits", "1")
    lsquant.load(net(), tmp_path / "m")


def test_tied_weights_are_stored_once(tmp_path):
    model = ready(Tied(), Recipe(4, 4), torch.randn(9, 4))
    lsquant.save(model, tmp_path / "m")
    with safe_open(str(tmp_path / "m"), "pt") as file:
        names = set(file.keys())
        aliases = json.loads(file.metadata()["lsquant.aliases"])
    keys = ("step", "initial_step", "signed", "count", "initialized", "bounds")
    assert aliases == {"two.weight": "one.weight"} | {
        f"two.weight_quantizer.{key}": f"one.weight_quantizer.{key}" for key in keys
    }
    assert not names & set(aliases)
    other = lsquant.load(Tied(), tmp_path / "m")
    assert other.one.weight is other.two.weight
    x = torch.randn(5, 4)
    assert torch.equal(other(x), model(x))


def test_channels_last_and_low_precision(tmp_path):
    model = trained().to(memory_format=torch.channels_last)
    lsquant.save(model, tmp_path / "m")
    assert torch.equal(lsquant.load(net(), tmp_path / "m").eval()(images(3) * 0 + 1), model(images(3) * 0 + 1))
    model.bfloat16()
    lsquant.save(model, tmp_path / "m")
    other = lsquant.load(net().bfloat16(), tmp_path / "m").eval()
    x = images(3).bfloat16()
    assert torch.equal(other(x), model(x))
    assert other[5].weight_quantizer.step.dtype == torch.float32


# ---- state dicts ----


def test_a_state_dict_restores_sign_count_and_initialized():
    model, other = trained(), net()
    lsquant.prepare(other, VARIED)
    assert not other[5].input_quantizer.is_initialized
    other.load_state_dict(model.state_dict())
    assert_equal(everything(other), everything(model))
    q = other[5].input_quantizer
    assert (q.is_initialized, q.elements_per_step, q.spec.signed, q.q_max) == (True, 16, False, 31)


def test_a_float_checkpoint_loads_strictly_into_a_prepared_model():
    model, floats = trained(), net()
    with torch.no_grad():
        floats[5].weight.fill_(0.5)
        floats[0].weight.mul_(3.0)
    before = everything(model)
    parameters = dict(model.named_parameters())
    model.load_state_dict(floats.state_dict())
    after = everything(model)
    for name, q in quantizers(model):
        if "input" in name:
            assert after[name] == before[name]
            assert torch.equal(after[f"{name}.step"], before[f"{name}.step"])
            assert q.offset is None or torch.equal(after[f"{name}.offset"], before[f"{name}.offset"])
    assert torch.equal(model[5].dequantized_weight(), floats[5].weight)  # in groups: least squares, here without error
    want = 2 * floats[0].weight.abs().mean((1, 2, 3)) / 7**0.5
    assert torch.allclose(model[0].weight_quantizer.step, want, rtol=1e-6, atol=0)
    assert torch.equal(model[0].weight_quantizer.initial_step, model[0].weight_quantizer.step)
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_a_state_dict_with_half_a_quantizer_is_an_error():
    model = trained()
    broken = model.state_dict()
    del broken["5.input_quantizer.step"]
    with pytest.raises(RuntimeError, match=r"5\.input_quantizer\.step"):
        model.load_state_dict(broken)


# ---- refusals: one clear error, the model and the old file unchanged ----


def assert_refused(path: Path, error: type[LsquantError], says: str | None = None) -> None:
    for model in (net(), ready(net(), Recipe(6, 6), images())):
        before = everything(model)
        with pytest.raises(error, match=says) as caught:
            lsquant.load(model, path)
        assert str(path) in str(caught.value)
        assert_equal(everything(model), before)


def test_a_missing_file(tmp_path):
    assert_refused(tmp_path / "none.safetensors", MissingFile, "does not exist")
    assert_refused(tmp_path, UsageError, "is a folder")


def test_a_file_cut_at_any_length(saved, tmp_path):
    data, path = saved[1].read_bytes(), tmp_path / "cut"
    header = 8 + int.from_bytes(data[:8], "little")
    lengths = {*range(12), *range(12, header, header // 9), header, header + 1, *range(header, len(data), 997)}
    for length in sorted(lengths | {len(data) - 1}):
        path.write_bytes(data[:length])
        model = net()
        before = everything(model)
        with pytest.raises(DamagedFile, match="damaged or not a safetensors file"):
            lsquant.load(model, path)
        assert_equal(everything(model), before)
    path.write_bytes(data + b"x")
    assert_refused(path, DamagedFile)


def test_flipped_bits_are_noticed_wherever_they_are(saved, tmp_path):
    data, path = saved[1].read_bytes(), tmp_path / "flipped"
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(0, header, header // 97), *range(header, len(data), len(data) // 23)]
    model = net()
    before = everything(model)
    for number, place in enumerate(places):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (number % 8)
        path.write_bytes(damaged)
        with pytest.raises((DamagedFile, UsageError), match="flipped"):
            lsquant.load(model, path)
        assert_equal(everything(model), before)


def test_changed_bits_of_the_recipe_are_noticed(saved, tmp_path):
    """The nastiest flip: still a valid file and a valid recipe, but not the one that was trained."""
    data = saved[1].read_bytes()
    assert data.count(b"bits = 4") >= 1
    (tmp_path / "m").write_bytes(data.replace(b"bits = 4", b"bits = 5", 1))
    assert_refused(tmp_path / "m", DamagedFile, "damaged")


def test_a_foreign_file(tmp_path):
    safetensors.torch.save_file(net().state_dict(), tmp_path / "f")
    assert_refused(tmp_path / "f", UsageError, r"not written by lsquant\.save.*load_state_dict")
    (tmp_path / "f").write_bytes(b"PK\x03\x04 a zip file or something else" * 30)
    assert_refused(tmp_path / "f", DamagedFile)
    (tmp_path / "f").write_bytes(b"")
    assert_refused(tmp_path / "f", DamagedFile)


def test_a_newer_format(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", "2")
    lsquant.save(trained(), tmp_path / "m")
    monkeypatch.undo()
    assert_refused(tmp_path / "m", UsageError, "format 2; .*update lsquant")


class Wider(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*net()[:5], nn.Linear(16, 4))


@pytest.mark.parametrize(
    "other, says",
    [
        (Wider, r"5\.weight is \(3, 16\) in the file and \(4, 16\) in the model"),
        (lambda: net()[:5], r"the model lacks 5\.weight"),
        (lambda: net().append(nn.Linear(3, 3)), r"the file lacks 6\.weight"),
        (lambda: nn.Linear(2, 2), r"and \d+ more"),
    ],
)
def test_another_architecture(other, says, saved):
    model = other()
    before = everything(model)
    with pytest.raises(UsageError, match=rf"another architecture.*{says}") as caught:
        lsquant.load(model, saved[1])
    assert str(saved[1]) in str(caught.value)
    assert_equal(everything(model), before)


def test_equal_shapes_of_another_kind_of_layer(saved):
    class Mine(nn.Linear):
        pass

    model = net()
    model[5] = Mine(16, 3)
    before = everything(model)
    with pytest.raises(UsageError, match=r"the rule for '5' has no effect, 5 stays float: a subclass of Linear"):
        lsquant.load(model, saved[1])
    assert_equal(everything(model), before)


def test_a_float_model_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match=r"no quantized layer.*lsquant\.prepare"):
        lsquant.save(net(), tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_missing_folder(tmp_path):
    with pytest.raises(MissingFile, match="does not exist"):
        lsquant.save(trained(), tmp_path / "none" / "m")


def test_a_full_disk_keeps_the_old_file(saved, tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_bytes(saved[1].read_bytes())

    def full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lsquant._util.tensors.save_file", full)
    model = trained(Recipe(2, 2))
    before = everything(model)
    with pytest.raises(DiskFull, match=r"no space left .*old file"):
        lsquant.save(model, path)
    assert path.read_bytes() == saved[1].read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    assert_equal(everything(model), before)


def test_a_buffer_that_is_a_view_of_a_weight_is_saved(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))

    model, fresh = build(), build()
    model.register_buffer("part", model[0].weight.data[:2])
    fresh.register_buffer("part", torch.zeros(2, 4))
    lsquant.prepare(model, lsquant.Recipe.preset("w4a4"))
    lsquant.calibrate(model, [torch.randn(5, 4)])
    lsquant.save(model, tmp_path / "m.safetensors")
    lsquant.load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh.part, model.part)
