"""The metrics of one test set, with intervals: what `classify`, `segment`, `evaluate` report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics
from spcxr.evaluate.calibration import calibration_error, top_label
from spcxr.evaluate.delong import delong_interval
from spcxr.evaluate.intervals import Interval, Statistic, bootstrap_all
from spcxr.evaluate.label_metrics import METRICS, LabelMetrics
from spcxr.evaluate.report import NOT_WRITTEN

Array = NDArray[Any]


@dataclass(frozen=True)
class ClassSummary:
    """How well labels are predicted on one set.

    ``overall`` and ``by_class[name]`` map a metric's name to its bootstrap `Interval`, ``delong``
    a label to its AUROC's closed form. ``statistics`` maps the overall ones to functions of row
    weights, over the rows of ``patients``: what `paired_bootstrap` needs to compare two models.
    ``positives[name]`` is (positive rows, rows with a known label). ``confusion`` ``(K, K)``
    counts, rows true; None for multi-label. ``left_out`` names classes without both kinds of rows:
    not in the macro means.
    ``threshold``: of all labels, or one each; None where the highest probability is called.
    """

    names: tuple[str, ...]
    multilabel: bool
    n_rows: int
    n_patients: int
    threshold: float | tuple[float, ...] | None
    overall: Mapping[str, Interval]
    statistics: Mapping[str, Statistic] = field(metadata=NOT_WRITTEN)
    patients: Array = field(metadata=NOT_WRITTEN)
    by_class: Mapping[str, Mapping[str, Interval]]
    delong: Mapping[str, Interval]
    positives: Mapping[str, tuple[int, int]]
    confusion: Array | None
    left_out: tuple[str, ...]


def usable_rows(labels: Array, *, multilabel: bool) -> NDArray[np.bool_]:
    """Rows ``(n,)`` that can be measured: any label known; of one of many, all, and exactly one 1.

    >>> usable_rows(np.array([[1, np.nan], [1, 0], [0, 0]]), multilabel=False).tolist()
    [False, True, False]
    """
    known = ~np.isnan(labels)
    if multilabel:
        return np.asarray(known.any(1))
    return np.asarray(known.all(1) & ((labels == 1).sum(1) == 1))


def summarise_classes(
    labels: Array,
    scores: Array,
    patients: Array,
    names: tuple[str, ...],
    *,
    multilabel: bool,
    n: int = 2000,
    seed: int = 0,
    threshold: float | Array = 0.5,
) -> ClassSummary:
    """Every metric of `label_metrics.METRICS` by class; macro means; accuracies; calibration.

    One of many: the predicted class is the one of the highest score; the metrics of a class are
    one against the rest, and ``ece`` overall is of the highest probability. Multi-label: each label
    is called at its threshold, and what is overall is the mean over labels.

    Parameters
    ----------
    labels
        ``(n, K)`` 1, 0, NaN = unknown. One of many: one-hot rows; a row that is not (unknown, or
        of a class the model does not know) is left out.
    scores
        ``(n, K)`` probabilities.
    patients
        ``(n,)`` pseudonyms, resampled whole.
    threshold
        of all labels, or ``(K,)``; a label whose own is NaN is not called, and what would be
        counted of its calls is NaN. Not read for one of many.

    Raises
    ------
    SpcxrError
        no row with a known label; scores that are no probabilities (NaN, outside [0, 1]).

    >>> rng = np.random.default_rng(0)
    >>> labels = np.eye(2)[rng.integers(0, 2, 60)]
    >>> made = summarise_classes(
    ...     labels, 0.7 * labels + 0.3 * rng.random((60, 2)), np.arange(60), ("a", "b"),
    ...     multilabel=False, n=50)
    >>> str(made.overall["accuracy"]), made.positives["a"]
    ('1.000 (1.000 to 1.000)', (26, 60))
    """
    kept = usable_rows(labels, multilabel=multilabel)
    if not kept.any():
        raise SpcxrError(
            f"no row with a known label among {', '.join(names)}; check the label columns"
        )
    truth, score, who = labels[kept], scores[kept], np.asarray(patients)[kept]
    refuse_improbable(truth, score)
    cuts = np.broadcast_to(np.asarray(threshold, np.float64), len(names))
    called = _calls(score, cuts, multilabel)
    each = LabelMetrics(truth, score, called)
    known = dict(zip(names, ~np.isnan(truth).T, strict=True))
    defined = ~np.isnan(each(np.ones(len(truth)))["auroc"])
    overall = _overall(truth, score, each, defined, multilabel)
    of_labels = {
        (name, key): _of_label(each, key, k) for k, name in enumerate(names) for key in METRICS
    }
    found = bootstrap_all(
        who,
        overall | {"/".join(place): statistic for place, statistic in of_labels.items()},
        n=n,
        seed=seed,
        rows={f"{name}/{key}": known[name] for name, key in of_labels},
    )
    return ClassSummary(
        names=names,
        multilabel=multilabel,
        n_rows=len(truth),
        n_patients=len(np.unique(who)),
        threshold=_said(threshold) if multilabel else None,
        overall={key: found[key] for key in overall},
        statistics=overall,
        patients=who,
        by_class={name: {key: found[f"{name}/{key}"] for key in METRICS} for name in names},
        delong={
            name: delong_interval(truth[:, k], score[:, k], who) for k, name in enumerate(names)
        },
        positives={
            name: (int((column == 1).sum()), int((~np.isnan(column)).sum()))
            for name, column in zip(names, truth.T, strict=True)
        },
        confusion=None
        if multilabel
        else metrics.confusion_matrix(truth.argmax(1), score.argmax(1), len(names)),
        left_out=tuple(name for name, there in zip(names, defined, strict=True) if not there),
    )


def refuse_improbable(labels: Array, scores: Array) -> None:
    """Refuse scores ``(n, K)`` that are NaN or outside [0, 1] where the label is known.

    >>> refuse_improbable(np.array([[1.0], [0.0]]), np.array([[0.2], [np.nan]]))
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: 1 of 2 rows (the first is row 1) have a probability that is NaN ...
    """
    broken = np.flatnonzero((~np.isnan(labels) & ~((scores >= 0) & (scores <= 1))).any(1))
    if len(broken):
        raise SpcxrError(
            f"{len(broken)} of {len(scores)} rows (the first is row {broken[0]}) have a "
            "probability that is NaN or outside 0 to 1; the model is broken: retrain, or use "
            "--precision fp32"
        )


def _calls(score: Array, cuts: Array, multilabel: bool) -> Array:
    """What is called ``(n, K)``: 1 / 0, NaN for a label whose threshold is NaN."""
    if not multilabel:
        return np.eye(score.shape[1])[score.argmax(1)]
    return np.where(np.isnan(cuts), np.nan, score >= cuts)


def _said(threshold: float | Array) -> float | tuple[float, ...]:
    """One number, or one a label."""
    given = np.asarray(threshold, np.float64)
    return tuple(given.tolist()) if given.ndim else float(given)


def _of_label(each: LabelMetrics, key: str, k: int) -> Statistic:
    return lambda weights: each(weights)[key][..., k]


def _overall(
    truth: Array, score: Array, each: LabelMetrics, there: Array, multilabel: bool
) -> dict[str, Statistic]:
    """The metrics over all classes that are there.

    A resample without a case of a rare class takes the mean of the others. To drop such resamples
    would keep, of a set with many rare classes, only the few that happen to hold them all.
    """

    def macro(key: str) -> Statistic:
        return lambda w: mean_of_known(each(w)[key][..., there])

    if multilabel:
        return {f"macro_{key}": macro(key) for key in METRICS}
    answer, guess, classes = truth.argmax(1), score.argmax(1), truth.shape[1]

    def of_confusion(metric: Callable[[Array], Array]) -> Statistic:
        return lambda w: metric(metrics.confusion_matrix(answer, guess, classes, w))

    right, sure = top_label(truth, score)
    return {f"macro_{key}": macro(key) for key in METRICS[:4]} | {
        "accuracy": of_confusion(metrics.accuracy),
        "balanced_accuracy": of_confusion(metrics.balanced_accuracy),
        "macro_f1": macro("f1"),
        # as scikit-learn's of many classes: the squares of all K summed, from 0 to 2
        "brier": lambda w: each(w)["brier"].sum(-1),
        "ece": lambda w: calibration_error(right, sure, w),
    }


def mean_of_known(values: Array) -> Array:
    """``(..., K)`` -> ``(...)``: the mean, NaN left out; NaN where all are."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(-1), known.sum(-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def summarise_masks(
    figures: Mapping[str, Array], patients: Array, *, n: int = 2000, seed: int = 0
) -> dict[str, Interval]:
    """Means over the images of the figures of one structure, with intervals over patients.

    Parameters
    ----------
    figures
        ``(n,)`` per image by name, Dice first, NaN = nothing to measure. One that is defined
        nowhere is left out.

    Raises
    ------
    SpcxrError
        no image with a Dice.

    >>> dice, hd95 = np.array([0.5, 1.0, 0.0]), np.array([4.0, 0.0, np.nan])
    >>> made = summarise_masks({"dice": dice, "hd95_px": hd95}, np.array(["a", "b", "c"]))
    >>> str(made["dice"]), made["hd95_px"].value, made["hd95_px"].n_rows
    ('0.500 (0.000 to 1.000)', 2.0, 2)
    """
    there = {name: ~np.isnan(values) for name, values in figures.items()}
    if not there["dice"].any():
        raise SpcxrError("no image with a mask to measure; check mask_path and the splits")
    statistics: dict[str, Statistic] = {
        name: partial(metrics.mean, values) for name, values in figures.items() if there[name].any()
    }
    return bootstrap_all(np.asarray(patients), statistics, n=n, seed=seed, rows=there)


