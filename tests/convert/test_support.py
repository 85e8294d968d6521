"""The support matrix is true: the tables of docs/support.md are read, and every cell is tried."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule
from lsquant.nn import EXACT_TYPES, QUANTIZED_TYPES, QuantizedLayer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
GROUP = 4  # divides the inputs of every layer below

LAYERS = {
    "Linear": (lambda: nn.Linear(8, 6), (3, 8)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (2, 4, 6, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 4, 5, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2), (2, 4, 3, 2, 4)),
    "Embedding": (lambda: nn.Embedding(10, 8), (3, 5)),
}
KEPT = {
    **{f"BatchNorm{n}d": (lambda n=n: getattr(nn, f"BatchNorm{n}d")(3), n) for n in (1, 2, 3)},
    **{f"AvgPool{n}d": (lambda n=n: getattr(nn, f"AvgPool{n}d")(2), n) for n in (1, 2, 3)},
    **{f"AdaptiveAvgPool{n}d": (lambda n=n: getattr(nn, f"AdaptiveAvgPool{n}d")(2), n) for n in (1, 2, 3)},
}


def table(first: str) -> list[dict[str, str]]:
    """The rows of the page's table whose header begins with these cells."""
    lines = PAGE.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    cells = [[c.strip(" `") for c in line.strip("|").split("|")] for line in lines[start:]]
    end = next(i for i, line in enumerate(lines[start:]) if not line.startswith("|"))
    head = [re.sub("`", "", c) for c in cells[0]]
    return [dict(zip(head, row, strict=True)) for row in cells[2:end]]


QUANTIZED, REPEATED = table("| layer | steps"), table("| layer | in PyTorch")


def prepared(name: str, granularity: str) -> tuple[nn.Sequential, Tensor]:
    """One layer, quantized at 4 bits with steps like these, calibrated; and an input."""
    make, shape = LAYERS[name]
    model = nn.Sequential(make())
    x = torch.randint(10, shape) if name == "Embedding" else torch.randn(shape)
    spec = QuantSpec(4, granularity=granularity, group_size=GROUP if granularity == "group" else None)  # type: ignore[arg-type]
    lsquant.prepare(model, Recipe(spec, None if name == "Embedding" else 4))
    if name != "Embedding":
        lsquant.calibrate(model, [x])
    return model, x


CASES = [(row["layer"], kind) for row in QUANTIZED for kind in row["steps of the weight"].split(", ")]


def test_the_tables_name_all_layers():
    assert {row["layer"] for row in QUANTIZED} == {t.__name__ for t in QUANTIZED_TYPES} == set(LAYERS)
    assert {row["layer"] for row in REPEATED} == {t.__name__ for t in EXACT_TYPES} == set(KEPT)
    for row in [*QUANTIZED, *REPEATED]:
        assert row["in PyTorch"] == "yes"
        assert row.get("saved", "yes") == "yes"


@pytest.mark.parametrize("name,kind", CASES)
def test_in_pytorch(name: str, kind: str):
    """y = fl(fl(acc * fl(s_x s_w)) + b) with acc from the float layer in float64 over the codes."""
    model, x = prepared(name, kind)
    layer: QuantizedLayer = model[0]  # type: ignore[assignment]
    y = model(x)
    codes, step, _ = layer.integer_weight()
    if name == "Embedding":
        expected = (codes.float().reshape(len(step), -1) * step[:, None]).reshape(codes.shape)[x]
    else:
        quantizer = layer.input_quantizer
        assert quantizer is not None
        scale = quantizer.effective_step().detach() * step
        exact = LAYERS[name][0]().double()
        exact.bias.data.zero_()
        inputs = quantizer.codes(x).double()
        if kind == "group":
            expected = sum_of_groups(inputs, codes, scale)
        else:
            exact.weight.data.copy_(codes)
            channels = scale if name == "Linear" else scale.reshape(-1, *[1] * (x.dim() - 2))
            expected = exact(inputs).detach().float() * channels
        bias = layer.bias if name == "Linear" else layer.bias.reshape(-1, *[1] * (x.dim() - 2))  # type: ignore[union-attr]
        expected = expected + bias.detach()
    assert torch.equal(y.detach(), expected)
    y.square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert bool(torch.isfinite(parameter.grad).all()), key


