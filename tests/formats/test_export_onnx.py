"""ONNX files: what they hold, what their names are, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lsquant
import lsquant.nn as lsq_nn
from helpers.export_onnx import ready, small, tiny
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.formats.onnx import load_onnx, onnx_model
from lsquant.formats.onnx.reader import initializers

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


def run(path: Path, *arrays: Tensor) -> list[np.ndarray]:
    session = lsquant.onnx_session(path)
    return session.run(None, {i.name: a.numpy() for i, a in zip(session.get_inputs(), arrays, strict=True)})


@torch.no_grad()
def outputs(model: nn.Module, *inputs: Tensor) -> list[np.ndarray]:
    model.eval()
    y = model(*inputs)
    return [t.numpy() for t in (y if isinstance(y, (tuple, list)) else [y])]


# ---- what the file says ----


def test_names_and_types_of_the_exact_profile() -> None:
    model, x = small(rules=[Rule("fc", QuantSpec(8, granularity="channel"), 8)])
    proto = onnx_model(model, x)
    nodes = {node.name: node.op_type for node in proto.graph.node}
    for name in ("conv1/QuantizeLinear", "conv1/Conv", "conv1/Mul", "bn1/Mul", "bn1/Add"):
        assert nodes[name] == name.split("/")[1]
    assert {"conv2/Clip", "conv2/Clip_sums", "conv2/Add_bias", "fc/MatMulInteger", "pool/Div"} <= set(nodes)
    assert not set(nodes.values()) & {"Gemm", "MatMul", "DequantizeLinear", "BatchNormalization"}
    values = initializers(proto)
    codes = {name: layer.integer_weight()[0].numpy() for name, layer in lsq_nn.quantized_layers(model)}
    assert values["conv1.weight"].dtype == np.int8
    assert (values["conv1.weight"] == codes["conv1"]).all()
    assert values["fc.weight"].dtype == np.uint8  # 8 bits: code + 128, transposed
    assert (values["fc.weight"].T.astype(int) - 128 == codes["fc"]).all()
    alpha, beta = model.bn1.affine_constants()  # type: ignore[operator, union-attr]
    assert (values["bn1.alpha"].ravel() == alpha.detach().numpy()).all()
    assert (values["bn1.beta"].ravel() == beta.detach().numpy()).all()
    scale = model.conv1.input_quantizer.effective_step() * model.conv1.weight_quantizer.effective_step()  # type: ignore
    assert (values["conv1.scale"] == scale.detach().numpy()).all()


@pytest.mark.parametrize("profile", ["exact", "qdq"])
def test_the_file_holds_no_float_weight_and_no_unused_initializer(profile: str) -> None:
    model, x = small()
    proto = onnx_model(model, x, profile=profile)
    used = {name for node in proto.graph.node for name in node.input}
    assert {t.name for t in proto.graph.initializer} <= used
    largest = max(a.size for a in initializers(proto).values() if a.dtype == np.float32)
    assert largest <= 6  # per channel at most


def test_metadata(tmp_path: Path) -> None:
    model, x = small()
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="qdq")
    proto, metadata = load_onnx(path)
    assert metadata["profile"] == "qdq"
    assert metadata["version"] == lsquant.__version__
    assert metadata["session"] == {"session.x64quantprecision": "1"}
    assert [fact.layer for fact in metadata["layers"]] == ["conv1", "conv2", "fc"]
    produced = {name for node in proto.graph.node for name in node.output} | {"x"}
    for fact in metadata["layers"]:
        assert {fact.input, fact.codes, fact.output} <= produced
        assert set(fact.weights) <= set(initializers(proto))
    assert [v.name for v in proto.graph.output] == ["output"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_nothing_of_the_exporting_machine_is_in_the_file_and_it_is_repeatable() -> None:
    model, x = small()
    first, second = (onnx_model(model, x, dynamic_batch=False).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    for trace in (str(Path(__file__).parent).encode(), b"site-packages", b"forward", b"test_export"):
        assert trace not in first


class Widths(nn.Module):
    """A linear layer for every number of bits and sign of its input, on the same input in units of its step."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = [(bits, signed) for bits in range(2, 9) for signed in (True, False)]
        self.layers = nn.ModuleList(nn.Linear(4, 3) for _ in self.kinds)
        self.register_buffer("units", torch.ones(len(self.kinds)))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x * unit) for layer, unit in zip(self.layers, self.units, strict=True)]  # type: ignore[arg-type]


