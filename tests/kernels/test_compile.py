"""torch.compile around quantized models: one graph, no recompilation, the same bits of codes and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lsquant


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


def train(model: nn.Module, run, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.05), momentum=0.9)
    outputs = []
    for x in batches:
        y = run(x)
        optimizer.zero_grad()
        (y**2).mean().backward()
        optimizer.step()
        outputs.append(y.detach().clone())
    return outputs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("engine", ["eager", "cpp"])
def test_a_compiled_model_trains_as_the_eager_one_in_one_graph(backend: str, engine: str) -> None:
    torch._dynamo.reset()
    batches = [torch.randn(4, 3, 9, 9) for _ in range(4)]
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        model = small_cnn()
        lsquant.prepare(model, lsquant.Recipe.preset("w4a4"), example_inputs=batches[0])
        lsquant.calibrate(model, batches)
        models.append(model.train())
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(models[1], fullgraph=True, backend=backend)
    expected, found = train(models[0], models[0], batches), train(models[1], compiled, batches)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "recompiled from step to step"
    assert not torch._dynamo.utils.counters["graph_break"]
    if backend == "aot_eager":
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)
    steps = [[q.step.detach() for _, q in lsquant.quantizers(m)] for m in models]
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
