"""Which tensors of a network are stored, which share a quantizer, and which a step."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule, UsageError
from lsquant.nn import Add, Cat, QuantAdd, QuantConv2d
from lsquant.tied import TiedQuantizer


class Block(nn.Module):
    """A residual block with an addition in its forward."""

    def __init__(self, c: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()
        self.blocks = nn.Sequential(Block(4), Block(4))
        self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.blocks(self.relu(self.stem(x))))))


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(5))


def traced() -> Any:
    torch.manual_seed(3)
    model = Net().eval()
    lsquant.trace(model, images())
    return model


def joined(preset: str = "w4a4") -> Any:
    model = traced()
    lsquant.prepare(model, Recipe.preset(preset, integer_only=True), example_inputs=images())
    lsquant.calibrate(model, [images(16)])
    return model


def test_a_tensor_has_one_quantizer_for_all_who_read_it_at_its_bits() -> None:
    model = joined("w4a8")
    first, second = model.blocks[0], model.blocks[1]
    assert isinstance(first.add, QuantAdd)
    assert first.conv1.input_quantizer is first.add.input_quantizers[1]
    assert second.conv1.input_quantizer is second.add.input_quantizers[1]
    assert first.conv1.input_quantizer is not second.conv1.input_quantizer
    assert first.conv1.stored_quantizer is None
    assert first.conv1.input_quantizer.spec == QuantSpec(8, signed=False)
    assert len(model.pool.input_quantizers) == 1


def test_a_reader_of_fewer_bits_has_a_quantizer_behind_that_of_the_tensor() -> None:
    model = joined("w4a4")
    block = model.blocks[0]
    assert block.conv1.stored_quantizer is block.add.input_quantizers[1]
    assert (block.conv1.stored_quantizer.spec.bits, block.conv1.input_quantizer.spec.bits) == (8, 4)
    assert block.conv2.stored_quantizer is None  # nobody else reads what it reads
    x = torch.relu(torch.randn(2, 4, 6, 6))
    twice = block.conv1.input_quantizer(block.conv1.stored_quantizer(x))
    plain = copy.deepcopy(block.conv1)
    plain.stored_quantizer = None
    assert torch.equal(block.conv1(x), plain(twice))
    assert not torch.equal(block.conv1(x), plain(x))


def test_operands_of_an_addition_have_one_step_and_signs_of_their_own() -> None:
    model = joined("w4a8")
    tied, owner = model.blocks[0].add.input_quantizers
    assert isinstance(tied, TiedQuantizer)
    assert not isinstance(owner, TiedQuantizer)
    assert tied.owner is owner
    assert tied.step is owner.step
    assert (tied.spec.signed, owner.spec.signed) == (True, False)
    assert (tied.q_min, tied.q_max, owner.q_min, owner.q_max) == (-128, 127, 0, 255)
    assert tied.gradient_scale == owner.gradient_scale == pytest.approx((144 * 255) ** -0.5)
    keys = [key for key in model.state_dict() if key.startswith("blocks.0.add.input_quantizers.0.")]
    assert keys == ["blocks.0.add.input_quantizers.0.signed", "blocks.0.add.input_quantizers.0.bounds"]
    with torch.no_grad():
        owner.step.fill_(1e-9)  # below the guard, which the tied one has too
    assert float(tied.effective_step().detach()) == float(owner.effective_step().detach()) > 1e-9


def test_ties_reach_as_far_as_additions_and_concatenations_do() -> None:
    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.add, self.add_2, self.cat, self.end = Add(), Add(), Cat(1), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            return self.end(self.cat(self.add(a, b), self.add_2(b, self.c(x))))

    model: Any = Far()
    lsquant.prepare(model, Recipe(4, 8, joins=8), example_inputs=images())
    lsquant.calibrate(model, [images(8)])
    steps = {id(q.step) for q in (*model.add.input_quantizers, *model.add_2.input_quantizers)}
    assert len(steps) == 1  # b is an operand of both
    assert model.add.input_quantizers[1] is model.add_2.input_quantizers[0]
    assert len(model.cat.input_quantizers) == 1
    assert model.cat.input_quantizers[0] is model.end.input_quantizer  # what moves only has one step and one sign
    assert id(model.cat.input_quantizers[0].step) not in steps
    assert model.a.input_quantizer is model.b.input_quantizer is model.c.input_quantizer


def test_calibration_takes_the_owners_values() -> None:
    model = traced()
    lsquant.prepare(model, Recipe.preset("w4a8", integer_only=True), example_inputs=images())
    seen: list[Tensor] = []
    hook = model.relu.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    lsquant.calibrate(model, [images(16)])
    hook.remove()
    alone = lsquant.Quantizer(QuantSpec(8), count=1)
    alone.initialize(seen[-1])
    tied, owner = model.blocks[0].add.input_quantizers
    assert owner.step.item() == pytest.approx(alone.step.item(), rel=1e-6)
    assert (tied.elements_per_step, owner.elements_per_step) == (144, 144)


def test_every_parameter_is_in_one_group_once_and_learns() -> None:
    model = joined()
    groups = lsquant.param_groups(model, lr=0.01)
    listed = [p for group in groups for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(model.parameters()))
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    model(images(8)).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters() if name.endswith("step"))


@pytest.mark.parametrize("preset", ["w4a8", "w2a4"])
def test_saved_loaded_copied_reverted(preset: str, tmp_path: Path) -> None:
    model, x = joined(preset), images()
    wanted = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), wanted)
        assert twin.blocks[0].add.input_quantizers[0].owner is twin.blocks[0].add.input_quantizers[1]
    lsquant.save(model, tmp_path / "m")
    loaded = lsquant.load(traced(), tmp_path / "m")
    assert torch.equal(loaded(x), wanted)
    assert lsquant.resolved_recipe(loaded) == lsquant.resolved_recipe(model)
    lsquant.export_packed(model, tmp_path / "p")
    packed: Any = lsquant.load_packed(traced(), tmp_path / "p")
    assert torch.equal(packed(x), wanted)
    assert packed.blocks[0].add.input_quantizers[0].owner is packed.blocks[0].add.input_quantizers[1]
    state = model.state_dict()
    prepared = traced()
    lsquant.prepare(prepared, Recipe.preset(preset, integer_only=True), example_inputs=x)
    prepared.load_state_dict(state)
    assert torch.equal(prepared(x), wanted)
    lsquant.revert(model)
    assert not list(lsquant.quantizers(model))
    assert type(model.blocks[0].add) is Add
    assert list(model.state_dict()) == list(traced().state_dict())


def steps_of(model: Any) -> dict[str, float]:
    """Name of a convolution -> the step of its input."""
    found: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, QuantConv2d)}
    return {name: layer.input_quantizer.step.item() for name, layer in found.items()}


def test_prepared_again_without_joins_every_layer_has_a_step_of_its_own() -> None:
    model, x = joined("w4a8"), images()
    steps = steps_of(model)
    lsquant.prepare(model, Recipe.preset("w4a8"), example_inputs=x, steps="rescale")
    own = [m.input_quantizer for m in model.modules() if isinstance(m, QuantConv2d)]
    assert len({id(q) for q in own}) == len(own)
    assert not any(isinstance(q, TiedQuantizer) for q in own)
    assert steps == steps_of(model)
    assert type(model.blocks[0].add) is Add
    lsquant.prepare(model, Recipe.preset("w4a8", integer_only=True), example_inputs=x)
    assert model.blocks[0].conv1.input_quantizer is model.blocks[0].add.input_quantizers[1]


def test_shipped_as_trained_without_being_fused(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, x = joined("w4a4"), images()
    assert torch.equal(lsquant.to_integer(model)(x), model(x))
    lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    assert lsquant.verify(model, tmp_path / "m.onnx", [x, images(7)]).exact
    lsquant.export_packed(model, tmp_path / "p")
    assert lsquant.verify(model, tmp_path / "p", [x]).exact


def test_recipes_keep_joins(tmp_path: Path) -> None:
    recipe = Recipe(4, 4, [Rule("first", 8, 8)], joins=8)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert "joins" not in Recipe(4, 4).to_toml()
    assert Recipe.preset("w4a8", integer_only=True).joins == QuantSpec(8)
    shifted = Recipe(4, 4, joins=QuantSpec(8, offset=True))
    assert Recipe.from_toml(shifted.to_toml()) == shifted
    signed, channels = QuantSpec(8, signed=True), QuantSpec(8, granularity="channel")
    for wrong in (9, "8", signed, channels, True):
        with pytest.raises(UsageError, match=r"joins=|activation="):
            Recipe(4, 4, joins=wrong)
    with pytest.raises(UsageError, match=r"integer_only='yes'; it must be True or False"):
        Recipe.preset("w4a8", integer_only="yes")  # type: ignore[arg-type]


def test_a_forward_that_branches_on_values_is_refused_and_nothing_has_changed() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.sum() > 0 else self.b(x)

    model, x = Branch(), torch.ones(2, 4)
    with pytest.raises(UsageError, match=r"cannot be followed in Branch .*call lsquant.trace\(model, example_inputs\)"):
        lsquant.prepare(model, Recipe(4, 4, joins=8), example_inputs=x)
    assert type(model.a) is nn.Linear
    model2: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(UsageError, match=r"layer '0': the step of a stored tensor is float32, not float16"):
        lsquant.prepare(model2, Recipe(4, QuantSpec(8, step_dtype="float16"), joins=8), example_inputs=x)
    assert type(model2[0]) is nn.Linear


def test_a_tied_quantizer_needs_an_owner_of_one_step() -> None:
    owner = lsquant.Quantizer(QuantSpec(8), (3,), axis=0, count=1)
    for wrong in (owner, lsquant.Quantizer(QuantSpec(8, offset=True), count=1)):
        with pytest.raises(UsageError, match="the owner must have one step, no offset"):
            TiedQuantizer(QuantSpec(8), wrong)


def test_types_and_devices_leave_steps_float32() -> None:
    model = joined().to(torch.bfloat16)
    tied = model.blocks[0].add.input_quantizers[0]
    assert tied.step.dtype == torch.float32
    assert model(images().to(torch.bfloat16)).dtype == torch.bfloat16
