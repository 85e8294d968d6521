"""Profile integer: random integer-only networks are equal, bit for bit, in ONNX Runtime, in both forms."""

from __future__ import annotations

import copy
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
from helpers.benchmarks import bench as bench
from helpers.integer_nets import drawn
from lsquant import Recipe, UsageError
from lsquant.formats.onnx.reader import initializers, load_onnx
from lsquant.nn import Add, Chunk
from lsquant.nn.stored import FUNCTIONS
from lsquant.verification.runtimes.float_parts import says_float_parts
from lsquant.verification.runtimes.web import BROWSERS

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

FAST, PER_TEST = 100, 20
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def check(seed: int, folder: Path, forms: tuple[str, ...]) -> None:
    """Trained in folded form, loaded again from the packed file, and the ONNX file: equal outputs."""
    network, model, x = drawn(seed)
    assert network.program.floats == [], seed
    again = drawn(seed)[1] if seed % 10 == 0 else copy.deepcopy(model)
    lsquant.load_packed(lsquant.revert(again), lsquant.export_packed(model, folder / "packed.safetensors"))
    with torch.no_grad():
        assert torch.equal(lsquant.fuse(again.eval())(x), network(x)), seed
    batches = [x, 2 * torch.randn(3, 3, 8, 8)]
    paths = [lsquant.export_program(network, folder / "program.safetensors")]
    for form in forms:
        paths.append(lsquant.export_onnx(network, folder / f"{form}.onnx", x, profile="integer", form=form))
    for path in paths:
        verdict = lsquant.verify(network, path, batches)
        assert verdict.exact, f"seed {seed}, {path.name}\n{verdict}"
        assert all(c.compared for c in verdict.checks)


@pytest.mark.parametrize("first", range(0, FAST, PER_TEST))
def test_trained_fused_and_file_are_equal(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + PER_TEST):
        check(seed, tmp_path, ("qdq",) if seed % 2 else ("qoperator",))


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 1000, 50))
def test_many_trained_fused_and_file_are_equal(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + 50):
        check(seed, tmp_path, ("qdq", "qoperator"))


def operators(path: Path, level: str, x: np.ndarray, folder: Path) -> tuple[Counter[str], np.ndarray]:
    """The operators of the runtime's optimised graph, and the output."""
    options = ort.SessionOptions()
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath, options.log_severity_level = str(folder / "optimised.onnx"), 4
    found = []
    for threads in (1, 2):
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        found.append(np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0]))
    assert found[0].tobytes() == found[1].tobytes(), (level, "1 and 2 threads")
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node), found[0]


