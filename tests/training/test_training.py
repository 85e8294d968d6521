"""Parameter groups, schedule, distillation, and what the loop writes."""

from __future__ import annotations

import math
import tomllib
from typing import Any

import pytest
import torch
from torch import nn

import lsquant
import lsquant.nn
from lsquant._util.errors import DamagedFile, DiskFull, LsquantError, UsageError
from lsquant._util.toml import to_toml
from lsquant.training import (
    CosineSchedule,
    Log,
    clip_rates,
    distillation_loss,
    fit,
    load_state,
    param_groups,
    quantizer_facts,
)  # fmt: skip
from lsquant.training.seeds import generator


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.hidden.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.head(torch.relu(self.tied(torch.relu(self.hidden(x)))))


def data(epoch: int):
    order = torch.randperm(48, generator=generator(7, epoch))
    x = torch.randn(48, 1, 4, 4, generator=generator("x"))
    y = torch.randint(0, 3, (48,), generator=generator("y"))
    return [(x[part], y[part]) for part in order.split(12)]


def setup(seed: int = 0):
    torch.manual_seed(seed)
    model = Net()
    return model, torch.optim.SGD(param_groups(model, 0.05, 1e-4), momentum=0.9)


# ---- parameter groups ----


def test_every_parameter_is_in_one_group():
    model = Net()
    groups = {group["name"]: group for group in param_groups(model, 0.1, 1e-4)}
    assert list(groups) == ["weights", "no_decay", "steps"]
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    assert [p.ndim for p in groups["weights"]["params"]] == [4, 2, 2]
    assert groups["weights"]["weight_decay"] == 1e-4
    assert groups["no_decay"]["weight_decay"] == groups["steps"]["weight_decay"] == 0.0


# ---- schedule ----


def test_cosine_schedule_literal():
    schedule = CosineSchedule(total=8)
    expected = [1.0, 0.9619397662556434, 0.8535533905932737, 0.6913417161825449, 0.5, 0.3086582838174551]
    assert [schedule.factor(i) for i in range(6)] == pytest.approx(expected, rel=1e-12)
    assert schedule.factor(8) == pytest.approx(0.0, abs=1e-15)


def test_warm_up_and_floor_literal():
    schedule = CosineSchedule(total=10, warmup=2, floor=0.1)
    assert [schedule.factor(i) for i in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1], rel=1e-12)


def test_schedule_applies_to_every_group_from_its_own_rate():
    model, _ = setup()
    optimizer = torch.optim.SGD(param_groups(model, 0.1, step_lr=0.01), momentum=0.9)
    schedule = CosineSchedule(total=4)
    for iteration in (0, 1, 2):
        schedule.apply(optimizer, iteration)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.005])


@pytest.mark.parametrize("kwargs", [{"total": 0}, {"total": 4, "warmup": 4}, {"total": 4, "floor": 2.0}])
def test_schedule_refuses(kwargs):
    with pytest.raises(UsageError):
        CosineSchedule(**kwargs)


# ---- distillation ----


def test_distillation_literal():
    """logits (0, ln 3) are the probabilities (1/4, 3/4), the teacher's are (1/2, 1/2)."""
    logits = torch.tensor([[0.0, math.log(3.0)]])
    teacher = torch.zeros(1, 2)
    hard = 1.3862943611198906  # -ln(1/4)
    soft = 0.14384103622589045  # ln(1/2) - (ln(1/4) + ln(3/4)) / 2
    loss = distillation_loss(logits, torch.tensor([0]), teacher)
    assert loss.item() == pytest.approx(hard + soft, rel=1e-6)
    # at temperature 2 the probabilities are (1, sqrt 3) / (1 + sqrt 3)
    soft2 = math.log(0.5) - 0.5 * (math.log(0.36602540378) + math.log(0.63397459622))
    loss = distillation_loss(logits, torch.tensor([0]), teacher, temperature=2.0, weight=0.5)
    assert loss.item() == pytest.approx(hard + 0.5 * 4.0 * soft2, rel=1e-5)


