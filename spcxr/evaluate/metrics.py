"""Metrics as plain array functions, each for many resamples of the rows at once.

Every function takes ``weights``: None, one weight per row ``(n,)``, or ``(R, n)``: the counts of R
bootstrap resamples, for which it returns R values. A weight of 2 means exactly what the row
standing there twice would mean. A label that is NaN is unknown, and its row is left out. Where a
metric is not defined (no positive, nothing predicted) it is NaN, never 0 by convention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spcxr.errors import SpcxrError
from spcxr.evaluate.ranking import Ranking, by_resample, known_rows, like, ratio

Array = NDArray[Any]
Metric = Callable[[Array, Array, "Array | None"], Array]


# --- from scores ----------------------------------------------------------------------------


def _ranked(labels: ArrayLike, scores: ArrayLike) -> tuple[Array, Array]:
    """Positives and negatives called ``(m,)`` at each distinct score, falling."""
    _, truth, score = known_rows(labels, scores)
    levels, place = np.unique(-score, return_inverse=True)
    counts = [np.bincount(place[truth == kind], minlength=len(levels)) for kind in (1, 0)]
    return np.cumsum(counts[0]), np.cumsum(counts[1])


def auroc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Area under the ROC curve: P(a positive scores above a negative), ties counting half.

    The Mann-Whitney statistic; equals scikit-learn's ``roc_auc_score``.

    Parameters
    ----------
    labels, scores
        ``(n,)``: 0 / 1 / NaN, and any monotone score.
    weights
        None, ``(n,)`` or ``(R, n)``.

    Returns
    -------
    one value, or ``(R,)``; NaN without a positive or without a negative.

    >>> float(auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]))
    0.75
    >>> auroc([0, 1, 1], [0.2, 0.1, 0.9], [[1, 1, 1], [1, 0, 2], [0, 1, 1]])
    array([0.5, 1. , nan])
    """
    return like(Ranking(labels, scores).steps(weights).auroc(), weights)


def average_precision(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None
) -> Array:
    """Average precision: the sum over thresholds of precision times the gain in recall.

    Equals scikit-learn's ``average_precision_score`` (a step function, no interpolation).
    Arguments as for `auroc`; NaN without a positive.

    >>> round(float(average_precision([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])), 4)
    0.8333
    """
    return like(Ranking(labels, scores).steps(weights).average_precision(), weights)


def roc_curve(labels: ArrayLike, scores: ArrayLike) -> tuple[Array, Array]:
    """(false positive rate, true positive rate), from (0, 0) to (1, 1), one point a distinct score.

    >>> [v.tolist() for v in roc_curve([0, 1], [0.1, 0.9])]
    [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    true, false = (np.append(0, called) for called in _ranked(labels, scores))
    return ratio(false, false[-1:]), ratio(true, true[-1:])


def precision_recall_curve(labels: ArrayLike, scores: ArrayLike) -> tuple[Array, Array]:
    """(recall, precision), from the highest threshold down; one point a distinct score.

    >>> [v.tolist() for v in precision_recall_curve([0, 1], [0.1, 0.9])]
    [[1.0, 1.0], [1.0, 0.5]]
    """
    true, false = _ranked(labels, scores)
    return ratio(true, true[-1:]), ratio(true, true + false)


def sensitivity_at(
    labels: ArrayLike,
    scores: ArrayLike,
    false_positive_rates: ArrayLike,
    weights: ArrayLike | None = None,
) -> Array:
    """The ROC curve read off at given false positive rates ``(G,)``, linearly between its points.

    Returns ``(G,)`` or ``(R, G)``; NaN rows where the curve is not defined. For interval bands.

    >>> sensitivity_at([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], [0.0, 0.25, 1.0]).tolist()
    [0.5, 0.5, 1.0]
    """
    grid = np.asarray(false_positive_rates, np.float64)
    corners = zip(
        *(rates.T for rates in Ranking(labels, scores).steps(weights).curve()), strict=True
    )
    # at a rate where the curve climbs straight up, np.interp reads its upper end
    read = [np.interp(grid, false, true) for false, true in corners]
    return like(np.stack(read), weights)


def precision_at(
    labels: ArrayLike, scores: ArrayLike, recalls: ArrayLike, weights: ArrayLike | None = None
) -> Array:
    """Precision ``(G,)`` or ``(R, G)`` at the highest threshold whose recall is as given, or more.

    NaN rows without a positive. For interval bands.

    >>> precision_at([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], [0.5, 0.6]).round(3).tolist()
    [1.0, 0.667]
    """
    steps = Ranking(labels, scores).steps(weights)
    # 0.07 of 100 is more than 7 in floating point, and 7 shall do
    wanted = np.asarray(recalls, np.float64) * (1 - 1e-12)
    read = np.full((len(steps.positives), len(wanted)), np.nan)
    columns = zip(read, steps.found.T, steps.precision().T, steps.positives, strict=True)
    for row, found, share, count in columns:
        if count:
            # rows of weight 0 before the first one found have no precision
            row[:] = share[np.searchsorted(found, np.maximum(wanted * count, 1e-9))]
    return like(read, weights)


def by_class(
    metric: Metric, labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None
) -> Array:
    """A metric of each column: labels and scores ``(n, K)`` -> ``(K,)`` or ``(R, K)``.

    Multi-label: NaN is left out per column. One of many: give the one-hot labels, and this is
    one class against the rest.

    >>> by_class(auroc, [[0, 1], [1, 0]], [[0.2, 0.1], [0.9, 0.3]])
    array([1., 0.])
    """
    truth, score = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    columns = zip(truth.T, score.T, strict=True)
    table = None if weights is None else np.asarray(weights)
    return np.stack([metric(t, s, table) for t, s in columns], axis=-1)


# --- from decisions -------------------------------------------------------------------------


def confusion_matrix(
    labels: ArrayLike, predicted: ArrayLike, classes: int, weights: ArrayLike | None = None
) -> Array:
    """Counts ``(K, K)`` or ``(R, K, K)``: rows the true class, columns the predicted one.

    Parameters
    ----------
    labels, predicted
        ``(n,)`` class numbers in [0, K); a NaN label is left out.

    Raises
    ------
    SpcxrError
        a class number outside [0, K).

    >>> confusion_matrix([0, 1, 1], [0, 1, 0], 2).tolist()
    [[1.0, 0.0], [1.0, 1.0]]
    """
    truth, guess = np.asarray(labels, np.float64), np.asarray(predicted, np.float64)
    table = by_resample(weights, len(truth))
    kept = np.flatnonzero(~np.isnan(truth))
    for values in (truth[kept], guess[kept]):
        if not np.isin(values, np.arange(classes)).all():
            raise SpcxrError(f"a class number outside 0..{classes - 1}; give the number of classes")
    cell = (truth[kept] * classes + guess[kept]).astype(np.int64)
    counts = np.zeros((table.shape[1], classes * classes))
    for number in np.unique(cell):
        counts[:, number] = table[kept[cell == number]].sum(0)
    return like(counts.reshape(-1, classes, classes), weights)


def accuracy(confusion: Array) -> Array:
    """Share of the rows that are right: ``(..., K, K)`` -> ``(...)``.

    >>> float(accuracy(np.array([[3, 1], [0, 4]])))
    0.875
    """
    return ratio(np.trace(confusion, axis1=-2, axis2=-1), confusion.sum((-2, -1)))


def recall(confusion: Array) -> Array:
    """Share of each true class that was found: ``(..., K, K)`` -> ``(..., K)``."""
    return ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-1))


def precision(confusion: Array) -> Array:
    """Share of each predicted class that was right: ``(..., K, K)`` -> ``(..., K)``."""
    return ratio(np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(-2))


def f1(confusion: Array) -> Array:
    """Harmonic mean of precision and recall of each class: ``(..., K, K)`` -> ``(..., K)``.

    0 where the class exists and is never found; NaN where it is neither there nor predicted.

    >>> f1(np.array([[3, 1], [0, 4]])).round(4).tolist()
    [0.8571, 0.8889]
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return ratio(2 * hits, confusion.sum(-1) + confusion.sum(-2))


