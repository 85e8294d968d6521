"""The report page in headless Chromium: drawn without errors, sorted, searched, and its slider against the oracle.

LSQUANT_TEST_BROWSER names a folder outside the repository in which ``npm ci`` of tests/browser was run; Node.js (20 or
later) and Chromium are found on the path.  The tests are skipped where one of them is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lsquant
import oracle
from helpers.report_pages import array, calibrated, judged, page_data, values_of, zero_points
from lsquant.report.page import write_page

DRIVER = Path(__file__).resolve().parents[1] / "browser" / "drive.js"
POSITIONS = (0, 150, 290, 430, 600)  # of the slider, as the driver sets it


def node() -> str:
    """Skips where there is no Node.js."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("there is no Node.js on the path")
    return found


@pytest.fixture(scope="module")
def browser() -> list[str]:
    """The command that drives a page."""
    folder = os.environ.get("LSQUANT_TEST_BROWSER")
    if not folder or not (Path(folder) / "node_modules" / "playwright-core").is_dir():
        pytest.skip("LSQUANT_TEST_BROWSER names no folder with playwright-core (npm ci of tests/browser)")
    version = subprocess.run([node(), "--version"], capture_output=True, text=True, check=True).stdout
    if int(version.strip().lstrip("v").split(".")[0]) < 20:
        pytest.skip(f"playwright-core needs Node.js 20, this is {version.strip()}")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium on the path")
    return [node(), str(DRIVER), str(Path(folder).resolve()), chromium]


def shippable(name: str, size: int | None, times: tuple[float, ...], ratio: float, level: str | None) -> dict[str, Any]:
    latency = {"1": dict(zip(("p20", "p50", "p80"), times, strict=True))}
    metrics = {"accuracy": 88.25}
    return {
        "name": name,
        "bytes": size,
        "latency": latency,
        "ratio": {"1": ratio},
        "metrics": metrics,
        "level": level,
        "reason": "",
    }


