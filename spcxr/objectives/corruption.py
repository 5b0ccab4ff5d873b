"""What the student sees: crops, group masks and fills.

*Samplers* turn (seed, epoch, image id, view) into parameters; one image's crop, mask, noise, kind
of fill and stochastic depth depend on nothing else. The one exception is the partner of an image:
it is its neighbour in the step (`pair_up`). `ops.masked_patch_gather` is the pure function that
changes pixels by them.

The law is GMML's (arXiv 2205.14986); SPCXR's own mask ratio, fill and crop scale are not known, so
GMML's defaults stand in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops.group_mask import group_mask
from spcxr.ops.patches import patch_grid
from spcxr.ops.philox import fold_in, uniform
from spcxr.ops.views import FILLS, Fill

PASTED = len(FILLS)  # drawn as a kind of its own; it is `other` at a ratio of its own
CROP_TRIES = 10


class Crops(NamedTuple):
    """Boxes ``[B, 4]`` float32 (top, left, height, width; source px) and ``flip [B]`` bool."""

    boxes: Tensor
    flip: Tensor


def sample_crops(
    image_ids: Tensor,
    *,
    seed: int,
    epoch: int,
    view: int = 0,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip_p: float = 0.5,
    source_px: tuple[int, int] | int,
) -> Crops:
    """Random resized crops: an area ``U(scale)`` of the image, a log-uniform width / height.

    Inception's law as in torchvision: ten tries, then the largest central box of an allowed ratio;
    the boxes are not rounded to whole pixels.

    Parameters
    ----------
    image_ids
        ``[B]`` int64.
    view
        number of the view; each has its own crop.
    source_px
        sides (height, width) of the source images, or one side of squares.

    Raises
    ------
    SpcxrError
        ranges that are empty or out of bounds.

    >>> crops = sample_crops(torch.arange(4), seed=0, epoch=0, source_px=256)
    >>> crops.boxes.shape, bool((crops.boxes[:, :2] + crops.boxes[:, 2:] <= 256).all())
    (torch.Size([4, 4]), True)
    """
    if not (0 < scale[0] <= scale[1] <= 1 and 0 < ratio[0] <= ratio[1] and 0 <= flip_p <= 1):
        raise SpcxrError(
            f"crop scale {scale}, ratio {ratio}, flip {flip_p}; give 0 < low <= high "
            "(scale at most 1) and a probability"
        )
    height, width = (source_px, source_px) if isinstance(source_px, int) else source_px
    count = 2 * CROP_TRIES + 3
    draws = uniform(image_ids, count, seed=seed, epoch=epoch, stream=f"crop-{view}").double()
    tries = draws[:, : 2 * CROP_TRIES].view(-1, CROP_TRIES, 2)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = torch.exp(low + (high - low) * tries[..., 1])
    sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], -1)
    limits = torch.tensor([height, width], dtype=torch.float64, device=sides.device)
    fits = (sides <= limits).all(-1)
    aspect_last = min(max(width / height, ratio[0]), ratio[1])
    last = limits.new_tensor([min(height, width / aspect_last), min(width, height * aspect_last)])
    first = fits.int().argmax(1)
    chosen = sides[torch.arange(len(sides), device=sides.device), first]
    chosen = torch.where(fits.any(1, keepdim=True), chosen, last)
    place = torch.where(fits.any(1, keepdim=True), draws[:, -3:-1], draws.new_tensor(0.5))
    boxes = torch.cat([place * (limits - chosen), chosen], 1).float()
    # The float32 sum top + height must not pass the border by a rounding.
    boxes[:, 2:] = torch.minimum(boxes[:, 2:], limits.float() - boxes[:, :2])
    return Crops(boxes, draws[:, -1] < flip_p)


@dataclass(frozen=True)
class Corruption:
    """The law of corruption, GMML's either/or per image.

    With probability 1 / (n_fills + 1) an image is pasted with blocks of its partner at
    ``alien_ratio``; otherwise groups at ``mask_ratio`` are filled, each fill equally often.

    ``align_patches`` masks whole patches instead of pixel rectangles (the ancestors' default is
    pixels). ``alien_ratio`` 0 switches pasting off.

    >>> Corruption(fills=("fog",))
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: no fill 'fog'; choose from: noise, zeros, other, shuffle
    """

    mask_ratio: float = 0.75  # the most that is hidden; an image's target is U(min(.5, m), m)
    alien_ratio: float = 0.3
    fills: tuple[str, ...] = ("noise",)
    placement: str = "uniform"
    align_patches: bool = False

    def __post_init__(self) -> None:
        for fill in self.fills:
            if fill not in FILLS:
                raise SpcxrError(f"no fill {fill!r}; choose from: {', '.join(FILLS)}")
        if not self.fills or not 0 < self.mask_ratio <= 1 or not 0 <= self.alien_ratio <= 1:
            raise SpcxrError(
                f"mask_ratio {self.mask_ratio}, alien_ratio {self.alien_ratio}, fills "
                f"{self.fills}; give ratios in (0, 1] (alien_ratio may be 0) and one fill or more"
            )


def sample_fill(
    image_ids: Tensor,
    law: Corruption,
    *,
    seed: int,
    epoch: int,
    view: int = 0,
    size: tuple[int, int],
    patch_px: int,
) -> Fill:
    """Draw masks, kinds, partners and rectangles for a batch: what `masked_patch_gather` applies.

    The mask is of patches where the law aligns it to them, of pixels otherwise. Where an image has
    no partner but itself (a batch of one), `other` and pasting become `noise`, and so does
    `shuffle` where a group is the whole view: no pixel is called hidden that stays what it was
    (`shuffle` shows other pixels of the image, which may look alike).

    Parameters
    ----------
    image_ids
        ``[B]`` int64 on the CPU, where all is drawn but the noise.
    size
        (height, width) of the views in pixels.

    Raises
    ------
    SpcxrError
        ``align_patches`` with sides that do not divide into patches.

    >>> fill = sample_fill(torch.arange(4), Corruption(), seed=0, epoch=0, size=(32, 48),
    ...                    patch_px=16)
    >>> fill.mask.shape, fill.blocks.shape
    (torch.Size([4, 32, 48]), torch.Size([4, 0, 4]))
    """
    partner, alone = pair_up(image_ids)
    kind, pasted = _sample_kinds(image_ids, law, alone, seed=seed, epoch=epoch, view=view)
    unit = patch_px if law.align_patches else 1
    grid = patch_grid(size[0], size[1], unit)
    mask = torch.empty(len(image_ids), *grid, dtype=torch.bool)  # each row is one of the two kinds
    mask_seed, found = fold_in(seed, view), []
    for alien, most in ((False, law.mask_ratio), (True, law.alien_ratio)):
        rows = (pasted == alien).nonzero()[:, 0]
        blocks, drawn = group_mask(
            image_ids[rows],
            seed=mask_seed,
            epoch=epoch,
            grid=grid,
            ratio=(min(0.5, most), most),
            placement=law.placement,
        )
        if len(rows) == len(mask):
            mask = drawn  # a copy of masks costs a tenth of all that is drawn
        else:
            mask[rows] = drawn
        # Rectangles are of use to `shuffle` alone, which pasted images never are.
        found.append((rows, blocks * unit if "shuffle" in law.fills else blocks[:, :0]))
    rows, drawn = found[0]
    blocks = torch.zeros(len(image_ids), drawn.shape[1], 4, dtype=torch.int32)
    blocks[rows] = drawn
    places = uniform(
        image_ids, 2 * drawn.shape[1], seed=seed, epoch=epoch, stream=f"shuffle-{view}"
    )
    sources = shuffle_sources(blocks, places.view(len(image_ids), drawn.shape[1], 2), size)
    whole = (blocks[..., 2:] == torch.tensor(size)).all(-1).any(1)
    stuck = whole & (kind == FILLS.index("shuffle"))  # such a block has nowhere else to read
    kind[stuck] = FILLS.index("noise")
    return Fill(mask, kind, partner, blocks, sources, image_ids, seed, epoch, view)


def _sample_kinds(
    image_ids: Tensor, law: Corruption, alone: Tensor, *, seed: int, epoch: int, view: int
) -> tuple[Tensor, Tensor]:
    """Fill or pasting, each with the same probability: numbers of `FILLS` ``[B]`` int32, and
    ``pasted [B]`` bool, whose kind is `other`."""
    kinds = [FILLS.index(fill) for fill in law.fills] + ([PASTED] if law.alien_ratio > 0 else [])
    draw = uniform(image_ids, 1, seed=seed, epoch=epoch, stream=f"kind-{view}")[:, 0]
    kind = torch.tensor(kinds)[(draw * len(kinds)).long().clamp(max=len(kinds) - 1)]
    pasted = (kind == PASTED) & ~alone
    other, noise = FILLS.index("other"), FILLS.index("noise")
    kind = torch.where(kind == PASTED, other, kind)
    return torch.where((kind == other) & alone, noise, kind).int(), pasted


def pair_up(image_ids: Tensor) -> tuple[Tensor, Tensor]:
    """A partner for each image of a batch: rows ``[B]`` int64, and ``alone [B]`` bool.

    Neighbours are each other's partners; the last three of an odd batch stand in a circle. A step's
    images come in random order, so partners are random too, and they are the same ones however an
    even number of images is divided over processes. ``alone`` marks images whose partner would be
    themselves: in a batch of one, or where the same id stands twice.

    >>> partner, alone = pair_up(torch.tensor([7, 3, 9, 4, 8]))
    >>> partner.tolist(), bool(alone.any())
    ([1, 0, 3, 4, 2], False)
    """
    count = len(image_ids)
    partner = torch.arange(count) ^ 1
    if count % 2:
        partner[-1] = max(count - 3, 0)
        partner[-2:-1] = count - 1
    return partner, image_ids[partner] == image_ids


def sample_survivors(
    image_ids: Tensor, drop_rates: Sequence[float], *, seed: int, epoch: int, view: int = 0
) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): what each residual branch counts, ``[B, depth, 2]``.

    0 where it is dropped, ``1 / (1 - rate)`` where it is kept, for attention and MLP of each block.

    Parameters
    ----------
    image_ids
        ``[B]`` int64.
    drop_rates
        each block's probability of being dropped, in [0, 1).

    >>> sample_survivors(torch.arange(2), (0.0, 0.5), seed=0, epoch=0).shape
    torch.Size([2, 2, 2])
    """
    draws = uniform(image_ids, 2 * len(drop_rates), seed=seed, epoch=epoch, stream=f"depth-{view}")
    rates = torch.tensor(drop_rates)[:, None]
    return (draws.view(len(image_ids), -1, 2) >= rates) / (1.0 - rates)


