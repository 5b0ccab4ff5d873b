"""Near-duplicate radiographs: one picture in a training split and, by another name, in a held one.

Equal files and equal pixels are not enough: collections hold one radiograph twice, rescaled,
cropped, or with other letters on it, under two patients. Compared are small pictures without their
slow greys, so that two chests of one shape are no pair. Ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Array = NDArray[Any]

SIDE = 48  # of the small picture
BLUR_PX = 4.0  # deviation of what is taken off
ALIKE = 0.9  # correlation from which two are one: see `near_duplicates`
# What a copy may have lost at each side, as shares of the picture.
CROPS = tuple((left, top) for left in (0.0, 0.04, 0.08) for top in (0.0, 0.04, 0.08))


class Pair(NamedTuple):
    """A held path, the training path that shows the same, and their correlation."""

    held: str
    train: str
    correlation: float


def near_duplicates(
    root: Path, held: Sequence[str], train: Sequence[str], alike: float = ALIKE
) -> list[Pair]:
    """Pairs of one held and one training picture that correlate at ``alike`` or more.

    Each side is also tried with up to 8 % cut off. Different radiographs of the open set reach
    .88, two that are stored twice, with other letters and another border, .92 and .98. A copy that
    is scaled, framed or has another gamma is found; one that is cut on one side alone, turned by
    three degrees, mirrored or inverted is not.

    Parameters
    ----------
    root, held, train
        a folder, and paths relative to it.
    """
    if not held or not train:
        return []
    own, other = ([_read(root / path) for path in paths] for paths in (held, train))
    found = np.maximum(
        _unit(own, CROPS).reshape(len(CROPS), len(held), -1) @ _unit(other, CROPS[:1]).T,
        (_unit(other, CROPS) @ _unit(own, CROPS[:1]).T)
        .reshape(len(CROPS), len(train), -1)
        .transpose(0, 2, 1),
    ).max(0)
    return [
        Pair(held[i], train[j], round(float(found[i, j]), 4))
        for i, j in np.argwhere(found >= alike).tolist()
    ]


def drop_copied(
    rows: Sequence[Mapping[str, str]], pairs: Sequence[Pair]
) -> tuple[list[Mapping[str, str]], list[Mapping[str, str]]]:
    """Training rows of patients of whom a picture is a held one -> (rows kept, rows left out).

    >>> rows = [{"path": "a", "patient_id": "1"}, {"path": "b", "patient_id": "2"}]
    >>> kept, left_out = drop_copied(rows, [Pair("held", "b", 0.9)])
    >>> [row["path"] for row in kept], [row["path"] for row in left_out]
    (['a'], ['b'])
    """
    copies = {pair.train for pair in pairs}
    who = {row["patient_id"] or row["path"] for row in rows if row["path"] in copies}
    parted: tuple[list[Mapping[str, str]], list[Mapping[str, str]]] = ([], [])
    for row in rows:
        parted[(row["patient_id"] or row["path"]) in who].append(row)
    return parted


def _read(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.draft("L", (4 * SIDE, 4 * SIDE))
        return image.convert("L").resize((2 * SIDE, 2 * SIDE), Image.Resampling.BOX)


def _unit(images: Sequence[Image.Image], crops: Sequence[tuple[float, float]]) -> Array:
    """``(crops * images, SIDE ** 2)`` float32: mean 0 and length 1 each."""
    made = []
    for left, top in crops:
        for image in images:
            width, height = image.size
            box = (left * width, top * height, (1 - left) * width, (1 - top) * height)
            small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)
            grey = np.asarray(small, np.float32)
            slow = np.asarray(small.filter(ImageFilter.GaussianBlur(BLUR_PX)), np.float32)
            fine = (grey - slow)[2:-2, 2:-2].ravel()  # borders and frames say little of a chest
            fine -= fine.mean()
            made.append(fine / max(float(np.linalg.norm(fine)), 1e-6))
    return np.array(made)
