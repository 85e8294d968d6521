"""Targets of integer-only networks: which codes they have, how files hold them, and what is equal."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
import oracle
from helpers import packed_files
from helpers.command_line import TINY, refused, run
from helpers.integer_nets import drawn
from lsquant import QuantSpec, Recipe, Rule, UsageError
from lsquant._util.errors import DamagedFile
from lsquant.checkpoint import read_metadata
from lsquant.formats.onnx.reader import load_onnx, onnx_session
from lsquant.nn.stored import FUNCTIONS
from lsquant.runs.directory import read_run
from lsquant.verification.runtimes.integer_runner import _with_codes

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

SEEDS = range(0, 20, 5)
PER_TEST = 5
FORMS = {"onnxruntime": ("qdq", "qoperator"), "xnnpack": ("qdq", "qoperator"), "tensorrt": ("qdq",)}
INT8, UINT8, FLOAT = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8, onnx.TensorProto.FLOAT)


class Everything(nn.Module):
    """Moves of every kind, functions that are tables, a product, an average over windows, a linear layer over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pad, self.pool = nn.Conv2d(3, 8, 3), nn.ZeroPad2d(1), nn.MaxPool2d(2)
        self.up, self.shuffle = nn.Upsample(scale_factor=2), nn.PixelShuffle(2)
        self.a, self.mish, self.gelu = nn.Conv2d(2, 4, 1), nn.Mish(), nn.GELU("tanh")
        self.windows, self.back = nn.AvgPool2d(2), nn.ConvTranspose2d(4, 4, 3, 2, 1)
        self.cat, self.mul = lsquant.nn.Cat(1), lsquant.nn.Mul()
        self.part, self.rows, self.silu = lsquant.nn.Slice(slice(None), slice(1, 5)), nn.Linear(15, 6), nn.SiLU()
        self.end = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.pool(self.pad(torch.relu(self.stem(x)))))
        x = self.gelu(self.a(self.mish(self.shuffle(x))))
        y = self.back(self.windows(x))
        x = self.part(self.cat(self.mul(y, y), y))
        return self.end(self.silu(self.rows(x)))


def everything(target: str) -> tuple[Any, Tensor]:
    torch.manual_seed(3)
    model, x = Everything().eval(), torch.randn(3, 3, 8, 8)
    lsquant.trace(model, x)
    lsquant.prepare(model, Recipe.preset("w6a8", integer_only=True, target=target), example_inputs=x)  # type: ignore[arg-type]
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    assert network.program.floats == []
    return network, x


def initializers(proto: Any) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def values_in(path: Path, names: list[str], x: Tensor) -> list[np.ndarray]:
    """What ONNX Runtime, without any optimisation, finds for values inside a file; their types are its own finding."""
    model = onnx.load(path)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(names, {session.get_inputs()[0].name: x.numpy()})


# ---- xnnpack: the same network in int8 ----


@pytest.mark.parametrize("first", [SEEDS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SEEDS[1:])])
def test_int8_is_the_same_network_in_another_container(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + PER_TEST):
        wanted, _, x = drawn(seed)
        network, _, _ = drawn(seed, "xnnpack")
        codes = wanted.codes(x)
        with torch.no_grad():
            output = wanted(x)
            assert torch.equal(network(x), output), seed
        for form in FORMS["xnnpack"]:
            path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form=form)
            verdict = lsquant.verify(network, path, [x, 2 * torch.randn(3, 3, 8, 8)])
            assert verdict.exact, f"seed {seed}\n{verdict}"
            assert all(check.compared for check in verdict.checks)
            found = onnx_session(path).run(None, {"x": x.numpy()})[0]
            assert np.asarray(found).tobytes() == output.numpy().tobytes(), (seed, form)
            traces = {t.layer: t for t in load_onnx(path)[1]["layers"] if t.codes is not None}
            assert set(traces) == set(network.taps)
            for name, held in zip(traces, values_in(path, [t.codes for t in traces.values()], x), strict=True):
                assert held.dtype == np.int8, name
                signed = bool((codes[name] < 0).any())
                shift = traces[name].stored_shift
                assert shift in ((0,) if signed else (0, -128))
                if form == "qoperator":
                    assert np.array_equal(held.astype(np.int64) - shift, codes[name].numpy()), (seed, name)
        assert lsquant.verify(network, lsquant.export_program(network, tmp_path / "p"), [x]).exact


