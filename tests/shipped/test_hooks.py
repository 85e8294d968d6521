"""Forward hooks: those that change values act in every form, those that only look are no obstacle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import lsquant
from helpers.every_form import WRITERS, assert_every_form_is_equal
from lsquant import Recipe, UsageError

pytest.importorskip("onnxruntime")
pytest.importorskip("torchao")


class Net(nn.Module):
    def __init__(self, hook: Callable[[Any], Any] = lambda model: None) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        hook(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(input=self.norm(self.one(x)).relu().amax((2, 3)))

    def doubled(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * 2


def in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    with torch.no_grad():
        output.clamp_(max=0.25)


CHANGING: dict[str, Callable[[Any], Any]] = {
    "output": lambda m: m.one.register_forward_hook(lambda module, args, y: y * 0.5 + 0.25),
    "output in place": lambda m: m.one.register_forward_hook(in_place),
    "input": lambda m: m.one.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "keyword": lambda m: m.two.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"input": kwargs["input"] - 0.5}), with_kwargs=True
    ),
    "with keywords": lambda m: m.two.register_forward_hook(
        lambda module, args, kwargs, y: y + kwargs["input"][:, :1], with_kwargs=True
    ),
    "method of the model": lambda m: m.two.register_forward_hook(m.doubled),
    "BatchNorm": lambda m: m.norm.register_forward_hook(lambda module, args, y: y - 0.125),
    "model": lambda m: m.register_forward_hook(lambda module, args, y: y.neg()),
}


@pytest.mark.parametrize("kind", CHANGING)
def test_hooks_that_change_values_act_in_every_form(kind: str, tmp_path: Path) -> None:
    model, x = Net(CHANGING[kind]), torch.randn(7, 2, 5, 5)
    plain = Net()
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model.eval()(x), plain.eval()(x))
    lsquant.prepare(model, Recipe(6, 6), example_inputs=x)
    lsquant.calibrate(model, [x])
    reads_input = kind == "with keywords"  # with torchao it is given the quantized input
    assert_every_form_is_equal(model, lambda: Net(CHANGING[kind]), x, tmp_path, torchao=not reads_input)


def swapped(module: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
    kwargs["input"] = kwargs["input"].clamp(max=0.25)


QUIET: dict[str, Callable[[Any], Any]] = {
    "in place": lambda m: m.one.register_forward_hook(in_place),
    "in place and returned": lambda m: m.one.register_forward_hook(lambda module, args, y: y.clamp_(max=0.25)),
    "exchanged in a container": lambda m: m.two.register_forward_pre_hook(swapped, with_kwargs=True),
}


@pytest.mark.parametrize("kind", QUIET)
def test_hooks_that_changed_nothing_in_the_example(kind: str, tmp_path: Path) -> None:
    """They write into a value all the same, so they are in the graph: other samples are changed."""
    onnxruntime = pytest.importorskip("onnxruntime")
    model, plain, x = Net(QUIET[kind]), Net(), torch.randn(64, 2, 5, 5) * 4
    with torch.no_grad():
        model.one.bias.clamp_(max=0.2)
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model.eval()(x), plain.eval()(x))
    assert torch.equal(model(x * 0), plain(x * 0))
    lsquant.prepare(model, Recipe(6, 6), example_inputs=x)
    lsquant.calibrate(model, [x])
    path = lsquant.export_onnx(model.eval(), tmp_path / "m.onnx", torch.zeros(3, 2, 5, 5))
    session = onnxruntime.InferenceSession(str(path))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.equal(torch.from_numpy(got), model(x).detach())


@pytest.mark.parametrize("side", ["weight", "input"])
@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "save"])
def test_a_hook_of_a_quantizer_is_refused(writer: str, side: str, tmp_path: Path) -> None:
    """Codes ship, so no form has it; where the other side is float it changes what the layer computes."""
    model, x = Net(), torch.randn(7, 2, 5, 5)
    lsquant.prepare(model, Recipe(4, None) if side == "weight" else Recipe(None, 4))
    lsquant.calibrate(model, [x])
    before = model.eval()(x)
    handle = getattr(model.one, f"{side}_quantizer").register_forward_hook(lambda module, args, y: y * 2)
    assert not torch.equal(model(x), before)
    with pytest.raises(UsageError, match=rf"one\.{side}_quantizer: this quantizer has a forward hook, .*remove\("):
        WRITERS[writer](model, tmp_path, x)
    handle.remove()
    WRITERS[writer](model, tmp_path, x)


def test_a_method_of_the_copy(tmp_path: Path) -> None:
    """A hook that is a method of the model belongs to the copy: training on does not reach what was made before."""

    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))
            self.one.register_forward_hook(self.scaled)

        def scaled(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output * self.scale

    model, x = Scaled(), torch.randn(7, 2, 5, 5)
    lsquant.prepare(model, Recipe(6, 6))
    lsquant.calibrate(model, [x])
    frozen, expected = lsquant.to_integer(model.eval()), model(x).detach()
    with torch.no_grad():
        model.scale.fill_(5.0)
    assert torch.equal(frozen(x), expected)
    assert not torch.equal(model(x), expected)


# ---- hooks that only look ----


def test_hooks_that_look_are_no_obstacle(tmp_path: Path) -> None:
    """They read values into Python, which no graph can hold, and one cannot be copied."""
    seen: list[float] = []

    class Log:
        def __init__(self, path: Path) -> None:
            self.file = path.open("w")

        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
            self.file.write(f"{output.mean().item()}\n")

    log = Log(tmp_path / "log.txt")

    def watch(model: Any) -> None:
        model.one.register_forward_hook(lambda module, args, y: seen.append(float(y.detach().numpy().max())))
        model.two.register_forward_pre_hook(
            lambda module, args, kwargs: seen.extend(kwargs["input"].flatten().tolist()), with_kwargs=True
        )
        model.norm.register_forward_hook(log)
        model.norm.register_forward_hook(lambda module, args, y: y)

    model, x = Net(watch), torch.randn(7, 2, 5, 5)
    lsquant.prepare(model, Recipe(6, 6), example_inputs=x)
    lsquant.calibrate(model, [x])
    model.eval()
    assert_every_form_is_equal(model, Net, x, tmp_path)
    log.file.close()
    assert all(type(value) is float for value in seen)
    assert len(model.one._forward_hooks) == len(model.two._forward_pre_hooks) == 1
    assert len(model.norm._forward_hooks) == 2


def test_a_graph_that_cannot_hold_a_hook_names_it(tmp_path: Path) -> None:
    def through_numpy(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return torch.from_numpy(output.detach().numpy() * 2)

    model, x = Net(lambda m: m.one.register_forward_hook(through_numpy)), torch.randn(7, 2, 5, 5)
    lsquant.prepare(model, Recipe(6, 6))
    lsquant.calibrate(model, [x])
    with pytest.raises(UsageError, match=r"torch cannot trace .*hooks that change values: .*through_numpy of one"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    assert torch.equal(lsquant.to_integer(model)(x), model.eval()(x))


def test_a_model_that_cannot_be_copied() -> None:
    class Opened(Net):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = (n for n in range(3))

    model, x = Opened(), torch.randn(7, 2, 5, 5)
    lsquant.prepare(model, Recipe(6, 6))
    lsquant.calibrate(model, [x])
    with pytest.raises(UsageError, match=r"Opened cannot be copied, TypeError: .*generator"):
        lsquant.to_integer(model)


# ---- hooks of the whole process ----


@pytest.fixture
def global_hook() -> Iterator[Any]:
    def doubled(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2 if isinstance(module, nn.Linear) else None

    handle = torch_module.register_module_forward_hook(doubled)
    yield handle
    handle.remove()


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "save"])
def test_a_global_hook_is_refused(writer: str, global_hook: Any, tmp_path: Path) -> None:
    model, x = Net(), torch.randn(7, 2, 5, 5)
    lsquant.prepare(model, Recipe(6, 6))
    lsquant.calibrate(model, [x])
    with pytest.raises(UsageError, match=r"a global forward hook, .*doubled, may change .*handle\.remove\(\)"):
        WRITERS[writer](model, tmp_path, x)
    global_hook.remove()
    WRITERS[writer](model.eval(), tmp_path, x)


def test_global_hooks_of_torch_are_its_own_affair(tmp_path: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Net(), torch.randn(7, 2, 5, 5)
    lsquant.prepare(model, Recipe(6, 6))
    lsquant.calibrate(model, [x])
    with FlopCounterMode(display=False):
        assert torch_module._global_forward_pre_hooks
        lsquant.export_packed(model, tmp_path / "m.packed")
