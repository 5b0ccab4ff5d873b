"""Pixels <-> patch rows: one order of pixels for the heads, the losses and the pictures."""

from __future__ import annotations

from torch import Tensor

from spcxr.errors import SpcxrError


def patch_grid(height_px: int, width_px: int, patch_px: int) -> tuple[int, int]:
    """The patch grid ``(Gh, Gw)`` of an image, which must divide evenly.

    Raises
    ------
    SpcxrError
        a side is no multiple of ``patch_px``.

    >>> patch_grid(224, 112, 16)
    (14, 7)
    >>> patch_grid(225, 112, 16)
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: image of 225x112 px does not divide into patches of 16 px; choose ...
    """
    if height_px < patch_px or width_px < patch_px or height_px % patch_px or width_px % patch_px:
        raise SpcxrError(
            f"image of {height_px}x{width_px} px does not divide into patches of {patch_px} px; "
            f"choose sides that are multiples of {patch_px}"
        )
    return height_px // patch_px, width_px // patch_px


def patchify(images: Tensor, patch_px: int) -> Tensor:
    """Images ``[B, C, H, W]`` -> patch rows ``[B, N, C*P*P]``, row-major patches, channel first.

    The pixel order within a row is that of a transposed convolution's weight (C, P, P).

    >>> import torch
    >>> patchify(torch.zeros(2, 1, 32, 48), 16).shape
    torch.Size([2, 6, 256])
    """
    batch, channels, height, width = images.shape
    rows, columns = patch_grid(height, width, patch_px)
    split = images.reshape(batch, channels, rows, patch_px, columns, patch_px)
    row = channels * patch_px**2  # named, since -1 says nothing about an empty batch
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, row)


def unpatchify(rows: Tensor, grid: tuple[int, int], patch_px: int) -> Tensor:
    """Patch rows ``[B, N, C*P*P]`` -> images ``[B, C, Gh*P, Gw*P]``: `patchify` undone.

    >>> import torch
    >>> images = torch.rand(2, 3, 32, 48)
    >>> bool((unpatchify(patchify(images, 16), (2, 3), 16) == images).all())
    True
    """
    channels = rows.shape[2] // patch_px**2
    split = rows.reshape(rows.shape[0], grid[0], grid[1], channels, patch_px, patch_px)
    joined = split.permute(0, 3, 1, 4, 2, 5)
    return joined.reshape(rows.shape[0], channels, grid[0] * patch_px, grid[1] * patch_px)
