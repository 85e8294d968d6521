"""The share of the multiplications counts all that multiplies, in layers that stay float and in functions too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant import Recipe, Rule

W4A4 = Recipe(4, 4)


def counts(model: nn.Module, x: Tensor, recipe: Recipe = W4A4) -> dict[str, int]:
    changes = lsquant.prepare(model, recipe, example_inputs=x)
    found = {c.name: c.multiplications for c in changes if c.multiplications}
    total = sum(found.values())
    done = sum(found[c.name] for c in changes.quantized if c.name in found)
    assert changes.multiplication_share == pytest.approx(done / total)
    return found  # type: ignore[return-value]


class Recurrent(nn.Module):
    def __init__(self, kind: str, **options: int) -> None:
        super().__init__()
        self.inp, self.rnn = nn.Linear(3, 4), getattr(nn, kind)(4, 5, 2, batch_first=True, **options)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.inp(x))[0][:, -1, :5])


@pytest.mark.parametrize("kind, gates", [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers(kind: str, gates: int) -> None:
    """2 sequences of 7 steps; a step multiplies an input and a state by the gates' matrices, in two layers."""
    steps = 2 * 7
    assert counts(Recurrent(kind), torch.randn(2, 7, 3)) == {
        "inp": steps * 3 * 4, "rnn": steps * gates * (4 * 5 + 5 * 5 + 5 * 5 + 5 * 5), "head": 2 * 5 * 2,
    }  # fmt: skip


def test_both_directions() -> None:
    found = counts(Recurrent("LSTM", bidirectional=True), torch.randn(2, 7, 3))
    assert found["rnn"] == 2 * 7 * 2 * 4 * (4 * 5 + 5 * 5 + 10 * 5 + 5 * 5)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projections() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, proj_size=2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    assert counts(Projected(), torch.randn(7, 2, 4))["rnn"] == 7 * 2 * (4 * 5 * 4 + 4 * 5 * 2 + 2 * 5)


def test_packed_sequences_and_cells() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.cell, self.head = nn.GRU(4, 5), nn.LSTMCell(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2]))
            return self.head(self.cell(self.rnn(packed)[1][0])[0])

    model = Packed()
    found = counts(model, torch.randn(4, 2, 4))
    assert found == {"rnn": 6 * 3 * (4 * 5 + 5 * 5), "cell": 2 * 4 * 6 * (5 + 6), "head": 2 * 6 * 2}
    rows = {c.name: c for c in lsquant.prepare(model, W4A4)}
    assert (rows["cell"].reason, rows["cell"].weights) == ("LSTMCell is not supported", 4 * 6 * (5 + 6) + 2 * 24)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.att(x, x, x, need_weights=False)[0])


def test_attention_with_its_products() -> None:
    """Per sample: three projections and the one behind, and for each of 2 heads 5 x 5 scores and their sums."""
    n, d = 5, 8
    expected = 2 * (4 * n * d * d + 2 * n * n * (d // 2) * 2)
    assert counts(Attention(), torch.randn(2, n, d)) == {"att": expected, "head": 2 * n * d * 3}


class Functions(nn.Module):
    """Products without layers, each by its own way of writing it."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.first, self.which = nn.Linear(4, 6), which
        self.register_buffer("fixed", torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)  # (2, 3, 6)
        return {
            "linear": lambda: F.linear(y, self.fixed),
            "matmul": lambda: y @ self.fixed.t(),
            "einsum": lambda: torch.einsum("bij,kj->bik", y, self.fixed),
            "tensordot": lambda: torch.tensordot(y, self.fixed, ([2], [1])),
            "bmm": lambda: torch.bmm(y, y.mT),
            "baddbmm": lambda: torch.baddbmm(torch.zeros(1), y, y.mT),
            "vector": lambda: y @ self.fixed[0],
            "dot": lambda: torch.dot(y.flatten(), y.flatten()),
            "conv1d": lambda: F.conv1d(y, self.fixed.reshape(5, 3, 2)),
            "conv2d": lambda: F.conv2d(y.unsqueeze(1), self.fixed.reshape(5, 1, 2, 3), padding=1),
            "transposed": lambda: F.conv_transpose1d(y, self.fixed.reshape(3, 5, 2)),
            "attention": lambda: F.scaled_dot_product_attention(y, y, y),
            "bilinear": lambda: F.bilinear(y, y, self.fixed.reshape(1, 5, 6).expand(2, 5, 6)[:, :1].expand(2, 6, 6)),
            "elementwise": lambda: y * y,
        }[self.which]()


@pytest.mark.parametrize(
    "which, expected",
    [
        *[(which, 6 * 6 * 5) for which in ("linear", "matmul", "einsum", "tensordot")],
        *[(which, 2 * 3 * 3 * 6) for which in ("bmm", "baddbmm")],
        ("vector", 6 * 6), ("dot", 36), ("conv1d", 2 * 5 * 5 * 6), ("conv2d", 2 * 5 * (4 * 6) * 6),
        ("transposed", 2 * 3 * 6 * 10), ("attention", 2 * 3 * 3 * 12), ("bilinear", 6 * 2 * 36), ("elementwise", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inference", [False, True])
def test_functions(which: str, expected: int, inference: bool) -> None:
    with torch.inference_mode(inference):
        found = counts(Functions(which), torch.randn(2, 3, 4))
    assert found == {"first": 6 * 4 * 6, **({"": expected} if expected else {})}


def test_a_module_that_multiplies_itself_is_named() -> None:
    (_, row) = lsquant.prepare(Functions("einsum"), W4A4, example_inputs=torch.randn(2, 3, 4))
    assert (row.name, row.kind, row.weight, row.weights) == ("", "Functions", "float", 0)
    assert row.reason == "matmul in its own forward pass, without a layer: not quantized"
    assert len(lsquant.prepare(Functions("einsum"), W4A4)) == 1  # seen only by running


def test_what_the_recipe_leaves_float_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    changes = lsquant.prepare(model, Recipe(4, 4, [Rule("0", None, None)]), example_inputs=torch.randn(3, 4))
    assert [c.multiplications for c in changes] == [3 * 32, 3 * 16]
    assert str(changes).endswith("33.3% of the multiplications (weight and input quantized)")
    again = lsquant.prepare(model, W4A4, example_inputs=torch.randn(3, 4))  # a prepared model is counted as well
    assert again.multiplication_share == 1.0


def test_the_case_of_the_lstm_that_does_all_the_work() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.rnn = nn.Linear(8, 32), nn.LSTM(32, 128, 2, batch_first=True)
            self.head = nn.Linear(128, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(self.inp(x))[0][:, -1])

    changes = lsquant.prepare(Net(), Recipe.preset("w4a4"), example_inputs=torch.randn(2, 5, 8))
    done, lstm = 2 * 5 * 8 * 32 + 2 * 128 * 4, 2 * 5 * 4 * 128 * (32 + 128 + 128 + 128)
    assert changes.multiplication_share == pytest.approx(done / (done + lstm))
    assert str(changes).endswith("0.2% of the multiplications (weight and input quantized)")
