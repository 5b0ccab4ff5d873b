"""Masks as they come: files of one structure, indexed files of several, run lengths.

Whatever they come as, an image's mask is one array of class numbers: 0 is none of the structures,
k the k-th of them, 255 unknown. Where structures overlap, the later one in their order wins.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from spcxr.data.paths import ABSENT
from spcxr.data.raster import is_coloured, load_upright
from spcxr.data.study import Rejected, decoding, refuse_irregular
from spcxr.errors import SpcxrError

LUNG = ("lung",)  # what a binary mask shows, where nothing else is said
UNKNOWN = 255
GREY = frozenset({"1", "L", "I", "I;16", "I;16B"})  # Pillow's modes of whole numbers
# Chosen on real masks made smaller, larger and JPEG: those have no such areas.
LEVELS_OF_LABELS = 8  # so few values are no JPEG's
LEAST_AREA = 0.005  # of a mask: less is the grey rim of one that was enlarged


@dataclass(frozen=True, slots=True)
class Mask:
    """One part of an image's mask: a file relative to the task's root, or run lengths.

    ``number`` is its class. A file with ``values`` holds several: ``values[k - 1]`` is class k.
    """

    file: str = ""
    runs: str = ""
    number: int = 1
    values: tuple[int, ...] = ()


def read_classes(
    root: str, masks: Sequence[Mask], shape: tuple[int, ...], refuse: Callable[[str], SpcxrError]
) -> np.ndarray:
    """``(H, W)`` uint8 class numbers of an image of ``shape``; later structures over earlier.

    Raises
    ------
    Rejected
        a file that cannot be read, of another size, or with values that are none.
    SpcxrError
        what ``refuse`` makes of a reason, for run lengths that do not fit.
    """
    merged = np.zeros(shape, np.uint8)
    for mask in sorted(masks, key=lambda mask: mask.number):
        if mask.runs:
            part = decode_runs(mask.runs, shape, refuse) * np.uint8(mask.number)
        elif mask.values:
            part = read_indexed(Path(root, mask.file), mask.values)
        else:
            part = read_mask(Path(root, mask.file)) * np.uint8(mask.number)
        if part.shape != shape:
            sizes = [f"{width} x {height}" for height, width in (part.shape, shape)]
            raise refuse(f"its mask {mask.file} is {sizes[0]} pixels and the image {sizes[1]}")
        np.copyto(merged, part, where=part > 0)
    return merged


def read_mask(path: str | Path) -> np.ndarray:
    """``(H, W)`` uint8 of 1 (inside) and 0: a picture of 0 / 1 or of dark / bright (0 / 255).

    It is turned as its EXIF orientation says, like the images (`raster.load_upright`).

    Raises
    ------
    Rejected
        The file cannot be read, is coloured, or holds values that are neither (a map of several
        labels, which is known by areas of one value between dark and bright).
    """
    upright = _opened(path)
    if upright.mode not in GREY:
        _refuse_colour(path, upright)
        upright = upright.convert("L")
    values = np.asarray(upright).astype(np.int64)
    low, top = int(values.min()), int(values.max())
    if low < 0 or top > 65535:
        odd = low if low < 0 else top
        raise Rejected(path, f"its mask holds the value {odd}; masks are 0 / 1 or 0 / 255")
    if top <= 1:
        return values.astype(np.uint8)
    full = 255 if top <= 255 else 65535
    if top <= full // 2:
        raise Rejected(
            path,
            f"its mask holds values up to {top}; masks are 0 / 1 or 0 / {full} (of several "
            "structures: prepare --structures NAME=VALUE,...)",
        )
    _refuse_areas_between(path, values, top)
    return (values > full // 2).astype(np.uint8)


def _refuse_areas_between(path: str | Path, values: np.ndarray, top: int) -> None:
    """An area of one value between dark and bright is a label; a soft edge or a JPEG has none."""
    levels = np.count_nonzero(np.bincount(values.ravel()))
    if levels <= 2:
        return
    # A JPEG's dark and bright are not quite so.
    slack = 0 if levels <= LEVELS_OF_LABELS else top // 16
    middle = values[1:-1, 1:-1]
    flat = (middle > slack) & (middle < top - slack)
    for beside in (values[:-2, 1:-1], values[2:, 1:-1], values[1:-1, :-2], values[1:-1, 2:]):
        flat &= beside == middle
    if flat.sum() > LEAST_AREA * values.size:
        value = int(np.bincount(middle[flat]).argmax())
        raise Rejected(
            path,
            f"its mask holds areas of the value {value} between 0 and {top}; a mask has two "
            "values (of several structures: prepare --structures NAME=VALUE,...)",
        )


def read_indexed(path: str | Path, values: Sequence[int]) -> np.ndarray:
    """``(H, W)`` uint8 class numbers of a file of several: ``values[k - 1]`` becomes k.

    0 is none of them and 255 unknown. A palette's indices count, not its colours.

    Raises
    ------
    Rejected
        The file cannot be read, is coloured, or holds another value.
    """
    upright = _opened(path)
    if upright.mode not in {*GREY, "P"}:
        _refuse_colour(path, upright, tolerant=False)
        upright = upright.convert("L")
    found = np.asarray(upright).astype(np.int64)
    law = {0: 0, UNKNOWN: UNKNOWN, **{value: k for k, value in enumerate(values, 1)}}
    there = np.unique(found).tolist()
    if odd := [value for value in there if value not in law]:
        named = ", ".join(map(str, sorted(law)))
        raise Rejected(path, f"its mask holds the value {odd[0]}; --structures names {named}")
    table = np.zeros(256, np.uint8)
    table[list(law)] = list(law.values())
    return table[found]


def _opened(path: str | Path) -> Image.Image:
    """The upright picture; what leaves open where the mask is, or its values, is refused."""
    refuse_irregular(Path(path))
    with warnings.catch_warnings(), decoding(path, "Pillow", "its mask cannot be read"):
        warnings.simplefilter("ignore")  # of size and odd EXIF, as in `raster`
        with Path(path).open("rb") as file, Image.open(file) as picture:
            pages = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
            upright = load_upright(picture)[0]
    if pages > 1:
        raise Rejected(path, f"its mask has {pages} pages; save a file for each structure")
    if upright.mode == "F":
        raise Rejected(path, "its mask is in floating point; save one of 0 and 255")
    layered = upright.mode != "P" and upright.has_transparency_data
    if layered and np.asarray(upright.convert("RGBA"))[..., 3].min() < 255:
        raise Rejected(path, "its mask has transparent pixels; save it grey, without transparency")
    return upright


def _refuse_colour(path: str | Path, picture: Image.Image, *, tolerant: bool = True) -> None:
    """Colours have no order of their own: which is the lung cannot be guessed."""
    rgb = np.asarray(picture.convert("RGB"))
    if is_coloured(rgb) if tolerant else bool((rgb != rgb[..., :1]).any()):
        raise Rejected(
            path,
            "its mask is a colour picture; save a grey mask for each structure, or an indexed "
            "one (prepare --structures NAME=VALUE,...)",
        )


def decode_runs(
    text: str, shape: tuple[int, ...], refuse: Callable[[str], SpcxrError] = SpcxrError
) -> np.ndarray:
    """Run lengths ``start length ...`` -> ``(H, W)`` uint8 of 1 and 0; ``-1`` is empty.

    Pixels are counted from 1, along the rows of the upright image (COCO and Kaggle's
    competitions count down the columns: turn those first).

    Raises
    ------
    SpcxrError
        what ``refuse`` makes of the reason: no such pairs, or a run beyond the image.

    >>> decode_runs("2 2 6 1", (2, 3)).tolist()
    [[0, 1, 1], [0, 0, 1]]
    """
    flat = np.zeros(int(np.prod(shape)), np.uint8)
    if text.strip() == ABSENT:
        return flat.reshape(shape)
    parts = text.split()
    if not parts or len(parts) % 2 or not all(part.isdecimal() for part in parts):
        raise refuse("its run lengths are no pairs 'start length' and no -1")
    for start, length in zip(map(int, parts[::2]), map(int, parts[1::2]), strict=True):
        if not start or start - 1 + length > flat.size:
            size = " x ".join(map(str, reversed(shape)))
            raise refuse(
                f"its run lengths hold the run {start} {length}, which is not within the "
                f"{size} pixels 1 to {flat.size} of the image"
            )
        flat[start - 1 : start - 1 + length] = 1
    return flat.reshape(shape)
