"""Views of images: which box, at which size, in which patches; and what hides parts of them.

The parameters that `masked_patch_gather` and `masked_reconstruction_loss` share, checked in one
place, and the plain-torch formulas that every backend must equal. The arithmetic of one pixel is
that of ``csrc/core/views.h``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops import philox
from spcxr.ops.checks import traced, values_seen
from spcxr.ops.crop_resize import PIXEL_TYPES, check_boxes, crop_resize

FILLS = ("noise", "zeros", "other", "shuffle")  # by number: FillKind of csrc/core/views.h
TOKEN_TYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SIDE, MAX_PATCH = 1 << 15, 256  # of csrc/core/patch_checks.h


class Views(NamedTuple):
    """A batch of images as stored, and how each becomes a view.

    Parameters
    ----------
    pixels
        ``[B, C, H, W]`` uint8, uint16 or float32, 1 or 3 channels. The pixels of a row lie side by
        side; rows, channels and images may be strided. A float that is not finite makes those
        pixels of a view not finite whose filter it has a weight in, and no others.
    boxes
        ``[B, 4]`` float32: top, left, height, width in source pixels, inside the image. None: the
        whole image.
    flip
        ``[B]`` bool, left-right. None: none.
    scale, shift
        ``[B]`` float32: value = grey level * scale + shift.
    size
        (height, width) of a view in pixels, at most 32768.
    patch_px
        side of a patch, at most 256; divides both.

    >>> views = whole_views(torch.zeros(2, 1, 32, 48, dtype=torch.uint8), patch_px=16)
    >>> views.size, views.grid, views.row_length
    ((32, 48), (2, 3), 256)
    """

    pixels: Tensor
    boxes: Tensor | None
    flip: Tensor | None
    scale: Tensor
    shift: Tensor
    size: tuple[int, int]
    patch_px: int

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (down, across)."""
        return self.size[0] // self.patch_px, self.size[1] // self.patch_px

    @property
    def row_length(self) -> int:
        """Elements of a patch row: C * P * P, in (channel, row, column) order."""
        return self.pixels.shape[1] * self.patch_px**2

    @property
    def words(self) -> tuple[Any, ...]:
        """The arguments of an op, in the order of its schema; all but the pixels contiguous."""
        small = (t if t is None else t.contiguous() for t in self[1:5])
        return (self.pixels, *small, list(self.size), self.patch_px)

    @classmethod
    def of_words(cls, words: Sequence[Any]) -> Views:
        """`words` undone."""
        height, width = words[5]
        return cls._make((*words[:5], (height, width), words[6]))

    def to(self, device: torch.device | str) -> Views:
        """The same on another device; one byte (or two) a pixel crosses over."""
        moved = [t if t is None else t.to(device, non_blocking=True) for t in self[:5]]
        return Views.of_words((*moved, *self[5:]))


class Fill(NamedTuple):
    """What hides parts of the views, and with what they are filled.

    Parameters
    ----------
    mask
        ``[B, h, w]`` (pixels) or ``[B, Gh, Gw]`` (patches) bool, True = hidden.
    kind
        ``[B]`` int32, a number of `FILLS`.
    partner
        ``[B]`` int64: the row whose view fills an image of kind `other`; never its own.
    blocks, sources
        for `shuffle`: ``[B, K, 4]`` int32 rectangles (top, left, height, width in view pixels;
        height 0 pads) and ``[B, K, 2]`` int32, the corner of the rectangle that fills each. Where
        blocks overlap the last one counts. K is 0 where no image shuffles.
    image_ids
        ``[B]`` int64, key of the noise together with ``seed``, ``epoch`` and ``view``.
    """

    mask: Tensor
    kind: Tensor
    partner: Tensor
    blocks: Tensor
    sources: Tensor
    image_ids: Tensor
    seed: int
    epoch: int
    view: int

    @property
    def words(self) -> tuple[Any, ...]:
        """The arguments of an op, in the order of its schema; all tensors contiguous."""
        return (*(t.contiguous() for t in self[:6]), *self[6:])

    def to(self, device: torch.device | str) -> Fill:
        """The same on another device."""
        moved = [t.to(device, non_blocking=True) for t in self[:6]]
        return Fill._make((*moved, *self[6:]))