def test_zero_points_of_int8_literal(tmp_path: Path) -> None:
    """A signed input and an unsigned tensor behind a ReLU."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval(), torch.randn(2, 3, 4, 4)
    wanted = {"onnxruntime": (128, 0), "xnnpack": (0, -128), "tensorrt": (0, 0)}
    for target, points in wanted.items():
        lsquant.prepare(model, Recipe(8, 8, joins=8, target=target), example_inputs=x)  # type: ignore[arg-type]
        lsquant.calibrate(model, [x], weights="mse", again=True)  # codes beyond 64, for which the option is
        path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer")
        proto = onnx.load(path)
        values = initializers(proto)
        held = [values[node.input[2]] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
        assert tuple(map(int, held)) == points
        assert {point.dtype.name for point in held} == {"uint8" if target == "onnxruntime" else "int8"}
        session = {"onnxruntime": "session.x64quantprecision"}.get(target, "session.qdqisint8allowed")
        assert load_onnx(path)[1]["session"] == {session: "1"}


def test_the_runtime_computes_with_integers(tmp_path: Path) -> None:
    """With the option that the file recommends."""
    network, x = everything("xnnpack")
    for form in FORMS["xnnpack"]:
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form=form)
        optimised = str(tmp_path / "optimised.onnx")
        onnx_session(path, optimized_model_filepath=optimised, log_severity_level=4)
        found = Counter(node.op_type for node in onnx.load(optimised).graph.node)
        assert found["QLinearConv"] == 4  # stem, a, the windows, the transposed convolution
        assert (found["QGemm"], found["QLinearMul"] >= 1) == (2, True)
        assert not found.keys() & {"Conv", "Gemm", "FusedConv", "FusedGemm", "GlobalAveragePool", "ConvTranspose"}


@pytest.mark.parametrize("target", FORMS)
def test_moves_tables_and_rows(target: str, tmp_path: Path) -> None:
    network, x = everything(target)
    for form in FORMS[target]:
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form=form)
        assert Counter(node.op_type for node in onnx.load(path).graph.node)["Gather"] == 2
        verdict = lsquant.verify(network, path, [x, 2 * torch.randn(2, 3, 8, 8)])
        assert verdict.reaches("codes" if target == "tensorrt" else "outputs"), str(verdict)
    if target == "tensorrt":
        check_rules(onnx.load(path))
    assert lsquant.verify(network, lsquant.export_program(network, tmp_path / "p"), [x, 2 * x]).exact


@pytest.mark.parametrize("target", FORMS)
def test_every_function(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    layers = [part for kind in FUNCTIONS for part in (nn.Conv2d(3, 3, 3, padding=1), kind())]
    model = nn.Sequential(*layers, nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(3.0)  # type: ignore[union-attr, operator]
            layer.bias.mul_(3.0)  # type: ignore[union-attr, operator]
    lsquant.prepare(model, Recipe.preset("w8a8", integer_only=True, target=target), example_inputs=x)  # type: ignore[arg-type]
    lsquant.calibrate(model, [x])
    for form in FORMS[target]:
        path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer", form=form)
        verdict = lsquant.verify(model, path, [x, 3 * x])
        assert verdict.reaches("codes" if target == "tensorrt" else "outputs"), str(verdict)
    if target == "tensorrt":
        check_rules(onnx.load(path))
    assert lsquant.verify(model, lsquant.export_program(model, tmp_path / "p"), [x, 3 * x]).exact


# ---- tensorrt ----


def check_rules(proto: Any) -> None:
    """The rules of TensorRT in docs/integer-only.md, section "Targets", on a graph."""
    values, graph = initializers(proto), proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    typed = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*typed.value_info, *typed.input, *typed.output]}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert {node.domain for node in graph.node} == {""}
    assert not {"ConvInteger", "MatMulInteger", "QLinearConv", "Min", "Max"} & {node.op_type for node in graph.node}
    weights = set()
    for node in graph.node:
        read = [types[name] for name in node.input if name]
        made = [types[name] for name in node.output]
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            assert not {INT8, UINT8} & {*read, *made}, node.name
            continue
        step, zero = (values[name] for name in node.input[1:3])
        assert not zero.any(), node.name
        assert zero.dtype == np.int8
        assert (step > 0).all()
        if node.op_type == "QuantizeLinear":
            assert (step.size, made) == (1, [INT8])
            continue
        assert read[0] == INT8
        if node.input[0] in values:
            weights.add(node.output[0])
            axis = next(a.i for a in node.attribute if a.name == "axis")
            assert (axis, step.shape) == (0, values[node.input[0]].shape[:1])
        else:
            assert makers[node.input[0]].op_type == "QuantizeLinear"
            assert step.size == 1
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert node.input[1] in weights
            assert makers[node.input[0]].op_type in ("DequantizeLinear", "Reshape")
            assert values[node.input[2]].dtype == np.float32


@pytest.mark.parametrize("first", [SEEDS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SEEDS[1:])])
def test_the_rules_of_tensorrt(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + PER_TEST):
        network, _, x = drawn(seed, "tensorrt")
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer")
        check_rules(onnx.load(path))
        batches = [x, 2 * torch.randn(3, 3, 8, 8)]
        verdict = lsquant.verify(network, path, batches)
        assert verdict.reaches("codes"), f"seed {seed}\n{verdict}"
        assert all(check.compared for check in verdict.checks)
        with torch.no_grad():
            output = network(x).numpy()
        plain = np.asarray(onnx_session(path).run(None, {"x": x.numpy()})[0])
        codes = network.codes(x)
        assert all(int(q.min()) >= -128 and int(q.max()) <= 127 for q in codes.values())
        traces = {t.layer: t for t in load_onnx(path)[1]["layers"] if t.codes is not None}
        for name, held in zip(traces, values_in(path, [t.codes for t in traces.values()], x), strict=True):
            assert held.dtype == np.int8
            assert np.abs(held - codes[name].numpy()).max() <= 2, (seed, name)  # in floating point
        assert np.abs(plain - output).max() <= 0.1 * max(np.abs(output).max(), 1e-3), seed
        assert lsquant.verify(network, lsquant.export_program(network, tmp_path / "p"), batches).exact


def test_moving_limits_behind_quantization_changes_no_code(tmp_path: Path) -> None:
    """What ``verify`` compares codes in gives those of the file itself, both computed in floating point."""
    moved = 0
    for seed in range(8):
        network, _, x = drawn(seed, "tensorrt")
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer")
        proto, metadata = load_onnx(path)
        names = [t.codes for t in metadata["layers"] if t.codes is not None]
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(_with_codes(proto, names), options, providers=["CPUExecutionProvider"])
        for value in (x, 5 * x):
            found = session.run(names, {"x": value.numpy()})
            for name, a, b in zip(names, values_in(path, names, value), found, strict=True):
                assert np.array_equal(a, b), (seed, name)
        own = Counter(node.op_type for node in proto.graph.node)
        other = Counter(node.op_type for node in onnx.load_from_string(_with_codes(proto, names)).graph.node)
        assert own["Relu"] + own["Clip"] == other["Clip"] + other["Relu"]
        moved += own["Relu"] - other["Relu"]
    assert moved > 5


def two_layers(gamma: list[float], granularity: str = "tensor", narrow: bool = False) -> tuple[Any, Any, Tensor]:
    """(model, fused network, input) of target tensorrt: a convolution, BatchNorm, ReLU and a last layer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    norm: Any = model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gamma))
        norm.bias.copy_(torch.tensor([0.3, -0.2, 0.5, 0.1]))
        norm.running_mean.copy_(torch.tensor([0.1, -0.4, 0.0, 0.2]))
    x = torch.randn(2, 3, 5, 5)
    weight = QuantSpec(8, narrow=narrow, granularity=granularity)  # type: ignore[arg-type]
    lsquant.prepare(model, Recipe(weight, 8, joins=8, target="tensorrt"), example_inputs=x)
    lsquant.calibrate(model, [x])
    return model, lsquant.fuse(model), x


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_codes_are_negated_where_the_step_would_be_negative(granularity: str) -> None:
    """Against the oracle, whose steps are negative there: the same codes of the output."""
    model, network, x = two_layers([1.0, -0.7, -1.5, 0.0], granularity, narrow=True)
    layer, norm, last = model[0], model[1], model[3]
    s_x, s_y = (float(m.input_quantizer.effective_step().detach()) for m in (layer, last))
    s_w = layer.weight_quantizer.effective_step().detach().numpy()
    alpha, beta = (t.detach().numpy() for t in norm.affine_constants())
    step, bias = oracle.folded(s_w, alpha, beta, np.float32(s_x), np.float32(s_y), layer.bias.detach().numpy())
    assert (step[1] < 0, step[2] < 0) == (True, True)
    weights = layer.integer_weight()[0].numpy().astype(np.int64)
    weights[3] = 0
    q = layer.input_quantizer.codes(x).numpy().astype(np.int64)
    acc = F.conv2d(torch.tensor(q).double(), torch.tensor(weights).double(), padding=1).numpy().astype(np.int64)
    rows = acc.transpose(0, 2, 3, 1).reshape(-1, 4)
    wanted = oracle.integer_layer(rows, np.array(bias), np.float32(s_x), step, np.float32(s_y), 0, 0, 127)
    codes = network.codes(x)["2"].numpy().transpose(0, 2, 3, 1).reshape(-1, 4)
    assert codes.tolist() == wanted.tolist()
    assert len(np.unique(codes)) > 20
    folded = network.constants()["0"]
    assert folded.step.tolist() == np.abs(step).tolist()
    assert folded.codes[1].tolist() == (-weights[1]).tolist()
    assert folded.codes[0].tolist() == weights[0].tolist()
    assert folded.bias.tolist() == (np.array(bias) * np.where(step < 0, -1, 1)).tolist()
    assert folded.clipped == 0


