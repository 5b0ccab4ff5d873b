"""Every metric of every label for many resamples at once: what a summary is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from spcxr.evaluate import metrics
from spcxr.evaluate.calibration import BINS, bin_of
from spcxr.evaluate.ranking import Ranking, by_resample, like, ratio

Array = NDArray[Any]

FIXED = 0.9  # the specificity, or sensitivity, at which the other one is read
RANKED = (
    "auroc",
    "average_precision",
    "sensitivity_at_specificity_90",
    "specificity_at_sensitivity_90",
)
CALLED = ("sensitivity", "specificity", "accuracy", "balanced_accuracy", "f1")
MEANT = ("brier", "ece")
METRICS = RANKED + CALLED + MEANT


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
    >>> weights = np.array([[1, 1, 1, 1], [1, 0, 1, 1]])
    >>> found = LabelMetrics(truth, score, score >= 0.5)(weights)
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
        self._last: OfWeights | None = None

    def __call__(self, weights: Array) -> OfWeights:
        """Metric -> ``(K,)``, or ``(R, K)`` for weights ``(R, n)``.

        Those of the last weights are kept, and these with them (one block of resamples): the
        statistics of one bootstrap ask for one metric after the other.
        """
        if self._last is None or self._last.weights is not weights:
            self._last = OfWeights(self, weights)
        return self._last

    def make(self, kind: tuple[str, ...], weights: Array) -> dict[str, Array]:
        """The metrics of one kind: `RANKED`, `CALLED` or `MEANT`."""
        made = {RANKED: self._ranked, CALLED: self._called, MEANT: self._meant}[kind](weights)
        return {name: like(values, weights) for name, values in made.items()}

    def _ranked(self, weights: Array) -> dict[str, Array]:
        """How the scores order the rows."""
        found = []
        for ranking in self._rankings:
            steps = ranking.steps(weights)
            found.append(
                [
                    steps.auroc(),
                    steps.average_precision(),
                    steps.sensitivity_at(FIXED),
                    steps.specificity_at(FIXED),
                ]
            )
        return dict(zip(RANKED, np.moveaxis(np.array(found), 0, -1), strict=True))

    def _called(self, weights: Array) -> dict[str, Array]:
        """What is right and wrong in the calls."""
        table = by_resample(weights, len(self._known)).astype(np.float64)
        confusion = (self._cells @ table).T.reshape(-1, len(self._rankings), 2, 2)
        made = [
            metrics.sensitivity(confusion),
            metrics.specificity(confusion),
            metrics.accuracy(confusion),
            metrics.balanced_accuracy(confusion),
            metrics.f1(confusion)[..., 1],
        ]
        decided = (np.where(self._undecided, np.nan, values) for values in made)
        return dict(zip(CALLED, decided, strict=True))

    def _meant(self, weights: Array) -> dict[str, Array]:
        """How far the scores are probabilities."""
        table = by_resample(weights, len(self._known)).astype(np.float64)
        count = (self._known.T.astype(np.float64) @ table).T
        apart = np.abs(self._bins @ table).reshape(len(self._rankings), BINS, -1).sum(1)
        made = [ratio((np.square(self._far).T @ table).T, count), ratio(apart.T, count)]
        return dict(zip(MEANT, made, strict=True))


class OfWeights:
    """The metrics under some weights: a kind of them is made when the first of it is asked for."""

    def __init__(self, labels: LabelMetrics, weights: Array) -> None:
        self.weights = weights
        self._labels = labels
        self._made: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        if name not in self._made:
            kind = next(kind for kind in (RANKED, CALLED, MEANT) if name in kind)
            self._made |= self._labels.make(kind, self.weights)
        return self._made[name]


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
