"""Options of a low-bit run, each seen in what the run trains, logs or writes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import lsquant
from helpers.logs import untimed
from helpers.small_digits import RECIPE, SmallDigits, float_files, model_file, network, rounded, small, stopped, task
from lsquant._util.errors import UsageError
from lsquant.cli import main, training
from lsquant.cli.reporting import train_command
from lsquant.runs.directory import start_run
from lsquant.tasks import Run, Settings, open_run, resume_training, run_training
from lsquant.training import load_state

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    return float_files(tmp_path_factory.mktemp("float"))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every call of `fit` was given, with the bits of the quantizers; the calls go through."""
    calls: list[dict[str, Any]] = []
    fit = lsquant.runs.training.fit

    def watched(model: nn.Module, batches: Any, optimizer: Any, **options: Any) -> Any:
        bits = {name: q.spec.bits for name, q in lsquant.quantizers(model)}
        calls.append({"bits": bits, "groups": [dict(g) for g in optimizer.param_groups], **options})
        return fit(model, batches, optimizer, **options)

    monkeypatch.setattr(lsquant.runs.training, "fit", watched)
    return calls


# ---- optimizers and transition rates ----


def test_optimizers_of_the_low_bit_phases(files, tmp_path, fits, monkeypatch):
    """Adam's classes, groups and rates; in the float phase SGD all the same."""
    made: list[torch.optim.Optimizer] = []
    init = torch.optim.Optimizer.__init__

    def watched(self: Any, *args: Any, **options: Any) -> None:
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(torch.optim.Optimizer, "__init__", watched)
    for kind, cls in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        run = replace(small(tmp_path / kind, files, optimizer=kind, lr=0.004, float_epochs=1), init=None)
        made.clear()
        run_training(run, quiet=True)
        assert [type(one) for one in made] == [torch.optim.SGD, cls]
    sgd, adam = fits[1]["groups"], fits[3]["groups"]
    assert [group["name"] for group in sgd] == ["weights", "no_decay", "steps"]
    rates = {group["name"]: group["lr"] for group in adam if group["name"].startswith("steps/")}
    model = run.model()
    first = {f"steps/{name}": float(q.initial_step) for name, q in lsquant.quantizers(model)}
    assert rates == {name: pytest.approx(0.012 * s0) for name, s0 in first.items()}
    given = small(tmp_path / "given", files, optimizer="adamw", lr=0.004, step_lr=0.001)
    run_training(given, quiet=True)
    assert {g["name"]: g["lr"] for g in fits[-1]["groups"]}["steps"] == 0.001


def test_transition_rates_of_a_run(files, tmp_path, fits):
    run = small(tmp_path / "a", files, epochs=3, transition_rate=0.05, progressive=(8,), optimizer="adam", lr=0.002)
    run_training(run, quiet=True)
    assert [call["transition"] is not None for call in fits] == [False, True]
    control, names = fits[1]["transition"], [group["name"] for group in fits[1]["groups"]]
    assert "low_bit" in names
    assert "low_bit" not in [group["name"] for group in fits[0]["groups"]]
    assert control.steps == 2 * task().steps_per_epoch(200) == control.done
    rows = untimed(run.file("log.jsonl"))
    assert ["transition_rate" in row for row in rows] == [False, True, True]
    assert (rows[-1]["transition_rate"], rows[-1]["transition_target"]) == (control.rate, 0.0)
    assert open_run(run.path).settings == run.settings
    wide = replace(run, path=tmp_path / "b", recipe=lsquant.Recipe.preset("w8a8"))
    with pytest.raises(UsageError, match="no quantizer of weights below 8 bits"):
        run_training(replace(wide, settings=replace(run.settings, progressive=())), quiet=True)
    assert not wide.path.exists()