@pytest.mark.parametrize("profile", ["exact", "qdq"])
def test_codes_are_in_range_at_any_width(profile: str, tmp_path: Path) -> None:
    """Values far outside, ties and the last code on each side; qdq: int8 containers where the codes fit."""
    model = Widths()
    rules = [Rule(f"layers.{i}", b, QuantSpec(b, signed=signed)) for i, (b, signed) in enumerate(model.kinds)]
    ready(model, Recipe(rules=rules), torch.rand(8, 4))
    for i, layer in enumerate(model.layers):
        model.units[i] = layer.input_quantizer.effective_step().item()  # type: ignore[index, union-attr, operator]
    x = torch.linspace(-300.0, 300.0, 1201).repeat(4, 1).T.contiguous()
    x = torch.cat([x, torch.tensor([[3e38, -3e38, 1e-45, 0.0]])])
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
    verdict = lsquant.verify(model, path, [x])
    assert all(check.mismatches == 0 for check in verdict.checks if "codes" in check.what), str(verdict)
    values = initializers(load_onnx(path)[0])
    for i, (bits, signed) in enumerate(model.kinds):
        wide = profile == "exact" or (bits == 8 and not signed)
        assert values[f"layers.{i}.input_zero_point"].dtype == (np.uint8 if wide else np.int8)
    assert profile == "qdq" or verdict.exact


# ---- shapes of models ----


@pytest.mark.parametrize("profile", ["exact", "qdq"])
def test_dynamic_batch_from_an_example_of_one(profile: str, tmp_path: Path) -> None:
    model, x = small()
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x[:1], profile=profile)
    for n in (1, 2, 4):
        (y,), (want,) = run(path, x[:n]), outputs(model, x[:n])
        assert y.shape == want.shape
        assert np.abs(y - want).max() <= (0 if profile == "exact" else 1e-5)


def test_mode_and_model_are_left_as_they_were(tmp_path: Path) -> None:
    model, x = small()
    model.train()
    model.get_submodule("bn1").eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    model(x).sum().backward()
    assert model.get_parameter("fc.weight").grad is not None


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        u, v = self.a(x), self.b(y)
        return u + v, {"u": u}


def test_several_inputs_and_outputs_by_position_and_by_keyword(tmp_path: Path) -> None:
    x, y = torch.randn(6, 5), torch.randn(6, 2, 3)[:, 0]
    model = ready(TwoInputs(), Recipe(4, 4), x, y)
    path = lsquant.export_onnx(model, tmp_path / "b.onnx", {"x": x, "y": y})
    verdict = lsquant.verify(model, path, [{"x": x[:4], "y": y[:4]}, {"x": x[4:], "y": y[4:]}])
    assert verdict.exact, str(verdict)
    verdict = lsquant.verify(model, path, [(x, y)], forward=lambda m, b: m(*b))
    assert verdict.exact, str(verdict)
    assert verdict.checks[-1].parts == 2


def test_a_pair_of_inputs_and_labels_is_a_batch(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(5, 4)), torch.randn(6, 5)
    ready(model, Recipe(4, 4), x)
    labels = torch.zeros(6, dtype=torch.long)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", (x, labels))
    assert lsquant.verify(model, path, [(x, labels)]).exact


class CapitalInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 4)

    def forward(self, Linear: Tensor | None = None) -> Tensor:
        assert Linear is not None
        return self.linear(Linear)


def test_a_keyword_with_a_capital(tmp_path: Path) -> None:
    x = torch.randn(6, 5)
    model = CapitalInput()
    lsquant.prepare(model, Recipe(4, 4), {"Linear": x})
    lsquant.calibrate(model, [{"Linear": x}])
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", {"Linear": x})
    assert lsquant.verify(model, path, [{"Linear": x}]).exact


