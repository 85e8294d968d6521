"""benchmarks/gpu.py runs without a GPU in a tiny size, and what is wrong, dead or late is a row that says so."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import lsquant
from helpers import engines
from helpers.benchmarks import BENCHMARKS
from lsquant import reference

SCRIPT, ROOT = BENCHMARKS / "gpu.py", BENCHMARKS.parent
SECTIONS = ["cases", "quantizer", "int_mm", "compile", "networks"]
COLUMNS = [
    "section", "what", "contender", "unit", "p20", "p50", "p80", "repeats", "ratio", "baseline", "peak_bytes", "status",
    "check", "device", "processor", "threads", "versions",
]  # fmt: skip
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def gpu(bench):
    return bench("gpu")


@pytest.fixture
def sections(bench):
    return bench("gpu_sections")


@pytest.fixture
def options(sections):
    return sections.settings(tiny=True)


def started(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would: without what the tests set for Triton."""
    env = {**os.environ, **variables}
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
@needs_triton
def test_everything_runs_tiny(tmp_path: Path) -> None:
    out, cache = tmp_path / "new" / "gpu.csv", tmp_path / "cache"
    done = started(str(SCRIPT), "--tiny", "--out", str(out), LSQUANT_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    rows = read(out)
    assert list(dict.fromkeys(row["section"] for row in rows)) == SECTIONS
    for row in rows:
        assert list(row) == COLUMNS
        assert row["status"] in ("ok", "needs CUDA"), row
        assert f"torch {torch.__version__}" in row["versions"]
        assert f"lsquant {lsquant.__version__}" in row["versions"]
        assert "interpreter" in row["device"]
        assert (row["repeats"] == "1") == (row["status"] == "ok"), row
        p20, p50, p80, ratio = (float(row[name]) for name in ("p20", "p50", "p80", "ratio"))
        assert (0 < p20 <= p50 <= p80) if row["status"] == "ok" else p50 == 0, row
        assert (ratio > 0) == (row["unit"] == "ms"), row
        assert row["contender"] != row["baseline"] or not row["baseline"] or ratio == 1, row
    assert len({(row["section"], row["what"], row["contender"]) for row in rows}) == len(rows)
    for section in SECTIONS:
        assert any(row["status"] == "ok" for row in rows if row["section"] == section)
        assert f"\n{section}: begins\n" in "\n" + done.stderr
        assert f"{section}: took " in done.stderr
    # what only a GPU can do is there by name, and everything else was done
    missing = {(row["section"], row["what"].rpartition(": ")[2]) for row in rows if row["status"] == "needs CUDA"}
    assert {section for section, _ in missing} == {"quantizer", "int_mm", "compile", "networks"}
    assert {what for section, what in missing if section == "networks"} == {"peak"}
    times = {row["contender"] for row in rows if row["unit"] == "ms"}
    assert {"x * 1.0", "float", "lsquant, triton", "float, compiled", "lsquant, compiled", "torch._int_mm"} <= times
    ours = [row for row in rows if row["contender"] == "lsquant, triton" and row["section"] == "quantizer"]
    assert {row["check"] for row in ours} == {"other than the reference: 0.000% of codes, 0.000% of dx"}
    assert len(ours) == 2 * 3  # types and layouts
    assert_same_as_table(rows, done.stdout)
    assert not cache.exists() or not list(cache.iterdir()), "it builds nothing"


def assert_same_as_table(rows: list[dict[str, str]], text: str) -> None:
    """The Markdown table has the rows of the CSV file, in its order."""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| ")]
    head, *body = [[cell.strip() for cell in line] for line in lines]
    assert len(body) == len(rows)
    for cells, row in zip(body, rows, strict=True):
        shown = dict(zip(head, cells, strict=True))
        assert [shown[name] for name in ("section", "what", "contender", "status", "check")] == [
            row[name] for name in ("section", "what", "contender", "status", "check")
        ]
        number, _, unit = shown["p50 (p20 to p80)"].partition(" ")
        assert float(number.replace(",", "") or 0) == pytest.approx(float(row["p50"]), rel=5e-3)
        assert unit.endswith(row["unit"])
        wanted = f"{float(row['ratio']):.2f} times {row['baseline']}" if row["unit"] == "ms" else ""
        assert shown["ratio"] == ("1" if row["contender"] and row["contender"] == row["baseline"] else wanted)


@needs_triton
def test_only_some_sections(tmp_path: Path) -> None:
    out = tmp_path / "gpu.csv"
    done = started(str(SCRIPT), "--tiny", "--only", "int_mm", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert {row["section"] for row in read(out)} == {"int_mm"}
    assert "cases" not in done.stderr


def test_without_time_everything_is_skipped_and_named(gpu, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "listen", lambda *args: pytest.fail("no process is to be started"))
    out = tmp_path / "gpu.csv"
    assert gpu.main(["--tiny", "--budget", "0", "--out", str(out), "--only", "networks", "cases"]) == 0
    assert [(row["section"], row["status"]) for row in read(out)] == [("cases", "skipped"), ("networks", "skipped")]
    assert "skipped: cases (all of it); networks (all of it)" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(gpu, tmp_path: Path, capsys) -> None:
    assert gpu.main(["--out", str(tmp_path / "gpu.csv")]) == 2
    said = capsys.readouterr()
    assert said.err == "There is no CUDA device: benchmarks/gpu.py measures on one; --tiny runs without.\n"
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_a_section_that_is_none_is_refused(gpu, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--tiny", "--only", "speed"])
    assert "speed" in capsys.readouterr().err


# runs the script as on a machine where neither the packages named nor lsquant are installed
BARE = """
import runpy, sys
from pathlib import Path
script, out, *absent = sys.argv[1:]
source = str(Path(script).parents[1] / "src")
sys.path = [p for p in sys.path if p != source]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.modules.update(dict.fromkeys(absent))
sys.argv = [script, "--tiny", "--budget", "0", "--out", out]
sys.path.insert(0, str(Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""
NOT_NEEDED = ("pytest", "hypothesis", "onnx", "onnxruntime", "onnxscript", "sklearn", "matplotlib", "transformers")


def test_it_needs_neither_lsquant_nor_optional_packages_installed(tmp_path: Path) -> None:
    done = started("-c", BARE, str(SCRIPT), str(tmp_path / "gpu.csv"), *NOT_NEEDED)
    assert done.returncode == 0, done.stderr
    assert "5 skipped" in done.stdout


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    done = started("-c", BARE, str(SCRIPT), str(tmp_path / "gpu.csv"), "safetensors")
    assert done.returncode == 1
    message = "benchmarks/gpu.py needs safetensors, which is not installed: pip install safetensors"
    assert done.stderr.splitlines() == [message]


# ---------------------------------------------------------------------------------------------- what is wrong is seen

quantize = reference.fake_quantize
runs = iter(range(1000))


def other_gradient(x, step, *numbers, **extras):
    """The reference's output with a gradient of the step twice as large."""
    y = quantize(x.detach(), step, *numbers, **extras)
    return quantize(x, step, *numbers, **extras) + (y - y.detach())


def other_every_time(x, step, *numbers, **extras):
    """Gradients of the step that are right to 1e-6, and never the same."""
    return quantize(x, step, *numbers, **extras) + 1e-6 * next(runs) * (step - step.detach())


def unable(*args, **extras):
    raise RuntimeError("the kernel cannot\nrun")


WRONG = {
    "output: AssertionError: 231 of 231 differ": lambda x, *rest, **extras: quantize(x, *rest, **extras) + 1e-3,
    "gradient of x: AssertionError:": lambda x, *rest, **extras: quantize(x, *rest, **extras) + 0.01 * (x - x.detach()),
    "gradient of the step: AssertionError: error": other_gradient,
    "gradients: AssertionError: another run has other bits": other_every_time,
    "output: RuntimeError: the kernel cannot run": unable,
}


@needs_triton
@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_engine_is_named_with_its_case(
    gpu, sections, options, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    """The first of two cases gets the wrong result."""

    def engine(x, *rest, **extras):
        return (WRONG[message] if x.shape == (7, 33) else quantize)(x, *rest, **extras)

    monkeypatch.setattr(sections, "FEW", ("s4-normal", "axis0-normal"))
    monkeypatch.setattr(sections, "LAYERS", {})
    monkeypatch.setitem(engines.ENGINES, "triton", engine)
    (row,) = sections.rows_of("cases", options)
    assert row.status == "failed"
    assert row.check.startswith(f"1 failed: s4-normal; s4-normal: {message}")
    assert gpu.exit_code([row]) == 1
    assert "failed: cases (shared cases 1 to 2" in gpu.summary([row])
    monkeypatch.setitem(engines.ENGINES, "triton", quantize)
    (row,) = sections.rows_of("cases", options)
    assert (row.status, row.check, gpu.exit_code([row])) == ("ok", "0 failed", 0)


def test_a_layer_that_is_not_exact_fails(sections, options, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = sections.ops.linear
    mistaken = SimpleNamespace(
        linear=lambda *args: honest(*args) + 1e-3, Grid=sections.ops.Grid, Conv=sections.ops.Conv
    )
    monkeypatch.setattr(sections, "ops", mistaken)
    with lsquant.use_engine("eager"):
        (row,) = sections.exact("Linear", "Linear", sections.GRIDS[0], options)
    assert (row.status, row.check) == ("failed", "320 of 320 outputs differ from the exact ones")


def test_a_product_that_saturates_fails(sections, options, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = sections.known_answers("sums", (32, 16, 24), options)
    assert row.status == "ok"
    honest = sections.integer_product
    monkeypatch.setattr(sections, "integer_product", lambda x, w: honest(x, w).clamp(max=2**15 - 1))
    (row,) = sections.known_answers("sums", (32, 16, 24), options)
    assert row.status == "failed"
    assert row.check.startswith("the extreme codes give [[32767, ")


def test_a_model_that_is_not_compiled_fails(sections, options, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **how: model)
    importlib.import_module("torch._dynamo")
    with lsquant.use_engine("eager"), pytest.raises(RuntimeError, match="0 graphs instead of one"):
        sections.compiled_network("network", False, options)


def test_a_network_that_computes_something_else_fails(sections, options) -> None:
    with lsquant.use_engine("eager"):
        network = sections.build(sections.TINY_NETWORKS[1], False, False, options)
        first: dict = {}
        sections.agreed("float", network, first)
        with torch.no_grad():
            network.model.down.weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="float, compiled is off by"):
            sections.agreed("float, compiled", network, first)


# ---------------------------------------------------------------------------------------------- one fails, others go on


def test_what_fails_does_not_stop_the_rest(sections, options, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    ok = [sections.Row("cases", "third")]
    tasks = [sections.Task("first", lambda: [sections.Row("cases", "first")]), sections.Task("second", unable),
             sections.Task("third", lambda: ok)]  # fmt: skip
    monkeypatch.setattr(sections, "ENGINE", "eager")
    monkeypatch.setitem(sections.SECTIONS, "cases", lambda options: iter(tasks))
    found = list(sections.rows_of("cases", options))
    assert [(row.what, row.status) for row in found] == [("first", "ok"), ("second", "failed"), ("third", "ok")]
    assert found[1].check == "RuntimeError: the kernel cannot run"
    assert "cases: failed: second" in capsys.readouterr().err
    (late,) = sections.rows_of("cases", options, deadline=0.0)
    assert (late.what, late.status) == ("first, and what follows it", "skipped")
    monkeypatch.setitem(sections.SECTIONS, "cases", unable)
    (lost,) = sections.rows_of("cases", options)
    assert (lost.what, lost.status) == ("its parts", "failed")


def test_a_contender_that_fails_does_not_stop_the_others(gpu, sections, options) -> None:
    def make(name: str):
        if name == "b":
            raise RuntimeError("it computes something else")
        return sections.Contender(name, lambda: None, "a", "eager")

    a, b, c = sections.timed("quantizer", "two of three", dict.fromkeys("abc", make), options)
    assert [row.status for row in (a, b, c)] == ["ok", "failed", "ok"]
    assert b.check == "RuntimeError: it computes something else"
    assert (a.ratio, a.repeats, c.repeats) == (1, 1, 1)
    assert c.ratio == pytest.approx(c.p50 / a.p50)


PROCESS = """
import json, os, time
print("noise")
print("gpu.py: " + json.dumps({"section": "a", "what": "it", "p50": 2.0}))
print("gpu.py: " + json.dumps({"finished": "a"}), flush=True)
"""


def test_a_process_that_dies_or_hangs_is_reported(gpu, sections, capsys) -> None:
    def listened(end: str, limit: float):
        return gpu.listen([sys.executable, "-c", PROCESS + end], ["a", "b"], limit, {"NUMBER": "3"})

    row, lost = listened("os._exit(int(os.environ['NUMBER']))", 60.0)
    assert row == sections.Row("a", "it", p50=2.0)
    assert (lost.section, lost.status, lost.check) == ("b", "failed", "its process ended with code 3")
    assert capsys.readouterr().err == "noise\n"
    assert listened("time.sleep(60)", 1.0)[-1].check == "its process was stopped after 1 s"


@pytest.mark.parametrize("tiny", [True, False])
def test_a_section_has_a_process_of_its_own_on_a_gpu(
    gpu, sections, monkeypatch: pytest.MonkeyPatch, tiny: bool
) -> None:
    asked, written = [], []

    def listen(command, names, limit, variables):
        asked.append((command[command.index("--only") + 1 :], variables["TRITON_INTERPRET"]))
        assert 0 < limit - gpu.GRACE <= 100
        return [sections.Row(name, "it") for name in names]

    monkeypatch.setattr(gpu, "listen", listen)
    found = gpu.collected(["cases", "int_mm"], tiny, 100.0, lambda rows: written.append(len(rows)))
    assert [row.section for row in found] == ["cases", "int_mm"]
    assert asked == ([(["cases", "int_mm", "--tiny"], "1")] if tiny else [(["cases"], "0"), (["int_mm"], "0")])
    assert written == ([2] if tiny else [1, 2])


# ---------------------------------------------------------------------------------------------- what runs on a GPU only


def test_peaks_of_memory(sections, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"float": 2**20, "lsquant, triton": 3 * 2**20}
    steps: list[str] = []
    monkeypatch.setattr(sections.memory, "peak", lambda network: sizes[network.name])
    made = {name: SimpleNamespace(name=name, step=lambda name=name: steps.append(name)) for name in sizes}
    base, ours = sections.peaks("a network", made, "float")
    assert (base.contender, base.p50, base.ratio, base.peak_bytes, base.unit) == ("float", 1.0, 1.0, 2**20, "MiB")
    assert (ours.contender, ours.p50, ours.ratio, ours.peak_bytes) == ("lsquant, triton", 3.0, 3.0, 3 * 2**20)
    assert steps == list(sizes)


def test_the_sizes_for_a_gpu_are_there(sections) -> None:
    real = sections.settings(tiny=False)
    assert (real.device, real.tiny) == ("cuda", False)
    assert real.repeats >= 7
    for layout in sections.LAYOUTS:
        assert all(math.prod(layout.shapes[size]) == size for size in sections.SIZES)
    assert sections.SIZES == (36_864, 2_097_152, 8_388_608, 33_554_432)
    assert [workload.shape for workload in sections.NETWORKS] == [(64, 3, 224, 224), (64, 197, 384)]
    assert (4096, 768, 3072) in sections.SHAPES
    assert all(rows > 16 and inputs % 8 == outputs % 8 == 0 for rows, inputs, outputs in sections.SHAPES)
    whats = {name: [task.what for task in make(real)] for name, make in sections.SECTIONS.items()}
    assert all(len(set(found)) == len(found) > 3 for found in whats.values())
    assert whats["cases"][-7].endswith("of " + str(len(importlib.import_module("helpers.cases").CASES)))
    assert len(whats["quantizer"]) == 4 * 2 * 3
