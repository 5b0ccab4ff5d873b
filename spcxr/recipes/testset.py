"""A test set, how it is measured, what was found on it; its batches, on one process or many."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from spcxr.data.store import Store
from spcxr.evaluate import pages
from spcxr.evaluate.intervals import Interval, Statistic
from spcxr.evaluate.report import Cell, Section, Table
from spcxr.evaluate.summary import age_groups, subgroups
from spcxr.recipes.images import any_drawn
from spcxr.train.device import Compute
from spcxr.train.distributed import World

Array = NDArray[Any]
Rows = NDArray[np.int64]
SAME_CLASSES = (
    "Means are over the classes with both kinds of images in a group: not always the same ones."
)


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
    """How to predict and how to resample; ``world`` are the processes that share the batches.

    ``threshold``: from which a label is called; the model's own (`operating_point`) if None.
    """

    n_bootstrap: int = 2000
    seed: int = 0
    threshold: float | None = None
    world: World | None = None


@dataclass(frozen=True)
class Answers:
    """Classes of the rows that can be measured: ``truth (m, K)`` 1, 0, NaN; ``scores (m, K)``.

    In the order of the model's ``names``; one of many unless ``multilabel``.
    """

    names: tuple[str, ...]
    multilabel: bool
    truth: Array
    scores: Array

    def of(self, name: str) -> tuple[Array, Array]:
        """Truth and scores ``(m,)`` of one class."""
        column = self.names.index(name)
        return self.truth[:, column], self.scores[:, column]


@dataclass(frozen=True)
class Result:
    """What was found on one test set: ready for the table, the page and ``metrics.json``.

    ``predictions`` holds one mapping for each of ``rows`` (row numbers of the store).
    ``statistics`` are functions of row weights over the rows of ``patients``, which are the rows
    ``measured`` of the store: with another model's `Result` on the same set, `paired_bootstrap`
    compares the two. ``answers`` are those rows' classes; None for masks.
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
    measured: Rows
    answers: Answers | None = None


def progress(total: int, name: str, unit: str, *, shown: bool) -> tqdm[NoReturn]:
    """A bar for a person who looks on, a line now and then for a log."""
    pace = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, desc=name, unit=unit, mininterval=pace, disable=not shown)


def in_batches(
    rows: Rows, settings: Settings, name: str, work: Callable[[Rows], Array], width: int
) -> Array:
    """What ``work`` makes of each batch, ``(b, width)``, for all rows: ``(n, width)`` float64.

    Several processes take the batches in turn, and every one gets all that was made. The batches
    are those of one process, so the numbers are the same to the last bit. ``name`` is shown with
    the progress; without one nothing is.
    """
    world = settings.world or World(settings.device)
    made = np.zeros((len(rows), width))
    shown = world.first and bool(name)
    with progress(len(rows), name, "image", shown=shown) as bar:
        for number, start in enumerate(range(0, len(rows), settings.batch_size)):
            part = slice(start, start + settings.batch_size)
            if number % world.size == world.rank:
                made[part] = work(rows[part])
            bar.update(len(rows[part]))
    # Each row is another's zero, which adds nothing to it; NaN stays NaN.
    return world.add_up(torch.from_numpy(made).to(world.device)).cpu().numpy()


def by_group(
    test_set: TestSet, usable: Array, metric: Callable[[Array], Mapping[str, Interval]]
) -> dict[str, dict[str, Mapping[str, Interval]]]:
    """Column -> group -> metrics, over the usable rows ``(n,)`` bool; small groups left out."""
    places = np.flatnonzero(usable)
    columns = {name: values[places] for name, values in test_set.groups.items()}
    return {
        column: {name: metric(places[members]) for name, members in groups.items()}
        for column, groups in subgroups(columns).items()
    }


def group_tables(
    groups: Mapping[str, Mapping[str, Mapping[str, Interval]]], test_set: TestSet, usable: Array
) -> list[Table]:
    """One table a column: how many each of its groups are, their metrics, and who is in none.

    A column of two groups or more that has no table of metrics, for want of images, is counted all
    the same: its table has no row.
    """
    made = []
    for column, values in test_set.groups.items():
        names, counts = np.unique(values[usable].astype(str), return_counts=True)
        if (names != "").sum() < 2:
            continue
        found = groups.get(column, {})
        left = [
            f"{name or 'unknown'} {count}"
            for name, count in zip(names, counts, strict=True)
            if name not in found
        ]
        note = SAME_CLASSES if any("macro_auroc" in metrics for metrics in found.values()) else ""
        if left:
            note += f" Not measured by themselves, unknown or too few images: {', '.join(left)}."
        table = pages.comparison(f"By {column}", found, first=column, note=note.strip())
        made.append(_counted(table, found))
    return made


def _counted(table: Table, groups: Mapping[str, Mapping[str, Interval]]) -> Table:
    """The table with the images, and patients, of each group after its name."""
    first = [next(iter(found.values())) for found in groups.values()]
    rows: list[list[Cell]] = [
        [row[0], f"{some.n_rows} ({some.n_patients})", *row[1:]]
        for row, some in zip(table.rows, first, strict=True)
    ]
    columns = [table.columns[0], "images (patients)", *table.columns[1:]]
    return replace(table, columns=columns, rows=rows)


def number(value: float) -> str:
    """A CSV cell; blank = unknown."""
    return "" if np.isnan(value) else f"{value:g}"
