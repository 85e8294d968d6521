"""What test_integrations_ddp.py starts in two processes: ``torchrun ddp_worker.py CASE FOLDER``.

Each process writes what it found to FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import lsquant
from lsquant import Recipe, Rule
from lsquant._util.errors import UsageError
from lsquant.integrations.distributed import synchronize
from lsquant.nn import quantizers
from lsquant.training import TransitionRate

UPDATES, BATCH = 4, 16


class Net(nn.Module):
    """No BatchNorm: with it the statistics of half a batch would not be those of a whole one, quantized or not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3)
        self.body = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU())
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(self.stem(x).flatten(1)))


def make() -> nn.Module:
    torch.manual_seed(3)
    model = Net()
    rules = [Rule("body.0", weight=lsquant.QuantSpec(4, granularity="channel"))]
    lsquant.prepare(model, Recipe.preset("w4a4", rules=rules))
    return model


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    count = UPDATES * BATCH
    return torch.randn(count, 2, 4, 4, generator=generator), torch.randint(3, (count,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(lsquant.param_groups(model, lr=0.2, weight_decay=1e-3), momentum=0.9)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers, those that are not saved too."""
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def mirrors(model: nn.Module) -> dict[str, Any]:
    """What each quantizer holds in Python."""
    return {
        name: (q.q_min, q.q_max, q.elements_per_step, q.gradient_scale, q.is_initialized)
        for name, q in quantizers(model)
    }


def refusal(function: Any, *args: Any) -> str:
    try:
        function(*args)
    except UsageError as error:
        return str(error)
    return ""


def training(rank: int) -> dict[str, Any]:
    x, y = data()
    # only process 0 calibrates, and process 1 has steps of its own where it could set them: the worst start
    model = make()
    if rank == 0:
        lsquant.calibrate(model, [x])
    else:
        model.head.weight_quantizer.step.data.mul_(3.0)
    synchronize(model)
    found: dict[str, Any] = {"start": state(model), "start mirrors": mirrors(model)}
    wrapped = DistributedDataParallel(model)
    found["wrapped"] = state(model)
    found["prepare"] = refusal(lsquant.prepare, wrapped, Recipe.preset("w2a2"))
    found["calibrate"] = refusal(lsquant.calibrate, wrapped, [x])
    optimizer = optimizer_of(model)
    found["check"] = [f.code for f in lsquant.check(wrapped, optimizer) if f.severity == "error"]
    half = BATCH // 2
    for at in range(0, UPDATES * BATCH, BATCH):
        mine = slice(at + rank * half, at + (rank + 1) * half)
        update(wrapped, optimizer, x[mine], y[mine])
    found |= {"end": state(model), "end mirrors": mirrors(model)}

    # two forward passes before one backward pass: DDP writes to the buffers in between
    optimizer.zero_grad()
    (F.cross_entropy(wrapped(x[:4]), y[:4]) + F.cross_entropy(wrapped(x[4:8]), y[4:8])).backward()
    found["twice"] = all(p.grad is not None for p in model.parameters())

    with torch.no_grad():  # a step below the guard, which a buffer counts that is in no state dict
        model.body[2].weight_quantizer.step.mul_(2.0**-12)
    wrapped(x[:4]).sum().backward()
    found["guarded"] = {name: int(q.guarded) for name, q in quantizers(model)}
    return found


def signs(rank: int) -> dict[str, Any]:
    """Each process calibrates on its own batches, and they disagree on the sign."""
    x, _ = data()
    found: dict[str, Any] = {}
    model = make()
    lsquant.calibrate(model, [x.abs() if rank == 0 else x])
    found["alone"] = mirrors(model)
    synchronize(model)
    found |= {"state": state(model), "mirrors": mirrors(model), "output": model(x).detach()}
    return found


def transitions(rank: int) -> dict[str, Any]:
    """Weights whose learning rate follows their transitions, on half a batch each."""
    x, y = data()
    model = make()
    lsquant.calibrate(model, [x])
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(lsquant.param_groups(model, lr=0.2, low_bit=True), momentum=0.9)
    control = TransitionRate(wrapped, optimizer, 0.05, steps=UPDATES, gain=2.0, smoothing=0.5)
    half = BATCH // 2
    for at in range(0, UPDATES * BATCH, BATCH):
        mine = slice(at + rank * half, at + (rank + 1) * half)
        update(wrapped, optimizer, x[mine], y[mine])
    return {"end": state(model), "control": control.state_dict()}


def trainer(rank: int) -> dict[str, Any]:
    """Hugging Face Trainer over two processes, which calibrated on different batches."""
    import transformers

    from lsquant.integrations import huggingface

    torch.manual_seed(5)
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0)
    model = transformers.GPT2LMHeadModel(config)
    examples = [{"input_ids": (torch.arange(6) * 3 + 5 * i) % 20} for i in range(16)]
    examples = [{**e, "labels": e["input_ids"]} for e in examples]
    batch = {"input_ids": torch.stack([e["input_ids"] for e in examples[rank::2]])}
    lsquant.prepare(model, Recipe.preset("w4a4"), example_inputs=batch)
    if rank == 0:
        lsquant.calibrate(model, [batch])
    args = transformers.TrainingArguments(
        "unused", max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_strategy="no", learning_rate=1e-3, weight_decay=0.1, ddp_backend="gloo",
    )  # fmt: skip
    before = {name: q.step.detach().clone() for name, q in quantizers(model)}
    callback = huggingface.QuantizerCallback(every=1)
    transformers.Trainer(
        model, args, train_dataset=examples, callbacks=[callback],
        optimizers=(huggingface.optimizer(model, args, step_lr=1e-4), None),
    ).train()  # fmt: skip
    moved = all(not torch.equal(before[name], q.step.detach()) for name, q in quantizers(model))
    return {"end": state(model), "end mirrors": mirrors(model), "moved": moved, "rows": callback.last.get("iteration")}


def lightning(rank: int) -> dict[str, Any]:
    """Lightning over two processes, of which one calibrated."""
    import lightning.pytorch as pl

    from lsquant.integrations.lightning import QuantizerCallback

    class Module(pl.LightningModule):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch, index):
            return F.cross_entropy(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return optimizer_of(self.network)

    x, y = data()
    model = make()
    if rank == 0:
        lsquant.calibrate(model, [x])
    before = {name: q.step.detach().clone() for name, q in quantizers(model)}
    callback = QuantizerCallback(every=1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    ).fit(Module(model), loader)  # fmt: skip
    moved = all(not torch.equal(before[name], q.step.detach()) for name, q in quantizers(model))
    return {"end": state(model), "end mirrors": mirrors(model), "moved": moved, "rows": callback.last.get("iteration")}


if __name__ == "__main__":
    cases, folder = sys.argv[1].split(","), Path(sys.argv[2])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    number = distributed.get_rank()
    torch.save({case: globals()[case](number) for case in cases}, folder / f"{number}.pt")
    if distributed.is_initialized():
        distributed.destroy_process_group()
