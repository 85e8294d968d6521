"""Profile small: true sizes of the weights, equal outputs; groups in blocks, with the difference that is stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
from helpers.export_onnx import ready
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.formats.onnx import load_onnx, onnx_model

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

INT4, INT2, UINT4, UINT2, INT8, UINT8 = 22, 26, 21, 25, 3, 2  # onnx.TensorProto


class Widths(nn.Module):
    """A linear layer and a convolution of 3 x 5 weights for every number of bits, and unsigned ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.ModuleList(nn.Linear(5, 3) for _ in range(9))
        self.conv = nn.ModuleList(nn.Conv1d(5, 3, 1) for _ in range(9))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [*(layer(x) for layer in self.linear), *(layer(x.unsqueeze(-1)) for layer in self.conv)]


WIDTHS = [(bits, True) for bits in range(2, 9)] + [(2, False), (4, False)]
TYPES = {
    "linear": [INT2, INT4, INT4, INT8, INT8, INT8, UINT8, UINT2, UINT4],
    "conv": [INT2, INT4, INT4, INT8, INT8, INT8, INT8, UINT2, UINT4],
}
BYTES = [4, 8, 8, 15, 15, 15, 15, 4, 8]


def test_types_and_sizes_of_every_width(tmp_path: Path) -> None:
    rules = [Rule(f"*.{i}", QuantSpec(bits, signed=signed), 4) for i, (bits, signed) in enumerate(WIDTHS)]
    x = torch.randn(4, 5)
    model = ready(Widths(), Recipe(rules=rules), x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="small")
    proto = load_onnx(path)[0]
    assert proto.opset_import[0].version == 25
    tensors = {t.name: t for t in proto.graph.initializer}
    for kind in ("linear", "conv"):
        assert [tensors[f"{kind}.{i}.weight"].data_type for i in range(9)] == TYPES[kind]
        assert [len(tensors[f"{kind}.{i}.weight"].raw_data) for i in range(9)] == BYTES
    # 15 codes of 2 bits, the first in the lowest bits, rows of the transposed weight
    codes = model.linear[0].integer_weight()[0].numpy().T.ravel().tolist() + [0]  # type: ignore[union-attr, index, operator]
    packed = [sum((c & 3) << 2 * k for k, c in enumerate(codes[i : i + 4])) for i in range(0, 16, 4)]
    assert list(tensors["linear.0.weight"].raw_data) == packed
    verdict = lsquant.verify(model, path, [x, x[:1]])
    assert verdict.exact, str(verdict)
    assert verdict.plain is not None
    assert verdict.plain.exact


def test_opset_21_has_four_bits(tmp_path: Path) -> None:
    """For runtimes without INT2: 2-bit codes in INT4, as exact."""
    x = torch.randn(4, 6)
    model = ready(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), Recipe(2, 2), x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="small", opset=21)
    proto = load_onnx(path)[0]
    assert proto.opset_import[0].version == 21
    assert {t.data_type for t in proto.graph.initializer if t.name.endswith("weight")} == {INT4}
    assert lsquant.verify(model, path, [x]).exact
    with pytest.raises(UsageError, match="opset=20 has no 4-bit type"):
        onnx_model(model, x, profile="small", opset=20)


def test_eight_bits_need_no_new_operator_set() -> None:
    x = torch.randn(4, 6)
    model = ready(nn.Sequential(nn.Linear(6, 5)), Recipe(8, 8), x)
    assert onnx_model(model, x, profile="small").opset_import[0].version == 14  # of Add


class Grouped(nn.Module):
    """Weights in groups: a linear layer on (batch, features) and on sequences, and a convolution."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.flat, self.sequence = nn.Linear(64, out), nn.Linear(64, out, bias=False)
        self.conv = nn.Conv2d(8, 4, 2, groups=2)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.flat(x), self.sequence(x.reshape(-1, 1, 64)), self.conv(x.reshape(-1, 8, 2, 4))]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("out", [5, 16])
def test_weights_in_blocks(bits: int, out: int, tmp_path: Path) -> None:
    """DequantizeLinear with block_size.  Along the first axis ONNX Runtime fuses it to MatMulNBits, which rounds the
    activations too (errors of 1e-2), and at 2 bits is wrong where the outputs are no multiple of 4 (errors of 1).
    """
    x = torch.randn(6, 64)
    groups = QuantSpec(bits, granularity="group", group_size=16)
    model = ready(Grouped(out), Recipe(groups, None), x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="small")
    proto = load_onnx(path)[0]
    nodes = {node.name: node for node in proto.graph.node}
    block: Any = nodes["flat/DequantizeLinear_weight"]
    assert {a.name: a.i for a in block.attribute} == {"axis": 1, "block_size": 16}
    tensors = {t.name: t for t in proto.graph.initializer}
    assert tensors["conv.weight"].data_type == {2: INT2, 4: INT4}[bits]
    assert list(tensors["conv.weight_step"].dims) == [4, 1]
    verdict = lsquant.verify(model, path, [x, x[:1]])
    for each in (verdict, verdict.plain):
        assert each is not None
        assert each.reaches("weights"), str(each)
        assert each.checks[-1].largest < 1e-5, str(each)
    # the dequantized weight against the codes, in float64
    (y, *_) = lsquant.onnx_session(path).run(None, {"x": x.numpy()})
    codes, step, _ = model.flat.integer_weight()  # type: ignore[union-attr, operator]
    weight = codes.double().numpy() * np.repeat(step.double().numpy().reshape(out, 4), 16, 1)
    want = x.double().numpy() @ weight.T + model.flat.bias.detach().double().numpy()  # type: ignore[union-attr, operator]
    assert np.abs(y - want).max() < 1e-5


def test_groups_on_both_sides_stay_exact(tmp_path: Path) -> None:
    x = torch.randn(6, 64)
    groups = QuantSpec(4, granularity="group", group_size=16)
    rules = [Rule("conv", QuantSpec(4, granularity="channel"), 4)]
    model = ready(Grouped(5), Recipe(groups, 4, rules), x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="small")
    tensors = {t.name: t for t in load_onnx(path)[0].graph.initializer}
    assert [tensors[f"sequence.weight.group{g}"].data_type for g in range(4)] == [INT4] * 4
    verdict = lsquant.verify(model, path, [x])
    assert verdict.exact, str(verdict)


def test_qdq_meets_the_rules_that_tensorrt_publishes() -> None:
    """Signed INT8 and zero points of 0 at every Q and DQ, unless codes need 8 unsigned bits."""
    x = torch.randn(4, 6)
    layers = [nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)]
    model = ready(nn.Sequential(*layers), Recipe(4, 4, [Rule("last", 8, QuantSpec(8, signed=True))]), x)
    assert points(model, x) == {(INT8, 0)}
    lsquant.revert(model)
    ready(model, Recipe(4, 4, [Rule("last", 8, 8)]), x)
    assert points(model, x) == {(INT8, 0), (UINT8, 0)}


def points(model: nn.Module, x: Tensor) -> set[tuple[int, int]]:
    """(type, value) of all zero points of a qdq file."""
    proto = onnx_model(model, x, profile="qdq")
    tensors = {t.name: t for t in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(nodes) == 9
    found = [tensors[node.input[2]] for node in nodes]
    return {(t.data_type, int(value)) for t in found for value in onnx.numpy_helper.to_array(t).ravel()}
