"""The integer model of transformers' layers and models: outputs equal to the trained ones, weights that can be read."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import lsquant
from helpers import layers_more
from helpers.layers import ready
from helpers.model_table import TYPES
from lsquant import QuantSpec, Recipe
from lsquant.shipped import IntegerLayer

CHANNEL = QuantSpec(4, granularity="channel")
FEW = ("bert", "gpt2", "falcon", "t5", "vit", "clip", "deberta-v2", "mamba")


def test_the_weight_of_transformers_conv1d_is_in_by_out() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for shape in ((2, 3), (4, 4)):
        model = nn.Sequential(conv1d(*shape))
        lsquant.prepare(model, Recipe(CHANNEL, None))
        assert torch.equal(lsquant.to_integer(model)[0].weight, model[0].dequantized_weight())


def check_model_type(name: str) -> None:
    model_types = pytest.importorskip("helpers.model_types")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, TYPES[name].cls):
        pytest.skip(f"transformers {transformers.__version__} has no {TYPES[name].cls}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, batch = model_types.build(name), TYPES[name].batch()
        lsquant.prepare(model, Recipe.preset("w4a8", skip=TYPES[name].skip), example_inputs=batch)
        lsquant.calibrate(model, [batch])
        want = model_types.outputs(model, batch)
        frozen = lsquant.to_integer(model)
        assert model_types.same(model_types.outputs(frozen, batch), want)
    layers = [m for m in frozen.modules() if isinstance(m, IntegerLayer)]
    assert len(layers) == len(list(lsquant.nn.quantized_layers(model))) > 0


def test_linears_of_transformers_are_exported(tmp_path: Path) -> None:
    """Conv1D, whose weight is (in, out), and FalconLinear."""
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    falcon = pytest.importorskip("transformers.models.falcon.modeling_falcon").FalconLinear
    model = nn.Sequential(layers_more.conv1d_of_transformers(5, 12), nn.ReLU(), falcon(5, 7))
    x = ready(model, torch.randn(3, 4, 12), CHANNEL, 4) and torch.randn(2, 4, 12)
    verdict = lsquant.verify(model, lsquant.export_onnx(model, tmp_path / "m.onnx", x), [x])
    assert verdict.exact, verdict
    assert verdict.layers == 2


@pytest.mark.parametrize("name", FEW)
def test_model_types(name: str) -> None:
    check_model_type(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in TYPES if n not in FEW])
def test_other_model_types(name: str) -> None:
    check_model_type(name)
