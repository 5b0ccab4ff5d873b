"""The sections of a report, built from summaries: what `evaluate` and `demo` put on their page."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import spcxr
from spcxr.evaluate import metrics, plots
from spcxr.evaluate.intervals import Interval, resample_counts
from spcxr.evaluate.overlays import side_by_side
from spcxr.evaluate.report import Cell, Picture, Table
from spcxr.evaluate.summary import ClassSummary, usable_rows

Array = NDArray[Any]

TITLES = {
    "macro_auroc": "mean AUROC",
    "macro_average_precision": "mean average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "mean F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "dice": "Dice",
    "iou": "IoU",
}
CURVES_PER_PLOT = 3
FEW_CASES = 10  # below this, resampling cannot know how varied the cases are
BAND_RESAMPLES = 500
FALSE_POSITIVE_RATES = np.linspace(0, 1, 101)


def comparison(
    caption: str, results: Mapping[str, Mapping[str, Interval]], *, first: str = "", note: str = ""
) -> Table:
    """One row a result (a model, a test set), one column a metric.

    >>> found = {"auroc": Interval(0.8, 0.7, 0.9, 50, 40, 0)}
    >>> comparison("Test", {"pretrained": found, "scratch": found}).columns
    ['', 'AUROC']
    """
    keys = list(dict.fromkeys(key for found in results.values() for key in found))
    rows: list[list[Cell]] = [
        [name, *(found.get(key) for key in keys)] for name, found in results.items()
    ]
    undefined = max(
        (i.n_undefined for found in results.values() for i in found.values()), default=0
    )
    if undefined:
        note += (
            f" Up to {undefined} resamples held no case of a class and are left out of an interval."
        )
    return Table(caption, [first, *(TITLES.get(key, key) for key in keys)], rows, note.strip())


def class_table(caption: str, summary: ClassSummary) -> Table:
    """The metrics of each class, with how many positive rows stand behind them."""
    keys = ("auroc", "average_precision", "sensitivity", "specificity")
    rows: list[list[Cell]] = []
    for name in summary.names:
        positive, known = summary.positives[name]
        found = summary.by_class[name]
        rows.append(
            [
                name,
                f"{positive}\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}{known}",
                *(found[key] for key in keys),
            ]
        )
    if summary.threshold is None:
        note = "Sensitivity and specificity: the class of the highest probability is called."
    else:
        note = f"Sensitivity and specificity at a probability of {summary.threshold:g}."
    if summary.left_out:
        note += (
            f" Not in the means, for want of positive or negative rows: "
            f"{', '.join(summary.left_out)}."
        )
    few = [
        name
        for name, (positive, known) in summary.positives.items()
        if 0 < min(positive, known - positive) < FEW_CASES
    ]
    if few:
        note += (
            f" Fewer than {FEW_CASES} positive or negative rows, so the interval is too narrow "
            f"to trust: {', '.join(few)}."
        )
    return Table(caption, ["class", "positive", *(TITLES[key] for key in keys)], rows, note)


def class_plots(
    summary: ClassSummary, labels: Array, scores: Array, patients: Array, *, seed: int = 0
) -> list[Picture]:
    """ROC with interval bands, precision-recall, and the confusion matrix of one test set.

    Parameters
    ----------
    summary, labels, scores, patients
        as given to and made by `summarise_classes`.
    """
    kept = usable_rows(labels, multilabel=summary.multilabel)
    truth, score, who = labels[kept], scores[kept], np.asarray(patients)[kept]
    usable = [k for k, name in enumerate(summary.names) if name not in summary.left_out]
    pictures = []
    for start in range(0, len(usable), CURVES_PER_PLOT):
        part = usable[start : start + CURVES_PER_PLOT]
        names = ", ".join(summary.names[k] for k in part)
        curves = [_roc(summary, k, truth[:, k], score[:, k], who, seed) for k in part]
        values = "; ".join(
            f"{summary.names[k]} {summary.by_class[summary.names[k]]['auroc']}" for k in part
        )
        pictures.append(
            Picture(
                f"ROC of {names}; the bands are 95 % intervals at each false positive rate.",
                f"ROC curves. AUROC: {values}.",
                svg=plots.roc(curves),
            )
        )
        curves = [
            plots.Curve(summary.names[k], *metrics.precision_recall_curve(truth[:, k], score[:, k]))
            for k in part
        ]
        values = "; ".join(
            f"{summary.names[k]} {summary.by_class[summary.names[k]]['average_precision']}"
            for k in part
        )
        pictures.append(
            Picture(
                f"Precision over recall of {names}.",
                f"Precision-recall curves. Average precision: {values}.",
                svg=plots.precision_recall(curves),
            )
        )
    if summary.confusion is not None:
        pictures.append(confusion_picture(summary.confusion, summary.names))
    return pictures


def _roc(
    summary: ClassSummary, k: int, truth: Array, score: Array, patients: Array, seed: int
) -> plots.Curve:
    """One class's curve, with the pointwise interval band of its resamples."""
    known = ~np.isnan(truth)
    y, s = truth[known], score[known]
    read = [
        metrics.sensitivity_at(y, s, FALSE_POSITIVE_RATES, counts)
        for counts in resample_counts(patients[known], n=BAND_RESAMPLES, seed=seed)
    ]
    drawn = np.concatenate(read)
    drawn = drawn[~np.isnan(drawn).any(1)]
    name = summary.names[k]
    area = summary.by_class[name]["auroc"].value
    fpr, tpr = metrics.roc_curve(y, s)
    if len(drawn) == 0:
        return plots.Curve(f"{name} ({area:.3f})", fpr, tpr)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    band = plots.Band(FALSE_POSITIVE_RATES, low, high)
    return plots.Curve(f"{name} ({area:.3f})", fpr, tpr, band)


