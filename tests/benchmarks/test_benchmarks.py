"""The speed benchmarks: every workload runs in a tiny size and writes sound rows; what is timed is checked first."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lsquant
from helpers.benchmarks import BENCHMARKS, assert_sound
from lsquant import kernels

PAGE = BENCHMARKS.parent / "docs" / "benchmarks.md"
OURS = "lsquant, eager" if kernels.why_not("cpp") else "lsquant, cpp"
EAGER = ("eager", "cpp", "core", "brevitas", "torchao", "contiguous")  # what needs no compiler at run time
QUANTIZERS = {"x * 1.0", "LSQ formulation, eager", "PyTorch core", "Brevitas", "torchao range learning", OURS}
NETWORKS = {"float", "LSQ formulation, eager", OURS}
COMPILED = {"float, compiled", "LSQ formulation, compiled", "lsquant, compiled"}


def speed(out: Path, *arguments: str) -> dict[str, list[dict[str, str]]]:
    """Run benchmarks/speed.py in a tiny size; the rows of every CSV file it wrote."""
    command = [sys.executable, str(BENCHMARKS / "speed.py"), *arguments, "--tiny", "--repeats", "1", "--threads", "1"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in out.glob("*.csv"):
        with path.open(newline="") as file:
            found[path.stem] = list(csv.DictReader(file))
    return found


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_quantizer_alone(tmp_path: Path, everything: bool) -> None:
    only = () if everything else ("--only", *EAGER)
    rows = speed(tmp_path, "quantizer", "--profile", *only)["quantizer"]
    compiled = {"LSQ formulation, compiled", "lsquant, compiled"} if everything else set()
    assert_sound(rows, QUANTIZERS | compiled, groups=8)  # 4 layouts of 2 types
    # more than rounding is allowed to no one but bfloat16 formulations
    for row in rows:
        if row["repeats"] != "0" and row["contender"].startswith("lsquant") and "per tensor" not in row["contender"]:
            assert row["check"] == "other than the reference: 0.000% of codes, 0.000% of dx"
        if row["repeats"] != "0" and "float32" in row["configuration"] and row["check"]:
            assert "0.000% of codes" in row["check"], row
    profiles = sorted(path.name for path in tmp_path.glob("profile-*.txt"))
    assert f"profile-quantizer-768-lsquant-{OURS[9:]}.txt" in profiles
    assert "fake_quantize" in (tmp_path / f"profile-quantizer-768-lsquant-{OURS[9:]}.txt").read_text()


@pytest.mark.slow
def test_networks(tmp_path: Path) -> None:
    workloads = ("resnet20", "resnet18", "vit", "bert")
    found = speed(tmp_path, *workloads, "--profile", "--only", *EAGER)
    assert set(found) == set(workloads)
    for name, rows in found.items():
        assert_sound(rows, NETWORKS | ({"float, contiguous"} if "resnet" in name else set()), groups=2)
        assert {row["phase"] for row in rows} == {"training step", "evaluation"}
        assert len(list(tmp_path.glob(f"profile-{name}-*.txt"))) == len(rows)


@pytest.mark.slow
def test_a_network_compiled_and_under_autocast(tmp_path: Path) -> None:
    assert_sound(speed(tmp_path, "vit")["vit"], NETWORKS | COMPILED, groups=2)
    rows = speed(tmp_path, "vit", "--autocast", "--only", *EAGER)["vit-autocast"]
    assert_sound(rows, NETWORKS, groups=2)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_memory(tmp_path: Path) -> None:
    rows = speed(tmp_path, "memory", "--only", OURS)["memory"]
    assert_sound(rows, {"float", OURS}, groups=6)
    assert {row["unit"] for row in rows} == {"MiB"}


def test_collection(tmp_path: Path) -> None:
    rows = speed(tmp_path, "collection")["collection"]
    parts = {"training step", "looks, by step", "transitions counted", "end of an epoch, by step"}
    assert_sound(rows, parts, groups=2)


def test_saved_bytes_are_those_of_the_input_and_what_the_loss_needs(bench) -> None:
    network = bench("network_speed").Network
    model, target = nn.Linear(4, 8, bias=False), torch.randn(2, 8)
    x = torch.randn(2, 4, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters())
    found = bench("memory").kept(network(model, model, x, target, False, optimizer))
    assert found == (2 * 4 + 2 * 8) * 4  # the weight is a parameter, the output is not kept
    twice = nn.Sequential(nn.Tanh(), nn.Tanh())  # a tanh keeps its output
    x = torch.randn(2, 8, requires_grad=True)
    assert bench("memory").kept(network(twice, twice, x, target, False, optimizer)) == (3 * 2 * 8) * 4


def test_contenders_are_measured_in_turns(bench) -> None:
    timing, calls = bench("timing"), []
    field = [timing.Contender(name, lambda name=name: calls.append(name), "a") for name in "abc"]
    field.insert(1, timing.Contender("absent", None, "a", check="left out: no reason"))
    timing.measure(field, timing.Options(repeats=3, warmup=2, seconds=0.0))
    assert "".join(calls) == "aabbcc" + "abc" * 3
    assert [len(c.seconds) for c in field] == [3, 0, 3, 3]
    calls.clear()
    timing.measure(field[:1], timing.Options(repeats=1, warmup=1, seconds=0.01))
    assert len(calls) > 100, "short calls are repeated"


def test_rows_are_percentiles_and_ratios(bench) -> None:
    timing = bench("timing")
    field = [timing.Contender("a", None, "a"), timing.Contender("b", None, "a"), timing.Contender("c", None, "a")]
    field[0].seconds, field[1].seconds = [0.001, 0.002, 0.003, 0.004, 0.005, 0.006], [0.007, 0.005, 0.009]
    a, b, c = timing.rows("w", "k", "p", field, timing.Options())
    assert (a.p20, a.p50, a.p80, a.ratio, a.repeats) == pytest.approx((2.0, 3.5, 5.0, 1.0, 6))
    assert (b.p50, b.ratio) == pytest.approx((7.0, 2.0))
    assert (c.p50, c.ratio, c.repeats) == (0, 0, 0)


def test_what_computes_something_else_is_not_timed(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, timing, peers = bench("quantizer_speed"), bench("timing"), bench("peers")
    options = timing.Options(only=("lsquant, eager",), tiny=True)
    p = quantizer.problem(quantizer.LAYOUTS[1], 768, torch.float32, "cpu")
    list(quantizer.contenders(p, options))
    honest = quantizer.ours

    def wrong(change):
        def make(problem):
            function, parameters[:] = honest(problem)
            return peers.Quantize(lambda x: change(function, x), list(parameters))

        return make

    one = torch.arange(768).reshape(p.x.shape) == 5
    changes = {
        "y 1, dx 0,": lambda f, x: f(x) + one * 1e-3,
        "y 0, dx 768,": lambda f, x: f(x) + 0.01 * (x - x.detach()),
        "y 0, dx 0, ds off 1$": lambda f, x: f(x) + quantized(x),  # the step's gradient alone, taken away
    }
    parameters: list = []

    def quantized(x):
        y = lsquant.fake_quantize(x.detach(), parameters[0], *p.bounds, p.g, axis=p.axis)
        return y.detach() - y

    for message, change in changes.items():
        monkeypatch.setattr(quantizer, "ours", wrong(change))
        with pytest.raises(RuntimeError, match=message):
            list(quantizer.contenders(p, options))


def test_a_network_that_computes_something_else_is_not_timed(bench) -> None:
    networks, timing = bench("networks"), bench("timing")
    speed_of = bench("network_speed")
    builder = speed_of.Builder(networks.WORKLOADS["vit"], timing.Options(tiny=True))
    wanted: dict = {}
    network = builder.build("float")
    speed_of.checked("float", network, wanted, False)
    with torch.no_grad():
        network.model.up.weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=r"float, other is off by"):
        speed_of.checked("float, other", network, wanted, False)
    ours = builder.build(OURS)
    speed_of.checked(OURS, ours, {}, False)
    ours.run = lambda x: ours.model(x) * (1 if kernels.engine_for().name == "eager" else 1 + 1e-6)
    if OURS != "lsquant, eager":
        with pytest.raises(RuntimeError, match="not that of its eager engine"):
            speed_of.checked(OURS, ours, {}, False)


def test_the_formulation_is_the_papers(bench) -> None:
    """Literal numbers: s = 1/2, bounds -8 to 7, g = 1/4."""
    x = torch.tensor([0.2, 0.8, 9.0, -9.0], requires_grad=True)
    step = torch.tensor([0.5], requires_grad=True)
    y = bench("peers").formulation(x, step, -8, 7, 0.25)
    assert y.tolist() == [0.0, 1.0, 3.5, -4.0]
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert step.grad.item() == pytest.approx(0.25 * (-0.4 + 0.4 + 7 - 8), abs=1e-6)


TABLES = ["quantizer", "quantizer-checks", "resnet20", "resnet18", "vit", "bert", "memory", "collection"]


def test_the_page_has_a_place_for_every_workload(bench) -> None:
    assert re.findall(r"<!-- table: ([\w-]+) -->", PAGE.read_text()) == TABLES
    assert re.findall(r"<!-- end of ([\w-]+) -->", PAGE.read_text()) == TABLES
    assert {name.removesuffix("-checks") for name in TABLES} == set(bench("speed").NAMES)


def test_tables_are_made_again_from_the_files(bench, tmp_path: Path) -> None:
    tables, timing = bench("tables"), bench("timing")
    place = ("cpu AVX2", "a processor", 2, "torch 9")
    rows = [
        timing.Row("vit", "block", "training step", "float", "ms", 1.0, 2.0, 4.0, 15, 1.0, "float", "", *place),
        timing.Row("vit", "block", "training step", "other", "ms", 2.0, 3.0, 1234.5, 15, 1.5, "float", "", *place),
        timing.Row("vit", "block", "training step", "gone", "ms", 0.0, 0.0, 0.0, 0, 0.0, "float",
                   "left out: no such thing", *place),
    ]  # fmt: skip
    timing.report("vit", rows, timing.Options(out=tmp_path))
    page = tmp_path / "page.md"
    empty = "<!-- table: bert -->\n<!-- end of bert -->\n"
    page.write_text("# Page\n<!-- table: vit -->\nold\n<!-- end of vit -->\nmiddle\n" + empty)
    for _ in range(2):
        tables.main(["--results", str(tmp_path), "--page", str(page)])
    assert page.read_text() == (
        "# Page\n<!-- table: vit -->\n\n*a processor, cpu AVX2, 2 threads; p50 (p20 to p80) of 15; torch 9.*\n\n"
        "block:\n\n|  | training step, ms | ratio |\n|---|---|---|\n| float | 2 (1 to 4) | 1 |\n"
        "| other | 3 (2 to 1,234) | 1.50 x float |\n\nLeft out: gone: no such thing.\n\n<!-- end of vit -->\nmiddle\n"
        "<!-- table: bert -->\n\nnot measured yet\n\n<!-- end of bert -->\n"
    )


def test_the_table_of_the_quantizer(bench, tmp_path: Path) -> None:
    tables, timing = bench("tables"), bench("timing")
    place = ("cpu AVX2", "a processor", 2, "torch 9")
    check = "other than the reference: 0.000% of codes, {}% of dx"
    numbers = {
        ("8 elements", "x * 1.0"): (2.0, 1.0, ""), ("8 elements", "peer"): (5.0, 2.5, check.format("0.500")),
        ("9 elements", "x * 1.0"): (4.0, 1.0, ""), ("9 elements", "peer"): (6.0, 1.5, check.format("1.250")),
    }  # fmt: skip
    rows = [timing.Row("quantizer", k, "both", name, "ms", p50, p50, p50, 7, ratio, "x * 1.0", text, *place)
            for (k, name), (p50, ratio, text) in numbers.items()]  # fmt: skip
    timing.report("quantizer", rows, timing.Options(out=tmp_path))
    assert "| 9 elements | 4 (4 to 4) | 1.50 |" in tables.render("quantizer", tmp_path)
    assert "| peer | 0 % | 1.25 % |" in tables.render("quantizer-checks", tmp_path)


def test_commands_that_cannot_be_are_refused(bench, capsys: pytest.CaptureFixture[str]) -> None:
    refused = {"nothing": "no workload 'nothing'", "vit --repeats 0": "at least 1", "vit --threads 0": "at least 1"}
    for line, message in refused.items():
        with pytest.raises(SystemExit, match="2"):
            bench("speed").main(line.split())
        assert message in capsys.readouterr().err
