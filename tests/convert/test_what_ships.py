"""What `prepare` says it will not be able to ship, layers that come after it, and values that files hold or refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.every_form import WRITERS
from lsquant import QuantSpec, Recipe, Rule, UsageError
from lsquant.nn import QUANTIZED_TYPES

pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")

# ---- what has no form ----

KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(8, 6), (3, 8)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 2), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 2), (2, 4, 6, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 2), (2, 4, 4, 5, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 2), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 2), (2, 4, 5, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 2, 4)),
    "Embedding": (lambda: nn.Embedding(10, 8), (3, 5)),
    "Embedding with max_norm": (lambda: nn.Embedding(10, 8, max_norm=1.0), (3, 5)),
}
PER_CHANNEL = QuantSpec(4, granularity="channel")


def test_all_kinds_are_tried() -> None:
    assert {t.__name__ for t in QUANTIZED_TYPES} <= set(KINDS)


@pytest.mark.parametrize("group_size", [None, 2, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_what_has_no_form_is_what_raises(kind: str, group_size: int | None, tmp_path: Path) -> None:
    make, shape = KINDS[kind]
    model = nn.Sequential(make())
    if group_size and kind not in ("Linear", "Conv2d", "Embedding"):
        pytest.skip("no groups there")
    x = torch.randint(10, shape) if "Embedding" in kind else torch.randn(shape)
    spec = QuantSpec(4, granularity="group", group_size=group_size) if group_size else PER_CHANNEL
    (change,) = changes = lsquant.prepare(model, Recipe(spec, 4))
    lsquant.calibrate(model, [x])
    refused = set()
    for name in ("to_integer", "export_packed", "export_onnx", "to_torchao"):
        try:
            WRITERS[name](model, tmp_path, x)
        except UsageError:
            refused.add(name)
    assert {name.partition("(")[0] for name in change.unwritten} == refused
    for name in change.unwritten:
        assert f"{name} has no form for 0; leave" in str(changes)
    assert str(changes).count("has no form") == len(change.unwritten)


def test_a_float_layer_needs_no_form() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(4, 4, 1))
    changes = lsquant.prepare(model, Recipe(4, 4, [Rule("0", None, None)]))
    assert [c.unwritten for c in changes] == [(), ("to_torchao",)]
    assert "to_torchao has no form for 1; leave" in str(changes)


# ---- a weight that is used twice ----


class UsedTwice(nn.Module):
    """A layer whose weight a function multiplies with as well, unquantized, as in many language models."""

    def __init__(self, how: str = "product") -> None:
        super().__init__()
        self.one, self.two, self.how = nn.Linear(6, 6), nn.Linear(6, 6), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.two(self.one(x).relu())
        if self.how == "product":
            return nn.functional.linear(y, self.one.weight)
        return y / self.one.weight.norm() if self.how == "norm" else y.to(self.one.weight.dtype)


@pytest.mark.parametrize("how", ["product", "norm"])
def test_a_weight_that_a_function_uses_as_well(how: str, tmp_path: Path) -> None:
    """One place would see the rounded weight and the other the float one: the layer stays float, and all forms ship."""
    model, x = UsedTwice(how).eval(), torch.randn(5, 6)
    changes = lsquant.prepare(model, Recipe(3, 3), example_inputs=x)
    lsquant.calibrate(model, [x])
    rows = {c.name: c for c in changes}
    assert (rows["one"].weight, rows["two"].weight != "float") == ("float", True)
    assert "without calling the layer" in rows["one"].reason
    assert torch.equal(lsquant.to_integer(model)(x), model(x))
    lsquant.export_packed(model, tmp_path / "packed")
    assert torch.equal(lsquant.load_packed(UsedTwice(how).eval(), tmp_path / "packed")(x), model(x))


def test_a_weight_whose_type_is_read() -> None:
    model, x = UsedTwice("type"), torch.randn(5, 6)
    assert not any(c.unwritten for c in lsquant.prepare(model, Recipe(3, 3), example_inputs=x))
    lsquant.calibrate(model, [x])
    assert torch.equal(lsquant.to_integer(model)(x), model.eval()(x))


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "save"])
def test_one_weight_quantizer_for_two_weights(writer: str, tmp_path: Path) -> None:
    """The same steps for both are trained, but a record has the codes of one weight."""
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(5, 6)
    lsquant.prepare(model, Recipe(3, 3))
    lsquant.calibrate(model, [x])
    model[2].weight_quantizer = model[0].weight_quantizer
    with pytest.raises(UsageError, match="2: its weight_quantizer is that of '0', whose weight is another one"):
        WRITERS[writer](model, tmp_path, x)
    model[2].weight_quantizer = None
    lsquant.prepare(model, Recipe(3, 3))
    WRITERS[writer](model, tmp_path, x)


# ---- layers that come after prepare ----


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.skipped, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.skipped(self.stem(x).relu()))


RECIPE = Recipe(4, 4, [Rule("skipped", None, None)])


def ready() -> tuple[Net, Tensor]:
    model, x = Net(), torch.randn(9, 4)
    lsquant.prepare(model, RECIPE)
    lsquant.calibrate(model, [x])
    return model.eval(), x


def later(model: nn.Module) -> list[str]:
    return [f.where for f in lsquant.check(model) if f.code == "added_later"]


def test_layers_replaced_and_added_after_prepare_are_found() -> None:
    model, _ = ready()
    assert later(model) == []
    model.head = nn.Linear(8, 5)
    model.extra = nn.Sequential(nn.Conv1d(2, 2, 1))
    assert later(model) == ["head", "extra.0"]
    (head,) = [f for f in lsquant.check(model) if f.where == "head"]
    assert (head.severity, head.evidence["weights"]) == ("warning", 40)
    assert "call lsquant.prepare(model, recipe) again" in head.remedy
    step = model.stem.weight_quantizer.step.detach().clone()
    lsquant.prepare(model, RECIPE)  # the remedy
    assert later(model) == []
    assert torch.equal(model.stem.weight_quantizer.step, step)
    assert type(model.head).__name__ == "QuantLinear"


@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer_tells_of_them(writer: str, tmp_path: Path) -> None:
    model, x = ready()
    WRITERS[writer](model, tmp_path, x)
    model.head = nn.Linear(8, 5)
    with pytest.warns(UserWarning, match=r"'head': put into the model after lsquant\.prepare, so not quantized"):
        WRITERS[writer](model, tmp_path, x)


def test_copies_files_and_parts_know_what_was_prepared(tmp_path: Path) -> None:
    import copy
    import pickle

    model, _ = ready()
    lsquant.save(model, tmp_path / "m")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), lsquant.load(Net(), tmp_path / "m")):
        assert later(other) == []
        other.head = nn.Linear(8, 3)
        assert later(other) == ["head"]
    whole = nn.Sequential(nn.Linear(4, 4), ready()[0])  # only a part was prepared
    assert later(whole) == []
    whole[1].stem = nn.Linear(4, 8)
    assert later(whole) == ["1.stem"]
    lsquant.revert(model)
    assert not any("seen_by_prepare" in vars(m) for m in model.modules())


def test_a_resized_language_model_head() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    batch = {"input_ids": torch.randint(40, (8, 6))}
    lsquant.prepare(model, Recipe(4, 8), example_inputs=batch)
    lsquant.calibrate(model, [batch])
    assert later(model) == []
    model.resize_token_embeddings(48, mean_resizing=False)
    assert later(model) == ["lm_head"]  # the table keeps its object, and has one step


# ---- views of one memory, and values that are no tensors ----


class Views(nn.Module):
    """A 1x1 convolution and a Linear on one memory, and a buffer that is a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 8, 1), nn.Linear(4, 8)
        self.linear.weight = nn.Parameter(self.conv.weight.view(8, 4))
        self.register_buffer("part", self.conv.weight.detach()[2:4])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean((2, 3))[:, :4]) + self.part.sum()


