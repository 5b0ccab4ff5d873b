"""Learned positions, for patch grids they were not learned on."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.errors import SpcxrError


def resize_positions(
    pos_embed: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]
) -> Tensor:
    """Learned positions ``[1, 1 + N, D]`` resampled to another patch grid (bicubic, antialiased).

    The cls position is kept as it is; an unchanged grid returns the tensor itself.

    Raises
    ------
    SpcxrError
        the positions do not fit ``from_grid``.

    >>> resize_positions(torch.zeros(1, 1 + 4 * 4, 8), (4, 4), (2, 6)).shape
    torch.Size([1, 13, 8])
    """
    count = from_grid[0] * from_grid[1]
    if pos_embed.shape[:2] != (1, 1 + count):
        raise SpcxrError(
            f"positions of shape {tuple(pos_embed.shape)} do not fit a grid of "
            f"{from_grid[0]}x{from_grid[1]} patches and a cls token; give the grid they came from"
        )
    if from_grid == to_grid:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    planes = patches.reshape(1, *from_grid, -1).permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, to_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, planes.flatten(2).transpose(1, 2).to(cls.dtype)], 1)


def assumed_grid(count: int, wanted: tuple[int, int], path: Path) -> tuple[int, int]:
    """The grid of ``count`` patches in a file that does not say: the one wanted, or a square.

    Raises
    ------
    SpcxrError
        neither fits.

    >>> assumed_grid(6, (2, 3), Path("w.pth")), assumed_grid(16, (2, 3), Path("w.pth"))
    ((2, 3), (4, 4))
    """
    if count == wanted[0] * wanted[1]:
        return wanted
    side = math.isqrt(max(count, 0))
    if side * side != count:
        raise SpcxrError(
            f"{path}: {count} positions are no square grid and not the {wanted[0]}x{wanted[1]} "
            "wanted; give the model folder, whose config.json says the grid"
        )
    return (side, side)


def lack_cls_position(count: int, wanted: tuple[int, int]) -> bool:
    """Whether ``count`` positions can only be those of patches (timm's ``no_embed_class``).

    >>> lack_cls_position(16, (2, 3)), lack_cls_position(17, (2, 3)), lack_cls_position(7, (2, 3))
    (True, False, False)
    """
    fits = [n in (wanted[0] * wanted[1], math.isqrt(max(n, 0)) ** 2) for n in (count - 1, count)]
    return fits == [False, True]