def test_adam_brings_its_learning_rate_on_the_command_line(tmp_path, monkeypatch):
    seen: list[Settings] = []

    def stop(run: Run, **_: Any) -> None:
        seen.append(run.settings)
        raise UsageError("enough")

    monkeypatch.setattr(training, "run_training", stop)
    for words in ("", "--optimizer adam", "--optimizer adamw --lr 0.5", "--optimizer sgd"):
        main(["train", "digits", "--bits", "2", "--out", str(tmp_path / "x"), *words.split()])
    assert [(s.optimizer, s.lr) for s in seen] == [("sgd", 0.03), ("adam", 0.001), ("adamw", 0.5), ("sgd", 0.03)]


# ---- progressive bits ----


def test_progressive_bits(files, tmp_path, fits):
    run = small(tmp_path / "a", files, epochs=5, progressive=(8, 4), progressive_epochs=2, weight_decay_by_bits=True)
    run_training(run, quiet=True)
    assert [(call["label"], call["epochs"]) for call in fits] == [("lsq-8", 2), ("lsq-4", 2), ("lsq", 1)]
    for call, bits in zip(fits, (8, 4, 2), strict=True):
        layers = {name.split(".")[0]: n for name, n in call["bits"].items()}
        assert layers == {"stem": 8, "conv1": bits, "conv2": bits, "conv3": bits, "head": 8}
        assert ("weights/2bit" in [group["name"] for group in call["groups"]]) == (bits == 2)
    rows = untimed(run.file("log.jsonl"))
    assert [row["phase"] for row in rows] == ["lsq-8", "lsq-8", "lsq-4", "lsq-4", "lsq"]
    # the 4-bit stage goes on with the weights of the 8-bit stage, the 2-bit stage with those of the 4-bit stage
    moved = [load_state(run.file(f"last/{name}.safetensors"))["model"]["state"] for name in ("lsq-8", "lsq-4", "lsq")]
    start = load_file(files[4])
    distances = [float((state["conv1.weight"] - start["conv1.weight"]).norm()) for state in moved]
    assert 0 < distances[0] < distances[1] < distances[2]
    assert {call["bits"]["conv1.weight_quantizer"] for call in fits} == {8, 4, 2}
    assert open_run(run.path).settings == run.settings


def test_progressive_bits_that_make_no_sense(files, tmp_path):
    with pytest.raises(UsageError, match="no quantizer below 2 bits"):
        run_training(small(tmp_path / "a", files, epochs=4, progressive=(4, 2)), quiet=True)
    for settings, says in (
        ({"progressive": (4, 8)}, "from 8 to 2, each fewer"),
        ({"progressive": (9,)}, "from 8 to 2"),
        ({"progressive": (8, 4), "epochs": 2}, "leave none of epochs=2"),
        ({"ema": 1.0}, "ema=1.0"),
        ({"bn_batches": -1}, "bn_batches=-1"),
        ({"clip_norm": 0.0}, "clip_norm=0.0: it must be a number above 0"),
        ({"distill_temperature": 0.0}, "distill_temperature=0.0"),
        ({"distill_weight": -1.0}, "distill_weight=-1.0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"weight_init": "mae"}, "weight_init='mae': one of paper, mse"),
        ({"activation_init": "lsq"}, "activation_init='lsq'"),
    ):
        with pytest.raises(UsageError, match=says):
            Settings(**settings)
    assert not list(tmp_path.iterdir())


# ---- averages of weights, BatchNorm ----


def test_the_averaged_weights_are_evaluated_and_kept(files, tmp_path):
    run = small(tmp_path / "a", files, epochs=2, ema=0.7, lr=0.1)
    metrics = run_training(run, quiet=True)
    state = load_state(run.file("last/lsq.safetensors"))
    average, kept, raw = state["extras"]["average"]["average"], model_file(run), state["model"]["state"]
    assert state["extras"]["average"]["updates"] == 14
    for name in ("conv1.weight", "conv1.weight_quantizer.step", "bn1.running_mean"):
        assert torch.equal(kept[name], average[name])
        assert not torch.equal(kept[name], raw[name])
    assert torch.equal(kept["bn1.num_batches_tracked"], raw["bn1.num_batches_tracked"])
    row = untimed(run.file("log.jsonl"))[-1]
    assert row["test_loss"] == metrics["lsq"]["test_loss"] == run.task.metric(run.model())["test_loss"]
    model = run.model()
    model.load_state_dict(raw)
    assert metrics["raw"] == run.task.metric(model) != metrics["lsq"]


def test_the_decay_of_the_average_counts(files, tmp_path):
    """A plain loop beside the run's: the average of its weights by hand."""
    run = small(tmp_path / "a", files, ema=0.25, batch_size=1297, epochs=3)
    run_training(run, quiet=True)
    model = rounded(files, 1297).train()
    groups = lsquant.param_groups(model, 0.01, 1e-4)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    mean = model.conv1.weight.detach().clone()
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + torch.cos(torch.tensor(torch.pi * epoch / 3)).item()) / 2
        ((x, y),) = run.task.batches("train", batch_size=1297, epoch=epoch)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        decay = min(0.25, (2 + epoch) / (11 + epoch))
        mean = decay * mean + (1 - decay) * model.conv1.weight.detach()
    assert torch.allclose(model_file(run)["conv1.weight"], mean, rtol=0, atol=1e-6)


