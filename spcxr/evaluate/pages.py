"""The sections of a report, built from summaries: what `evaluate` and `demo` put on their page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.evaluate import metrics, plots
from spcxr.evaluate.calibration import BINS, calibration_error, reliability_curve, top_label
from spcxr.evaluate.delong import PairedTest
from spcxr.evaluate.intervals import Interval, resample_counts
from spcxr.evaluate.provenance import provenance as provenance
from spcxr.evaluate.report import Cell, Picture, Table
from spcxr.evaluate.summary import ClassSummary, usable_rows

Array = NDArray[Any]

OF_A_LABEL = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "sensitivity_at_specificity_90": "sensitivity at specificity 0.9",
    "specificity_at_sensitivity_90": "specificity at sensitivity 0.9",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "f1": "F1",
    "brier": "Brier score",
    "ece": "calibration error",
}
TITLES = (
    {f"macro_{key}": f"mean {title}" for key, title in OF_A_LABEL.items()}
    | OF_A_LABEL
    | {"dice": "Dice", "iou": "IoU"}
    | {
        f"{key}_{unit}": f"{title}, {unit}"
        for unit in ("px", "mm")
        for key, title in (("hd95", "HD95"), ("hd", "Hausdorff"), ("asd", "surface distance"))
    }
)
# What `comparison` leaves to the tables of the single set.
LEFT_TO_DETAILS = {
    f"macro_{key}" for key in OF_A_LABEL if key not in {"auroc", "average_precision", "f1", "ece"}
} | {"brier", "hd_px", "hd_mm"}
OF_STRUCTURE = "Dice of "  # a structure's own among the means; they are left as well
CALIBRATION = (
    "Brier score: the mean squared distance of a probability from what is true. Calibration error: "
    f"of {BINS} bins of equal width. Both are best at 0; the calibration error of few rows is well "
    "above it by chance alone. Its resamples are rougher than the rows themselves, so its interval "
    "leans upwards, and may lie above the value."
)
NO_WIDTH = (
    " An interval without width, such as 1.000–1.000, does not mean that nothing else can be: "
    "where n rows are all called alike, up to 3 in n may yet be called otherwise (95 %)."
)
CURVES_PER_PLOT = 3
FEW_CASES = 10  # below this, resampling cannot know how varied the cases are
BAND_RESAMPLES = 500
RATES = np.linspace(0, 1, 101)  # at which the bands are read


def comparison(
    caption: str, results: Mapping[str, Mapping[str, Interval]], *, first: str = "", note: str = ""
) -> Table:
    """One row a result (a model, a test set), one column a metric but those `LEFT_TO_DETAILS`.

    >>> found = {"auroc": Interval(0.8, 0.7, 0.9, 50, 40, 0)}
    >>> comparison("Test", {"pretrained": found, "scratch": found}).columns
    ['', 'AUROC']
    """
    keys = list(dict.fromkeys(key for found in results.values() for key in found))
    keys = [k for k in keys if k not in LEFT_TO_DETAILS and not k.startswith(OF_STRUCTURE)]
    rows: list[list[Cell]] = [
        [name, *(found.get(key) for key in keys)] for name, found in results.items()
    ]
    shown = [i for found in results.values() for i in found.values() if not np.isnan(i.value)]
    undefined = max((i.n_undefined for i in shown), default=0)
    if undefined:
        note += (
            f" Up to {undefined} resamples held no case of a class and are left out of an interval."
        )
    return Table(caption, [first, *(TITLES.get(key, key) for key in keys)], rows, note.strip())


def class_tables(
    summary: ClassSummary, tempered: Mapping[str, tuple[Interval, float]] | None = None
) -> list[Table]:
    """The metrics of each class: how it ranks, what it calls, what its probabilities are worth.

    ``tempered``: of each class, its calibration error before, and its temperature (NaN: none).
    """
    probable = _table_of("By class: probabilities", summary, ("brier", "ece"), CALIBRATION)
    if tempered:
        columns = [*probable.columns, "calibration error, untempered", "temperature"]
        rows = [[*row, *tempered[str(row[0])]] for row in probable.rows]
        probable = replace(probable, columns=columns, rows=rows)
    calls = ("sensitivity", "specificity", "accuracy", "balanced_accuracy", "f1")
    return [
        class_table("By class: ranking", summary),
        _table_of("By class: calls", summary, calls, _calling(summary) + _no_width(summary, calls)),
        probable,
    ]


def class_table(caption: str, summary: ClassSummary) -> Table:
    """How well each class is ranked, and how many positive rows stand behind it."""
    rows: list[list[Cell]] = []
    keys = (
        "average_precision",
        "sensitivity_at_specificity_90",
        "specificity_at_sensitivity_90",
    )
    for name in summary.names:
        positive, known = summary.positives[name]
        found = summary.by_class[name]
        rows.append(
            [
                name,
                f"{positive}\N{NO-BREAK SPACE}of\N{NO-BREAK SPACE}{known}",
                found["auroc"],
                summary.delong[name],
                *(found[key] for key in keys),
            ]
        )
    columns = ["class", "positive", "AUROC", "AUROC, DeLong", *(TITLES[key] for key in keys)]
    return Table(caption, columns, rows, _ranking_note(summary))


def _table_of(caption: str, summary: ClassSummary, keys: Sequence[str], note: str) -> Table:
    """One row a class, these of its metrics."""
    rows: list[list[Cell]] = [
        [name, *(summary.by_class[name][key] for key in keys)] for name in summary.names
    ]
    return Table(caption, ["class", *(TITLES[key] for key in keys)], rows, note)


def _no_width(summary: ClassSummary, keys: Sequence[str]) -> str:
    """`NO_WIDTH` where an interval has none (the rule of three: Hanley and Lippman-Hand 1983)."""
    found = (summary.by_class[name][key] for name in summary.names for key in keys)
    return NO_WIDTH if any(i.low == i.high for i in found) else ""


def _calling(summary: ClassSummary) -> str:
    """From where a class is called."""
    if summary.threshold is None:
        return "The class of the highest probability is called."
    if isinstance(summary.threshold, float):
        return f"A label is called from a probability of {summary.threshold:g}."
    said = ", ".join(
        f"{name} {'none' if np.isnan(cut) else f'{cut:.3g}'}"
        for name, cut in zip(summary.names, summary.threshold, strict=True)
    )
    return f"A label is called from its own probability: {said}."


def _ranking_note(summary: ClassSummary) -> str:
    """What to know of the classes with no, or few, rows of a kind."""
    note = "DeLong: the interval in closed form, over the same patients."
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
    undefined = {
        name: found["auroc"].n_undefined
        for name, found in summary.by_class.items()
        if found["auroc"].n_undefined and name not in summary.left_out
    }
    if undefined:
        said = ", ".join(f"{name} {count}" for name, count in undefined.items())
        note += f" Resamples without a case, left out of an interval: {said}."
    return note


def paired_table(caption: str, comparisons: Mapping[str, Comparison]) -> Table:
    """Model A beside model B: one row a metric or label, their difference and its test if any.

    >>> a, b = Interval(0.9, 0.8, 1.0, 50, 40, 0), Interval(0.8, 0.7, 0.9, 50, 40, 0)
    >>> apart = Interval(0.1, 0.02, 0.18, 50, 40, 0)
    >>> made = paired_table("A beside B", {"mean AUROC": Comparison(a, b, apart)})
    >>> made.columns
    ['', 'A', 'B', 'A − B']
    """
    tested = any(found.test for found in comparisons.values())
    rows: list[list[Cell]] = []
    for name, found in comparisons.items():
        test = found.test
        rows.append([name, found.first, found.second, found.difference])
        if test is None:
            rows[-1] += [None, None] if tested else []
            continue
        rows[-1].append(
            replace(found.difference, value=test.difference, low=test.low, high=test.high)
        )
        rows[-1].append("–" if np.isnan(test.p) else "< 0.001" if test.p < 0.001 else test.p)
    count = sum(found.test is not None for found in comparisons.values())
    note = "A − B: the same patients are drawn for both models."
    if tested:
        note += " p: DeLong's test of no difference."
    if count > 1:
        note += (
            f" Of {count} tests, one in twenty falls below 0.05 by chance: they are not corrected "
            "for being many."
        )
    columns = ["", "A", "B", "A − B", *(["A − B, DeLong", "p"] if tested else [])]
    return Table(caption, columns, rows, note)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same rows: their values, the difference, and DeLong's test where it is."""

    first: Interval
    second: Interval
    difference: Interval
    test: PairedTest | None = None


