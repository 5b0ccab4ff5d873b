"""One test set through one segmenter: overlap and distances with intervals, and examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.evaluate import mask_pages
from spcxr.evaluate.intervals import Interval, Statistic
from spcxr.evaluate.mask_summary import FIGURES, MaskMeans, MaskSummary, summarise_structures
from spcxr.evaluate.report import Section
from spcxr.evaluate.summary import mean_of_known
from spcxr.infer.predict import Change, TrainedModel, predict_masks, read_whole
from spcxr.recipes.masks import examples, figures, matched, pixel_mm, say_read_whole
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
from spcxr.train.distributed import World

Array = NDArray[Any]
Groups = Mapping[str, Mapping[str, Mapping[str, Interval]]]


def masked_rows(test_set: TestSet) -> Rows:
    """The rows of the set that have a mask.

    Raises
    ------
    SpcxrError
        there are none.
    """
    masked = test_set.store.manifest.masked[test_set.rows]
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
    """`FIGURES` ``(n, K F)`` of the structures in masked rows, at the store's size, over pixels
    that are known. Of changed images the distances are left out.

    Images in which a model that looks at the lungs' box found none are counted in one line on
    standard error, if there is a ``name``.
    """
    store, names = test_set.store, trained.names
    sizes = pixel_mm(store) if change is None else None

    def work(batch: Rows) -> Array:
        found = predict_masks(trained.model, store, batch, trained.normalisation, settings, change)
        return figures(store, found, names, sizes).reshape(len(batch), -1)

    before = read_whole(trained.model)
    found = in_batches(rows, settings, name, work, len(names) * len(FIGURES))
    world = settings.world or World(settings.device)
    lost = torch.tensor(float(read_whole(trained.model) - before), device=world.device)
    lost = world.add_up(lost)  # every process saw its own batches
    if world.first and name:
        say_read_whole(int(lost), len(rows), name)
    return found


def mean_dice(found: Array) -> Statistic:
    """The mean over structures of the mean Dice, of what `overlaps_of` found ``(n, K F)``."""
    return MaskMeans(found.reshape(len(found), -1, len(FIGURES))[:, :, :1]).over_structures(0)


def judge_masks(
    trained: TrainedModel, test_set: TestSet, found: Array, settings: Settings
) -> Result:
    """The `Result` of the figures ``(n, K F)`` that `overlaps_of` found in the masked rows.

    Raises
    ------
    SpcxrError
        every mask and every prediction is empty.
    """
    measured, names = replace(test_set, rows=masked_rows(test_set)), trained.names
    each = found.reshape(len(found), len(names), len(FIGURES))
    patients, sizes = measured.patients, pixel_mm(measured.store)[measured.rows]
    some = ~np.isnan(mean_of_known(each[:, :, 0]))
    if not some.any():
        raise SpcxrError(
            f"{test_set.store.path}: every mask of {test_set.name} is empty, and so is every "
            "prediction; check the masks"
        )

    def summarise(chosen: Array) -> MaskSummary:
        resamples = {"n": settings.n_bootstrap, "seed": settings.seed}
        return summarise_structures(
            each[chosen], patients[chosen], names, sizes[chosen], **resamples
        )

    summary = summarise(np.arange(len(patients)))
    groups = by_group(measured, some, lambda chosen: summarise(chosen).overall)
    return Result(
        test_set=test_set,
        n_rows=len(patients),
        n_patients=len(np.unique(patients)),
        overall=summary.overall,
        statistics=summary.statistics,
        patients=patients,
        details={
            "by_structure": summary.by_structure,
            "empty_masks": summary.empties,
            "without_spacing": summary.without_spacing,
            "subgroups": groups,
        },
        section=section(trained, measured, each, summary, groups, settings),
        rows=measured.rows,
        predictions=[_cells(names, of_image) for of_image in each],
        measured=measured.rows,
    )


def section(
    trained: TrainedModel,
    measured: TestSet,
    each: Array,
    summary: MaskSummary,
    groups: Groups,
    settings: Settings,
) -> Section:
    """The set's part of the page; ``each`` are the figures ``(n, K, F)``."""
    names, store, dice = trained.names, measured.store, each[:, :, 0]

    def predicted(rows: Rows) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
        return predict_masks(trained.model, store, rows, trained.normalisation, settings)

    shown = examples(store, measured.rows, mean_of_known(dice), predicted, names)
    count = len(np.unique(measured.patients))
    side = store.preprocess.size_px
    text = [
        f"{len(each)} images with a mask, of {count} patients, measured as they were prepared "
        f"({side} x {side} pixels)."
    ]
    if len(names) == 1 and names != store.structures:
        text.append(f"Their masks of {store.structures[0]} are taken to show {names[0]}.")
    if absent := [n for n, k in zip(names, matched(store, names), strict=True) if not k]:
        text.append(f"The masks do not show {', '.join(absent)}: not measured.")
    return Section(
        measured.name,
        text=" ".join([*text, *mask_pages.sentences(summary, len(each))]),
        tables=[
            *mask_pages.structure_tables(summary),
            *group_tables(groups, measured, ~np.isnan(mean_of_known(dice))),
            *mask_pages.group_tables(groups, names),
        ],
        pictures=[
            *mask_pages.dice_histograms(dice, names),
            mask_pages.overlay_picture(shown, ", ".join(names), names),
        ],
    )


def _cells(names: tuple[str, ...], figures: Array) -> dict[str, str]:
    """One image's cells of ``predictions.csv``, of its figures ``(K, F)``."""
    return {
        f"{figure} {name}": number(value)
        for name, values in zip(names, figures, strict=True)
        for figure, value in zip(FIGURES, values.tolist(), strict=True)
    }
