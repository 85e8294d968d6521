"""Whole networks, traced: the same bits as before in every use, and the same object."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
from helpers.traceable import (
    C2f,
    Classifier,
    Detector,
    InvertedResidual,
    Residual,
    SqueezeExcite,
    assert_equal_runs,
    run,
    traced,
)
from lsquant.tasks.resnet import CifarResNet, cifar_resnet

IMAGES = torch.linspace(-9, 9, 2 * 3 * 256).cos().reshape(2, 3, 16, 16)
MORE = torch.cat((IMAGES, IMAGES.flip(0) + 0.5, -IMAGES))
BUILD: dict[str, Any] = {
    "residual": lambda: Classifier(Residual),
    "squeeze and excite": lambda: Classifier(SqueezeExcite),
    "inverted residual": lambda: Classifier(InvertedResidual),
    "detector": Detector,
    "resnet8": lambda: CifarResNet(1),
}
MODULES = {
    "residual": ["avg_pool", "flatten", "block.relu", "block.dropout", "block.add", "block.relu_2"],
    "squeeze and excite": ["avg_pool", "flatten", "block.hardswish", "block.avg_pool", "block.silu", "block.sigmoid",
                           "block.mul"],
    "inverted residual": ["avg_pool", "flatten", "block.relu6", "block.clip", "block.add"],
}  # fmt: skip


@pytest.mark.parametrize("name", BUILD)
def test_same_bits(name):
    """Outputs, gradients, buffers and random numbers, in both modes, for batches of other sizes too."""
    model = BUILD[name]()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    model, plain, result = traced(model, IMAGES)
    assert_equal_runs(model, plain, IMAGES, MORE, IMAGES[:1])
    if name in MODULES:
        assert list(result.modules) == MODULES[name]
    assert result.modules.keys() <= dict(model.named_modules()).keys()
    assert not result.untraced
    assert list(model.state_dict()) == keys
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert [type(m).__name__ for m in plain.modules()] == [
        type(m).__name__ for n, m in model.named_modules() if n not in result.modules
    ]


def test_names_of_resnet20():
    result = lsquant.trace(cifar_resnet("resnet20"), IMAGES)
    assert len(result) == 12
    assert len(result.modules) == 33
    assert [n for n in result.modules if n.startswith("layer2.0")] == [
        "layer2.0.relu", "layer2.0.add", "layer2.0.relu_2", "layer2.0.shortcut.slice", "layer2.0.shortcut.pad",
    ]  # fmt: skip
    assert str(result).splitlines()[2].split() == ["layer1.0", "BasicBlock", "relu,", "add,", "relu_2"]
    assert str(result).splitlines()[-1] == "12 blocks traced, 33 modules inserted"


def test_the_forward_calls_the_new_modules():
    """The values that reach ``add`` are those added, so that a quantizer there would see them."""
    model, seen = Classifier(), []
    lsquant.trace(model, IMAGES)
    model.block.add.register_forward_hook(lambda m, args, out: seen.append((*args, out)))
    model.block.register_forward_hook(lambda m, args, out: seen.append(out))
    model.eval()(MORE)
    (a, b, total), out = seen
    assert torch.equal(a + b, total)
    assert torch.equal(total.relu(), out)


def test_the_object_stays_what_it_was():
    model = Classifier().eval()
    model.block.train()
    block, kept, order = model.block, [], []
    block.register_forward_hook(lambda m, args, out: order.append("hook"))
    block.note = kept
    lsquant.trace(model, IMAGES)
    assert model.block is block
    assert isinstance(block, Residual)
    assert isinstance(model, Classifier)
    assert not model.training
    assert block.training
    assert block.add.training
    assert not model.flatten.training
    assert type(block).__qualname__ == "Residual"
    assert type(block).__module__ == Residual.__module__
    assert type(block).forward is not Residual.forward
    assert block.note is kept
    before = len(order)
    model(IMAGES)
    assert len(order) == before + 1


def test_a_second_trace_changes_nothing():
    model, _, _ = traced(Detector(), IMAGES)
    types = [type(m) for m in model.modules()]
    again = lsquant.trace(model, IMAGES)
    assert len(again) == 0
    assert [type(m) for m in model.modules()] == types
    assert str(again) == "0 blocks traced, 0 modules inserted"


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_traced(name, how, tmp_path: Path):
    model, plain, result = traced(BUILD[name](), IMAGES)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "torch.save":
        torch.save(model, tmp_path / "m.pt")
        other = torch.load(tmp_path / "m.pt", weights_only=False)
    else:
        other = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert not {id(m) for m in other.modules()} & {id(m) for m in model.modules()}
    calls = []
    other.get_submodule(list(result.modules)[-1]).register_forward_hook(lambda *_: calls.append(1))
    assert_equal_runs(other, plain, MORE)
    assert calls
    assert len(lsquant.trace(other, IMAGES)) == 0


def test_a_pickle_is_read_by_another_process(tmp_path: Path):
    """Nothing that only the tracing process knows is in the file."""
    import subprocess
    import sys

    model = CifarResNet(1).eval()
    lsquant.trace(model, IMAGES)
    torch.save(model, tmp_path / "m.pt")
    code = (
        "import sys, torch; m = torch.load(sys.argv[1], weights_only=False); import lsquant\n"
        "assert isinstance(m.layer1[0].add, lsquant.nn.Add)\n"
        "x = torch.linspace(-9, 9, 2 * 3 * 256).cos().reshape(2, 3, 16, 16)\n"
        "torch.set_num_threads(1); torch.save(m(x), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "m.pt", tmp_path / "y.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(IMAGES))


@pytest.mark.parametrize("name", ["residual", "detector"])
def test_compiled_and_exported(name):
    """torch.compile takes the whole graph; torch.export keeps the size of the batch free."""
    model, plain, _ = traced(BUILD[name](), IMAGES)
    model.eval(), plain.eval()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(MORE), plain(MORE))
    torch.compiler.reset()
    shape = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (IMAGES,), dynamic_shapes=shape, strict=False)
    assert torch.equal(program.module()(MORE), plain(MORE))


@pytest.mark.parametrize("name", [name for name in BUILD if name != "detector"])
def test_traced_by_torch_fx_in_turn(name):
    """The checks of sizes do not stand in the way of plain torch.fx, for blocks without lists as arguments."""
    model, plain, result = traced(BUILD[name]().eval(), IMAGES)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return type(m).__module__.startswith("lsquant.nn.") or super().is_leaf_module(m, module_qualified_name)

    graph = Tracer().trace(model)
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    assert result.modules.keys() <= called
    assert torch.equal(torch.fx.GraphModule(model, graph)(MORE), plain.eval()(MORE))


def test_replicas_of_data_parallel():
    """What DataParallel makes of a module: an object of its class with copied attributes."""
    model, plain, _ = traced(Residual().eval(), torch.randn(2, 4, 6, 6))
    replica = model._replicate_for_data_parallel()  # type: ignore[operator]
    replica._modules.update(model._modules)
    for name, parameter in model.named_parameters(recurse=False):
        setattr(replica, name, parameter)
    x = torch.randn(3, 4, 6, 6)
    assert type(replica) is type(model)
    assert torch.equal(replica(x), plain(x))


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch is without torch.distributed")
def test_distributed_data_parallel(tmp_path: Path):
    model, plain, _ = traced(Classifier(Residual), IMAGES)
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        one = run(nn.parallel.DistributedDataParallel(model), MORE, True)
    finally:
        torch.distributed.destroy_process_group()
    two = run(plain, MORE, True)
    for (name, tensor), other in zip(one.items(), two.values(), strict=True):
        assert torch.equal(tensor, other), name


# ---- with the rest of the library ----


def quantized(model: nn.Module) -> nn.Module:
    lsquant.prepare(model, lsquant.Recipe.preset("w4a4"), IMAGES)
    lsquant.calibrate(model, [IMAGES])
    return model


@pytest.mark.parametrize("name", ["residual", "inverted residual", "resnet8", "detector"])
def test_quantized_alike(name, tmp_path: Path):
    """Prepared, calibrated, trained, saved, loaded, as integers: the bits of the untraced network."""
    model, plain, _ = traced(BUILD[name](), IMAGES)
    if name in ("residual", "inverted residual"):  # average pooling by function is not torch's own after prepare
        plain.get_submodule("")  # the traced one computes it in a fixed order: compare in training mode only
        modes = (True,)
    else:
        modes = (False, True)
    quantized(model), quantized(plain)
    assert list(model.state_dict()) == list(plain.state_dict())
    for training in modes:
        one, two = run(model, MORE, training), run(plain, MORE, training)
        assert list(one) == list(two)
        assert all(torch.equal(one[k], two[k]) for k in one)
    lsquant.save(model, tmp_path / "m.safetensors")
    fresh, fresh_traced = BUILD[name](), BUILD[name]()
    lsquant.trace(fresh_traced, IMAGES)
    for one in (fresh, fresh_traced):
        lsquant.load(one, tmp_path / "m.safetensors")
    assert torch.equal(run(fresh_traced, MORE, False)["output 0"], run(model, MORE, False)["output 0"])
    assert torch.equal(run(fresh, MORE, True)["output 0"], run(model, MORE, True)["output 0"])
    integers = lsquant.to_integer(model)
    assert torch.equal(integers(MORE), model.eval()(MORE))
    assert lsquant.verify(model, integers, [MORE]).exact
    lsquant.revert(model)
    assert lsquant.trace(model, IMAGES) == ()


def test_exported_alike(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    model, plain, _ = traced(CifarResNet(1), IMAGES)
    sessions = []
    for name, one in (("traced", model), ("plain", plain)):
        quantized(one)
        lsquant.export_onnx(one, tmp_path / f"{name}.onnx", IMAGES)
        verdict = lsquant.verify(one, tmp_path / f"{name}.onnx", [MORE])
        assert verdict.exact
        sessions.append(lsquant.onnx_session(tmp_path / f"{name}.onnx"))
    (one,), (two,) = (s.run(None, {s.get_inputs()[0].name: MORE.numpy()}) for s in sessions)
    assert (one == two).all()


def test_a_prepared_network_can_be_traced():
    model = quantized(Classifier())
    plain = copy.deepcopy(model)
    result = lsquant.trace(model, IMAGES)
    assert list(result.modules) == MODULES["residual"]
    assert torch.equal(run(model, MORE, True)["output 0"], run(plain, MORE, True)["output 0"])


def test_rules_name_the_new_layers():
    """A layer that stood as a function takes bits by its new name, and trains."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.kernel).relu()

    model = nn.Sequential(Own(), nn.Conv2d(4, 2, 1))
    lsquant.trace(model, IMAGES)
    lsquant.prepare(model, lsquant.Recipe(4, 4, rules=[lsquant.Rule("0.conv", weight=2)]), IMAGES)
    lsquant.calibrate(model, [IMAGES])
    model(MORE).sum().backward()
    assert model[0].conv.weight_quantizer.spec.bits == 2
    assert model[0].kernel.grad is not None


