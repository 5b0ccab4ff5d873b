"""Bootstrap intervals over patients: images of one patient are not independent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spcxr.errors import SpcxrError

Array = NDArray[Any]
# From the weights of the rows, (n,) or (R, n), to one value or (R,): see `evaluate.metrics`.
Statistic = Callable[[Array], Array]

# Weights made at a time: 8 MB of float32, twice as much where a metric needs float64.
BLOCK = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A value, its percentile interval, and what stands behind it.

    ``n_undefined`` resamples (no positive drawn, say) are left out of the percentiles. ``low`` and
    ``high`` are NaN where the value is, with fewer than two patients, or if no resample is defined.
    """

    value: float
    low: float
    high: float
    n_rows: int
    n_patients: int
    n_undefined: int

    def __str__(self) -> str:
        """``0.912 (0.880 to 0.941)``; a dash where there is no value.

        >>> str(Interval(0.5, 0.25, 0.75, 4, 4, 0)), str(Interval(np.nan, np.nan, np.nan, 4, 4, 9))
        ('0.500 (0.250 to 0.750)', '–')
        """
        if np.isnan(self.value):
            return "–"
        if np.isnan(self.low):
            return f"{self.value:z.3f}"
        return f"{self.value:z.3f} ({self.low:z.3f} to {self.high:z.3f})"


