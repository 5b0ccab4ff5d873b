"""From the rows of a store to what the encoder is shown: crop, normalise, corrupt.

Drawing is done on the CPU, ahead of the step; changing pixels on the device that trains.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spcxr.data.store import Store
from spcxr.objectives.corruption import (
    Corruption,
    Crops,
    Plan,
    corrupt,
    sample_crops,
    sample_plan,
)
from spcxr.ops.crop_resize import crop_resize
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


@dataclass(frozen=True)
class Batch:
    """Images as stored, ``pixels [B, 1, S, S]`` uint8 or uint16, and what is to be done to them."""

    pixels: Tensor
    crops: Crops
    plan: Plan


def draw(store: Store, rows: Rows, law: ViewLaw, epoch: int | None) -> Batch:
    """Read a batch and draw its crops and corruption.

    ``epoch`` None is for held-out images: the whole image, and the same corruption each time.
    """
    ids = torch.from_numpy(rows)
    pixels = torch.from_numpy(store.images(rows))[:, None]
    source = (pixels.shape[2], pixels.shape[3])
    if epoch is None:
        whole = torch.tensor([0.0, 0.0, *source]).expand(len(rows), 4).contiguous()
        crops = Crops(whole, torch.zeros(len(rows), dtype=torch.bool))
    else:
        crops = sample_crops(
            ids,
            seed=law.seed,
            epoch=epoch,
            scale=law.crop_scale,
            flip_p=law.flip_p,
            source_px=source,
        )
    plan = sample_plan(
        ids,
        law.corruption,
        seed=law.seed,
        epoch=epoch or 0,
        shape=(1, law.image_px, law.image_px),
        patch_px=law.patch_px,
    )
    return Batch(pixels, crops, plan)


def show(
    batch: Batch, store: Store, size_px: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Clean and corrupted views ``[B, 1, H, W]`` float32, normalised; the mask ``[B, H, W]``."""
    pixels = batch.pixels.to(device, non_blocking=True)
    views = crop_resize(pixels, batch.crops.boxes, batch.crops.flip, (size_px, size_px))
    clean = (views / np.iinfo(store.dtype).max - store.mean) / store.std
    corrupted, mask = corrupt(clean, batch.plan.to(device))
    return clean, corrupted, mask
