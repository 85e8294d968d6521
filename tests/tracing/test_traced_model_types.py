"""The transformers model types of the documentation's table, traced: what can be is, and nothing computes otherwise."""

from __future__ import annotations

import copy

import pytest
import torch

import lsquant
from helpers.model_table import TYPES
from helpers.model_types import build, outputs, same, tensors

IMAGES = {
    *("vit", "deit", "beit", "dinov2", "swinv2", "convnext", "convnextv2", "resnet", "regnet", "bit", "mobilenet_v1"),
    *("mobilenet_v2", "efficientnet", "mobilevit", "segformer", "poolformer", "pvt_v2", "focalnet"),
}
"""Types that are traced as a whole."""
QUICK = {"resnet", "vit", "convnext", "efficientnet", "segformer", "gpt2", "chinese_clip"}


def loss(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    torch.manual_seed(3)
    model.train()
    total = torch.stack([t.double().square().mean() for t in tensors(model(**batch))]).sum()
    total.backward()
    return total


@pytest.mark.filterwarnings("ignore")  # transformers' own affairs
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TYPES])
def test_model_type(name):
    pytest.importorskip("transformers")
    try:
        model = build(name)
    except ImportError as error:
        pytest.skip(str(error))
    batch = TYPES[name].batch()
    plain = copy.deepcopy(model)
    result = lsquant.trace(model, batch, strict=False)
    assert result.modules
    if name in IMAGES:
        assert not result.untraced
    assert same(outputs(model, batch), outputs(plain, batch))
    new = dict(result.renamed)
    assert set(model.state_dict()) == {new.get(key, key) for key in plain.state_dict()}
    model.load_state_dict(plain.state_dict())
    assert torch.equal(loss(model, batch), loss(plain, batch))
    expected = {new.get(n, n): p.grad for n, p in plain.named_parameters()}
    for n, p in model.named_parameters():
        assert (p.grad is None) == (expected[n] is None), n
        assert p.grad is None or torch.equal(p.grad, expected[n]), n
