"""Oscillation against a history of codes kept apart, its state, the callbacks' and TensorBoard's copies of the log."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
import oracle
from lsquant import QuantSpec, Recipe
from lsquant._util.errors import UsageError
from lsquant.nn import quantizers
from lsquant.training import Log, Oscillation, fit, load_state, param_groups
from lsquant.training import oscillation as module
from lsquant.training.log import flat

SPECS = {
    "tensor": QuantSpec(2),
    "channel": QuantSpec(3, granularity="channel"),
    "group": QuantSpec(4, granularity="group", group_size=4),
}


def small(spec: QuantSpec = SPECS["tensor"], layer: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(layer or nn.Linear(8, 8), nn.Flatten(), nn.ReLU(), nn.LazyLinear(3))
    model(torch.zeros(1, 8) if layer is None else torch.zeros(1, 4, 5, 5))
    lsquant.prepare(model, Recipe(spec, None))
    for _, q in quantizers(model):
        if not q.is_initialized:
            q.initialize(torch.randn(64))
    return model


def shares_of(history: list[np.ndarray]) -> float:
    """Of the codes at the last WINDOW + 1 looks: the share that both rose and fell."""
    moves = np.diff(np.stack(history[-module.WINDOW - 1 :]), axis=0)
    return float(((moves > 0).any(0) & (moves < 0).any(0)).mean())


@pytest.mark.parametrize(
    ("kind", "conv"), [("tensor", False), ("channel", False), ("group", False), ("tensor", True), ("channel", True)]
)
def test_shares_are_those_of_the_codes_history(kind, conv, seed):
    """Weights and steps walk at random; at every look codes are those of the oracle, element by element."""
    model = small(SPECS[kind], {"tensor": nn.Conv2d, "channel": nn.ConvTranspose2d}[kind](4, 6, 3) if conv else None)
    q, rows = model[0].weight_quantizer, model[0].rows
    watch, history = Oscillation(model, 3), []
    layout = {"axis": q.axis, "group_size": q.spec.group_size}
    for step in range(3 * 40):
        with torch.no_grad():
            model[0].weight += 0.15 * q.step.mean() * torch.randn_like(model[0].weight)
            q.step *= 1 + 0.01 * torch.randn_like(q.step)
        watch.look()
        if step % 3 == 2:
            s = q.step.detach().numpy()
            history.append(oracle.codes(rows().detach().numpy(), s, q.q_min, q.q_max, **layout).astype(int))
        found = watch.shares()
        if len(history) <= module.WINDOW:
            assert found == {}
        else:
            assert found["0.weight_quantizer"] == pytest.approx(shares_of(history), abs=1e-12)
    assert 0.02 < found["0.weight_quantizer"] < 0.98


def test_what_goes_one_way_or_rests_does_not_oscillate():
    model = small()
    q, weight = model[0].weight_quantizer, model[0].weight
    watch = Oscillation(model, 1)
    with torch.no_grad():
        weight.zero_()
        for step in range(2 * module.WINDOW):
            weight[0] = q.step * (1.0 if step >= 20 else 0.0)  # up, once
            weight[1] = q.step * (step % 2)  # up and down
            weight[2] = q.step * (1.0 if step == 3 else 0.0)  # up and down, long ago
            watch.look()
    assert watch.shares()["0.weight_quantizer"] == 1 / 8


def test_a_sample_stands_for_a_large_weight():
    model = small(layer=nn.Conv2d(4, 3000, 3))
    q, weight = model[0].weight_quantizer, model[0].weight
    watch = Oscillation(model, 1)
    with torch.no_grad():
        weight.zero_()
        for step in range(module.WINDOW + 1):
            weight[:, 1] = q.step * (step % 2)
            weight[:300] = 0.0
            watch.look()
    assert watch.seen["0.weight_quantizer"].shape == (3, module.SAMPLE)
    assert watch.shares()["0.weight_quantizer"] == pytest.approx(0.225, abs=0.01)


def batches(epoch: int):
    torch.manual_seed(epoch)
    return [(torch.randn(8, 8), torch.randint(0, 3, (8,))) for _ in range(5)]


class Stop(BaseException):
    pass


def trained(folder, stop: int | None = None, epochs: int = 8, **options):
    model = small()
    optimizer = torch.optim.SGD(param_groups(model, 0.03), momentum=0.9)

    def after_step(iteration: int) -> None:
        if iteration == stop:
            raise Stop

    fit(
        model, batches, optimizer, epochs=epochs, steps_per_epoch=5, log=options.pop("log", folder / "log.jsonl"),
        checkpoint=folder / "c.safetensors", checkpoint_every=2, resume=True, quiet=True, after_step=after_step,
        oscillation_every=options.pop("every", 2), **options,
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_fit_writes_it_and_goes_on_with_it(tmp_path):
    whole, cut = tmp_path / "a", tmp_path / "b"
    whole.mkdir()
    cut.mkdir()
    rows = trained(whole)
    shares = [row["quantizers"]["0.weight_quantizer"].get("oscillation") for row in rows]
    assert shares[:6] == [None] * 6  # 17 looks, every second of 5 iterations an epoch
    assert all(0 < share < 1 for share in shares[6:])
    with pytest.raises(Stop):
        trained(cut, stop=37)  # a checkpoint lies within the last epoch but one and the next
    again = trained(cut)
    assert [row["quantizers"] for row in again] == [row["quantizers"] for row in rows]
    states = [load_state(folder / "c.safetensors")["oscillation"] for folder in (whole, cut)]
    assert states[0]["steps"] == states[1]["steps"] == 40
    assert states[0]["seen"].keys() == {"0.weight_quantizer", "3.weight_quantizer"}
    assert all(torch.equal(states[0]["seen"][name], states[1]["seen"][name]) for name in states[0]["seen"])


def test_looking_changes_no_bit(tmp_path):
    """The run looked at in every step, and the one never looked at."""
    for name, every in (("a", 1), ("b", 1000)):
        (tmp_path / name).mkdir()
        trained(tmp_path / name, every=every)
    one, other = (load_state(tmp_path / name / "c.safetensors") for name in ("a", "b"))
    assert all(torch.equal(one["model"]["state"][key], value) for key, value in other["model"]["state"].items())
    assert torch.equal(one["rng"]["torch"], other["rng"]["torch"])


def test_a_state_of_something_else_begins_anew():
    watch = Oscillation(small(), 2)
    for _ in range(4):
        watch.look()
    state = watch.state_dict()
    for other in (Oscillation(small(), 3), Oscillation(nn.Sequential(nn.Linear(2, 2)), 2)):
        other.load_state_dict(state)
        assert (other.steps, other.seen) == (0, {})
    with pytest.raises(UsageError, match="every=0"):
        Oscillation(nn.Linear(2, 2), 0)


# ---- TensorBoard ----


def scalars(folder) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What TensorBoard itself reads: by phase and tag, (iteration, value)."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = {}
    for phase in sorted(folder.iterdir()):
        events = reader.EventAccumulator(str(phase), size_guidance={"scalars": 0}).Reload()
        tags = events.Tags()["scalars"]
        found[phase.name] = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    return found


def test_tensorboard_has_the_numbers_of_the_log(tmp_path):
    """Of a run that was killed and resumed, in two phases: each number once, none from after the checkpoint."""
    pytest.importorskip("tensorboard")

    def log() -> Log:
        return Log(tmp_path / "log.jsonl", tmp_path / "board")

    with pytest.raises(Stop):
        trained(tmp_path, stop=12, log=log(), label="first")
    with open(tmp_path / "log.jsonl", "ab") as file:  # a row whose checkpoint was never written
        file.write(
            (tmp_path / "log.jsonl").read_bytes().splitlines()[-1].replace(b'"iteration": 10', b'"iteration": 15')
        )
    trained(tmp_path, log=log(), label="first")
    (tmp_path / "c.safetensors").unlink()
    rows = trained(tmp_path, epochs=1, log=log(), label="second")
    assert len(rows) == 9
    want: dict = {"first": {}, "second": {}}
    for row in rows:
        values = {
            k: row[k] for k in ("loss", "train_accuracy", "lr", "step_lr", "epoch", "seconds", "samples_per_second")
        }
        values |= {f"quantizers/{n}/{k}": v for n, some in row["quantizers"].items() for k, v in some.items()}
        for tag, value in ((t, v) for t, v in values.items() if v is not None):
            want[row["phase"]].setdefault(tag, []).append((row["iteration"], pytest.approx(value, rel=1e-6)))
    assert scalars(tmp_path / "board") == want
    assert flat({"phase": "p", "iteration": 3, "loss": None, "lr": 1}) == {"lr": 1.0}
