"""Every metric of every label for many resamples at once: what a summary is made of."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from spcxr.evaluate import metrics
from spcxr.evaluate.calibration import BINS, bin_of
from spcxr.evaluate.ranking import Ranking, by_resample, like, ratio

Array = NDArray[Any]

FIXED = 0.9  # the specificity, or sensitivity, at which the other one is read
METRICS = (
    "auroc",
    "average_precision",
    "sensitivity_at_specificity_90",
    "specificity_at_sensitivity_90",
    "sensitivity",
    "specificity",
    "accuracy",
    "balanced_accuracy",
    "f1",
    "brier",
    "ece",
)


class LabelMetrics:
    """The metrics of K labels, prepared once, for any weights of the rows.

    Parameters
    ----------
    truth, score
        ``(n, K)``: 1 / 0 / NaN = unknown, left out of its label; probabilities.
    called
        ``(n, K)``: 1 / 0, or NaN in the whole column of a label that nobody has decided how to
        call: its sensitivity, specificity, accuracy and F1 are NaN.

    Raises
    ------
    SpcxrError
        as `metrics.auroc`.

    >>> truth = np.array([[0.0], [0.0], [1.0], [1.0]])
    >>> score = np.array([[0.1], [0.4], [0.35], [0.8]])
    >>> found = LabelMetrics(truth, score, score >= 0.5)(np.array([[1, 1, 1, 1], [1, 0, 1, 1]]))
    >>> found["auroc"].tolist(), found["f1"].round(3).tolist()
    ([[0.75], [1.0]], [[0.667], [0.667]])
    """

    def __init__(self, truth: Array, score: Array, called: Array) -> None:
        self._rankings = [Ranking(t, s) for t, s in zip(truth.T, score.T, strict=True)]
        self._known = ~np.isnan(truth)
        self._undecided = np.isnan(called.astype(np.float64)).any(0)
        self._cells = _cells(truth, called)
        self._far = np.where(self._known, score - np.nan_to_num(truth), 0.0)
        self._bins = _binned(self._far, score, self._known)
        self._of: weakref.ref[Array] | None = None
        self._made: Mapping[str, Array] = {}

    def __call__(self, weights: Array) -> Mapping[str, Array]:
        """Metric of `METRICS` -> ``(K,)``, or ``(R, K)`` for weights ``(R, n)``.

        Those of the last weights are kept: the statistics of one bootstrap ask for them in turn.
        """
        if self._of is None or self._of() is not weights:
            self._made = self._measure(weights)
            self._of = weakref.ref(weights)
        return self._made

    def _measure(self, weights: Array) -> dict[str, Array]:
        steps = [ranking.steps(weights) for ranking in self._rankings]
        made = {
            "auroc": np.stack([s.auroc() for s in steps], -1),
            "average_precision": np.stack([s.average_precision() for s in steps], -1),
            "sensitivity_at_specificity_90": np.stack([s.sensitivity_at(FIXED) for s in steps], -1),
            "specificity_at_sensitivity_90": np.stack([s.specificity_at(FIXED) for s in steps], -1),
        }
        table = by_resample(weights, len(self._known)).astype(np.float64)
        confusion = (self._cells @ table).T.reshape(-1, len(steps), 2, 2)
        made |= {
            "sensitivity": metrics.sensitivity(confusion),
            "specificity": metrics.specificity(confusion),
            "accuracy": metrics.accuracy(confusion),
            "balanced_accuracy": metrics.balanced_accuracy(confusion),
            "f1": metrics.f1(confusion)[..., 1],
        }
        for name in ("sensitivity", "specificity", "accuracy", "balanced_accuracy", "f1"):
            made[name] = np.where(self._undecided, np.nan, made[name])
        count = confusion.sum((-2, -1))
        apart = np.abs(self._bins @ table).reshape(len(steps), BINS, -1).sum(1)
        made["brier"] = ratio((np.square(self._far).T @ table).T, count)
        made["ece"] = ratio(apart.T, count)
        return {name: like(made[name], weights) for name in METRICS}


def _cells(truth: Array, called: Array) -> Array:
    """``(4 K, n)``: whether a row stands in a cell of its label's confusion matrix."""
    guess = np.nan_to_num(called.astype(np.float64))
    cells = [[(truth == t) & (guess == g) for g in (0, 1)] for t in (0, 1)]
    return np.moveaxis(np.array(cells, np.float64), -1, 0).reshape(-1, len(truth))


def _binned(far: Array, score: Array, known: Array) -> csr_array:
    """``(15 K, n)``: in each label's bin of probabilities, score minus truth of its rows."""
    rows, labels = np.nonzero(known)
    places = labels * BINS + bin_of(score[rows, labels])
    shape = (BINS * score.shape[1], len(score))
    return csr_array((far[rows, labels], (places, rows)), shape=shape)
