"""Weights of trained networks, dead channels among them: steps, codes and values. Needs LSQUANT_TEST_DATA."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lsquant
import oracle
from lsquant import QuantSpec, Recipe

FILES = ("cifar10_resnet20.safetensors", "imagenet_mobilenet_v1_0.75_224.safetensors")


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("file", FILES)
def test_steps_and_codes_of_real_convolutions(data_folder, file, bits):
    kernels = {k: w for k, w in load_file(data_folder / "checkpoints" / file).items() if w.dim() == 4}
    assert len(kernels) >= 19
    for weight in kernels.values():
        layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)
        layer.weight = nn.Parameter(weight)
        model = nn.Sequential(layer)
        lsquant.prepare(model, Recipe(QuantSpec(bits, granularity="channel"), 8))
        codes, step, _ = model[0].integer_weight()
        usual = 2 * weight.abs().mean((1, 2, 3)) / (2 ** (bits - 1) - 1) ** 0.5
        alive = usual > torch.finfo(torch.float32).tiny
        assert torch.allclose(step[alive], usual[alive], rtol=1e-5)
        assert (step[~alive] == step[alive].median()).all()
        q_min, q_max = oracle.bounds(bits, True)
        for channel in (0, weight.shape[0] - 1):
            expected = oracle.codes(weight[channel].numpy(), step[channel].numpy()[None], q_min, q_max)
            assert (codes[channel].numpy() == expected).all()