def test_distillation_of_equal_logits_is_the_cross_entropy_and_teacher_gets_no_gradient():
    logits = torch.randn(2, 5, 4, generator=generator(1), requires_grad=True)
    teacher = logits.detach().clone().requires_grad_()
    target = torch.zeros(2, 5, dtype=torch.long)
    loss = distillation_loss(logits, target, teacher)
    expected = nn.functional.cross_entropy(logits.reshape(10, 4), target.reshape(10))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert teacher.grad is None
    assert logits.grad is not None


# ---- the loop ----


def test_fit_learns_and_logs(tmp_path):
    model, optimizer = setup()
    schedule = CosineSchedule(20)
    options = {"schedule": schedule, "log": tmp_path / "log.jsonl", "quiet": True}
    done = fit(model, data, optimizer, epochs=5, steps_per_epoch=4, evaluate=lambda m: {"accuracy": 0.5}, **options)
    rows = Log(tmp_path / "log.jsonl").rows()
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["iteration"] == 20
    assert rows[0]["accuracy"] == 0.5
    assert rows[0]["phase"] == "train"
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["lr"] == pytest.approx(0.05 * schedule.factor(3))
    assert done.row == rows[-1]
    assert done.log_position == (tmp_path / "log.jsonl").stat().st_size


def test_the_bar_shows_the_numbers_of_the_log(tmp_path, capsys):
    """Loss and accuracy of the epoch, the accuracy after the epoch before, the learning rate."""
    model, optimizer = setup()
    options = {"schedule": CosineSchedule(8), "log": tmp_path / "log.jsonl"}
    fit(model, data, optimizer, epochs=2, steps_per_epoch=4, evaluate=lambda m: {"accuracy": 12.5}, **options)
    rows = Log(tmp_path / "log.jsonl").rows()
    want = [f"loss {r['loss']:.4f}  accuracy {r['train_accuracy']:.2f} %  {t}lr {r['lr']:.3g}"
            for r, t in zip(rows, ("", "tested 12.50 % after epoch 1  "), strict=True)]  # fmt: skip
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith(text) for line, text in zip(lines, want, strict=True)] == [True, True], lines


def test_fit_joins_facts_and_clip_rates_by_name(tmp_path):
    model, optimizer = setup()
    seen = []

    def observe(m):
        seen.append(m.conv.weight.grad is not None)
        return {"conv.weight_quantizer": {"step": 0.5}}

    def evaluate(m):
        return {"accuracy": 1.0, "quantizers": {"conv.weight_quantizer": {"clip_rate": 0.25}}}

    done = fit(model, data, optimizer, epochs=2, steps_per_epoch=4, observe=observe, evaluate=evaluate, quiet=True)
    assert seen == [True, True]
    assert done.row["quantizers"] == {"conv.weight_quantizer": {"step": 0.5, "clip_rate": 0.25}}


