"""What cannot be traced: an error that says where and what to write, an unchanged model; what is checked in calls."""

from __future__ import annotations

import inspect
import random
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from helpers.traceable import Classifier, Residual, assert_equal_runs, run, traced
from lsquant import UsageError

X = torch.linspace(-3, 3, 2 * 3 * 36).sin().reshape(2, 3, 6, 6)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.calls: Any = 0
        self.register_buffer("count", torch.zeros(1))


class Values(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            x = x + self.conv(x)
        return x


class Item(Base):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.conv(x)) * x.max().item()  # here


class ToNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x + self.conv(x)
        return y * float(y.detach().numpy().max())  # here


class NumberOfATensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu() * int(x.abs().max())  # here


class LoopsOverTheBatch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.relu(self.conv(one)) for one in x]) + x  # here


class NoGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x + 1  # here
        return self.conv(x) + y


class Autocast(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu"):
            return x + self.conv(x)  # here


class SetsAnAttribute(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.conv(x)


class KeepsATensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return x + self.last


class SetsABuffer(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        return x + self.conv(x)


class ChangesItsInput(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        x += y  # here
        return x


class ChangesAPart(Base):
    """The gradient of y is the sum of three, and which is added first depends on how the part is changed."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        part = y[:, :2]
        z = y * 2.1 + y * 3.3
        part += x[:, 1:]  # here
        return z * part.mean(1, keepdim=True)


class ChangesAView(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        part = y[:, :1]
        y += x  # here
        return y * part.mean()


class OthersModule(Base):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Conv2d(3, 3, 1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.hidden[0](x)  # here


class LooseSize(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x + torch.zeros(x.shape[0], 1, 1, 1)  # here


class LayerDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < 0.5:
            return x
        return self.conv(x) + x


class NumpyDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x * np.random.rand()  # noqa: NPY002


class OnlyInTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + x
        if self.training and bool(y.sum() > -1e9):  # here
            y = y * 2
        return y


class WantsTargets(Base):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if self.training and targets is None:
            raise ValueError("targets, please")  # here
        return self.conv(x) + x


UNTRACEABLE: dict[type[nn.Module], str] = {
    Values: "the values of a tensor decide a branch",
    Item: "the values of a tensor become a number or an array (item)",
    ToNumpy: "the values of a tensor become a number or an array (numpy)",
    NumberOfATensor: "the values of a tensor become a number or an array (int)",
    LoopsOverTheBatch: "a loop over a tensor is one over the samples of a batch",
    NoGrad: "a context such as torch.no_grad() or torch.autocast()",
    Autocast: "a context such as torch.no_grad() or torch.autocast()",
    SetsAnAttribute: "its forward sets 'calls'",
    KeepsATensor: "its forward sets 'last'",
    SetsABuffer: "its forward sets 'count'",
    OthersModule: "it calls a Conv2d that is not one of its own modules",
    LooseSize: "a size is given to a function that takes numbers only; give sizes in a tuple: torch.rand((n, 1))",
    LayerDrop: "random numbers of Python or NumPy decide what its forward does",
    NumpyDrop: "random numbers of Python or NumPy decide what its forward does",
    OnlyInTraining: "the values of a tensor decide a branch",
    WantsTargets: "in training mode ValueError: targets, please",
}


def marked_line(block: type[nn.Module]) -> int | None:
    """The line of a class that says "# here"."""
    lines, first = inspect.getsourcelines(block)
    return next((first + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")), None)


def state(model: nn.Module) -> list[Any]:
    """Everything a failed trace must leave alone."""
    found: list[Any] = []
    for name, module in model.named_modules():
        attributes = {k: v for k, v in vars(module).items() if not isinstance(v, dict)}
        found += [name, type(module), attributes, list(module._parameters), list(module._modules), module.training]
        found += [len(module._forward_hooks), len(module._forward_pre_hooks)]
    return [found, {k: (id(v), v.tolist()) for k, v in model.state_dict(keep_vars=True).items()}]


@pytest.mark.parametrize("block, reason", UNTRACEABLE.items(), ids=[b.__name__ for b in UNTRACEABLE])
def test_an_error_names_place_and_remedy(block, reason):
    """One block of two cannot be traced: by default an error and nothing changes; else the other one is traced."""
    model = nn.Sequential(Residual(3), block()).eval()
    model(X)
    before = state(model)
    numbers = torch.get_rng_state(), random.getstate()
    with pytest.raises(UsageError) as caught:
        lsquant.trace(model, X)
    message = str(caught.value)
    assert f"block '1' ({block.__name__}) cannot be traced" in message
    assert reason in message
    assert "strict=False" in message
    assert re.search(r"(lsquant.nn.Add\(\)|torch.nn.ReLU\(\)) for \w+ \(", message)
    if (line := marked_line(block)) is not None:
        assert f"{__file__}:{line}" in message
    after = state(model)
    assert after[1].keys() == before[1].keys()
    assert after == before
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]

    kind = type(model[1])
    result = lsquant.trace(model, X, strict=False)
    (row,) = result.untraced
    assert (row.name, row.kind) == ("1", block.__name__)
    assert reason in row.reason
    assert type(model[1]) is kind is block
    assert isinstance(model[0].add, lsquant.nn.Add)
    assert "1 block left as it is" in str(result)
    assert "left as it is: " in str(result)


def test_an_error_names_three_blocks():
    model = nn.Sequential(*(Values() for _ in range(5)))
    model(X + 5)
    with pytest.raises(UsageError) as caught:
        lsquant.trace(model, X + 5)
    lines = str(caught.value).splitlines()
    assert [re.findall(r"block '(\d)'", line) for line in lines[:3]] == [["0"], ["1"], ["2"]]
    assert lines[3:] == ["2 more blocks cannot be traced; strict=False lists all"]


class Registered(nn.Module):
    """No class may be derived from it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise ValueError("no more classes")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + x


def test_a_class_that_takes_no_subclass():
    model = nn.Sequential(Registered())
    with pytest.raises(UsageError, match="no subclass of its class can be made: no more classes"):
        lsquant.trace(model, X)
    assert type(model[0]) is Registered


class BatchBranch(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x if x.shape[0] == 2 else x


class BatchNumber(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu() * int(x.shape[0])


@pytest.mark.parametrize(
    "block, reason",
    [
        (ChangesItsInput, "iadd changes in place a tensor that the block was given or owns"),
        (ChangesAView, "iadd changes in place a tensor that is read in parts"),
        (ChangesAPart, "iadd changes in place a tensor that is read in parts"),
    ],
)
def test_in_place_sums_that_others_see(block, reason):
    """An error by default; else such a sum stays what it is, and everything else of the block is traced."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), block(), nn.Conv2d(3, 3, 1))
    before = state(model)
    with pytest.raises(UsageError, match=rf"{reason}.*lsquant.nn.Add\(\) for add \(.*:{marked_line(block)}\)"):
        lsquant.trace(model, X)
    assert state(model) == before
    model, plain, result = traced(model, X, strict=False)
    if block is not ChangesItsInput:
        assert_equal_runs(model, plain, X, torch.randn(5, 3, 6, 6))
    if block is ChangesAView:
        assert list(result.modules) == ["1.slice", "1.mul"]
        assert result[0].left[0] == "iadd"
    elif block is ChangesItsInput:
        assert [row.reason for row in result] == [f"{reason} ({__file__}:{marked_line(block)})"]
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))


class AsksWhetherItIsTraced(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x + (1.0 if torch.fx._symbolic_trace.is_fx_tracing() else 0.0)


@pytest.mark.parametrize("block", [BatchBranch, BatchNumber, AsksWhetherItIsTraced])
def test_without_strict_a_block_that_differs_in_the_end_stays(block):
    model = nn.Sequential(Residual(3), block(), Residual(3))
    model, plain, result = traced(model, X, strict=False)
    assert [row.name for row in result.untraced] == ["1"]
    assert type(model[1]) is block
    assert isinstance(model[0].add, lsquant.nn.Add)
    assert isinstance(model[2].add, lsquant.nn.Add)
    assert_equal_runs(model, plain, X, torch.randn(5, 3, 6, 6))
    with pytest.raises(UsageError, match="block '1'"):
        lsquant.trace(plain, X)


@pytest.mark.parametrize("block", [BatchBranch, BatchNumber])
def test_no_size_of_a_batch_is_fixed(block):
    model = nn.Sequential(block())
    before = state(model)
    with pytest.raises(UsageError, match=r"depends on the size of the batch.*block '0' \(.*test_untraceable.py:\d+"):
        lsquant.trace(model, X)
    assert state(model) == before


class Sizes(Base):
    """Questions about sizes, answered by the example, and checked later."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError("three channels, please")
        for i in range(x.shape[2] // 3):
            x = x + self.conv(x) * (i + 1)
        n, c, h, w = x.shape
        return x.reshape(n, c, h * w)


def test_sizes_are_checked():
    """Two steps for images of 6 to 8 rows: another number of steps raises; another size with as many does not."""
    model, plain, _ = traced(Sizes(), X)
    assert_equal_runs(model, plain, X, torch.randn(5, 3, 6, 6), torch.randn(1, 3, 6, 9))
    line = inspect.getsourcelines(Sizes.forward)[1] + 3
    with pytest.raises(UsageError, match=rf"test_untraceable.py:{line}\).*this is 3, but was 2 in the example"):
        model(torch.randn(2, 3, 9, 6))
    with pytest.raises(UsageError, match="this is True, but was False"):
        model(torch.randn(2, 4, 6, 6))


class Arguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        *rest: Tensor,
        scale: float = 1.0,
        mode: str = "sum",
        **kw: Any,
    ) -> dict[str, Any]:
        z = self.linear(x) + y if mode == "sum" else self.linear(x) * y
        if mask is not None:
            z = z * mask
        for other in rest:
            z = z + other
        return {"z": z * scale, "pair": (z.relu(), kw.get("extra")), "none": None}


class Outer(nn.Module):
    """Calls a block in the ways its keyword says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Arguments()

    def forward(self, x: Tensor, way: str) -> Any:
        if way == "plain":
            return self.inner(x, x, scale=2)
        if way == "mask":
            return self.inner(x, y=x, mask=x)
        if way == "rest":
            return self.inner(x, x, x, x, x, mode="product", extra=x)
        return self.inner(x, x, None, extra=[x, {"deep": x}])


@pytest.mark.parametrize("way", ["plain", "mask", "rest", "extra"])
def test_arguments(way):
    """Whatever the example passes works as before; what it did not pass is refused, not ignored."""
    x = torch.randn(3, 4)
    model, plain, _ = traced(Outer(), {"x": x, "way": way})
    one, two = model(torch.ones(5, 4), way), plain(torch.ones(5, 4), way)
    assert list(one) == list(two)
    assert torch.equal(one["z"], two["z"])
    assert one["none"] is None
    assert torch.equal(one["pair"][0], two["pair"][0])
    assert type(one["pair"]) is tuple
    assert list(inspect.signature(model.inner.forward).parameters) == list(
        inspect.signature(Arguments().forward).parameters
    )
    for other in {"plain", "mask", "rest", "extra"} - {way}:
        with pytest.raises(UsageError, match=r"block 'inner' \(.*in the example"):
            model.inner(*_arguments(other, x)[0], **_arguments(other, x)[1])


def _arguments(way: str, x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    seen: list[Any] = []
    model = Outer()
    model.inner.register_forward_pre_hook(lambda m, a, k: seen.append((a, k)), with_kwargs=True)
    model(x, way)
    return seen[0]


class Assigns(Base):
    """Parts of tensors, of a mapping and of an object are set."""

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        y[:, 0] = 0
        z = y + x
        z[:, :, 1:3] += 1
        parts = {"z": z.relu()}
        parts["x"] = x * 2
        return [parts["z"], parts["x"] + z]


def test_assignments():
    x = X.clone()
    model, plain, result = traced(Assigns(), x)
    assert torch.equal(x, X)
    assert [n for n in result.modules if n.startswith("add")] == ["add", "add_2"]
    assert_equal_runs(model, plain, X, torch.randn(5, 3, 6, 6))


class ChangesTheCallers(nn.Module):
    def forward(self, x: Tensor, parts: list[Tensor]) -> Tensor:
        x[:, 1] = parts[0][:, 2]
        parts[0] = x + parts[1]
        return F.relu(parts[0])


def test_what_a_forward_changes_of_the_callers_is_changed():
    """Tensors and lists that it was given, in place; those of the example are copies."""

    def given() -> dict[str, Any]:
        return {"x": X.clone(), "parts": [X + 1, X - 1]}

    example = given()
    model, plain, result = traced(ChangesTheCallers(), example)
    assert list(result.modules) == ["slice", "add", "relu"]
    assert torch.equal(example["x"], X)
    one, two = given(), given()
    assert torch.equal(model(**one), plain(**two))
    for a, b in zip([one["x"], *one["parts"]], [two["x"], *two["parts"]], strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one["x"], X)
    assert not torch.equal(one["parts"][0], X + 1)


class ByMode(Base):
    """Another way in training mode, with functions of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.training:
            y = y * torch.rand((y.shape[0], 1, 1, 1)) * 2 + F.relu(y)
        return F.relu(y + x)


def test_both_modes_are_kept():
    model, plain, result = traced(nn.Sequential(ByMode()), X)
    assert list(result.modules) == ["0.add", "0.relu"]
    calls: list[str] = []
    model[0].add.register_forward_hook(lambda *_: calls.append("add"))
    assert_equal_runs(model, plain, X, torch.randn(5, 3, 6, 6))
    assert calls == ["add"] * 4


class Auxiliary(Base):
    """Gives a second output in training mode only, and counts its calls."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        self.calls += 1
        return self.conv(x), x * 2 if self.training else None


class UsesAuxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Auxiliary()

    def forward(self, x: Tensor) -> Tensor:
        y, extra = self.inner(x)
        y = y + x
        return y if extra is None else F.relu(y + extra)


def test_what_inner_modules_do_in_each_mode():
    """A block is traced with what the modules in it give in that mode; that they change themselves is their affair."""
    model, plain, result = traced(UsesAuxiliary(), X)
    assert list(result.modules) == ["add"]
    assert model.inner.calls == 0
    assert_equal_runs(model, plain, X, torch.randn(5, 3, 6, 6))
    assert model.inner.calls == plain.inner.calls == 4


def test_an_example_that_training_mode_refuses():
    """BatchNorm takes no single value of a channel in training mode; the example may be one image all the same."""

    class Pooled(Base):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.adaptive_avg_pool2d(self.conv(x), 1)) * x

    model, plain, result = traced(Pooled(), X[:1])
    assert list(result.modules) == ["avg_pool", "mul"]
    assert_equal_runs(model, plain, X)


def test_what_needs_no_tracing_is_never_an_error():
    """Blocks without such functions, and blocks that the example does not run, may do what they like."""

    class Free(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x - 1

    model = nn.Sequential(Free(), Residual(3))
    model.unused = Values()  # type: ignore[assignment]
    model.forward = None  # type: ignore[assignment]
    del model.forward
    chain = nn.Sequential(*list(model.children())[:2])
    chain.add_module("other", nn.ModuleList([Values()]))
    wrapped = Wrapped(chain[0], chain[1], Values())
    result = lsquant.trace(wrapped, X)
    assert [row.name for row in result] == ["second"]
    assert type(wrapped.first) is Free


class Wrapped(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module, never: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.never = first, second, never

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_modules_made_in_a_forward_are_functions():
    class Loose(Base):
        def forward(self, x: Tensor) -> Tensor:
            return nn.GELU()(self.conv(x)) + nn.Sequential(nn.ReLU(), nn.Tanh())(x)

    model, plain, result = traced(Loose(), X)
    assert list(result.modules) == ["gelu", "relu", "tanh", "add"]
    assert_equal_runs(model, plain, X)


class Shared(nn.Module):
    """One block in two places, called with inputs of two sizes; two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Residual(3)
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)[..., ::2])


def test_shared_blocks():
    model, plain, result = traced(Shared(), X)
    assert model.one is model.two
    assert list(result.modules) == ["slice", "one.relu", "one.dropout", "one.add", "one.relu_2"]
    assert_equal_runs(model, plain, X, torch.randn(5, 3, 6, 6))


def test_buffers_that_a_forward_counts_in():
    class Counts(Base):
        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return x + self.conv(x)

    model, _plain, _ = traced(Counts(), X)
    assert model.count == 0
    run(model, X, False)
    assert model.count == 1
    assert isinstance(model.add, lsquant.nn.Add)


def test_a_block_that_other_code_changed():
    model = Residual(3)
    model.forward = lambda x: F.relu(x) + x  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="its forward was replaced by an attribute"):
        lsquant.trace(model, X)
    graph = torch.fx.symbolic_trace(Residual(3).eval())
    with pytest.raises(UsageError, match="GraphModule"):
        lsquant.trace(graph, X)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lsquant.trace(lambda x: x, X), "is a function, not an nn.Module"),
        (lambda: lsquant.trace(Residual(3), []), "an empty batch"),
        (lambda: lsquant.trace(Residual(3), 3), "a batch of type int"),
        (lambda: lsquant.trace(Residual(3), X, strict="no"), "strict='no'; use True or False"),
        (lambda: lsquant.trace(nn.DataParallel(Residual(3)), X), "before it is wrapped in DataParallel"),
        (lambda: lsquant.trace(torch.jit.script(nn.Sequential(nn.ReLU())), X), "TorchScript"),
        (lambda: lsquant.trace(torch.compile(Residual(3)), X), "before torch.compile"),
        (lambda: lsquant.trace(Residual(3), X)(X), "trace works in place: go on using the model you passed"),
        (lambda: lsquant.trace(Residual(3), X).parameters(), "call .parameters on the model you passed"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning", "ignore:torch.nn.parallel")
def test_wrong_arguments(call, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        call()


def test_what_raises_in_the_end_is_undone(monkeypatch):
    def forward(self: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        if len(a) > 2:
            raise ValueError("too many")
        return a + b

    monkeypatch.setattr(lsquant.nn.Add, "forward", forward)
    model = Classifier()
    before = state(model)
    with pytest.raises(UsageError, match="with twice the batch the model raises after tracing ValueError: too many"):
        lsquant.trace(model, torch.randn(2, 3, 8, 8))
    with pytest.raises(UsageError, match="after tracing the model raises ValueError: too many"):
        lsquant.trace(model, torch.randn(3, 3, 8, 8))
    assert state(model) == before


def test_outputs_that_differ_are_found_out(monkeypatch):
    """The proof at the end: were a module to compute something else, nothing would be changed."""
    monkeypatch.setattr(lsquant.nn.Add, "forward", lambda self, a, b: a + b + 1)
    model = Classifier()
    before = state(model)
    with pytest.raises(UsageError, match="block 'block' gives other outputs after tracing, so it was not changed"):
        lsquant.trace(model, torch.randn(2, 3, 8, 8))
    assert state(model) == before
