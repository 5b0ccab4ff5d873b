"""The images of a test set made worse, kind by kind and strength by strength: how figures fall."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from spcxr.evaluate import pages
from spcxr.evaluate.corruptions import CORRUPTIONS, corrupt
from spcxr.evaluate.intervals import Interval, Statistic, bootstrap_all
from spcxr.evaluate.ranking import Ranking, like
from spcxr.evaluate.report import Cell, Section, Table
from spcxr.evaluate.summary import mean_of_known
from spcxr.infer.operating import operating_point
from spcxr.infer.predict import TrainedModel
from spcxr.recipes.measure import predict
from spcxr.recipes.measure_masks import mean_dice
from spcxr.recipes.testset import Answers, Result, Rows, Settings, TestSet, progress

Array = NDArray[Any]
Step = tuple[str, int]  # a corruption and its strength

NONE, ALL = "none", "all"
WORDS = ("mild", "medium", "strong")
HEADLINE = {"classify": "macro_auroc", "segment": "dice"}


@dataclass(frozen=True)
class Fall:
    """The headline figure on corrupted images, and the clean one less it, on the same patients."""

    value: Interval
    fall: Interval


def chosen(names: Sequence[str], kind: str) -> tuple[str, ...]:
    """The corruptions that ``--corruptions`` asks for; for masks those that move no pixel.

    >>> chosen(("all",), "segment")
    ('noise', 'blur', 'gamma', 'text', 'inversion')
    >>> chosen(("none",), "classify")
    ()
    """
    asked = tuple(CORRUPTIONS) if names == (ALL,) else tuple(n for n in names if n != NONE)
    return tuple(n for n in asked if kind != "segment" or not CORRUPTIONS[n].moves)


def predict_corrupted(
    trained: TrainedModel, test_set: TestSet, settings: Settings, names: Sequence[str]
) -> dict[Step, Array]:
    """What `predict` gives for each corruption at each strength; every process takes part."""
    steps = [
        (name, strength)
        for name in chosen(names, trained.kind)
        for strength in range(1, len(CORRUPTIONS[name].levels) + 1)
    ]
    made: dict[Step, Array] = {}
    shown = bool(steps) and (settings.world is None or settings.world.first)
    with progress(len(steps), f"{test_set.name}, corruptions", "pass", shown=shown) as bar:
        for name, strength in steps:
            change = partial(_changed, name, strength, settings.seed)
            made[name, strength] = predict(trained, test_set, settings, change, name="")
            bar.update()
    return made


def _changed(name: str, strength: int, seed: int, images: Tensor, rows: Rows) -> Tensor:
    return corrupt(images, rows, name, strength, seed=seed)


class Kept:
    """A statistic whose last answer is kept: a value and its fall ask for it in turn.

    >>> kept = Kept(lambda weights: weights.sum(-1))
    >>> float(kept(np.ones(3)))
    3.0
    """

    def __init__(self, statistic: Statistic) -> None:
        self._statistic = statistic
        self._of: weakref.ref[Array] | None = None
        self._made: Array = np.zeros(0)

    def __call__(self, weights: Array) -> Array:
        if self._of is None or self._of() is not weights:
            self._made, self._of = self._statistic(weights), weakref.ref(weights)
        return self._made


def headline(answers: Answers | None, found: Array) -> Statistic:
    """The headline figure of the measured rows as a statistic of their weights.

    Parameters
    ----------
    answers
        of classes; None for masks.
    found
        scores ``(m, K)``; of masks what `measure_masks.overlaps_of` found.
    """
    if answers is None:
        return Kept(mean_dice(found))
    # The mean AUROC alone: `summarise_classes` would make ten other figures for each resample.
    rankings = [Ranking(t, s) for t, s in zip(answers.truth.T, found.T, strict=True)]

    def mean(weights: Array) -> Array:
        found = np.stack([ranking.steps(weights).auroc() for ranking in rankings], -1)
        return mean_of_known(like(found, weights))

    return Kept(mean)


def judge_corrupted(
    trained: TrainedModel, result: Result, found: Mapping[Step, Array], settings: Settings
) -> dict[str, dict[str, Fall]]:
    """Corruption -> strength in words -> figure and paired fall."""
    if not found:
        return {}
    answers, usable = result.answers, np.isin(result.rows, result.measured)
    clean: Statistic
    figures: dict[Step, Statistic] = {}
    if answers is None:
        clean = Kept(result.statistics[HEADLINE[trained.kind]])
        figures = {step: headline(None, predicted) for step, predicted in found.items()}
    else:
        clean = headline(answers, answers.scores)
        point = operating_point(trained, None)  # softmax at another temperature ranks otherwise
        for step, predicted in found.items():
            scores = point.scores(predicted[usable], multilabel=trained.multilabel)
            figures[step] = headline(answers, scores)
    falls = {f"fall {step}": _gap(clean, figure) for step, figure in figures.items()}
    values = {f"{step}": figure for step, figure in figures.items()}
    made = bootstrap_all(
        result.patients, values | falls, n=settings.n_bootstrap, seed=settings.seed
    )
    told: dict[str, dict[str, Fall]] = {}
    for name, strength in figures:
        step = (name, strength)
        told.setdefault(name, {})[_word(*step)] = Fall(made[f"{step}"], made[f"fall {step}"])
    return told


def _gap(first: Statistic, second: Statistic) -> Statistic:
    return lambda weights: first(weights) - second(weights)


def _word(name: str, strength: int) -> str:
    return WORDS[strength - 1] if len(CORRUPTIONS[name].levels) > 1 else "full"


def corruption_section(
    kind: str, result: Result, falls: Mapping[str, Mapping[str, Fall]]
) -> Section:
    """A table of every figure with its fall, and the figures drawn."""
    metric = HEADLINE[kind]
    title, clean = pages.TITLES[metric], result.overall[metric]
    rows: list[list[Cell]] = [
        [f"{CORRUPTIONS[name].said}, {word}", fall.value, fall.fall]
        for name, steps in falls.items()
        for word, fall in steps.items()
    ]
    drawn = {"as they are": {"clean": clean}} | {
        CORRUPTIONS[name].said: {word: fall.value for word, fall in steps.items()}
        for name, steps in falls.items()
    }
    note = "Fall: the figure on clean images less that on corrupted ones, on the same patients."
    if kind == "segment":
        note += " Crops and rotations are left out: they would move the lungs off their masks."
    return Section(
        f"{result.test_set.name}: corrupted images",
        text=f"{title} on the images as they are: {clean}. Chance and strengths are the same for "
        "every model (our own choice of strengths).",
        tables=[Table("By corruption", ["corruption", title, "fall"], rows, note)],
        pictures=[pages.interval_picture(drawn, metric, f"{title} by corruption and strength.")],
    )
