"""The AUROC's variance in closed form: one model's interval, and the test between two models.

DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988): every positive has a *placement*, the share
of the negatives that it beats, every negative one, the share of the positives that beat it; the
AUROC is the mean of either, and its variance follows from theirs. The placements come from
midranks, in O(n log n) (Sun and Xu, IEEE Signal Processing Letters 21, 2014). Rows of one patient
are not independent: their placements are summed before they are squared (Obuchowski, Biometrics 53,
1997), which is DeLong's formula again where every patient has one row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri
from scipy.stats import rankdata

from spcxr.errors import SpcxrError
from spcxr.evaluate.intervals import Interval
from spcxr.evaluate.ranking import known_rows

Array = NDArray[Any]

# Below this a variance is the rounding of float64, and 0 is meant.
NO_VARIANCE = 1e-28


@dataclass(frozen=True)
class PairedTest:
    """Difference of two models' AUROC on the same rows, first minus second.

    ``low`` and ``high`` bound it; ``p`` is two-sided, for "no difference". All three are NaN
    where the variance is not defined, or 0 (a model against itself): there is nothing to test.
    """

    difference: float
    low: float
    high: float
    p: float


def delong_interval(
    labels: ArrayLike, scores: ArrayLike, patients: ArrayLike | None = None, *, level: float = 0.95
) -> Interval:
    """AUROC with DeLong's interval, on the logit scale.

    On the logit scale the interval stays in [0, 1], and near 1 it covers better than the symmetric
    one, which reaches beyond 1 and has to be cut (Pepe, The Statistical Evaluation of Medical
    Tests, 2003).

    Parameters
    ----------
    labels, scores
        ``(n,)``: 0 / 1 / NaN = unknown, left out; any monotone score.
    patients
        ``(n,)`` pseudonyms; every row is its own patient if not given.
    level
        coverage aimed at.

    Returns
    -------
    The value as `metrics.auroc`'s. ``low`` and ``high`` are NaN where there is no variance to be
    had: fewer than two patients with a positive, or with a negative; an AUROC of exactly 0 or 1,
    whose variance of 0 is no certainty (the bootstrap shares this fault, and shows ``1 to 1``).

    Raises
    ------
    SpcxrError
        labels or scores that `metrics.auroc` refuses; patients of another length.

    >>> found = delong_interval([0, 0, 1, 1, 0, 1], [0.1, 0.4, 0.35, 0.8, 0.2, 0.9])
    >>> print(found)
    0.889 (0.261 to 0.995)
    >>> print(delong_interval([0, 0, 1, 1], [0.1, 0.2, 0.3, 0.4]))
    1.000
    """
    truth, (score,), who = _rows(labels, [scores], patients)
    placements = _placements(truth, score)
    value, variance = _value_and_variance(placements, who)
    low = high = float("nan")
    if variance > 0 and 0 < value < 1:
        middle = math.log(value / (1 - value))
        reach = _quantile(level) * math.sqrt(variance) / (value * (1 - value))
        low, high = (1 / (1 + math.exp(-min(end, 700))) for end in (middle - reach, middle + reach))
    elif variance == 0 and (placements.of_all == 0.5).all():
        low = high = value  # one score for all: no sample of patients gives another value
    return Interval(value, low, high, len(truth), len(np.unique(who)), 0)


def delong_paired(
    labels: ArrayLike,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    patients: ArrayLike | None = None,
    *,
    level: float = 0.95,
) -> PairedTest:
    """Difference of two AUROCs on the same rows, with interval and p-value (normal, two-sided).

    Parameters and errors as for `delong_interval`.

    >>> labels = [0, 0, 1, 1, 0, 1]
    >>> found = delong_paired(
    ...     labels, [0.1, 0.4, 0.35, 0.8, 0.2, 0.9], [0.3, 0.4, 0.2, 0.8, 0.1, 0.6])
    >>> round(found.difference, 3), round(found.p, 3)
    (0.111, 0.48)
    """
    truth, (first, second), who = _rows(labels, [scores_a, scores_b], patients)
    ours, theirs = _placements(truth, first), _placements(truth, second)
    # a mean of differences: the covariance of the two models needs no formula of its own
    apart = _Placements(ours.positive, ours.of_all - theirs.of_all)
    difference, variance = _value_and_variance(apart, who)
    if not variance > 0:
        return PairedTest(difference, float("nan"), float("nan"), float("nan"))
    spread = math.sqrt(variance)
    reach = _quantile(level) * spread
    return PairedTest(
        difference,
        max(difference - reach, -1.0),
        min(difference + reach, 1.0),
        math.erfc(abs(difference) / spread / math.sqrt(2)),
    )


def _rows(
    labels: ArrayLike, scores: list[ArrayLike], patients: ArrayLike | None
) -> tuple[Array, list[Array], Array]:
    """Labels, scores and patients' numbers of the rows whose label is known."""
    checked = [known_rows(labels, given) for given in scores]
    kept, truth, _ = checked[0]
    who = np.arange(np.size(labels)) if patients is None else np.asarray(patients)
    if who.shape != (np.size(labels),):
        raise SpcxrError(f"patients {who.shape}, labels ({np.size(labels)},); give one a row")
    numbers = np.unique(who[kept], return_inverse=True)[1]
    return truth, [score for _, _, score in checked], numbers


@dataclass(frozen=True)
class _Placements:
    """``of_all`` ``(n,)`` of every row; ``positive`` ``(n,)`` bool says which kind it is."""

    positive: NDArray[np.bool_]
    of_all: Array


def _placements(truth: Array, score: Array) -> _Placements:
    """Of each positive the share of negatives below it, of each negative of positives above."""
    positive = truth == 1
    count, others = int(positive.sum()), int((~positive).sum())
    made = np.full(len(truth), np.nan)
    if count and others:
        ranks = rankdata(score)
        made[positive] = (ranks[positive] - rankdata(score[positive])) / others
        made[~positive] = 1 - (ranks[~positive] - rankdata(score[~positive])) / count
    return _Placements(positive, made)


def _value_and_variance(placements: _Placements, who: Array) -> tuple[float, float]:
    """Mean placement, and its variance after Obuchowski (1997); NaN if undefined."""
    positive, of_all = placements.positive, placements.of_all
    count, others = int(positive.sum()), int((~positive).sum())
    if not count or not others:
        return float("nan"), float("nan")
    value = float(of_all[positive].mean())
    patients = int(who.max()) + 1
    sums, there = [], []
    for kind in (positive, ~positive):
        sums.append(np.bincount(who[kind], of_all[kind] - value, minlength=patients))
        there.append(len(np.unique(who[kind])))
    if min(there) < 2:
        return value, float("nan")
    ours, theirs = (
        held / (held - 1) * float(np.square(total).sum()) / size**2
        for total, held, size in zip(sums, there, (count, others), strict=True)
    )
    both = patients / (patients - 1) * float(sums[0] @ sums[1]) / (count * others)
    variance = ours + theirs + 2 * both
    return value, variance if variance > NO_VARIANCE else 0.0


def _quantile(level: float) -> float:
    """Of the standard normal, for an interval of that coverage."""
    if not 0 < level < 1:
        raise SpcxrError(f"level {level}; give one in (0, 1)")
    return float(ndtri((1 + level) / 2))
