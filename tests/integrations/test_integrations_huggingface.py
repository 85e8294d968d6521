"""Hugging Face Trainer and Accelerate with lsquant's groups, optimizer and callback."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import lsquant
from lsquant import Recipe
from lsquant._util.errors import UsageError
from lsquant.nn import quantizers

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from lsquant.integrations import huggingface  # noqa: E402  (needs transformers)

pytestmark = [
    # Trainer's and Accelerate's own affairs: pinned memory without an accelerator
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
]

# learned positions, LayerNorm, tied embedding and head
CONFIG = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "loss_type": "ForCausalLM"}
EXAMPLES = [{"input_ids": (torch.arange(6) * 3 + 5 * i) % 20} for i in range(16)]
for example in EXAMPLES:
    example["labels"] = example["input_ids"]
BATCH = {"input_ids": torch.stack([e["input_ids"] for e in EXAMPLES])}


def make(calibrated: bool = True, preset: str = "w4a4") -> nn.Module:
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**CONFIG, bos_token_id=0, eos_token_id=0))
    lsquant.prepare(model, Recipe.preset(preset), example_inputs=BATCH)
    if calibrated:
        lsquant.calibrate(model, [BATCH])
    return model


def arguments(folder, **kwargs):
    usual = {"max_steps": 4, "per_device_train_batch_size": 8, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    usual |= {"save_strategy": "no", "logging_strategy": "no", "learning_rate": 1e-3, "dataloader_pin_memory": False}
    return transformers.TrainingArguments(str(folder), **usual | kwargs)


def train(model, args, optimizer=None, callback=None, **kwargs):
    optimizer = optimizer or huggingface.optimizer(model, args, step_lr=1e-4)
    callbacks = [callback or huggingface.QuantizerCallback()]
    trainer = transformers.Trainer(
        model, args, train_dataset=EXAMPLES, optimizers=(optimizer, None), callbacks=callbacks
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train(**kwargs)
    return trainer


def steps(model) -> dict[str, torch.Tensor]:
    return {name: q.step.detach().clone() for name, q in quantizers(model)}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_trainer_learns_every_step_and_the_callback_writes_facts(tmp_path):
    model = make()
    before, seen = steps(model), []
    log = tmp_path / "quantizers.jsonl"
    callback = huggingface.QuantizerCallback(every=2, log=log, report=seen.append)
    args = arguments(tmp_path / "run", weight_decay=0.1)
    trainer = train(model, args, callback=callback)
    after = steps(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [2, 4]
    assert set(rows[0]["quantizers"]) == set(before)
    assert callback.last == rows[1]
    facts = rows[1]["quantizers"]["transformer.h.0.mlp.c_fc.input_quantizer"]
    assert facts["R"] > 0  # taken while the gradients are there
    assert len(seen) == 2
    assert seen[1]["quantizers/transformer.h.0.mlp.c_fc.input_quantizer/step"] == facts["step"]
    groups = {g["name"]: g for g in trainer.optimizer.param_groups}
    assert groups["weights"]["weight_decay"] == 0.1
    assert groups["steps"]["weight_decay"] == 0.0


def test_oscillation_is_collected(tmp_path):
    """After 17 looks, one a step, every weight quantizer has a share, the tied one once."""
    callback = huggingface.QuantizerCallback(every=17, oscillation_every=1)
    model = make()
    train(model, arguments(tmp_path, max_steps=17), callback=callback)
    shares = {name: some["oscillation"] for name, some in callback.last["quantizers"].items() if "oscillation" in some}
    assert shares.keys() == {name for name, _ in quantizers(model) if name.endswith("weight_quantizer")}
    assert all(0.0 <= share < 0.5 for share in shares.values())


def test_oscillation_goes_on_where_trainer_resumes(tmp_path):
    """Killed after 10 of 17 looks: the shares of a run that was not, from the same folder; elsewhere a new window."""

    class Killed(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    def shares(callback):
        facts = callback.last["quantizers"]
        return {name: some["oscillation"] for name, some in facts.items() if "oscillation" in some}

    def callback():
        return huggingface.QuantizerCallback(every=17, oscillation_every=1)

    kwargs = {"max_steps": 17, "save_strategy": "steps", "save_steps": 10, "learning_rate": 0.1}
    whole = callback()
    train(make(), arguments(tmp_path / "a", **kwargs), callback=whole)
    assert any(share > 0 for share in shares(whole).values())
    again, args = make(calibrated=False), arguments(tmp_path / "b", **kwargs)
    trainer = transformers.Trainer(make(), args, train_dataset=EXAMPLES, callbacks=[callback(), Killed()])
    trainer.optimizer = huggingface.optimizer(trainer.model, args, step_lr=1e-4)
    trainer.train()
    resumed = callback()
    train(again, args, callback=resumed, resume_from_checkpoint=True)
    assert shares(resumed) == shares(whole)
    elsewhere = callback()
    checkpoint = str(tmp_path / "b/checkpoint-10")
    args = arguments(tmp_path / "c", **kwargs)
    train(make(calibrated=False), args, callback=elsewhere, resume_from_checkpoint=checkpoint)
    assert shares(elsewhere) == {}


def test_steps_without_gradient_are_not_decayed(tmp_path):
    """Learning rate and decay are on, every gradient of a step is 0: the steps stay what they are, bit for bit."""
    model = make()
    for _, q in quantizers(model):
        q.step.register_hook(torch.zeros_like)
    before = steps(model)
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    train(model, arguments(tmp_path, weight_decay=0.5))
    assert equal(before, steps(model))
    assert not torch.equal(weight, model.transformer.h[0].mlp.c_fc.weight)


def own_optimizer(model, args):
    """What Trainer makes when it is given none."""
    trainer = transformers.Trainer(model, args, train_dataset=EXAMPLES)
    return trainer.create_optimizer()


def test_the_default_optimizer_decays_steps_and_the_callback_says_so(tmp_path):
    args = arguments(tmp_path, weight_decay=0.5, max_steps=1)
    model = make()
    for _, q in quantizers(model):
        q.step.register_hook(torch.zeros_like)
    before = steps(model)
    with pytest.raises(
        UsageError, match=r"_quantizer\.step: weight decay 0\.5 pulls it to 0 \[step_decayed\]\n.*param_gr"
    ):
        train(model, args, own_optimizer(model, args))
    assert equal(before, steps(model))
    # without the callback it is so: each step is pulled to 0
    train(model, args, own_optimizer(model, args), huggingface.QuantizerCallback(problems="ignore"))
    assert all(bool((after < before[name]).all()) for name, after in steps(model).items())
    with pytest.warns(UserWarning, match="step_decayed"):
        train(model, args, own_optimizer(model, args), huggingface.QuantizerCallback(problems="warn"))


def test_an_optimizer_that_misses_steps_is_refused(tmp_path):
    args, model = arguments(tmp_path), make()
    some = torch.optim.SGD([p for n, p in model.named_parameters() if not n.endswith(".step")], lr=0.1)
    with pytest.raises(UsageError, match="step_missing"):
        train(model, args, some)
    with pytest.raises(UsageError, match="step_unset"):
        train(make(calibrated=False), args)


def test_what_may_be_meant_is_a_warning(tmp_path):
    """Frozen steps are reported, not refused; the default optimizer without decay is no problem at all."""
    args, model = arguments(tmp_path, max_steps=1), make()
    train(model, args, own_optimizer(model, args))
    model.lm_head.input_quantizer.step.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"lm_head\.input_quantizer\.step.*\[step_frozen\]"):
        train(model, args)


@pytest.mark.parametrize("kwargs", [{"every": 0}, {"every": 2.0}, {"problems": "shout"}])
def test_arguments_of_the_callback(kwargs):
    with pytest.raises(UsageError, match=f"QuantizerCallback: {next(iter(kwargs))}="):
        huggingface.QuantizerCallback(**kwargs)


def test_the_optimizer_is_the_one_the_arguments_ask_for(tmp_path):
    model = make()
    made = huggingface.optimizer(model, arguments(tmp_path, adam_beta1=0.8, weight_decay=0.1), step_lr=1e-5)
    assert type(made) is torch.optim.AdamW
    assert {g["name"]: (g["lr"], g["weight_decay"], g["betas"]) for g in made.param_groups} == {
        "weights": (1e-3, 0.1, (0.8, 0.999)),
        "no_decay": (1e-3, 0.0, (0.8, 0.999)),
        "steps": (1e-5, 0.0, (0.8, 0.999)),
    }
    assert type(huggingface.optimizer(model, arguments(tmp_path, optim="sgd"))) is torch.optim.SGD
    assert sum(len(g["params"]) for g in made.param_groups) == len(list(model.parameters()))


def test_an_optimizer_that_takes_no_groups_is_refused(tmp_path, monkeypatch):
    options = {"lr": 0.1, "params": []}
    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (torch.optim.SGD, options))
    with pytest.raises(UsageError, match=r"optim='adamw_torch\w*' chooses its parameters itself"):
        huggingface.optimizer(make(), arguments(tmp_path))


def test_trainer_resumes_without_calibration_to_the_same_bits(tmp_path):
    whole = make()
    train(whole, arguments(tmp_path / "a", save_strategy="steps", save_steps=2, weight_decay=0.1))
    again = make(calibrated=False)
    train(again, arguments(tmp_path / "b", weight_decay=0.1), resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert equal(dict(whole.state_dict()), dict(again.state_dict()))
    assert again.lm_head.weight_quantizer is again.transformer.wte.weight_quantizer
    assert torch.equal(whole.eval()(**BATCH).logits, again.eval()(**BATCH).logits)


@pytest.mark.slow
def test_trainer_with_bf16_accumulation_and_activation_checkpointing(tmp_path):
    model = make()
    before = steps(model)
    args = arguments(
        tmp_path, bf16=True, gradient_accumulation_steps=2, activation_checkpointing=True, per_device_train_batch_size=4
    )
    train(model, args)
    assert all(q.step.dtype == torch.float32 for _, q in quantizers(model))
    assert all(not torch.equal(before[name], after) for name, after in steps(model).items())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_and_resumes(tmp_path, precision):
    def start(calibrated):
        accelerate.state.AcceleratorState._reset_state(True)  # another test may have chosen another precision
        model = make(calibrated)
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.AdamW(lsquant.param_groups(model, lr=1e-3, weight_decay=0.5, step_lr=1e-5))
        return accelerator, *accelerator.prepare(model, optimizer)

    def go(accelerator, model, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            accelerator.backward(model(**BATCH, labels=BATCH["input_ids"]).loss)
            optimizer.step()

    accelerator, model, optimizer = start(True)
    before = steps(model)
    go(accelerator, model, optimizer, 2)
    assert not [f for f in lsquant.check(model, optimizer) if f.severity != "note"]
    accelerator.save_state(str(tmp_path / "state"))
    go(accelerator, model, optimizer, 2)
    assert all(not torch.equal(before[name], after) for name, after in steps(model).items())

    accelerator, again, optimizer = start(False)
    accelerator.load_state(str(tmp_path / "state"))
    go(accelerator, again, optimizer, 2)
    assert equal(dict(model.state_dict()), dict(again.state_dict()))


# ---- transition rates ----


def controlled(folder, **kwargs):
    """A training of 8 steps with TransitionCallback."""
    model = make(preset="w2a8")
    args = arguments(folder, max_steps=8, learning_rate=0.01, **kwargs)
    optimizer = huggingface.optimizer(model, args, relative_step_lr=0.01, low_bit=True)
    callback = huggingface.TransitionCallback(0.05, every=2, gain=0.05, smoothing=0.5)
    return model, args, optimizer, callback


def test_transition_rates_of_trainer(tmp_path):
    model, args, optimizer, callback = controlled(tmp_path)
    logged: list[dict] = []
    callback.report = logged.append
    used: list[float] = []

    def look(optimizer, *_):  # before TransitionRate's own hook
        used.extend(group["lr"] for group in optimizer.param_groups if group["name"] == "low_bit")

    optimizer.register_step_post_hook(look)
    train(model, args, optimizer, callback)
    control = callback.control
    assert (control.done, control.steps, control.target) == (8, 8, 0.0)
    assert len(logged) == 4
    assert logged[3]["transition_lr"] == control.lr
    assert [row["transition_target"] for row in logged[:3]] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * t / 8)) / 2 for t in (2, 4, 6)]
    )
    assert all(row["transition_rate"] > 0 for row in logged)
    assert used == [0.01, *(lr for *_, lr in control.trace[:-1])]  # not the schedule's, which falls to 0


def test_transition_rates_go_on_where_trainer_resumes(tmp_path):
    whole, args, optimizer, callback = controlled(tmp_path / "whole", save_strategy="steps", save_steps=3)
    train(whole, args, optimizer, callback)
    again, args, optimizer, resumed = controlled(tmp_path / "whole")
    train(again, args, optimizer, resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.control.state_dict() == callback.control.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    (tmp_path / "whole" / "checkpoint-3" / "transition.safetensors").unlink()
    again, args, optimizer, resumed = controlled(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"transition.safetensors does not exist.*step 3"):
        train(again, args, optimizer, resumed, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
