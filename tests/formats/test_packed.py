"""export_packed, load_packed, read_packed: the trained integers, dense, and back without the loss of a bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import lsquant
from helpers.checkpoint import RECIPES, assert_equal, everything, trained
from helpers.convert import Tied, images, net, ready
from helpers.packed import LAYERS
from helpers.random_nets import Net, random_input, trained_net
from lsquant import Quantizer, QuantSpec, Recipe, Rule
from lsquant._util.errors import DiskFull, LsquantError, MissingFile, UsageError
from lsquant.nn import quantizers
from lsquant.verification.verdict import different


def content(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


# ---- round trips ----


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed, tmp_path):
    model, path = trained_net(seed), tmp_path / "p.safetensors"
    lsquant.export_packed(model, path)
    other = lsquant.load_packed(Net(seed), path).eval()
    x = random_input(seed + 1, model.shape, 3)
    with torch.no_grad():
        assert not different(other(x).numpy(), model(x).numpy()).any()
    packed = lsquant.read_packed(path)
    weights = lsquant.integer_weights(model)
    assert {f"{name}.weight_quantizer" for name in weights} == {n for n, q in packed.quantizers.items() if q.weight}
    for name, (codes, step, _) in weights.items():
        stored = packed.quantizers[f"{name}.weight_quantizer"]
        assert torch.equal(stored.codes, codes)
        assert stored.codes.dtype == codes.dtype
        assert torch.equal(stored.step, step)
        assert torch.equal(stored.values, model.get_submodule(name).dequantized_weight())
    for name, q in quantizers(model):
        assert torch.equal(packed.quantizers[name].step, q.effective_step())
        zero_point, stored = q.zero_point(), packed.quantizers[name].zero_point
        assert (zero_point is None and stored is None) or torch.equal(zero_point, stored)


def assert_same(model: nn.Module, other: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        for x in inputs:
            assert torch.equal(other(x), model(x))
    mine, theirs = dict(quantizers(model)), dict(quantizers(other))
    assert list(mine) == list(theirs)
    for name, q in mine.items():
        o = theirs[name]
        assert (o.spec, o.requested, o.is_initialized) == (q.spec, q.requested, True)
        assert o.elements_per_step == q.elements_per_step
    assert lsquant.resolved_recipe(other) == lsquant.resolved_recipe(model)


@pytest.mark.parametrize("into", ["float", "prepared otherwise", "trained otherwise"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_and_what_is_loaded_into(name, into, tmp_path):
    model = trained(RECIPES[name])
    before = everything(model)
    assert lsquant.export_packed(model, tmp_path / "p") == tmp_path / "p"
    assert_equal(everything(model), before)
    other = trained(Recipe(6, 6)) if "trained" in into else net()
    if "prepared" in into:
        lsquant.prepare(other, Recipe(6, 6, [Rule("0", None, None)]))
    assert lsquant.load_packed(other, tmp_path / "p") is other
    assert_same(model, other.eval(), images(5), images(5) * 100)
    lsquant.export_packed(other, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "p").read_bytes()


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, bits, tmp_path):
    build, shape, granularity = LAYERS[name]
    spec = QuantSpec(bits, granularity=granularity, group_size=4 if granularity == "group" else None)
    model, x = nn.Sequential(build()), torch.randn(shape)
    ready(model, Recipe(spec, QuantSpec(bits, offset=True)), x).eval()
    lsquant.export_packed(model, tmp_path / "p")
    assert_same(model, lsquant.load_packed(nn.Sequential(build()), tmp_path / "p").eval(), x, x * 9)
    stored = lsquant.read_packed(tmp_path / "p").quantizers["0.weight_quantizer"]
    codes, step, _ = model[0].integer_weight()
    assert torch.equal(stored.codes, codes)
    assert stored.codes.shape == model[0].weight.shape
    assert torch.equal(stored.values, model[0].dequantized_weight())
    assert torch.equal(stored.step, step)
    assert lsquant.verify(model, tmp_path / "p", [x]).exact


@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
def test_embedding_tied_to_a_linear_layer(kind, tmp_path):
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(12, 8, padding_idx=0), nn.Linear(8, 12, bias=False)
            self.head.weight = self.words.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(x))

    model, x = Words(), torch.randint(12, (3, 5))
    spec = QuantSpec(4, granularity=kind, group_size=4 if kind == "group" else None)
    ready(model, Recipe(spec, 8), x).eval()
    lsquant.export_packed(model, tmp_path / "p")
    packed = lsquant.read_packed(tmp_path / "p")
    assert [n for n, q in packed.quantizers.items() if q.weight] == ["words.weight_quantizer"]
    assert packed.layers["head"]["weight"] == "words.weight_quantizer"
    assert packed.aliases["head.weight"] == "words.weight"
    other = lsquant.load_packed(Words(), tmp_path / "p").eval()
    assert other.head.weight is other.words.weight
    assert other.head.weight_quantizer is other.words.weight_quantizer
    assert_same(model, other, x)
    assert lsquant.verify(model, tmp_path / "p", [x]).exact


def test_modules_used_twice_and_the_root(tmp_path):
    shared = nn.Linear(4, 4)
    model = ready(nn.Sequential(shared, nn.ReLU(), shared), Recipe(3, 3), torch.randn(9, 4)).eval()
    lsquant.export_packed(model, tmp_path / "p")
    again = nn.Linear(4, 4)
    x = torch.randn(5, 4)
    assert_same(model, lsquant.load_packed(nn.Sequential(again, nn.ReLU(), again), tmp_path / "p"), x)
    model = ready(nn.Linear(4, 2), Recipe(4, 4), x).eval()
    lsquant.export_packed(model, tmp_path / "p")
    assert set(content(tmp_path / "p")) == {
        "bias", "weight_quantizer.codes", "weight_quantizer.step", "input_quantizer.step",
    }  # fmt: skip
    assert_same(model, lsquant.load_packed(nn.Linear(4, 2), tmp_path / "p"), x)


class UsedTwice(nn.Module):
    """One weight: in a layer, and by itself in floating point."""

    def __init__(self, first: str) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(4, 4))
        if first == "float":
            self.table = weight
        self.layer = nn.Linear(4, 4, bias=False)
        self.layer.weight = weight
        if first == "layer":
            self.table = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) @ self.table


@pytest.mark.parametrize("first", ["layer", "float"])
def test_a_weight_also_used_in_floating_point_stays_float(first, tmp_path):
    model, x = UsedTwice(first), torch.randn(7, 4)
    ready(model, Recipe(2, 4), x).eval()
    lsquant.export_packed(model, tmp_path / "p")
    other = lsquant.load_packed(UsedTwice(first), tmp_path / "p").eval()
    assert other.table is other.layer.weight
    assert_same(model, other, x)
    assert torch.equal(other.table, model.table)


def test_two_parameters_in_one_memory(tmp_path):
    model = Tied()
    model.two.weight = nn.Parameter(model.one.weight.data)  # not tied: two quantizers, two steps
    ready(model, Recipe(4, 4, [Rule("two", weight=2)]), torch.randn(9, 4)).eval()
    lsquant.export_packed(model, tmp_path / "p")
    fresh = Tied()
    fresh.two.weight = nn.Parameter(fresh.one.weight.data)
    assert_same(model, lsquant.load_packed(fresh, tmp_path / "p").eval(), torch.randn(5, 4))


def test_a_buffer_that_is_a_view_of_a_weight(tmp_path):
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        model.register_buffer("part", model[0].weight.data[:2])
        return model

    model, x = build(), torch.randn(5, 4)
    ready(model, Recipe(2, 4), x).eval()
    lsquant.export_packed(model, tmp_path / "p")
    other = lsquant.load_packed(build(), tmp_path / "p").eval()
    assert torch.equal(other.part, model.part)
    assert_same(model, other, x)


class Alone(nn.Module):
    """Quantizers of a custom layer, one per channel, one with groups, one with an offset."""

    def __init__(self, bits: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.weight_quantizer = Quantizer(QuantSpec(bits, granularity="group", group_size=2), (12,), count=2)
        self.input_quantizer = Quantizer(QuantSpec(4, granularity="channel"), (4,), axis=1, count=1)
        self.out = Quantizer(QuantSpec(4, offset=True), count=6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.input_quantizer(self.first(x))
        return self.out(y @ self.weight_quantizer(self.weight).t())


def test_quantizers_that_stand_alone(tmp_path):
    model, x = Alone(), torch.randn(9, 4)
    model.weight_quantizer.initialize(model.weight.detach())
    ready(model, Recipe(4, 4), x).eval()
    lsquant.export_packed(model, tmp_path / "p")
    packed = lsquant.read_packed(tmp_path / "p")
    assert torch.equal(packed.floats["weight"], model.weight)
    assert packed.quantizers["weight_quantizer"].codes is None
    assert packed.quantizers["input_quantizer"].axis == 1
    other = lsquant.load_packed(Alone(), tmp_path / "p").eval()
    assert_same(model, other, x, -x)
    assert lsquant.verify(model, tmp_path / "p", [x]).exact
    fresh = Alone(5)
    with pytest.raises(UsageError, match=r"weight_quantizer is 3 bit.* in the file and 5 bit.* in the model"):
        lsquant.load_packed(fresh, tmp_path / "p")
    assert type(fresh.first) is nn.Linear


def test_transformers_conv1d(tmp_path):
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model, x = nn.Sequential(Conv1D(6, 4)), torch.randn(3, 4)
    ready(model, Recipe(QuantSpec(3, granularity="channel"), 4), x).eval()
    lsquant.export_packed(model, tmp_path / "p")
    assert_same(model, lsquant.load_packed(nn.Sequential(Conv1D(6, 4)), tmp_path / "p").eval(), x)
    stored = lsquant.read_packed(tmp_path / "p").quantizers["0.weight_quantizer"]
    assert torch.equal(stored.values, model[0].dequantized_weight())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_low_precision(kind, tmp_path):
    model = trained().to(kind)
    lsquant.export_packed(model, tmp_path / "p")
    x = images(3).to(kind)
    assert_same(model, lsquant.load_packed(net().to(kind), tmp_path / "p").eval(), x)
    assert content(tmp_path / "p")["0.bias"].dtype == kind
    assert lsquant.verify(model, tmp_path / "p", [x]).exact


def test_a_step_below_the_guard_and_a_weight_step_too_small_for_half_precision(tmp_path):
    model = trained(Recipe(4, 4))
    with torch.no_grad():
        model[0].input_quantizer.step.fill_(-3.0)
        model[0].weight_quantizer.step.fill_(1e-9)
        model[0].weight_quantizer.initial_step.fill_(1e-9)
        model[0].weight.mul_(2e-8)
    lsquant.export_packed(model, tmp_path / "p")
    step = content(tmp_path / "p")["0.input_quantizer.step"]
    assert torch.equal(step, model[0].input_quantizer.initial_step / 1024)
    assert_same(model, lsquant.load_packed(net(), tmp_path / "p").eval(), images(3))
    fresh = net().half()
    before = everything(fresh)
    with pytest.raises(UsageError, match=r"0\.weight are too small or large for torch\.float16; use a float32 model"):
        lsquant.load_packed(fresh, tmp_path / "p")
    assert_equal(everything(fresh), before)


def test_names_that_look_like_patterns(tmp_path):
    def build() -> nn.Module:
        return nn.ModuleDict({"x+": nn.Linear(4, 3), "xx": nn.Linear(3, 2), "(x+)+$": nn.Linear(2, 2)})

    model = build()
    lsquant.prepare(model, Recipe(3, None, [Rule("xx", weight=5)]))
    other = lsquant.load_packed(build(), lsquant.export_packed(model, tmp_path / "p"))
    assert [q.spec.bits for _, q in quantizers(other)] == [3, 5, 3]
    assert lsquant.resolved_recipe(other) == lsquant.resolved_recipe(model)


def test_training_can_go_on(tmp_path):
    model = trained()
    lsquant.export_packed(model, tmp_path / "p")
    other = lsquant.load_packed(net(), tmp_path / "p").train()
    other(images(8)).square().mean().backward()
    assert all(p.grad is not None for p in other.parameters())
    assert {n: q.gradient_scale for n, q in quantizers(other)} == {n: q.gradient_scale for n, q in quantizers(model)}


# ---- refusals ----


def refused(says: str, model: nn.Module, path: Path, error: type[LsquantError] = UsageError) -> None:
    with pytest.raises(error, match=says):
        lsquant.export_packed(model, path)
    assert not list(path.parent.glob("*")) if path.parent.exists() else True


def test_what_cannot_be_packed(tmp_path):
    path = tmp_path / "p"
    refused(r"no quantized layer; call lsquant\.prepare", net(), path)
    model = net()
    lsquant.prepare(model, Recipe(4, 4))
    refused(r"0\.input_quantizer: this quantizer has no step yet.*calibrate", model, path)
    model = trained()
    with lsquant.disabled(model, "5"):
        refused(r"5\.weight_quantizer: this quantizer is switched off", model, path)
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    refused("NaN or infinite", model, path)
    model = trained()
    with torch.no_grad():
        model[0].input_quantizer.step.fill_(torch.inf)
    refused(r"0\.input_quantizer: a step is inf", model, path)
    words = nn.Sequential(nn.Embedding(4, 4, max_norm=1.0))
    lsquant.prepare(words, Recipe(4))
    refused("0: an Embedding with max_norm", words, path)
    refused("does not exist", trained(), tmp_path / "none" / "p", MissingFile)


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    lsquant.export_packed(trained(), tmp_path / "p")
    before = (tmp_path / "p").read_bytes()

    def full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lsquant._util.tensors.save_file", full)
    with pytest.raises(DiskFull):
        lsquant.export_packed(trained(Recipe(2, 2)), tmp_path / "p")
    assert (tmp_path / "p").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p"]


def test_files_of_another_kind(tmp_path):
    model = trained()
    lsquant.save(model, tmp_path / "saved")
    lsquant.export_packed(model, tmp_path / "packed")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "foreign")
    for name, says in (("saved", r"export_packed: read it with lsquant\.load"), ("foreign", r"export_packed$")):
        with pytest.raises(UsageError, match=says):
            lsquant.load_packed(net(), tmp_path / name)
    with pytest.raises(UsageError, match=r"packed file: use lsquant\.load_packed"):
        lsquant.load(net(), tmp_path / "packed")
    with pytest.raises(MissingFile, match="does not exist"):
        lsquant.read_packed(tmp_path / "none")


@pytest.mark.parametrize("other", [lambda: net()[:5], lambda: net().append(nn.Linear(3, 3)), lambda: nn.Linear(2, 2)])
def test_another_architecture(other, tmp_path):
    lsquant.export_packed(trained(), tmp_path / "p")
    model = other()
    before = everything(model)
    with pytest.raises(UsageError, match="another architecture"):
        lsquant.load_packed(model, tmp_path / "p")
    assert_equal(everything(model), before)


def test_metadata_is_text_only(tmp_path):
    lsquant.export_packed(trained(), tmp_path / "p")
    with safe_open(str(tmp_path / "p"), "pt") as file:
        assert set(file.metadata()) == {"lsquant.packed", "lsquant.checksum"}
