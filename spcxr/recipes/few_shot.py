"""A few patients, or a few of each class: what a study with little labelling can afford."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.recipes.targets import Matrix, Targets

REST = "none of them"


def take_patients(patients: NDArray[np.str_], count: int, seed: int) -> NDArray[np.bool_]:
    """Choose ``count`` of the patients of the rows ``(n,)``, and all of their rows, ``(n,)`` bool.

    Fewer of one seed are among more of it, and among a share of it (`finetune.take_fraction`).

    Raises
    ------
    SpcxrError
        there are fewer.

    >>> take_patients(np.array(["a", "a", "b", "c"]), 3, seed=0).tolist()
    [True, True, True, True]
    """
    names = np.unique(patients)
    if len(names) < count:
        raise SpcxrError(f"{len(names)} training patients have a mask, not {count}; lower --labels")
    order = np.random.default_rng(seed).permutation(len(names))
    return np.isin(patients, names[order[:count]])


def take_per_class(
    patients: NDArray[np.str_], targets: Targets, values: Matrix, count: int, seed: int
) -> NDArray[np.bool_]:
    """Choose ``count`` patients of each class, and all of their rows.

    Fewer of one seed are among more of it. One of many: a patient is of the class of the first
    row. Several labels: ``count`` patients with each label, one patient serving several of them
    (as many as there are, where fewer), and ``count`` with none of them. Ours.

    Parameters
    ----------
    patients, values
        ``(n,)`` pseudonyms and ``(n, K)`` 1, 0, NaN, of the rows to choose from.

    Returns
    -------
    ``(n,)`` bool.

    Raises
    ------
    SpcxrError
        fewer patients of a class than asked for; of several labels: none.

    >>> who, values = np.array(["a", "b", "c", "d"]), np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    >>> two = Targets(("tb", "healthy"), False, values)
    >>> int(take_per_class(who, two, values, 1, seed=0).sum())
    2
    >>> take_per_class(who, two, values, 3, seed=0)
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: class tb has 2 training patients, not 3; lower --labels-per-class
    """
    names, first, number = np.unique(patients, return_index=True, return_inverse=True)
    if targets.multilabel:
        # A patient has a label where any of the rows has it.
        having = np.zeros((len(names), len(targets.names)), bool)
        np.logical_or.at(having, number, values == 1)
        members = np.column_stack([having, ~having.any(1)])
    else:
        members = np.eye(len(targets.names), dtype=bool)[values[first].argmax(1)]
    order = np.random.default_rng(seed).permutation(len(names))
    chosen: list[np.int64] = []
    for name, there in zip((*targets.names, REST), members.T, strict=False):
        found = order[there[order]]
        least = count if not targets.multilabel else int(name != REST)
        if len(found) < least:
            raise SpcxrError(
                f"class {name} has {len(found)} training patients, not {count}; "
                "lower --labels-per-class"
            )
        chosen += found[:count].tolist()
    return np.isin(number, chosen)
