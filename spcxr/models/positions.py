"""Learned positions, for patch grids they were not learned on."""

from __future__ import annotations

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
