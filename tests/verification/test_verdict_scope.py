"""What a verdict has compared: outputs in all containers, inputs in all forms, layers that no batch or output needs."""

from __future__ import annotations

import collections
import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.verify import onnx
from lsquant import QuantSpec, Recipe
from lsquant._util.errors import ForwardError, UsageError

pytest.importorskip("onnxruntime")


@dataclasses.dataclass
class Out:
    logits: Tensor
    hidden: Any = None
    loss: Tensor | None = None


Named = collections.namedtuple("Named", ["first", "second"])


def model_output(y: Tensor, z: Tensor) -> Any:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    return outputs.BaseModelOutput(last_hidden_state=y, hidden_states=(z, z * 2))


def in_itself(y: Tensor, z: Tensor) -> Any:
    found: list[Any] = [y, {"z": z}]
    found.append(found)
    return found


CONTAINERS: dict[str, tuple[Any, int]] = {  # and how many tensors are found in it
    "tensor": (lambda y, z: y, 1),
    "dataclass": (lambda y, z: Out(y), 1),
    "dataclass in a dataclass": (lambda y, z: Out(y, Out(z, [None, {"last": y * 2}])), 3),
    "mapping with None": (lambda y, z: {"a": None, "b": [y, (z,)], 3: 4}, 2),
    "named tuple": (Named, 2),
    "namespace": (lambda y, z: SimpleNamespace(y=y, more=SimpleNamespace(z=z)), 2),
    "ModelOutput": (model_output, 3),
    "a list in itself": (in_itself, 2),
    "one tensor twice": (lambda y, z: (y, y), 2),
}


