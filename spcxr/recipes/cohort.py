"""Which rows `classify` learns from, chooses by and is tested on, and what their labels mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.metrics import auroc, by_class
from spcxr.ops.philox import uniform
from spcxr.recipes.few_shot import take_per_class
from spcxr.recipes.finetune import Cohort, rows_of, take_fraction
from spcxr.recipes.targets import (
    SOFT,
    Matrix,
    Rows,
    Targets,
    is_one_of_many,
    keep_chosen,
    refuse_unlearnable,
    settle_uncertain,
)

if TYPE_CHECKING:
    from spcxr.recipes.classify import ClassifyConfig


@dataclass(frozen=True)
class Labelled(Cohort):
    """Rows with labels, and the targets that they hold.

    ``soft``: entries ``(n, K)`` bool of uncertain labels that training takes as values drawn
    between ``span``'s ends; empty where there are none.
    """

    targets: Targets
    soft: NDArray[np.bool_]
    span: tuple[float, float] = (0.0, 0.0)

    def drawn(self, rows: Rows, *, seed: int, epoch: int) -> Matrix:
        """Values ``(B, K)`` to learn from in an epoch: the known ones, and the soft ones drawn.

        A draw depends on (seed, epoch, row) alone.
        """
        values = self.targets.values[rows]
        if not self.soft.size:
            return values
        low, high = self.span
        shares = uniform(
            torch.from_numpy(rows), values.shape[1], seed=seed, epoch=epoch, stream="label"
        )
        drawn = (low + (high - low) * shares).numpy().astype(np.float32)
        return np.where(self.soft[rows], drawn, values)

    def known(self, rows: Rows) -> int:
        """How many entries of ``rows`` training takes a value for."""
        known = ~np.isnan(self.targets.values[rows])
        return int((known | self.soft[rows]).sum() if self.soft.size else known.sum())


def choose_cohort(config: ClassifyConfig, store: Store) -> Labelled:
    """Settle labels, kind of task and rows.

    Raises
    ------
    SpcxrError
        no labels, an empty split, labels that cannot be learned or judged, or a task asked for
        that the labels do not fit.
    """
    names = config.labels or store.manifest.labels
    if not names:
        raise SpcxrError(
            f"{store.path}: no label columns; add one (1, 0, -1 or blank, but not throughout) to "
            "the manifest and prepare it again"
        )
    _refuse_doubled(names, str(store.path))
    raw = store.manifest.label_matrix(names)
    values = settle_uncertain(raw, config.uncertain)
    if config.task != "multilabel":
        rows = np.concatenate([rows_of(store, *chosen) for chosen in config.splits])
        every = store.manifest.label_matrix(store.manifest.labels)[rows]
        values[rows] = keep_chosen(values[rows], settle_uncertain(every, config.uncertain))
    whole = Targets(tuple(names), False, values)
    soft = raw == -1 if config.uncertain in SOFT else np.zeros((0, 0), np.bool_)
    # Of a row with soft labels alone something can be learned, but nothing judged.
    taught = replace(whole, values=np.where(soft, 0.5, values)) if soft.size else whole
    train, val, test = (
        _labelled_rows(part, store, *chosen)
        for part, chosen in zip((taught, whole, whole), config.splits, strict=True)
    )
    used = values[np.concatenate([train, val, test])]
    targets = Targets(tuple(names), _is_multilabel(config, used, store), values)
    train = _some(config, store, targets, train)
    wider = "raise --label-fraction" if config.label_fraction < 1 else "widen --train-splits"
    refuse_unlearnable(targets, train, str(store.path), wider)
    _refuse_unjudged(values[val], str(store.path))
    return Labelled(train, val, test, targets, soft, SOFT.get(config.uncertain, (0.0, 0.0)))


def _refuse_doubled(names: Sequence[str], where: str) -> None:
    """Refuse labels whose columns of ``predictions.csv``, ``NAME`` and ``p_NAME``, are one."""
    columns = [column for name in names for column in (name, f"p_{name}")]
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise SpcxrError(
            f"{where}: two columns of the predictions would be called {twice[0]!r}; name each "
            "label once, and rename one that begins with p_"
        )


def _refuse_unjudged(values: Matrix, where: str) -> None:
    """Refuse validation values ``(n, K)`` none of whose labels is both 1 and 0."""
    if np.isnan(macro_auroc(values, np.zeros_like(values))):
        raise SpcxrError(
            f"{where}: no label takes both values in the validation rows, so no epoch can be "
            "chosen by them; widen --val-splits"
        )


def _labelled_rows(whole: Targets, store: Store, splits: tuple[str, ...], flag: str) -> Rows:
    rows = whole.labelled(rows_of(store, splits, flag))
    if splits and len(rows) == 0:
        raw = store.manifest.label_matrix(whole.names)[rows_of(store, splits, flag)]
        found, how = (
            ("blank or -1", "another --uncertain, ") if (raw == -1).any() else ("blank", "")
        )
        raise SpcxrError(
            f"{store.path}: {', '.join(whole.names)} {found} in all rows of {', '.join(splits)}; "
            f"choose {how}other --labels or {flag}"
        )
    return rows


def _is_multilabel(config: ClassifyConfig, used: Matrix, store: Store) -> bool:
    """What ``--task`` says, checked; ``auto`` looks at the labels."""
    one_each = is_one_of_many(used)
    if config.task == "multiclass" and not one_each:
        raise SpcxrError(
            f"{store.path}: not every labelled row has exactly one class out of two or more; "
            "choose --task multilabel, or other --labels"
        )
    multilabel = config.task == "multilabel" or not one_each
    if config.uncertain in SOFT and not multilabel:
        raise SpcxrError(
            f"{store.path}: one of many classes, for which --uncertain {config.uncertain} means "
            "nothing; choose ignore, or --task multilabel"
        )
    return multilabel


def _some(config: ClassifyConfig, store: Store, targets: Targets, rows: Rows) -> Rows:
    """Those of ``rows`` that ``--label-fraction`` or ``--labels-per-class`` keeps."""
    patients, values = store.manifest.patients[rows], targets.values[rows]
    if config.labels_per_class:
        try:
            kept = take_per_class(patients, targets, values, config.labels_per_class, config.seed)
        except SpcxrError as error:
            raise SpcxrError(f"{store.path}: {error}") from error
        return rows[kept]
    classes = values.argmax(1)
    strata = np.zeros_like(classes) if targets.multilabel else classes
    return rows[take_fraction(patients, strata, config.label_fraction, config.seed)]


def macro_auroc(values: Matrix, scores: NDArray[Any]) -> float:
    """Mean AUROC over the labels that take both values; NaN where none does.

    >>> macro_auroc(np.array([[0, 1], [1, 1]], np.float32), np.array([[0.1, 0.5], [0.9, 0.5]]))
    1.0
    """
    found = by_class(auroc, values, scores)
    return float(found[~np.isnan(found)].mean()) if (~np.isnan(found)).any() else float("nan")
