"""The benchmark of latency runs in a tiny size, and its rows make the table of docs/deployment.md."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.benchmarks import BENCHMARKS, assert_sound
from lsquant.verification.runtimes.web import BROWSERS


@pytest.mark.slow
def test_rows_and_table(tmp_path: Path, bench) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    command = [sys.executable, str(BENCHMARKS / "deploy_latency.py"), "--tiny", "--bits", "w2a2", "--batches", "1", "2"]
    command += ["--repeats", "1", "--threads", "1", "2", "--out", str(tmp_path)]
    web = "LSQUANT_NODE_MODULES" in os.environ and any(map(shutil.which, BROWSERS))
    machine = os.environ if web else {k: v for k, v in os.environ.items() if k != "LSQUANT_NODE_MODULES"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=machine)
    assert done.returncode == 0, done.stderr
    tables = bench("tables")
    rows = tables.read(tmp_path / "deploy.csv")
    files = ("float", "exact", "small", "qdq", "exact, ConvInteger", "integer, qdq", "integer, qoperator", "static")
    names = {f"{file}, {runtime}" for file in files for runtime in ("ONNX Runtime", "OpenVINO")}
    if find_spec("nncf"):
        names.add("NNCF, OpenVINO")
    in_pages = [row for row in rows if row["contender"].endswith("onnxruntime-web")]
    assert len(in_pages) == (4 if web else 0)  # on one thread
    for row in in_pages:
        assert row["repeats"] == "1"
        assert row["contender"] == "float, onnxruntime-web" or row["check"] == "other than trained: 0.00% of outputs"
    rows = [row for row in rows if row not in in_pages]
    assert_sound(rows, names, groups=4)
    for row in rows:
        if row["contender"] == "small, OpenVINO":  # it has no type of 2 bits
            assert (row["repeats"], row["check"]) == ("0", "left out: Unsupported type"), row
            continue
        if row["contender"] == "integer, qoperator, OpenVINO":  # it has not those operators
            assert (row["repeats"], row["check"][:9]) == ("0", "left out:"), row
            continue
        assert row["repeats"] == "1", row
        equal = ("exact", "small", "exact, ConvInteger", "integer, qdq", "integer, qoperator")
        if row["contender"] in [f"{name}, ONNX Runtime" for name in equal]:
            assert row["check"].endswith("other than trained: 0.00% of outputs"), row
    page = tables.filled("<!-- table: deploy -->\n<!-- end of deploy -->", tmp_path)
    assert "| ResNet-20, w2a2, batch 2 |" in page
    assert "| ResNet-20, w2a2, batch 1, 2 threads |" in page
    assert ", 1 or 2 threads;" in page
