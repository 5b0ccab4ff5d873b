"""Maps on the patch grid, brought onto a file's own pixels, and drawn over its radiograph."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from spcxr.data.presets import Preprocess
from spcxr.data.resize import resize
from spcxr.evaluate.cases import HEAT, STRONGEST
from spcxr.infer.reading import Ready

Map = NDArray[np.float32]


def on_the_file(
    heat: Map, ready: Ready, preprocess: Preprocess, read: NDArray[np.bool_] | None = None
) -> Map:
    """A map ``(Gh, Gw)`` on the patch grid -> ``(H, W)`` on the grid of ``ready.study.pixels``.

    Between the middles of patches it is interpolated. It is 0 where ``crop`` cut the file away,
    and on patches that were not read (``read (Gh, Gw)``; None: all were).
    """
    side, study = preprocess.size_px, ready.study.pixels
    shape = (study.shape[0], study.shape[1])
    square = resize(heat, (side, side))
    wide: Map = preprocess.to_original(square, shape, ready.prepared.box)
    if read is not None:
        rows, columns = (np.arange(side) * count // side for count in read.shape)
        known = read[rows[:, None], columns].astype(np.uint8)
        wide *= preprocess.to_original(known, shape, ready.prepared.box)
    return wide.clip(0, 1)


def heat_picture(pixels: NDArray[Any], share: Map) -> Image.Image:
    """A radiograph ``(H, W)`` with a map ``(H, W)`` in [0, 1] over it, of the same size.

    Yellow is 1; where the map is 0 the radiograph is seen as it is.

    >>> drawn = heat_picture(np.zeros((2, 2), np.uint8), np.array([[0, 1], [0, 0]], np.float32))
    >>> drawn.size, drawn.getpixel((0, 0)), drawn.getpixel((1, 0))
    ((2, 2), (0, 0, 0), (165, 151, 36))
    """
    low, high = float(pixels.min()), float(pixels.max())
    grey = (pixels - np.float32(low)) * np.float32(255 / max(high - low, 1e-6))
    level = np.rint(255 * share).astype(np.uint8)
    cover = STRONGEST * np.arange(256, dtype=np.float32) / 255
    colours = (255 * cover[:, None] * HEAT(np.arange(256))[:, :3]).astype(np.float32)
    grey *= (1 - cover)[level]
    picture = np.empty((*pixels.shape, 3), np.uint8)
    for channel in range(3):
        picture[..., channel] = np.rint(grey + colours[level, channel])
    return Image.fromarray(picture)
