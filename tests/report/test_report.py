"""The report page: every number against an independent computation; damaged runs; several runs; its size."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lsquant
import oracle
from helpers.diagnostics import by_hand
from helpers.report_pages import array, calibrated, judged, page_data, values_of, zero_points
from lsquant import Recipe
from lsquant.cli import main
from lsquant.report import values
from lsquant.runs import log_reader

TASK = Path(__file__).resolve().parents[2] / "examples" / "own_loop_transformer.py"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A model, the batches looked at, and its page's data."""
    model, _, batches = calibrated()
    page = tmp_path_factory.mktemp("page") / "r.html"
    lsquant.write_report(model, page, iter(batches), title="A <b>bold</b> & title")
    return model, batches, page


def rows(shown):
    (run,) = page_data(shown[2])["runs"]
    return {row["name"]: row for row in run["quantizers"]}, run


def balance(model, name, q):
    """R, the lower median over the steps, by the oracle; without steps whose weights have no gradient at all."""
    layer, _, kind = name.partition(".")
    if not kind:
        return None
    weight = model.get_submodule(layer).weight
    shape = (q.step.numel(), -1) if kind == "weight_quantizer" else (1, -1)
    own = zip(array(weight).reshape(shape), array(weight.grad).reshape(shape), strict=True)
    s = oracle.guard(array(q.step), array(q.initial_step))
    found = []
    for k, (w, g) in enumerate(own):
        with contextlib.suppress(ZeroDivisionError):
            found += oracle.step_balance(w, g, s[k : k + 1], array(q.step.grad)[k : k + 1]).tolist()
    assert 0 < len(found) <= s.size
    return sorted(found)[(len(found) - 1) // 2]


def test_every_column_of_every_quantizer(shown):
    model, batches, _ = shown
    table, _ = rows(shown)
    seen = values_of(model, batches)
    assert table.keys() == seen.keys()
    shared = {"conv.weight_quantizer": "channel", "grouped.weight_quantizer": "group of 8"}
    for name, q in lsquant.quantizers(model):
        want = by_hand(q, seen[name]) | {
            "name": name, "signed": bool(q.signed), "q_min": q.q_min, "q_max": q.q_max,
            "balance": balance(model, name, q), "granularity": shared.get(name, "tensor"),
            "oscillation": None, "lsq_plus": name == "head.input_quantizer", "damage": "",
            "guarded": int(name == "conv.weight_quantizer"),
        }  # fmt: skip
        for key, value in want.items():
            got = table[name][key]
            assert got == (pytest.approx(value, rel=2e-6) if isinstance(value, float) else value), (name, key)
    assert {row["kind"] for row in table.values()} == {"weight", "input", "alone"}


def test_what_other_steps_would_do(shown):
    """Error, SQNR, clipping and levels of the initial, learned and MSE-optimal step, of all values and each step's."""
    model, batches, _ = shown
    table, _ = rows(shown)
    seen, looked = values_of(model, batches), 0
    for name, q in lsquant.quantizers(model):
        step, start = oracle.guard(array(q.step), array(q.initial_step)), array(q.initial_step)
        every = np.concatenate([v.reshape(-1) for v in seen[name]])
        each = [every] if step.size == 1 else list(every.reshape(step.size, -1))
        z = np.broadcast_to(zero_points(q, step), step.shape)
        views = table[name]["views"]
        assert [view.get("index", 0) for view in views] == (
            [0] if step.size == 1 else [None, *values.kept_steps(torch.from_numpy(step))]
        )
        for view in views:
            if (index := view.get("index", 0)) is None:
                mine = np.concatenate([v / s for v, s in zip(each, step, strict=True)])
                s, s0 = np.float32(1), np.sort(start / step)[(step.size - 1) // 2]
            else:
                mine, s, s0 = each[index], step[index], start[index]
            low, high = q.q_min - int(z[index or 0]), q.q_max - int(z[index or 0])
            assert (view["low"], view["high"]) == (low, high)
            assert (view["step"], view["initial"]) == (pytest.approx(s, rel=1e-6), pytest.approx(s0, rel=1e-6))
            assert view["offset"] == (None if q.offset is None else pytest.approx(q.offset.item(), rel=1e-6))
            best = oracle.best_squared_error(mine, low, high, 200)[0] / mine.size
            assert view["at"]["best"]["error"] <= 1.001 * best
            for mark, at in {"initial": s0, "learned": s, "best": np.float32(view["best"])}.items():
                want = judged(mine, float(at), low, high)
                if want["sqnr"] and want["sqnr"] > 120:  # nothing but the rounding of float32
                    want |= {"sqnr": None, "error": 0.0}
                got = view["at"][mark]
                assert got["used"] == want["used"], (name, index, mark)
                for key in ("error", "sqnr", "clip_low", "clip_high"):
                    near = None if want[key] is None else pytest.approx(want[key], rel=1e-4, abs=1e-9)
                    assert got[key] == near, (name, index, mark, key)
                looked += 1
    assert looked > 200


def test_histograms(shown):
    """Bins hold what np.histogram finds between the same ends, with the zeros and what lies beyond apart."""
    model, batches, _ = shown
    table, _ = rows(shown)
    kinds = set()
    for name, seen in values_of(model, batches).items():
        every = np.concatenate([v.reshape(-1) for v in seen])
        h = table[name]["views"][0]["histogram"]
        if table[name]["steps"] > 1:
            continue
        if "values" in h:
            distinct, counts = np.unique(every, return_counts=True)
            assert h["values"] == pytest.approx(distinct.tolist(), rel=1e-6)
            assert h["counts"] == counts.tolist()
            kinds.add("values")
            continue
        inner = every[(every >= h["from"]) & (every <= h["to"]) & (every != 0)]
        want = np.histogram(inner.astype(np.float64), len(h["counts"]), (h["from"], h["to"]))[0]
        assert h["counts"] == want.tolist()
        assert h["zeros"] == int((every == 0).sum())
        below, above = every[every < h["from"]].astype(np.float64), every[every > h["to"]].astype(np.float64)
        for part, tail in (("below", below), ("above", above)):
            assert h[part] == pytest.approx([tail.size, tail.sum(), (tail * tail).sum()], rel=1e-5, abs=1e-6)
        kinds.add("zeros" if h["zeros"] else "bins")
    assert kinds == {"values", "zeros", "bins"}


def test_tails_of_a_histogram():
    x = torch.cat([torch.randn(2000), torch.tensor([50.0, -70.0, 80.0])])
    summary = values.ValueSummary()
    summary.add(x)
    h = values.histogram(summary.table(), -8.0, 4.0, 32, 10)
    assert (h["from"], h["below"]) == (-8.0, [1, -70.0, 4900.0])
    assert (h["to"], h["above"]) == (4.0, [2, 130.0, 2500.0 + 6400.0])
    assert sum(h["counts"]) == 2000


def test_many_steps_and_large_batches(tmp_path, monkeypatch):
    """Of many steps 64 are kept, the smallest and largest among them; of a large batch evenly spaced values."""
    step = torch.rand(500, generator=torch.Generator().manual_seed(0))
    kept = values.kept_steps(step)
    assert len(kept) <= 64 < 500
    assert {int(step.argmin()), int(step.argmax()), 0, 499} <= set(kept)
    assert kept == sorted(kept)
    monkeypatch.setattr(values, "SAMPLE", 100)
    model = nn.Sequential(nn.Linear(8, 4))
    lsquant.prepare(model, Recipe(4, 4))
    x = torch.randn(60, 8)
    lsquant.calibrate(model, [x])
    lsquant.write_report(model, tmp_path / "r.html", [x])
    row = page_data(tmp_path / "r.html")["runs"][0]["quantizers"][1]
    assert row["elements"] == 480
    assert sum(row["views"][0]["histogram"]["counts"]) == len(x.reshape(-1)[::5])


def test_sizes_bits_and_findings(shown):
    model, batches, _ = shown
    _, run = rows(shown)
    packed = {"conv": -(-162 * 2 // 8) + 4 * 6, "grouped": 40 * 96 // 2 + 4 * 480, "head": -(-200 * 3 // 8) + 4}
    assert {row["layer"]: row["packed"] for row in run["layers"]} == packed
    assert run["sizes"] == {"float": 4 * (162 + 3840 + 200), "packed": sum(packed.values()), "rest": 4 * (6 + 40 + 5)}
    assert sorted(run["bits"]) == [["2/8", 1], ["3/4", 1], ["4/2", 1]]
    found = lsquant.check(model, batches=batches)
    assert [(f["code"], f["where"], f["remedy"]) for f in run["findings"]] == [
        (f.code, f.where, f.remedy) for f in found
    ]
    assert "step_below_guard" in {f["code"] for f in run["findings"]}
    assert run["environment"]["packages"]["torch"] == torch.__version__
    assert run["recipe"] == lsquant.resolved_recipe(model).to_toml()


def test_a_shared_weight_counts_once(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    lsquant.prepare(model, Recipe(4))
    lsquant.write_report(model, tmp_path / "r.html")
    (run,) = page_data(tmp_path / "r.html")["runs"]
    assert run["sizes"] == {"float": 256, "packed": 32 + 4, "rest": 64}


def test_the_page_is_one_file_and_no_text_in_it_can_break_out(shown, tmp_path):
    page = shown[2].read_text()
    assert "<title>A &lt;b&gt;bold&lt;/b&gt; &amp; title</title>" in page
    assert "Permission is hereby granted, free of charge" in page  # uPlot's licence
    model = nn.ModuleDict({"</script><script>alert(1)//": nn.Linear(4, 4)})
    lsquant.prepare(model, Recipe(4))
    lsquant.write_report(model, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert text.count("<script") == page.count("<script")
    (row,) = page_data(tmp_path / "r.html")["runs"][0]["quantizers"]
    assert row["layer"] == "</script><script>alert(1)//"


def test_values_that_are_not_finite_and_steps_that_are_none(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    lsquant.prepare(model, Recipe(4))
    with torch.no_grad():
        model[0].weight_quantizer.step.fill_(torch.nan)
        model[1].weight[0, 0] = torch.inf
    lsquant.write_report(model, tmp_path / "r.html")
    (run,) = page_data(tmp_path / "r.html")["runs"]
    assert [bool(row["views"]) for row in run["quantizers"]] == [False, False, True]
    assert [row["damage"] for row in run["quantizers"]] == [
        "steps are NaN or infinite", "1 of 16 values are NaN or infinite", "",
    ]  # fmt: skip
    assert {f["code"] for f in run["findings"]} == {"step_not_finite", "weights_not_finite"}


# ---- run directories ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the example transformer."""
    path = tmp_path_factory.mktemp("runs") / "majority"
    line = ["train", f"{TASK}:task", "--bits", "3", "--out", path, "--float-epochs", "1", "--epochs", "2", "--quiet"]
    assert main([*map(str, line), "--threads", "1"]) == 0
    return path


@pytest.fixture
def run_copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def report(path, capsys, code=0):
    assert main(["report", "--task", f"{TASK}:task", str(path), "--json", "--max-batches", "1"]) == code
    told = capsys.readouterr()
    return page_data(path / "report.html")["runs"][0] if code == 0 else told.err


def test_what_the_log_says(run_copy, capsys):
    """Curves over all phases, and R, oscillation and guards of its last row."""
    lines = [json.loads(line) for line in (run_copy / "log.jsonl").read_text().splitlines()]
    name = "blocks.0.up.weight_quantizer"
    lines[1]["quantizers"][name] |= {"oscillation": 0.25, "guarded": 3}
    lines[2]["quantizers"][name] |= {"oscillation": 0.125, "guarded": 7}
    lines[2]["quantizers"][name]["R"] = None
    (run_copy / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = report(run_copy, capsys)
    assert run["missing"] == []
    assert run["log"]["phase"] == ["float", "lsq", "lsq"]
    assert run["log"]["x"] == [1, 2, 3]
    for key in ("loss", "accuracy", "train_accuracy", "lr", "step_lr", "grad_norm"):
        want = [None if line.get(key) is None else pytest.approx(line[key], rel=1e-6) for line in lines]
        assert run["log"]["series"][key] == want, key
    logged = {
        n: [None if "quantizers" not in line else line["quantizers"].get(n) for line in lines] for n in run["history"]
    }
    for quantizer, mine in run["history"].items():
        for key, line in mine.items():
            want = [
                None if f is None or f.get(key) is None else pytest.approx(f[key], rel=1e-3) for f in logged[quantizer]
            ]
            assert line == want, (quantizer, key)
    rows = {row["name"]: row for row in run["quantizers"]}
    assert rows.keys() == run["history"].keys()
    assert (rows[name]["oscillation"], rows[name]["guarded"]) == (0.125, 7)
    assert rows[name]["balance"] == lines[1]["quantizers"][name]["R"]
    other = "head.input_quantizer"
    assert (rows[other]["balance"], rows[other]["oscillation"]) == (lines[2]["quantizers"][other]["R"], None)
    assert run["results"][-1] == [
        "lsq",
        "trained with learned steps",
        json.loads((run_copy / "metrics.json").read_text())["lsq"],
    ]


def test_a_long_log_is_thinned(run_copy, capsys):
    line = (run_copy / "log.jsonl").read_text().splitlines()[-1]
    (run_copy / "log.jsonl").write_text("".join(
        json.dumps(json.loads(line) | {"epoch": i + 1, "loss": i / 7}) + "\n" for i in range(5000)))  # fmt: skip
    run = report(run_copy, capsys)
    assert len(run["log"]["x"]) == log_reader.ROWS
    assert (run["log"]["x"][0], run["log"]["x"][-1]) == (1, 5000)
    assert run["log"]["series"]["loss"][-1] == pytest.approx(4999 / 7, rel=1e-6)


FILES = ("config.toml", "recipe.toml", "env.json", "log.jsonl", "metrics.json", "model.safetensors")


@pytest.mark.parametrize("damage", ["deleted", "empty", "half", "garbage"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_run_still_gives_a_page_of_the_rest(run_copy, capsys, file, damage):
    path = run_copy / file
    old = path.read_bytes()
    cut = len(old) * 2 // 5
    cut = old.rindex(b"=", 0, cut) + 1 if file.endswith(".toml") else cut  # at the end of a line it would be valid
    new = {"deleted": b"", "empty": b"", "half": old[:cut], "garbage": b"\x00\xff\xfe{]=" * 20}[damage]
    path.write_bytes(new)
    if damage == "deleted":
        path.unlink()
    run = report(run_copy, capsys)
    assert any(file in text for text in run["missing"]), run["missing"]
    others = {"env.json": "environment", "metrics.json": "metrics", "recipe.toml": "recipe", "config.toml": "config"}
    for other, key in others.items():
        assert run[key] or other == file, (file, key)
    assert len(run["quantizers"]) == 12 or (file, damage) == ("recipe.toml", "half")
    drawn = [bool(row["views"]) for row in run["quantizers"]]
    assert all(drawn) or file in ("config.toml", "recipe.toml", "model.safetensors")
    assert run["log"]["x"] == [1, 2, 3] or file == "log.jsonl"


def test_an_unfinished_run_shows_its_last_checkpoint_or_its_log(run_copy, capsys):
    for name in ("model.safetensors", "metrics.json"):
        (run_copy / name).unlink()
    run = report(run_copy, capsys)
    assert any(
        "the run is not finished" in t and "shown is the checkpoint lsq.safetensors" in t for t in run["missing"]
    )
    assert all(row["views"] for row in run["quantizers"])
    assert run["results"] == []
    (run_copy / "last" / "lsq.safetensors").unlink()
    run = report(run_copy, capsys)
    assert any(t.startswith("no model: ") for t in run["missing"])
    assert [row["step"] for row in run["quantizers"]] == [
        facts["step"]
        for facts in json.loads((run_copy / "log.jsonl").read_text().splitlines()[-1])["quantizers"].values()
    ]
    for name in FILES:
        (run_copy / name).unlink(missing_ok=True)
    assert "is no run directory: it has no config.toml" in report(run_copy, capsys, code=3)


def test_several_runs(finished, run_copy, tmp_path, capsys):
    out = tmp_path / "both.html"
    assert main(["report", "--task", f"{TASK}:task", str(finished), str(run_copy)]) == 2
    assert "--out FILE" in capsys.readouterr().err
    named = ["--task", f"{TASK}:task", "--out", str(out), "--max-batches", "1", "--json"]
    assert main(["report", str(finished), str(run_copy), *named]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["runs"]) == [str(finished), str(run_copy)]
    first, second = page_data(out)["runs"]
    assert (first["name"], second["name"]) == ("majority", "run")
    assert first["sizes"] == second["sizes"]
    assert first["results"] == second["results"] != []


@pytest.mark.slow
@pytest.mark.parametrize("granularity", ["channel", "group"])
def test_the_page_of_a_12_block_transformer_is_below_5_mb(tmp_path, granularity):
    layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 12), torch.randn(2, 32, 384)
    spec = lsquant.QuantSpec(4, granularity=granularity, group_size=32 if granularity == "group" else None)
    lsquant.prepare(model, Recipe(spec, 4), x)
    lsquant.calibrate(model, [x])
    lsquant.write_report(model, tmp_path / "r.html", [x])
    assert (tmp_path / "r.html").stat().st_size < 4e6  # leaves 1 MB for the log of a long run