def test_views_of_one_memory_are_saved(tmp_path: Path) -> None:
    model, x = Views(), torch.randn(5, 4, 3, 3)
    lsquant.prepare(model, Recipe(PER_CHANNEL, 4))
    lsquant.calibrate(model, [x])
    expected = model.eval()(x).detach()
    lsquant.save(model, tmp_path / "m")
    lsquant.export_packed(model, tmp_path / "p")
    for other in (lsquant.load(Views(), tmp_path / "m"), lsquant.load_packed(Views(), tmp_path / "p")):
        assert torch.equal(other.eval()(x), expected)
        assert other.linear.weight.data_ptr() == other.conv.weight.data_ptr()
    assert torch.equal(lsquant.to_integer(model)(x), expected)
    assert lsquant.verify(model, tmp_path / "p", [x]).exact


class Extra(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.layer, self.value = nn.Linear(4, 3), value

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def get_extra_state(self) -> Any:
        return self.value

    def set_extra_state(self, state: Any) -> None:
        self.value = state


@pytest.mark.parametrize("writer", ["save", "export_packed"])
def test_extra_state_is_saved_as_a_tensor_or_refused(writer: str, tmp_path: Path) -> None:
    x = torch.randn(5, 4)
    for value in ({"n": 1}, 3, None, "text"):
        model = nn.Sequential(Extra(value))
        lsquant.prepare(model, Recipe(4, 4))
        lsquant.calibrate(model, [x])
        says = rf"module '0' keeps a {type(value).__name__} in its state dict \('0\._extra_state'\).*let its get_extra"
        with pytest.raises(UsageError, match=says):
            WRITERS[writer](model, tmp_path, x)
        assert torch.equal(lsquant.to_integer(model)(x), model.eval()(x))
    model = nn.Sequential(Extra(torch.tensor([1, 2])))
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [x])
    WRITERS[writer](model, tmp_path, x)
    fresh = nn.Sequential(Extra(torch.tensor([0, 0])))
    (lsquant.load if writer == "save" else lsquant.load_packed)(fresh, next(tmp_path.iterdir()))
    assert fresh[0].value.tolist() == [1, 2]
    assert torch.equal(fresh(x), model(x))
