"""NaN and infinity stay in their sample: the others have the bits that they have without it, in every engine."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 5), (12,)),
    "linear over sequences": (lambda: nn.Linear(12, 5), (7, 12)),
    "linear over grids": (lambda: nn.Linear(4, 3), (3, 2, 4)),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3, padding=1), (3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 17, 3, stride=2, padding=1), (3, 7, 7)),
    "conv2d dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2), (4, 6, 6)),
    "grouped conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=2), (4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (4, 5, 5)),
}
RECIPES = {
    "4/4": Recipe(4, 4),
    "8/8": Recipe(8, 8),
    "LSQ+": Recipe(4, QuantSpec(4, offset=True)),
    "channel": Recipe(QuantSpec(4, granularity="channel"), 4),
}
ENGINES = ["eager", "cpp"]


def made(name: str, recipe: Recipe, batch: int) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    model = nn.Sequential(make())
    x = torch.randn(batch, *shape)
    lsquant.prepare(model, recipe)
    lsquant.calibrate(model, [x])
    return model, x


def spoilt(x: Tensor, samples: list[int], bad: float) -> Tensor:
    x = x.clone()
    for n in samples:
        at = torch.unravel_index(torch.tensor(n % x[n].numel()), x.shape[1:])
        x[(n, *at)] = bad
    return x


def assert_others_stay(run: Callable[[Tensor], Tensor], x: Tensor, samples: list[int], bad: float) -> None:
    with torch.no_grad():
        clean, found = run(x), run(spoilt(x, samples, bad))
    assert bool(clean.isfinite().all())
    for n in range(len(x)):
        if n in samples:
            assert bool(found[n].isnan().any())
        else:
            assert torch.equal(found[n], clean[n]), f"sample {n}"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_around_it_keep_their_bits(layer: str, bad: float, engine: str) -> None:
    model, x = made(layer, RECIPES["4/4"], 6)
    assert_others_stay(model.train(), x, [2], bad)
    assert_others_stay(model.eval(), x, [0, 5], -bad)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("batch", [1, 31, 32, 33, 65, 100])
def test_at_every_batch_size(batch: int, recipe: str, engine: str) -> None:
    """A linear layer is computed in blocks of rows."""
    model, x = made("linear", RECIPES[recipe], batch)
    assert_others_stay(model, x, sorted({0, batch // 2, batch - 1}), float("nan"))


@pytest.mark.parametrize("engine", ENGINES)
def test_only_the_rows_of_a_sequence_and_the_windows_of_an_image_that_hold_it(engine: str) -> None:
    model, x = made("linear over sequences", RECIPES["4/4"], 3)
    x[1, 4, 7] = float("nan")
    wanted = torch.zeros(3, 7, dtype=torch.bool)
    wanted[1, 4] = True
    assert torch.equal(model(x).isnan().all(-1), wanted)
    assert torch.equal(model(x).isnan().any(-1), wanted)

    model, x = made("conv2d dilated", RECIPES["4/4"], 2)
    x[1, 2, 0, 3] = float("inf")  # read by the windows whose middle is 2 away or right there, in both directions
    wanted = torch.zeros(2, 6, 6, dtype=torch.bool)
    for row in (0, 2):
        for column in (1, 3, 5):
            wanted[1, row, column] = True
    assert torch.equal(model(x).isnan().all(1), wanted)
    assert torch.equal(model(x).isnan().any(1), wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_in_every_memory_format_and_type(engine: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    model, x = made("conv2d", RECIPES["8/8"], 5)
    assert_others_stay(model.to(dtype), x.to(dtype).contiguous(memory_format=layout), [1, 4], float("nan"))


@pytest.mark.parametrize("engine", ENGINES)
def test_in_the_integer_model(engine: str) -> None:
    for layer in ("linear", "conv2d", "transposed"):
        model, x = made(layer, RECIPES["channel"], 40)
        assert_others_stay(lsquant.to_integer(model.eval()), x, [3, 33], float("nan"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_in_compiled_models() -> None:
    torch._dynamo.reset()
    model, x = made("linear", RECIPES["4/4"], 40)
    assert_others_stay(torch.compile(model.eval(), backend="aot_eager"), x, [3, 33], float("nan"))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_network_of_several_layers(engine: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    x = torch.randn(37, 3, 8, 8)
    lsquant.prepare(model, RECIPES["4/4"])
    lsquant.calibrate(model, [x])
    assert_others_stay(model.eval(), x, [0, 36], float("nan"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layer", ["linear", "linear over sequences", "conv2d"])
def test_gradients(layer: str, engine: str) -> None:
    """A loss over the other samples gives their gradients; that of the step is NaN, so that a loss scaler sees it."""
    model, x = made(layer, RECIPES["4/4"], 6)
    bad = spoilt(x, [2], float("nan")).requires_grad_()
    clean = x.clone().requires_grad_()
    twin = copy.deepcopy(model)
    model(bad).sum().backward()
    twin(clean).sum().backward()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(bad.grad[others], clean.grad[others])
    assert bool(model[0].input_quantizer.step.grad.isnan().all())
    assert bool(twin[0].input_quantizer.step.grad.isfinite().all())
