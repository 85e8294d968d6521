"""The figure of LSQ and LSQ+: the staircase and, beneath it, the gradient of the step, beside PACT's and QIL's.

After Figure 2 of LSQ (Esser et al., ICLR 2020, arXiv:1902.08153). All three gradients are given per step `s`: where a
method learns another quantity that fixes the width of the quantized domain, the chain rule carries it over.
With LSQ+'s offset the codes are shifted by z: `v_hat = clip(round(v/s), q_min - z, q_max - z) * s`. So the curves of
LSQ (z fixed), PACT and QIL are the functions below between these bounds; LSQ+ differs from LSQ outside.
LSQ+: Bhalgat et al., arXiv:2004.09576.  PACT: Choi et al., arXiv:1805.06085.
QIL: Jung et al., CVPR 2019, arXiv:1808.05779.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lsquant import reference
from lsquant._util.errors import UsageError
from lsquant._util.files import atomic_write
from lsquant._util.optional import require

# Okabe and Ito's palette: told apart with any colour vision, and the line styles differ as well
BLUE, ORANGE, GREEN, YELLOW, GREY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#8a8a8a"
DOTTED = {"color": GREY, "linewidth": 0.9, "linestyle": (0, (1.5, 2.5))}
MOST_MARKED = 32  # transition points; beyond that their marks would run into each other


def transition_points(step: float, q_min: int, q_max: int) -> list[float]:
    """Return where the code changes: `(q + 1/2) * step` for q from q_min to q_max - 1, in ascending order."""
    return [(q + 0.5) * step for q in range(q_min, q_max)]


def staircase(v: Tensor, step: float, q_min: int, q_max: int) -> Tensor:
    """Compute `v_hat = clip(round(v/s), q_min, q_max) * s`. v: (n,) float32. Returns (n,) float32."""
    return reference.fake_quantize(v, torch.tensor([step]), q_min, q_max, 1.0)


def lsq_step_gradient(v: Tensor, step: float, q_min: int, q_max: int) -> Tensor:
    """Compute `d v_hat / d s` of LSQ without g: `round(v/s) - v/s` inside, q_min below, q_max above.

    By autograd of `reference.fake_quantize`, each element with its own step. v: (n,) float32. Returns (n,).
    """
    steps = torch.full_like(v, step, requires_grad=True)
    reference.fake_quantize(v, steps, q_min, q_max, 1.0, axis=0).sum().backward()
    assert steps.grad is not None
    return steps.grad


def lsq_plus_gradients(v: Tensor, step: float, q_min: int, q_max: int, offset: float) -> tuple[Tensor, Tensor]:
    """Compute `d v_hat / d s` and `d v_hat / d b` of LSQ+ without g, by autograd of `reference.fake_quantize`.

    By the step: `round(v/s) - v/s` inside, q_min below, q_max above. By the offset b: 0 inside, 1 outside.
    v: (n,) float32. Returns (n,) and (n,).
    """
    steps, offsets = (torch.full_like(v, value, requires_grad=True) for value in (step, offset))
    reference.fake_quantize(v, steps, q_min, q_max, 1.0, axis=0, offset=offsets).sum().backward()
    assert steps.grad is not None
    assert offsets.grad is not None
    return steps.grad, offsets.grad


def pact_step_gradient(v: Tensor, step: float, q_min: int, q_max: int) -> Tensor:
    """Compute the step gradient of PACT: 0 inside, q_min below, q_max above.

    PACT learns the clip point `alpha = q_max * s` with `d v_hat / d alpha = 1 where v >= alpha, else 0`, and
    `d alpha / d s = q_max`. The lower side (signed values) is the mirror image, as the LSQ paper writes it.
    """
    vs = v / step
    return torch.where(vs >= q_max, float(q_max), torch.where(vs <= q_min, float(q_min), 0.0))


def qil_step_gradient(v: Tensor, step: float, q_min: int, q_max: int) -> Tensor:
    """Compute the step gradient of QIL: `(c - v) / s` between the clip points, 0 beyond; c is the middle of the two.

    QIL maps the interval of centre c and width W to 0 .. 1 before it rounds: `t = (v - c) / W + 1/2`. In the units of
    v_hat, W times that, `d v_hat / d W = (c - v) / W`; with `W = (q_max - q_min) * s`, `d W / d s = q_max - q_min`.
    """
    vs = v / step
    return torch.where((vs > q_min) & (vs < q_max), (q_min + q_max) / 2 - vs, 0.0)


def pieces(cuts: Sequence[float], step: float) -> list[Tensor]:
    """Split the range of v at the cuts, so that no line is drawn across a jump.

    cuts: in steps, ascending

    Returns a piece between each two cuts: (9,) float32, its ends 1e-4 steps inside the cuts.
    """
    return [torch.linspace(low + 1e-4, high - 1e-4, 9) * step for low, high in pairwise(cuts)]


def draw_figure(
    path: str | os.PathLike[str], *, bits: int = 2, signed: bool = False, step: float = 1.0, offset: float | None = None
) -> Path:
    """Draw the figure to `path`, as SVG or PNG by its suffix; the same arguments give the same SVG bytes.

    offset: LSQ+'s b, in the units of v; with it LSQ+'s gradients are drawn as well

    Raises: UsageError for another suffix, bits outside 2 .. 8, a step that is not positive or an offset that is not
    finite; MissingExtra without matplotlib; MissingFile if the folder does not exist.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise UsageError(f"a figure is written as .svg or .png, not as {path.name!r}")
    if not 0.0 < step < float("inf"):
        raise UsageError(f"the step must be positive and finite, not {step}")
    _check(bits, signed, offset)
    matplotlib = require("matplotlib", extra="figure")
    style = {
        "svg.hashsalt": "lsquant",
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#333333",
        "axes.linewidth": 0.9,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = _figure(*reference.bounds(bits, signed), step, offset)
        with atomic_write(path) as temporary:
            metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            figure.savefig(temporary, format=kind, dpi=160, metadata=metadata)
    return path


def draw_figures(
    folder: str | os.PathLike[str],
    *,
    bits: int = 2,
    signed: bool = False,
    step: float = 1.0,
    offset: float | None = None,
) -> list[Path]:
    """Draw `staircase.svg` and `staircase.png` into `folder`, which is made if it does not exist; return the paths.

    Raises: as `draw_figure`; a wrong argument leaves no folder behind.
    """
    _check(bits, signed, offset)
    require("matplotlib", extra="figure")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder for the figures")
    folder.mkdir(parents=True, exist_ok=True)
    names = ("staircase.svg", "staircase.png")
    return [draw_figure(folder / name, bits=bits, signed=signed, step=step, offset=offset) for name in names]


def _check(bits: int, signed: bool, offset: float | None) -> None:
    reference.bounds(bits, signed)
    if offset is not None and not math.isfinite(offset):
        raise UsageError(f"the offset must be finite, not {offset}")


def _figure(q_min: int, q_max: int, step: float, offset: float | None) -> Any:
    """Draw the panels as a matplotlib Figure: two, and a third for the gradient of an offset."""
    codes, z = (q_min, q_max), 0
    if offset is not None:
        z = int(reference.zero_point(torch.tensor([step]), torch.tensor([offset]), *codes))
        q_min, q_max = q_min - z, q_max - z
    parts = require("matplotlib.figure", extra="figure")
    size, heights = ((7.6, 7.0), [1.0, 1.1]) if offset is None else ((7.6, 9.2), [1.0, 1.1, 0.4])
    figure = parts.Figure(figsize=size, layout="constrained", facecolor="white")
    top, middle, *more = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    margin = max(1.0, 0.15 * (q_max - q_min))
    left, right = q_min - margin, q_max + margin
    points = transition_points(step, q_min, q_max)
    marks = len(points) <= MOST_MARKED
    for axes in (top, middle, *more):
        axes.set_axisbelow(True)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        for low, high in ((left, q_min), (q_max, right)):
            axes.axvspan(low * step, high * step, color="#f3f3f3", linewidth=0, zorder=-1)
        for point in points if marks else ():
            axes.axvline(point, zorder=0, **DOTTED)
    steps = [left, *(point / step for point in points), right]
    clips = [left, q_min, q_max, right]
    _draw_staircase(top, pieces(steps, step), marks, step, q_min, q_max, z)
    cut = pieces(sorted({*steps, *clips}), step)
    if offset is not None:
        found = [lsq_plus_gradients(part, step, *codes, offset) for part in cut]
        style = {"color": YELLOW, "linewidth": 1.6, "zorder": 5}
        _plot(middle, cut, [by_step for by_step, _ in found], "LSQ+: these, and codes", **style)
        _plot(more[0], cut, [by_offset for _, by_offset in found], f"LSQ+, with $b$ = {offset:g}", **style)
        _title(more[0], "The gradient of the offset", r"$\partial \hat v / \partial b$")
    _draw_gradients(middle, cut, pieces(clips, step), step, q_min, q_max)
    top.set_xlim(left * step, right * step)
    (middle, *more)[-1].set_xlabel("value $v$" if step == 1.0 else f"value $v$, with step $s$ = {step:g}")
    figure.align_ylabels()
    return figure


def _draw_staircase(axes: Any, parts: list[Tensor], marks: bool, step: float, q_min: int, q_max: int, z: int) -> None:
    """Draw the top panel: v_hat over v.

    A value on a transition point goes to the filled end, of even v_hat/s, not to the open one.
    """
    ends = [float(parts[0][0]), float(parts[-1][-1])]
    axes.plot(ends, ends, color=GREY, linewidth=1.2, linestyle=(0, (6, 3)), label="$v$ itself")
    inner = "clip( round($v/s$) + z ) $-$ z" if z else "clip( round($v/s$) )"
    label = rf"$\hat v = s\,\cdot$ {f'( {inner} )' if z else inner}"
    _plot(axes, parts, [staircase(part, step, q_min, q_max) for part in parts], label, color=BLUE, linewidth=2.6)
    if marks:
        for q, point in zip(range(q_min, q_max), transition_points(step, q_min, q_max), strict=True):
            for code in (q, q + 1):
                face = "white" if code % 2 else BLUE
                axes.plot(point, code * step, "o", markersize=5.5, color=BLUE, markerfacecolor=face)
        axes.plot([], [], label="transition points", **DOTTED)
    shift = f", zero point {z}" if z else ""
    _title(
        axes, f"The staircase: codes {q_min + z} to {q_max + z}{shift}; shaded: clipped", r"quantized value $\hat v$"
    )


def _draw_gradients(axes: Any, steps: list[Tensor], clips: list[Tensor], step: float, q_min: int, q_max: int) -> None:
    """Draw the bottom panel: three step gradients.

    LSQ's is cut at transition and clip points, the others at the clip points.
    """
    qil = {"color": GREEN, "linewidth": 1.9, "zorder": 2, "linestyle": (0, (6, 1.5, 1, 1.5))}
    pact = {"color": ORANGE, "linewidth": 1.9, "zorder": 4, "linestyle": (0, (3.5, 2))}
    curves = [
        ("LSQ: the transition points", lsq_step_gradient, steps, {"color": BLUE, "linewidth": 2.8, "zorder": 3}),
        ("QIL: the clip points", qil_step_gradient, clips, qil),
        ("PACT: the outside", pact_step_gradient, clips, pact),
    ]
    for name, curve, parts, style in curves:
        _plot(axes, parts, [curve(part, step, q_min, q_max) for part in parts], name, **style)
    _title(axes, "The gradient of the step, and what it sees", r"step gradient $\partial \hat v / \partial s$")


def _plot(axes: Any, parts: list[Tensor], values: list[Tensor], label: str, **style: Any) -> None:
    """Draw a line that is broken between the pieces: NaN is not drawn."""
    gap = torch.tensor([torch.nan])
    x, y = (torch.cat([t for piece in pieces for t in (piece, gap)]).numpy() for pieces in (parts, values))
    axes.plot(x, y, label=label, solid_capstyle="butt", **style)


def _title(axes: Any, title: str, ylabel: str) -> None:
    """Draw a bold title and beneath it the legend in rows of three, above the axes, clear of all curves."""
    pad = 28 if len(axes.get_legend_handles_labels()[0]) < 4 else 49
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=pad)
    style = {"frameon": False, "borderaxespad": 0.4, "borderpad": 0.0, "columnspacing": 1.5, "handlelength": 1.8}
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, **style)
