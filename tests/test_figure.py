"""The curves of the figure against literal numbers, and the files it writes."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

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
    committed = Path(__file__).resolve().parents[1] / "docs" / "figures" / "staircase.svg"
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