def test_what_has_no_counterpart_is_clipped_and_counted(tmp_path: Path) -> None:
    model, network, x = two_layers([1.0, -0.7, 1.5, 0.4])
    layer = model[0]
    s = float(layer.weight_quantizer.effective_step().detach())
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = layer.weight[1, 0, 0, 0] = layer.weight[1, 0, 1, 1] = -128 * s
    folded = network.constants()["0"]
    assert folded.codes[0, 0, 0, 0] == -128
    assert folded.codes[1, 0, 0, 0] == folded.codes[1, 0, 1, 1] == 127
    changes = network.changes([x])
    assert changes.clipped == {"0": 2}
    assert "0: 2 codes of -128 became 127" in str(changes)
    assert lsquant.verify(network, lsquant.export_onnx(network, tmp_path / "m", x, profile="integer"), [x]).reaches(
        "codes"
    )
    assert lsquant.verify(network, lsquant.export_program(network, tmp_path / "p"), [x]).exact


def test_gradients_do_not_know_of_the_negation() -> None:
    """A channel with a negative factor, and one with weight and factor negated: the same loss, mirrored gradients."""
    found = []
    for sign in (1.0, -1.0):
        model, _, x = two_layers([1.0, -0.7, 1.5, 0.4], "channel", narrow=True)
        with torch.no_grad():
            for t in (model[0].weight, model[0].bias, model[1].running_mean, model[1].weight):
                t[1] *= sign
        network = lsquant.fuse(model)
        loss = (network(x) * torch.arange(100.0).reshape(2, 2, 5, 5)).sum()
        loss.backward()
        grads = [
            p.grad.clone() for p in (model[0].weight, model[0].bias, model[1].weight, model[0].weight_quantizer.step)
        ]
        for grad in grads[:3]:
            grad[1] *= sign
        found.append((loss.detach(), *grads))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_a_bias_is_one_that_float32_says_exactly(tmp_path: Path) -> None:
    """``|b|`` below 2^22, and the constant in the file gives b again."""
    model, _, x = two_layers([1.0, -1e-9, 1e-9, 0.4])
    network = lsquant.fuse(model)
    folded = network.constants()["0"]
    assert folded.raised == 2
    assert 2**20 < float(folded.bias.abs().max()) < 2**22
    path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer")
    values = initializers(onnx.load(path))
    scale = np.float32(model[0].input_quantizer.effective_step().detach().item()) * values["0.weight_step"]
    assert values["0.bias"].dtype == np.float32
    assert np.rint(values["0.bias"] / scale).tolist() == folded.bias.tolist()
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == "0.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.nextafter(values["0.bias"], np.float32(9)), "0.bias"))
    onnx.save(proto, path)
    assert lsquant.verify(network, path, [x]).level == "none"


