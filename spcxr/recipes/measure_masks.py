"""One test set through one segmenter: Dice and IoU with intervals, and examples to look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics, pages
from spcxr.evaluate.intervals import Interval
from spcxr.evaluate.report import Section
from spcxr.evaluate.summary import summarise_masks
from spcxr.infer.predict import Change, TrainedModel, predict_masks
from spcxr.recipes.masks import examples, overlaps
from spcxr.recipes.testset import (
    Result,
    Rows,
    Settings,
    TestSet,
    by_group,
    group_tables,
    in_batches,
    number,
)

Array = NDArray[Any]


def masked_rows(test_set: TestSet) -> Rows:
    """The rows of the set that have a mask.

    Raises
    ------
    SpcxrError
        there are none.
    """
    masked = np.array([bool(path) for path in test_set.column("mask_path")], bool)
    if not masked.any():
        raise SpcxrError(
            f"{test_set.store.path}: no row of {test_set.name} has a mask; prepare a manifest with "
            "mask_path, or choose other --splits"
        )
    return test_set.rows[masked]


def overlaps_of(
    trained: TrainedModel,
    test_set: TestSet,
    rows: Rows,
    settings: Settings,
    change: Change | None,
    name: str,
) -> Array:
    """Dice and IoU ``(n, 2)`` of masked rows at the store's size, over pixels that are known."""

    def work(batch: Rows) -> Array:
        found = predict_masks(
            trained.model, test_set.store, batch, trained.normalisation, settings, change
        )
        return np.stack(overlaps(test_set.store, found), 1)

    return in_batches(rows, settings, name, work, 2)


def judge_masks(
    trained: TrainedModel, test_set: TestSet, found: Array, settings: Settings
) -> Result:
    """The `Result` of Dice and IoU ``(n, 2)`` that `overlaps_of` found in the masked rows.

    Raises
    ------
    SpcxrError
        every mask and every prediction is empty.
    """
    measured = replace(test_set, rows=masked_rows(test_set))
    patients, (dice, iou) = measured.patients, found.T
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

    def predicted(rows: Rows) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
        return predict_masks(trained.model, measured.store, rows, trained.normalisation, settings)

    groups = by_group(measured, some, summarise)
    shown = examples(measured.store, measured.rows, dice, predicted)
    count = len(np.unique(patients))
    text = f"{len(patients)} images with a mask, of {count} patients."
    if nothing := int((~some).sum()):
        text += f" In {nothing} of them mask and prediction are both empty: not in the mean."
    return Result(
        test_set=test_set,
        n_rows=len(patients),
        n_patients=count,
        overall=summarise(np.arange(len(patients))),
        # Over every masked row, so that two models' rows are the same ones: the mean leaves out
        # by weight what one of them has nothing to measure in.
        statistics={"dice": lambda w: metrics.mean(dice, w), "iou": lambda w: metrics.mean(iou, w)},
        patients=patients,
        details={"subgroups": groups},
        section=Section(
            test_set.name,
            text=text,
            tables=group_tables(groups, measured, some),
            pictures=[pages.overlay_picture(shown, trained.names[0])],
        ),
        rows=measured.rows,
        predictions=[
            {f"dice {trained.names[0]}": number(d), f"iou {trained.names[0]}": number(i)}
            for d, i in zip(dice, iou, strict=True)
        ],
        measured=measured.rows,
    )
