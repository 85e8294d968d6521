"""The true size: the data of a packed file against bits times weights, steps and what stays float, on real networks.

``LSQUANT_TEST_DATA=... python tests/shipped/test_packed_size.py`` prints the table of docs/format.md.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import lsquant
from helpers.random_nets import trained_net
from helpers.real_nets import FILES, real_net, some_input
from lsquant import QuantSpec, Recipe

BITS = (8, 4, 3, 2)


def wanted(model: nn.Module) -> float:
    """Bytes: weights at their bits, a float32 per step, everything else as in the float model."""
    float_keys = [k for k in model.state_dict() if "quantizer" not in k]
    total = float(sum(model.state_dict()[k].nbytes for k in float_keys))
    for _, layer in lsquant.nn.quantized_layers(model):
        if layer.weight_quantizer is not None:
            total += layer.weight.numel() * layer.weight_quantizer.spec.bits / 8 - layer.weight.nbytes
    return total + sum(4 * q.step.numel() for _, q in lsquant.quantizers(model))


def measured(path: Path) -> tuple[int, int]:
    """(bytes of the header, bytes of the tensors)."""
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    return header, len(data) - header


def quantized(name: str, bits: int, folder: Path) -> nn.Module:
    """All layers at these bits, a step per output channel; activations calibrated on random pixels."""
    model = real_net(name, folder)
    lsquant.prepare(model, Recipe(QuantSpec(bits, granularity="channel"), bits))
    lsquant.calibrate(model, [some_input(name)])
    return model.eval()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", FILES)
def test_real_networks(name, bits, data_folder, tmp_path):
    model = quantized(name, bits, data_folder)
    path = lsquant.export_packed(model, tmp_path / "p")
    _, data = measured(path)
    assert wanted(model) <= data <= 1.02 * wanted(model)
    fresh = real_net(name, data_folder)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    other, x = lsquant.load_packed(fresh, path).eval(), some_input(name, 1)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(other(x), y)
    assert y.unique().numel() > 1


@pytest.mark.parametrize("seed", range(20))
def test_random_networks(seed, tmp_path):
    """Small ones: besides the 2 %, a byte per tensor of codes for the bits left over, four per zero point."""
    model = trained_net(seed)
    _, data = measured(lsquant.export_packed(model, tmp_path / "p"))
    layers = len(list(lsquant.nn.quantized_layers(model)))
    offsets = sum(q.step.numel() for _, q in lsquant.quantizers(model) if q.offset is not None)
    assert wanted(model) <= data <= wanted(model) + layers + 4 * offsets


if __name__ == "__main__":
    source = Path(os.environ["LSQUANT_TEST_DATA"])
    with tempfile.TemporaryDirectory() as place:
        for network in FILES:
            for b in BITS:
                net = quantized(network, b, source)
                head, size = measured(lsquant.export_packed(net, Path(place) / "p"))
                weights = sum(m.weight.numel() for _, m in lsquant.nn.quantized_layers(net))
                numbers = (weights, weights * b / 8, wanted(net), size, head)
                print(f"| {network} | {b} | " + " | ".join(f"{n:,.0f}" for n in numbers) + " |")
