"""What is learned from label columns: known values, and whether labels exclude each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spcxr.config import as_flag
from spcxr.errors import SpcxrError

Matrix = NDArray[np.float32]
Rows = NDArray[np.int64]

# Label smoothing regularisation of uncertain labels: what they are drawn between, while training
# (Pham et al., arXiv 1911.06475).
SOFT = {"lsr-ones": (0.55, 0.85), "lsr-zeros": (0.0, 0.3)}
POLICIES = ("ignore", "ones", "zeros", *SOFT)


@dataclass(frozen=True)
class Targets:
    """Label names, the kind of task, and ``values (n, K)`` float32: 1, 0, NaN = unknown."""

    names: tuple[str, ...]
    multilabel: bool
    values: Matrix

    @property
    def said(self) -> str:
        """The task in a line.

        >>> Targets(("tb", "healthy"), False, np.zeros((0, 2), np.float32)).said
        'one of 2 classes: tb, healthy'
        """
        count = len(self.names)
        what = f"{count} findings" if self.multilabel else f"one of {count} classes"
        if self.multilabel and count == 1:
            what = "1 finding"
        return f"{what}: {', '.join(self.names)}"

    def labelled(self, rows: Rows) -> Rows:
        """Those of ``rows`` with any known label."""
        return rows[~np.isnan(self.values[rows]).all(1)]


def settle_uncertain(matrix: Matrix, policy: str) -> Matrix:
    """Labels 1 / 0 / -1 / NaN -> 1 / 0 / NaN: -1 (uncertain) becomes unknown, 1 or 0.

    The policies U-Ignore, U-Ones and U-Zeros of CheXpert (arXiv 1901.07031). By those of `SOFT`
    it is unknown too: values are drawn for the training loss alone, and nothing is judged by them.

    >>> settle_uncertain(np.array([[1, -1, np.nan]], np.float32), "ones").tolist()
    [[1.0, 1.0, nan]]
    """
    value = {"ones": 1.0, "zeros": 0.0}.get(policy, np.nan)
    return np.where(matrix == -1, value, matrix).astype(np.float32)


def is_one_of_many(values: Matrix) -> bool:
    """Whether each labelled row is fully known and has exactly one 1 among two labels or more.

    >>> is_one_of_many(np.array([[1, 0], [0, 1], [np.nan, np.nan]], np.float32))
    True
    """
    labelled = values[~np.isnan(values).all(1)]
    one_each = bool((~np.isnan(labelled)).all()) and bool((labelled.sum(1) == 1).all())
    return values.shape[1] > 1 and one_each


def keep_chosen(chosen: Matrix, every: Matrix) -> Matrix:
    """Some classes of a label that is one of many: rows of the other classes become unknown.

    Otherwise a row of none of the chosen classes would look like one with no finding. Where
    ``every`` label of the data is not one of many, or a single class is chosen (it against the
    rest), nothing is changed.

    Parameters
    ----------
    chosen, every
        ``(n, k)`` and ``(n, K)`` 1, 0, NaN: the chosen labels, and all that the data have.

    >>> keep_chosen(np.eye(3, dtype=np.float32)[:, :2], np.eye(3, dtype=np.float32)).tolist()
    [[1.0, 0.0], [0.0, 1.0], [nan, nan]]
    """
    if chosen.shape[1] < 2 or not is_one_of_many(every):
        return chosen
    inside = (chosen == 1).any(1, keepdims=True)
    return np.where(inside, chosen, np.float32(np.nan))


def refuse_unlearnable(
    targets: Targets, rows: Rows, where: str, wider: str = "widen --train-splits"
) -> None:
    """Refuse labels that no training row tells apart, naming the ones that can be learned.

    ``wider`` says how there would be more rows.

    Raises
    ------
    SpcxrError
        labels without a known value, or with one value only, among ``rows``.
    """
    values = targets.values[rows]
    blank = [n for n, v in zip(targets.names, values.T, strict=True) if np.isnan(v).all()]
    constant = [
        n
        for n, v in zip(targets.names, values.T, strict=True)
        if n not in blank and len(np.unique(v[~np.isnan(v)])) == 1
    ]
    good = [n for n in targets.names if n not in blank and n not in constant]
    if len(good) == len(targets.names):
        return
    faults = [f"{', '.join(blank)} blank in all rows"] if blank else []
    faults += [f"{', '.join(constant)} the same in all known rows"] if constant else []
    remedy = f"choose --labels {as_flag(good)}" if good else "label more rows"
    raise SpcxrError(
        f"{where}: {len(rows)} training rows with {'; '.join(faults)}; {remedy}, or {wider}"
    )


def class_weights(values: Matrix, *, multilabel: bool) -> Matrix:
    """Weights that make rare labels count as much as common ones, ``(K,)`` float32.

    Multi-class: ``n / (K * n_c)``, scikit-learn's "balanced". Multi-label: negatives over
    positives, the weight of a positive in `masked_bce`.

    >>> class_weights(np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32), multilabel=False)
    array([0.6666667, 2.       ], dtype=float32)
    """
    positive = (values == 1).sum(0)
    if multilabel:
        return ((values == 0).sum(0) / positive).astype(np.float32)
    return (positive.sum() / (values.shape[1] * positive)).astype(np.float32)