LEFT = {
    "name": "integer",
    "bytes": None,
    "latency": {},
    "ratio": {},
    "metrics": {},
    "level": None,
    "reason": "left out: no joins",
}
FILES = [
    shippable("float", 400000, (1.0, 2.0, 3.0), 1.0, None),
    shippable("exact", 123456, (0.9, 1.0, 1.1), 0.5, "outputs"),
    LEFT,
]
COMPARED = {
    "batch_sizes": [1],
    "samples": 12,
    "threads": 2,
    "machine": "a machine",
    "advice": "ship exact: it is",
    "rows": FILES,
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    """The page of two runs with every kind of quantizer and all sections; its model and batches."""
    model, _, batches = calibrated()
    path = tmp_path_factory.mktemp("page") / "r.html"
    lsquant.write_report(model, path, batches)
    (run,) = page_data(path)["runs"]
    epochs = list(range(1, 7))
    steps = {row["name"]: row["step"] for row in run["quantizers"]}
    run |= {
        "name": "first", "config": {"task": "made up", "settings": {"seed": 0, "progressive": []}},
        "results": [["float", "float32", {"accuracy": 90.5}], ["lsq", "with learned steps", {"accuracy": 88.25}]],
        "verdicts": [{"profile": "exact", "runtime": "a runtime", "level": "outputs", "layers": 3, "samples": 12,
            "checks": [{"level": "weights", "what": "codes", "compared": 4202, "mismatches": 0, "largest": 0.0}]}],
        "comparison": COMPARED,
        "files": [["export/exact.onnx", 123456]], "commands": ["lsquant train made-up --out DIR"],
        "log": {"unit": "epoch", "x": epochs, "phase": ["float"] * 2 + ["lsq"] * 4, "series": {
            "loss": [1 / n for n in epochs], "accuracy": [80.0 + n for n in epochs], "lr": [0.1 / n for n in epochs]}},
        "history": {name: {"step": [None] * 2 + [s * (1 + 0.1 / n) for n in range(1, 5)], "R": [None] * 2 + [0.1] * 4,
                           "clip_rate": [None] * 2 + [0.05] * 4} for name, s in steps.items()},
    }  # fmt: skip
    other = run | {"name": "second", "missing": ["metrics.json does not exist"], "sizes": None, "findings": None}
    write_page("two runs", [run, other], path)
    return path, model, batches


@pytest.fixture(scope="module")
def seen(browser, page):
    """What the driver saw."""
    done = subprocess.run([*browser, str(page[0])], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_scripts_have_no_syntax_error():
    folder = Path(lsquant.__file__).parent / "report" / "assets"
    for script in (*folder.glob("*.js"), DRIVER):
        done = subprocess.run([node(), "--check", str(script)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_it_is_drawn_at_every_size_and_theme(seen):
    backgrounds = {}
    for name, look in seen["looks"].items():
        assert look["problems"] == [], name  # console messages, errors, requests
        assert look["canvases"] >= 16
        assert (look["blank"], look["wide"], look["cut"], look["overlaps"]) == (0, 0, 0, []), name
        backgrounds[name] = look["background"]
    assert backgrounds["phone light"] == backgrounds["desktop light"] == "rgb(255, 255, 255)"
    assert backgrounds["phone dark"] == backgrounds["desktop dark"] == seen["used"]["dark"] != "rgb(255, 255, 255)"
    assert seen["pdf"] > 20_000


def plain(text: str) -> float | None:
    """The number in a cell: a percentage as a share, a dash as None."""
    text = text.replace("\u2212", "-").replace("\u202f", "")
    if text == "\u2013":
        return None
    if text == "∞":
        return np.inf
    if text.startswith("<"):
        return 5e-5
    return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)


def column_values(row):
    """What the cells of a row stand for."""
    ratio = row["views"][0]["step"] / row["views"][0]["best"] if row["views"] and row["views"][0]["best"] else None
    return {
        "s initial": row["initial_step"], "s final": row["step"], "s / s MSE": ratio, "R": row["balance"],
        "clip low": row["clip_low"], "clip high": row["clip_high"], "entropy": row["entropy"], "SQNR": row["sqnr"],
        "oscill.": row["oscillation"], "guards": row["guarded"],
    }  # fmt: skip


def test_every_cell_of_the_table(seen, page):
    rows = {row["name"]: row for row in page_data(page[0])["runs"][0]["quantizers"]}
    used = seen["used"]
    names = [name for name, _ in used["headings"]]
    assert used["cells"].keys() == rows.keys()
    for name, cells in used["cells"].items():
        row, shown = rows[name], dict(zip(names, cells, strict=True))
        assert shown["quantizer"] == f"{row['layer']} {row['kind']}"
        assert shown["bits"] == f"{row['bits']} {'s' if row['signed'] else 'u'}"
        assert shown["granularity"] == row["granularity"] + (f" ({row['steps']})" if row["steps"] > 1 else "")
        assert shown["levels"] == f"{row['levels_used']} of {row['levels']}"
        for column, value in column_values(row).items():
            assert plain(shown[column]) == (value if value is None else pytest.approx(value, rel=6e-3, abs=6e-5)), (
                name, column,
            )  # fmt: skip


def test_sorting(seen, page):
    rows = {row["name"]: row for row in page_data(page[0])["runs"][0]["quantizers"]}
    keys = {
        "quantizer": lambda r: r["name"],
        "bits": lambda r: r["bits"],
        "levels": lambda r: r["levels_used"] / r["levels"],
    }
    for name in ("s initial", "s final", "R", "clip low", "clip high", "entropy", "SQNR", "guards"):
        keys[name] = lambda r, column=name: column_values(r)[column]
    for column, key in keys.items():
        (first, one), (second, two) = seen["used"]["sorted"][column]
        assert {first, second} == {"ascending", "descending"}
        for how, order in ((first, one), (second, two)):
            found = [key(rows[name]) for name in order]
            known = [value for value in found if value is not None]
            assert known == sorted(known, reverse=how == "descending"), column
            assert found[len(known) :] == [None] * (len(rows) - len(known))  # what is not known comes last


def test_searching(seen):
    found = {words: (set(names), text) for words, (names, text) in seen["used"]["searched"].items()}
    inputs = {"conv.input_quantizer", "grouped.input_quantizer", "head.input_quantizer"}
    assert found["input"] == (inputs, "3 of 7 quantizers")
    assert found["weight channel"] == ({"conv.weight_quantizer"}, "1 of 7 quantizers")
    assert found["8 bit"] == ({"conv.input_quantizer"}, "1 of 7 quantizers")
    assert found["nothing of that name"] == (set(), "0 of 7 quantizers")
    assert len(found[""][0]) == 7


def test_the_slider_and_the_selector_against_the_oracle(seen, page):
    """Each position of the slider, in each view of each quantizer: what the page says from its histogram, and what the
    values themselves give."""
    _, model, batches = page
    rows = {row["name"]: row for row in page_data(page[0])["runs"][0]["quantizers"]}
    quantizers, values, views = dict(lsquant.quantizers(model)), values_of(model, batches), set()
    for entry in seen["used"]["slider"]:
        q, view = quantizers[entry["name"]], rows[entry["name"]]["views"][entry["view"]]
        every, steps = np.concatenate([v.reshape(-1) for v in values[entry["name"]]]), q.step.numel()
        learned = oracle.guard(array(q.step), array(q.initial_step))
        if steps > 1:
            index = view["index"]
            each = every.reshape(steps, -1)
            every = (each / learned[:, None]).reshape(-1) if index is None else each[index]
            assert entry["label"] == (f"all {steps}, in steps" if index is None else entry["label"])
            assert index is None or re.match(rf"(channel|group) {index}: s = ", entry["label"])
        views.add((entry["name"], entry["view"]))
        for position, (_, step, error, sqnr, low, high, used) in zip(POSITIONS, entry["numbers"], strict=True):
            s = view["step"] * 4 ** (position / 300 - 1)
            assert plain(step[-1]) == pytest.approx(s, rel=1e-3)
            z = zero_points(q, np.array([s], np.float32)) if q.offset is not None else np.zeros(1)
            bounds = q.q_min - int(z[0]), q.q_max - int(z[0])
            want, wide = judged(every, s, *bounds), 0.02 if "values" in view["histogram"] else 0.08
            assert plain(error[-1]) == pytest.approx(want["error"], rel=wide), (entry["name"], entry["label"], position)
            assert plain(sqnr[-1]) == pytest.approx(want["sqnr"], abs=0.1 if wide < 0.05 else 0.4)
            assert plain(low[-1]) == pytest.approx(want["clip_low"], abs=0.002 + 1.5 / every.size)
            assert plain(high[-1]) == pytest.approx(want["clip_high"], abs=0.002 + 1.5 / every.size)
            assert abs(int(used[-1]) - want["used"]) <= (0 if wide < 0.05 else 3)
            # and the exact numbers of the learned step stand beside it
            assert plain(error[2]) == pytest.approx(view["at"]["learned"]["error"], rel=6e-3)
    assert len(views) == 5 + 3 + 3  # of several steps: all, the first and the last


def test_bars_are_shares_from_near_and_from_far(seen):
    """Counts 1, 2, 0, 1 in [0, 1]: a bar each; one bar where all are narrower than a pixel; between, some together."""
    near, far, between = seen["used"]["drawing"]["bars"]
    assert near == {"x": [0, 0.25, 0.5, 0.75, 1], "y": [0.25, 0.5, 0, 0.25, None]}
    assert far == {"x": [0, 1], "y": [1, None]}
    assert between == {"x": [0, 0.5, 1], "y": [0.75, 0.25, None]}


def test_small_numbers_at_an_axis_are_short(seen):
    minus, space = "\N{MINUS SIGN}", "\N{NARROW NO-BREAK SPACE}"
    assert seen["used"]["drawing"]["marks"] == [
        [f"{minus}5e{minus}4", "0", f"2e{minus}4"],
        ["0.001", "0.0012"],
        [f"{minus}0.5", "0", f"1{space}250"],
        ["0.02", "0.021"],
    ]


def test_keyboard_buttons_and_the_choice_of_a_run(seen, page):
    used = seen["used"]
    before, after = (float(text.split(" = ")[1]) for text in used["keyboard"])
    assert after == pytest.approx(before * 4 ** (-1 / 300), rel=1e-3)  # one tick to the left
    names = [row["name"] for row in page_data(page[0])["runs"][0]["quantizers"]]
    order = used["searched"][""][0]
    assert used["chosen"] == [names[-1]]
    assert used["previous"] == [order[order.index(names[-1]) - 1]]
    assert used["runs"] == ["first", "second"]
    assert used["second"].startswith("second")
    assert "metrics.json does not exist" in used["text"]


def test_which_file_to_ship(seen):
    text = seen["used"]["text"]
    assert "Which file to shipShip exact: it is." in text
    assert "exact123 kB0.311 (0.9 to 1.1)0.588.25\u202f%exact" in text
    assert "Time in ONNX Runtime on a machine, 2 threads; verdicts on 12 samples. integer: left out: no joins." in text
