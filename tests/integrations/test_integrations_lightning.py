"""Lightning with lsquant's groups and callback."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lsquant
from lsquant import Recipe
from lsquant._util.errors import UsageError
from lsquant.nn import quantizers

pl = pytest.importorskip("lightning.pytorch")

from lsquant.integrations.lightning import QuantizerCallback, TransitionCallback  # noqa: E402  (needs lightning)

pytestmark = [
    # advice on speed, which is Lightning's own affair
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    # Lightning still says LeafSpec where torch wants another name
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

SAMPLES = [(torch.sin(torch.arange(12.0) * (i + 1)), i % 3) for i in range(32)]


def loader():
    return torch.utils.data.DataLoader(SAMPLES, batch_size=8)


class Classifier(pl.LightningModule):
    def __init__(self, calibrated: bool = True, kind=torch.optim.AdamW, groups: bool = True) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.network = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
        self.kind, self.groups = kind, groups
        lsquant.prepare(self.network, Recipe.preset("w4a4"))
        if calibrated:
            lsquant.calibrate(self.network, loader())

    def training_step(self, batch, index):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        if not self.groups:
            return self.kind(self.parameters(), lr=1e-3, weight_decay=0.5)
        return self.kind(lsquant.param_groups(self.network, lr=1e-3, weight_decay=0.5))


def trainer(folder, *callbacks, **kwargs):
    usual = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    usual |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(folder)}
    return pl.Trainer(**usual | kwargs, callbacks=list(callbacks) or [QuantizerCallback()])


def steps(model) -> dict[str, torch.Tensor]:
    return {name: q.step.detach().clone() for name, q in quantizers(model)}


class Recorder(pl.loggers.logger.DummyLogger):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[dict, int]] = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((dict(metrics), step))


def test_steps_learn_and_facts_are_written(tmp_path):
    model, recorder, log = Classifier(), Recorder(), tmp_path / "quantizers.jsonl"
    before, callback = steps(model), QuantizerCallback(every=3, log=log)
    trainer(tmp_path, callback, logger=recorder).fit(model, loader())
    assert all(not torch.equal(before[name], after) for name, after in steps(model).items())
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [3, 6]
    assert callback.last == rows[-1]
    facts = rows[-1]["quantizers"]["network.2.input_quantizer"]
    assert facts["R"] > 0
    ours = [(m, at) for m, at in recorder.seen if "quantizers/network.2.input_quantizer/R" in m]
    assert [at for _, at in ours] == [2, 5]
    assert ours[-1][0]["quantizers/network.2.input_quantizer/step"] == facts["step"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_oscillation_is_collected_and_goes_on_in_a_resumed_run(tmp_path):
    """10 epochs of 4 steps; 17 looks, one every second step, are there after the ninth epoch."""

    def run(name, epochs, **kwargs):
        keep = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / name, save_top_k=-1, filename="{epoch}")
        callback = QuantizerCallback(every=4, log=tmp_path / f"{name}.jsonl", oscillation_every=2)
        trainer(tmp_path, callback, keep, enable_checkpointing=True, max_epochs=epochs).fit(
            Classifier(kind=torch.optim.SGD), loader(), **kwargs
        )
        lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        return [json.loads(line)["quantizers"] for line in lines], callback.watch.oscillation

    whole, seen = run("a", 10)
    assert ["oscillation" in row["network.2.weight_quantizer"] for row in whole] == [False] * 8 + [True] * 2
    assert not any("oscillation" in row["network.2.input_quantizer"] for row in whole)
    again, seen_again = run("b", 10, ckpt_path=str(tmp_path / "a" / "epoch=4.ckpt"), weights_only=True)
    assert again == whole[5:]
    assert all(torch.equal(seen.seen[name], seen_again.seen[name]) for name in seen.seen)


def test_steps_without_gradient_are_not_decayed(tmp_path):
    model = Classifier()
    for _, q in quantizers(model):
        q.step.register_hook(torch.zeros_like)
    before, weight = steps(model), model.network[2].weight.detach().clone()
    trainer(tmp_path).fit(model, loader())
    assert all(torch.equal(before[name], after) for name, after in steps(model).items())
    assert not torch.equal(weight, model.network[2].weight)


def test_a_decaying_optimizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match="step_decayed"):
        trainer(tmp_path).fit(Classifier(groups=False), loader())
    with pytest.raises(UsageError, match="step_unset"):
        trainer(tmp_path).fit(Classifier(calibrated=False), loader())
    with pytest.warns(UserWarning, match="step_decayed"):
        trainer(tmp_path, QuantizerCallback(problems="warn")).fit(Classifier(groups=False), loader())


# the resumed run writes to a folder of its own, on purpose
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumes_without_calibration_to_the_same_bits(tmp_path):
    def run(model, name, **kwargs):
        keep = pl.callbacks.ModelCheckpoint(dirpath=tmp_path / name, save_top_k=-1, filename="{epoch}")
        trainer(tmp_path, QuantizerCallback(), keep, enable_checkpointing=True).fit(model, loader(), **kwargs)

    whole, again = Classifier(), Classifier(calibrated=False)
    run(whole, "a")
    run(again, "b", ckpt_path=str(tmp_path / "a" / "epoch=0.ckpt"), weights_only=True)
    a, b = whole.state_dict(), again.state_dict()
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_keeps_float32_steps(tmp_path, precision):
    model = Classifier()
    before = steps(model)
    trainer(tmp_path, precision=precision, accumulate_grad_batches=2).fit(model, loader())
    assert all(q.step.dtype == torch.float32 for _, q in quantizers(model))
    assert all(not torch.equal(before[name], after) for name, after in steps(model).items())


# ---- transition rates ----


def strip(checkpoint, folder):
    """The checkpoint without the state of any callback."""
    content = torch.load(checkpoint, weights_only=False)
    content["callbacks"] = {}
    torch.save(content, folder / "stripped.ckpt")
    return folder / "stripped.ckpt"


def test_a_callback_that_trains_again_begins_anew(tmp_path):
    """Also after a training that was resumed, whose state Lightning gives to the callback before it begins."""
    callback = TransitionCallback(0.05)
    trainer(tmp_path, callback, max_epochs=1).fit(Controlled(), loader())
    assert callback.control.done == callback.control.steps == 4
    callback.load_state_dict({**callback.state_dict(), "done": 0})
    for rows in (8, 4):  # of the state and of this training; of this one alone
        trainer(tmp_path, callback, max_epochs=1).fit(Controlled(), loader())
        assert (callback.control.done, len(callback.control.trace)) == (4, rows)


def test_manual_optimization_needs_steps(tmp_path):
    module = Controlled()
    module.automatic_optimization = False
    with pytest.raises(UsageError, match="manual optimization give steps="):
        trainer(tmp_path, TransitionCallback(0.05), max_epochs=1).fit(module, loader())


class Controlled(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(lsquant.param_groups(self.network, lr=0.1, low_bit=True), momentum=0.9)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_transition_rates_are_scheduled_and_go_on_in_a_resumed_run(tmp_path):
    def run(path=None):
        callback, module = TransitionCallback(0.05, gain=1.0, smoothing=0.5), Controlled()
        keep = pl.callbacks.ModelCheckpoint(tmp_path / "whole", save_top_k=-1, every_n_epochs=1)
        done = trainer(tmp_path, callback, keep, enable_checkpointing=True, max_epochs=4)
        done.fit(module, loader(), ckpt_path=path, weights_only=False)
        return module, callback

    whole, callback = run()
    control = callback.control
    assert (control.done, control.steps, control.target) == (16, 16, 0.0)
    assert sum(rate > 0 for _, rate, _, _ in control.trace) > 8
    (second,) = (tmp_path / "whole").glob("*step=8.ckpt")
    again, resumed = run(second)
    with pytest.raises(UsageError, match=r"no state of this callback.*at step 8"):
        trainer(tmp_path, TransitionCallback(0.05), max_epochs=4).fit(
            Controlled(), loader(), ckpt_path=strip(second, tmp_path), weights_only=False
        )
    assert resumed.control.state_dict() == control.state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
