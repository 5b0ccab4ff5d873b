"""Two trained models on the same test set: differences on the same patients."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics, pages
from spcxr.evaluate.delong import delong_paired
from spcxr.evaluate.intervals import Statistic, bootstrap_all
from spcxr.evaluate.report import Section
from spcxr.infer.predict import TrainedModel
from spcxr.recipes.testset import Result, Settings


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


def compare(first: Result, second: Result, settings: Settings) -> dict[str, pages.Comparison]:
    """Metric, or ``AUROC of`` a class -> the two models' figures on one set and their difference.

    Differences have intervals from resamples that both share; those of a class' AUROC DeLong's test
    as well.
    """
    if not np.array_equal(first.measured, second.measured):
        raise ValueError("results of other rows: both models must be measured on the same set")

    aurocs = _aurocs(first, second)
    pairs = {name: (own, second.statistics[name]) for name, own in first.statistics.items()}
    # All from the same resamples at once: one by one each would be made, and ranked, anew.
    differences = bootstrap_all(
        first.patients,
        {name: _gap(*pair) for name, pair in {**pairs, **aurocs}.items()},
        n=settings.n_bootstrap,
        seed=settings.seed,
    )
    made = {
        name: pages.Comparison(first.overall[name], second.overall[name], differences[name])
        for name in pairs
    }
    if first.answers is None or second.answers is None:
        return made
    for name in first.answers.names:
        (truth, own), (_, other) = first.answers.of(name), second.answers.of(name)
        made[f"AUROC of {name}"] = pages.Comparison(
            first.details["by_class"][name]["auroc"],
            second.details["by_class"][name]["auroc"],
            differences[f"AUROC of {name}"],
            delong_paired(truth, own, other, first.patients),
        )
    return made


def _gap(first: Statistic, second: Statistic) -> Statistic:
    return lambda weights: first(weights) - second(weights)


def _aurocs(first: Result, second: Result) -> dict[str, tuple[Statistic, Statistic]]:
    """``AUROC of`` each class -> both models' statistic; nothing for masks."""
    if first.answers is None or second.answers is None:
        return {}
    made: dict[str, tuple[Statistic, Statistic]] = {}
    for name in first.answers.names:
        (truth, own), (_, other) = first.answers.of(name), second.answers.of(name)
        made[f"AUROC of {name}"] = (
            partial(metrics.auroc, truth, own),
            partial(metrics.auroc, truth, other),
        )
    return made


def comparison_section(
    result: Result, found: Mapping[str, pages.Comparison], names: tuple[str, str]
) -> Section:
    """The table of both models, A and B, by their ``names``."""
    titled = {pages.TITLES.get(name, name): one for name, one in found.items()}
    return Section(
        f"{result.test_set.name}: against {names[1]}",
        text=f"A: {names[0]}. B: {names[1]}. Both on the same {result.n_rows} images.",
        tables=[pages.paired_table(f"{names[0]} and {names[1]}", titled)],
    )
