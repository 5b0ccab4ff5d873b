"""Radiographs made worse on purpose, mildly to strongly: how far do a model's figures fall?

Each is what happens to real images: noise of a low dose, blur of a moving patient, another
machine's grey curve (gamma), burned-in text, a narrow field (crop), a tilted patient, and
MONOCHROME1 read as MONOCHROME2. The strengths are ours. What is drawn depends on (seed, row,
corruption) alone, so two models see the same images, in whatever batches.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from spcxr.errors import SpcxrError

Rows = NDArray[np.int64]
Draw = np.random.Generator
# Words as they are burned into chest X-rays; the first ones are the side markers.
WORDS = ("L", "R", "PORTABLE", "AP ERECT", "SUPINE", "SEMI-ERECT", "PA", "MOBILE", "ICU")


@dataclass(frozen=True)
class Corruption:
    """``apply(images [B, 1, h, w], level, draws)``: one generator an image.

    ``levels`` rise from mild to strong. ``moves`` says that pixels change place, so that a mask
    would no longer lie on what it outlines.
    """

    said: str
    levels: tuple[float, ...]
    apply: Callable[[Tensor, float, list[Draw]], Tensor]
    moves: bool = False


def corrupt(images: Tensor, rows: Rows, name: str, strength: int, *, seed: int = 0) -> Tensor:
    """One corruption of a batch of grey images.

    Parameters
    ----------
    images
        ``[B, 1, h, w]`` float32 in [0, 1].
    rows
        ``(B,)`` image ids: the store's row numbers.
    name
        one of `CORRUPTIONS`.
    strength
        from 1 (mild) to as many `Corruption.levels` as it has.

    Returns
    -------
    ``[B, 1, h, w]`` float32 in [0, 1], on the images' device.

    Raises
    ------
    SpcxrError
        a name or strength that there is not.

    >>> image = torch.full((1, 1, 8, 8), 0.25)
    >>> float(corrupt(image, np.array([3]), "inversion", 1)[0, 0, 0, 0])
    0.75
    """
    if name not in CORRUPTIONS:
        raise SpcxrError(f"no corruption {name!r}; choose of: {', '.join(CORRUPTIONS)}")
    chosen = CORRUPTIONS[name]
    if not 1 <= strength <= len(chosen.levels):
        raise SpcxrError(f"strength {strength} of {name}; give 1 to {len(chosen.levels)}")
    # The same draws at each strength: what grows is the strength, not the luck.
    kind = zlib.crc32(name.encode())
    draws = [np.random.default_rng([seed, kind, int(row)]) for row in rows]
    return chosen.apply(images, chosen.levels[strength - 1], draws).clamp(0, 1)


def _from_host(values: NDArray[np.float32], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype)


def _noise(images: Tensor, level: float, draws: list[Draw]) -> Tensor:
    """Gaussian, of this standard deviation."""
    shape = images.shape[1:]
    drawn = np.stack([draw.standard_normal(shape, dtype=np.float32) for draw in draws])
    return images + level * _from_host(drawn, images)


def _blur(images: Tensor, level: float, draws: list[Draw]) -> Tensor:
    """Gaussian, its standard deviation this share of the longer side."""
    sigma = level * max(images.shape[2:])
    reach = max(math.ceil(3 * sigma), 1)
    at = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    weight = torch.exp(-0.5 * (at / sigma) ** 2)
    weight = weight / weight.sum()
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, weight.view(1, 1, -1, 1))
    return F.conv2d(rows, weight.view(1, 1, 1, -1))


def _gamma(images: Tensor, level: float, draws: list[Draw]) -> Tensor:
    """Grey to the power of this, or of one over it: darker or brighter, by chance."""
    powers = np.array([level if draw.random() < 0.5 else 1 / level for draw in draws], np.float32)
    return images.clamp(0, 1) ** _from_host(powers, images).view(-1, 1, 1, 1)


def _text(images: Tensor, level: float, draws: list[Draw]) -> Tensor:
    """White words near the border, letters of this share of the height: one to three of them."""
    height, width = images.shape[2:]
    size = max(round(level * height), 6)
    ink = [_words(height, width, size, count=round(25 * level), draw=draw) for draw in draws]
    drawn = _from_host(np.stack(ink)[:, None], images)
    return torch.maximum(images, drawn)


def _words(height: int, width: int, size: int, *, count: int, draw: Draw) -> NDArray[np.float32]:
    """Words as white on black ``(h, w)`` in [0, 1]: a side marker, then others."""
    page = Image.new("L", (width, height))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size)
    bold = max(size // 12, 1)  # as lead letters are
    for number in range(count):
        word = WORDS[draw.integers(0, 2)] if number == 0 else WORDS[draw.integers(2, len(WORDS))]
        left, top, right, bottom = pen.textbbox((0, 0), word, font=font, stroke_width=bold)
        across, down = max(width - (right - left), 0), max(height - (bottom - top), 0)
        # In the upper or lower fifth, as technologists place them; anywhere from side to side.
        edge = draw.random() * 0.2
        x, y = across * draw.random(), down * (edge if draw.random() < 0.7 else 1 - edge)
        pen.text((x - left, y - top), word, fill=255, font=font, stroke_width=bold)
    return np.asarray(page, np.float32) / np.float32(255)


def _resampled(images: Tensor, matrices: NDArray[np.float32]) -> Tensor:
    """Images read at affine places ``(B, 2, 3)`` of [-1, 1]; black outside."""
    grid = F.affine_grid(_from_host(matrices, images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _crop(images: Tensor, level: float, draws: list[Draw]) -> Tensor:
    """A window of this share of either side, anywhere, brought to the image's size."""
    shifts = np.stack([draw.uniform(level - 1, 1 - level, 2) for draw in draws])
    matrices = np.zeros((len(draws), 2, 3), np.float32)
    matrices[:, 0, 0] = matrices[:, 1, 1] = level
    matrices[:, :, 2] = shifts
    return _resampled(images, matrices)


def _rotation(images: Tensor, level: float, draws: list[Draw]) -> Tensor:
    """By this many degrees to the left or the right, by chance; the corners turn black."""
    height, width = images.shape[2:]
    angles = np.radians([level if draw.random() < 0.5 else -level for draw in draws])
    cosine, sine = np.cos(angles), np.sin(angles)
    matrices = np.zeros((len(draws), 2, 3), np.float32)
    matrices[:, 0, 0] = matrices[:, 1, 1] = cosine
    matrices[:, 0, 1], matrices[:, 1, 0] = -sine * height / width, sine * width / height
    return _resampled(images, matrices)


def _inversion(images: Tensor, level: float, draws: list[Draw]) -> Tensor:
    """White for black."""
    return 1 - images


CORRUPTIONS = {
    "noise": Corruption("Gaussian noise", (0.02, 0.05, 0.1), _noise),
    "blur": Corruption("Gaussian blur", (0.005, 0.01, 0.02), _blur),
    "gamma": Corruption("gamma", (1.3, 1.7, 2.5), _gamma),
    "text": Corruption("burned-in text", (0.05, 0.08, 0.12), _text),
    "crop": Corruption("crop", (0.9, 0.8, 0.7), _crop, moves=True),
    "rotation": Corruption("rotation", (5.0, 10.0, 20.0), _rotation, moves=True),
    "inversion": Corruption("inversion (MONOCHROME)", (1.0,), _inversion),
}
