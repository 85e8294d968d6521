"""ExecuTorch's XNNPACK delegate computes integer-only networks; not a package that the tests install."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("executorch", reason="executorch is not installed; it wants an environment of its own")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_the_exact_form_has_the_codes_and_outputs_of_the_network(bench: Any) -> None:
    study = bench("executorch_xnnpack")
    torch.manual_seed(0)
    network = study.fused(study.with_random_norms(study.Small()), "w4a8", [torch.randn(16, 3, 32, 32)])
    x = torch.randn(4, 3, 32, 32)
    written = study.Written(network, x, exact=True, show=True).eval()
    program = study.Program(written, (x,))
    output, *shown = program(x)
    assert torch.equal(output, network(x))
    codes = network.codes(x)
    for node, got in zip(written.stored, shown, strict=True):
        assert torch.equal(got.long(), codes[node.name] + written.scales[node][1]), node.name
    computed = sum(program.delegates, study.Counter())
    assert computed["XNNConv2d qint8"] == 5
    assert computed["XNNAdd qint8"] == computed["XNNFullyConnected qint8"] == computed["XNNConcatenate2 qint8"] == 1
    assert sum(program.outside.values()) == 1  # codes of the last layer's input to float32