# ---- seven bits, and files ----


def bounds_of(model: Any) -> list[tuple[int, int]]:
    return [(q.q_min, q.q_max) for name, q in lsquant.nn.quantizers(model) if "weight" not in name]


def test_unsigned_tensors_have_seven_bits_in_every_file(tmp_path: Path) -> None:
    fresh = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    torch.manual_seed(2)
    x, recipe = torch.randn(2, 3, 6, 6), Recipe(4, 8, [Rule("5", activation=3)], joins=8, target="tensorrt")
    model = copy.deepcopy(fresh).eval()
    lsquant.prepare(model, recipe, example_inputs=x)
    lsquant.calibrate(model, [x])
    wanted = [(-128, 127), (0, 127), (0, 7)]
    assert bounds_of(model) == wanted
    network = lsquant.fuse(model)
    assert int(network.codes(x)["2"].max()) == 127

    lsquant.save(model, tmp_path / "saved.safetensors")
    text = read_metadata(tmp_path / "saved.safetensors")["lsquant.recipe"]
    assert 'target = "tensorrt"' in text.splitlines()
    lsquant.export_packed(model, tmp_path / "packed.safetensors")
    restored = [copy.deepcopy(fresh).eval() for _ in range(3)]
    lsquant.load(restored[0], tmp_path / "saved.safetensors")
    lsquant.load_packed(restored[1], tmp_path / "packed.safetensors")
    lsquant.prepare(restored[2], recipe, example_inputs=x)
    restored[2].load_state_dict(model.state_dict())
    for other in restored:
        assert bounds_of(other) == wanted
        with torch.no_grad():
            assert torch.equal(lsquant.fuse(other)(x), network(x))
        asked = [q.requested.bits for name, q in lsquant.nn.quantizers(other) if "weight" not in name]
        assert asked == [8, 8, 3]
        path = lsquant.export_onnx(other, tmp_path / "m.onnx", x, profile="integer")
        check_rules(onnx.load(path))
        lsquant.calibrate(other, [-x], again=True)
        assert bounds_of(other) == wanted
    plain = copy.deepcopy(fresh)
    lsquant.prepare(plain, Recipe(4, 8, [Rule("5", activation=3)], joins=8), example_inputs=x)
    with pytest.raises(RuntimeError, match=r"the state has the codes 0 to 127 \(7 bit\), the model 0 to 255"):
        plain.load_state_dict(model.state_dict())


