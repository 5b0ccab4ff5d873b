"""Do the probabilities mean what they say? Measures of it, and temperatures that mend it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, softmax

from spcxr.errors import SpcxrError
from spcxr.evaluate.ranking import by_resample, known_rows, like, ratio
from spcxr.evaluate.report import write_json
from spcxr.evaluate.thresholds import (
    as_number,
    choose_thresholds,
    read_kept,
    write_thresholds,
)

Array = NDArray[Any]

FILE = "calibration.json"
BINS = 15  # as in arXiv 1706.04599
# Ours: a best temperature outside these says that the rows are too few or too easy to tell.
LOWEST, HIGHEST = 0.1, 10.0


# --- measures -------------------------------------------------------------------------------


def brier(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None) -> Array:
    """Mean squared distance of a probability from what was true; equals scikit-learn's.

    Parameters
    ----------
    labels, scores
        ``(n,)``: 0 / 1 / NaN = unknown, left out; probabilities.
    weights
        None, ``(n,)`` or ``(R, n)`` (see `evaluate.metrics`).

    Returns
    -------
    one value, or ``(R,)``; NaN without a row.

    Raises
    ------
    SpcxrError
        labels other than 0, 1, NaN; scores that are NaN or outside [0, 1].

    >>> float(brier([0, 1, np.nan], [0.5, 1.0, 0.3]))
    0.125
    """
    kept, truth, score = _probable(labels, scores)
    table = by_resample(weights, np.size(labels))[kept]
    return like(ratio(np.square(score - truth) @ table, table.sum(0)), weights)


def calibration_error(
    labels: ArrayLike, scores: ArrayLike, weights: ArrayLike | None = None
) -> Array:
    """Expected calibration error: 15 bins of equal width (arXiv 1706.04599, eq. 3).

    The mean over rows of the distance between the mean probability and the share of true labels in
    the row's bin. A bin holds its upper end. Of few rows it is never near 0, however good the
    model: chance alone tips the bins. Arguments, result and errors as for `brier`.

    One label of several: probability and truth of that label. One class of many: the highest
    probability, and whether its class is the true one (`top_label`).

    >>> round(float(calibration_error([0, 1, 1, 0], [0.1, 0.9, 0.9, 0.9])), 3)
    0.2
    """
    kept, truth, score = _probable(labels, scores)
    table = by_resample(weights, np.size(labels))
    place = bin_of(score)
    apart, total = np.zeros((2, table.shape[1]))
    for number in np.unique(place):
        rows = place == number
        held = table[kept[rows]]
        apart += np.abs((score - truth)[rows] @ held)
        total += held.sum(0)
    return like(ratio(apart, total), weights)


def top_label(labels: ArrayLike, scores: ArrayLike) -> tuple[Array, Array]:
    """One-hot labels, probabilities ``(n, K)`` -> (was the highest right, how high is it) ``(n,)``.

    >>> [v.tolist() for v in top_label([[1, 0], [1, 0]], [[0.9, 0.1], [0.4, 0.6]])]
    [[1.0, 0.0], [0.9, 0.6]]
    """
    truth, score = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    guess = score.argmax(1)[:, None]
    return np.take_along_axis(truth, guess, 1)[:, 0], np.take_along_axis(score, guess, 1)[:, 0]


def reliability_curve(labels: ArrayLike, scores: ArrayLike) -> tuple[Array, Array, Array]:
    """(mean probability, share that is true, rows) of each bin that holds a row, rising.

    >>> [v.tolist() for v in reliability_curve([0, 1, 1], [0.1, 0.9, 0.9])]
    [[0.1, 0.9], [0.0, 1.0], [1, 2]]
    """
    _, truth, score = _probable(labels, scores)
    place = bin_of(score)
    count = np.bincount(place, minlength=BINS)
    held = count > 0
    means = [np.bincount(place, v, minlength=BINS)[held] / count[held] for v in (score, truth)]
    return means[0], means[1], count[held]


def _probable(labels: ArrayLike, scores: ArrayLike) -> tuple[Array, Array, Array]:
    """`known_rows`, whose scores must be probabilities."""
    kept, truth, score = known_rows(labels, scores)
    if len(score) and not 0 <= score.min() <= score.max() <= 1:
        raise SpcxrError("scores outside [0, 1] are no probabilities; give those, not logits")
    return kept, truth, score


def bin_of(score: Array) -> NDArray[np.intp]:
    """The bin of each probability, its upper end included; 0 stands in the first."""
    return np.clip(np.ceil(score * BINS).astype(np.intp) - 1, 0, BINS - 1)


# --- temperature ----------------------------------------------------------------------------


def fit_temperature(logits: Array, values: Array, *, multilabel: bool) -> Array:
    """The temperatures that make validation rows likeliest (arXiv 1706.04599, section 4.2).

    The mean negative log-likelihood of ``logits / T`` is convex in 1/T, so its one minimum is where
    its slope is 0.

    Parameters
    ----------
    logits
        ``(n, K)``, before any sigmoid or softmax.
    values
        ``(n, K)`` 1, 0, NaN = unknown. One of many: one-hot; other rows are left out.
    multilabel
        whether every label has a probability of its own.

    Returns
    -------
    float64: ``(K,)`` for multi-label; ``(1,)`` for one of many, since one temperature for all
    classes changes no order of them. NaN where it cannot be fitted: no row; one kind of row only;
    a minimum outside [0.1, 10] (rows told apart without an error, or no better than by chance).

    Raises
    ------
    SpcxrError
        shapes that differ, or logits that are NaN or infinite.

    >>> logits = np.array([[4.0], [4.0], [4.0], [-4.0]])
    >>> fit_temperature(logits, np.array([[1.0], [1.0], [0.0], [0.0]]), multilabel=True).round(3)
    array([3.641])
    """
    given, truth = np.asarray(logits, np.float64), np.asarray(values, np.float64)
    if given.ndim != 2 or given.shape != truth.shape:
        raise SpcxrError(f"logits {given.shape} and values {truth.shape}; give two (n, K) arrays")
    if not np.isfinite(given).all():
        raise SpcxrError("logits hold NaN or infinity; the model is broken, retrain or use fp32")
    if multilabel:
        return np.array([_one_label(z, y) for z, y in zip(given.T, truth.T, strict=True)])
    kept = ~np.isnan(truth).any(1) & ((truth == 1).sum(1) == 1)
    z, y = given[kept], truth[kept]
    if len(y) == 0 or (y == y[0]).all():
        return np.array([np.nan])
    right = (z * y).sum(1)
    return np.array([_temperature(lambda beta: (softmax(beta * z, axis=1) * z).sum(1) - right)])


def _one_label(logits: Array, values: Array) -> float:
    """The temperature of one label ``(n,)``."""
    known = ~np.isnan(values)
    z, y = logits[known], values[known]
    if len(y) == 0 or (y == y[0]).all():
        return float("nan")
    return _temperature(lambda beta: (expit(beta * z) - y) * z)


def _temperature(slopes: Callable[[float], Array]) -> float:
    """Where the mean of ``slopes(1 / T)`` ``(n,)``, which rises with 1 / T, is 0."""

    def slope(beta: float) -> float:
        return float(slopes(beta).mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    if not slope(low) < 0 < slope(high):
        return float("nan")
    return 1 / float(brentq(slope, low, high))


def apply_temperature(logits: Array, temperatures: Array) -> Array:
    """``logits / temperatures``: ``(n, K)`` by ``(K,)`` or ``(1,)``; NaN changes nothing.

    >>> apply_temperature(np.array([[2.0, 3.0]]), np.array([2.0, np.nan])).tolist()
    [[1.0, 3.0]]
    """
    chosen = np.asarray(temperatures, np.float64)
    if chosen.shape not in {(1,), np.shape(logits)[1:]}:
        raise SpcxrError(
            f"temperatures {chosen.shape} for logits {np.shape(logits)}; give one, or one a label"
        )
    return np.asarray(logits) / np.where(np.isnan(chosen), 1.0, chosen)


# --- beside the model -----------------------------------------------------------------------


def write_calibration(
    folder: str | Path, names: Sequence[str], temperatures: Array, facts: Mapping[str, Any]
) -> Path:
    """Write ``calibration.json``: the temperatures (null = not fitted) and how they were found.

    One temperature for all classes is a number, one a label a mapping.
    """
    one = len(temperatures) == 1 and len(names) != 1
    return write_json(
        Path(folder) / FILE,
        {
            "labels": list(names),
            "temperature": temperatures[0] if one else dict(zip(names, temperatures, strict=True)),
            **facts,
        },
    )


def read_calibration(folder: str | Path, names: Sequence[str]) -> Array | None:
    """Temperatures ``(1,)`` or ``(K,)`` for the logits of ``names``; None without the file.

    Raises
    ------
    SpcxrError
        a file that is torn, or of other labels.
    """

    def parse(facts: Mapping[str, Any]) -> Array:
        found = facts["temperature"]
        if isinstance(found, Mapping):
            made = np.array([as_number(found[name]) for name in names])
        else:
            made = np.array([as_number(found)])
        if (made <= 0).any() or np.isinf(made).any():
            raise ValueError("a temperature is above 0 and finite")
        return made

    return read_kept(Path(folder) / FILE, names, parse)


def settle_operating_point(
    folder: str | Path, names: Sequence[str], logits: Array, values: Array, *, multilabel: bool
) -> None:
    """Fit temperatures and choose thresholds on validation rows; write both files into ``folder``.

    Parameters
    ----------
    folder
        a model folder; files of an earlier call are replaced.
    names
        the K labels, in the order of the columns.
    logits, values, multilabel
        as for `fit_temperature`. The thresholds are of the tempered probabilities.

    Raises
    ------
    SpcxrError
        as `fit_temperature`.
    """
    temperatures = fit_temperature(logits, values, multilabel=multilabel)
    tempered = apply_temperature(logits, temperatures)
    scores = expit(tempered) if multilabel else softmax(tempered, axis=1)
    truth = np.asarray(values, np.float64)
    facts = {
        "fitted on": "the validation rows",
        "rows": {name: int(n) for name, n in zip(names, (~np.isnan(truth)).sum(0), strict=True)},
        "loss before and after": [
            _loss(np.asarray(z, np.float64), truth, multilabel) for z in (logits, tempered)
        ],
    }
    write_calibration(folder, names, temperatures, facts)
    write_thresholds(folder, names, choose_thresholds(truth, scores))


def _loss(logits: Array, values: Array, multilabel: bool) -> float:
    """Mean negative log-likelihood over the known labels, or over the rows of one known class."""
    if multilabel:
        known = ~np.isnan(values)
        parts = np.logaddexp(0.0, np.where(values == 1, -logits, logits))[known]
    else:
        kept = ~np.isnan(values).any(1) & ((values == 1).sum(1) == 1)
        parts = -(log_softmax(logits, axis=1) * values)[kept].sum(1)
    return float(parts.mean()) if len(parts) else float("nan")
