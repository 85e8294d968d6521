"""Transformers model types go the whole way: prepare, calibrate, one step, save, load, revert.

The table is in `model_table.py`; what the runs give stands in docs/support.md, which
`python tests/helpers/model_types.py --write` renews.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import lsquant

transformers = pytest.importorskip("transformers")

from helpers import model_types  # noqa: E402
from helpers.model_table import FAST, KNOWN, TYPES  # noqa: E402

SLOW = [name for name in TYPES if name not in FAST]
PAGE = model_types.rows_of_page()


@pytest.fixture(autouse=True)
def _quiet():
    """Warnings of transformers' own code are its own affair."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def whole_way(name: str, folder: Path) -> None:
    if not hasattr(transformers, TYPES[name].cls):
        pytest.skip(f"transformers {transformers.__version__} has no {TYPES[name].cls}")
    if name in KNOWN:
        with pytest.raises((AssertionError, lsquant.UsageError), match=KNOWN[name]):
            model_types.run(name, folder)
        return
    result = model_types.run(name, folder)
    if model_types.same_version():
        how = "renew the page: PYTHONPATH=tests python tests/helpers/model_types.py --write"
        assert model_types.row(name, result) == PAGE[name], how


@pytest.mark.parametrize("name", FAST)
def test_the_whole_way(name: str, tmp_path: Path):
    whole_way(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_whole_way_of_the_others(name: str, tmp_path: Path):
    whole_way(name, tmp_path)


def test_the_page_has_a_row_for_each_type():
    assert list(PAGE) == list(TYPES)
    assert set(FAST) <= set(TYPES)
    assert len(FAST) >= 12
    assert len(SLOW) >= 40


def test_share_that_passes():
    assert len(KNOWN) <= 0.02 * len(TYPES)


def test_what_stays_float_is_counted():
    """All parameters with two dimensions or more stand in the rows of Changes, each once."""
    for name in ("mixtral", "vit", "wav2vec2", "bart"):
        batch = TYPES[name].batch()
        model = model_types.build(name)
        matrices = {id(p): p.numel() for p in model.parameters() if sum(size > 1 for size in p.shape) > 1}
        changes = lsquant.prepare(model, lsquant.Recipe.preset("w4a8"), example_inputs=batch)
        counted = sum(c.weights for c in changes if c.shares is None)
        assert sum(matrices.values()) <= counted <= 1.05 * sum(matrices.values()), name
