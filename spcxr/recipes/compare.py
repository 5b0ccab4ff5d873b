"""Two trained models on the same test set: differences on the same patients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spcxr.errors import SpcxrError
from spcxr.evaluate import pages
from spcxr.evaluate.delong import PairedTest, delong_paired
from spcxr.evaluate.intervals import Interval, paired_bootstrap
from spcxr.evaluate.report import Cell, Section, Table
from spcxr.infer.predict import TrainedModel
from spcxr.recipes.testset import Result, Settings


@dataclass(frozen=True)
class Comparison:
    """The first model less the second on one set.

    ``differences`` by metric, from resamples that both share; ``delong`` by class, of the AUROC;
    ``figures`` of either.
    """

    differences: Mapping[str, Interval]
    delong: Mapping[str, PairedTest]
    figures: tuple[Mapping[str, Interval], Mapping[str, Interval]]


def refuse_other_task(models: Mapping[str, TrainedModel]) -> None:
    """Refuse two models, by the names of their folders, that do not answer the same question.

    Raises
    ------
    SpcxrError
        another kind of task, or other labels.
    """
    (one, first), (other, second) = models.items()
    if _task(first) != _task(second):
        raise SpcxrError(
            f"{other}: answers for {_task(second)}, {one} for {_task(first)}; give --against a "
            "model of the same task"
        )
    if set(first.names) != set(second.names):
        raise SpcxrError(
            f"{other}: has the labels {', '.join(second.names)}, {one} has "
            f"{', '.join(first.names)}; give --against a model of the same labels"
        )


def _task(model: TrainedModel) -> str:
    if model.kind == "segment":
        return "masks"
    return "several findings" if model.multilabel else "one class of many"


def compare(first: Result, second: Result, settings: Settings) -> Comparison:
    """Differences of two models' results on one test set."""
    if not np.array_equal(first.measured, second.measured):
        raise ValueError("results of other rows: both models must be measured on the same set")
    differences = {
        name: paired_bootstrap(
            first.patients,
            statistic,
            second.statistics[name],
            n=settings.n_bootstrap,
            seed=settings.seed,
        )
        for name, statistic in first.statistics.items()
    }
    return Comparison(differences, _delong(first, second), (first.overall, second.overall))


def _delong(first: Result, second: Result) -> dict[str, PairedTest]:
    """Class -> DeLong's test of the two AUROCs; nothing for masks."""
    if first.answers is None or second.answers is None:
        return {}
    own, other = first.answers, second.answers
    return {
        name: delong_paired(
            own.truth[:, k],
            own.scores[:, k],
            other.scores[:, other.names.index(name)],
            first.patients,
        )
        for k, name in enumerate(own.names)
    }


def comparison_section(result: Result, found: Comparison, names: tuple[str, str]) -> Section:
    """The tables: metric by metric, then DeLong's test class by class."""
    own, other = found.figures
    rows: list[list[Cell]] = [
        [pages.TITLES.get(name, name), own[name], other[name], difference]
        for name, difference in found.differences.items()
    ]
    columns = ["metric", *names, "difference"]
    note = "Difference: the first less the second on the same resampled patients (95 %)."
    tables = [Table(f"{names[0]} and {names[1]}", columns, rows, note)]
    if found.delong:
        tests: list[list[Cell]] = [
            [name, _shown(test), f"{test.p:.3g}" if np.isfinite(test.p) else None]
            for name, test in found.delong.items()
        ]
        note = "DeLong's test of two AUROCs on the same images; not corrected for many classes."
        columns = ["class", "difference of AUROC", "p"]
        tables.append(Table("AUROC by class", columns, tests, note))
    return Section(f"{result.test_set.name}: against {names[1]}", tables=tables)


def _shown(test: PairedTest) -> Cell:
    """The difference as a cell; its rows are not told again."""
    nothing: dict[str, Any] = {"n_rows": 0, "n_patients": 0, "n_undefined": 0}
    return Interval(test.difference, test.low, test.high, **nothing)
