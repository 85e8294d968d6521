"""What the user's own loop may have: autocast, a loss scaler, accumulation, activation checkpointing, shared files."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lsquant
from lsquant import Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.nn import quantized_layers, quantizers


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.body = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU())
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(self.norm(self.stem(x)).flatten(1)))


def data(count: int = 16):
    return torch.randn(count, 2, 4, 4), torch.randint(3, (count,))


def make(preset: str = "w4a4", net: type[nn.Module] = Net):
    model, (x, y) = net(), data()
    lsquant.prepare(
        model, Recipe.preset(preset, rules=[Rule("body.0", weight=lsquant.QuantSpec(4, granularity="channel"))])
    )
    lsquant.calibrate(model, [x])
    return model, x, y


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


# ---- decay ----


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_steps_without_gradient_stay_bit_equal(kind):
    """Learning rate and decay are on and the gradient of every step is 0: nothing may move it."""
    model, x, y = make()
    for _, q in quantizers(model):
        q.step.register_hook(torch.zeros_like)
    before = state(model)
    optimizer = kind(lsquant.param_groups(model, lr=0.1, weight_decay=0.5))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    after = state(model)
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith(".step"))
    assert not torch.equal(before["head.weight"], after["head.weight"])


# ---- mixed precision ----


def test_bf16_autocast_trains_float32_steps_with_the_codes_of_float32():
    model, x, y = make()
    optimizer = torch.optim.AdamW(lsquant.param_groups(model, lr=1e-3, weight_decay=0.1))
    before, inputs, outputs = state(model), {}, {}
    for name, layer in quantized_layers(model):
        layer.register_forward_hook(lambda m, i, o, n=name: inputs.update({n: i[0]}))
        layer.register_forward_hook(lambda m, i, o, n=name: outputs.update({n: o}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    seen, out = dict(inputs), dict(outputs)
    assert out["head"].dtype == torch.bfloat16
    for name, layer in quantized_layers(model):
        # the same numbers as float32, without autocast: same codes, same sums, rounded to bf16 once at the end
        wide = seen[name].detach().float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = layer.input_quantizer.codes(seen[name])
        assert torch.equal(narrow, layer.input_quantizer.codes(wide))
        assert torch.equal(out[name].detach(), layer(wide).detach().to(torch.bfloat16))
    loss.backward()
    assert all(q.step.grad.dtype == q.step.dtype == torch.float32 for _, q in quantizers(model))
    optimizer.step()
    after = state(model)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("quantizer.step"))


@pytest.mark.parametrize("where", ["input", "gradient of a step", "gradient of a weight"])
def test_a_loss_scaler_skips_an_update_with_an_infinity(where):
    model, x, y = make()
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.1), momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def step(plant: bool) -> None:
        inputs = x.clone()
        if plant and where == "input":
            inputs[3, 1, 2, 2] = float("inf")
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs), y)
        scaler.scale(loss).backward()
        if plant and where != "input":
            layer = model.body[2]
            (layer.input_quantizer.step if "step" in where else layer.weight).grad.view(-1)[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    model.norm.eval()  # its running statistics would take up the infinity, as they do in any float model
    step(plant=False)
    before = state(model)
    step(plant=True)
    assert equal(before, state(model))
    assert scaler.get_scale() == 2.0**9
    step(plant=False)
    after = state(model)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("quantizer.step"))


# ---- accumulation ----


class Plain(Net):
    """Without BatchNorm, which sees other statistics in smaller batches, quantized or not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Identity()


def test_accumulated_gradients_are_those_of_one_batch():
    """16 samples at once, and in 4 parts.  Every sample has the same codes, so only the order of additions differs.

    With g_i the gradient of sample i, sums in two orders differ by at most 2 n u sum|g_i|, u = 2^-24, plus the same
    again for what a matrix product adds up within one g_i (at most 24 terms a product, 3 products deep).
    """
    model, x, y = make(net=Plain)
    F.cross_entropy(model(x), y).backward()
    whole = gradients(model)
    size = {name: torch.zeros_like(g) for name, g in whole.items()}
    for one, label in zip(x.split(1), y.split(1), strict=True):
        model.zero_grad()
        (F.cross_entropy(model(one), label) / 16).backward()
        for name, g in gradients(model).items():
            size[name] += g.abs()
    model.zero_grad()
    for part, labels in zip(x.split(4), y.split(4), strict=True):
        (F.cross_entropy(model(part), labels) / 4).backward()
    for name, g in gradients(model).items():
        bound = 2 * (16 + 3 * 24) * 2.0**-24 * size[name].amax()
        assert float((g - whole[name]).abs().max()) <= float(bound), name


# ---- activation checkpointing ----


class Checkpointed(Net):
    reentrant: bool | None = None

    def forward(self, x):
        if self.reentrant is None:
            return super().forward(x)
        x = self.norm(self.stem(x)).flatten(1)
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(reentrant, precision):
    model, x, y = make(net=Checkpointed)
    other = copy.deepcopy(model)
    other.reentrant = reentrant
    for one in (model, other):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = F.cross_entropy(one(x), y)
        loss.backward()
    a, b = gradients(model), gradients(other)
    assert len(a) == len(list(model.parameters()))
    assert equal(a, b)


# ---- files that have tied layers once ----


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        return self.head(self.inner(self.table(x)))


def test_files_that_leave_out_a_tied_layer_load(tmp_path):
    """safetensors (and with it Accelerate) writes a shared tensor once, and wants the other names reported missing."""
    x = torch.randint(10, (4, 6))
    models = [Tied(), Tied()]
    for model in models:
        lsquant.prepare(model, Recipe.preset("w4a4"), example_inputs=x)
    lsquant.calibrate(models[0], [x])
    save_model(models[0], str(tmp_path / "model.safetensors"))
    load_model(models[1], str(tmp_path / "model.safetensors"))
    assert equal(state(models[0]), state(models[1]))
    assert torch.equal(models[0](x), models[1](x))

    left_out = {name: t for name, t in models[0].state_dict().items() if not name.startswith("inner.")}
    missing, _ = models[1].load_state_dict(left_out, strict=False)
    assert {"inner.weight", "inner.weight_quantizer.step"} <= set(missing)


# ---- a model that is wrapped already ----


def test_a_wrapped_model_is_refused():
    model, x, _ = make()
    wrapped = nn.DataParallel(model)
    with pytest.raises(UsageError, match="prepare the model before it is wrapped in DataParallel"):
        lsquant.prepare(wrapped, Recipe.preset("w4a4"))
    with pytest.raises(UsageError, match="calibrate the model before it is wrapped in DataParallel"):
        lsquant.calibrate(wrapped, [x])


def test_a_wrapped_model_is_saved_under_its_own_names(tmp_path):
    model, x, _ = make()
    lsquant.save(nn.DataParallel(model), tmp_path / "model.safetensors")
    loaded = lsquant.load(Net(), tmp_path / "model.safetensors")
    assert equal(state(model), state(loaded))
    assert torch.equal(model.eval()(x), loaded.eval()(x))
