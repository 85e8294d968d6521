"""The benchmark of language models: the model of llama2.c as a folder of transformers, and the table of the docs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from helpers.benchmarks import bench as bench
from lsquant.tasks import get_task

ROOT = Path(__file__).parent.parent.parent


def test_the_table_is_that_of_the_results(bench: Any) -> None:
    text = (ROOT / "docs" / "text.md").read_text(encoding="utf-8")
    lines = bench("language_models").page().splitlines()
    assert len(lines) > 3
    assert all(line in text for line in lines)


def test_stories260k_as_a_folder_of_transformers(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss on the first 5,000 tokens; with a wrong order of rows or another cut into tokens it is far above 2."""
    pytest.importorskip("transformers")
    if "LSQUANT_TEST_DATA" not in os.environ:
        pytest.skip("LSQUANT_TEST_DATA: the folder of real data is not given")
    data = Path(os.environ["LSQUANT_TEST_DATA"])
    folder = tmp_path / "model"
    monkeypatch.setattr("sys.argv", ["x", "--data", str(data / "stories260K"), "--out", str(folder)])
    bench("stories260k").main()
    text = data / "text" / "tinystories_valid_part.txt"
    task: Any = get_task("text", model=str(folder), data=str(text), valid=str(text), eval_tokens=5000)
    assert 1.2 < task.metric(task.model())["loss"] < 1.6
