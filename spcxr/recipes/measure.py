"""One test set through one trained model: predictions, metrics with intervals, page sections."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics, pages
from spcxr.evaluate.intervals import Interval, Statistic
from spcxr.evaluate.report import Section, Table
from spcxr.evaluate.summary import (
    ClassSummary,
    age_groups,
    subgroups,
    summarise_classes,
    summarise_masks,
    usable_rows,
)
from spcxr.infer.predict import TrainedModel, predict_classes, predict_masks, probabilities
from spcxr.recipes.images import any_drawn
from spcxr.recipes.masks import examples, overlaps
from spcxr.train.device import Compute

Array = NDArray[Any]
Rows = NDArray[np.int64]

CHUNK_ROWS = 512


@dataclass(frozen=True)
class TestSet:
    """Rows of a store that are measured together; ``source`` is the data they came from."""

    __test__ = False  # not a pytest class

    name: str
    source: str
    store: Store
    rows: Rows

    @property
    def patients(self) -> Array:
        """``(n,)`` pseudonyms."""
        return np.asarray(self.store.manifest.patients)[self.rows]

    def column(self, name: str) -> Array:
        """``(n,)`` values of a manifest column."""
        return np.asarray(self.store.manifest.column(name), dtype=object)[self.rows]

    @property
    def groups(self) -> dict[str, Array]:
        """Columns that may split the set into subgroups."""
        ages = np.array([np.nan if a is None else a for a in self.column("age")], np.float64)
        text = {name: self.column(name).astype(str) for name in ("site", "view", "sex")}
        return text | {"age": age_groups(ages)}

    @property
    def drawn(self) -> bool:
        """Whether any row is a phantom."""
        return any_drawn(self.patients)


@dataclass(frozen=True)
class Settings(Compute):
    """How to predict and how to resample."""

    n_bootstrap: int = 2000
    seed: int = 0
    threshold: float = 0.5


@dataclass(frozen=True)
class Result:
    """What was found on one test set: ready for the table, the page and ``metrics.json``.

    ``predictions`` holds one mapping for each of ``rows`` (row numbers of the store).
    ``statistics`` are functions of row weights over the rows of ``patients``: with another model's
    `Result` on the same set, `paired_bootstrap` compares the two.
    """

    test_set: TestSet
    n_rows: int
    n_patients: int
    overall: Mapping[str, Interval]
    statistics: Mapping[str, Statistic]
    patients: Array
    details: Mapping[str, Any]
    section: Section
    rows: Rows
    predictions: list[dict[str, str]]


def measure(trained: TrainedModel, test_set: TestSet, settings: Settings) -> Result:
    """Predict the set's rows and compare with what is known of them.

    Raises
    ------
    SpcxrError
        nothing to compare with: no label of the model's, or no mask.
    """
    task = _measure_classes if trained.kind == "classify" else _measure_masks
    return task(trained, test_set, settings)


def _chunks(test_set: TestSet) -> Iterator[Rows]:
    """The rows in pieces, under one progress bar."""
    pace = 0.2 if sys.stderr.isatty() else 10.0
    rows = test_set.rows
    with tqdm(total=len(rows), desc=test_set.name, unit="image", mininterval=pace) as bar:
        for start in range(0, len(rows), CHUNK_ROWS):
            yield rows[start : start + CHUNK_ROWS]
            bar.update(len(rows[start : start + CHUNK_ROWS]))


def _by_group(
    test_set: TestSet, usable: Array, metric: Callable[[Array], Mapping[str, Interval]]
) -> dict[str, dict[str, Mapping[str, Interval]]]:
    """Column -> group -> metrics, over the usable rows ``(n,)`` bool; small groups left out."""
    places = np.flatnonzero(usable)
    columns = {name: values[places] for name, values in test_set.groups.items()}
    return {
        column: {name: metric(places[members]) for name, members in groups.items()}
        for column, groups in subgroups(columns).items()
    }


def _group_tables(by_group: Mapping[str, Mapping[str, Mapping[str, Interval]]]) -> list[Table]:
    return [
        pages.comparison(f"By {column}", groups, first=column)
        for column, groups in by_group.items()
    ]


# --- classification -------------------------------------------------------------------------


def true_labels(test_set: TestSet, trained: TrainedModel) -> Array:
    """``(n, K)`` 1, 0, NaN in the order of the model's names; uncertain (-1) becomes unknown.

    A label column that the data lack is unknown; for one class of many it is 0, since a class
    that a set does not name is a class that none of its rows has.

    Raises
    ------
    SpcxrError
        the data have none of the model's labels.
    """
    manifest = test_set.store.manifest
    there = [name for name in trained.names if name in manifest.labels]
    if not there:
        raise SpcxrError(
            f"{test_set.store.path}: has none of the model's labels {', '.join(trained.names)} "
            f"(it has {', '.join(manifest.labels) or 'none'}); rename its label columns"
        )
    known = manifest.label_matrix(there)[test_set.rows].astype(np.float64)
    absent = np.nan if trained.multilabel else 0.0
    labels = np.full((len(known), len(trained.names)), absent)
    labels[:, [trained.names.index(name) for name in there]] = known
    if not trained.multilabel:
        labels[np.isnan(known).any(1)] = np.nan
    return np.where(labels == -1, np.nan, labels)


def _measure_classes(trained: TrainedModel, test_set: TestSet, settings: Settings) -> Result:
    labels, patients = true_labels(test_set, trained), test_set.patients
    scores = _scores(trained, test_set, settings)

    def summarise(rows: Array) -> ClassSummary:
        return summarise_classes(
            labels[rows],
            scores[rows],
            patients[rows],
            trained.names,
            multilabel=trained.multilabel,
            n=settings.n_bootstrap,
            seed=settings.seed,
            threshold=settings.threshold,
        )

    usable = usable_rows(labels, multilabel=trained.multilabel)
    if not usable.any():
        raise SpcxrError(
            f"{test_set.store.path}: no row of {test_set.name} has a known label among "
            f"{', '.join(trained.names)}; choose other --splits"
        )
    summary = summarise(np.arange(len(labels)))
    by_group = _by_group(test_set, usable, lambda rows: summarise(rows).overall)
    left_out = len(labels) - summary.n_rows
    section = Section(
        test_set.name,
        text=f"{summary.n_rows} labelled images of {summary.n_patients} patients."
        + (f" {left_out} images without a usable label are left out." if left_out else ""),
        tables=[pages.class_table("By class", summary), *_group_tables(by_group)],
        pictures=pages.class_plots(summary, labels, scores, patients, seed=settings.seed),
    )
    details = {
        "by_class": summary.by_class,
        "positive_and_known_rows": summary.positives,
        "confusion": summary.confusion,
        "left_out_of_the_means": summary.left_out,
        "threshold": summary.threshold,
        "subgroups": by_group,
    }
    return Result(
        test_set,
        summary.n_rows,
        summary.n_patients,
        summary.overall,
        summary.statistics,
        summary.patients,
        details,
        section,
        test_set.rows,
        [
            {f"true {name}": _number(t) for name, t in zip(trained.names, true, strict=True)}
            # 9 digits hold a float32: rounded to fewer, near scores tie and give another AUROC.
            | {f"p {name}": f"{s:.9g}" for name, s in zip(trained.names, score, strict=True)}
            for true, score in zip(labels, scores, strict=True)
        ],
    )


def _scores(trained: TrainedModel, test_set: TestSet, settings: Settings) -> Array:
    """Probabilities ``(n, K)`` of the set's rows."""
    logits = [
        predict_classes(trained.model, test_set.store, rows, trained.normalisation, settings)
        for rows in _chunks(test_set)
    ]
    return probabilities(np.concatenate(logits), multilabel=trained.multilabel)