def test_a_packed_file_says_what_was_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    fresh = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model = copy.deepcopy(fresh)
    lsquant.prepare(model, Recipe(4, 8, joins=8, target="tensorrt"), example_inputs=x)
    lsquant.calibrate(model, [x])
    path = lsquant.export_packed(model, tmp_path / "p.safetensors")
    tensors, document = packed_files.read(path)
    assert document["joins"] == {"bits": 8, "container": "symmetric"}
    entry = document["quantizers"]["2.input_quantizer"]
    assert {k: entry[k] for k in ("bits", "signed", "container", "decided", "asked") if k in entry} == {
        "bits": 7, "signed": False, "container": "symmetric", "decided": True, "asked": 8,
    }  # fmt: skip
    assert "asked" not in document["quantizers"]["0.input_quantizer"]
    edited = tmp_path / "edited.safetensors"
    says = {6: "6 bits were asked for, which do not become 7 bit", 9: "asked is 9", "8": "asked is '8'"}
    for asked, text in says.items():
        entry["asked"] = asked
        packed_files.write(edited, tensors, document)
        with pytest.raises(DamagedFile, match=text):
            lsquant.load_packed(copy.deepcopy(fresh), edited)
    entry["asked"], document["quantizers"]["0.input_quantizer"]["container"] = 8, "int8"
    packed_files.write(edited, tensors, document)
    with pytest.raises(
        lsquant.LsquantError, match="container is that of target='xnnpack', and the recipe's is 'tensorrt'"
    ):
        lsquant.load_packed(copy.deepcopy(fresh), edited)


