"""Predicted masks against the true ones: how far they agree, and examples to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.data.store import NO_MASK, Store
from spcxr.evaluate import metrics
from spcxr.evaluate.overlays import best_median_worst, overlay

Rows = NDArray[np.int64]
Figures = NDArray[np.float64]
Predicted = Iterable[tuple[Rows, NDArray[np.uint8]]]  # as `predict_masks` yields it
Example = tuple[str, float, NDArray[Any], NDArray[np.uint8]]


def overlaps(store: Store, predicted: Predicted) -> tuple[Figures, Figures]:
    """Dice and IoU ``(n,)`` of class 1 in each image, at the store's size; memory stays flat.

    Pixels whose class is not known do not count. NaN where both masks are empty.
    """
    dice, iou = [], []
    for rows, masks in predicted:
        truth = store.masks(rows)
        pair = (masks == 1, truth == 1, truth != NO_MASK)
        dice.append(metrics.dice(*pair))
        iou.append(metrics.iou(*pair))
    return np.concatenate(dice), np.concatenate(iou)


def examples(
    store: Store, rows: Rows, dice: Figures, predict: Callable[[Rows], Predicted]
) -> list[Example]:
    """The best, the median and the worst of ``rows`` by Dice: name, Dice, image, both outlines.

    They are predicted once more, so that no mask need be kept; none where no Dice is defined.
    """
    chosen = best_median_worst(dice)
    if not chosen:
        return []
    wanted = rows[[place for _, place in chosen]]
    predicted = np.concatenate([masks for _, masks in predict(wanted)])
    images, truth = store.images(wanted), store.masks(wanted)
    truth = np.where(truth == NO_MASK, 0, truth)
    drawn = [overlay(i, p, t) for i, p, t in zip(images, predicted, truth, strict=True)]
    return [
        (name, float(dice[place]), image, picture)
        for (name, place), image, picture in zip(chosen, images, drawn, strict=True)
    ]
