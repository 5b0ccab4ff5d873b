"""Plots of the report: matplotlib by its object API, drawn as SVG that takes the page's colours.

Curves use the Okabe-Ito colours, told apart by dash as well. Text and axes are drawn in
``currentColor``, so that one drawing serves a light page, a dark page and paper.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spcxr.evaluate.intervals import Interval

Array = NDArray[Any]
Drawn = Literal["default", "steps-pre"]  # how points are joined

# Okabe & Ito 2008, without black (the page may be dark) and yellow (it may be light).
COLOURS = ("#0a84c6", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 3)))
MARKERS = "os^Dv*"
INK = "#010203"  # stands for currentColor until the SVG is written
CURVE_POINTS = 400

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "svg.hashsalt": "spcxr",
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.titlesize": 11,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "text.parse_math": False,  # a label may hold dollar signs
}


@dataclass(frozen=True)
class Band:
    """What is shaded between ``low`` and ``high`` over ``x``, each ``(m,)``."""

    x: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class Curve:
    """One line of a plot: ``x`` and ``y`` ``(n,)``, and optionally an interval band."""

    name: str
    x: Array
    y: Array
    band: Band | None = None


def _figure(width: float = 4.4, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an ``<svg>`` element to stand in a page, its ids unique by content."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    mark = "f" + hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    text = re.sub(r'\bid="', f'id="{mark}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{mark}-", text)
    # the page sets the size; the viewBox keeps the shape
    start, rest = text.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", start) + ">" + rest


def _draw(axes: Axes, curves: Sequence[Curve], style: Drawn = "default") -> None:
    for number, curve in enumerate(curves):
        colour = COLOURS[number % len(COLOURS)]
        if band := curve.band:
            axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.18, lw=0)
        axes.plot(
            *_thinned(curve.x, curve.y),
            color=colour,
            linestyle=DASHES[number % len(DASHES)],
            drawstyle=style,
            label=curve.name,
        )


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    """At most `CURVE_POINTS` of the points, ends included: the page need not hold 10^5."""
    if len(x) <= CURVE_POINTS:
        return x, y
    kept = np.unique(np.linspace(0, len(x) - 1, CURVE_POINTS).round().astype(int))
    return x[kept], y[kept]


def loss_curves(curves: Sequence[Curve], *, x_label: str, y_label: str) -> str:
    """Training or validation curves over epochs or steps -> SVG text.

    >>> curve = Curve("pretraining", np.arange(3), np.array([0.9, 0.5, 0.4]))
    >>> loss_curves([curve], x_label="epoch", y_label="loss").startswith("<svg")
    True
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        _draw(axes, curves)
        axes.set(xlabel=x_label, ylabel=y_label)
        if len(curves) > 1:
            _legend(axes, len(curves))
        return _svg(figure)


def roc(curves: Sequence[Curve]) -> str:
    """ROC curves (x false, y true positive rate), with interval bands where given -> SVG text."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(4.2, 4.2)
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, lw=0.8, ls=":")
        _draw_rates(axes, curves)
        axes.set_xlabel("1 − specificity (false positive rate)")
        axes.set_ylabel("sensitivity (true positive rate)")
        return _svg(figure)


def precision_recall(curves: Sequence[Curve]) -> str:
    """Precision (y) over recall (x) -> SVG text.

    In steps, each point's precision back to the recall before it: a straight line between points
    would promise what no threshold gives (Davis and Goadrich, ICML 2006), and the area below would
    not be the average precision.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(4.2, 4.2)
        _draw_rates(axes, curves, "steps-pre")
        axes.set(xlabel="recall (sensitivity)", ylabel="precision")
        return _svg(figure)


def _draw_rates(axes: Axes, curves: Sequence[Curve], style: Drawn = "default") -> None:
    """Curves between 0 and 1 either way, in a square, with their names."""
    _draw(axes, curves, style)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), aspect="equal")
    _legend(axes, len(curves))


def _legend(axes: Axes, count: int) -> None:
    """Below the plot, where it covers no curve; long names stand under each other."""
    long = any(len(name) > 22 for name in axes.get_legend_handles_labels()[1])
    axes.figure.legend(loc="outside lower center", ncols=1 if long else min(count, 2))


