"""Predicted masks against the true ones: how far they agree, and examples to look at."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.data.store import NO_MASK, Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.mask_summary import FIGURES, mask_figures
from spcxr.evaluate.overlays import best_median_worst, overlay

Rows = NDArray[np.int64]
Figures = NDArray[np.float64]
Masks = NDArray[np.uint8]
Predicted = Iterable[tuple[Rows, Masks]]  # as `predict_masks` yields it
Example = tuple[str, float, NDArray[Any], NDArray[np.uint8]]


def figures(
    store: Store,
    predicted: Predicted,
    names: Sequence[str],
    sizes: Figures | None = None,
) -> Figures:
    """`mask_figures` ``(n, K, F)`` of the model's structures ``names`` in each image, at the
    store's size; memory stays flat.

    A structure that the store's masks do not show is known nowhere: all of it is NaN.

    Parameters
    ----------
    sizes
        ``(N, 2)`` of `pixel_mm`; without them there are no distances, which take most of the time.

    Raises
    ------
    SpcxrError
        as `matched`.
    """
    numbers, made = matched(store, names), [np.empty((0, len(names), len(FIGURES)))]
    for rows, masks in predicted:
        truth = store.masks(rows)
        size = None if sizes is None else sizes[rows]
        each = []
        for k, number in enumerate(numbers, start=1):
            known = (truth != NO_MASK) & (number > 0)
            each.append(mask_figures(masks == k, truth == number, known, size))
        made.append(np.stack(each, 1))
    return np.concatenate(made)


def say_read_whole(lost: int, count: int, where: str) -> None:
    """One line on standard error, where no lung was found in ``lost`` of ``count`` images."""
    if lost:
        print(f"{where}: no lung found in {lost} of {count} images: read whole", file=sys.stderr)


def matched(store: Store, names: Sequence[str]) -> tuple[int, ...]:
    """The class number in the store's masks of each of a model's structures; 0: not shown there.

    They are known by name. Where model and store have one structure each it is taken to be the
    same one, whatever the names.

    Raises
    ------
    SpcxrError
        the store shows none of them.
    """
    there = store.structures
    if len(there) == len(names) == 1:
        return (1,)
    numbers = tuple(there.index(name) + 1 if name in there else 0 for name in names)
    if not any(numbers):
        raise SpcxrError(
            f"{store.path}: its masks show {', '.join(there)}, and the model finds "
            f"{', '.join(names)}; prepare the set with masks of these"
        )
    return numbers


def true_masks(store: Store, rows: Rows, names: Sequence[str]) -> Masks:
    """The true masks ``(n, S, S)`` in the model's class numbers; unknown is background, 0."""
    truth = store.masks(rows)
    made = np.zeros_like(truth)
    for k, number in enumerate(matched(store, names), start=1):
        if number:
            made[truth == number] = k
    return made


def pixel_mm(store: Store) -> Figures:
    """Height and width of a pixel of each of the store's images in mm ``(N, 2)``; NaN = unknown.

    From the spacing in the file's header and how far the image was shrunk. An X-ray magnifies, and
    the header's spacing may be that at the detector: then these are mm there, not in the patient.
    """
    wanted = ("spacing_row_mm", "spacing_column_mm", "image_height_px", "image_width_px")
    made = np.full((len(store), 2), np.nan)
    if any(name not in store.manifest.columns.column_names for name in wanted):
        return made
    facts = np.array([store.manifest.column(name) for name in wanted], np.float64).T
    for row in np.flatnonzero((facts > 0).all(1)):
        height, width = facts[row, 2:].astype(int).tolist()
        made[row] = facts[row, :2] * store.preprocess.shrink((height, width))
    return made


def examples(
    store: Store,
    rows: Rows,
    dice: Figures,
    predict: Callable[[Rows], Predicted],
    names: Sequence[str] = (),
) -> list[Example]:
    """The best, the median and the worst of ``rows`` by Dice: name, Dice, image, both outlines.

    They are predicted once more, so that no mask need be kept; none where no Dice is defined.

    Parameters
    ----------
    dice
        ``(n,)``; of several structures the mean over them.
    names
        the model's structures, each drawn in its own colour; the store's if not given.
    """
    names = names or store.structures
    chosen = best_median_worst(dice)
    if not chosen:
        return []
    wanted = rows[[place for _, place in chosen]]
    predicted = np.concatenate([masks for _, masks in predict(wanted)])
    images, truth = store.images(wanted), true_masks(store, wanted, names)
    drawn = [
        overlay(i, p, t, structures=len(names))
        for i, p, t in zip(images, predicted, truth, strict=True)
    ]
    return [
        (name, float(dice[place]), image, picture)
        for (name, place), image, picture in zip(chosen, images, drawn, strict=True)
    ]
