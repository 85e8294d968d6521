"""LSQ+ zero points of stored tensors: against the oracle, the formulas of the gradients, and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lsquant
import oracle
from helpers.integer_nets import drawn
from lsquant import QuantSpec, Recipe, Rule
from lsquant._util.tensors import read_tensors
from lsquant.formats.program.writer import KEY
from lsquant.nn import Add, Cat, Clip, Mean, Mul
from lsquant.nn.stored import FUNCTIONS

SHIFTED = QuantSpec(8, offset=True)
LIMITS = {"none": nn.Identity, "relu": nn.ReLU, "relu6": nn.ReLU6, "clip": lambda: Clip(-0.5, 1.25)}


def ready(model: nn.Module, x: Tensor, recipe: Recipe | None = None) -> tuple[Any, lsquant.FusedNetwork]:
    lsquant.prepare(model.eval(), recipe or Recipe(8, SHIFTED, joins=SHIFTED), example_inputs=x)
    lsquant.calibrate(model, [x])
    return model, lsquant.fuse(model)


def images(channels: int = 3, mean: float = 0.7) -> Tensor:
    return torch.randn(2, channels, 6, 6, generator=torch.Generator().manual_seed(2)) + mean


def put(quantizer: Any, zero: int, step: float | None = None) -> None:
    """Give a quantizer a zero point, and a step."""
    with torch.no_grad():
        if step is not None:
            quantizer.step.fill_(step)
            quantizer.initial_step.fill_(step)
        quantizer.offset.copy_(-zero * quantizer.step)
    assert quantizer.zero_point().tolist() == [zero]


def facts(network: lsquant.FusedNetwork, x: Tensor) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, int]]:
    """Codes, steps and zero points of all stored tensors."""
    codes = {name: q.numpy() for name, q in network.codes(x).items()}
    return codes, {name: float(s) for name, s in network.stored_steps().items()}, network.zero_points()


# ---- the arithmetic ----


@pytest.mark.parametrize("limit", LIMITS)
def test_a_layer_equals_the_oracle(limit: str) -> None:
    torch.manual_seed(1)
    x = images()
    model, network = ready(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), LIMITS[limit](), nn.Conv2d(5, 2, 1)), x)
    put(model[0].input_quantizer, 77)
    put(model[2].input_quantizer, 90, 0.0078125)
    codes, s, z = facts(network, x)
    name = "0" if limit == "none" else "1"
    assert (z["input_1"], z[name]) == (77, 90)
    s_x, s_y = np.float32(s["input_1"]), np.float32(s[name])
    q = oracle.codes(x.numpy().reshape(-1), np.array([s_x]), 0, 255, 77)
    assert codes["input_1"].reshape(-1).tolist() == np.asarray(q).astype(int).tolist()
    padded = np.pad(codes["input_1"], [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=77)
    folded = network.constants()["0"]
    acc = F.conv2d(torch.tensor(padded - 77).double(), folded.codes.double()).numpy().astype(int)
    low, high = {"none": (0, 255), "relu": (90, 255), "relu6": (90, 255), "clip": (90 - 64, 90 + 160)}[limit]
    rows = acc.transpose(0, 2, 3, 1).reshape(-1, 5)
    wanted = oracle.integer_layer(rows, folded.bias.numpy(), s_x, folded.step.numpy(), s_y, 90, low, high)
    assert codes[name].transpose(0, 2, 3, 1).reshape(-1, 5).tolist() == wanted.tolist()
    assert codes[name].min() == low <= 90 < codes[name].max()
    read = F.conv2d(torch.tensor(codes[name] - 90).double(), network.constants()["2"].codes.double())
    last = network.constants()["2"]
    real = (read + last.bias.reshape(-1, 1, 1)).float() * (float(s_y) * last.step).reshape(-1, 1, 1)
    assert torch.equal(network(x), real)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_equal_the_oracle(function: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    _, network = ready(nn.Sequential(nn.Linear(4, 6), function(), nn.Linear(6, 2)), x)
    codes, s, z = facts(network, x)
    assert min(z["0"], z["1"] if function not in (nn.Sigmoid, nn.Hardsigmoid) else 1) > 0
    low, high = -z["0"], 255 - z["0"]
    if function is nn.SiLU:
        table = oracle.integer_silu(low, high, s["0"], s["1"], -z["1"], 255 - z["1"]) + z["1"]
    else:
        one = lambda v: float(function()(torch.tensor(v, dtype=torch.float64)))  # noqa: E731
        table = oracle.integer_table(one, 0, 255, z["0"], s["0"], s["1"], z["1"], 0, 255)
    assert codes["1"].tolist() == table[codes["0"]].tolist()
    assert len(np.unique(codes["1"])) > 50


class Parts(nn.Module):
    """A product of which one operand is padded, windows, a concatenation, and an addition of other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.mul, self.window, self.pad, self.cat = Mul(), nn.AvgPool2d(3, 1, 1), nn.ZeroPad2d((1, 0, 2, 1)), Cat(1)
        self.add, self.mean, self.end, self.head = Add(), Mean((2, 3)), nn.Conv2d(6, 2, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        joined = self.pad(self.cat(self.mul(a, self.b(x)), self.window(a)))
        return self.end(joined), self.head(self.mean(self.add(self.c(x), self.d(x))))


def test_joins_and_moves_equal_the_oracle(tmp_path: Path) -> None:
    torch.manual_seed(5)
    x = images()
    _, network = ready(Parts(), x)
    assert network.program.floats == []
    codes, s, z = facts(network, x)
    assert all(0 < z[name] < 255 for name in ("x", "a", "b", "mul", "window", "cat", "pad", "add", "mean")), z
    assert z["c"] == z["d"] == 0
    assert z["mul"] == z["window"] == z["cat"] == z["pad"]
    wanted = oracle.integer_multiply(codes["a"], codes["b"], z["a"], z["b"], s["a"], s["b"], s["mul"], z["mul"], 0, 255)
    assert codes["mul"].tolist() == wanted.tolist()
    padded = np.pad(codes["a"], [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=z["a"])
    wanted = oracle.integer_average_windows(padded, 3, 1, z["a"], s["a"], s["window"], z["window"], 0, 255)
    assert codes["window"].tolist() == wanted.tolist()
    assert codes["cat"].tolist() == np.concatenate([codes["mul"], codes["window"]], 1).tolist()
    sides = [(0, 0), (0, 0), (2, 1), (1, 0)]
    assert codes["pad"].tolist() == np.pad(codes["cat"], sides, constant_values=z["cat"]).tolist()
    wanted = oracle.integer_add(codes["c"], codes["d"], 0, 0, s["c"], s["add"], z["add"], 0, 255)
    assert codes["add"].tolist() == wanted.tolist()
    flat = codes["add"].reshape(2, 3, 36)
    wanted = oracle.integer_average(flat, z["add"], s["add"], s["mean"], z["mean"], 0, 255)
    assert codes["mean"].tolist() == np.asarray(wanted).tolist()
    assert all(len(np.unique(q)) > 3 for q in codes.values())
    for path in files(network, x, tmp_path):
        assert lsquant.verify(network, path, [x, -x]).exact


def test_readers_of_fewer_bits_equal_the_oracle(tmp_path: Path) -> None:
    torch.manual_seed(3)
    x = images()
    few = QuantSpec(4, offset=True)
    network_of = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1))
    model, network = ready(network_of, x, Recipe(4, few, [Rule("0", 8, 8)], joins=SHIFTED))
    assert model[2].stored_quantizer is None
    put(model[2].input_quantizer, 3)
    codes, s, z = facts(network, x)
    assert z["1"] == 3
    # a stored tensor of 8 bits, read with 4 by one layer, and with 8 by another
    two: Any = Two()
    model, network = ready(two, x, Recipe(4, few, [Rule("a", 8, 8), Rule("c", 8, SHIFTED)], joins=SHIFTED))
    assert model.b.stored_quantizer is model.c.input_quantizer
    put(model.b.input_quantizer, 5)
    codes, s, z = facts(network, x)
    s_n = float(model.b.input_quantizer.effective_step().detach())
    read = oracle.integer_reader(codes["act"], z["act"], s["act"], s_n, 5, 0, 15)
    assert z["act"] > 0
    assert len(np.unique(read)) > 8
    folded = network.constants()["b"]
    acc = F.conv2d(torch.tensor(read - 5).double(), folded.codes.double())
    real = (acc + folded.bias.reshape(-1, 1, 1)).float() * (s_n * folded.step).reshape(-1, 1, 1)
    assert torch.equal(network(x)[0], real)
    for path in files(network, x, tmp_path):
        assert lsquant.verify(network, path, [x, -x]).exact


