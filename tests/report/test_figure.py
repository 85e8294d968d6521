"""The curves of the figure against literal numbers, and the files it writes."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from lsquant._util.errors import MissingExtra, UsageError
from lsquant.report import figure

DRAWN_WITH = "3.11.2"  # matplotlib

# unsigned 2 bits, s = 1: codes 0 .. 3
V = [-0.75, 0.0, 0.25, 0.49, 0.51, 1.0, 1.49, 1.51, 2.25, 2.51, 2.99, 3.0, 3.75]
V_HAT = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3]
LSQ = [0, 0, -0.25, -0.49, 0.49, 0, -0.49, 0.49, -0.25, 0.49, 0.01, 3, 3]
PACT = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 3]
QIL = [0, 0, 1.25, 1.01, 0.99, 0.5, 0.01, -0.01, -0.75, -1.01, -1.49, 0, 0]

# signed 2 bits, s = 0.5: codes -2 .. 1, clip points -1 and 0.5
SIGNED_V = [-1.25, -1.0, -0.875, -0.5, -0.375, 0.0, 0.375, 0.5, 0.75]
SIGNED_V_HAT = [-1, -1, -1, -0.5, -0.5, 0, 0.5, 0.5, 0.5]
SIGNED_LSQ = [-2, -2, -0.25, 0, -0.25, 0, 0.25, 1, 1]
SIGNED_PACT = [-2, -2, 0, 0, 0, 0, 0, 1, 1]
SIGNED_QIL = [0, 0, 1.25, 0.5, 0.25, -0.5, -1.25, 0, 0]


@pytest.mark.parametrize(
    ("curve", "expected", "expected_signed"),
    [
        (figure.staircase, V_HAT, SIGNED_V_HAT),
        (figure.lsq_step_gradient, LSQ, SIGNED_LSQ),
        (figure.pact_step_gradient, PACT, SIGNED_PACT),
        (figure.qil_step_gradient, QIL, SIGNED_QIL),
    ],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_curves(curve, expected, expected_signed):
    near = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(curve(torch.tensor(V), 1.0, 0, 3), torch.tensor(expected, dtype=torch.float32), **near)
    signed = torch.tensor(expected_signed, dtype=torch.float32)
    torch.testing.assert_close(curve(torch.tensor(SIGNED_V), 0.5, -2, 1), signed, **near)


def test_transition_points():
    assert figure.transition_points(1.0, 0, 3) == [0.5, 1.5, 2.5]
    assert figure.transition_points(0.5, -2, 1) == [-0.75, -0.25, 0.25]


def test_no_piece_crosses_a_cut():
    pieces = figure.pieces([-1.0, 0.5, 2.0], 2.0)
    assert [(round(float(p[0]), 2), round(float(p[-1]), 2)) for p in pieces] == [(-2.0, 1.0), (1.0, 4.0)]
    assert float(pieces[0][-1]) < 1.0 < float(pieces[1][0])


def test_svg_is_valid_and_repeatable(tmp_path):
    pytest.importorskip("matplotlib")
    one, two, other = tmp_path / "one.svg", tmp_path / "two.svg", tmp_path / "other.svg"
    assert figure.draw_figure(one) == one
    figure.draw_figure(two)
    figure.draw_figure(other, bits=3, signed=True, step=0.1)
    assert one.read_bytes() == two.read_bytes()
    assert one.read_bytes() != other.read_bytes()
    assert ElementTree.parse(one).getroot().tag.endswith("svg")


@pytest.mark.parametrize(("bits", "signed"), [(2, False), (2, True), (4, True), (8, False)])
def test_png(tmp_path, bits, signed):
    pytest.importorskip("matplotlib")
    path = figure.draw_figure(tmp_path / "f.png", bits=bits, signed=signed)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [p.name for p in tmp_path.iterdir()] == ["f.png"]


def test_both_files(tmp_path):
    pytest.importorskip("matplotlib")
    paths = figure.draw_figures(tmp_path / "new" / "folder", bits=3)
    assert [path.name for path in paths] == ["staircase.svg", "staircase.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    with pytest.raises(UsageError, match="is a file"):
        figure.draw_figures(paths[0])
    with pytest.raises(UsageError, match="from 2 to 8"):
        figure.draw_figures(tmp_path / "other", bits=9)
    assert not (tmp_path / "other").exists()


def test_the_committed_figure_is_current(tmp_path):
    """docs/figures is what `make figure` draws, byte for byte with the same matplotlib."""
    matplotlib = pytest.importorskip("matplotlib")
    committed = Path(__file__).resolve().parents[2] / "docs" / "figures" / "staircase.svg"
    if matplotlib.__version__ != DRAWN_WITH:
        pytest.skip(f"docs/figures was drawn with matplotlib {DRAWN_WITH}")
    assert figure.draw_figure(tmp_path / "f.svg").read_bytes() == committed.read_bytes()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("f.pdf", {}, "svg or .png"),
        ("f", {}, "svg or .png"),
        ("f.svg", {"step": 0.0}, "positive"),
        ("f.svg", {"step": float("nan")}, "positive"),
        ("f.svg", {"bits": 1}, "from 2 to 8"),
    ],
)
def test_wrong_arguments(tmp_path, name, options, message):
    with pytest.raises(UsageError, match=message):
        figure.draw_figure(tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"lsquant\[figure\]"):
        figure.draw_figure(tmp_path / "f.svg")


# ---- LSQ+ ----

# unsigned 2 bits, s = 0.5, b = -0.6: z = round(1.2) = 1, values -0.5 to 1
PLUS_V = [-1.0, -0.5, -0.375, -0.125, 0.0, 0.375, 0.875, 1.0, 1.5]
PLUS_STEP = [0, 0, -0.25, 0.25, 0, 0.25, 0.25, 3, 3]
PLUS_OFFSET = [1, 1, 0, 0, 0, 0, 0, 1, 1]
FIXED_STEP = [-1, -1, -0.25, 0.25, 0, 0.25, 0.25, 2, 2]  # LSQ, where z is a constant


def test_lsq_plus_curves():
    by_step, by_offset = figure.lsq_plus_gradients(torch.tensor(PLUS_V), 0.5, 0, 3, -0.6)
    torch.testing.assert_close(by_step, torch.tensor(PLUS_STEP, dtype=torch.float32), rtol=0, atol=1e-6)
    torch.testing.assert_close(by_offset, torch.tensor(PLUS_OFFSET, dtype=torch.float32), rtol=0, atol=0)


def lines(axes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What is drawn, without the gaps, by what its label begins with."""
    found = {}
    for line in axes.get_lines():
        x, y = (np.asarray(line.get_data()[i], dtype=np.float64) for i in (0, 1))
        found[re.split(r": |, ", line.get_label())[0]] = x[~np.isnan(y)], y[~np.isnan(y)]
    return found


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("signed", "step", "offset"), [(False, 1.0, -2.2), (True, 0.3, 0.5), (True, 1.0, None)])
def test_every_curve_that_is_drawn(bits, signed, step, offset):
    """LSQ, LSQ+, PACT and QIL at all bits, by formulas in NumPy written from their papers."""
    pytest.importorskip("matplotlib")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    drawn = [lines(axes) for axes in figure._figure(low, high, step, offset).axes]
    z = 0 if offset is None else int(np.clip(np.round(-offset / step), low, high))
    bottom, top = (low - z) * step, (high - z) * step  # the clip points
    x, y = next(line for name, line in drawn[0].items() if "clip" in name)
    np.testing.assert_allclose(y, (np.clip(np.round(x / step) + z, low, high) - z) * step, atol=1e-5 * 2**bits)
    assert x.min() < bottom < top < x.max()

    def pick(x, below, between, above):
        return np.where(x <= bottom, below, np.where(x >= top, above, between))

    want = {
        "LSQ": lambda x: pick(x, low - z, np.round(x / step) - x / step, high - z),
        "PACT": lambda x: pick(x, low - z, 0.0, high - z),
        "QIL": lambda x: pick(x, 0.0, ((bottom + top) / 2 - x) / step, 0.0),
        "LSQ+": lambda x: pick(x, low, np.round(x / step) - x / step, high),
    }
    gradients = {name: line for name, line in drawn[1].items() if not name.startswith("_")}
    assert gradients.keys() == want.keys() - (set() if offset is not None else {"LSQ+"})
    for name, (x, y) in gradients.items():
        assert len(x) > 20
        np.testing.assert_allclose(y, want[name](x), atol=2e-5 * 2**bits, err_msg=name)
    assert len(drawn) == (2 if offset is None else 3)
    if offset is not None:
        x, y = drawn[2]["LSQ+"]
        np.testing.assert_array_equal(y, pick(x, 1.0, 0.0, 1.0))


def test_an_offset_that_is_not_finite(tmp_path):
    for call in (lambda: figure.draw_figure(tmp_path / "f.svg", offset=float("inf")),
                 lambda: figure.draw_figures(tmp_path / "new", offset=float("nan"))):  # fmt: skip
        with pytest.raises(UsageError, match="offset must be finite"):
            call()
    assert not list(tmp_path.iterdir())


def test_files_with_an_offset(tmp_path):
    pytest.importorskip("matplotlib")
    paths = figure.draw_figures(tmp_path, bits=3, offset=-2.2)
    plain = figure.draw_figure(tmp_path / "plain.svg", bits=3)
    assert "LSQ+" in paths[0].read_text()
    assert "LSQ+" not in plain.read_text()
    assert paths[1].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
