"""From the rows of a store to what is to be done to them: crops, normalisation, corruption.

Drawing is done on the CPU, ahead of the step; pixels are changed on the device that trains, by
`ops.masked_patch_gather`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spcxr.data.store import Store
from spcxr.objectives.corruption import (
    Corruption,
    sample_crops,
    sample_fill,
    sample_survivors,
)
from spcxr.objectives.objective import View
from spcxr.ops.views import Fill, Views
from spcxr.train.batches import Rows


@dataclass(frozen=True)
class ViewLaw:
    """How images become views; with an epoch and an image id it settles every random choice.

    ``corrupted`` views of ``size`` (height, width), then ``local`` clean ones of ``local_size``.
    """

    size: tuple[int, int]
    patch_px: int
    channels: int
    crop_scale: tuple[float, float]
    flip_p: float
    corruption: Corruption
    drop_rates: tuple[float, ...]
    seed: int
    corrupted: int = 1
    local: int = 0
    local_size: tuple[int, int] = (96, 96)
    local_scale: tuple[float, float] = (0.05, 0.5)


def draw(store: Store, rows: Rows, law: ViewLaw, epoch: int | None) -> tuple[View, ...]:
    """Read a batch and draw its crops, corruption and stochastic depth: its views.

    ``epoch`` None is for held-out images: the whole image (of the views' own aspect), all of the
    encoder, and the same corruption each time.
    """
    pixels = torch.from_numpy(store.images(rows))[:, None]
    # (pixel / white - mean) / std
    scale = 1.0 / (np.iinfo(store.dtype).max * store.std)
    levels = torch.tensor([scale, -store.mean / store.std], dtype=torch.float32)
    scales, shifts = levels[:, None].repeat(1, len(rows))
    pixels = pixels.expand(-1, law.channels, -1, -1)
    return tuple(
        _view(pixels, (scales, shifts), torch.from_numpy(rows), law, epoch, number)
        for number in range(law.corrupted + law.local)
    )


def _view(
    pixels: Tensor,
    levels: tuple[Tensor, Tensor],
    ids: Tensor,
    law: ViewLaw,
    epoch: int | None,
    number: int,
) -> View:
    """The view of this number: a corrupted one first, then local ones."""
    local = number >= law.corrupted
    size = law.local_size if local else law.size
    shape = (pixels.shape[2], pixels.shape[3])
    keys = {"seed": law.seed, "epoch": epoch or 0, "view": number}
    boxes = flip = survivors = fill = None
    if epoch is not None:
        boxes, flip = sample_crops(
            ids,
            **keys,
            scale=law.local_scale if local else law.crop_scale,
            flip_p=law.flip_p,
            ratio=(0.75 * size[1] / size[0], 4 / 3 * size[1] / size[0]),
            source_px=shape,
        )
        if any(law.drop_rates):
            survivors = sample_survivors(ids, law.drop_rates, **keys)
    elif shape[0] * size[1] != shape[1] * size[0]:
        boxes = central_box(shape, size).repeat(len(ids), 1)
    if not local:
        fill = sample_fill(ids, law.corruption, **keys, size=size, patch_px=law.patch_px)
    return View(Views(pixels, boxes, flip, *levels, size, law.patch_px), fill, survivors, _ONE)


_ONE = torch.ones(())


def central_box(source: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The largest central box ``[4]`` float32 of an image that has the aspect of a view.

    >>> central_box((256, 256), (224, 112)).tolist()
    [0.0, 64.0, 256.0, 128.0]
    """
    shrink = min(source[0] / size[0], source[1] / size[1])
    height, width = size[0] * shrink, size[1] * shrink
    return torch.tensor([(source[0] - height) / 2, (source[1] - width) / 2, height, width])


def pinned(drawn: Sequence[View]) -> tuple[View, ...]:
    """The same views in page-locked memory, from which a GPU copies by itself."""
    pixels = drawn[0].views.pixels.contiguous().pin_memory()  # once for all views
    made = []
    for view in drawn:
        scale, shift = view.views.scale.pin_memory(), view.views.shift.pin_memory()
        boxes, flip = _pin(view.views.boxes), _pin(view.views.flip)
        views = view.views._replace(pixels=pixels, boxes=boxes, flip=flip, scale=scale, shift=shift)
        fill = view.fill
        if fill is not None:
            fill = Fill._make((*(tensor.pin_memory() for tensor in fill[:6]), *fill[6:]))
        made.append(View(views, fill, _pin(view.survivors), view.share))
    return tuple(made)


def _pin(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.pin_memory()


def hidden(view: View) -> int:
    """How many patches or pixels of a view are hidden."""
    return 0 if view.fill is None else int(view.fill.mask.sum())


def weigh(views: Sequence[View], shares: Tensor, device: torch.device) -> tuple[View, ...]:
    """The views on a device, with their shares ``[V]`` of the step (`View.share`)."""
    pixels = views[0].views.pixels.to(device, non_blocking=True)  # once for all views
    moved = []
    for number, view in enumerate(views):
        here = view._replace(views=view.views._replace(pixels=pixels)).to(device)
        moved.append(here._replace(share=shares[number]))
    return tuple(moved)