def whole_views(pixels: Tensor, *, patch_px: int, scale: float = 1.0, shift: float = 0.0) -> Views:
    """Whole images at their own size, all scaled alike.

    >>> whole_views(torch.zeros(1, 1, 16, 16), patch_px=8).boxes is None
    True
    """
    count = pixels.new_full((len(pixels),), 0, dtype=torch.float32)
    size = (pixels.shape[2], pixels.shape[3])
    return Views(pixels, None, None, count + scale, count + shift, size, patch_px)


# How a schema begins that takes `Views.words`: SPCXR_VIEWS of csrc/torch_ops.cpp.
SCHEMA = (
    "Tensor pixels, Tensor? boxes, Tensor? flip, Tensor scale, Tensor shift, int[] size, int patch"
)


# --- checks ---------------------------------------------------------------------------------


def check_views(views: Views) -> None:
    """Refuse views that cannot be computed. Values are read on the CPU alone: a GPU is not waited
    for, and its kernels stay inside the image whatever the boxes hold.

    Raises
    ------
    SpcxrError
        shapes, dtypes, devices, sizes or boxes that do not fit, named.
    """
    pixels = views.pixels
    if pixels.ndim != 4 or pixels.dtype not in PIXEL_TYPES or pixels.shape[1] not in (1, 3):
        raise SpcxrError(
            f"images are {tuple(pixels.shape)} {pixels.dtype}; "
            "give [B, 1 or 3, H, W] of uint8, uint16 or float32"
        )
    if pixels.requires_grad:
        raise SpcxrError("images require a gradient, but none flows into pixels; detach them")
    if pixels.numel() and pixels.shape[3] != 1 and pixels.stride(3) != 1:
        raise SpcxrError("the pixels of a row must lie side by side; call .contiguous()")
    height, width, patch = *views.size, views.patch_px
    if patch < 1 or min(height, width) < patch or height % patch or width % patch:
        raise SpcxrError(
            f"views of {height}x{width} px do not divide into patches of {patch} px; "
            f"choose sides that are multiples of {patch}"
        )
    _check_sides(views)
    batch, device = pixels.shape[0], pixels.device
    for name, value in (("scale", views.scale), ("shift", views.shift)):
        _expect(name, value, (batch,), torch.float32, device)
    if views.flip is not None:
        _expect("flip", views.flip, (batch,), torch.bool, device)
    if views.boxes is not None:
        _expect("boxes", views.boxes, (batch, 4), torch.float32, device)
        if values_seen(views.boxes):
            check_boxes(views.boxes, (pixels.shape[2], pixels.shape[3]))
    if values_seen(views.scale, views.shift):
        _check_finite(views.scale, views.shift)


def _check_finite(scale: Tensor, shift: Tensor) -> None:
    # A sum is not finite where one number is not: two calls, as a small batch feels each.
    if math.isfinite(scale.detach().sum()) and math.isfinite(shift.detach().sum()):
        return
    for name, value in (("scale", scale), ("shift", shift)):
        for row in (~value.isfinite()).nonzero()[:1, 0].tolist():
            raise SpcxrError(f"{name} of image {row} is {float(value[row])}; give finite numbers")


def _check_sides(views: Views) -> None:
    if traced(views.pixels):  # a comparison would tie a dynamic shape to it
        return
    sides = (*views.pixels.shape[2:], *views.size)
    if min(sides) < 1 or max(sides) > MAX_SIDE or views.patch_px > MAX_PATCH:
        raise SpcxrError(
            f"images of {sides[0]}x{sides[1]} px, views of {sides[2]}x{sides[3]} px, patches of "
            f"{views.patch_px} px; give sides of 1 to {MAX_SIDE} px, patches of at most {MAX_PATCH}"
        )


def check_mask(views: Views, mask: Tensor, *, patches_only: bool = False) -> None:
    """Refuse a mask that is neither one of patches nor one of pixels.

    Raises
    ------
    SpcxrError
        a mask of another grid, dtype or device.
    """
    batch, device = views.pixels.shape[0], views.pixels.device
    grids = [views.grid] if patches_only else [views.grid, views.size]
    fits = any(tuple(mask.shape) == (batch, *grid) for grid in grids)
    if fits and mask.dtype == torch.bool and mask.device == device:
        return
    wanted = " or ".join(f"[{batch}, {grid[0]}, {grid[1]}]" for grid in grids)
    raise SpcxrError(
        f"the mask is {tuple(mask.shape)} {mask.dtype} on {mask.device}; "
        f"give {wanted} bool on {device}"
    )


