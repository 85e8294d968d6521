"""`torch.fx.symbolic_trace`, with no argument: quantized layers are nodes, and the graph is a model like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import lsquant
from helpers.every_form import forms
from lsquant import QuantSpec, Recipe, UsageError

pytest.importorskip("onnxruntime")


class Block(nn.Module):
    """All kinds of modules that `prepare` exchanges, a stand-alone quantizer, and operations between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.AvgPool2d(2)
        self.up, self.last_pool = nn.ConvTranspose2d(4, 4, 2), nn.AdaptiveAvgPool2d(1)
        self.own, self.head = lsquant.Quantizer(QuantSpec(8), count=4), nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.norm(self.conv(x)).relu()) + 1
        return self.head(self.own(self.last_pool(self.up(x, output_size=[4, 4]))))


def ready() -> tuple[nn.Module, Tensor]:
    model, x = Block(), torch.randn(5, 2, 8, 8)
    lsquant.prepare(model, Recipe(4, 4), example_inputs=x)
    lsquant.calibrate(model, [x])
    return model, x


def called(graph: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]


def test_layers_are_nodes_and_outputs_are_equal() -> None:
    model, x = ready()
    traced = fx.symbolic_trace(model)
    assert called(traced) == ["conv", "norm", "pool", "up", "last_pool", "own", "head.0", "head.1"]
    assert traced.conv is model.conv
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(x), model.train(mode)(x))


def test_the_graph_trains_as_the_model() -> None:
    model, x = ready()
    traced = fx.symbolic_trace(model)
    gradients = []
    for one in (model, traced):
        one.train().zero_grad()
        one(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in one.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("weight_quantizer.step" in name for name in gradients[0])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_graph_ships_as_the_model(tmp_path: Path) -> None:
    model, x = ready()
    traced = fx.symbolic_trace(model.eval())
    expected = model(x).detach()
    found = forms(traced, Block, x, tmp_path)
    assert {name: torch.equal(y, expected) for name, y in found.items()} == dict.fromkeys(found, True)
    frozen = fx.symbolic_trace(lsquant.to_integer(model))
    assert called(frozen) == called(traced)
    assert torch.equal(frozen(x), expected)
    assert type(lsquant.revert(traced).conv) is nn.Conv2d


def test_a_graph_of_the_float_model_is_prepared() -> None:
    model, x = Block(), torch.randn(5, 2, 8, 8)
    traced = fx.symbolic_trace(model)
    lsquant.prepare(traced, Recipe(4, 4), example_inputs=x)
    lsquant.calibrate(traced, [x])
    assert torch.equal(lsquant.to_integer(traced)(x), traced.eval()(x))


def test_embedding_conv1d_and_encoder() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    model = nn.Sequential(nn.Embedding(9, 8), Conv1D(8, 8), encoder, nn.Linear(8, 3)).eval()
    index = torch.randint(9, (2, 5))
    lsquant.prepare(model, Recipe(4, 8), example_inputs=index)
    lsquant.calibrate(model, [index])
    traced = fx.symbolic_trace(model)
    assert called(traced) == ["0", "1", "2", "3"]
    assert torch.equal(traced(index), model(index))
    layer = encoder.layers[0]
    assert called(fx.symbolic_trace(nn.Sequential(layer))) == ["0"]


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(4, 4, 1)])
def test_a_layer_alone_has_no_graph(make: Any) -> None:
    layer = make()
    lsquant.prepare(layer, Recipe(4, 4))
    with pytest.raises(UsageError, match=r"a Quant\w+ has no graph of its own in torch\.fx: trace a module that"):
        fx.symbolic_trace(layer)
