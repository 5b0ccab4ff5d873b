"""Grey levels and geometry: a `Study` -> the square image a model reads. Travels with the weights.

A preset is a small pure function ``(study, shrink) -> (h, w) float32 in [0, 1]``; it decides
whether it maps grey levels before or after ``shrink``, the one resize of `spcxr.data.resize`.
Changing what a preset computes means a new number in `PRESET_VERSIONS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spcxr.data.resize import resize, resize_nearest
from spcxr.data.study import Study
from spcxr.errors import SpcxrError

Box = tuple[int, int, int, int]
Shrink = Callable[[np.ndarray], np.ndarray]


def minmax(study: Study, shrink: Shrink) -> np.ndarray:
    """(x - min) / (max - min) over the whole image, before the resize.

    The default for DICOM and 8-bit files alike: it needs no tag to be right, gives the same for a
    radiograph and its 8-bit export, and is linear, so that it loses no contrast.
    """
    low, high = _extremes(study.pixels)
    return _to_unit(shrink(study.pixels), low, high)


def voi(study: Study, shrink: Shrink) -> np.ndarray:
    """For viewing: the VOI window, function LINEAR (PS3.3 C.11.2.1.2.1); without one, `minmax`."""
    if study.window is None:
        return minmax(study, shrink)
    centre, width = study.window
    levels = np.arange(2**study.bits, dtype=np.float32)
    shown = (levels - (centre - 0.5)) / max(width - 1.0, 1e-6) + 0.5
    return shrink(np.take(np.clip(shown, 0.0, 1.0).astype(np.float32), study.pixels))


def mimic_jpg(study: Study, shrink: Shrink) -> np.ndarray:
    """As MIMIC-CXR-JPG was made: minus min, over max, to whole 8-bit levels, invert, equalise.

    Source: A. Johnson et al., MIMIC-CXR-JPG, PhysioNet 2019, "Methods". JPEG loss is not repeated.
    """
    stored = _as_stored(study)
    low, high = _extremes(stored)
    return shrink(equalise(_levels(stored, study, low, high))) / np.float32(255)


def chexpert_jpg(study: Study, shrink: Shrink) -> np.ndarray:
    """As CheXpert's files are usually remade: x * 255 / max in whole levels, invert, equalise."""
    stored = _as_stored(study)
    _, high = _extremes(stored)
    return shrink(equalise(_levels(stored, study, 0, high))) / np.float32(255)


def rad_dino(study: Study, shrink: Shrink) -> np.ndarray:
    """Resize first, then min-max of the result: the order in RAD-DINO's model card.

    Use ``size_px=518, fit="crop"`` as they do. Their resize is a B-spline, ours bilinear.
    """
    small = shrink(study.pixels)
    return _to_unit(small, *_extremes(small))


