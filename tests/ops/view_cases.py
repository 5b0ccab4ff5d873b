"""Batches of views and fills of every kind, for the tests of all ops that take them."""

import os

import pytest
import torch

from spcxr.ops import dispatch
from spcxr.ops.group_mask import group_mask
from spcxr.ops.views import FILLS, Fill, Views

REQUIRED = os.environ.get("SPCXR_REQUIRE_BACKENDS", "").split(",")
needs_native = pytest.mark.skipif(
    dispatch.native().reason is not None and "native" not in REQUIRED,
    reason=str(dispatch.native().reason),
)
PIXELS = (torch.uint8, torch.uint16, torch.float32)
# name -> batch, channels, source (H, W), size (h, w), patch, cropped
SHAPES = {
    "native size": (5, 1, (32, 48), (32, 48), 16, False),
    "colour": (3, 3, (32, 32), (32, 32), 8, False),
    "cropped": (5, 1, (61, 47), (32, 48), 16, True),
    "magnified": (4, 1, (9, 7), (28, 42), 14, True),
    "shrunk": (3, 3, (150, 170), (24, 16), 8, True),
    "patch of 4": (2, 1, (20, 36), (12, 20), 4, True),
    "whole, resampled": (2, 1, (50, 40), (32, 32), 16, False),
    "nothing": (0, 1, (32, 32), (32, 32), 16, True),
}


def pixels_of(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.float32:
        return torch.randn(shape, generator=generator)
    high = 256 if dtype == torch.uint8 else 65536
    return torch.randint(0, high, shape, generator=generator, dtype=torch.int32).to(dtype)


def views_of(name, dtype=torch.uint8, seed=0):
    batch, channels, source, size, patch, cropped = SHAPES[name]
    draw = torch.Generator().manual_seed(seed)
    pixels = pixels_of((batch, channels, *source), dtype, seed)
    white = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}[dtype]
    scale = (3 + torch.rand(batch, generator=draw)) / white
    shift = -torch.rand(batch, generator=draw)
    boxes = flip = None
    if cropped:
        limits = torch.tensor(source, dtype=torch.float32)
        extent = limits * (0.3 + 0.7 * torch.rand(batch, 2, generator=draw))
        start = (limits - extent) * torch.rand(batch, 2, generator=draw)
        boxes = torch.cat([start, torch.minimum(extent, limits - start)], 1)
        flip = torch.rand(batch, generator=draw) < 0.5
    return Views(pixels, boxes, flip, scale, shift, size, patch)


def fill_of(views, *, by_patch=False, seed=0, kinds=FILLS):
    batch = len(views.pixels)
    ids = torch.arange(batch) * 1000003 + 2**40
    unit = views.patch_px if by_patch else 1
    grid = (views.size[0] // unit, views.size[1] // unit)
    blocks, mask = group_mask(ids, seed=seed, epoch=1, grid=grid, backend="reference")
    blocks = blocks[:, :40] * unit
    draw = torch.Generator().manual_seed(seed)
    room = torch.tensor(views.size) - blocks[..., 2:]
    sources = (torch.rand(room.shape, generator=draw) * (room + 1)).int()
    kind = torch.tensor([FILLS.index(kinds[i % len(kinds)]) for i in range(batch)]).int()
    partner = (torch.arange(batch) + 1) % max(batch, 1)
    return Fill(mask, kind, partner, blocks, sources, ids, seed + 2**35, 3, 1)