TOML = """format = 1
target = "tensorrt"

[weight]
bits = 4
signed = true

[activation]
bits = 8

[[rules]]
which = "head"
activation = { bits = 6, signed = false }

[joins]
bits = 8
"""


def test_a_recipe_in_toml() -> None:
    recipe = Recipe(4, 8, [Rule("head", activation=QuantSpec(6, signed=False))], joins=8, target="tensorrt")
    assert recipe.to_toml() == TOML
    again = Recipe.from_toml(TOML)
    assert again == recipe
    assert (again.target, again.joins, again.activation) == (
        "tensorrt", QuantSpec(8, container="symmetric"), QuantSpec(8, container="symmetric"),
    )  # fmt: skip
    assert again.rules[0].activation == QuantSpec(6, signed=False, container="symmetric")
    assert again.weight == QuantSpec(4, signed=True)
    assert "target" not in Recipe(4, 8, joins=8).to_toml()
    assert QuantSpec(8).to_dict() == {"bits": 8}
    preset = Recipe.preset("w4a8", integer_only=True, target="xnnpack")
    assert preset.joins == QuantSpec(8, container="int8")
    assert [rule.activation for rule in preset.preset_rules] == [QuantSpec(8, container="int8")] * 2
    assert preset.with_names(nn.Linear(1, 1)).target == "xnnpack"


def test_stages_of_more_bits_keep_the_target() -> None:
    from lsquant.training.stages import widened

    recipe = Recipe(2, 4, [Rule("a", activation=QuantSpec(4, signed=False))], joins=6, target="tensorrt")
    wide = widened(recipe, 8)
    assert wide.target == "tensorrt"
    assert wide.activation == QuantSpec(8, container="symmetric")
    assert wide.rules[0].activation == QuantSpec(7, signed=False, container="symmetric")


