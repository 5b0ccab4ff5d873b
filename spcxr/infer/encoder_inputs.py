"""What `Encoder` is given -> what its network is shown, one radiograph at a time, in any thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spcxr.data.presets import Prepared, Preprocess
from spcxr.data.study import Rejected, Study, range_notes
from spcxr.errors import SpcxrError
from spcxr.infer.inputs import Input
from spcxr.infer.reading import Refused, read_prepared
from spcxr.models.regions import patches_touched, resized

Radiograph = str | Path | NDArray[Any]
Grid = tuple[int, int]


def listed(inputs: Radiograph | Sequence[Radiograph]) -> list[Radiograph]:
    """One path or array, a list of them, or an array ``[B, H, W]`` -> a list.

    Raises
    ------
    SpcxrError
        nothing, or things that are no radiographs.

    >>> len(listed(np.zeros((3, 8, 8), np.uint8))), listed("a.png")
    (3, ['a.png'])
    """
    if isinstance(inputs, str | Path):
        return [inputs]
    if isinstance(inputs, np.ndarray):
        if inputs.ndim == 3 and inputs.shape[-1] not in (3, 4):
            return listed(list(inputs))
        return [inputs]
    found = several_of(inputs)
    if not found:
        raise SpcxrError("nothing to encode; give one image at least")
    for one in found:
        if not isinstance(one, str | Path | np.ndarray):
            raise SpcxrError(
                f"a {type(one).__name__} among the images; give paths, numpy arrays or torch "
                "tensors, each kind by itself or paths and arrays mixed"
            )
    return found


def several_of(inputs: Any) -> list[Any]:
    """A list of what was given, if it is several things.

    >>> several_of(7)
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: a int; give paths, numpy arrays or torch tensors, or a list of them ...
    """
    try:
        return list(inputs)
    except TypeError as error:
        raise SpcxrError(
            f"a {type(inputs).__name__}; give paths, numpy arrays or torch tensors, or a list of "
            "them (of a Pillow image, np.asarray(image))"
        ) from error


def study_of(array: NDArray[Any], name: str) -> Study:
    """A radiograph in memory, ``[H, W]`` uint8, uint16, or float in [0, 1]: dark air, bright bone.

    Raises
    ------
    Rejected
        an array of another shape or type, values that are not finite or outside [0, 1], or that
        show nothing (`range_notes`).

    >>> study_of(np.linspace(0, 1, 64).reshape(8, 8), "image 0").pixels.max()
    np.uint16(65535)
    >>> study_of(np.zeros((8, 8, 3), np.uint8), "image 0")
    Traceback (most recent call last):
    spcxr.data.study.Rejected: image 0: it is an array [8, 8, 3]; give [H, W], grey (a colour...
    """
    if array.ndim != 2 or 0 in array.shape:
        raise Rejected(
            name,
            f"it is an array {list(array.shape)}; give [H, W], grey (a colour picture is no "
            "radiograph)",
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise Rejected(name, "it has pixels that are not finite")
        if low < 0 or high > 1:
            raise Rejected(
                name,
                f"its values run from {low:.4g} to {high:.4g}; floats of a radiograph lie in "
                "[0, 1] (give images that are normalised already as a torch tensor)",
            )
        wide = array.astype(np.promote_types(array.dtype, np.float32), copy=False)
        array = (wide * 65535 + 0.5).astype(np.uint16)  # which float16 cannot hold
    if array.dtype not in (np.uint8, np.uint16):
        raise Rejected(name, f"it is of {array.dtype}; give uint8, uint16 or float in [0, 1]")
    bits = 8 * array.dtype.itemsize
    return Study(array, bits, notes=range_notes(name, array, bits))


def prepared_of(
    one: Radiograph, number: int, prepare: Callable[[Study], Prepared]
) -> tuple[Study, Prepared]:
    """A radiograph as read, and as prepared; ``number`` names an array in messages.

    Raises
    ------
    Rejected
        a file or an array that cannot be used.
    """
    if isinstance(one, np.ndarray):
        name = f"image {number}"
        study = study_of(one, name)
        try:
            return study, prepare(study)
        except SpcxrError as error:  # a preset that can make nothing of it
            raise Rejected(name, str(error)) from error
    path = Path(one)
    read = read_prepared(Input(path, path.name), prepare)
    if isinstance(read, Refused):
        raise Rejected(path, read.reason)
    return read.study, read.prepared


def frame_of(shape: tuple[int, ...], patches: int, patch_px: int) -> Grid:
    """Sides in pixels, multiples of the patch, for an image ``(H, W)`` in its own aspect.

    The frame has ``patches`` patches or a few less.

    >>> frame_of((2500, 2000), 196, 16), frame_of((10, 4000), 196, 16)
    ((256, 192), (16, 3136))
    """
    rows = min(max(1, round(math.sqrt(patches * shape[0] / shape[1]))), patches)
    return rows * patch_px, patches // rows * patch_px


@dataclass(frozen=True, eq=False)
class Shown:
    """What the network is shown of a radiograph: pixels ``(h, w)`` uint8 or uint16, and which
    patches of them, ``[Gh, Gw]`` bool; None: all. ``notes``: what is odd about it."""

    name: str
    pixels: NDArray[Any]
    visible: Tensor | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Shower:
    """Prepares radiographs for one network: on squares, or each in its own aspect.

    ``image_px`` and ``patch_px`` are the network's.
    """

    preprocess: Preprocess
    image_px: tuple[int, int]
    patch_px: int
    keep_aspect: bool

    def __call__(self, one: Radiograph, number: int, mask: Any | None) -> Shown:
        """A file or array, its place among the others, and its mask of patches or of pixels.

        Raises
        ------
        Rejected
            a file or array that cannot be used.
        SpcxrError
            a mask of another size.
        """
        study, prepared = prepared_of(one, number, self._prepare)
        pixels = prepared.pixels
        name = f"image {number}" if isinstance(one, np.ndarray) else str(one)
        if mask is None:
            return Shown(name, pixels, None, study.notes)
        size = pixels.shape if self.keep_aspect else self.image_px
        grid = (size[0] // self.patch_px, size[1] // self.patch_px)
        visible = self._visible(np.asarray(mask) != 0, study, grid, number)
        return Shown(name, pixels, visible, study.notes)

    def _frame(self, study: Study) -> tuple[int, int]:
        patches = (self.image_px[0] // self.patch_px) * (self.image_px[1] // self.patch_px)
        return frame_of(study.pixels.shape, patches, self.patch_px)

    def _prepare(self, study: Study) -> Prepared:
        if self.keep_aspect:
            return self.preprocess.framed(study, self._frame(study))
        return self.preprocess(study)

    def _visible(self, mask: NDArray[np.bool_], study: Study, grid: Grid, number: int) -> Tensor:
        if mask.shape == grid:
            return torch.from_numpy(mask)
        if mask.shape != study.pixels.shape:
            raise SpcxrError(
                f"visible of image {number} is {list(mask.shape)}; give its patches "
                f"{list(grid)} or its pixels {list(study.pixels.shape)}"
            )
        drawn = mask.astype(np.uint8)
        if self.keep_aspect:
            square = self.preprocess.framed_mask(drawn, self._frame(study))
        else:
            square = self.preprocess.mask(drawn)
        size = (grid[0] * self.patch_px, grid[1] * self.patch_px)
        return patches_touched(resized(torch.from_numpy(square)[None], size) > 0, self.patch_px)[0]
