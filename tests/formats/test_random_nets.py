"""Random layers and networks: trained = integer model = packed and reloaded = ONNX ``exact``, no bit differs.

Many seeds share one graph, each with its own input and output, because exporting is slow.  Run one seed alone with
``trained_net(seed)`` of random_nets.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
import lsquant.nn as lsq_nn
import oracle
from helpers.random_nets import Block, Net, Side, trained_net
from lsquant.formats.onnx import exact, onnx_model
from lsquant.shipped import IntegerLayer, integer_model, ship
from lsquant.verification.recorder import layer_input, recording
from lsquant.verification.verdict import different

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

PER_GRAPH = 25


def check_equal(first: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if first // PER_GRAPH % 2:  # every other graph adds up in integers what it could in float32
        monkeypatch.setattr(exact, "FLOAT_SUMS", 0)
    side = Side([trained_net(seed) for seed in range(first, first + PER_GRAPH)])
    model = onnx_model(side, (side.example(first, 3),), dynamic_batch=False)
    onnx.save(model, path)
    operators = {node.op_type for node in model.graph.node}
    assert {"Conv", "ConvInteger"} & operators == {"ConvInteger" if first // PER_GRAPH % 2 else "Conv"}
    batches = [(side.example(first + k, 3),) for k in (1, 2)]
    verdict = lsquant.verify(side, path, batches, forward=lambda m, batch: m(batch[0]))
    assert verdict.exact, f"seeds {first} to {first + PER_GRAPH - 1}:\n{verdict}"
    assert verdict.plain is not None
    assert verdict.plain.exact, f"seeds {first} to {first + PER_GRAPH - 1}:\n{verdict.plain}"
    assert all(check.compared > 0 for check in verdict.checks)
    seeds = range(first, first + PER_GRAPH)
    lsquant.export_packed(side, path.with_suffix(".packed"))
    fresh = [Net(seed) for seed in seeds]
    for one, other in zip(fresh, side.nets, strict=True):
        for block, trained in zip(one.blocks, other.blocks, strict=True):
            block.act = trained.act  # may have been exchanged
    reloaded = lsquant.load_packed(Side(fresh), path.with_suffix(".packed")).eval()
    for name, other in (("integer model", integer_model(ship(side))), ("packed file", reloaded)):
        with torch.no_grad():
            for (inputs,) in batches:
                for seed, y, want in zip(seeds, other(inputs), side(inputs), strict=True):
                    assert not different(y.numpy(), want.numpy()).any(), f"{name}, seed {seed}"


@pytest.mark.parametrize("first", range(0, 100, PER_GRAPH))
def test_trained_equals_onnx(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(first, tmp_path / "side.onnx", monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(100, 1100, PER_GRAPH))
def test_trained_equals_onnx_more(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_equal(first, tmp_path / "side.onnx", monkeypatch)


@pytest.mark.parametrize("seed", range(40))
def test_trained_layers_equal_the_oracle(seed: int) -> None:
    """Codes and outputs of every layer, against loops in NumPy that share no code with the package."""
    net = trained_net(seed)
    (x,) = Side([net]).example(seed, 2)
    with torch.no_grad(), recording(net) as calls:
        net(x)
    for (name, _), recorded in calls[0].layers.items():
        layer: Any = net.get_submodule(name)
        want = by_oracle(layer, layer_input(layer, recorded.input).numpy())
        assert not different(recorded.output.numpy(), want).any(), f"seed {seed}, layer {name}"


def by_oracle(layer: Any, x: np.ndarray) -> np.ndarray:
    source, weights = layer.input_quantizer, layer.weight_quantizer
    s_x, s_w = (oracle.guard(q.step.detach().numpy(), q.initial_step.numpy()) for q in (source, weights))
    lo, hi = oracle.bounds(source.spec.bits, source.q_min < 0, source.spec.narrow)
    z = 0 if source.offset is None else int(oracle.lsq_plus_zero_point(source.offset.detach().numpy(), s_x, lo, hi)[0])
    w, bias = layer.weight.detach().numpy(), None if layer.bias is None else layer.bias.detach().numpy()
    size = weights.spec.group_size
    axis = 0 if weights.spec.granularity == "channel" else None
    q_w = oracle.codes(w, s_w, *oracle.bounds(weights.spec.bits, True, weights.spec.narrow), axis=axis, group_size=size)
    q_x = oracle.codes(x, s_x, lo, hi, z)
    if isinstance(layer, nn.ConvTranspose2d):
        index = oracle.output_channels(w.shape, layer.groups) if len(s_w) > 1 else np.zeros(w.shape, int)
        q_w = np.clip(np.rint(w / s_w[index]), *oracle.bounds(weights.spec.bits, True, weights.spec.narrow))
        options = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.output_padding)
        return oracle.transposed_convolution(oracle.codes(x, s_x, lo, hi, z), z, s_x[0], q_w, s_w, bias, *options)
    if isinstance(layer, nn.Conv2d):
        padding = layer.padding if layer.padding_mode == "zeros" else 0
        geometry: Any = (layer.stride, padding, layer.dilation, layer.groups)
        return oracle.conv2d(q_x, z, s_x[0], q_w, s_w, bias, *geometry)
    if size is not None:
        return oracle.linear_groups(q_x, z, s_x[0], q_w, s_w, size, bias)
    return oracle.linear(q_x, z, s_x[0], q_w, s_w, bias)


def test_the_seeds_cover_what_they_should() -> None:
    """The first 100 networks contain every kind of layer and quantizer that the exact profile promises."""
    seen: set[Any] = set()
    for seed in range(100):
        net = trained_net(seed)
        for _, layer in lsq_nn.quantized_layers(net):
            w, x = layer.weight_quantizer, layer.input_quantizer
            assert w is not None
            assert x is not None
            seen |= {("w", w.spec.bits), ("x", x.spec.bits), (type(layer).__name__, w.spec.granularity)}
            seen |= {("signed", x.q_min < 0), ("offset", x.spec.offset), ("narrow", x.spec.narrow, w.spec.narrow)}
            seen.add(("guarded", bool((w.step < 0).any())))
            if isinstance(layer, nn.ConvTranspose2d):
                seen |= {("transposed groups", layer.groups > 1), ("extra", max(layer.output_padding) > 0)}
            if isinstance(layer, nn.Conv2d):
                seen |= {("depthwise", layer.groups == layer.in_channels > 1), ("grouped", layer.groups > 1)}
                seen |= {("mode", layer.padding_mode), ("same", layer.padding == "same"), ("dilation", layer.dilation)}
        seen.add(("layers", len(list(lsq_nn.quantized_layers(net)))))
        for module in net.modules():
            if isinstance(module, Block):
                seen.add(("residual", module.residual))
            if isinstance(module, nn.BatchNorm2d):
                seen.add(("gamma", bool((module.weight < 0).any()), bool((module.weight > 0).any())))
            seen.add(type(module).__name__)
    wanted: set[Any] = {(kind, bits) for kind in "wx" for bits in range(2, 9)}
    wanted |= {("QuantLinear", g) for g in ("tensor", "channel", "group")}
    wanted |= {(kind, g) for kind in ("QuantConv2d", "QuantConvTranspose2d") for g in ("tensor", "channel")}
    wanted |= {("layers", n) for n in (1, 3, 4, 5)}
    wanted |= {
        (kind, yes)
        for kind in (
            "signed",
            "offset",
            "depthwise",
            "grouped",
            "same",
            "guarded",
            "residual",
            "transposed groups",
            "extra",
        )
        for yes in (True, False)
    }
    wanted |= {("narrow", x, w) for x in (True, False) for w in (True, False)}
    wanted |= {("mode", mode) for mode in ("zeros", "reflect", "replicate", "circular")}
    wanted |= {("gamma", True, True), "ExactAvgPool2d", "ExactAdaptiveAvgPool2d", "MaxPool2d", "ReLU", "LeakyReLU"}
    assert wanted <= seen, wanted - seen


def test_integer_model_holds_no_float_weight() -> None:
    net = trained_net(3)
    frozen = integer_model(ship(net))
    assert not list(frozen.parameters())
    for name, module in frozen.named_modules():
        assert not isinstance(module, lsq_nn.QuantizedLayer), name
        if isinstance(module, IntegerLayer):
            assert "weight" not in {*module.state_dict(), *dict(module.named_buffers())}
            assert module.codes is not None
            assert module.codes.dtype == torch.int8
    assert net.training is False