def test_specifications_literal() -> None:
    symmetric = QuantSpec(8, container="symmetric")
    assert symmetric.decide(False) == QuantSpec(7, signed=False, container="symmetric")
    assert symmetric.decide(True) == QuantSpec(8, signed=True, container="symmetric")
    assert QuantSpec(5, container="symmetric").decide(False).bits == 5
    assert QuantSpec(8, container="int8").decide(False).q_max == 255
    assert str(symmetric) == "8 bit, sign undecided, per tensor, symmetric"
    assert QuantSpec.from_dict(symmetric.to_dict()) == symmetric


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Recipe(4, 8, target="xnnpack"), "Recipe: target='xnnpack' is for integer-only networks: give joins=8"),
        (lambda: Recipe(4, 8, joins=8, target="arm"), "target='arm'; use one of onnxruntime, xnnpack, tensorrt"),  # type: ignore[arg-type]
        (lambda: Recipe(4, 8, joins=8, target=None), "target=None; use one of"),  # type: ignore[arg-type]
        (
            lambda: Recipe(4, 8, [Rule("head", 8, QuantSpec(8, signed=False))], joins=8, target="tensorrt"),
            "rule for 'head': activation=8 bit, unsigned, .*use bits=7, or signed=None",
        ),
        (
            lambda: Recipe(4, QuantSpec(8, signed=False), joins=8, target="tensorrt"),
            "Recipe: activation=8 bit, unsigned",
        ),
        (
            lambda: Recipe(4, QuantSpec(8, offset=True), joins=8, target="tensorrt"),
            "Recipe: activation=8 bit, unsigned, per tensor, offset with target='tensorrt': .*leave the offset out",
        ),
        (
            lambda: Recipe(4, 8, [Rule("head", 8, QuantSpec(8, offset=True))], joins=8, target="tensorrt"),
            "rule for 'head': activation=.*zero points that are all 0.*or use target='onnxruntime' or 'xnnpack'",
        ),
        (
            lambda: Recipe(4, 8, joins=QuantSpec(8, offset=True), target="tensorrt"),
            "Recipe: joins=8 bit, unsigned, per tensor, offset with target='tensorrt'",
        ),
        (lambda: Recipe(QuantSpec(4, container="int8"), 8, joins=8, target="xnnpack"), "weight=.*are activations"),
        (
            lambda: Recipe(4, QuantSpec(8, container="int8"), joins=8),
            "that of target='xnnpack', and the recipe's is 'onn",
        ),
        (lambda: Recipe.preset("w4a8", target="tensorrt"), "target='tensorrt' .* give integer_only=True"),
        (lambda: QuantSpec(8, container="int4"), "container='int4'; use one of uint8, int8, symmetric"),  # type: ignore[arg-type]
        (lambda: QuantSpec(8, signed=False, container="symmetric"), "8 unsigned bits do not fit int8"),
        (lambda: Recipe.from_toml('joins = 8\ntarget = "arm"'), "target is 'arm'; needed is one of 'onnxruntime'"),
        (lambda: Recipe.from_toml("joins = 8\ntarget = true"), "target is True; needed is one of"),
        (lambda: Recipe.from_toml('activation = 8\ntarget = "xnnpack"'), "give joins=8"),
    ],
)
def test_what_is_refused(make: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make()


def test_operators_of_onnx_runtime_are_no_form_of_tensorrt(tmp_path: Path) -> None:
    _, network, x = two_layers([1.0, 1.0, 1.0, 1.0])
    with pytest.raises(UsageError, match=r"form='qoperator' is no form of target='tensorrt'.*use form='qdq'"):
        lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form="qoperator")
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(tmp_path: Path) -> None:
    path, bits = tmp_path / "run", ("--weight-bits", "4", "--activation-bits", "8")
    options = ("digits", *bits, "--out", path)
    refused(
        2,
        "--target xnnpack is for integer-only networks: give --integer-only",
        "train",
        *options,
        "--target",
        "xnnpack",
    )
    refused(2, "invalid choice: 'arm'", "train", *options, "--integer-only", "--target", "arm")
    file = tmp_path / "r.toml"
    file.write_text(TOML)
    refused(
        2,
        'target = "NAME" instead of --target',
        "train",
        "digits",
        "--out",
        path,
        "--recipe",
        file,
        "--target",
        "xnnpack",
    )
    assert run("train", *options, "--integer-only", "--target", "tensorrt", *TINY).code == 0
    assert read_run(path).recipe.target == "tensorrt"
    refused(2, "its recipe has other bits", "train", *options, "--integer-only", "--resume", *TINY)
    assert run("export", path).code == 0
    check_rules(onnx.load(path / "export" / "integer.onnx"))
    refused(2, "form='qoperator' is no form of target='tensorrt'", "export", path, "--form", "qoperator")
    verdict = run("verify", path, "--json")
    assert verdict.json["level"] in ("codes", "outputs")