# ---- networks of other libraries ----


def test_transformers_resnet():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5
    )
    model, plain, result = traced(transformers.ResNetForImageClassification(config), {"pixel_values": MORE})
    stages = "resnet.encoder.stages"
    names = [f"{stages}.0.layers.0.add", f"{stages}.1.layers.0.add", f"{stages}.1.layers.1.add"]
    assert list(result.modules) == names
    assert_equal_runs(model, plain, {"pixel_values": MORE}, {"pixel_values": IMAGES})
    assert type(model) is transformers.ResNetForImageClassification


def test_transformers_mobilenet():
    """Its padding is computed from the size of the image: another size is refused, another batch is not."""
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=4)
    x = {"pixel_values": torch.randn(3, 3, 32, 32)}
    model, plain, result = traced(transformers.MobileNetV2ForImageClassification(config), x)
    assert isinstance(model.mobilenet_v2.layer[1].add, lsquant.nn.Add)
    assert len(result.modules) == 63
    assert_equal_runs(model, plain, x, {"pixel_values": torch.randn(5, 3, 32, 32)})
    with pytest.raises(lsquant.UsageError, match=r"first_conv.*modeling_mobilenet_v2.py:\d+.*48, but was 32"):
        model(torch.randn(3, 3, 48, 48))


def test_modules_of_torch_are_left_alone():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), C2fIn(), nn.MultiheadAttention(8, 2))
    model[2] = nn.Identity()
    x = torch.randn(3, 2, 8)
    result = lsquant.trace(model, x)
    assert [row.name for row in result] == ["1"]
    assert type(model[0]) is nn.TransformerEncoderLayer