class Small(nn.Module):
    """A residual block, an average and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.a, self.b, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.stem(x)))
        x = torch.relu(self.b(torch.relu(self.a(x))) + x)
        return self.head(torch.flatten(self.pool(x), 1))


def ready(preset: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(1)
    model, x = Small().eval(), torch.randn(4, 3, 9, 9)
    lsquant.trace(model, x)
    lsquant.prepare(model, Recipe.preset(preset, integer_only=True), example_inputs=x)
    lsquant.calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("preset", ["w4a8", "w4a4"])
def test_the_runtime_computes_nothing_in_floating_point(preset: str, tmp_path: Path) -> None:
    model, x = ready(preset)
    wanted = lsquant.fuse(model)(x).detach().numpy()
    for form, levels in (("qdq", LEVELS[2:]), ("qoperator", LEVELS)):
        path = lsquant.export_onnx(model, tmp_path / f"{form}.onnx", x, profile="integer", form=form)
        for level in levels:
            found, output = operators(path, level, x.numpy(), tmp_path)
            assert output.tobytes() == wanted.tobytes(), (form, level)
            assert found["QLinearConv"] == 3
            assert found["QLinearAdd"] == found["QGemm"] == found["QLinearGlobalAveragePool"] == 1
            assert not set(found) & {"Conv", "Add", "Gemm", "Mul", "Relu", "BatchNormalization", "GlobalAveragePool"}
            # the stream of 8 bits, read by a with 4: one table, saturating; then b's input of 4 bits, held by a Min
            few = preset == "w4a4"
            assert (found["QLinearLeakyRelu"], found["Min"], found["QuantizeLinear"]) == (few, few, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_weights_of_few_bits_take_few_bits(form: str, bits: int, tmp_path: Path) -> None:
    """And what runs is the same: the Cast behind them is computed when the file is loaded."""
    model, x = ready(f"w{bits}a8")
    wanted = lsquant.fuse(model)(x).detach().numpy()
    types = onnx.TensorProto
    small = types.INT4 if bits <= 4 else types.INT8
    for opset, kind in ((None, small), (18, types.INT8), (21, small), (25, types.INT2 if bits == 2 else small)):
        path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer", form=form, opset=opset)
        proto = onnx.load(path)
        held = {t.name: t.data_type for t in proto.graph.initializer if t.name.endswith(".weight")}
        assert held == {"stem.weight": types.INT8, "a.weight": kind, "b.weight": kind, "head.weight": types.INT8}
        version = proto.opset_import[0].version
        assert version == opset or (opset is None and (version == 21 if bits <= 4 else version < 18))
        found, output = operators(path, "ORT_ENABLE_EXTENDED", x.numpy(), tmp_path)
        assert output.tobytes() == wanted.tobytes()
        assert (found["QLinearConv"], found["QLinearAdd"], found["QGemm"], found["Cast"]) == (3, 1, 1, 0)
        assert lsquant.verify(model, path, [x]).exact


def test_functions_at_every_level(tmp_path: Path) -> None:
    """In the runtime's own operators, and as tables where those are too coarse for a small step."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    layers = [part for kind in FUNCTIONS for part in (nn.Conv2d(3, 3, 3, padding=1), kind())]
    model = nn.Sequential(*layers, nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(3.0)  # type: ignore[union-attr, operator]
            layer.bias.mul_(3.0)  # type: ignore[union-attr, operator]
        layers[-2].weight.mul_(1e-4)  # type: ignore[union-attr, operator]
        layers[-2].bias.mul_(1e-4)  # type: ignore[union-attr, operator]
    lsquant.prepare(model, Recipe.preset("w8a8", integer_only=True), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    assert network.program.floats == []
    with torch.no_grad():
        wanted = network(x).numpy()
    for form, levels in (("qoperator", LEVELS), ("qdq", LEVELS[2:])):
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form=form)
        assert lsquant.verify(network, path, [x, 3 * x]).exact
        for level in levels:
            found, output = operators(path, level, x.numpy(), tmp_path)
            assert output.tobytes() == wanted.tobytes(), (form, level)
        assert (found["QLinearSigmoid"], found["QLinearMul"]) == (2, 1)
        assert found["Gather"] == 2  # Mish, and the last one, whose step is small
        assert found["HardSigmoid"] == 2  # HardSwish is x times it
        assert found["Tanh"] == found["Elu"] == found["Erf"] == 1


def test_a_detector_is_integer_up_to_its_heads(bench: Any, tmp_path: Path) -> None:
    """SiLU, concatenations, a pooling pyramid, upsampling; its boxes are decoded in floating point."""
    torch.manual_seed(0)
    model, x = bench("networks").Detector(width=4, classes=3), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for _ in range(2):
            model(x)
    lsquant.trace(model.eval(), x)
    lsquant.prepare(model, Recipe.preset("w8a8", integer_only=True), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    assert not [step for step in network.program.floats if isinstance(step.module, (nn.Conv2d, nn.SiLU, Add))]
    for form in ("qdq", "qoperator"):
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form=form)
        verdict = lsquant.verify(network, path, [x])
        assert verdict.reaches("codes"), str(verdict)
        operators(path, "ORT_ENABLE_ALL", x.numpy(), tmp_path)
        graph = onnx.load(tmp_path / "optimised.onnx").graph
        makers = {name: node for node in graph.node for name in node.output}
        waiting = [name for node in graph.node if node.op_type == "QGemm" for name in node.input]
        before: dict[int, Any] = {}
        while waiting:
            if (node := makers.get(waiting.pop())) is not None and id(node) not in before:
                before[id(node)] = node
                waiting += node.input
        kinds = Counter(node.op_type for node in before.values())
        assert (kinds["QLinearConv"], kinds["QLinearSigmoid"], kinds["QLinearMul"]) == (43, 43, 43)
        allowed = {"QLinearConv", "QLinearSigmoid", "QLinearMul", "QLinearAdd", "Concat", "Transpose", "Resize"}
        assert not kinds.keys() - allowed - {"NhwcMaxPool", "MaxPool", "QuantizeLinear", "Reshape"}
        assert kinds["QuantizeLinear"] == 1
        assert (kinds["Reshape"], kinds["Transpose"]) == (2, 1)  # of the heads, products of matrices


@pytest.mark.parametrize("portable", [True, False])
def test_slow_kernels_are_asked_for_only_where_sums_of_16_bits_may_overflow(portable: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, x = Small().eval(), torch.randn(4, 3, 9, 9)
    lsquant.trace(model, x)
    recipe = Recipe.preset("w8a8", integer_only=True, portable_x86=portable)
    lsquant.prepare(model, recipe, example_inputs=x)
    lsquant.calibrate(model, [x], weights="mse")
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer")
    weights = [w for name, w in initializers(onnx.load(path)).items() if name.endswith(".weight")]
    largest = max(int(np.abs(w.astype(np.int64)).max()) for w in weights)
    assert len(weights) == 4
    assert (largest * 255 * 2 < 2**15) == portable
    assert load_onnx(path)[1]["session"] == ({} if portable else {"session.x64quantprecision": "1"})
    assert lsquant.verify(model, path, [x]).exact


class Decoded(nn.Module):
    """A function without an integer operator between two layers, and a head that is decoded in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.squash, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1)
        self.silu, self.head = nn.SiLU(), nn.Conv2d(4, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(self.silu(self.b(self.squash(self.a(x)))))
        return torch.cat([y[:, :2].exp() * 4.0, y[:, 2:].sigmoid()], 1)


def test_a_verdict_says_what_stays_in_floating_point(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model, x = Decoded().eval(), torch.randn(4, 3, 6, 6)
    lsquant.prepare(model, Recipe.preset("w8a8", integer_only=True), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    for form in ("qdq", "qoperator"):
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form=form)
        (remark,) = [r for r in lsquant.verify(network, path, [x]).remarks if r.startswith("in floating point")]
        assert f"ONNX Runtime {ort.__version__}" in remark
        assert "squash (Tanh: a function without an integer operator);" in remark
        assert "; Sigmoid, Exp, Mul of " in remark
        assert remark.endswith("(float parts of the network, of which fuse has no integer form)")
        assert "silu" not in remark
        assert "Conv" not in remark
        if form == "qdq":  # as at a level at which nothing is fused
            options = ort.SessionOptions()
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            options.optimized_model_filepath = str(tmp_path / "basic.onnx")
            ort.InferenceSession(str(path), options)
            said = says_float_parts(network, onnx.load(options.optimized_model_filepath).graph, "a runtime")
            assert "a (Conv: not fused); " in said
            assert "silu (Sigmoid, Mul: a function without an integer operator)" in said
    real = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6()).eval()
    lsquant.prepare(real, Recipe.preset("w8a8", integer_only=True), example_inputs=x)
    lsquant.calibrate(real, [x])  # its last layer ends in an addition over int32, a multiplication and a limit
    path = lsquant.export_onnx(real, tmp_path / "m.onnx", x, profile="integer")
    assert not [r for r in lsquant.verify(real, path, [x]).remarks if r.startswith("in floating point")]
    model, x = ready("w4a4")
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer")
    assert not [r for r in lsquant.verify(model, path, [x]).remarks if r.startswith("in floating point")]


def test_openvino_gives_the_codes(tmp_path: Path) -> None:
    """With the stored tensors as outputs; the unmodified file it fuses in another way (docs/integer-only.md)."""
    if os.environ.get("LSQUANT_SANITIZE"):
        pytest.skip("OpenVINO loads a library in a way that AddressSanitizer refuses")
    pytest.importorskip("openvino")
    model, x = ready("w4a8")
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer")
    assert lsquant.verify(model, path, [x, -x], runtime="openvino").reaches("codes")


@pytest.mark.skipif(
    not os.environ.get("LSQUANT_NODE_MODULES") or not any(map(shutil.which, BROWSERS)),
    reason="needs Chromium, and LSQUANT_NODE_MODULES: the folder that `npm install onnxruntime-web` made",
)
@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_a_browser_gives_the_same_bits(form: str, tmp_path: Path) -> None:
    model, x = ready("w4a8")
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer", form=form)
    assert lsquant.verify(model, path, [x, -x], runtime="onnxruntime-web").exact


def test_what_the_file_says_is_compared(tmp_path: Path) -> None:
    model, x = ready("w4a8")
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer")
    verdict = lsquant.verify(model, path, [x])
    assert (verdict.level, verdict.profile, verdict.layers) == ("outputs", "integer", 7)
    assert "compared with the fused form of the model, lsquant.fuse(model)" in str(verdict)  # not with the model itself
    assert lsquant.verify(lsquant.fuse(model), path, [x]).remarks == ()
    for name, level in (("a.weight", "none"), ("a.bias", "none"), ("a.weight_step", "none"), ("head.bias", "none")):
        proto = onnx.load(path)
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.reshape(-1)[0] += values.dtype.type(1)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, name))
        onnx.save(proto, tmp_path / "other.onnx")
        other = lsquant.verify(model, tmp_path / "other.onnx", [x])
        assert (other.level, other.checks[0].worst) == (level, name.split(".")[0])
    with torch.no_grad():
        model.norm.bias.add_(0.5)
    moved = lsquant.verify(model, path, [x])
    assert (moved.level, moved.checks[0].worst) == ("none", "stem")


def test_a_difference_is_found_where_it_begins(tmp_path: Path) -> None:
    model, x = ready("w4a8")
    path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer", form="qoperator")
    proto = onnx.load(path)
    add = next(node for node in proto.graph.node if node.op_type == "QLinearAdd")
    add.input[1] = add.input[6]  # another scale, which is no part of what is stored under a name
    onnx.save(proto, tmp_path / "m.onnx")
    verdict = lsquant.verify(model, tmp_path / "m.onnx", [x])
    assert verdict.level == "weights"
    assert any("'relu_3' differ first" in remark for remark in verdict.remarks), verdict.remarks


def test_what_has_no_form_is_named(tmp_path: Path) -> None:
    class Halves(nn.Module):
        def __init__(self, cut: nn.Module, index: Any = 0, c: int = 2) -> None:
            super().__init__()
            self.conv, self.chunk, self.end, self.index = nn.Conv2d(3, 4, 1), cut, nn.Conv2d(c, 2, 1), index

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(self.chunk(self.conv(x))[self.index])

    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.end, self.chunk = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), Chunk(2)

        def forward(self, x: torch.Tensor) -> Any:
            h = self.conv(x)
            return self.end(h), self.chunk(h)

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.end = nn.ConvTranspose2d(3, 4, 3, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.end(self.up(x, [8, 8]))

    x = torch.randn(2, 3, 4, 4)
    cases = [
        (Halves(Chunk(2, dim=0), c=4), "chunk: parts of the batch"),
        (Returned(), "chunk: the parts of this Chunk have to be taken one by one"),
        (Halves(nn.MaxPool2d(1), (slice(None), [0, 3])), r"getitem: the index .* has no integer form in ONNX; use"),
        (nn.Sequential(nn.ConvTranspose2d(3, 2, 3, (1, 2)), nn.Conv2d(2, 2, 1)), r"0: export_onnx .* stride=\(1, 2\)"),
        (nn.Sequential(nn.ConvTranspose2d(3, 2, 3, dilation=2), nn.Conv2d(2, 2, 1)), r"0: .* dilation=\(2, 2\)"),
        (Sized(), "up: QuantConvTranspose2d has no integer form"),
        (nn.Sequential(nn.Conv2d(3, 2, 3, padding_mode="reflect"), nn.Conv2d(2, 2, 1)), "0: padding_mode='reflect'"),
    ]
    for model, says in cases:
        lsquant.prepare(model, Recipe(8, 8, joins=8), example_inputs=x)
        lsquant.calibrate(model, [x])
        lsquant.fuse(model)(x)
        with pytest.raises(UsageError, match=says):
            lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer")
    model, x = ready("w4a8")
    with pytest.raises(UsageError, match=r"form='both'; choose from 'qdq', 'qoperator'"):
        lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer", form="both")
    with pytest.raises(UsageError, match="a fused network is written by profile='integer', not 'exact'"):
        lsquant.export_onnx(lsquant.fuse(model), tmp_path / "m.onnx", x)
    assert list(tmp_path.iterdir()) == []


class Sequence(nn.Module):
    """A transposed convolution of one dimension, an average over windows, and a part of what is cut."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.up, self.pool = nn.ConvTranspose1d(3, 4, 5, 3, 1, 1, bias=bias), nn.AvgPool1d(3, 2, 1)
        self.chunk, self.end = Chunk(3), nn.ConvTranspose1d(2, 3, 4, 2, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, b = self.chunk(self.pool(self.up(x)))  # four channels in parts of two
        return self.end(b)


@pytest.mark.parametrize("bias", [True, False])
def test_sequences_and_real_transposed_outputs(bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Sequence(bias).eval(), torch.randn(3, 3, 7)
    lsquant.prepare(model, Recipe(4, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    assert network.program.floats == []
    for form in ("qdq", "qoperator"):
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form=form)
        verdict = lsquant.verify(network, path, [x, torch.randn(2, 3, 7)])
        assert verdict.exact, str(verdict)
        assert all(c.compared for c in verdict.checks)
    with pytest.raises(UsageError, match=r"up: .*ConvTranspose1d whose output is real, or not an image"):
        lsquant.export_program(network, tmp_path / "p")


GEOMETRIES = [
    (kernel, stride, padding, out, groups)
    for kernel in (1, 2, 3, 4, 5, 7) for stride in (1, 2, 3) for padding in range(min(3, kernel))
    for out in range(stride) for groups in (1, 2)
]  # fmt: skip


def test_transposed_convolutions_of_every_geometry(tmp_path: Path) -> None:
    """All in one graph: each reads the input and has an output of its own."""

    class All(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ups = nn.ModuleList(nn.ConvTranspose2d(4, 2, *g[:4], groups=g[4]) for g in GEOMETRIES)
            self.ends = nn.ModuleList(nn.Conv2d(2, 1, 1) for _ in GEOMETRIES)

        def forward(self, x: torch.Tensor) -> Any:
            return [end(up(x)) for up, end in zip(self.ups, self.ends, strict=True)]

    torch.manual_seed(0)
    model, x = All().eval(), torch.randn(2, 4, 5, 6)
    lsquant.prepare(model, Recipe(8, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer")
    verdict = lsquant.verify(network, path, [x, torch.randn(1, 4, 5, 6)])
    assert verdict.exact, str(verdict)
    assert lsquant.verify(network, lsquant.export_program(network, tmp_path / "p"), [x]).exact
    assert verdict.checks[-1].compared == sum(3 * up(x)[0, 0].numel() for up in model.ups)


def test_a_linear_layer_over_positions_and_a_batch_of_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(1, 7, 6)
    lsquant.prepare(model, Recipe(4, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    for form in ("qdq", "qoperator"):
        path = lsquant.export_onnx(model, tmp_path / "m.onnx", x, profile="integer", form=form)
        assert lsquant.verify(model, path, [x, torch.randn(5, 7, 6)]).exact
