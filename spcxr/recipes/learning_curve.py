"""A figure over how much was labelled, for runs that began differently: what pretraining spares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.evaluate import pages, plots
from spcxr.evaluate.report import Cell, Picture, Section, Table

Array = NDArray[Any]
METRICS = "metrics.json"


@dataclass(frozen=True)
class Point:
    """One run: training images with labels or masks, and what it reached on its test rows."""

    labelled: int
    value: float
    tested: int


def read_point(run: Path, metric: str) -> Point:
    """The point of a finished run of `classify` or `segment`.

    Of several structures the mean over them.

    Raises
    ------
    SpcxrError
        the run is not finished, has no test rows, or no such metric.
    """
    try:
        found = json.loads((run / METRICS).read_text())
        labelled, tested = int(found["rows"]["train"]), int(found["rows"]["test"])
        test = found["test"]
    except FileNotFoundError as error:
        raise SpcxrError(f"{run}: no {METRICS}; give the folders of finished runs") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SpcxrError(
            f"{run / METRICS}: no figures of test rows; train with --test-splits"
        ) from error
    parts = [test["overall"]] if "overall" in test else list(test.values())
    values = [part[metric]["value"] for part in parts if metric in part]
    if not values:
        known = ", ".join(parts[0]) if parts else "none"
        raise SpcxrError(f"{run}: no figure {metric!r}; it has {known}")
    known_values = [value for value in values if value is not None]
    mean = float(np.mean(known_values)) if known_values else float("nan")
    return Point(labelled, mean, tested)


def runs_in(folder: str | Path) -> list[Path]:
    """The runs that a folder is: itself, or one for each seed (``--seeds``)."""
    folder = Path(folder)
    return sorted(path.parent for path in folder.glob(f"seed-*/{METRICS}")) or [folder]


def curve(points: Sequence[Point], name: str) -> plots.Curve:
    """The mean of the runs at each number of labelled images; the band is their range.

    >>> made = curve([Point(5, 0.5, 9), Point(5, 0.7, 9), Point(50, 0.9, 9)], "pretrained")
    >>> made.x.tolist(), made.y.round(3).tolist(), made.band.high.tolist()
    ([5, 50], [0.6, 0.9], [0.7, 0.9])
    """
    labelled = np.array([p.labelled for p in points])
    values = np.array([p.value for p in points])
    x = np.unique(labelled)
    groups = [values[labelled == count] for count in x]
    low, high = (np.array([end(group) for group in groups]) for end in (np.min, np.max))
    return plots.Curve(
        name, x, np.array([group.mean() for group in groups]), plots.Band(x, low, high)
    )


def learning_curve_section(
    series: Mapping[str, Sequence[str | Path]], metric: str = "dice"
) -> Section:
    """A figure of the test rows over the labelled training images, a curve each of ``series``.

    Parameters
    ----------
    series
        name (``pretrained``, ``from scratch``) -> run folders; one of several seeds counts as so
        many runs. All are to be tested on the same rows; that they are so many is looked at.

    Raises
    ------
    SpcxrError
        a folder that is no finished run, runs without the metric, or of other numbers of test rows.
    """
    read = {
        name: [read_point(run, metric) for folder in folders for run in runs_in(folder)]
        for name, folders in series.items()
    }
    if not all(read.values()):
        raise SpcxrError("a series without a run; give each of them a folder at least")
    if len(tested := {point.tested for points in read.values() for point in points}) > 1:
        counts = " and ".join(map(str, sorted(tested)))
        raise SpcxrError(f"the runs were tested on {counts} rows; give runs of the same test rows")
    curves = {name: curve(points, name) for name, points in read.items()}
    title = pages.TITLES.get(metric, metric)
    said = "; ".join(
        f"{name}: {', '.join(f'{v:.3f} with {x}' for x, v in zip(c.x, c.y, strict=True))}"
        for name, c in curves.items()
    )
    drawn = plots.over_labels(
        list(curves.values()), x_label="labelled training images", y_label=title
    )
    caption = f"{title} of the test rows by labelled training images; bands: the range over runs."
    return Section(
        "Few labels",
        text="The same test rows, by how many labelled images the model was trained on.",
        tables=[_table(read, curves, title)],
        pictures=[Picture(caption, f"{title} by labelled images. {said}.", svg=drawn)],
    )


def _table(
    read: Mapping[str, Sequence[Point]], curves: Mapping[str, plots.Curve], title: str
) -> Table:
    """One row a number of labelled images: mean, range and number of the runs of each series."""
    counts = sorted({point.labelled for points in read.values() for point in points})
    rows: list[list[Cell]] = []
    for count in counts:
        row: list[Cell] = [str(count)]
        for points in read.values():
            values = [p.value for p in points if p.labelled == count]
            row.append(_said(values))
        rows.append(row)
    note = "Mean over runs, their range and number: runs differ in seed and in who was labelled."
    return Table(f"{title} by labelled images", ["labelled", *curves], rows, note)


def _said(values: Sequence[float]) -> str | None:
    """``0.950 (0.940 to 0.960, 3 runs)``."""
    if not values:
        return None
    mean = f"{np.mean(values):.3f}"
    if len(values) == 1:
        return f"{mean} (1 run)"
    return f"{mean} ({min(values):.3f} to {max(values):.3f}, {len(values)} runs)"
