"""Crop and resample a whole batch at once: exact antialiased bilinear, as Pillow's.

Each axis is one small matrix per image (triangle filter, stretched by the ratio when shrinking,
clipped at the image's border and normalised), so the batch is two batched matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops.checks import traced, values_seen

PIXEL_TYPES = (torch.uint8, torch.uint16, torch.float32)


def crop_resize(
    images: Tensor, boxes: Tensor | None, flip: Tensor | None, size: tuple[int, int]
) -> Tensor:
    """Resample one box of each image to ``size``; mirror it left-right where ``flip``.

    Equals Pillow's ``resize(size, BILINEAR, box=...)`` up to Pillow's rounding to whole grey
    levels; like Pillow, the filter may read pixels just outside the box, never outside the image.
    A box that is the whole image at its own size returns the pixels unchanged. A float that is not
    finite makes those pixels of the result not finite whose filter it has a weight in, no others.

    Parameters
    ----------
    images
        ``[B, C, H, W]`` uint8, uint16 or float32.
    boxes
        ``[B, 4]`` float: top, left, height, width in source pixels, inside the image.
        Boxes are checked on the device they are on: CPU boxes spare a GPU the wait. None: the
        whole image.
    flip
        ``[B]`` bool. None: none.
    size
        (height, width) of the result in pixels.

    Returns
    -------
    ``[B, C, h, w]`` float32 in the source's grey levels, on the images' device.

    Raises
    ------
    SpcxrError
        shapes or dtypes that do not fit, or a box that is empty, not finite or outside its image.

    >>> images = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)
    >>> box, no = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([False])
    >>> crop_resize(images, box, no, (2, 2))
    tensor([[[[ 3.5714,  5.1429], [ 9.8571, 11.4286]]]])
    """
    if boxes is None:
        boxes = torch.tensor([[0.0, 0.0, *images.shape[2:]]]).expand(len(images), 4)
    if flip is None:
        flip = torch.zeros(len(images), dtype=torch.bool)
    _check(images, boxes, flip, size)
    height, width = images.shape[2:]
    boxes = boxes.to(images.device, torch.float32)
    flip = flip.to(images.device)
    rows = _weights(boxes[:, 0], boxes[:, 2], height, size[0], torch.zeros_like(flip))
    columns = _weights(boxes[:, 1], boxes[:, 3], width, size[1], flip)
    grey = images.to(torch.float32)
    wild = ~grey.isfinite()
    if not images.is_floating_point() or (values_seen(images) and not bool(wild.any())):
        return _product(rows, grey, columns)
    # A matrix product would spread them over the whole image: 0 times NaN is NaN.
    touched = _product(rows, wild.float(), columns) > 0
    made = _product(rows, grey.masked_fill(wild, 0), columns)
    return made.masked_fill(touched, float("nan"))


def _product(rows: Tensor, grey: Tensor, columns: Tensor) -> Tensor:
    with torch.autocast(grey.device.type, enabled=False):  # bfloat16 would lose grey levels
        return torch.matmul(rows[:, None], torch.matmul(grey, columns.transpose(1, 2)[:, None]))


def _weights(start: Tensor, extent: Tensor, source: int, out: int, flip: Tensor) -> Tensor:
    """The filter of one axis: ``[B, out, source]``, each row sums to 1."""
    step = (extent / out)[:, None, None]
    index = torch.arange(out, device=start.device, dtype=torch.float32)[None, :, None]
    index = torch.where(flip[:, None, None], out - 1 - index, index)
    centre = start[:, None, None] + (index + 0.5) * step
    pixel = torch.arange(source, device=start.device, dtype=torch.float32) + 0.5
    weights = (1.0 - (pixel - centre).abs() / step.clamp(min=1.0)).clamp_(min=0.0)
    return weights / weights.sum(-1, keepdim=True)


def _check(images: Tensor, boxes: Tensor, flip: Tensor, size: tuple[int, int]) -> None:
    """Refuse what cannot be resampled, naming the first image at fault."""
    if images.ndim != 4 or images.dtype not in PIXEL_TYPES:
        raise SpcxrError(
            f"images are {tuple(images.shape)} {images.dtype}; "
            "give [B, C, H, W] of uint8, uint16 or float32"
        )
    batch = images.shape[0]
    if boxes.shape != (batch, 4) or flip.shape != (batch,) or flip.dtype != torch.bool:
        raise SpcxrError(
            f"boxes {tuple(boxes.shape)} and flip {tuple(flip.shape)} {flip.dtype} for {batch} "
            "images; give [B, 4] and [B] bool"
        )
    if min(size) < 1:
        raise SpcxrError(f"size is {size}; both sides must be at least 1 px")
    if not traced(boxes):
        check_boxes(boxes, (images.shape[2], images.shape[3]))


def check_boxes(boxes: Tensor, source_px: tuple[int, int]) -> None:
    """Refuse boxes ``[B, 4]`` that are empty, not finite or outside images of ``source_px``.

    >>> check_boxes(torch.tensor([[0.0, 0.0, 5.0, 4.0]]), (4, 4))
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: box 0 (top, left, height, width) = [0.0, 0.0, 5.0, 4.0] is empty, ...
    """
    limits = torch.tensor(source_px, device=boxes.device)
    first, extent = boxes[:, :2], boxes[:, 2:]
    # 1e-3 px: what float32 may add when a sampler computes top + height for a box at the border.
    fits = (first >= -1e-3) & (extent > 0) & (first + extent <= limits + 1e-3)
    wrong = (~fits).any(1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise SpcxrError(
            f"box {row} (top, left, height, width) = {[round(v, 3) for v in boxes[row].tolist()]} "
            f"is empty, not finite or outside its image of {source_px[0]}x{source_px[1]} px"
        )