class Two(nn.Module):
    """A tensor that two layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b, self.c = nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.a(x))
        return self.b(y), self.c(y)


# ---- gradients ----


@pytest.mark.parametrize("limit", LIMITS)
def test_gradients_are_those_of_the_formulas(limit: str) -> None:
    """(M14) with (M10): q_min, q_max and 1 beyond the bounds of the codes; lo - z, hi - z and 0 beyond a limit's."""
    torch.manual_seed(4)
    x, upstream = images(), torch.randn(2, 2, 6, 6)
    model, network = ready(nn.Sequential(nn.Conv2d(3, 5, 1), LIMITS[limit](), nn.Conv2d(5, 2, 1)), x)
    reads, zero, step = model[2].input_quantizer, 60, 0.0078125
    put(reads, zero, step)
    (network(x) * upstream).sum().backward()
    codes, s, z = facts(network, x)
    name = "0" if limit == "none" else "1"
    folded = network.constants()["0"]
    acc = F.conv2d(torch.tensor(codes["input_1"] - z["input_1"]).double(), folded.codes.double())
    scale = s["input_1"] * folded.step.double() / step
    u = (acc + folded.bias[:, None, None]) * scale[:, None, None]
    low, high = {"none": (0, 255), "relu": (60, 255), "relu6": (60, 255), "clip": (0, 220)}[limit]
    q = torch.tensor(codes[name]).double()
    assert q.tolist() == (u.round() + zero).clamp(low, high).tolist()
    below, above = u <= low - zero, u >= high - zero
    assert below.any()
    assert above.any()
    v_hat = ((q - zero) * step).requires_grad_()
    w_hat = model[2].weight_quantizer(model[2].rows()).double()
    (F.conv2d(v_hat, w_hat) * upstream).sum().backward()
    grad = v_hat.grad
    assert grad is not None
    bottom, top = (0.0 if low == 0 else low - zero), (255.0 if high == 255 else high - zero)
    term = torch.where(below, bottom, torch.where(above, top, u.round() - u))
    g = reads.gradient_scale
    torch.testing.assert_close(reads.step.grad.double()[0], (grad * term).sum() * g, rtol=1e-4, atol=1e-6)
    own = (below & (low == 0)) | (above & (high == 255))
    torch.testing.assert_close(reads.offset.grad.double()[0], (grad * own).sum() * g, rtol=1e-4, atol=1e-6)
    of_bias = (grad * ~(below | above)).sum((0, 2, 3))
    torch.testing.assert_close(model[0].bias.grad.double(), of_bias, rtol=1e-4, atol=1e-6)