def resample_counts(patients: ArrayLike, *, n: int, seed: int) -> Iterator[Array]:
    """Yield blocks ``(R, rows)`` float32 of how often each row is drawn; n resamples in all.

    As many patients are drawn with replacement as there are, and each brings all of its rows.
    The stream depends on the patients and the seed alone, so that two models are compared on the
    same draws. In memory the resamples of a row lie side by side: what sums over rows is quick.

    >>> counts = np.concatenate(list(resample_counts(["a", "a", "b"], n=50, seed=1)))
    >>> counts.shape, bool((counts[:, 0] == counts[:, 1]).all())
    ((50, 3), True)
    """
    _, who = np.unique(np.asarray(patients), return_inverse=True)
    count = int(who.max()) + 1 if len(who) else 0
    rng = np.random.default_rng(seed)
    one_each = count == len(who) and bool((who == np.arange(count)).all())
    most = max(BLOCK // max(len(who), 1), 1)
    for start in range(0, n, most):
        drawn = rng.integers(0, count, (min(most, n - start), count), dtype=np.int32)
        counts = np.empty(drawn.shape, np.float32)
        for row, patients_drawn in zip(counts, drawn, strict=True):
            row[:] = np.bincount(patients_drawn, minlength=count)
        turned = np.ascontiguousarray(counts.T)
        yield (turned if one_each else np.take(turned, who, axis=0)).T


def bootstrap_all(
    patients: ArrayLike,
    statistics: Mapping[str, Statistic],
    *,
    n: int = 2000,
    seed: int,
    level: float = 0.95,
    rows: Mapping[str, Array] | None = None,
) -> dict[str, Interval]:
    """Intervals of several statistics from the same resamples (cheaper than one by one).

    Parameters and errors as for `bootstrap`. ``rows[name]`` ``(rows,)`` bool says which rows a
    statistic reads (all if not named), for the interval's counts of rows and patients.
    """
    who = np.asarray(patients)
    if who.ndim != 1 or len(who) == 0:
        raise SpcxrError("no rows to resample; choose splits that hold labelled rows")
    if n < 1 or not 0 < level < 1:
        raise SpcxrError(f"n is {n} and level {level}; give n >= 1 and a level in (0, 1)")
    ones = np.ones(len(who))
    values = {name: float(statistic(ones)) for name, statistic in statistics.items()}
    draws: dict[str, list[Array]] = {name: [] for name in statistics}
    for counts in resample_counts(who, n=n, seed=seed):
        for name, statistic in statistics.items():
            draws[name].append(statistic(counts))
    made = {}
    for name in statistics:
        read = who if rows is None or name not in rows else who[rows[name]]
        found = np.concatenate(draws[name])
        made[name] = _interval(values[name], found, level, len(read), len(np.unique(read)))
    return made


def _interval(value: float, draws: Array, level: float, n_rows: int, n_patients: int) -> Interval:
    defined = draws[~np.isnan(draws)]
    low = high = float("nan")
    if n_patients > 1 and len(defined) and not np.isnan(value):
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return Interval(value, low, high, n_rows, n_patients, len(draws) - len(defined))


def bootstrap(
    patients: ArrayLike,
    statistic: Statistic,
    *,
    n: int = 2000,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of a statistic under resampling of patients (Efron 1979, clustered).

    Parameters
    ----------
    patients
        ``(rows,)`` pseudonym of each row; rows that share one are drawn together. Leave out rows
        that the statistic would ignore, or the interval tells of too many patients.
    statistic
        weights ``(n,)`` -> one value; weights ``(R, n)`` -> ``(R,)``.
    n
        resamples.
    level
        coverage aimed at.

    Raises
    ------
    SpcxrError
        no rows.

    >>> from spcxr.evaluate.metrics import auroc
    >>> labels, scores = np.array([0, 0, 1, 1, 0, 1]), np.array([0.1, 0.4, 0.35, 0.8, 0.2, 0.9])
    >>> found = bootstrap(list("aabbcd"), lambda w: auroc(labels, scores, w), n=200, seed=0)
    >>> round(found.value, 3), found.n_patients, found.low < found.value <= found.high
    (0.889, 4, True)
    """
    return bootstrap_all(patients, {"it": statistic}, n=n, seed=seed, level=level)["it"]


def paired_bootstrap(
    patients: ArrayLike,
    first: Statistic,
    second: Statistic,
    *,
    n: int = 2000,
    seed: int,
    level: float = 0.95,
) -> Interval:
    """Interval of ``first - second``: two models on the same rows, drawn together.

    Far narrower than two intervals side by side would suggest when the models agree on what is
    hard. An interval that excludes 0 speaks for a difference on these patients.

    >>> from spcxr.evaluate.metrics import mean
    >>> a, b = np.array([0.9, 0.5, 0.7]), np.array([0.8, 0.4, 0.6])
    >>> found = paired_bootstrap(list("abc"), lambda w: mean(a, w), lambda w: mean(b, w), seed=0)
    >>> round(found.low, 6), round(found.high, 6)
    (0.1, 0.1)
    """
    return bootstrap(patients, lambda w: first(w) - second(w), n=n, seed=seed, level=level)


def bootstrap_differences(
    patients: tuple[ArrayLike, ArrayLike],
    statistics: Mapping[str, tuple[Statistic, Statistic]],
    *,
    n: int = 2000,
    seed: int,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Intervals of ``first - second``, each a statistic of one set of rows and one of another.

    Sets that share no patient are resampled each by itself. A patient who is in both is drawn, or
    not, in both: then the patients of both together are resampled.

    Parameters
    ----------
    patients
        ``(n,)`` and ``(m,)``: who each row is, by names that mean the same in both.
    statistics
        by name: one of the weights of the first rows, and one of the second's.

    Raises
    ------
    SpcxrError
        a set without rows.

    >>> from spcxr.evaluate.metrics import mean
    >>> a, b = np.array([0.9, 0.8, 0.7]), np.array([0.6, 0.4])
    >>> pair = (lambda w: mean(a, w), lambda w: mean(b, w))
    >>> found = bootstrap_differences((list("abc"), list("de")), {"mean": pair}, seed=0)["mean"]
    >>> round(found.value, 3), found.n_patients, found.low < 0.3 < found.high
    (0.3, 5, True)
    """
    sets = [np.asarray(who, dtype=np.str_) for who in patients]
    if not all(len(who) for who in sets):
        raise SpcxrError("no rows to resample; choose splits that hold labelled rows")
    both, cut = np.concatenate(sets), len(sets[0])
    draws: dict[str, list[list[Array]]] = {name: [[], []] for name in statistics}

    def add(side: int, counts: Array) -> None:
        for name, pair in statistics.items():
            draws[name][side].append(pair[side](counts))

    if len(np.intersect1d(sets[0], sets[1])):
        for counts in resample_counts(both, n=n, seed=seed):
            add(0, counts[:, :cut])
            add(1, counts[:, cut:])
    else:
        for side, who in enumerate(sets):
            # Two streams, so that the chance in one set does not follow that in the other.
            for counts in resample_counts(who, n=n, seed=seed + side):
                add(side, counts)
    fewest = min(len(np.unique(who)) for who in sets)
    made = {}
    for name, pair in statistics.items():
        value = float(pair[0](np.ones(cut)) - pair[1](np.ones(len(both) - cut)))
        first, second = (np.concatenate(side) for side in draws[name])
        # With a single patient on either side there is no interval.
        found = _interval(value, first - second, level, len(both), fewest)
        made[name] = replace(found, n_patients=len(np.unique(both)))
    return made
