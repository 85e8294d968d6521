"""``to_torchao``: the codes inside torchao's tensors are the trained ones, and torchao computes with them."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lsquant
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import MissingExtra, UsageError

quantization = pytest.importorskip("torchao.quantization")
CHANNEL = QuantSpec(3, granularity="channel")

LAYERS: dict[str, tuple[Any, tuple[int, ...], Any, Any]] = {
    "linear": (lambda: nn.Linear(12, 5), (7, 12), 4, None),
    "linear, channel, 8 bits": (lambda: nn.Linear(12, 5, bias=False), (7, 12), QuantSpec(8, granularity="channel"), 8),
    "linear, groups": (lambda: nn.Linear(12, 5), (2, 3, 12), QuantSpec(2, granularity="group", group_size=4), None),
    "linear, LSQ+": (lambda: nn.Linear(12, 5), (7, 12), CHANNEL, QuantSpec(4, offset=True)),
    "linear, unsigned": (lambda: nn.Linear(12, 5), (7, 12), QuantSpec(8, signed=False), 4),
    "linear, unsigned, 3 bits": (lambda: nn.Linear(12, 5), (7, 12), QuantSpec(3, signed=False), None),
    "linear, narrow": (lambda: nn.Linear(12, 5), (7, 12), QuantSpec(2, narrow=True), None),
    "linear, input only": (lambda: nn.Linear(12, 5), (7, 12), None, 4),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 6), CHANNEL, 4),
    "conv, depthwise": (lambda: nn.Conv2d(4, 4, 3, 2, "valid", groups=4), (2, 4, 5, 6), CHANNEL, 5),
    "conv, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 6), 6, 3),
    "conv, groups of whole kernels": (
        lambda: nn.Conv2d(4, 6, (1, 3)), (2, 4, 5, 6), QuantSpec(4, granularity="group", group_size=6), 8,
    ),
    "embedding": (lambda: nn.Embedding(9, 8), (3, 4), QuantSpec(4, granularity="channel"), None),
    "embedding, groups": (lambda: nn.Embedding(9, 8), (3, 4), QuantSpec(2, granularity="group", group_size=4), None),
}  # fmt: skip


def ready(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor]:
    make, shape, weight, activation = LAYERS[name]
    model = nn.Sequential(make()).to(dtype)
    x = torch.randint(9, shape) if "embedding" in name else torch.randn(shape).to(dtype)
    lsquant.prepare(model, Recipe(weight, activation))
    lsquant.calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_outputs(name: str, dtype: torch.dtype) -> None:
    """Weights bit for bit; each output within K float additions of the trained one, K the terms of a sum."""
    model, x = ready(name, dtype)
    layer: Any = model[0]
    twin: Any = lsquant.to_torchao(model)[0]
    assert type(twin) is layer.float_type
    want = layer.weight
    if layer.weight_quantizer is not None:
        bits, step = layer.weight_quantizer.spec.bits, layer.integer_weight()[1]
        assert isinstance(twin.weight, quantization.IntxUnpackedToInt8Tensor)
        assert twin.weight.target_dtype == getattr(torch, f"int{bits}")
        assert -(2 ** (bits - 1)) <= int(twin.weight.qdata.min()) <= int(twin.weight.qdata.max()) < 2 ** (bits - 1)
        assert torch.equal(twin.weight.scale.reshape(-1), step)
        want = layer.dequantized_weight().to(dtype)
        assert torch.equal(twin.weight.dequantize(), want)
        assert want.unique().numel() > 2
    with torch.no_grad():
        y, expected = twin(x), model.eval()(x)
        assert y.dtype == expected.dtype == dtype
        if name.startswith("embedding"):
            assert torch.equal(y, expected)
            return
        hat = x if layer.input_quantizer is None else layer.input_quantizer(x)
        sizes = copy.deepcopy(layer)
        lsquant.revert(sizes)
        sizes.weight.copy_(want.abs())
        if sizes.bias is not None:
            sizes.bias.copy_(layer.bias.abs())
        terms = want[0].numel() + 2
        tolerance = terms * torch.finfo(dtype).eps * sizes.double()(hat.double().abs())
    assert bool(((y - expected).double().abs() <= tolerance).all())
    assert y.unique().numel() > 2


class Tied(nn.Module):
    """An embedding whose weight is the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(tokens)))


def test_shared_weights_copies_and_files() -> None:
    """A weight-only network: the same values in the same products, so the same outputs; they survive files."""
    model, tokens = Tied(), torch.randint(10, (2, 5))
    lsquant.prepare(model, Recipe.preset("w4", first_last=None))
    keys = list(model.state_dict())
    twin = lsquant.to_torchao(model)
    assert isinstance(model.embed, lsquant.nn.QuantEmbedding)
    assert list(model.state_dict()) == keys
    assert twin.training is False
    assert twin.embed.weight is twin.head.weight
    with torch.no_grad():
        want = model.eval()(tokens)
        buffer = io.BytesIO()
        torch.save(twin.state_dict(), buffer)
        buffer.seek(0)
        other = Tied().eval()
        other.load_state_dict(torch.load(buffer), assign=True)
        for one in (twin, other, copy.deepcopy(twin)):
            assert torch.equal(one(tokens), want)


def test_trained_activations_are_kept() -> None:
    """A network at 3/3 bits with its batch norm: nearly every output as trained, and the copy can be pickled."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )  # fmt: skip
    x = torch.randn(16, 3, 8, 8)
    lsquant.prepare(model, Recipe(CHANNEL, 3))
    lsquant.calibrate(model, [x])
    twin = pickle.loads(pickle.dumps(lsquant.to_torchao(model)))
    with torch.no_grad():
        want = model.eval()(x)
        assert float((twin(x) - want).abs().max()) <= 1e-5 * float(want.abs().max())
        with lsquant.disabled(model, "*.input_quantizer"):
            assert float((model(x) - want).abs().max()) > 1e-2 * float(want.abs().max())


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no quantized layer; call lsquant\.prepare"):
        lsquant.to_torchao(nn.Linear(3, 3))
    model = nn.Sequential(nn.Conv1d(3, 3, 1), nn.Linear(4, 4))
    lsquant.prepare(model, Recipe(4, None))
    with pytest.raises(UsageError, match="0: torchao's tensor serves Linear, Conv2d, Embedding, not Conv1d"):
        lsquant.to_torchao(model)
    conv = nn.Sequential(nn.Conv2d(4, 6, 3))
    lsquant.prepare(conv, Recipe(4, 4, rules=[Rule("0", QuantSpec(4, granularity="group", group_size=12), 4)]))
    with pytest.raises(UsageError, match=r"0\.input_quantizer.*calibrate"):
        lsquant.to_torchao(conv)
    lsquant.calibrate(conv, [torch.randn(1, 4, 5, 5)])
    with pytest.raises(UsageError, match="0: torchao's blocks hold whole kernels of 9 weights, a group of 12"):
        lsquant.to_torchao(conv)
    linear = nn.Linear(4, 4)
    lsquant.prepare(linear, Recipe(4, None))
    with lsquant.disabled(linear), pytest.raises(UsageError, match=r"Linear\.weight_quantizer.*switched off"):
        lsquant.to_torchao(linear)
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(MissingExtra, match=r"lsquant\[torchao\]"):
        lsquant.to_torchao(linear)
