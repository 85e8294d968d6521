"""What `prepare` cannot quantize is named: weights used without a layer, and bypassed layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
from lsquant import QuantSpec, Recipe
from lsquant._util.errors import UsageError

W4A8 = Recipe.preset("w4a8")


class Experts(nn.Module):
    """Raw 3-D weights, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.scale = nn.Parameter(torch.randn(3, 4, 4)), nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->bo", x, self.up) * self.scale[0]


class Bypassed(nn.Module):
    """One layer is called, of the others only the weights are used; `table` and `head` share one."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.conv, self.joined = nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 2)
        self.table, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.called(self.table(index))
        x = F.conv1d(x.unsqueeze(-1), self.conv.weight.view(4, 4, 1)).squeeze(-1)
        return x @ torch.cat([self.head.weight, self.joined.weight]).t()


def test_raw_parameters_are_named_with_their_weights():
    model = nn.Sequential(nn.Linear(4, 4), Experts(), nn.ParameterList([torch.ones(2, 3)]))
    rows = {c.name: c for c in lsquant.prepare(model, W4A8)}
    assert (rows["1"].kind, rows["1"].weight, rows["1"].weights) == ("Experts", "float", 48 + 4)
    assert rows["1"].reason.startswith("it holds up itself")
    assert rows["2"].weights == 6


def test_one_dimensional_parameters_and_own_quantizers_are_not_named():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.steps = nn.Parameter(torch.ones(4, 4)), lsquant.Quantizer(QuantSpec(4), count=16)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.token = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1, 1, 4))

    changes = lsquant.prepare(nn.Sequential(nn.Linear(4, 4), Own(), Scale(), nn.LayerNorm((4, 4))), W4A8)
    assert [c.name for c in changes] == ["0"]


def test_a_parametrized_layer_is_named_with_its_weights():
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
    (_, row) = lsquant.prepare(nn.Sequential(nn.Conv1d(4, 4, 1), parametrized), W4A8)
    assert row.reason.startswith("Conv1d with a parametrized weight")
    assert row.weights == 4 + 4 + 48  # bias, norms, directions


def test_bypassed_layers_stay_float():
    model, index = Bypassed(), torch.tensor([1, 5, 3])
    rows = {c.name: c for c in lsquant.prepare(model, W4A8, example_inputs=index)}
    assert rows.pop("").reason == "a convolution and matmul in its own forward pass, without a layer: not quantized"
    assert {name: "without calling the layer" in c.reason for name, c in rows.items()} == {
        "called": False, "table": True, "conv": True, "joined": True, "head": True,
    }  # fmt: skip
    assert "used by conv1d" in rows["conv"].reason
    assert "used by cat" in rows["joined"].reason
    assert {c.name for c in rows.values() if c.weight != "float"} == {"called"}
    lsquant.calibrate(model, [index])
    lsquant.revert(model)
    assert type(model.conv) is nn.Conv1d


def test_a_layer_that_is_called_and_bypassed_stays_float():
    """Its weight would be rounded in one place and not in the other, which no file can hold."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.other = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, index: Tensor) -> Tensor:
            x = self.other(self.inner(self.table(index))) * self.inner.weight.abs().mean()
            return x @ self.table.weight.t()

    model, index = Both().eval(), torch.tensor([1, 5, 3])
    rows = {c.name: c for c in lsquant.prepare(model, W4A8, example_inputs=index)}
    assert "used by matmul without calling the layer" in rows["table"].reason
    assert "used by abs without calling the layer" in rows["inner"].reason
    assert {name for name, row in rows.items() if name and row.weight != "float"} == {"other"}
    lsquant.calibrate(model, [index])
    assert torch.equal(lsquant.to_integer(model)(index), model(index))


def test_a_module_that_uses_its_own_share_of_a_weight_bypasses_no_layer():
    """As in BART: its embedding is a subclass, which keeps the float weight, and the head is quantized."""

    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2.0 * super().forward(input)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = Scaled(7, 4), nn.Linear(4, 7)
            self.head.weight = self.table.weight

        def forward(self, index: Tensor) -> Tensor:
            return self.head(self.table(index))

    model, index = Tied().eval(), torch.tensor([1, 5, 3])
    rows = {c.name: c for c in lsquant.prepare(model, W4A8, example_inputs=index)}
    assert (rows["head"].weight != "float", rows["table"].weight) == (True, "float")
    lsquant.calibrate(model, [index])
    assert torch.equal(lsquant.to_integer(model)(index), model(index))


def test_an_embedding_whose_rows_are_read_without_calling_it_stays_float():
    """Relative positions in DeBERTa.  Reading shape, type or device alone is no use of the values."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.key, self.spare = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            like = torch.zeros_like(self.spare.weight) + x.to(self.spare.weight).new_zeros(self.spare.weight.shape)
            return self.key(x) @ self.key(self.table.weight.unsqueeze(0)).mT + like.sum()

    rows = {c.name: c for c in lsquant.prepare(Positions(), W4A8, example_inputs=torch.randn(2, 3, 4))}
    assert "used by unsqueeze without calling the layer" in rows["table"].reason
    assert (rows[""].weights, rows[""].multiplications) == (0, 2 * 3 * 4 * 6)
    assert {name for name, c in rows.items() if c.weight == "float"} == {"", "table"}


def test_a_layer_that_nothing_uses_is_still_refused_by_calibrate():
    model, index = Bypassed(), torch.tensor([1, 5, 3])
    model.spare = nn.Linear(4, 4)
    lsquant.prepare(model, W4A8, example_inputs=index)
    with pytest.raises(UsageError, match="'spare' was not"):
        lsquant.calibrate(model, [index])


def test_a_layer_without_weights():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.empty(0, 4))
    assert [c.reason for c in lsquant.prepare(model, W4A8)] == ["", "it has no weights"]


@pytest.mark.parametrize(
    "layer, x",
    [
        (nn.Linear(4, 4), torch.randn(3, 2, 4)),
        (nn.Conv1d(4, 4, 3), torch.randn(2, 4, 5)),
        (nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)),
        (nn.ConvTranspose1d(4, 4, 3), torch.randn(2, 4, 5)),
        (nn.Embedding(9, 4), torch.tensor([[1, 8, 3]])),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("preset", ["w4a8", "w4"])
def test_outputs_may_be_modified_in_place(layer: nn.Module, x: Tensor, preset: str):
    model = nn.Sequential(layer)
    lsquant.prepare(model, Recipe.preset(preset), example_inputs=x)
    if preset == "w4a8" and not isinstance(layer, nn.Embedding):
        lsquant.calibrate(model, [x])
    y = model(x)
    strides, expected = y.stride(), y.detach() * 2
    y *= 2
    y.square().sum().backward()
    assert torch.equal(y.detach(), expected)
    assert y.stride() == strides
    assert model[0].weight_quantizer.step.grad is not None