def test_fit_with_a_teacher_clipping_and_a_hook():
    model, optimizer = setup()
    teacher, _ = setup(1)
    before = [p.clone() for p in teacher.parameters()] + [b.clone() for b in teacher.buffers()]
    norms, iterations = [], []
    optimizer.register_step_pre_hook(
        lambda *a: norms.append(
            sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
        )
    )
    fit(
        model, data, optimizer, epochs=1, steps_per_epoch=4, teacher=teacher, clip_norm=0.01, quiet=True,
        after_step=iterations.append,
    )  # fmt: skip
    after = [*teacher.parameters(), *teacher.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not teacher.training
    assert len(norms) == 4
    assert max(norms) <= 0.01 * 1.001
    assert iterations == [0, 1, 2, 3]


def test_fit_says_when_the_batches_do_not_fit():
    model, optimizer = setup()
    with pytest.raises(UsageError, match="gave 4 batches instead of steps_per_epoch=5"):
        fit(model, data, optimizer, epochs=1, steps_per_epoch=5, quiet=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    model, optimizer = setup()
    path = tmp_path / "c.safetensors"

    def loss(output, batch, teacher_output):
        return output.sum() * (float("nan") if epoch_of["now"] else 1.0)

    epoch_of = {"now": 0}

    def batches(epoch):
        epoch_of["now"] = epoch
        return data(epoch)

    with pytest.raises(LsquantError, match="not finite in epoch 2"):
        fit(model, batches, optimizer, epochs=3, steps_per_epoch=4, loss=loss, checkpoint=path, quiet=True)
    assert load_state(path)["at"]["epoch"] == 1


def test_full_disk_during_a_checkpoint_keeps_the_old_one(tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    model, optimizer = setup()
    path = tmp_path / "c.safetensors"
    fit(model, data, optimizer, epochs=1, steps_per_epoch=4, checkpoint=path, quiet=True)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))
        with pytest.raises(DiskFull, match=r"no space left.*c\.safetensors"):
            fit(model, data, optimizer, epochs=1, steps_per_epoch=4, checkpoint=path, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_full_disk_while_logging(tmp_path):
    resource = pytest.importorskip("resource")
    log = Log(tmp_path / "log.jsonl")
    log.append({"a": 1})
    position = log.position
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (position + 5, hard))
        with pytest.raises(DiskFull, match=r"log\.jsonl"):
            log.append({"a": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.cut(position)
    assert log.rows() == [{"a": 1}]
    with pytest.raises(DamagedFile, match="it was cut"):
        log.cut(position + 1)


def test_toml():
    table = {
        "a": 1,
        "b": 1.5,
        "c": 'x"\\\n',
        "d": [1, 2],
        "none": None,
        "t": {"u v": True, "w": {"z": "\u00e9"}, "e": {}},
    }
    table["rules"] = [{"which": "a.*", "weight": {"bits": 2, "signed": True, "x": None}}, {"which": "re:.+\\d"}]
    again = tomllib.loads(to_toml(table))
    table.pop("none")
    table["rules"][0]["weight"].pop("x")
    assert again == table
    with pytest.raises(TypeError, match="set"):
        to_toml({"a": {1}})


# ---- with quantizers ----


def quantized() -> Any:
    torch.manual_seed(0)
    model = Net()
    rules = [lsquant.Rule("hidden", weight=2, activation=lsquant.QuantSpec(4, offset=True)), lsquant.Rule("tied", 2, 4)]
    recipe = lsquant.Recipe(3, 4, rules)
    lsquant.prepare(model, recipe, example_inputs=torch.zeros(1, 1, 4, 4))
    lsquant.calibrate(model, data(0))
    return model


def test_steps_and_offsets_are_a_group_of_their_own_and_never_decayed():
    model = quantized()
    groups = {group["name"]: group for group in param_groups(model, 0.1, 1e-4, step_lr=0.01)}
    assert list(groups) == ["weights", "no_decay", "steps"]
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}
    expected = {id(p) for _, q in lsquant.nn.quantizers(model) for p in q.parameters()}
    assert {id(p) for p in groups["steps"]["params"]} == expected
    assert id(model.hidden.input_quantizer.offset) in expected
    assert groups["steps"]["weight_decay"] == 0.0
    assert [groups[name]["lr"] for name in groups] == [0.1, 0.1, 0.01]
    assert {id(p) for p in groups["weights"]["params"]} == {
        id(m.weight) for m in (model.conv, model.hidden, model.head)
    }


def test_decay_by_bits_literal():
    model = quantized()
    groups = {group["name"]: group for group in param_groups(model, 0.1, 1e-4, weight_decay_by_bits=True)}
    assert list(groups) == ["weights", "no_decay", "steps", "weights/3bit", "weights/2bit"]
    assert groups["weights"]["params"] == []
    assert groups["weights/2bit"]["weight_decay"] == 0.25e-4
    assert [id(p) for p in groups["weights/2bit"]["params"]] == [id(model.hidden.weight)]
    assert groups["weights/3bit"]["weight_decay"] == 0.5e-4
    assert len(groups["weights/3bit"]["params"]) == 2
    lsquant.prepare(model, lsquant.Recipe(4, 4))
    groups = {group["name"]: group for group in param_groups(model, 0.1, 1e-4, weight_decay_by_bits=True)}
    assert list(groups) == ["weights", "no_decay", "steps"]
    assert len(groups["weights"]["params"]) == 3


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_groups_go_into_any_optimizer_and_move_every_parameter(kind):
    model = quantized()
    optimizer = kind(param_groups(model, 0.01, 1e-4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, data, optimizer, epochs=1, steps_per_epoch=4, quiet=True)
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not [name for name in still if not name.endswith("offset")]


def test_facts_are_those_of_the_reference():
    model = quantized()
    x, y = data(0)[0]
    model.train()
    assert quantizer_facts(model)["conv.weight_quantizer"]["R"] is None
    nn.functional.cross_entropy(model(x), y).backward()
    facts = quantizer_facts(model)
    assert set(facts) == {name for name, _ in lsquant.nn.quantizers(model)}
    for kind in ("weight_quantizer", "input_quantizer"):
        quantizer, weight = getattr(model.conv, kind), model.conv.weight
        step = quantizer.step.item()
        expected = (quantizer.step.grad.abs().item() / step) / (weight.grad.norm().item() / weight.norm().item())
        assert facts[f"conv.{kind}"]["R"] == pytest.approx(expected, rel=1e-4)
        assert facts[f"conv.{kind}"]["step"] == pytest.approx(step)
    with torch.no_grad():
        model.conv.weight_quantizer.step.fill_(-1.0)
    nn.functional.cross_entropy(model(x), y)
    facts = quantizer_facts(model)["conv.weight_quantizer"]
    assert facts["guarded"] == 1
    assert facts["step"] == pytest.approx(model.conv.weight_quantizer.initial_step.item() * 2**-10)


def test_facts_of_channels_give_the_range():
    model: Any = Net()
    weight = lsquant.QuantSpec(3, granularity="channel")
    lsquant.prepare(model, lsquant.Recipe(weight, 4), example_inputs=torch.zeros(1, 1, 4, 4))
    lsquant.calibrate(model, data(0))
    nn.functional.cross_entropy(model(data(0)[0][0]), data(0)[0][1]).backward()
    facts = quantizer_facts(model)["conv.weight_quantizer"]
    assert facts["step_min"] <= facts["step"] <= facts["step_max"]
    assert facts["step_min"] == pytest.approx(model.conv.weight_quantizer.step.min().item())
    assert clip_rates(model, data(0))["conv.weight_quantizer"]["clip_rate"] <= 1.0


def test_clip_rate_literal():
    """Codes 0 .. 15 of an unsigned 4-bit input with step 1: values below 0 and above 15 are clipped."""
    model: Any = nn.Sequential(nn.Linear(4, 2))
    lsquant.prepare(model, lsquant.Recipe(4, lsquant.QuantSpec(4, signed=False)))
    lsquant.calibrate(model, [torch.rand(2, 4)])
    with torch.no_grad():
        model[0].input_quantizer.step.fill_(1.0)
        model[0].input_quantizer.initial_step.fill_(1.0)
        model[0].weight.copy_(torch.tensor([[-8.0, 7.0, 8.0, -9.0], [0.0, 1.0, 2.0, 3.0]]))
        model[0].weight_quantizer.step.fill_(1.0)
    model.train()
    rates = clip_rates(model, [torch.tensor([[-1.0, 0.0, 15.0, 15.5]])])
    assert rates == {"0.weight_quantizer": {"clip_rate": 0.25}, "0.input_quantizer": {"clip_rate": 0.5}}
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_a_pass_over_quantizers_fits_the_log(tmp_path):
    model = quantized()
    optimizer = torch.optim.SGD(param_groups(model, 0.05), momentum=0.9)
    fit(model, data, optimizer, epochs=1, steps_per_epoch=4, log=tmp_path / "log.jsonl", quiet=True)
    row = Log(tmp_path / "log.jsonl").rows()[0]
    assert set(row["quantizers"]) == {name for name, _ in lsquant.nn.quantizers(model)}
    assert row["step_lr"] == 0.05