def test_gradients_of_an_input_are_those_of_its_quantizer() -> None:
    """The first tensor of the folded form and of the model as it was trained: one staircase."""
    torch.manual_seed(2)
    x, upstream = images(), torch.randn(2, 2, 6, 6)
    model, network = ready(nn.Sequential(nn.Conv2d(3, 2, 1)), x)
    quantizer = model[0].input_quantizer
    put(quantizer, 40, 0.01)
    found = []
    for form in (model, network):
        model.zero_grad()
        (form(x) * upstream).sum().backward()
        found.append([p.grad.clone() for p in (quantizer.step, quantizer.offset, model[0].weight)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(bool(grad.any()) for grad in found[1])


def test_training_moves_offsets_and_keeps_files_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = images()
    model, network = ready(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)), x)
    before = network.zero_points()
    put(model[2].input_quantizer, 60, 0.01)
    optimizer = torch.optim.SGD(lsquant.param_groups(network, lr=0.05, step_lr=0.5))
    for _ in range(5):
        optimizer.zero_grad()
        (network.train()(x) - 3).square().mean().backward()
        optimizer.step()
    after = network.eval().zero_points()
    assert after["1"] not in (60, before["1"])
    for path in files(network, x, tmp_path):
        assert lsquant.verify(network, path, [x, -x]).exact


def test_an_offset_that_is_not_finite_gives_nan() -> None:
    x = images()
    model, network = ready(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)), x)
    with torch.no_grad():
        model[2].input_quantizer.offset.fill_(torch.nan)
    assert bool(network(x).isnan().all())


def test_steps_are_raised_for_the_codes_that_the_zero_point_leaves() -> None:
    """Found again where only an offset has moved: which codes there are decides how near a tie one comes."""
    x = images()
    torch.manual_seed(1)
    model, network = ready(nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)), x)
    seen = set()
    for zero in range(0, 256, 15):
        put(model[1].input_quantizers[0], zero)
        steps = network.stored_steps()
        assert steps == lsquant.fuse(model).stored_steps()
        seen.add(float(steps["1"]))
        for q in range(-zero, 256 - zero):
            s, s_y = (float(steps[name]) for name in "01")
            gate = 256 / (1 + np.exp(-float(np.float32(q) * np.float32(s))))
            for u in (gate, q * min(round(gate), 255) * s / 256 / s_y):
                assert abs(u - np.floor(u) - 0.5) > 2.0**-12.5 or not -256 < u < 257
    assert len(seen) > 1