def test_batchnorm_is_estimated_anew_at_the_end(files, tmp_path):
    run = small(tmp_path / "a", files, bn_batches=2)
    metrics = run_training(run, quiet=True)
    raw, kept = load_state(run.file("last/lsq.safetensors"))["model"]["state"], model_file(run)
    assert torch.equal(kept["conv1.weight"], raw["conv1.weight"])
    assert kept["stem_bn.num_batches_tracked"] == 2
    model = run.model()
    batches = list(run.task.batches("train", batch_size=200, epoch=1))[:2]
    with torch.no_grad():
        means = [model.stem(x).mean((0, 2, 3)) for x, _ in batches]
    assert torch.allclose(kept["stem_bn.running_mean"], (means[0] + means[1]) / 2, atol=1e-6)
    assert metrics["raw"] != metrics["lsq"] == run.task.metric(model)
    assert metrics["raw"]["accuracy"] == untimed(run.file("log.jsonl"))[-1]["accuracy"]


def test_a_network_without_batchnorm_is_refused_at_the_beginning(tmp_path):
    class Plain(SmallDigits):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 10))

    run = Run(tmp_path / "a", Plain(), lsquant.Recipe(2, 2), replace(SmallDigits.settings, bn_batches=1))
    with pytest.raises(UsageError, match="bn_batches: this network has no BatchNorm"):
        run_training(run, quiet=True)


# ---- initial steps ----


def squared_error(v: torch.Tensor, s: float, low: int, high: int) -> float:
    return float((v.double() - (v / s).round().clamp(low, high).double() * s).square().sum())


def test_rules_of_initial_steps(files, tmp_path):
    weight = network(files).conv2.weight.detach()
    magnitude = float(2 * weight.abs().mean())  # q_max is 1 at 2 bits, signed
    x = next(iter(task().batches("calibration", batch_size=200)))[0]
    for weights, activations in (("paper", "mse"), ("mse", "paper"), ("mse", "mse")):
        how = {"weight_init": weights, "activation_init": activations, "epochs": 0, "batch_size": 200}
        run = small(tmp_path / weights / activations, files, **how)
        run.path.parent.mkdir(exist_ok=True)
        run_training(run, quiet=True)
        found = model_file(run)
        step = float(found["conv2.weight_quantizer.step"])
        if weights == "paper":
            assert step == pytest.approx(magnitude, rel=1e-5)
        else:
            grid = torch.logspace(-4, 0.30103, 2000, dtype=torch.float64) * float(weight.abs().max())
            best = min(squared_error(weight, s, -2, 1) for s in grid.float().tolist())
            assert squared_error(weight, step, -2, 1) <= 1.001 * best < squared_error(weight, magnitude, -2, 1)
        paper = float(2 * x.abs().mean() / 255**0.5)
        assert (float(found["stem.input_quantizer.step"]) == pytest.approx(paper, rel=1e-4)) == (activations == "paper")