def confusion_picture(matrix: Array, names: Sequence[str]) -> Picture:
    """The confusion matrix as a picture whose alternative text holds every count."""
    said = "; ".join(
        f"true {name}: "
        + ", ".join(f"{n:.0f} called {guess}" for n, guess in zip(row, names, strict=True))
        for name, row in zip(names, matrix, strict=True)
    )
    return Picture(
        "Confusion matrix: counts, and the share of the true class.",
        f"Confusion matrix. {said}.",
        svg=plots.confusion(matrix, names),
    )


def overlay_picture(examples: Sequence[tuple[str, float, Array, Array]], what: str) -> Picture:
    """Examples ``(caption, Dice, image, overlay)``: each a row, plain and with its outlines.

    >>> tile = np.zeros((8, 8), np.uint8)
    >>> overlay_picture([("best", 0.97, tile, tile)], "lungs").alt
    'Outlines of lungs over radiographs: best, Dice 0.970.'
    """
    said = "; ".join(f"{name}, Dice {value:.3f}" for name, value, _, _ in examples)
    return Picture(
        f"{what}: the prediction in orange, the true mask in blue; {said}. "
        "The upper row shows the images alone.",
        f"Outlines of {what} over radiographs: {said}.",
        png=side_by_side(examples),
    )


def interval_picture(
    rows: Mapping[str, Mapping[str, Interval]], metric: str, caption: str
) -> Picture:
    """Values with their intervals drawn side by side: ``rows[row][series]``."""
    said = "; ".join(
        f"{row}, {name}: {i}" for row, found in rows.items() for name, i in found.items()
    )
    title = TITLES.get(metric, metric)
    return Picture(caption, f"{title}. {said}.", svg=plots.intervals(rows, x_label=title))


def provenance(facts: Mapping[str, object]) -> dict[str, str]:
    """Version, commit where known, Python and the command; then ``facts`` in their order.

    >>> provenance({"seed": 3})["seed"]
    '3'
    """
    made = {
        "spcxr": spcxr.__version__,
        "commit": known_commit(),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }
    return made | {name: str(value) for name, value in facts.items()}


def known_commit() -> str:
    """The commit of the checkout spcxr runs from, or that it runs from an installed package."""
    root = Path(spcxr.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return "installed package"
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "not known (git did not answer)"
    return said.stdout.strip()
