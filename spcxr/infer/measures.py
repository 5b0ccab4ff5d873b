"""What is measured of a mask on the radiograph's own grid: areas, the two lungs, the heart's share.

Sides are the patient's. In the usual display of a PA or AP radiograph the patient's right is on the
image's left; a DICOM image that says it is stored mirrored or turned by half a circle is read so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from spcxr.data.study import Study
from spcxr.infer.postprocess import LEAST_PIECE, pieces_of

Mask = NDArray[np.uint8]
LUNGS = ("lung", "lungs")
RIGHT, LEFT, HEART = "right lung", "left lung", "heart"
# In the notes of a study, by its header.
MIRRORED, HALF_TURN, UPSIDE_DOWN = "mirrored left-right", "turned by half", "upside down"
P = TypeVar("P", bound=np.generic)


@dataclass(frozen=True)
class Measures:
    """Of one mask. ``areas_px`` by structure, in lower case; of whole lungs the two sides as well.

    ``lung_pieces`` is the number of lungs found, specks left out. ``cardiothoracic`` is the heart's
    width over that of both lungs (NaN where there is none).
    """

    areas_px: Mapping[str, int]
    lung_pieces: int | None
    cardiothoracic: float

    @property
    def lungs_px(self) -> int | None:
        """Both lungs' area; None where the model knows no lungs."""
        whole = [self.areas_px[name] for name in LUNGS if name in self.areas_px]
        sides = [self.areas_px[name] for name in (RIGHT, LEFT) if name in self.areas_px]
        return sum(whole or sides) if whole or sides else None


def measure(mask: Mask, structures: tuple[str, ...], study: Study) -> Measures:
    """Areas, sides and cardio-thoracic ratio.

    Parameters
    ----------
    mask
        ``(H, W)`` uint8 class numbers on the grid of ``study.pixels``.
    structures
        names of the classes from 1.

    >>> mask = np.zeros((8, 16), np.uint8)
    >>> mask[2:6, 1:5] = 1; mask[2:6, 10:13] = 1
    >>> found = measure(mask, ("lung",), Study(mask, bits=8))
    >>> dict(found.areas_px), found.lung_pieces
    ({'lung': 28, 'right lung': 16, 'left lung': 12}, 2)
    """
    low = [name.lower() for name in structures]
    areas = {name: int(np.count_nonzero(mask == k)) for k, name in enumerate(low, start=1)}
    pieces = None
    whole = [k for k, name in enumerate(low, start=1) if name in LUNGS]
    if whole:
        pieces, sides = two_lungs(mask == whole[0])
        if sides is not None and (facing := direction(study)) is not None:
            areas |= {RIGHT: sides[0], LEFT: sides[1]} if facing else {
                RIGHT: sides[1], LEFT: sides[0]
            }  # fmt: skip
    elif RIGHT in low or LEFT in low:
        pieces = sum(areas[name] > 0 for name in low if name in (RIGHT, LEFT))
    return Measures(areas, pieces, cardiothoracic(mask, low, study))


def direction(study: Study) -> bool | None:
    """Whether the patient's right is on the image's left; None where the sides are not known.

    >>> direction(Study(np.zeros((1, 1), np.uint8), 8, view="LATERAL")) is None
    True
    """
    said = " ".join(study.notes)
    if study.view == "LATERAL" or "on its side" in said:
        return None
    # Upside down by a half turn also swaps the sides, by a mirror it does not: not known.
    return None if UPSIDE_DOWN in said else MIRRORED not in said and HALF_TURN not in said


def as_shown(pixels: NDArray[P], study: Study) -> NDArray[P]:
    """``(H, W)`` of a study, turned as radiographs are usually shown; given that, turned back.

    A model that tells left from right has learned the usual display: of an image that is stored
    mirrored it would name each lung by the other's side.

    >>> study = Study(np.array([[1, 2]], np.uint8), 8, notes=("stored mirrored left-right",))
    >>> as_shown(study.pixels, study).tolist()
    [[2, 1]]
    """
    said = " ".join(study.notes)
    rows = -1 if HALF_TURN in said or UPSIDE_DOWN in said else 1
    columns = -1 if HALF_TURN in said or MIRRORED in said else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def two_lungs(inside: NDArray[Any]) -> tuple[int, tuple[int, int] | None]:
    """Number of lungs, and the pixels of the image's left and right one if there are two or more.

    Pieces smaller than a twentieth of the largest are no lung of their own, and count to the side
    that they lie on. A single piece is not divided: it may be one lung, or two that touch.

    >>> two_lungs(np.array([[1, 1, 0, 0, 1]], bool)), two_lungs(np.ones((2, 2), bool))
    ((2, (2, 1)), (1, None))
    """
    pieces, sizes = pieces_of(inside[_box(inside)])
    lungs = np.flatnonzero(sizes > LEAST_PIECE * sizes.max(initial=0))
    if len(lungs) < 2:
        return len(lungs), None
    largest = lungs[np.argsort(-sizes[lungs], kind="stable")[:2]]
    spans = [span[1] for span in ndimage.find_objects(pieces)]
    columns = np.array([(span.start + span.stop) / 2 for span in spans])
    middle = columns[largest - 1].mean()
    on_left = int(sizes[1:][columns <= middle].sum())
    return len(lungs), (on_left, int(sizes.sum()) - on_left)


def cardiothoracic(mask: Mask, names: list[str], study: Study) -> float:
    """The heart's width over that of both lungs together; NaN where one of them is not there.

    Ours: widths are the extents of the masks in columns. Readers measure to the inner border of
    the ribs, which lies close to the lungs' outer edge. Spacing cancels out.

    >>> mask = np.array([[1, 1, 3, 3, 3, 2, 2, 2]], np.uint8)
    >>> study = Study(mask, bits=8)
    >>> cardiothoracic(mask, ["right lung", "left lung", "heart"], study)
    0.375
    """
    hearts = [k for k, name in enumerate(names, start=1) if name == HEART]
    lungs = [k for k, name in enumerate(names, start=1) if name in (*LUNGS, RIGHT, LEFT)]
    both_there = len(lungs) == 2 or any(name in LUNGS for name in names)
    if not hearts or not both_there or direction(study) is None:
        return math.nan
    if any(not (mask == k).any() for k in lungs):
        return math.nan
    heart, chest = _width(mask == hearts[0]), _width(np.isin(mask, lungs))
    return heart / chest if heart else math.nan


def _box(inside: NDArray[Any]) -> tuple[slice, slice]:
    """The rows and columns that hold anything: most of a radiograph is outside the lungs."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return slice(0, 1), slice(0, 1)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _width(inside: NDArray[Any]) -> int:
    columns = np.flatnonzero(inside.any(0))
    return int(columns[-1] - columns[0] + 1) if len(columns) else 0


def square_mm(area_px: int, spacing_mm: tuple[float, float] | None) -> float:
    """An area in mm2 by the (row, column) spacing, which may differ; NaN where it is not known.

    >>> square_mm(10, (0.5, 0.2)), square_mm(10, None)
    (1.0, nan)
    """
    return math.nan if spacing_mm is None else area_px * spacing_mm[0] * spacing_mm[1]