# ---- which tensors have an offset ----


def test_operands_of_additions_have_none_and_changes_says_so() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (nn.Conv2d(3, 3, 1) for _ in range(3))
            self.add, self.relu, self.end = Add(), nn.ReLU(), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.stem(x)
            return self.end(self.relu(self.add(self.b(self.a(y)), y)))

    x = images()
    model: Any = Residual().eval()
    changes = lsquant.prepare(model, Recipe(8, SHIFTED, joins=SHIFTED), example_inputs=x)
    rows = {change.name: change for change in changes}
    assert "without the offset, for an addition reads the input too: its operands have z = 0" in rows["a"].reason
    assert rows["a"].activation == "8 bit, sign undecided, per tensor"
    assert [name for name, row in rows.items() if row.activation.endswith("offset")] == ["stem", "b", "end"]
    assert [name for name, row in rows.items() if row.reason] == ["a"]
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    zeros = network.zero_points()
    assert zeros["stem"] == zeros["b"] == 0
    assert zeros["a"] > 0
    assert model.a.input_quantizer.spec == QuantSpec(8, signed=True)
    assert all(q.offset is None for q in model.add.input_quantizers)
    # the same recipe again keeps every step
    steps = network.stored_steps()
    lsquant.prepare(model, Recipe(8, SHIFTED, joins=SHIFTED), example_inputs=x)
    assert lsquant.fuse(model).stored_steps() == steps


def test_the_layers_at_its_bits_decide_and_else_the_joins() -> None:
    x = images()
    cases = [
        (Recipe(8, 8, joins=SHIFTED), {"x": False, "a": True, "act": False}),
        (Recipe(8, SHIFTED, joins=8), {"x": True, "a": False, "act": True}),
        (Recipe(8, 8, [Rule("c", 8, SHIFTED)], joins=8), {"x": False, "a": False, "act": True}),
        (Recipe(8, 4, [Rule("a", 8, 8)], joins=SHIFTED), {"x": False, "a": True, "act": False}),
    ]
    for recipe, wanted in cases:
        model, network = ready(Two(), x, recipe)
        stored = {node.name: q for node, q in network.program.stored.items() if q is not None}
        assert {name: q.offset is not None for name, q in stored.items()} == wanted
        assert set(model.state_dict()) == set(ready(Two(), x, recipe)[0].state_dict())


def test_behind_silu_all_codes_are_used() -> None:
    """Signed codes waste nearly half of the range on values that end at -0.28."""
    steps = []
    for setting in (8, SHIFTED):
        torch.manual_seed(0)
        x = 3 * images()
        _, network = ready(
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)), x, Recipe(8, setting, joins=8)
        )
        steps.append(float(network.stored_steps()["1"]))
    assert steps[1] < 0.6 * steps[0]


# ---- files ----


def files(network: lsquant.FusedNetwork, x: Tensor, folder: Path) -> list[Path]:
    """The program and both forms of the ONNX file."""
    pytest.importorskip("onnxruntime")
    paths = [lsquant.export_program(network, folder / "p.safetensors")]
    for form in ("qdq", "qoperator"):
        paths.append(lsquant.export_onnx(network, folder / f"{form}.onnx", x, profile="integer", form=form))
    return paths


@pytest.mark.parametrize("target", ["onnxruntime", "xnnpack"])
@pytest.mark.parametrize("signed", [False, True])
def test_zero_points_in_the_containers(target: Any, signed: bool, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    torch.manual_seed(1)
    x = images()
    setting = QuantSpec(8, signed=signed, offset=True)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model, network = ready(layers, x, Recipe(8, setting, joins=setting, target=target))
    zero = -17 if signed else 17
    for layer in (model[0], model[2], model[4]):
        put(layer.input_quantizer, zero)
    shift = 128 * signed - (128 if target == "xnnpack" else 0)
    assert int(network.codes(x)["3"].min()) == zero
    wanted = network(x).detach().numpy()
    for form in ("qdq", "qoperator"):
        path = lsquant.export_onnx(network, tmp_path / f"{form}.onnx", x, profile="integer", form=form)
        proto = onnx.load(path)
        values = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
        first = next(node for node in proto.graph.node if node.op_type == "QuantizeLinear")
        assert int(values[first.input[2]]) == zero + shift
        assert values[first.input[2]].dtype == (np.int8 if target == "xnnpack" else np.uint8)
        assert {zero + shift} < {int(v) for name, v in values.items() if name.startswith("zero_point_")}
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        if form == "qoperator" or target == "onnxruntime":
            assert session.run(None, {session.get_inputs()[0].name: x.numpy()})[0].tobytes() == wanted.tobytes()
        verdict = lsquant.verify(network, path, [x, -x])
        assert (verdict.exact, verdict.level) == (True, "outputs")


def test_a_program_with_zero_points_says_so(tmp_path: Path) -> None:
    """Older readers refuse its format; a program without is one of the first format, as before."""
    x = images()
    layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 2, 1)).eval()
    for setting, version in ((8, 1), (SHIFTED, 2)):
        model, network = ready(copy.deepcopy(layers), x, Recipe(8, setting, joins=setting))
        path = lsquant.export_program(network, tmp_path / "p.safetensors")
        document = json.loads(read_tensors(path)[0][KEY])
        assert document["format"] == version
        zeros = {step["name"]: step["zero"] for step in document["steps"] if "zero" in step}
        assert zeros == {name: z for name, z in network.zero_points().items() if z}
        assert len(zeros) == (3 if version == 2 else 0)
    with torch.no_grad():
        model[2].input_quantizer.offset.add_(5 * model[2].input_quantizer.step)
    with pytest.raises(lsquant.UsageError, match="is of another model: its program has other steps"):
        lsquant.verify(network, path, [x])