# ---- what else decides a run ----


def test_settings_reach_the_loop(files, tmp_path, fits):
    settings = {"warmup": 5, "clip_norm": 0.5, "momentum": 0.8, "weight_decay": 0.02, "step_lr": 0.003}
    run = small(tmp_path / "a", files, **settings)
    run_training(run, quiet=True)
    (call,) = fits
    groups = {group["name"]: group for group in call["groups"]}
    weights = groups["weights"]
    assert (weights["weight_decay"], groups["steps"]["lr"], weights["momentum"]) == (0.02, 0.003, 0.8)
    assert (call["schedule"].warmup, call["clip_norm"]) == (5, 0.5)
    assert untimed(run.file("log.jsonl"))[0]["grad_norm"] > 0


def test_a_row_that_was_written_without_its_checkpoint_is_cut(files, tmp_path):
    """Killed between the first row of a phase and its checkpoint."""
    for name, changes in (("float", {"float_epochs": 1, "epochs": 1}), ("lsq", {"float_epochs": 0, "epochs": 1})):
        run = replace(small(tmp_path / name, files, **changes), init=None)
        start_run(run)
        run.file("log.jsonl").write_text('{"phase": "stray"}\n')
        metrics = resume_training(run.path, quiet=True)
        phases = [row["phase"] for row in untimed(run.file("log.jsonl"))]
        assert phases == ["float"] * changes["float_epochs"] + ["lsq"]
        run.file("metrics.json").unlink()
        assert resume_training(run.path, quiet=True)["lsq"] == metrics["lsq"]
        assert len(untimed(run.file("log.jsonl"))) == len(phases)


def test_runs_of_before_these_settings_still_open(files, tmp_path):
    run = small(tmp_path / "a", files)
    start_run(run)
    text = run.file("config.toml").read_text()
    new = "distill_weight|distill_temperature|progressive|progressive_epochs|bn_batches|weight_init|activation_init"
    old = re.sub(rf"^({new}) = .*\n", "", text, flags=re.MULTILINE)
    assert len(old.splitlines()) == len(text.splitlines()) - 7
    run.file("config.toml").write_text(old)
    assert open_run(run.path).config() == run.config()


def test_what_was_none_stays_none_when_the_default_is_another():
    @dataclass(frozen=True)
    class Later(Settings):
        clip_norm: float | None = 1.0

    assert Later.from_dict({}).clip_norm is None
    assert Later.from_dict({"clip_norm": 2.0}).clip_norm == 2.0


# ---- integer-only ----

JOINED = lsquant.Recipe.preset("w4a8", integer_only=True)


def test_the_last_epochs_train_the_integer_only_form(files, tmp_path, fits):
    options = {"epochs": 4, "fold_epochs": 2, "fold_lr": 0.004, "lr": 0.02, "progressive": (8,), "ema": 0.9}
    run = replace(small(tmp_path / "a", files, **options), recipe=JOINED)
    with pytest.raises(UsageError, match="leave none of epochs=3"):
        replace(run.settings, epochs=3)
    metrics = run_training(run, quiet=True)
    assert [(call["label"], call["epochs"]) for call in fits] == [("lsq-8", 1), ("lsq", 1), ("fold", 2)]
    assert {group["initial_lr"] if "initial_lr" in group else group["lr"] for group in fits[2]["groups"]} == {0.004}
    assert list(metrics)[3:] == ["float", "rounded", "raw", "lsq", "folded", "fused", "seconds"]

    network = run.network()
    assert isinstance(network, lsquant.FusedNetwork)
    assert run.task.metric(network) == metrics["fused"]
    state = load_state(run.file("last/fold.safetensors"))["model"]["state"]
    assert all(torch.equal(state[f"model.{key}"], value) for key, value in run.model().state_dict().items())
    before = load_state(run.file("last/lsq.safetensors"))["extras"]["average"]
    assert before
    rows = untimed(run.file("log.jsonl"))
    assert [row["phase"] for row in rows] == ["lsq-8", "lsq", "fold", "fold"]
    assert rows[1]["quantizers"].keys() == rows[3]["quantizers"].keys()
    assert "add.input_quantizers.0" in rows[3]["quantizers"]
    assert rows[3]["accuracy"] == metrics["fused"]["accuracy"]


