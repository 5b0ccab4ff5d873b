"""From the rows of a store to what is to be done to them: crops, normalisation, corruption.

Drawing is done on the CPU, ahead of the step; pixels are changed on the device that trains, by
`ops.masked_patch_gather`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from spcxr.data.store import Store
from spcxr.objectives.corruption import Corruption, sample_crops, sample_fill
from spcxr.ops.views import Fill, Views
from spcxr.train.batches import Rows


@dataclass(frozen=True)
class ViewLaw:
    """How images become views; with an epoch and an image id it settles every random choice."""

    image_px: int
    patch_px: int
    crop_scale: tuple[float, float]
    flip_p: float
    corruption: Corruption
    seed: int


class Batch(NamedTuple):
    """Images as stored, how they become views, and what is hidden of them."""

    views: Views
    fill: Fill

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.views.to(device), self.fill.to(device))


def draw(store: Store, rows: Rows, law: ViewLaw, epoch: int | None) -> Batch:
    """Read a batch and draw its crops and corruption.

    ``epoch`` None is for held-out images: the whole image, and the same corruption each time.
    """
    ids, size = torch.from_numpy(rows), (law.image_px, law.image_px)
    pixels = torch.from_numpy(store.images(rows))[:, None]
    boxes = flip = None
    if epoch is not None:
        boxes, flip = sample_crops(
            ids,
            seed=law.seed,
            epoch=epoch,
            scale=law.crop_scale,
            flip_p=law.flip_p,
            source_px=(pixels.shape[2], pixels.shape[3]),
        )
    # (pixel / white - mean) / std
    scale = 1.0 / (np.iinfo(store.dtype).max * store.std)
    levels = torch.tensor([scale, -store.mean / store.std], dtype=torch.float32)
    scales, shifts = levels[:, None].repeat(1, len(rows))
    fill = sample_fill(
        ids, law.corruption, seed=law.seed, epoch=epoch or 0, size=size, patch_px=law.patch_px
    )
    return Batch(Views(pixels, boxes, flip, scales, shifts, size, law.patch_px), fill)