def test_a_stored_tensor_that_is_returned_has_its_value(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            y = self.act(self.a(x))
            return y, self.b(y)

    torch.manual_seed(1)
    x = torch.randn(20, 4)
    _, network = ready(Both(), x)
    codes, s, z = facts(network, x)
    assert z["act"] > 0
    assert network(x)[0].tolist() == ((codes["act"] - z["act"]).astype(np.float32) * np.float32(s["act"])).tolist()
    for path in files(network, x, tmp_path):
        assert lsquant.verify(network, path, [x, -x]).exact


def test_saved_packed_and_loaded(tmp_path: Path) -> None:
    x = images()
    torch.manual_seed(3)
    fresh = Parts().eval()
    model, network = ready(copy.deepcopy(fresh), x)
    wanted = network(x)
    lsquant.save(model, tmp_path / "saved.safetensors")
    lsquant.export_packed(model, tmp_path / "packed.safetensors")
    saved = lsquant.load(copy.deepcopy(fresh), tmp_path / "saved.safetensors")
    packed = lsquant.load_packed(copy.deepcopy(fresh), tmp_path / "packed.safetensors")
    for other in (saved, packed, copy.deepcopy(model)):
        again = lsquant.fuse(other.eval())
        assert again.zero_points() == network.zero_points()
        assert all(torch.equal(a, b) for a, b in zip(again(x), wanted, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(lsquant.to_integer(model)(x), model(x), strict=True))
    pytest.importorskip("onnxruntime")
    lsquant.export_onnx(model, tmp_path / "m.onnx", x)
    assert lsquant.verify(model, tmp_path / "m.onnx", [x]).reaches("layers")


def test_what_folding_changed_compares_codes_with_their_zero_points() -> None:
    x = images()
    torch.manual_seed(3)
    _, network = ready(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardswish(), nn.Conv2d(4, 2, 1)), x)
    rows = {row.name: row for row in network.changes([x, -x]).stored}
    assert (rows["input_1"].different, rows["0"].largest <= 1, rows["1"].largest <= 3) == (0, True, True)


def test_random_networks_have_offsets() -> None:
    """Those that tests/fusion/test_integer_onnx.py compares, in about a half of which some tensor has one."""
    found = [drawn(seed)[0].zero_points() for seed in range(8)]
    assert 1 <= sum(any(zeros.values()) for zeros in found) <= 7


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["offset", "step", "weight"])
def test_nothing_that_is_not_finite_is_shipped(which: str, bad: float, tmp_path: Path) -> None:
    shifted = QuantSpec(8, offset=True)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 1))
    x = images()
    model, network = ready(layers, x, Recipe(4, shifted, joins=shifted))
    with torch.no_grad():
        layer = model[2]
        value = {"offset": layer.input_quantizer.offset, "step": layer.input_quantizer.step}.get(which)
        (layer.weight_quantizer.step if value is None else value).fill_(bad)
        if which == "offset":
            assert bool(network(x).isnan().all())
            assert bool(model(x).isnan().all())
    name = "2.weight_quantizer" if which == "weight" else "input_quantizer"
    for write in (
        lambda: lsquant.export_onnx(network, tmp_path / "n.onnx", x, profile="integer"),
        lambda: lsquant.export_program(network, tmp_path / "n"),
    ):
        with pytest.raises(lsquant.UsageError, match=rf"{name}: an? (offset|step) is"):
            write()
    assert not list(tmp_path.iterdir())
