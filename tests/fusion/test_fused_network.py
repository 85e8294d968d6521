"""The integer-only form of a network: against NumPy loops, against the gradients of the formulas, and its refusals."""

from __future__ import annotations

import copy
import math
import pickle
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
from lsquant import QuantSpec, Recipe, UsageError
from lsquant.fusion.network import Run
from lsquant.nn import Add, Mean, Mul
from lsquant.nn.stored import FUNCTIONS


def one_layer(seed: int, granularity: str = "channel", gamma: float | None = None) -> tuple[Any, Any, Tensor]:
    """(model, fused network, input): a convolution, BatchNorm, ReLU, and a last layer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    norm: Any = model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.randn(5))
        norm.bias.copy_(torch.randn(5))
        norm.running_mean.copy_(torch.randn(5))
        norm.running_var.copy_(torch.rand(5) + 0.5)
        if gamma is not None:
            norm.weight[2] = gamma
    x = torch.randn(2, 3, 5, 5)
    weight = QuantSpec(4, granularity=granularity)  # type: ignore[arg-type]
    lsquant.prepare(model, Recipe(weight, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    return model, lsquant.fuse(model), x


def integers_of(model: Any, x: Tensor) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Return codes of the input and of the weight of the first layer, and the steps of what it reads and makes."""
    layer = model[0]
    codes = layer.integer_weight()[0].numpy().astype(np.int64)
    s_x, s_y = (float(m.input_quantizer.effective_step().detach()) for m in (layer, model[3]))
    return layer.input_quantizer.codes(x).numpy().astype(np.int64), codes, s_x, s_y


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("gamma", [None, 0.0, 1e-30])
@pytest.mark.parametrize("seed", range(3))
def test_a_layer_equals_the_loops_of_the_oracle(seed: int, gamma: float | None, granularity: str) -> None:
    model, network, x = one_layer(seed, granularity, gamma)
    q, w, s_x, s_y = integers_of(model, x)
    norm, layer = model[1], model[0]
    alpha, beta = (t.detach().numpy() for t in norm.affine_constants())
    s_w = layer.weight_quantizer.effective_step().detach().numpy()
    step, bias = oracle.folded(s_w, alpha, beta, np.float32(s_x), np.float32(s_y), layer.bias.detach().numpy())
    found = network.constants()["0"]
    codes = network.codes(x)["2"].numpy()
    for channel in range(5):
        own = w[channel] * (alpha[channel] != 0)
        if found.step[channel] != step[channel]:  # raised, for its bias would leave int32
            assert gamma == 1e-30
            assert abs(int(bias[channel])) >= 2**31 - 9 * 3 * 7 * 128
            continue
        assert float(found.bias[channel]) == bias[channel]
        acc = F.conv2d(torch.tensor(q).double(), torch.tensor(own)[None].double(), padding=1).numpy().astype(np.int64)
        wanted = oracle.integer_layer(
            acc.reshape(-1, 1), np.array([bias[channel]]), np.float32(s_x), step[channel : channel + 1],
            np.float32(s_y), 0, 0, 255,
        )  # fmt: skip
        assert codes[:, channel].reshape(-1).tolist() == np.asarray(wanted).reshape(-1).tolist()
    assert ((codes >= 0) & (codes <= 255)).all()
    assert len(np.unique(codes)) > 20


def test_the_last_layer_gives_real_values() -> None:
    model, network, x = one_layer(1)
    folded, codes = network.constants()["3"], network.codes(x)["2"]
    acc = F.conv2d(codes.double(), folded.codes.double())
    s = model[3].input_quantizer.effective_step().detach() * folded.step
    wanted = (acc + folded.bias.reshape(-1, 1, 1)).float() * s.reshape(-1, 1, 1)
    assert torch.equal(network(x), wanted)