PRESETS: dict[str, Callable[[Study, Shrink], np.ndarray]] = {
    "minmax": minmax,
    "voi": voi,
    "mimic-jpg": mimic_jpg,
    "chexpert-jpg": chexpert_jpg,
    "rad-dino": rad_dino,
}
PRESET_VERSIONS = {"minmax": 1, "voi": 1, "mimic-jpg": 1, "chexpert-jpg": 1, "rad-dino": 1}
FITS = ("pad", "crop", "stretch")
DTYPES = ("uint8", "uint16")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A study made ready: ``pixels`` ``(S, S)`` uint8 or uint16, and where its content lies.

    ``box`` is (top, left, height, width) of the content inside the square; the rest is 0.
    """

    pixels: np.ndarray
    box: Box


@dataclass(frozen=True)
class Preprocess:
    """How a study becomes a square image: preset, size, fit and pixel type.

    Parameters
    ----------
    preset, version
        A name in `PRESETS` and the version in `PRESET_VERSIONS` (0 = the one of this spcxr).
    size_px
        Side ``S`` of the square.
    fit
        ``pad`` keeps the whole image and its aspect, centred on black; ``crop`` keeps the central
        square; ``stretch`` keeps the whole image, not its aspect.
    dtype
        ``uint8`` or ``uint16``: the full range holds [0, 1].

    Raises
    ------
    SpcxrError
        A value outside these.

    >>> study = Study(np.arange(32, dtype=np.uint8).reshape(4, 8), bits=8)
    >>> prepared = Preprocess(size_px=4)(study)
    >>> prepared.box
    (1, 0, 2, 4)
    >>> prepared.pixels
    array([[  0,   0,   0,   0],
           [ 53,  68,  84,  99],
           [156, 171, 187, 202],
           [  0,   0,   0,   0]], dtype=uint8)
    """

    preset: str = "minmax"
    version: int = 0
    size_px: int = 224
    fit: str = "pad"
    dtype: str = "uint8"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("preset", self.preset, tuple(PRESETS)),
            ("fit", self.fit, FITS),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise SpcxrError(f"preprocess {name} is {value!r}; choose: {', '.join(known)}")
        if not isinstance(self.size_px, int) or self.size_px < 1:
            raise SpcxrError(f"preprocess size_px is {self.size_px!r}; it must be a whole number")
        ours = PRESET_VERSIONS[self.preset]
        if self.version not in (0, ours):
            raise SpcxrError(
                f"preprocess {self.preset} has version {self.version}, this spcxr makes version "
                f"{ours}; install the spcxr that wrote it, or prepare the images again"
            )
        object.__setattr__(self, "version", ours)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON.

        >>> Preprocess(size_px=512).to_dict()
        {'preset': 'minmax', 'version': 1, 'size_px': 512, 'fit': 'pad', 'dtype': 'uint8'}
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_dict`; refuses unknown, missing and newer settings with the remedy.

        >>> Preprocess.from_dict(Preprocess(fit="crop").to_dict()).fit
        'crop'
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if set(values) != names:
            odd = ", ".join(sorted(set(values) ^ names))
            raise SpcxrError(f"preprocess settings unknown or missing: {odd}; update spcxr")
        if values["version"] == 0:
            raise SpcxrError("preprocess version is 0; prepare the images again")
        return cls(**values)

    def __call__(self, study: Study) -> Prepared:
        """Grey levels by the preset, geometry by the fit."""
        square = (self.size_px, self.size_px)
        shape = study.pixels.shape
        return self._drawn(study, self.window(shape), self._box(shape), square)

    def framed(self, study: Study, frame: tuple[int, int]) -> Prepared:
        """Grey levels by the preset; the whole study, undistorted, amid a black ``frame`` (h, w).

        Neither ``size_px`` nor ``fit`` is asked: for encoders that read images of any aspect.

        >>> study = Study(np.arange(32, dtype=np.uint8).reshape(4, 8), bits=8)
        >>> prepared = Preprocess(size_px=4).framed(study, (2, 5))
        >>> prepared.pixels.shape, prepared.box
        ((2, 5), (0, 0, 2, 4))
        """
        shape = study.pixels.shape
        whole = (slice(0, shape[0]), slice(0, shape[1]))
        return self._drawn(study, whole, contained(shape, frame), frame)

    def _drawn(
        self, study: Study, window: tuple[slice, slice], box: Box, shape: tuple[int, int]
    ) -> Prepared:
        """That part of the study, resized to the box, on black of that shape."""
        unit = PRESETS[self.preset](study, lambda image: resize(image[window], box[2:]))
        top = np.iinfo(self.dtype).max
        scaled = unit * np.float32(top)
        scaled += np.float32(0.5)  # the cast truncates
        np.clip(scaled, 0, top, out=scaled)
        pixels = np.zeros(shape, self.dtype)
        pixels[_inside(box)] = scaled
        return Prepared(pixels, box)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """The same geometry for a mask ``(H, W)`` on the study's own grid, nearest neighbour.

        Returns ``(S, S)`` uint8 with the mask's values, 0 beside the content.

        >>> Preprocess(size_px=2).mask(np.array([[0, 0, 3, 3]] * 2, np.uint8))
        array([[0, 3],
               [0, 0]], dtype=uint8)
        """
        box = self._box(mask.shape)
        made = np.zeros((self.size_px, self.size_px), np.uint8)
        made[_inside(box)] = resize_nearest(mask[self.window(mask.shape)], box[2:])
        return made

    def framed_mask(self, mask: np.ndarray, frame: tuple[int, int]) -> np.ndarray:
        """The geometry of `framed` for a mask ``(H, W)``: ``frame`` uint8, nearest neighbour."""
        box = contained(mask.shape, frame)
        made = np.zeros(frame, np.uint8)
        made[_inside(box)] = resize_nearest(mask, box[2:])
        return made

    def to_original(self, array: np.ndarray, study_shape: tuple[int, int], box: Box) -> np.ndarray:
        """Map a result on the square back onto the study's pixel grid.

        Parameters
        ----------
        array
            ``(..., S, S)``: floating point is interpolated (maps), all else is nearest (masks).
        study_shape
            (H, W) of ``study.pixels``.
        box
            `Prepared.box`.

        Returns
        -------
        ``(..., H, W)`` of the array's dtype; 0 where ``crop`` cut the study away.

        >>> square = np.array([[0, 3], [0, 0]], np.uint8)
        >>> Preprocess(size_px=2).to_original(square, (2, 4), (0, 0, 1, 2))
        array([[0, 0, 3, 3],
               [0, 0, 3, 3]], dtype=uint8)
        """
        expected = self._box(study_shape)
        if tuple(box) != expected or array.shape[-2:] != (self.size_px, self.size_px):
            raise SpcxrError(
                f"array {array.shape} with box {box} is not a {study_shape} study at "
                f"{self.size_px} px (box {expected}); use the shape and box it was prepared with"
            )
        window = self.window(study_shape)
        shape = (window[0].stop - window[0].start, window[1].stop - window[1].start)
        content = array[(..., *_inside(box))]
        made = np.zeros((*array.shape[:-2], *study_shape), array.dtype)
        if not np.issubdtype(array.dtype, np.floating):
            made[(..., *window)] = resize_nearest(content, shape)
            return made
        for index in np.ndindex(*array.shape[:-2]):
            made[(*index, *window)] = resize(content[index], shape)
        return made

    def shrink(self, study_shape: tuple[int, int]) -> tuple[float, float]:
        """How many rows and columns of a study ``(H, W)`` one pixel of the square stands for.

        >>> Preprocess(size_px=2, fit="stretch").shrink((2, 4))
        (1.0, 2.0)
        """
        window, box = self.window(study_shape), self._box(study_shape)
        rows, columns = (side.stop - side.start for side in window)
        return rows / box[2], columns / box[3]

    def window(self, shape: tuple[int, ...]) -> tuple[slice, slice]:
        """Rows and columns of a study ``(H, W)`` that are kept: all, or its central square.

        >>> Preprocess(fit="crop").window((2, 4))
        (slice(0, 2, None), slice(1, 3, None))
        """
        height, width = shape
        if self.fit != "crop":
            return slice(0, height), slice(0, width)
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return slice(top, top + side), slice(left, left + side)

    def _box(self, shape: tuple[int, ...]) -> Box:
        """Where the content lies in the square."""
        size = self.size_px
        if self.fit != "pad":
            return 0, 0, size, size
        return contained(shape, (size, size))


def contained(shape: tuple[int, ...], frame: tuple[int, int]) -> Box:
    """Where an image ``(H, W)``, as large as it fits, lies in the middle of a frame (h, w).

    >>> contained((4, 8), (6, 6))
    (1, 0, 3, 6)
    """
    (height, width), (rows, columns) = shape, frame
    to, of = (rows, height) if height * columns >= width * rows else (columns, width)
    # round half up in exact integers; a sliver keeps at least one pixel
    h, w = (max(1, (2 * side * to + of) // (2 * of)) for side in (height, width))
    return (rows - h) // 2, (columns - w) // 2, h, w


def equalise(levels: np.ndarray) -> np.ndarray:
    """Histogram equalisation as OpenCV's ``equalizeHist`` defines it (the sets above used it).

    ``(H, W)`` uint8 -> uint8: level i becomes 255 * (share of pixels at or below i, leaving out
    those at the lowest level).

    >>> equalise(np.array([[3, 3, 7, 9]], np.uint8))
    array([[  0,   0, 128, 255]], dtype=uint8)
    """
    count = np.bincount(levels.ravel(), minlength=256)
    lowest = int(np.flatnonzero(count)[0])
    if count[lowest] == levels.size:
        return levels.copy()
    scale = np.float32(255.0 / (levels.size - int(count[lowest])))
    summed = np.cumsum(count) - count[lowest]
    table = np.clip(np.rint(summed.astype(np.float32) * scale), 0, 255).astype(np.uint8)
    return np.take(table, levels)


def _extremes(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high - low < 0.01:  # grey levels; a resized constant differs by float32 rounding
        raise SpcxrError("every pixel of the image has the same value; leave it out")
    return low, high


def _to_unit(image: np.ndarray, low: float, high: float) -> np.ndarray:
    """(image - low) / (high - low), in place."""
    image -= np.float32(low)
    image *= np.float32(1.0 / (high - low))
    return image


def _as_stored(study: Study) -> np.ndarray:
    """The values before the inversion that `read_study` applied."""
    top = study.pixels.dtype.type(2**study.bits - 1)
    return top - study.pixels if study.inverted else study.pixels


def _levels(stored: np.ndarray, study: Study, low: float, high: float) -> np.ndarray:
    """Truncate (x - low) * 255 / (high - low) to uint8, then invert where the study was."""
    values = np.arange(2**study.bits, dtype=np.float64)
    table = np.clip((values - low) * 255.0 / (high - low), 0, 255).astype(np.uint8)
    return np.take(255 - table if study.inverted else table, stored)


def _inside(box: Box) -> tuple[slice, slice]:
    top, left, height, width = box
    return slice(top, top + height), slice(left, left + width)