def _number(value: float) -> str:
    """A CSV cell; blank = unknown."""
    return "" if np.isnan(value) else f"{value:g}"


# --- segmentation ---------------------------------------------------------------------------


def _measure_masks(trained: TrainedModel, test_set: TestSet, settings: Settings) -> Result:
    """Dice and IoU at the store's size, over the pixels whose class is known."""
    masked = np.array([bool(path) for path in test_set.column("mask_path")], bool)
    if not masked.any():
        raise SpcxrError(
            f"{test_set.store.path}: no row of {test_set.name} has a mask; prepare a manifest with "
            "mask_path, or choose other --splits"
        )
    measured = replace(test_set, rows=test_set.rows[masked])
    patients = measured.patients
    found = (_masks(trained, measured, rows, settings) for rows in _chunks(measured))
    dice, iou = overlaps(measured.store, chain.from_iterable(found))
    some = ~np.isnan(dice)
    if not some.any():
        raise SpcxrError(
            f"{test_set.store.path}: every mask of {test_set.name} is empty, and so is every "
            "prediction; check the masks"
        )

    def summarise(chosen: Array) -> dict[str, Interval]:
        return summarise_masks(
            dice[chosen],
            iou[chosen],
            patients[chosen],
            n=settings.n_bootstrap,
            seed=settings.seed,
        )

    by_group = _by_group(measured, some, summarise)
    shown = examples(
        measured.store,
        measured.rows,
        dice,
        lambda rows: _masks(trained, measured, rows, settings),
    )
    count = len(np.unique(patients))
    text = f"{len(patients)} images with a mask, of {count} patients."
    if nothing := int((~some).sum()):
        text += f" In {nothing} of them mask and prediction are both empty: not in the mean."
    return Result(
        test_set,
        len(patients),
        count,
        summarise(np.arange(len(patients))),
        # Over every masked row, so that two models' rows are the same ones: the mean leaves out
        # by weight what one of them has nothing to measure in.
        {"dice": lambda w: metrics.mean(dice, w), "iou": lambda w: metrics.mean(iou, w)},
        patients,
        {"subgroups": by_group},
        Section(
            test_set.name,
            text=text,
            tables=_group_tables(by_group),
            pictures=[pages.overlay_picture(shown, trained.names[0])],
        ),
        measured.rows,
        _overlap_cells(trained.names[0], dice, iou),
    )


def _overlap_cells(name: str, dice: Array, iou: Array) -> list[dict[str, str]]:
    """The cells of ``predictions.csv``, one mapping an image."""
    return [
        {f"dice {name}": _number(d), f"iou {name}": _number(i)}
        for d, i in zip(dice, iou, strict=True)
    ]


def _masks(
    trained: TrainedModel, test_set: TestSet, rows: Rows, settings: Settings
) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
    return predict_masks(trained.model, test_set.store, rows, trained.normalisation, settings)