def check_fill(views: Views, fill: Fill) -> None:
    """Refuse a fill that does not fit the views.

    Raises
    ------
    SpcxrError
        shapes, dtypes, devices, or (on the CPU) numbers out of range.
    """
    check_mask(views, fill.mask)
    batch, device = views.pixels.shape[0], views.pixels.device
    count = fill.blocks.shape[1] if fill.blocks.ndim == 3 else 0
    _expect("kind", fill.kind, (batch,), torch.int32, device)
    _expect("partner", fill.partner, (batch,), torch.int64, device)
    _expect("blocks", fill.blocks, (batch, count, 4), torch.int32, device)
    _expect("sources", fill.sources, (batch, count, 2), torch.int32, device)
    _expect("image_ids", fill.image_ids, (batch,), torch.int64, device)
    philox.check_key(fill.seed, fill.epoch)
    if not 0 <= fill.view < philox.MAX_VIEWS:
        raise SpcxrError(f"view {fill.view}; views are numbered 0 to {philox.MAX_VIEWS - 1}")
    if not values_seen(*fill[:6]) or batch == 0:
        return
    philox.check_ids(fill.image_ids)
    if not 0 <= int(fill.kind.min()) <= int(fill.kind.max()) < len(FILLS):
        raise SpcxrError(f"kind must be 0 to {len(FILLS) - 1}: {', '.join(FILLS)}")
    if not 0 <= int(fill.partner.min()) <= int(fill.partner.max()) < batch:
        raise SpcxrError(f"partner must be rows of the batch, 0 to {batch - 1}")
    selfish = (fill.partner == torch.arange(batch)) & (fill.kind == FILLS.index("other"))
    if selfish.any():
        raise SpcxrError(
            f"image {int(selfish.nonzero()[0])} is its own partner: nothing would be hidden"
        )
    _check_blocks(views, fill)


def _check_blocks(views: Views, fill: Fill) -> None:
    used = fill.blocks[..., 2] != 0
    blocks, sources = fill.blocks[used].long(), fill.sources[used].long()  # sums beyond int32
    limits = torch.tensor(views.size)
    if bool((blocks[:, 2:] < 0).any()):
        raise SpcxrError("a block of shuffle has a negative side; height 0 pads the list")
    for name, corner in (("block", blocks[:, :2]), ("source", sources)):
        if bool((corner < 0).any()) or bool((corner + blocks[:, 2:] > limits).any()):
            raise SpcxrError(f"a {name} rectangle of shuffle leaves its view of {views.size} px")


def _expect(
    name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tuple(value.shape) != shape or value.dtype != dtype or value.device != device:
        raise SpcxrError(
            f"{name} is {tuple(value.shape)} {value.dtype} on {value.device}; "
            f"give {list(shape)} {dtype} on {device}"
        )


# --- the formulas ---------------------------------------------------------------------------


def clean_images(views: Views) -> Tensor:
    """The views themselves, ``[B, C, h, w]`` float32, scaled and shifted.

    >>> images = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    >>> clean_images(whole_views(images, patch_px=2, scale=1 / 255)).unique()
    tensor([1.])
    """
    pixels, boxes, flip = views[:3]
    if boxes is None and flip is None and tuple(pixels.shape[2:]) == tuple(views.size):
        grey = pixels.float()
    else:
        grey = crop_resize(pixels, boxes, flip, views.size)
    return grey * views.scale[:, None, None, None] + views.shift[:, None, None, None]


def pixel_mask(views: Views, mask: Tensor) -> Tensor:
    """A mask of patches or of pixels as one of pixels, ``[B, h, w]``."""
    unit = views.size[0] // mask.shape[1]
    return mask.repeat_interleave(unit, 1).repeat_interleave(unit, 2)


def shuffled(clean: Tensor, blocks: Tensor, sources: Tensor) -> Tensor:
    """Images ``[B, C, h, w]`` whose blocks show their sources; the last of overlapping ones counts.

    >>> image = torch.arange(9.0).view(1, 1, 3, 3)
    >>> block, source = torch.tensor([[[0, 0, 1, 3]]]), torch.tensor([[[2, 0]]])
    >>> shuffled(image, block, source)[0, 0, 0]
    tensor([6., 7., 8.])
    """
    moved = clean.clone()
    used = blocks[..., 2] > 0
    rows = used.nonzero()[:, 0].tolist()
    table = torch.cat([blocks[used], sources[used]], 1).tolist()
    for b, (top, left, tall, wide, down, right) in zip(rows, table, strict=True):
        moved[b, :, top : top + tall, left : left + wide] = clean[
            b, :, down : down + tall, right : right + wide
        ]
    return moved