def shuffle_sources(blocks: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Where each rectangle of `shuffle` reads: never where it stands.

    Other rows of the view; a rectangle as high as the view reads other columns. One that is the
    whole view can only read itself, which `sample_fill` never asks for.

    Parameters
    ----------
    blocks
        ``[B, K, 4]`` int32 (top, left, height, width) in pixels, inside the image.
    places
        ``[B, K, 2]`` uniform in [0, 1).
    size
        (height, width) of the image.

    Returns
    -------
    ``[B, K, 2]`` int32 (top, left).

    >>> shuffle_sources(torch.tensor([[[2, 0, 2, 3]]]), torch.tensor([[[0.0, 0.9]]]), (4, 4))
    tensor([[[0, 1]]], dtype=torch.int32)
    """
    top, left, tall, wide = blocks.long().unbind(-1)
    down, right = (size[0] - tall).clamp(min=0), (size[1] - wide).clamp(min=0)
    # One row down and 0 .. down - 1 more, around: any row of corners but the rectangle's own.
    from_top = (top + 1 + (places[..., 0] * down).long()) % (down + 1)
    from_left = torch.minimum((places[..., 1] * (right + 1)).long(), right)
    beside = (left + 1 + (places[..., 1] * right).long()) % (right + 1)
    from_left = torch.where(down == 0, beside, from_left)
    return torch.stack([from_top, from_left], -1).int()
