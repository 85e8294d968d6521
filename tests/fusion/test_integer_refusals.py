"""Networks on which the integer-only form was wrong, slow or failed in another library's words: found by a review."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import Recipe, UsageError, reference_integer
from lsquant.nn import Add, Cat, Chunk, Mul, Slice

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ready(model: nn.Module, x: Any = X, weight: int = 8) -> lsquant.FusedNetwork:
    lsquant.prepare(model.eval(), Recipe(weight, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    return lsquant.fuse(model).eval()


def exact(network: lsquant.FusedNetwork, folder: Path, *batches: Any, program: bool = True) -> None:
    """Both forms and, where it has one, the program give the trained bits."""
    paths = [lsquant.export_program(network, folder / "p.safetensors")] if program else []
    for form in ("qdq", "qoperator"):
        path = folder / f"{form}.onnx"
        paths.append(lsquant.export_onnx(network, path, batches[0], profile="integer", form=form))
    for path in paths:
        verdict = lsquant.verify(network, path, list(batches))
        assert verdict.exact, f"{path.name}\n{verdict}"


def test_a_norm_over_another_dimension_than_the_features_is_refused() -> None:
    x = torch.randn(8, 6, 3)
    for features in (6, 8):
        model = nn.Sequential(nn.Linear(3, features), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(features, 8))
        network = ready(model, x)
        with pytest.raises(UsageError, match=r"0: the BatchNorm behind this QuantLinear normalizes another dimension"):
            network(x)


def test_inputs_without_a_batch_are_refused() -> None:
    x = torch.randn(3, 8, 8)
    network = ready(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)), x)
    with pytest.raises(UsageError, match=r"0: QuantConv2d is given \(3, 8, 8\), without a batch"):
        network(x)
    network = ready(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(3))
    with pytest.raises(UsageError, match=r"0: QuantLinear is given \(3,\), without a batch"):
        network(torch.randn(3))


def test_a_network_whose_model_was_prepared_again_says_so_everywhere(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    network = ready(model)
    lsquant.prepare(model, Recipe(2, 8, joins=8), example_inputs=X)
    calls: list[Any] = [
        network.constants, network.stored_steps, lambda: network.codes(X), lambda: network(X),
        lambda: lsquant.export_program(network, tmp_path / "p"),
        lambda: lsquant.export_onnx(network, tmp_path / "m", X, profile="integer"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(UsageError, match="prepared or reverted after fuse"):
            call()
    lsquant.revert(model)
    for call in calls:
        with pytest.raises(UsageError, match="prepared or reverted after fuse"):
            call()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "middle",
    [
        nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.ReflectionPad2d(1), nn.PReLU(), nn.GroupNorm(2, 4),
        nn.Sequential(nn.ReLU(), nn.Hardtanh(0.1, 0.5)), nn.BatchNorm2d(4),
    ],
)  # fmt: skip
def test_steps_in_floating_point_between_layers(middle: nn.Module, tmp_path: Path) -> None:
    """Their results are stored again; everything but GroupNorm rounds alike everywhere."""
    network = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), middle, nn.Conv2d(4, 2, 2)))
    assert network.changes([X]).stored
    if isinstance(middle, nn.GroupNorm):
        lsquant.verify(network, lsquant.export_onnx(network, tmp_path / "m", X, profile="integer"), [X])
    else:
        exact(network, tmp_path, X, X[:1], program=False)


class Shared(nn.Module):
    """The input and the output of a function have one step."""

    def __init__(self, function: nn.Module, join: nn.Module) -> None:
        super().__init__()
        self.a, self.f, self.join = nn.Conv2d(3, 4, 3, padding=1), function, join
        self.c = nn.Conv2d(8 if isinstance(join, Cat) else 4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(self.join(h, self.f(h)))


@pytest.mark.parametrize("function", [nn.SiLU, lambda: nn.LeakyReLU(0.3), nn.GELU])
@pytest.mark.parametrize("join", [Add, lambda: Cat(1)])
def test_functions_whose_input_and_output_have_one_step(
    function: Any, join: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raising that step hardly moves what is rounded: 100,000 tries took half a minute in every forward pass."""
    torch.manual_seed(0)
    tries: list[Tensor] = []
    raised = reference_integer.raised
    monkeypatch.setattr(reference_integer, "raised", lambda step: tries.append(step) or raised(step))
    network = ready(Shared(function(), join()), weight=4)
    for _ in range(3):
        network(X)
    assert len(tries) < 5000
    exact(network, tmp_path, X, 2 * X[:1])