# --- subgroups ------------------------------------------------------------------------------

AGE_GROUPS = ((0.0, "0-1"), (2.0, "2-17"), (18.0, "18-39"), (40.0, "40-64"), (65.0, "65+"))


def age_groups(ages: Array) -> Array:
    """Years ``(n,)`` float, NaN = unknown -> names of groups ``(n,)``, ``""`` = unknown.

    >>> age_groups(np.array([0.5, 18.0, 70.0, np.nan])).tolist()
    ['0-1', '18-39', '65+', '']
    """
    starts = np.array([start for start, _ in AGE_GROUPS])
    names = np.array([name for _, name in AGE_GROUPS])
    place = np.searchsorted(starts, np.nan_to_num(ages, nan=0.0), side="right") - 1
    return np.where(np.isnan(ages), "", names[np.clip(place, 0, None)])


def subgroups(
    columns: Mapping[str, Array], *, smallest: int = 20
) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Rows of each group of each column that splits the set into two groups or more.

    Groups of fewer than ``smallest`` rows are left out: their intervals span everything. ``""``
    (unknown) is no group.

    >>> subgroups({"sex": np.array(["F", "F", "M", ""])}, smallest=1)
    {'sex': {'F': array([0, 1]), 'M': array([2])}}
    """
    made: dict[str, dict[str, NDArray[np.int64]]] = {}
    for column, values in columns.items():
        groups = {str(v): np.flatnonzero(values == v) for v in np.unique(values) if str(v)}
        large = {name: rows for name, rows in groups.items() if len(rows) >= smallest}
        if len(large) > 1:
            made[column] = large
    return made