def test_gradients_are_those_of_the_formulas() -> None:
    """Of weight, steps, gamma, beta and bias: v = y where it is inside, and the staircase's for s_y, in float64."""
    model, network, x = one_layer(4)
    upstream = torch.randn(2, 2, 5, 5)
    (network(x) * upstream).sum().backward()
    layer, norm, last = model[0], model[1], model[3]
    parameters = {n: p for n, p in model.named_parameters() if p.grad is not None}
    got = {name: p.grad.clone() for name, p in parameters.items()}
    assert set(got) == {name for name, _ in model.named_parameters()}
    model.zero_grad()

    s_y = last.input_quantizer.step.detach().double()
    alpha, beta = (t.double() for t in norm.affine_constants())
    x_hat, w_hat = layer.input_quantizer(x), layer.weight_quantizer(layer.rows())
    y = F.conv2d(x_hat.double(), w_hat.double(), padding=1) + layer.bias.double()[:, None, None]
    y = y * alpha[:, None, None] + beta[:, None, None]
    folded = network.constants()["0"]
    acc = F.conv2d(layer.input_quantizer.codes(x).double(), folded.codes.double(), padding=1)
    scale = layer.input_quantizer.step.detach() * folded.step / s_y.float()
    u = (acc + folded.bias[:, None, None]) * scale[:, None, None].double()  # the bias is a whole number there
    codes = network.codes(x)["2"].double()
    inside = (u > 0) & (u < 255)
    v_hat = (codes * s_y).requires_grad_()
    out = F.conv2d(v_hat, last.weight_quantizer(last.rows()).double(), last.bias.double())
    (out * upstream).sum().backward()
    grad = v_hat.grad
    assert grad is not None
    term = torch.where(inside, codes - u, torch.where(u >= 255, 255.0, 0.0))
    (y * (grad * inside)).sum().backward()
    wanted = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    own = (grad * term).sum() * last.input_quantizer.gradient_scale
    for name, value in got.items():
        expected = own if name == "3.input_quantizer.step" else wanted[name]
        torch.testing.assert_close(value.double().squeeze(), expected.double().squeeze(), rtol=2e-3, atol=1e-5)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.mul, self.end = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Mul(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.mul(self.a(x), self.b(x[:, :, :1, :1])))