def test_steps_are_found_once() -> None:
    network = ready(Shared(nn.SiLU(), Cat(1)))
    network(X)
    found = network.program.settled["raised"]
    network(X)
    assert network.program.settled["raised"] is found
    with torch.no_grad():
        network.model.c.input_quantizer.step.mul_(1.5)  # type: ignore[union-attr, operator]
    network(X)
    assert network.program.settled["raised"] is not found


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.b(self.a(x))


def test_arguments_that_nothing_reads(tmp_path: Path) -> None:
    exact(ready(Optional()), tmp_path, X, X[:1])


def test_slices_of_everything(tmp_path: Path) -> None:
    every = Slice(slice(None), slice(None))
    exact(ready(nn.Sequential(nn.Conv2d(3, 4, 3), every, nn.Conv2d(4, 2, 3))), tmp_path, X)


def test_norms_in_floating_point(tmp_path: Path) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        for _ in range(3):
            model(X)
    exact(ready(model), tmp_path, X, X[:2], program=False)


def test_what_is_refused_by_name(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ZeroPad2d((-1, 0, 0, 0)), nn.Conv2d(4, 2, 3))
    with pytest.raises(UsageError, match="1: ZeroPad2d with these options has no form in a program"):
        lsquant.export_program(ready(plain), tmp_path / "p")
    network = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    whole = torch.randint(-3, 3, (4, 3, 8, 8), dtype=torch.int32)
    with pytest.raises(UsageError, match=r"example_inputs of type torch.int32; give float32"):
        lsquant.export_onnx(network, tmp_path / "m", whole, profile="integer")
    grouped = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    spec = lsquant.QuantSpec(4, granularity="group", group_size=9)
    lsquant.prepare(grouped.eval(), Recipe(spec, 8, joins=8), example_inputs=X)
    lsquant.calibrate(grouped, [X])
    with pytest.raises(UsageError, match="0: QuantConv2d has no integer form in ONNX"):
        lsquant.export_onnx(grouped, tmp_path / "m", X, profile="integer")
    assert not list(tmp_path.iterdir())
    assert lsquant.export_program(network.model, tmp_path / "p").stat().st_size  # fused by itself


class Clipped(nn.Module):
    def __init__(self, limit: float) -> None:
        super().__init__()
        self.a, self.b, self.add = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), Add()
        self.clip, self.c = nn.Hardtanh(-limit, limit), nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(self.clip(self.add(h, self.b(h))))


def test_sums_with_a_step_far_below_that_of_their_operands(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"add: the step of its operands is .* times that of their sum"):
        lsquant.export_onnx(ready(Clipped(1e-6)), tmp_path / "m", X, profile="integer")
    exact(ready(Clipped(1e-2)), tmp_path, X)


def test_nan_stays_in_its_sample() -> None:
    network = ready(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3)))
    x = X.clone()
    x[1, 0, 0, 0] = torch.nan
    with torch.no_grad():
        wanted, found = network(X), network(x)
    assert torch.equal(found[[0, 2, 3]], wanted[[0, 2, 3]])
    assert bool(found[1].isnan().any())


class WithNumbers(nn.Module):
    """A product with a number, a sum with one, and a product with a parameter of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mul, self.add, self.scale = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), Mul(), Add(), Mul()
        self.gamma = nn.Parameter(torch.linspace(0.5, 2, 4)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.scale(self.add(self.mul(self.a(x), 2.0), 1.0), self.gamma))


def test_products_with_numbers_and_with_parameters() -> None:
    network = ready(WithNumbers())
    assert {step.name for step in network.program.floats} >= {"mul", "add", "gamma"}
    x = X[:2]
    with torch.no_grad():
        assert (network(x) - network.model(x)).abs().max() < 0.05 * network.model(x).abs().max()


@pytest.mark.parametrize("channels,chunks", [(5, 2), (6, 4), (7, 3)])
def test_parts_of_unequal_sizes(channels: int, chunks: int, tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [len(part) for part in torch.arange(channels).chunk(chunks)]
            self.a, self.cut, self.add, self.end = nn.Conv2d(3, channels, 3), Chunk(chunks), Add(), nn.Conv2d(2, 2, 1)
            self.first, self.last, self.at = nn.Conv2d(sizes[0], 2, 3), nn.Conv2d(sizes[-1], 2, 3), len(sizes) - 1

        def forward(self, x: Tensor) -> Tensor:
            parts = self.cut(self.a(x))
            return self.end(self.add(self.first(parts[0]), self.last(parts[self.at])))

    exact(ready(Parts()), tmp_path, X, X[:1])


def test_what_a_function_gives_may_be_returned_too(tmp_path: Path) -> None:
    """In the file its value and the function's own had one name."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Conv2d(3, 4, 1), nn.GELU(), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.act(self.a(x))
            return y, self.b(y)

    exact(ready(Both()), tmp_path, X, 2 * X)
