"""Pictures of radiographs: masks drawn over them, and grids of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from spcxr.errors import SpcxrError

Array = NDArray[Any]

# Okabe-Ito: told apart with any colour vision, and visible on grey.
TRUE_COLOUR = (86, 180, 233)
PREDICTED_COLOUR = (230, 159, 0)
DRAWN_PX = 224
GAP_PX = 6
BICUBIC = Image.Resampling.BICUBIC
CAPTION_PX = 22
BACKGROUND, WORDS = (24, 27, 31), (230, 233, 237)


def grey8(pixels: Array) -> NDArray[np.uint8]:
    """Stored pixels ``(..., H, W)`` uint8 or uint16 -> uint8 by dropping the low byte.

    >>> grey8(np.array([[65535, 256]], np.uint16)).tolist()
    [[255, 1]]
    """
    return pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8)


def outline(mask: Array, width_px: int = 1) -> NDArray[np.bool_]:
    """The inner border of a mask ``(H, W)``.

    >>> outline(np.ones((3, 3))).astype(int).tolist()
    [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    """
    inside = mask.astype(bool)
    return inside & ~ndimage.binary_erosion(inside, iterations=width_px)


def overlay(image: Array, predicted: Array, truth: Array | None = None) -> NDArray[np.uint8]:
    """Outlines over a radiograph: the prediction orange, the true mask (if any) blue.

    Parameters
    ----------
    image
        ``(H, W)`` uint8 or uint16.
    predicted, truth
        ``(H, W)`` bool or class numbers, 0 = background.

    Returns
    -------
    ``(k H, k W, 3)`` uint8: images smaller than `DRAWN_PX` are enlarged k times first, or a line
    one pixel wide would hide what it outlines.

    >>> drawn = overlay(np.zeros((112, 112), np.uint8), np.ones((112, 112)))
    >>> drawn.shape, drawn[0, 0].tolist()
    ((224, 224, 3), [230, 159, 0])
    """
    if image.shape != predicted.shape or (truth is not None and truth.shape != image.shape):
        raise SpcxrError(f"mask {predicted.shape} over image {image.shape}; sizes must be equal")
    times = -(-DRAWN_PX // min(image.shape))
    height, width = image.shape
    tile = Image.fromarray(grey8(image)).resize((times * width, times * height), BICUBIC)
    picture = np.array(tile.convert("RGB"))
    line_px = max(1, round(min(picture.shape[:2]) / 180))
    for mask, colour in ((truth, TRUE_COLOUR), (predicted, PREDICTED_COLOUR)):
        if mask is not None:
            enlarged = mask.astype(bool).repeat(times, axis=0).repeat(times, axis=1)
            picture[outline(enlarged, line_px)] = colour
    return picture


def best_median_worst(values: Array) -> tuple[tuple[str, int], ...]:
    """(name, index) of the best, the median and the worst of ``(n,)``; NaN is left out.

    >>> best_median_worst(np.array([0.2, np.nan, 0.9, 0.5]))
    (('best', 2), ('median', 3), ('worst', 0))
    """
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(-values[known], kind="stable")]
    if len(order) == 0:
        return ()
    places = {"best": 0, "median": len(order) // 2, "worst": len(order) - 1}
    return tuple((name, int(order[place])) for name, place in places.items())


def grid(
    rows: Sequence[Sequence[Array]], captions: Sequence[str] = (), *, tile_px: int = 224
) -> bytes:
    """`sheet` as a PNG.

    >>> grid([[np.zeros((8, 8), np.uint8)] * 2], ["original", "corrupted"])[:4]
    b'\\x89PNG'
    """
    buffer = io.BytesIO()
    sheet(rows, captions, tile_px=tile_px).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def sheet(
    rows: Sequence[Sequence[Array]], captions: Sequence[str] = (), *, tile_px: int = 224
) -> Image.Image:
    """Pictures in rows and columns on one, a caption over each column.

    Parameters
    ----------
    rows
        each a sequence of ``(H, W)`` or ``(H, W, 3)`` uint8, or uint16 grey.
    tile_px
        side of the square that each picture is fitted into.

    >>> sheet([[np.zeros((8, 8), np.uint8)] * 2], tile_px=100).size
    (206, 100)
    """
    columns = max(len(row) for row in rows)
    top = CAPTION_PX if captions else 0
    size = (
        columns * tile_px + (columns - 1) * GAP_PX,
        len(rows) * tile_px + (len(rows) - 1) * GAP_PX + top,
    )
    made = Image.new("RGB", size, BACKGROUND)
    for r, row in enumerate(rows):
        for c, pixels in enumerate(row):
            tile = Image.fromarray(grey8(pixels)).convert("RGB")
            tile.thumbnail((tile_px, tile_px), Image.Resampling.LANCZOS)
            if max(tile.size) < tile_px:
                scale = tile_px / max(tile.size)
                sides = (round(tile.width * scale), round(tile.height * scale))
                tile = tile.resize(sides, BICUBIC)
            left = c * (tile_px + GAP_PX) + (tile_px - tile.width) // 2
            made.paste(tile, (left, top + r * (tile_px + GAP_PX) + (tile_px - tile.height) // 2))
    pen, font = ImageDraw.Draw(made), ImageFont.load_default(13)
    for c, caption in enumerate(captions):
        middle = c * (tile_px + GAP_PX) + tile_px // 2
        pen.text((middle, top // 2), caption, fill=WORDS, font=font, anchor="mm")
    return made


def side_by_side(examples: Sequence[tuple[str, float, Array, Array]]) -> bytes:
    """Examples ``(caption, Dice, image, overlay)`` in columns, the plain images above -> PNG."""
    captions = [f"{name}: Dice {value:.3f}" for name, value, _, _ in examples]
    plain = [image for _, _, image, _ in examples]
    drawn = [picture for _, _, _, picture in examples]
    return grid([plain, drawn], captions)