def sum_of_groups(inputs: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Linear: float32 sums of each group times its scale, added in the order of the groups."""
    rows = scale.reshape(len(codes), -1)
    total = torch.zeros(len(inputs), len(codes))
    for g in range(rows.shape[1]):
        part = slice(g * GROUP, (g + 1) * GROUP)
        total = total + (inputs[:, part] @ codes[:, part].double().t()).float() * rows[:, g]
    return total


@pytest.mark.parametrize("name,kind", CASES)
def test_saved(name: str, kind: str, tmp_path: Path):
    model, x = prepared(name, kind)
    lsquant.save(model, tmp_path / "m.safetensors")
    loaded = lsquant.load(nn.Sequential(LAYERS[name][0]()), tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), model(x))
    assert type(lsquant.revert(loaded)[0]) is getattr(nn, name)  # type: ignore[index]
    assert set(loaded.state_dict()) == set(nn.Sequential(LAYERS[name][0]()).state_dict())


@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
def test_conv1d_of_transformers_is_a_linear_layer(kind: str, tmp_path: Path):
    """The same bits as a Linear layer with the transposed weight; it is saved, and comes back."""
    utils = pytest.importorskip("transformers.pytorch_utils")
    linear, foreign, x = nn.Linear(8, 6), utils.Conv1D(6, 8), torch.randn(3, 8)
    foreign.weight.data, foreign.bias.data = linear.weight.detach().t().clone(), linear.bias.detach().clone()
    recipe = Recipe(QuantSpec(4, granularity=kind, group_size=GROUP if kind == "group" else None), 4)  # type: ignore[arg-type]
    for model in (one := nn.Sequential(linear), other := nn.Sequential(foreign)):
        lsquant.prepare(model, recipe)
        lsquant.calibrate(model, [x])
    assert torch.equal(one(x), other(x))
    lsquant.save(other, tmp_path / "m.safetensors")
    loaded = lsquant.load(nn.Sequential(utils.Conv1D(6, 8)), tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), other(x))
    assert type(lsquant.revert(loaded)[0]) is utils.Conv1D  # type: ignore[index]


class Several(nn.Module):
    """Prepared models side by side, an input for each type of layer: one file for all."""

    def __init__(self, models: dict[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(models)

    def forward(
        self, linear=None, conv1d=None, conv2d=None, conv3d=None,
        convtranspose1d=None, convtranspose2d=None, convtranspose3d=None, embedding=None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        inputs = locals()
        return tuple(model(inputs[name.partition("_")[0].lower()]) for name, model in self.models.items())


@pytest.mark.parametrize("profile", ["exact", "small", "qdq"])
def test_onnx(profile: str, tmp_path: Path):
    """Every "yes" of a profile is in one file."""
    pytest.importorskip("onnxruntime")
    claimed = [(name, kind) for name, kind in CASES if claim(name, profile) == "yes"]
    model = Several({f"{name}_{kind}": prepared(name, kind)[0] for name, kind in claimed})
    inputs = {name.lower(): prepared(name, "tensor")[1][:2] for name, _ in claimed}  # one batch size for all
    lsquant.export_onnx(model, tmp_path / "m.onnx", inputs, profile=profile)
    verdict = lsquant.verify(model, tmp_path / "m.onnx", [inputs])
    assert verdict.layers == len(claimed) > 0
    assert verdict.reaches("weights" if profile == "qdq" else "outputs"), str(verdict)


@pytest.mark.parametrize("profile", ["exact", "small", "qdq"])
@pytest.mark.parametrize("name,kind", CASES)
def test_onnx_refuses(name: str, kind: str, profile: str, tmp_path: Path):
    """Every "no" is an error that names the layer, here "0"."""
    said = claim(name, profile)
    assert said in ("yes", "no", "")
    if said == "no":
        model, x = prepared(name, kind)
        with pytest.raises(ValueError, match="0"):
            lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)


def claim(name: str, profile: str) -> str:
    return next(row[f"ONNX {profile}"] for row in QUANTIZED if row["layer"] == name)


@pytest.mark.parametrize("row", REPEATED, ids=lambda row: row["layer"])
def test_layers_that_stay_float(row: dict[str, str]):
    make, dims = KEPT[row["layer"]]
    layer = make()
    if hasattr(layer, "running_mean"):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    x = torch.randn(2, 3, *(6, 5, 4)[:dims])
    expected = copy.deepcopy(layer).eval()(x)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(expected[0].numel(), 2))
    lsquant.prepare(model, Recipe(4, 4))
    assert type(model[0]) is EXACT_TYPES[getattr(nn, row["layer"])]
    torch.testing.assert_close(model[0].eval()(x), expected)
    lsquant.revert(model)
    assert type(model[0]) is getattr(nn, row["layer"])


def test_stay_float_and_prepare_says_so():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "l": nn.LSTM(8, 8), "o": Own(8, 8)})
    model.update({"b": nn.Bilinear(2, 2, 2), "q": nn.Linear(8, 8)})
    changes = lsquant.prepare(model, Recipe(4, 4, [Rule("q", 4, 4)]))
    stayed = {c.name: c.reason for c in changes if c.weight == "float"}
    assert {"a", "l", "o", "b"} <= set(stayed)
    assert all(stayed.values())