def product(step: float | None = None) -> tuple[Any, Any, Tensor]:
    """A product of two tensors, one of them with one position, its network and an input; step: of the product."""
    torch.manual_seed(0)
    model: Any = Product().eval()
    x = torch.randn(2, 3, 4, 4)
    lsquant.prepare(model, Recipe(4, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    if step is not None:
        a, b = model.mul.input_quantizers
        with torch.no_grad():
            for operand in (a, b):  # no code of theirs is clipped
                operand.step.mul_(2)
            model.end.input_quantizer.step.copy_(step * a.step * b.step)
            model.end.input_quantizer.initial_step.copy_(model.end.input_quantizer.step)
    return model, lsquant.fuse(model), x


def test_the_step_behind_a_product_is_raised_away_from_ties() -> None:
    _, network, x = product(64.0)  # a product of 32 is a tie
    steps = network.stored_steps()
    s_a, s_b, s_y = (float(steps[name]) for name in ("a", "b", "mul"))
    assert 64 * s_a * s_b * (1 + 1e-7) < s_y < 64 * s_a * s_b * 1.001
    products = {i * j for i in range(1, 129) for j in range(1, 129)}
    near = min(oracle.distance_to_product_tie(n, s_a, s_b, s_y) for n in products if n * s_a * s_b / s_y < 129)
    assert near > 2.0**-21
    codes = {name: q.numpy() for name, q in network.codes(x).items()}
    wanted = oracle.integer_multiply(codes["a"], codes["b"], 0, 0, s_a, s_b, s_y, 0, -128, 127)
    assert codes["mul"].tolist() == wanted.tolist()
    assert len(np.unique(codes["mul"])) > 10


def test_gradients_of_a_product() -> None:
    """Of the operands: the upstream gradient, where codes are inside, times the other one; of the step: LSQ's."""
    model, network, x = product(16.0)  # some codes are clipped
    upstream = torch.randn(2, 2, 4, 4)
    (network(x) * upstream).sum().backward()
    codes = {name: q.double() for name, q in network.codes(x).items()}
    s = {name: step.double() for name, step in network.stored_steps().items()}
    u = codes["a"] * codes["b"] * s["a"] * s["b"] / s["mul"]
    inside = (u > -128) & (u < 127)
    v_hat = (codes["mul"] * s["mul"]).requires_grad_()
    w_hat = model.end.weight_quantizer(model.end.rows()).double()
    (F.conv2d(v_hat, w_hat) * upstream).sum().backward()
    assert v_hat.grad is not None
    grad = v_hat.grad
    for name, other in (("a", "b"), ("b", "a")):
        assert -128 < codes[name].min() <= codes[name].max() < 127
        wanted = (grad * inside * codes[other] * s[other]).sum((0, 2, 3))
        torch.testing.assert_close(getattr(model, name).bias.grad.double(), wanted, rtol=1e-4, atol=1e-6)
    term = torch.where(inside, codes["mul"] - u, torch.where(u > 0, 127.0, -128.0))
    quantizer = model.end.input_quantizer
    wanted = (grad * term).sum() * quantizer.gradient_scale
    torch.testing.assert_close(quantizer.step.grad.double().squeeze(), wanted, rtol=1e-4, atol=1e-6)
    assert (~inside).any()


def test_a_product_of_a_tensor_and_itself_and_one_whose_result_is_an_operands_step(tmp_path: Path) -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.mul, self.more, self.add = nn.Conv2d(3, 3, 1), Mul(), Mul(), Add()
            self.end = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            return self.end(self.more(a, self.add(a, self.mul(a, a))))  # the square has the step of a

    x = torch.randn(2, 3, 4, 4)
    model: Any = Squares().eval()
    lsquant.prepare(model, Recipe(4, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    steps = network.stored_steps()
    assert float(steps["a"]) == float(steps["mul"])
    for form in ("qdq", "qoperator"):
        path = lsquant.export_onnx(network, tmp_path / "m.onnx", x, profile="integer", form=form)
        assert lsquant.verify(network, path, [x, 2 * x]).exact
    assert lsquant.verify(network, lsquant.export_program(network, tmp_path / "p"), [x, 2 * x]).exact


def test_averages_over_windows_equal_the_oracle() -> None:
    x = torch.randn(2, 3, 9, 8)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(3, 2), nn.Conv2d(4, 2, 1)).eval()
    lsquant.prepare(model, Recipe(4, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    codes, steps = network.codes(x), network.stored_steps()
    s, s_y = (float(steps[name]) for name in ("0", "1"))
    wanted = oracle.integer_average_windows(codes["0"].numpy(), 3, 2, 0, s, s_y, 0, -128, 127)
    assert codes["1"].numpy().tolist() == wanted.tolist()
    network(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_training_and_evaluation_give_the_same_bits() -> None:
    for seed in range(6):
        network, _, x = drawn(seed)
        with torch.no_grad():
            wanted = network(x)
        assert torch.equal(network(x), wanted)
        assert torch.equal(network.train()(x), wanted)


def test_the_step_behind_an_addition_is_raised_away_from_ties() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.add, self.end = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), Add(), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.end(self.add(self.a(x), self.b(x)))

    model: Any = Twice().eval()
    x = torch.randn(2, 3, 4, 4)
    lsquant.prepare(model, Recipe(4, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    with torch.no_grad():  # half of the sums are ties
        model.end.input_quantizer.step.copy_(2 * model.add.input_quantizers[0].step)
        model.end.input_quantizer.initial_step.copy_(model.end.input_quantizer.step)
    network = lsquant.fuse(model)
    s, s_y = (float(network.stored_steps()[name]) for name in ("a", "add"))
    assert 2 * s < s_y < 2 * s * 1.01
    assert min(oracle.distance_to_tie(n, s, s_y) for n in range(1, 257)) > 2.0**-13
    codes = network.codes(x)
    wanted = oracle.integer_add(codes["a"].numpy(), codes["b"].numpy(), 0, 0, s, s_y, 0, -128, 127)
    assert codes["add"].numpy().tolist() == np.asarray(wanted).tolist()


def test_sums_of_layers_stay_within_int32() -> None:
    model, network, x = one_layer(2)
    with torch.no_grad():
        model[1].bias[1] = 1e9  # as a BatchNorm with a dead channel has it
    folded = network.constants()["0"]
    assert folded.raised == 1
    sums = folded.codes.abs().reshape(5, -1).sum(1) * 128 + folded.bias.abs()
    assert bool((sums < 2**31).all())
    assert bool((network.codes(x)["2"][:, 1] == 255).all())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_are_tables(function: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), function(), nn.Linear(6, 2)).eval()
    x = torch.randn(50, 4)
    lsquant.prepare(model, Recipe(8, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    codes, steps = network.codes(x), network.stored_steps()
    values = (codes["0"].float() * steps["0"]).double()
    quotient = (function()(values).float() / steps["1"]).double()
    reads: Any = model[2]
    low, high = reads.input_quantizer.q_min, reads.input_quantizer.q_max
    wanted = quotient.round().clamp(low, high).long()
    if function is nn.SiLU:
        s, s_y = (np.float32(float(steps[name])) for name in ("0", "1"))
        table = torch.tensor(oracle.integer_silu(-128, 127, s, s_y, low, high))
        assert int((table[codes["0"] + 128] - wanted).abs().max()) == 1  # near SiLU, not SiLU
        wanted = table[codes["0"] + 128]
    assert codes["1"].tolist() == wanted.tolist()
    assert network.program.floats == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_a_function_rounds_is_no_tie(function: Any) -> None:
    """At the steps with which it would be one: runtimes compute functions with errors."""
    model: Any = nn.Sequential(nn.Linear(4, 6), function(), nn.Linear(6, 2)).eval()
    x = torch.randn(50, 4)
    lsquant.prepare(model, Recipe(8, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    reads = [model[1].input_quantizers[0], model[2].input_quantizer]
    at = float(100 * reads[0].step.detach())
    value = float(function()(torch.tensor(at).double()))
    if function is nn.SiLU:
        value = at * round(256 / (1 + math.exp(-at))) / 256
    with torch.no_grad():
        reads[1].step.fill_(value / 20.5)  # the code 100 gives 20.5
    steps = lsquant.fuse(model).stored_steps()
    moved = [float((steps[name] / quantizer.step).detach()) for name, quantizer in zip("01", reads, strict=True)]
    assert all(1.0 <= factor < 1.001 for factor in moved)
    assert max(moved) > 1.0
    s, s_y = (float(steps[name]) for name in "01")
    for q in range(-128, 128):
        at = float(np.float32(q) * np.float32(s))
        quotients = [float(function()(torch.tensor(at).double())) / s_y]
        if function is nn.SiLU:
            gate = 256 / (1 + math.exp(-at))
            quotients = [gate, q * min(round(gate), 255) * s / 256 / s_y]
        for quotient in quotients:
            assert abs(quotient - math.floor(quotient) - 0.5) > 2.0**-12.5 or not -129 < quotient < 256


def test_what_folding_changed_is_told() -> None:
    model, network, x = one_layer(3)
    batches = [x, 2 * x, -x]
    found = network.changes(batches, metric=lambda y, batch: float(y.sum()), max_batches=2)
    with torch.no_grad():
        trained = [model[3].input_quantizer.codes(model[:3](b)).long() for b in batches[:2]]
        outputs = [(model(b), network(b)) for b in batches[:2]]
    distances = [(t - network.codes(b)["2"]).abs() for t, b in zip(trained, batches, strict=False)]
    assert [row.name for row in found.stored] == ["input_1", "2"]
    assert (found.stored[0].elements, found.stored[0].different) == (2 * x.numel(), 0)
    row = found.stored[1]
    assert row.elements == sum(d.numel() for d in distances)
    assert row.different == sum(int((d > 0).sum()) for d in distances)
    assert row.different > 0
    assert row.largest == max(int(d.max()) for d in distances)
    assert found.largest_output == max(float((a.double() - b.double()).abs().max()) for a, b in outputs)
    assert found.metric == tuple(sum(float(pair[i].sum()) for pair in outputs) / 2 for i in (0, 1))
    assert found.raised == {}
    assert f"{row.elements}" in str(found)
    assert "as trained" in str(found)
    assert network.training == model.training


def test_a_raised_channel_is_told() -> None:
    model, network, x = one_layer(2)
    with torch.no_grad():
        model[1].bias[1] = 1e9
    assert "0: the step of 1 channels was raised" in str(network.changes([x]))
    assert network.changes([x]).raised == {"0": 1}


def test_averages_equal_the_oracle() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), Mean((2, 3)), nn.Linear(4, 2)).eval()
    x = torch.randn(3, 3, 5, 7)
    lsquant.prepare(model, Recipe(8, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    codes, steps = network.codes(x), network.stored_steps()
    q = codes["1"].numpy().reshape(3, 4, 35)
    wanted = oracle.integer_average(q, 0, float(steps["1"]), float(steps["2"]), 0, 0, 255)
    assert codes["2"].tolist() == np.asarray(wanted).reshape(3, 4).tolist()


def test_what_has_no_integer_form_stays_float_and_is_listed() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.sin(self.a(x)))

    model, x = Odd().eval(), torch.randn(5, 4)
    lsquant.prepare(model, Recipe(8, 8, joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    assert [step.name for step in network.program.floats] == ["sin"]
    assert torch.allclose(network(x), model(x), atol=0.05)


def test_weights_in_groups_stay_float_and_are_listed() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(5, 8)
    groups = QuantSpec(4, granularity="group", group_size=4)
    changes = lsquant.prepare(model, Recipe(groups, 8, [lsquant.Rule("2", 8)], joins=8), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)
    assert [step.name for step in network.program.floats] == ["0", "1"]
    assert [c.name for c in changes if "no integer form" in c.reason] == ["1"]
    assert torch.allclose(network(x), model(x), atol=0.05)


def test_fuse_needs_stored_tensors_steps_and_one_process() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    lsquant.prepare(model, Recipe(4, 8))
    lsquant.calibrate(model, [x])
    with pytest.raises(UsageError, match=r"fuse: the tensors between the layers .* joins=8"):
        lsquant.fuse(model)
    lsquant.prepare(lsquant.revert(model), Recipe(4, 8, joins=8), example_inputs=x)
    with pytest.raises(UsageError, match="has no step yet"):
        lsquant.fuse(model)
    lsquant.calibrate(model, [x])
    with pytest.raises(UsageError, match="fuse: fuse the model before it is wrapped in DataParallel"):
        lsquant.fuse(nn.DataParallel(model))
    compiled: Any = torch.compile(model, backend="eager")
    assert torch.equal(lsquant.fuse(compiled)(x), lsquant.fuse(model)(x))


def test_a_fused_network_shares_the_parameters_of_its_model() -> None:
    model, network, x = one_layer(3)
    assert {id(p) for p in network.parameters()} == {id(p) for p in model.parameters()}
    with torch.no_grad():
        before = network(x)
        model[0].weight.mul_(-1)
    assert not torch.equal(network(x), before)
    run = Run(network.program)
    assert [step.kind.value for step in run.program.steps] == ["quantize", "layer", "layer"]


def test_copied_pickled_under_autocast_and_in_both_modes() -> None:
    model, network, x = one_layer(5)
    wanted = network(x)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(x), wanted)
        assert twin.model is not model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(network(x), wanted)
    network.train()
    assert (network.training, model.training, model[1].training) == (True, False, False)
    mean = model[1].running_mean.clone()
    assert torch.equal(network(10 * x)[:0], wanted[:0])
    assert torch.equal(model[1].running_mean, mean)


def test_a_model_that_was_changed_since_is_refused() -> None:
    model, network, x = one_layer(6)
    lsquant.prepare(model, Recipe(8, 8, joins=8), example_inputs=x)
    with pytest.raises(UsageError, match=r"prepared or reverted after fuse: call lsquant.fuse\(model\) again"):
        network(x)
    network = lsquant.fuse(model)
    lsquant.revert(model)
    with pytest.raises(UsageError, match="prepared or reverted after fuse"):
        network(x)


def test_a_fused_network_is_saved_by_its_model(tmp_path: Path) -> None:
    _, network, x = one_layer(7)
    with pytest.raises(UsageError, match=r"prepared with joins; give that one, as network.model"):
        lsquant.save(network, tmp_path / "m")
    calls: list[Any] = [lambda: lsquant.export_packed(network, tmp_path / "m"), lambda: lsquant.to_integer(network)]
    for call in calls:
        with pytest.raises(UsageError, match=r"a fused network: give its model, network.model"):
            call()
    lsquant.save(network.model, tmp_path / "m")
    fresh = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1)).eval()
    assert torch.equal(lsquant.fuse(lsquant.load(fresh, tmp_path / "m"))(x), network(x))


def test_prepare_says_what_stays_float_and_load_that_the_model_was_traced(tmp_path: Path) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) + x)

    x = torch.randn(2, 3, 4, 4)
    changes = lsquant.prepare(Residual(), Recipe(4, 8, joins=8), example_inputs=x)
    (row,) = [c for c in changes if c.name == "add"]
    assert (row.kind, row.weight, row.weights) == ("function", "float", 0)
    assert "no integer form, so it stays in floating point: lsquant.trace makes modules of functions" in row.reason
    model = Residual()
    lsquant.trace(model, x)
    changes = lsquant.prepare(model, Recipe(4, 8, joins=8), example_inputs=x)
    assert [c.name for c in changes] == ["a", "b"]
    lsquant.calibrate(model, [x])
    lsquant.save(model, tmp_path / "m")
    with pytest.raises(UsageError, match=r"call lsquant.trace\(model, example_inputs\) first, if it was traced"):
        lsquant.load(Residual(), tmp_path / "m")


def test_what_is_found_about_a_fused_network_is_found_about_its_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(8, 4)).eval(), torch.randn(8, 3, 12, 12)
    lsquant.prepare(model, Recipe.preset("w2a2", integer_only=True), example_inputs=x)
    lsquant.calibrate(model, [x])
    network = lsquant.fuse(model)

    def metric(output: Tensor, batch: Tensor) -> float:
        return float(output.abs().mean())

    assert lsquant.sensitivity(network, [x], metric) == lsquant.sensitivity(model, [x], metric)
    assert any(found.gain for found in lsquant.sensitivity(network, [x], metric))
    assert lsquant.check(network, batches=[x]) == lsquant.check(model, batches=[x])
    for name, subject in (("a", network), ("b", model)):
        lsquant.write_report(subject, tmp_path / name, [x], title="t")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    before = model[2].input_quantizer.step.item()
    lsquant.calibrate(network, [10 * x], again=True)
    assert model[2].input_quantizer.step.item() > 5 * before
    assert lsquant.correct_bias(network, [10 * x])
    with lsquant.disabled(network, "*"), pytest.raises(UsageError, match="this quantizer is switched off"):
        network(x)
    with torch.no_grad():
        network(x)
