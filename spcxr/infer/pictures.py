"""Masks as pictures: class numbers with a palette, outlines over the radiograph, uncertainty."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from spcxr.data.resize import resize, resize_nearest
from spcxr.evaluate.overlays import BACKGROUND, WORDS, outline

# Okabe-Ito: told apart with any colour vision, and visible on grey.
COLOURS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (204, 121, 167),
    (213, 94, 0),
    (0, 114, 178),
)
DRAWN_PX = 1024  # the longer side of an overlay, at most
LEGEND_PX, FAST = 26, 1
JPEG_QUALITY = 90


def save_mask(mask: NDArray[np.uint8], file: Path) -> None:
    """Write ``(H, W)`` class numbers as an indexed PNG: read back, its values are the numbers.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "m.png")
    ...     save_mask(np.array([[0, 1, 2]], np.uint8), file)
    ...     np.asarray(Image.open(file)).tolist()
    [[0, 1, 2]]
    """
    image = Image.fromarray(mask)
    # A colour for each number: the length of the palette decides how many bits are written.
    colours = (COLOURS[k % len(COLOURS)] for k in range(max(int(mask.max()), len(COLOURS))))
    image.putpalette(bytes(sum(((0, 0, 0), *colours), ())))
    image.save(file, "PNG", compress_level=FAST)


def save_map(values: NDArray[np.floating[Any]], file: Path) -> None:
    """Write ``(H, W)`` in [0, 1] as an 8-bit grey PNG."""
    grey = np.clip(np.rint(255 * values), 0, 255).astype(np.uint8)
    Image.fromarray(grey).save(file, "PNG", compress_level=FAST)


def overlay(
    pixels: NDArray[Any], mask: NDArray[np.uint8], structures: tuple[str, ...]
) -> Image.Image:
    """Outlines of each structure over a radiograph, at most `DRAWN_PX` long, with a legend below.

    Parameters
    ----------
    pixels, mask
        ``(H, W)``: grey uint8 or uint16, and uint8 class numbers.

    >>> overlay(np.eye(8, dtype=np.uint8), np.eye(8, dtype=np.uint8), ("lung",)).size
    (8, 34)
    """
    scale = min(1.0, DRAWN_PX / max(pixels.shape))
    height, width = (max(1, round(scale * side)) for side in pixels.shape)
    grey = resize(pixels, (height, width))
    low, high = float(grey.min()), float(grey.max())
    drawn = ((grey - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    picture = np.repeat(drawn[..., None], 3, axis=2)
    small = resize_nearest(mask, (height, width))
    for number in range(1, 1 + len(structures)):
        border = outline(small == number, max(1, round(min(height, width) / 300)))
        picture[border] = COLOURS[(number - 1) % len(COLOURS)]
    places, lines = _legend_places(structures, width)
    made = Image.new("RGB", (width, height + lines * LEGEND_PX), BACKGROUND)
    made.paste(Image.fromarray(picture))
    pen = ImageDraw.Draw(made)
    for number, (name, (left, line)) in enumerate(zip(structures, places, strict=True)):
        middle = height + LEGEND_PX * line + LEGEND_PX // 2
        colour = COLOURS[number % len(COLOURS)]
        pen.rectangle((left, middle - 5, left + 10, middle + 5), fill=colour)
        pen.text((left + 16, middle), name, fill=WORDS, font=_font(), anchor="lm")
    return made


def _legend_places(structures: tuple[str, ...], width: int) -> tuple[list[tuple[float, int]], int]:
    """(left, line) of each name, and the number of lines: what does not fit goes to the next."""
    places, left, line = [], 8.0, 0
    for name in structures:
        wide = 34 + _font().getlength(name)
        if left > 8 and left + wide > width:
            left, line = 8.0, line + 1
        places.append((left, line))
        left += wide
    return places, line + 1


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(13)