def class_plots(
    summary: ClassSummary, labels: Array, scores: Array, patients: Array, *, seed: int = 0
) -> list[Picture]:
    """ROC and precision-recall with interval bands, and the confusion matrix of one test set.

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
        curves = [_precision_recall(summary, k, truth[:, k], score[:, k], who, seed) for k in part]
        values = "; ".join(
            f"{summary.names[k]} {summary.by_class[summary.names[k]]['average_precision']}"
            for k in part
        )
        pictures.append(
            Picture(
                f"Precision over recall of {names}; the bands are 95 % intervals at each recall.",
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
    name = summary.names[k]
    band = _band(metrics.sensitivity_at, truth, score, patients, seed)
    shown = f"{name} ({summary.by_class[name]['auroc'].value:.3f})"
    return plots.Curve(shown, *metrics.roc_curve(truth, score), band)


def _precision_recall(
    summary: ClassSummary, k: int, truth: Array, score: Array, patients: Array, seed: int
) -> plots.Curve:
    """The same of precision over recall, at the highest threshold of each recall: where the band
    and the average precision read it."""
    name = summary.names[k]
    band = _band(metrics.precision_at, truth, score, patients, seed)
    shown = f"{name} ({summary.by_class[name]['average_precision'].value:.3f})"
    found, share = metrics.precision_recall_curve(truth, score)
    first = np.flatnonzero(np.diff(found, prepend=0.0) > 0)
    at = np.append(first[:1], first)
    return plots.Curve(shown, np.append(0.0, found[first]), share[at], band)


def _band(
    read: Callable[..., Array], truth: Array, score: Array, patients: Array, seed: int
) -> plots.Band | None:
    """95 % of the resampled curves, read off at `RATES`; None if no resample has a curve."""
    known = ~np.isnan(truth)
    y, s = truth[known], score[known]
    counts = resample_counts(patients[known], n=BAND_RESAMPLES, seed=seed)
    drawn = np.concatenate([read(y, s, RATES, weights) for weights in counts])
    drawn = drawn[~np.isnan(drawn).any(1)]
    if len(drawn) == 0:
        return None
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return plots.Band(RATES, low, high)


def reliability_pictures(
    summary: ClassSummary, labels: Array, scores: Array, *, what: str = "probabilities"
) -> list[Picture]:
    """How often what is called likely is true, with the rows behind each point.

    One of many: the highest probability of a row. Multi-label: each label's own.

    Parameters
    ----------
    summary, labels, scores
        as given to and made by `summarise_classes`. Other probabilities of the same rows may be
        given (those before tempering): the summary says only which labels and rows there are.
    what
        the words for the probabilities ("probabilities before tempering").
    """
    kept = usable_rows(labels, multilabel=summary.multilabel)
    truth, score = labels[kept], scores[kept]
    if summary.multilabel:
        known = [k for k, name in enumerate(summary.names) if summary.positives[name][1]]
        given = {summary.names[k]: (truth[:, k], score[:, k]) for k in known}
    else:
        given = {"highest probability": top_label(truth, score)}
    names, pictures = list(given), []
    for part in (names[i : i + CURVES_PER_PLOT] for i in range(0, len(names), CURVES_PER_PLOT)):
        made = {name: reliability_curve(*given[name]) for name in part}
        errors = {name: f"{float(calibration_error(*given[name])):.3f}" for name in part}
        curves = [plots.Curve(f"{name} ({errors[name]})", x, y) for name, (x, y, _) in made.items()]
        said = "; ".join(f"{name} {error}" for name, error in errors.items())
        whose = f"of {', '.join(part)}" if summary.multilabel else "(the highest of each image)"
        pictures.append(
            Picture(
                f"Reliability of the {what} {whose}, and calibration error: on the "
                "dotted line they mean what they say. Below: the rows of each bin.",
                f"Reliability diagram of the {what}. Calibration error: {said}.",
                svg=plots.reliability(curves, [count for _, _, count in made.values()]),
            )
        )
    return pictures


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


def interval_picture(
    rows: Mapping[str, Mapping[str, Interval]],
    metric: str,
    caption: str,
    *,
    mark: float | None = None,
) -> Picture:
    """Values with their intervals drawn side by side: ``rows[row][series]``; a line at ``mark``."""
    said = "; ".join(
        f"{row}, {name}: {i}" for row, found in rows.items() for name, i in found.items()
    )
    title = TITLES.get(metric, metric)
    return Picture(
        caption, f"{title}. {said}.", svg=plots.intervals(rows, x_label=title, mark=mark)
    )
