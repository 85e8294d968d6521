"""verify on packed files: exact, and what differs where a file is not the trained model's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lsquant
from helpers.checkpoint import VARIED, trained
from helpers.convert import images, net, ready
from helpers.packed_files import read, write
from lsquant import Recipe
from lsquant._util.errors import MissingFile, UsageError


def test_an_exact_verdict(tmp_path):
    model, x = trained(), images(6)
    verdict = lsquant.verify(model, lsquant.export_packed(model, tmp_path / "p"), [x, x[:2]])
    assert verdict.exact
    assert (verdict.profile, verdict.samples, verdict.batches, verdict.layers) == ("packed", 8, 2, 2)
    assert all(check.compared > 0 for check in verdict.checks)
    assert [check.level for check in verdict.checks] == ["weights", "layers", "layers", "codes", "outputs"]
    assert "PyTorch" in verdict.runtime
    assert "exact: equal outputs" in str(verdict)
    assert verdict.to_dict()["level"] == "outputs"


# what is changed in the file -> which comparisons then differ: weights; codes and outputs layer by layer; codes and
# outputs end to end; and the name that the first of these blames
CHANGES = {
    "5.weight_quantizer.codes": ("10101", "5.weight_quantizer"),
    "5.weight_quantizer.step": ("10101", "5.weight_quantizer"),
    "5.input_quantizer.step": ("11111", "5.input_quantizer"),
    "0.input_quantizer.zero_point": ("11111", "0.input_quantizer"),
    "5.bias": ("00101", "5"),
    "1.weight": ("00011", "5"),  # BatchNorm, before the last layer
    "6.weight": ("00001", "output 0"),  # BatchNorm, after it
}


@pytest.mark.parametrize("name", CHANGES)
def test_verify_tells_what_differs(name, tmp_path):
    """The verdict is of the file: the reloaded model is a copy of the trained one in nothing else."""
    x = images(6)
    model = ready(nn.Sequential(*net(), nn.BatchNorm1d(3)), VARIED, x).eval()
    tensors, document = read(lsquant.export_packed(model, tmp_path / "p"))
    tensors[name] += torch.ones_like(tensors[name])
    write(tmp_path / "p", tensors, document)
    verdict = lsquant.verify(model, tmp_path / "p", [x])
    differs, worst = CHANGES[name]
    assert "".join(str(int(check.mismatches > 0)) for check in verdict.checks) == differs, verdict
    assert verdict.level == ("none", "weights", "weights", "layers", "codes")[differs.index("1")]
    assert not verdict.exact
    first = next(check for check in verdict.checks if check.mismatches)
    assert first.worst == worst
    assert first.largest > 0


def test_verify_with_a_damaged_file_or_another_model(tmp_path):
    model = trained()
    lsquant.export_packed(model, tmp_path / "p")
    with pytest.raises(UsageError, match="another architecture"):
        lsquant.verify(ready(nn.Sequential(nn.Linear(4, 2)), Recipe(4, 4), torch.randn(4, 4)), tmp_path / "p", [])
    with pytest.raises(UsageError, match="did not call the model"):
        lsquant.verify(model, tmp_path / "p", [images(2)], forward=lambda m, batch: None)
    with pytest.raises(UsageError, match="runs in pytorch: leave out runtime='openvino'"):
        lsquant.verify(model, tmp_path / "p", [images(2)], runtime="openvino")
    with pytest.raises(MissingFile):
        lsquant.verify(model, tmp_path / "none.safetensors", [images(2)])