def sensitivity(confusion: Array) -> Array:
    """True positive rate of a two-class matrix (class 1 positive): ``(..., 2, 2)`` -> ``(...)``."""
    return recall(confusion)[..., 1]


def specificity(confusion: Array) -> Array:
    """True negative rate of a two-class matrix (class 1 positive): ``(..., 2, 2)`` -> ``(...)``."""
    return recall(confusion)[..., 0]


def balanced_accuracy(confusion: Array) -> Array:
    """Mean recall over the classes that are there, as scikit-learn: ``(..., K, K)`` -> ``(...)``.

    >>> float(balanced_accuracy(np.array([[3, 1], [0, 4]])))
    0.875
    """
    found = recall(confusion)
    there = ~np.isnan(found)
    return ratio(np.nansum(found, -1), there.sum(-1))


# --- of masks -------------------------------------------------------------------------------


def _areas(predicted: Array, truth: Array, known: Array | None) -> tuple[Array, Array]:
    """Overlap and sum of the two areas of each image, in pixels."""
    if predicted.shape != truth.shape or predicted.ndim != 3:
        raise SpcxrError(
            f"masks {predicted.shape} and {truth.shape}; give two (n, H, W) of one size"
        )
    guess, true = predicted.astype(bool), truth.astype(bool)
    if known is not None:
        guess, true = guess & known, true & known
    both = (guess & true).sum((1, 2))
    return both, guess.sum((1, 2)) + true.sum((1, 2))


def dice(predicted: Array, truth: Array, known: Array | None = None) -> Array:
    """Dice coefficient ``2|A∩B| / (|A|+|B|)`` of each image.

    NaN where both masks are empty (there is nothing to measure; `mean` leaves it out); 0 where
    only one is. MONAI's ``DiceMetric`` agrees wherever the true mask is not empty; for an empty
    one it leaves even a false alarm out, which we count as 0.

    Parameters
    ----------
    predicted, truth
        ``(n, H, W)`` bool, or 0 and anything else.
    known
        ``(n, H, W)`` bool: pixels that count; all if not given.

    Returns
    -------
    ``(n,)`` float64.

    >>> masks = np.array([[[1, 1, 0]], [[0, 0, 0]], [[0, 1, 0]]])
    >>> dice(masks, np.array([[[1, 0, 0]], [[0, 0, 0]], [[0, 0, 0]]])).round(3)
    array([0.667,   nan, 0.   ])
    """
    both, areas = _areas(predicted, truth, known)
    return ratio(2 * both, areas)


def iou(predicted: Array, truth: Array, known: Array | None = None) -> Array:
    """Intersection over union (Jaccard) of each image; arguments and NaN as in `dice`.

    >>> iou(np.array([[[1, 1, 0]]]), np.array([[[1, 0, 0]]]))
    array([0.5])
    """
    both, areas = _areas(predicted, truth, known)
    return ratio(both, areas - both)


def mean(values: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Weighted mean of per-row values ``(n,)``; NaN rows are left out.

    >>> float(mean([1.0, np.nan, 2.0], [1, 5, 3]))
    1.75
    """
    given = np.asarray(values, np.float64)
    known = ~np.isnan(given)
    table = by_resample(weights, len(given))[known]
    return like(ratio(given[known] @ table, table.sum(0)), weights)