class Net(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.body, self.head, self.make, self.shift = nn.Linear(6, 8), nn.Linear(8, 3), make, 0.0

    def forward(self, x: Tensor) -> Any:
        z = torch.relu(self.body(x))
        return self.make(self.head(z) + self.shift, z)


def ready(model: nn.Module, batch: Any, recipe: Recipe | None = None) -> Any:
    lsquant.prepare(model, recipe or Recipe(4, 4))
    lsquant.calibrate(model, [batch])
    return model.eval()


@pytest.mark.parametrize("container", CONTAINERS)
def test_outputs_are_found_in_every_container(container: str, tmp_path: Path) -> None:
    make, count = CONTAINERS[container]
    x = torch.randn(16, 6)
    model = ready(Net(make), x)
    lsquant.export_packed(model, tmp_path / "m.packed")
    lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    for file in (tmp_path / "m.packed", tmp_path / "m.onnx", lsquant.to_integer(model)):
        verdict = lsquant.verify(model, file, [x])
        assert verdict.exact
        assert verdict.checks[-1].parts == count
        assert verdict.checks[-1].compared >= 16 * 3
    model.shift = 100.0
    for file in (tmp_path / "m.onnx", _shifted(model)):
        verdict = lsquant.verify(model, file, [x])
        assert verdict.level == "codes"
        assert verdict.checks[-1].mismatches >= 16 * 3
        assert verdict.checks[-1].largest in (pytest.approx(100, rel=1e-3), pytest.approx(200, rel=1e-3))


def _shifted(model: Any) -> nn.Module:
    twin: Any = lsquant.to_integer(model)
    twin.shift = 0.0
    return twin


class Opaque:
    def __init__(self, y: Tensor) -> None:
        self.y = y


def test_without_an_output_there_is_no_such_level(tmp_path: Path) -> None:
    x = torch.randn(16, 6)
    model = ready(Net(lambda y, z: Opaque(y)), x)
    lsquant.export_packed(model, tmp_path / "m.packed")
    verdict = lsquant.verify(model, tmp_path / "m.packed", [x])
    assert verdict.level == "codes"
    assert not verdict.exact
    assert verdict.checks[-1].compared == 0
    assert "no outputs were compared: no tensor is found in what the model returns, a Opaque" in str(verdict)
    assert verdict.to_dict()["statements"]
    with pytest.raises(UsageError, match="no tensor is found in what the model returns, a Opaque"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)


def test_batches_without_samples_reach_no_level_beyond_the_weights(tmp_path: Path) -> None:
    x = torch.randn(16, 6)
    model = ready(Net(lambda y, z: y), x)
    lsquant.export_packed(model, tmp_path / "m.packed")
    verdict = lsquant.verify(model, tmp_path / "m.packed", [x[:0]])
    assert verdict.level == "weights"
    assert "nothing was compared: the batches hold no samples" in str(verdict)


def test_weights_alone_have_no_codes_to_compare(tmp_path: Path) -> None:
    x = torch.randn(16, 6)
    model = Net(lambda y, z: y).eval()
    lsquant.prepare(model, Recipe(4, None))
    lsquant.export_packed(model, tmp_path / "m.packed")
    verdict = lsquant.verify(model, tmp_path / "m.packed", [x])
    assert verdict.level == "outputs"
    assert [check.compared for check in verdict.checks if "codes, " in check.what] == [0, 0]


# ---- layers that are not in the graph ----


class Branches(nn.Module):
    """``aux`` is called, or not, and then of use, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head, self.way = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3), "used"

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.body(x))
        z = self.aux(y) if self.way != "left out" else y
        return self.head(y if self.way != "used" else z)


@pytest.mark.parametrize("way", ["left out", "of no use"])
def test_layers_that_no_output_needs_are_listed(way: str, tmp_path: Path) -> None:
    x = torch.randn(16, 6)
    model = ready(Branches(), x)
    model.way = way
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    assert not any("aux" in tensor.name for tensor in onnx.load(path).graph.initializer)
    verdict = lsquant.verify(model, path, [x])
    assert verdict.exact
    assert verdict.not_compared == ("aux",)
    assert "not compared, for no batch or no output of the file needs them: layers 'aux'" in str(verdict)


def test_a_layer_that_the_file_lacks_and_an_output_needs_is_a_mismatch(tmp_path: Path) -> None:
    x = torch.randn(16, 6)
    model = ready(Branches(), x)
    model.way = "left out"
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    model.way = "used"
    verdict = lsquant.verify(model, path, [x])
    assert verdict.level == "weights"
    assert verdict.checks[2].worst == "aux"


def test_a_layer_that_only_the_file_has_is_of_another_model(tmp_path: Path) -> None:
    x = torch.randn(16, 6)
    path = lsquant.export_onnx(ready(Branches(), x), tmp_path / "m.onnx", x)
    with pytest.raises(UsageError, match="another model: only the file has a layer 'aux'"):
        lsquant.verify(ready(Net(lambda y, z: y), x), path, [x])


# ---- what a verdict below outputs says ----


class Float(nn.Module):
    """Two layers, and a float part before, between or behind them."""

    def __init__(self, part: nn.Module, where: str) -> None:
        super().__init__()
        self.part, self.where = part, where
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.part(x) if self.where == "before" else x
        x = self.first(x)
        x = self.part(x) + 1 if self.where == "between" else x
        x = self.last(x)
        return self.part(x) * 2 if self.where == "behind" else x


@pytest.mark.parametrize(
    "where, said",
    [("before", "before layer 'first'"), ("between", "before layer 'last'"), ("behind", "after layer 'last'")],
)
@pytest.mark.parametrize("part, operator", [(nn.Softmax(-1), "Softmax"), (nn.LayerNorm(64), "LayerNormalization")])
def test_the_float_part_that_differs_first_is_named(
    part: nn.Module, operator: str, where: str, said: str, tmp_path: Path
) -> None:
    x = torch.randn(256, 64)
    model = ready(Float(copy.deepcopy(part), where), x, Recipe(8, 8))
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    verdict = lsquant.verify(model, path, [x])
    statements = [s for s in verdict.statements() if s.startswith("float parts that differ first: ")]
    if where == "behind":
        assert verdict.checks[-1].mismatches > 0, "equal by chance: the test is of no use"
    if verdict.exact:
        assert not statements
        return
    assert len(statements) == 1
    assert f"{operator} (part/{operator})" in statements[0]
    assert said in statements[0]
    for exact in ("Add", "Mul"):
        assert f"{exact} (" not in statements[0]


def test_a_changed_float_part_is_found(tmp_path: Path) -> None:
    """An addition rounds once everywhere, but this one adds something else."""
    x = torch.randn(32, 6)
    model = ready(Net(lambda y, z: y), x)
    model.shift = 1.0
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    model.shift = 1.5
    assert "float parts that differ first: Add (Add), after layer 'head'" in str(lsquant.verify(model, path, [x]))
    verdict = lsquant.verify(model, _shifted(model), [x])
    assert "float parts that differ first: those after layer 'head'" in str(verdict)


def test_a_file_of_another_training_says_so(tmp_path: Path) -> None:
    x = torch.randn(32, 6)
    model = ready(Net(lambda y, z: y), x)
    paths = [lsquant.export_onnx(model, tmp_path / "m.onnx", x), lsquant.export_packed(model, tmp_path / "m.packed")]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    for path in paths:
        verdict = lsquant.verify(model, path, [x])
        assert verdict.level == "none"
        assert "the file holds other trained values: exported from another state of this network?" in str(verdict)


def test_a_damaged_value_is_no_other_training(tmp_path: Path) -> None:
    x = torch.randn(32, 6)
    model = ready(nn.Sequential(*[nn.Linear(6, 6) for _ in range(4)]), x)
    path = lsquant.export_packed(model, tmp_path / "m.packed")
    with torch.no_grad():
        model[1].weight[0, 0] += 10 * model[1].weight_quantizer.step[0]
    verdict = lsquant.verify(model, path, [x])
    assert verdict.level == "none"
    assert "other trained values" not in str(verdict)


def test_codes_of_minus_zero_are_zero(tmp_path: Path) -> None:
    """LSQ+ with z = 0: small negative values round to -0.0, which is the code 0."""
    x = torch.rand(64, 4) - 0.02
    model = ready(nn.Sequential(nn.Linear(4, 3)), x, Recipe(4, QuantSpec(4, offset=True)))
    model[0].input_quantizer.offset.data.fill_(-1e-3)
    assert int(model[0].input_quantizer.zero_point()) == 0
    step = float(model[0].input_quantizer.step.detach())
    assert bool(((x < 0) & (x > -step / 2)).any()), "the test is of no use"
    for file in (
        lsquant.export_packed(model, tmp_path / "m.packed"),
        lsquant.export_onnx(model, tmp_path / "m.onnx", x),
        lsquant.to_integer(model),
    ):
        assert lsquant.verify(model, file, [x]).exact


# ---- inputs ----


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 8)

    def forward(self, batch: Any, scale: Tensor | None = None) -> Tensor:
        y = self.a(batch["image"]) - self.b(batch["meta"][0])
        return y if scale is None else y * scale


def test_nested_inputs_are_one_thing_everywhere(tmp_path: Path) -> None:
    """prepare, calibrate, export, verify, check and the report; keys in another order mean the same."""
    image, meta, scale = torch.randn(8, 4), torch.rand(8, 4), torch.rand(8, 8)
    batch = {"batch": {"image": image, "meta": [meta]}, "scale": scale}
    turned = {"scale": scale, "batch": {"meta": [meta], "image": image}}
    model = Nested()
    lsquant.prepare(model, Recipe(4, 4), example_inputs=batch)
    lsquant.calibrate(model, [batch])
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", batch)
    assert {v.name for v in onnx.load(path).graph.input} == {"batch_image", "batch_meta_0", "scale"}
    for given in (batch, turned):
        assert lsquant.verify(model, path, [given]).exact
    for given in (batch, turned):
        assert lsquant.verify(model, path, [given], forward=lambda m, b: m(b["batch"], b["scale"])).exact
    assert lsquant.check(model, batches=[turned]) is not None
    lsquant.export_vectors(model, tmp_path / "v.npz", turned)
    lsquant.write_report(model, tmp_path / "r.html", [turned])


def test_a_file_with_other_inputs_says_which(tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    batch = {"batch": {"image": x, "meta": [x]}}
    model = ready(Nested(), batch)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", batch)
    with pytest.raises(UsageError, match=r"takes the inputs .*batch_image.*; the model was given 3 tensors"):
        lsquant.verify(model, path, [batch | {"scale": torch.rand(8, 8)}])


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.float())


def test_what_the_runtime_refuses_is_told_with_the_batch(tmp_path: Path) -> None:
    x = torch.randn(8, 4)
    model = ready(Casting(), x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    with pytest.raises(UsageError, match=r"ONNX Runtime cannot run .* on this batch \(x \[8, 4\] float64\)"):
        lsquant.verify(model, path, [x.double()])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(3, 8)

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        return self.a(image) + self.b(meta)


def test_a_tuple_for_two_arguments_names_them(tmp_path: Path) -> None:
    image, meta = torch.randn(4, 4), torch.randn(4, 3)
    words = r"Two\.forward does not take this batch.*'meta'.*only the first element.*image, meta"
    model = Two()
    with pytest.raises(UsageError, match=words):
        lsquant.prepare(model, Recipe(4, 4), example_inputs=(image, meta))
    model = ready(Two(), {"image": image, "meta": meta})
    for call in (
        lambda: lsquant.calibrate(model, [(image, meta)]),
        lambda: lsquant.export_onnx(model, tmp_path / "m.onnx", (image, meta)),
        lambda: lsquant.verify(model, lsquant.to_integer(model), [(image, meta)]),
        lambda: lsquant.check(model, batches=[(image, meta)]),
        lambda: lsquant.write_report(model, tmp_path / "r", [(image, meta)]),
        lambda: lsquant.sensitivity(model, [(image, meta)], lambda y, _: 0.0),
        lambda: lsquant.export_vectors(model, tmp_path / "v", (image, meta)),
    ):
        with pytest.raises(UsageError, match=words):
            call()


class Raises(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.a, self.error = nn.Linear(4, 4), error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [TypeError("no int"), KeyError("x"), RuntimeError("shapes 3 and 4\nmore")], ids=repr)
def test_a_failing_forward_is_told_with_its_batch(error: Exception) -> None:
    model = Raises(error)
    with pytest.raises(ForwardError, match=rf"forward pass of Raises failed.*\[2, 4\].*{type(error).__name__}") as told:
        lsquant.prepare(model, Recipe(4, 4), example_inputs=torch.randn(2, 4))
    assert told.value.__cause__ is error
    assert isinstance(told.value, (RuntimeError, UsageError))


def test_memory_that_runs_out_is_no_mistake_of_the_batch() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        lsquant.prepare(Raises(torch.OutOfMemoryError("none")), Recipe(4, 4), example_inputs=torch.randn(2, 4))
