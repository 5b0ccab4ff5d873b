"""Rank metrics of many resamples at once: rows are sorted once, then only weights are summed.

What AUROC, average precision and the operating points need of a resample is three counts at every
score that a positive row has: the positives there, the negatives above, the negatives not below.
Between two such scores negatives only add up, so their weights are summed there in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from spcxr.errors import SpcxrError

Array = NDArray[Any]
Rows = NDArray[np.intp]


def by_resample(weights: ArrayLike | None, n: int) -> Array:
    """Weights as ``(n, R)``, a row's resamples side by side; R = 1 for none or one weight a row.

    The counts of `intervals.resample_counts` come in float32, which holds their sums exactly (to
    2^24 rows), and are not copied; all else becomes float64.
    """
    if weights is None:
        return np.ones((n, 1))
    made = np.asarray(weights)
    made = np.atleast_2d(made if made.dtype == np.float32 else made.astype(np.float64))
    if made.shape[1] != n:
        raise SpcxrError(f"weights for {made.shape[1]} rows, labels for {n}; give one weight a row")
    return np.require(made.T, requirements=["C", "W"])  # torch warns of what is read-only


def like(values: Array, weights: ArrayLike | None) -> Array:
    """Drop the resample axis ``(R, ...)`` again unless the caller gave one."""
    return values if weights is not None and np.ndim(weights) == 2 else values[0]


def ratio(part: Array, whole: Array) -> Array:
    """``part / whole``, NaN where the whole is 0.

    >>> ratio(np.array([1, 0]), np.array([2, 0]))
    array([0.5, nan])
    """
    empty = whole == 0
    return np.where(empty, np.nan, part / np.where(empty, 1, whole))


def known_rows(labels: ArrayLike, scores: ArrayLike) -> tuple[Rows, Array, Array]:
    """Which rows have a label ``(m,)``, and the labels and scores of these, as float64.

    Raises
    ------
    SpcxrError
        labels other than 0, 1, NaN; scores that are NaN; lengths that differ.
    """
    truth, score = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    if truth.ndim != 1 or truth.shape != score.shape:
        raise SpcxrError(f"labels {truth.shape} and scores {score.shape}; give two (n,) arrays")
    kept = np.flatnonzero(~np.isnan(truth))
    truth, score = truth[kept], score[kept]
    if not ((truth == 0) | (truth == 1)).all():
        raise SpcxrError("labels must be 0, 1 or NaN; settle uncertain ones (-1) first")
    if np.isnan(score).any():
        raise SpcxrError("scores hold NaN; the model's output is broken, retrain or use fp32")
    return kept, truth, score


class Ranking:
    """The rows of one label in the order of their scores, ready for any weights.

    Parameters
    ----------
    labels, scores
        ``(n,)``: 0 / 1 / NaN = unknown, left out; any score that is not NaN.

    Raises
    ------
    SpcxrError
        as `known_rows`.

    >>> made = Ranking([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]).steps([[1, 1, 1, 1], [1, 0, 2, 0]])
    >>> made.auroc().tolist(), made.sensitivity_at(0.9).tolist()
    ([0.75, 1.0], [0.5, 1.0])
    """

    def __init__(self, labels: ArrayLike, scores: ArrayLike) -> None:
        kept, truth, score = known_rows(labels, scores)
        order = np.argsort(-score, kind="stable")
        rows, found, falling = kept[order], truth[order] == 1, -score[order]
        self._n = np.size(labels)
        levels, first = np.unique(falling[found], return_index=True)
        above, upto = (np.searchsorted(falling[~found], levels, side) for side in ("left", "right"))
        starts = np.unique(np.concatenate([[0], above, upto]))
        starts = starts[starts < np.count_nonzero(~found)]
        self._upto = np.searchsorted(starts, upto)
        self._tied = np.flatnonzero(above < upto)
        self._above_tied = np.searchsorted(starts, above[self._tied])
        self._at = _Sums(rows[found], first)
        self._between = _Sums(rows[~found], starts)

    def steps(self, weights: ArrayLike | None = None) -> Steps:
        """The counts under weights: None, ``(n,)`` or ``(R, n)``."""
        table = by_resample(weights, self._n)
        between = self._between(table)
        passed = np.zeros((len(between) + 1, table.shape[1]))
        np.cumsum(between, axis=0, out=passed[1:])
        upto = np.take(passed, self._upto, axis=0)
        return Steps(
            positive=self._at(table),
            upto=upto,
            tied=self._tied,
            beside=upto[self._tied] - np.take(passed, self._above_tied, axis=0),
            negatives=passed[-1],
        )

    def auroc(self, weights: ArrayLike | None = None) -> Array:
        """One value, or ``(R,)``; for a bootstrap, whose resamples then share the sorting."""
        return like(self.steps(weights).auroc(), weights)


class _Sums:
    """Adds weights ``(n, R)`` of rows up from each start to the next: ``(len(starts), R)`` float64.

    An embedding bag, which gathers and adds in one pass: of 10^5 rows and 40 resamples three times
    as fast or more than a product with a sparse matrix of ones, and ten times as numpy's `take`
    and `add.reduceat`.
    """

    def __init__(self, rows: Rows, starts: Rows) -> None:
        self._rows, self._starts = torch.from_numpy(rows), torch.from_numpy(starts)

    def __call__(self, table: Array) -> Array:
        if len(self._starts) == 0:
            return np.zeros((0, table.shape[1]))
        given = torch.from_numpy(table)
        made = F.embedding_bag(self._rows, given, self._starts, mode="sum")
        return made.numpy().astype(np.float64, copy=False)


@dataclass(frozen=True)
class Steps:
    """Weights at each distinct score that a positive has, falling: ``(m, R)``, R resamples.

    ``positive`` of the positives there, ``upto`` of the negatives not below; ``beside`` ``(t, R)``
    of the negatives with that very score, at the ``tied`` ``(t,)`` of the m where there are any;
    ``negatives`` ``(R,)`` of all. Results are ``(R,)``, NaN without a positive or a negative.
    """

    positive: Array
    upto: Array
    tied: Rows
    beside: Array
    negatives: Array

    @cached_property
    def found(self) -> Array:
        """Weights of the positives called down to each score ``(m, R)``."""
        return np.cumsum(self.positive, axis=0)

    @cached_property
    def positives(self) -> Array:
        """Weights of all positives ``(R,)``."""
        return self.positive.sum(0)

    def auroc(self) -> Array:
        """Area under the ROC curve, ties counting half."""
        # twice the wins, so that whole numbers stay whole
        lost = 2 * np.einsum("mr,mr->r", self.positive, self.upto)
        half = np.einsum("mr,mr->r", self.positive[self.tied], self.beside)
        pairs = 2 * self.positives * self.negatives
        return ratio(pairs - lost + half, pairs)

    def average_precision(self) -> Array:
        """The sum over scores of precision times the gain in recall; defined without negatives."""
        return ratio(np.einsum("mr,mr->r", self.positive, self.precision()), self.positives)

    def precision(self) -> Array:
        """Share of the called that are positive ``(m, R)``; 0 where weights of 0 call nothing."""
        share = np.maximum(self.found + self.upto, np.finfo(np.float64).tiny)
        return np.divide(self.found, share, out=share)

    def sensitivity_at(self, specificity: float) -> Array:
        """The highest sensitivity of a threshold whose specificity is this or more."""
        # the further down, the fewer negatives are spared, and the more positives found
        spared = self.negatives - self.upto >= specificity * self.negatives
        found = np.append(np.zeros((1, len(self.negatives))), self.found, axis=0)
        best = np.take_along_axis(found, np.count_nonzero(spared, axis=0)[None], axis=0)[0]
        return np.where(self.negatives == 0, np.nan, ratio(best, self.positives))

    def specificity_at(self, sensitivity: float) -> Array:
        """The highest specificity of a threshold whose sensitivity is this or more."""
        missed = np.count_nonzero(self.found < sensitivity * self.positives, axis=0)
        called = np.append(self.upto, np.zeros((1, len(self.negatives))), axis=0)
        called = np.take_along_axis(called, missed[None], axis=0)[0]
        spared = ratio(self.negatives - called, self.negatives)
        return np.where(self.positives == 0, np.nan, spared)

    def curve(self) -> tuple[Array, Array]:
        """Corners ``(2 m + 2, R)`` of the ROC curve: false, and true positive rates."""
        count = self.positive.shape[1]
        false, true = np.zeros((2, 2 * len(self.positive) + 2, count))
        false[1:-1:2], false[2:-1:2], false[-1] = self.upto, self.upto, self.negatives
        false[1:-1:2][self.tied] -= self.beside
        true[1:-1:2], true[2:-1:2] = self.found - self.positive, self.found
        true[-1] = self.positives
        none = (self.negatives == 0) | (self.positives == 0)
        rates = [np.where(none, np.nan, ratio(v, v[-1])) for v in (false, true)]
        return rates[0], rates[1]
