"""Pictures of radiographs: masks drawn over them, and grids of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from spcxr.errors import SpcxrError

Array = NDArray[Any]
Colour = tuple[int, int, int]

# Okabe-Ito: told apart with any colour vision, and visible on grey.
TRUE_COLOUR = (86, 180, 233)
PREDICTED_COLOUR = (230, 159, 0)
STRUCTURE_COLOURS = (
    (86, 180, 233),
    (230, 159, 0),
    (204, 121, 167),
    (240, 228, 66),
    (0, 158, 115),
    (213, 94, 0),
    (0, 114, 178),
)
SHADE = 0.35  # how much of its colour a true mask of several structures is
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


def overlay(
    image: Array, predicted: Array, truth: Array | None = None, *, structures: int = 1
) -> NDArray[np.uint8]:
    """Outlines over a radiograph: the prediction orange, the true mask (if any) blue.

    Several structures have a colour each: a line around the prediction, a shade over the true mask.

    Parameters
    ----------
    image
        ``(H, W)`` uint8 or uint16.
    predicted, truth
        ``(H, W)`` bool or class numbers, 0 = background.
    structures
        how many class numbers there are; of one, all but 0 is the same.

    Returns
    -------
    ``(k H, k W, 3)`` uint8: images smaller than `DRAWN_PX` are enlarged k times first, or a line
    one pixel wide would hide what it outlines.

    >>> drawn = overlay(np.zeros((112, 112), np.uint8), np.ones((112, 112)))
    >>> drawn.shape, drawn[0, 0].tolist()
    ((224, 224, 3), [230, 159, 0])
    >>> overlay(drawn[..., 0], np.full((224, 224), 2), structures=2)[0, 0].tolist()
    [230, 159, 0]
    """
    if image.shape != predicted.shape or (truth is not None and truth.shape != image.shape):
        raise SpcxrError(f"mask {predicted.shape} over image {image.shape}; sizes must be equal")
    times = -(-DRAWN_PX // min(image.shape))
    height, width = image.shape
    tile = Image.fromarray(grey8(image)).resize((times * width, times * height), BICUBIC)
    picture = np.array(tile.convert("RGB"))
    line_px = max(1, round(min(picture.shape[:2]) / 180))

    def enlarged(mask: Array) -> NDArray[np.bool_]:
        return mask.repeat(times, axis=0).repeat(times, axis=1)

    if structures > 1:
        numbered = list(enumerate(structure_colours(structures), start=1))
        for k, colour in numbered:
            if truth is None:
                break
            shaded = enlarged(np.equal(truth, k))
            picture[shaded] = (1 - SHADE) * picture[shaded] + SHADE * np.array(colour)
        for k, colour in numbered:
            picture[outline(enlarged(np.equal(predicted, k)), line_px)] = colour
        return picture
    for mask, colour in ((truth, TRUE_COLOUR), (predicted, PREDICTED_COLOUR)):
        if mask is not None:
            picture[outline(enlarged(mask.astype(bool)), line_px)] = colour
    return picture


def structure_colours(count: int) -> tuple[Colour, ...]:
    """The colours of several structures, in the order of their class numbers.

    >>> structure_colours(2)
    ((86, 180, 233), (230, 159, 0))
    """
    return tuple(STRUCTURE_COLOURS[k % len(STRUCTURE_COLOURS)] for k in range(count))


def legend_of(names: Sequence[str]) -> dict[str, Colour]:
    """What the colours of `overlay` mean.

    >>> legend_of(["lung"])
    {'prediction': (230, 159, 0), 'true mask': (86, 180, 233)}
    """
    if len(names) < 2:
        return {"prediction": PREDICTED_COLOUR, "true mask": TRUE_COLOUR}
    return dict(zip(names, structure_colours(len(names)), strict=True))


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


def side_by_side(
    examples: Sequence[tuple[str, float, Array, Array]], legend: Mapping[str, Colour] | None = None
) -> bytes:
    """Examples ``(caption, Dice, image, overlay)`` in columns, the plain images above -> PNG.

    ``legend``: what stands below, name by colour (`legend_of`).
    """
    captions = [f"{name}: Dice {value:.3f}" for name, value, _, _ in examples]
    plain = [image for _, _, image, _ in examples]
    drawn = [picture for _, _, _, picture in examples]
    made = sheet([plain, drawn], captions)
    if legend:
        made = with_legend(made, legend)
    buffer = io.BytesIO()
    made.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def with_legend(picture: Image.Image, legend: Mapping[str, Colour]) -> Image.Image:
    """A picture with a strip below it: a patch of each colour and its name, in lines that fit.

    >>> with_legend(Image.new("RGB", (200, 90)), {"heart": (204, 121, 167)}).size
    (200, 112)
    """
    font = ImageFont.load_default(13)
    places, left, line = [], GAP_PX, 0
    for name, colour in legend.items():
        width = 2 * CAPTION_PX + round(font.getlength(name))
        if left > GAP_PX and left + width > picture.width:
            left, line = GAP_PX, line + 1
        places.append((left, picture.height + line * CAPTION_PX, name, colour))
        left += width
    height = picture.height + (line + 1) * CAPTION_PX
    made = Image.new("RGB", (picture.width, height), BACKGROUND)
    made.paste(picture)
    pen = ImageDraw.Draw(made)
    for left, top, name, colour in places:
        middle = top + CAPTION_PX // 2
        pen.rectangle((left, middle - 5, left + 10, middle + 5), fill=colour)
        pen.text((left + 16, middle), name, fill=WORDS, font=font, anchor="lm")
    return made
