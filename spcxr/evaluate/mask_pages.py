"""The parts of a report that are about masks: tables by structure, the histogram of Dice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.evaluate import plots
from spcxr.evaluate.intervals import Interval
from spcxr.evaluate.mask_summary import IN_MM, METRICS, MaskSummary
from spcxr.evaluate.overlays import legend_of, side_by_side
from spcxr.evaluate.pages import CURVES_PER_PLOT, OF_STRUCTURE, TITLES
from spcxr.evaluate.report import Cell, Picture, Table

Array = NDArray[Any]

DISTANCES_SAID = (
    "HD95 and Hausdorff: the 95th percentile and the largest of the distances between the borders, "
    "the worse of both ways; surface distance: their mean over both borders (MONAI's definitions)."
)
AT_THE_DETECTOR = "Millimetres are by the spacing in the file's header, often that at the detector."


def structure_tables(summary: MaskSummary) -> list[Table]:
    """How well each structure is found, one row each: overlap and distances in px; in mm."""
    note = DISTANCES_SAID
    if unmeasured := sum(e.missed + e.false_alarm for e in summary.empties.values()):
        note += (
            f" In {unmeasured} masks the structure is missed, or found where there is none: Dice "
            "and IoU are 0, and the distances, which have no bound, leave them out."
        )
    in_mm = [key for key in IN_MM if key in summary.overall]
    made = [_table("By structure", summary, [k for k in METRICS if k not in IN_MM], note)]
    if in_mm:
        made.append(_table("By structure: millimetres", summary, in_mm, AT_THE_DETECTOR))
    return made


def _table(caption: str, summary: MaskSummary, keys: Sequence[str], note: str) -> Table:
    rows: list[list[Cell]] = [
        [name, found[keys[0]].n_rows, *(found[key] for key in keys)]
        for name, found in summary.by_structure.items()
    ]
    if len(rows) > 1:
        rows.append(["mean", None, *(summary.overall[key] for key in keys)])
    return Table(caption, ["structure", "images", *(TITLES[key] for key in keys)], rows, note)


def group_tables(
    groups: Mapping[str, Mapping[str, Mapping[str, Interval]]], names: Sequence[str]
) -> Iterator[Table]:
    """For each column the Dice of each structure in its groups; nothing of one structure alone."""
    for column, found in groups.items() if len(names) > 1 else ():
        rows: list[list[Cell]] = [
            [group, *(of[f"{OF_STRUCTURE}{name}"] for name in names)] for group, of in found.items()
        ]
        columns = [column, *(f"{OF_STRUCTURE}{name}" for name in names)]
        yield Table(f"By {column}: structures", columns, rows)


def sentences(summary: MaskSummary, n_rows: int) -> Iterator[str]:
    """What is to be said of empty masks and unknown pixel sizes."""
    several = len(summary.names) > 1
    for name, found in summary.empties.items():
        of = f" ({name})" if several else ""
        if found.both:
            yield (
                f"In {found.both} of them mask and prediction are both empty: not in the mean{of}."
            )
        if found.missed:
            yield f"In {found.missed} nothing is found though there is a mask{of}."
        if found.false_alarm:
            yield f"In {found.false_alarm} something is found though the mask is empty{of}."
        if found.unknown:
            yield f"In {found.unknown} nothing is known of the mask{of}."
    if summary.without_spacing == n_rows:
        yield "The size of their pixels is not known: no distance in millimetres."
    elif summary.without_spacing:
        yield (
            f"The size of the pixels of {summary.without_spacing} is not known: "
            "not in the means of millimetres."
        )


def dice_histograms(dice: Array, names: Sequence[str]) -> list[Picture]:
    """How many images have which Dice ``(n, K)``, NaN left out; `CURVES_PER_PLOT` to a plot."""
    made = []
    there = [k for k in range(len(names)) if not np.isnan(dice[:, k]).all()]
    for part in (there[i : i + CURVES_PER_PLOT] for i in range(0, len(there), CURVES_PER_PLOT)):
        series = {names[k]: dice[:, k] for k in part}
        said = "; ".join(f"{name} {_quartiles(values)}" for name, values in series.items())
        made.append(
            Picture(
                f"Images by their Dice: {', '.join(series)}.",
                f"Histogram of Dice. {said}.",
                svg=plots.histogram(series, x_label="Dice"),
            )
        )
    return made


def _quartiles(values: Array) -> str:
    low, middle, high = np.nanpercentile(values, [25, 50, 75])
    return f"median {middle:.3f}, half of the images between {low:.3f} and {high:.3f}"


def overlay_picture(
    examples: Sequence[tuple[str, float, Array, Array]], what: str, names: Sequence[str] = ()
) -> Picture:
    """Examples ``(caption, Dice, image, overlay)``: each a row, plain and with its outlines.

    ``names``: the structures that have colours of their own, where there are several.

    >>> tile = np.zeros((8, 8), np.uint8)
    >>> overlay_picture([("best", 0.97, tile, tile)], "lungs").alt
    'Outlines of lungs over radiographs: best, Dice 0.970.'
    """
    said = "; ".join(f"{name}, Dice {value:.3f}" for name, value, _, _ in examples)
    how = "the prediction in orange, the true mask in blue"
    if len(names) > 1:
        how = "a line around the prediction, a shade over the true mask, a colour each"
    return Picture(
        f"{what}: {how}; {said}. The upper row shows the images alone.",
        f"Outlines of {what} over radiographs: {said}.",
        png=side_by_side(examples, legend_of(names)),
    )