def test_an_integer_only_run_without_training_in_that_form(files, tmp_path, fits):
    run = replace(small(tmp_path / "a", files), recipe=JOINED)
    metrics = run_training(run, quiet=True)
    assert [call["label"] for call in fits] == ["lsq"]
    assert "folded" not in metrics
    assert metrics["fused"] == run.task.metric(lsquant.fuse(run.model()))
    assert run_training(run, resume=True, quiet=True) == metrics


def test_integer_only_on_the_command_line(files, tmp_path, capsys):
    """What is exported, verified and measured without further options is the integer-only form."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    run = tmp_path / "a"
    options = ["--weight-bits", "4", "--activation-bits", "8", "--integer-only", "--epochs", "2", "--fold-epochs", "1"]
    assert main(["train", "digits", *options, "--float-epochs", "1", "--out", str(run), "--quiet"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-2].startswith("integer-only, not trained in this form")
    assert told[-1].startswith("integer-only  ")
    assert open_run(run).recipe == JOINED
    assert main(["eval", str(run)]) == 0
    assert capsys.readouterr().out.strip() == told[-1].removeprefix("integer-only").strip()
    assert main(["export", str(run)]) == 0
    assert (run / "export" / "integer.onnx").is_file()
    assert main(["verify", str(run)]) == 0
    assert "(profile integer) in ONNX Runtime" in capsys.readouterr().out
    assert main(["export", str(run), "--profile", "exact"]) == 0
    assert main(["report", str(run)]) == 0


def test_integer_only_settings_that_make_no_sense(files, tmp_path, capsys):
    with pytest.raises(UsageError, match=r"fold_epochs=1: the recipe has no joins.*--integer-only"):
        run_training(small(tmp_path / "a", files, epochs=2, fold_epochs=1), quiet=True)
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="fold_epochs=3: they are the last of epochs=2"):
        Settings(epochs=2, fold_epochs=3)
    for words, says in (
        (["--bits", "4", "--fold-lr", "0.1"], "--fold-lr has no effect without --fold-epochs"),
        (["--recipe", "r.toml", "--integer-only"], "a recipe says joins = 8"),
    ):
        assert main(["train", "digits", "--out", str(tmp_path / "x"), *words]) == 2
        assert says in capsys.readouterr().err


# ---- the command line ----

OTHER = Settings(
    seed=3, batch_size=32, momentum=0.8, float_epochs=7, float_lr=0.2, float_weight_decay=2e-4, epochs=9, lr=0.02,
    step_lr=0.001, weight_decay=3e-4, weight_decay_by_bits=True, warmup=11, clip_norm=2.5, distill=False,
    distill_weight=0.5, distill_temperature=4.0, progressive=(8, 4), progressive_epochs=2, ema=0.99, bn_batches=12,
    weight_init="mse", activation_init="paper", calibration_batches=5, threads=1, optimizer="adam",
    accumulate=2, autocast="bfloat16", transition_rate=0.004, fold_epochs=3, fold_lr=0.002,
)  # fmt: skip


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Run]]:
    """The runs that the command line would train."""
    runs: list[Run] = []

    def record(run: Run, **how: Any) -> dict[str, Any]:
        runs.append(run)
        return {}

    monkeypatch.setattr(training, "run_training", record)
    return runs


def test_every_setting_has_an_option_and_the_report_says_them_again(tmp_path, started):
    digits = lsquant.tasks.get_task("digits")
    given = {**digits.settings.to_dict(), **OTHER.to_dict()}
    assert not [name for name, value in given.items() if value == getattr(Settings(), name) and name != "distill"]
    run = Run(tmp_path / "a", digits, RECIPE, OTHER)
    start_run(run)
    line = shlex.split(train_command(run))
    assert line[:2] == ["lsquant", "train"]
    assert main([*line[1:], "--quiet"]) == 0
    assert started[0].settings == OTHER
    assert (started[0].recipe, started[0].init) == (RECIPE, None)
    floats = {name: value for name, value in digits.settings.to_dict().items() if name.startswith("float_")}
    for files in ({"init": "f.safetensors"}, {"start": "s.safetensors"}):  # no float training: not its options
        assert main([*shlex.split(train_command(replace(run, **files)))[1:], "--quiet"]) == 0
        idle = {"momentum": 0.9} if "init" in files else {}  # Adam has none, and there is no SGD in float
        assert started[-1].settings == replace(OTHER, **floats, **idle)
        assert {name: getattr(started[-1], name) for name in files} == files
    slow = replace(run, settings=replace(digits.settings, optimizer="adamw"))
    main([*shlex.split(train_command(slow))[1:], "--quiet"])
    assert started[-1].settings == slow.settings
    taught = replace(run, teacher="my teacher.safetensors", settings=digits.settings)
    main([*shlex.split(train_command(taught))[1:], "--quiet"])
    assert started[-1].teacher == "my teacher.safetensors"
    assert started[-1].settings == digits.settings


def test_command_lines_that_contradict_themselves(files, tmp_path, capsys, started):
    run = small(tmp_path / "a", files, files[6])
    stopped(run)
    changed = tmp_path / "t.safetensors"
    changed.write_bytes(Path(files[6]).read_bytes())
    stopped(small(tmp_path / "b", files, str(changed)))
    changed.write_bytes(Path(files[4]).read_bytes())
    for words, says in (
        (["digits", "--bits", 2, "--out", "x", "--teacher", "f", "--no-distill"], "leave out --distill and"),
        (["digits", "--bits", 2, "--out", "x", "--teacher", "f", "--distill"], "leave out --distill and"),
        (["cifar10", "--data", "d", "--bits", 2, "--out", "x", "--distill-weight", 1], "weight has no effect"),
        (["digits", "--bits", 2, "--out", "x", "--init", "f", "--float-epochs", 9], "epochs has no effect with"),
        (["digits", "--bits", 2, "--out", "x", "--init", "f", "--optimizer", "adam", "--momentum", 0.5], "it is SGD's"),
        (["digits", "--bits", 2, "--out", "x", "--transition-rate", 1.0], "a share between 0 and 1"),
        (["digits", "--bits", 2, "--out", "x", "--start", "f", "--float-lr", 1], "lr has no effect with"),
        (["--resume", "--out", run.path, "--teacher", files[4]], "teacher is"),
        (["--resume", "--out", tmp_path / "b", "--teacher", changed], r"t\.safetensors is not the file it was"),
        (["--resume", "--out", run.path, "--progressive", "8,4"], r"progressive is \(\), not \(8, 4\)"),
    ):
        assert main(["train", *map(str, words)]) == 2
        assert re.search(says, capsys.readouterr().err)
    assert not started
    assert main(["train", "--resume", "--out", str(run.path), "--teacher", files[6]]) == 0
    with pytest.raises(SystemExit):
        main(["train", "digits", "--bits", "2", "--out", "x", "--progressive", "8;4"])
    assert "--progressive: invalid numbers value: '8;4'" in capsys.readouterr().err