class C2fIn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + x.relu()


def test_a_subclass_of_a_layer_and_of_a_container():
    """A layer with its own forward keeps its attribute ``weight``; a container with its own forward is a block."""

    class SamePadded(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.pad(x, (0, 1, 0, 1))
            return nn.functional.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    class Skip(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + super().forward(x)

    model = Skip(SamePadded(3, 3, 2, stride=1), C2f(3, 3 + 1, 1), nn.Conv2d(4, 3, 1))
    weight = model[0].weight
    model, plain, result = traced(model, IMAGES)
    assert isinstance(model, Skip)
    assert isinstance(model[0], SamePadded)
    assert model[0].weight is weight
    assert [new for _, new in result.renamed] == ["0.conv.weight", "0.conv.bias"]
    assert {"add", "0.pad", "0.conv", "1.cat"} <= result.modules.keys()
    x = MORE
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert torch.equal(model.train()(x), plain.train()(x))
    changes = lsquant.prepare(model, lsquant.Recipe(4, None), x)
    assert "0" not in [row.name for row in changes]
    assert model[0].conv.weight_quantizer is not None


def test_the_random_generator_stays() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    state = torch.get_rng_state()
    lsquant.trace(model, torch.ones(3, 4))
    assert torch.equal(torch.get_rng_state(), state)