def reliability(curves: Sequence[Curve], counts: Sequence[Array]) -> str:
    """Share that is true (y) over mean probability (x), and below it rows a bin -> SVG text.

    Parameters
    ----------
    curves
        one point a bin that holds rows, as `calibration.reliability_curve` gives them.
    counts
        the rows of each curve's bins, ``(m,)``.

    >>> curve = Curve("covid", np.array([0.2, 0.8]), np.array([0.1, 0.7]))
    >>> "rows" in reliability([curve], [np.array([30, 10])])
    True
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 5.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3.4, 1))
        for axes in (upper, lower):
            axes.grid(True)
            axes.set_axisbelow(True)
        upper.plot([0, 1], [0, 1], color=INK, alpha=0.4, lw=0.8, ls=":")
        for number, (curve, count) in enumerate(zip(curves, counts, strict=True)):
            look: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "linestyle": DASHES[number % len(DASHES)],
                "marker": MARKERS[number % len(MARKERS)],
                "markersize": 4,
            }
            upper.plot(curve.x, curve.y, label=curve.name, **look)
            lower.plot(curve.x, count, **look)
        upper.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="share that is true")
        # bins of one row and of thousands stand side by side
        lower.set(yscale="log", xlabel="mean probability of a bin", ylabel="rows")
        lower.set_ylim(bottom=0.8)
        lower.yaxis.set_major_formatter("{x:g}")
        _legend(upper, len(curves))
        return _svg(figure)


def confusion(matrix: Array, names: Sequence[str]) -> str:
    """Confusion matrix ``(K, K)``: counts, coloured by the share of the true class -> SVG text."""
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    longest = max(len(name) for name in names)
    slanted = len(names) > 3 or longest > 10
    side = max(2.8, 0.75 * len(names) + 1.0)
    # Room for the names: without it a long one leaves nothing for the cells.
    more = 0.1 * max(longest - 10, 0)
    with matplotlib.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure, axes = _figure(side + more, side - 0.35 + 0.6 * more)
        axes.grid(False)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            axes.text(
                column,
                row,
                f"{count:.0f}\n{share[row, column]:.0%}",
                ha="center",
                va="center",
                color="white" if share[row, column] > 0.5 else "black",
            )
        ticks = range(len(names))
        axes.set_xticks(ticks, names)
        if slanted:
            axes.tick_params("x", rotation=30)
            for tick in axes.get_xticklabels():
                tick.set(ha="right", rotation_mode="anchor")
        axes.set_yticks(ticks, names)
        axes.tick_params(length=0)
        axes.set(xlabel="predicted", ylabel="true")
        return _svg(figure)


def histogram(series: Mapping[str, Array], *, x_label: str, bins: int = 20) -> str:
    """How many images (y) have a value between 0 and 1 (x), a line each of ``series`` -> SVG text.

    The bins begin at the lowest bin edge that holds a value; NaN is left out.

    >>> "images" in histogram({"lung": np.array([0.9, 0.95, np.nan])}, x_label="Dice")
    True
    """
    known = {name: values[~np.isnan(values)] for name, values in series.items()}
    lowest = min((float(v.min()) for v in known.values() if len(v)), default=0.0)
    edges = np.linspace(np.floor(10 * lowest) / 10 if lowest < 1 else 0.9, 1.0, bins + 1)
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        for number, (name, values) in enumerate(known.items()):
            counts, _ = np.histogram(values, edges)
            axes.stairs(
                counts,
                edges,
                color=COLOURS[number % len(COLOURS)],
                linestyle=DASHES[number % len(DASHES)],
                linewidth=1.8,
                label=name,
                fill=False,
            )
        axes.set(xlabel=x_label, ylabel="images")
        axes.locator_params(axis="x", nbins=6)
        axes.locator_params(axis="y", integer=True)
        axes.set_ylim(bottom=0)
        if len(series) > 1:
            _legend(axes, len(series))
        return _svg(figure)


def over_labels(curves: Sequence[Curve], *, x_label: str, y_label: str) -> str:
    """A figure (y) over how many were labelled (x, logarithmic), with bands -> SVG text.

    >>> curve = Curve("pretrained", np.array([5, 50]), np.array([0.8, 0.9]))
    >>> "pretrained" in over_labels([curve], x_label="images", y_label="Dice")
    True
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure()
        _draw(axes, curves)
        for number, line in enumerate(axes.lines):
            line.set(marker=MARKERS[number % len(MARKERS)], markersize=5)
        axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
        ticks = sorted({float(x) for curve in curves for x in curve.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        _legend(axes, len(curves))
        return _svg(figure)


def intervals(
    rows: Mapping[str, Mapping[str, Interval]], *, x_label: str, mark: float | None = None
) -> str:
    """Values and intervals side by side: ``rows[row][series]`` -> SVG text.

    ``mark``: where a dotted line is drawn, if anywhere, such as 0 for differences.

    >>> found = Interval(0.8, 0.7, 0.9, 50, 40, 0)
    >>> "AUROC" in intervals({"covid": {"pretrained": found}}, x_label="AUROC")
    True
    """
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    with matplotlib.rc_context(STYLE):
        longest = max((len(name) for name in rows), default=0)
        width = 4.6 + 0.08 * max(longest - 24, 0)  # a set may be named by its path
        most = max((len(row) for row in rows.values()), default=1)
        figure, axes = _figure(width, 1.0 + 0.26 * len(rows) * max(most, 1))
        for number, name in enumerate(series):
            own = [(k, row) for k, row in enumerate(rows.values()) if name in row]
            found = [row[name] for _, row in own]
            low, high = np.array([[f.low, f.high] for f in found]).T
            # The bars of a row stand around its line, however many it has.
            beside = [list(row).index(name) - (len(row) - 1) / 2 for _, row in own]
            height = np.array([k for k, _ in own]) + 0.66 / most * np.array(beside)
            # The bar by itself: an interval need not hold its value.
            axes.errorbar(
                (low + high) / 2,
                height,
                xerr=(high - low) / 2,
                fmt="none",
                ecolor=COLOURS[number % len(COLOURS)],
                capsize=3,
            )
            axes.plot(
                [f.value for f in found],
                height,
                MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                label=name,
            )
        if mark is not None:
            axes.axvline(mark, color=INK, alpha=0.4, lw=0.8, ls=":")
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(x_label)
        if len(series) > 1:
            _legend(axes, len(series))
        return _svg(figure)