class Repeats(nn.Module):
    """One layer called twice, and one shared under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.again = self.first
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.again(torch.relu(self.first(torch.relu(self.first(x))))))


def test_a_layer_called_several_times(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    model = ready(Repeats(), Recipe(3, 3), x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    verdict = lsquant.verify(model, path, [x])
    assert verdict.exact, str(verdict)
    facts = load_onnx(path)[1]["layers"]
    assert [(fact.layer, fact.call) for fact in facts] == [("first", 0), ("first", 1), ("first", 2), ("last", 0)]
    assert len({tuple(fact.weights) for fact in facts}) == 2


def test_the_model_is_itself_a_layer(tmp_path: Path) -> None:
    x = torch.randn(5, 6)
    model = ready(nn.Linear(6, 3), Recipe(4, 4), x)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    assert lsquant.verify(model, path, [x]).exact


def test_sequences_and_groups(tmp_path: Path) -> None:
    """(batch, sequence, features); one MatMulInteger a group, added in order."""
    x = torch.randn(3, 7, 12)
    groups = QuantSpec(4, granularity="group", group_size=4)
    model = ready(nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 2)), Recipe(4, 4, [Rule("0", groups)]), x)
    proto = onnx_model(model, x)
    sums = [node for node in proto.graph.node if node.op_type == "MatMulInteger" and node.name.startswith("0/")]
    assert len(sums) == 3
    for profile, level in (("exact", "outputs"), ("qdq", "weights")):
        path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
        verdict = lsquant.verify(model, path, [x])
        assert verdict.reaches(level), str(verdict)
        assert verdict.checks[-1].largest < 1e-5


@pytest.mark.parametrize("profile", ["exact", "qdq"])
def test_layers_quantized_in_one_half_only(profile: str, tmp_path: Path) -> None:
    """Weights only, inputs only, not at all; the runtime must not quantize on its own account."""
    rules = [Rule("conv1", QuantSpec(3, granularity="channel"), None), Rule("conv2", None, 4), Rule("fc", None, None)]
    model, x = small(rules=rules)
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
    verdict = lsquant.verify(model, path, [x, x[:1]])
    assert verdict.level != "none"
    assert verdict.layers == 2
    for each in (verdict, verdict.plain):
        assert each is not None
        assert all(check.mismatches == 0 for check in each.checks if "input codes, layer" in check.what), str(each)
        assert each.checks[-1].largest < 1e-5


def test_the_runtime_does_not_quantize_bias_or_float_weights(tmp_path: Path) -> None:
    """ONNX Runtime by itself quantizes the bias, or a float weight, of a Conv or Gemm between DQ and Q: 3 codes off."""
    chain = [
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 32),
        nn.ReLU(),
    ]
    x = torch.randn(16, 3, 6, 6)
    for weight in (8, None):
        model = ready(nn.Sequential(*chain, nn.Linear(32, 4)), Recipe(weight, 8), x)
        path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="qdq")
        verdict = lsquant.verify(model, path, [x]).plain
        assert verdict is not None
        codes = next(check for check in verdict.checks if check.level == "codes")
        assert codes.mismatches <= 1e-4 * codes.compared, str(verdict)
        lsquant.revert(model)


def test_exact_holds_at_extreme_codes_in_a_plain_session(tmp_path: Path) -> None:
    """8-bit weights and inputs at the ends of their ranges: pairs of products overflow 16 bits without VNNI."""
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))
    x = torch.rand(4, 16, 6, 6) + 1
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.copy_(1 - 2.0 * (torch.rand_like(layer.weight) < 0.03))  # type: ignore[operator, arg-type]
    ready(model, Recipe(QuantSpec(8, granularity="channel"), 8), x)
    with torch.no_grad():
        for _, layer in lsq_nn.quantized_layers(model):
            layer.weight_quantizer.step.fill_(1 / 127)  # type: ignore[union-attr]
            layer.input_quantizer.step.mul_(0.5)  # type: ignore[union-attr]
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    verdict = lsquant.verify(model, path, [x])
    assert verdict.exact, str(verdict)
    assert verdict.plain is not None
    assert verdict.plain.exact, str(verdict.plain)
    levels = ort.GraphOptimizationLevel
    (want,) = outputs(model, x)
    for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_BASIC, levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL):
        session = lsquant.onnx_session(path, graph_optimization_level=level)
        assert (session.run(None, {session.get_inputs()[0].name: x.numpy()})[0] == want).all()


class Alone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.q = lsquant.Quantizer(QuantSpec(4), count=4)
        self.c = lsquant.Quantizer(QuantSpec(3, signed=True, granularity="channel"), (4,), axis=-1, count=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.fc(x)) + self.q(x)


@pytest.mark.parametrize("profile", ["exact", "qdq"])
def test_stand_alone_quantizers(profile: str, tmp_path: Path) -> None:
    x = torch.randn(6, 4)
    model = Alone()
    lsquant.prepare(model, Recipe(4, 4))
    for quantizer in (model.q, model.c, model.fc.input_quantizer):
        quantizer.initialize(x)  # type: ignore[union-attr, operator]
    model.fc.input_quantizer.set_count(4)  # type: ignore[union-attr, operator]
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
    verdict = lsquant.verify(model, path, [x * 5])
    assert verdict.layers == 3
    assert verdict.reaches("outputs" if profile == "exact" else "weights"), str(verdict)


# ---- opset ----


def test_opset(tmp_path: Path) -> None:
    model, x = tiny()
    assert onnx_model(model, x).opset_import[0].version == 14
    for opset in (18, 21):
        path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, opset=opset)
        assert onnx.load(path).opset_import[0].version == opset
        assert lsquant.verify(model, path, [x]).exact
    with pytest.raises(UsageError, match=r"opset=11 is too low.*needs"):
        onnx_model(model, x, opset=11)


# ---- sessions ----


def test_session_options(tmp_path: Path) -> None:
    model, x = tiny()
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="qdq")
    options = lsquant.onnx_session(path, intra_op_num_threads=1).get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.get_session_config_entry("session.x64quantprecision") == "1"
    options = lsquant.onnx_session(path, **{"session.x64quantprecision": "0"}).get_session_options()
    assert options.get_session_config_entry("session.x64quantprecision") == "0"
    with pytest.raises(UsageError, match="no attribute"):
        lsquant.onnx_session(path, threads=1)
    assert json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["lsquant.session"])


@pytest.mark.parametrize("profile", ["exact", "small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_of_another_type_with_float32_inputs(dtype: torch.dtype, profile: str, tmp_path: Path) -> None:
    """Layers multiply codes and add their bias in float32, whatever the type of their parameters."""
    x = torch.randn(6, 3, 5, 5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))
    lsquant.prepare(model, Recipe(4, 4))
    lsquant.calibrate(model, [x])
    model.to(dtype).eval()
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile=profile)
    session = ort.InferenceSession(str(path))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert torch.equal(torch.from_numpy(got), model(x).detach())
