"""What the student sees: crops, group masks and fills.

Two halves. *Samplers* turn (seed, epoch, image id, view) into parameters; one image's crop, mask,
noise and kind of fill depend on nothing else. *Pure functions* of those parameters change pixels.
The one exception is the partner of an image: it comes from the batch, so it depends on the batch.

The law is GMML's (arXiv 2205.14986); SPCXR's own mask ratio, fill and crop scale are not known, so
GMML's defaults stand in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.models.patches import patch_grid
from spcxr.ops.group_mask import group_mask
from spcxr.ops.philox import fold_in, normal, uniform

FILLS = ("noise", "zeros", "other", "shuffle")
ALIEN = len(FILLS)  # the kind of an image pasted with its partner's blocks
CROP_TRIES = 10


@dataclass(frozen=True)
class Crops:
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


@dataclass(frozen=True)
class Plan:
    """All that corrupting one batch needs; `corrupt` is a pure function of it.

    ``mask [B, H, W]`` bool; ``kind [B]`` int64, an index into `FILLS` or `ALIEN`; ``partner [B]``
    int64, a row of the batch; ``noise [B, C, H, W]`` float32, zero for images of another kind;
    ``source [B, H, W]`` int64, for each pixel the flat pixel `shuffle` reads, or None.
    """

    mask: Tensor
    kind: Tensor
    partner: Tensor
    noise: Tensor
    source: Tensor | None

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on another device."""
        return Plan(
            mask=self.mask.to(device),
            kind=self.kind.to(device),
            partner=self.partner.to(device),
            noise=self.noise.to(device),
            source=None if self.source is None else self.source.to(device),
        )


def sample_plan(
    image_ids: Tensor,
    law: Corruption,
    *,
    seed: int,
    epoch: int,
    view: int = 0,
    shape: tuple[int, int, int],
    patch_px: int,
    device: torch.device | str = "cpu",
) -> Plan:
    """Draw masks, kinds, partners and noise for a batch.

    Where an image has no partner but itself (a batch of one), `other` and pasting become `noise`:
    no pixel is called masked that was not changed.

    Parameters
    ----------
    image_ids
        ``[B]`` int64 on the CPU, where masks are drawn.
    shape
        (C, H, W) of the images as the encoder sees them.
    device
        where the noise is drawn and the plan is returned.

    Raises
    ------
    SpcxrError
        ``align_patches`` with sides that do not divide into patches.

    >>> plan = sample_plan(torch.arange(4), Corruption(), seed=0, epoch=0, shape=(1, 32, 32),
    ...                    patch_px=16)
    >>> plan.mask.shape, plan.noise.shape
    (torch.Size([4, 32, 32]), torch.Size([4, 1, 32, 32]))
    """
    partner, alone = sample_partners(image_ids, seed=seed, epoch=epoch, view=view)
    kind = _sample_kinds(image_ids, law, alone, seed=seed, epoch=epoch, view=view)
    mask = torch.zeros(len(image_ids), *shape[1:], dtype=torch.bool)
    source = torch.zeros(mask.shape, dtype=torch.int64) if "shuffle" in law.fills else None
    unit = patch_px if law.align_patches else 1
    grid = patch_grid(shape[1], shape[2], unit)
    mask_seed = fold_in(seed, view)
    for alien, most in ((False, law.mask_ratio), (True, law.alien_ratio)):
        rows = ((kind == ALIEN) == alien).nonzero()[:, 0]
        ids, ratio = image_ids[rows], (min(0.5, most), most)
        blocks, cells = group_mask(
            ids, seed=mask_seed, epoch=epoch, grid=grid, ratio=ratio, placement=law.placement
        )
        mask[rows] = cells.repeat_interleave(unit, 1).repeat_interleave(unit, 2)
        if source is not None and not alien:
            most_blocks, stream = blocks.shape[1], f"shuffle-{view}"
            places = uniform(ids, 2 * most_blocks, seed=seed, epoch=epoch, stream=stream)
            places = places.view(len(ids), most_blocks, 2)
            source[rows] = shuffle_source(blocks * unit, places, shape[1:])
    noise = torch.zeros(len(image_ids), *shape, device=device)
    noisy = (kind == FILLS.index("noise")).nonzero()[:, 0]
    if len(noisy):
        ids, stream = image_ids[noisy], f"noise-{view}"
        count = math.prod(shape)
        field = normal(ids, count, seed=seed, epoch=epoch, stream=stream, device=device)
        noise[noisy.to(device)] = field.view(-1, *shape)
    return Plan(mask, kind, partner, noise, source).to(device)


def _sample_kinds(
    image_ids: Tensor, law: Corruption, alone: Tensor, *, seed: int, epoch: int, view: int
) -> Tensor:
    """Fill or pasting, each with the same probability: ``[B]`` int64, indices into `FILLS`."""
    kinds = [FILLS.index(fill) for fill in law.fills] + ([ALIEN] if law.alien_ratio > 0 else [])
    draw = uniform(image_ids, 1, seed=seed, epoch=epoch, stream=f"kind-{view}")[:, 0]
    kind = torch.tensor(kinds)[(draw * len(kinds)).long().clamp(max=len(kinds) - 1)]
    needs_partner = (kind == ALIEN) | (kind == FILLS.index("other"))
    return torch.where(needs_partner & alone, FILLS.index("noise"), kind)


def sample_partners(
    image_ids: Tensor, *, seed: int, epoch: int, view: int = 0
) -> tuple[Tensor, Tensor]:
    """A partner for each image of the batch: rows ``[B]`` int64, and ``alone [B]`` bool.

    A permutation without fixed point: the images stand in a random circle and each takes the next.
    An id that stands in the batch more than once is never its own partner either; ``alone`` marks
    images for which that cannot be had.

    >>> partner, alone = sample_partners(torch.tensor([7, 3, 9]), seed=0, epoch=0)
    >>> sorted(partner.tolist()), bool((partner == torch.arange(3)).any()), alone.tolist()
    ([0, 1, 2], False, [False, False, False])
    """
    if len(image_ids) == 0:
        return image_ids.clone(), torch.zeros(0, dtype=torch.bool)
    keys = uniform(image_ids, 1, seed=seed, epoch=epoch, stream=f"partner-{view}")[:, 0]
    # Equal ids stand together (equal keys), so stepping past the most frequent leaves them all.
    step = int(torch.unique(image_ids, return_counts=True)[1].max())
    circle = torch.argsort(keys, stable=True)
    partner = torch.empty_like(circle)
    partner[circle] = circle.roll(-step)
    return partner, image_ids[partner] == image_ids


def shuffle_source(blocks: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """For each pixel, the flat index of the pixel `shuffle` reads: ``[B, H, W]`` int64.

    Each rectangle reads a rectangle of its size from elsewhere in the image, never from its own
    rows; where rectangles overlap the last one counts. Pixels outside all rectangles read
    themselves.

    Parameters
    ----------
    blocks
        ``[B, K, 4]`` (top, left, height, width) in pixels, lower than the image; height 0 pads
        at the end.
    places
        ``[B, K, 2]`` uniform in [0, 1): where each rectangle reads.
    size
        (H, W).
    """
    height, width = size
    top, left, tall, wide = blocks.long().unbind(-1)
    down, right = (height - tall).clamp(min=0), (width - wide).clamp(min=0)
    # One row down and 0 .. down - 1 more, around: any row of corners but the rectangle's own.
    from_top = (top + 1 + (places[..., 0] * down).long()) % (down + 1)
    from_left = (places[..., 1] * (right + 1)).long().clamp(max=width - 1)
    own = np.arange(height * width).reshape(height, width)
    source = np.repeat(own[None], len(blocks), 0)
    images, numbers = (tall > 0).nonzero(as_tuple=True)
    table = torch.stack([top, left, tall, wide, from_top, from_left], -1)[images, numbers]
    # Slices in numpy: a rectangle costs its own pixels only, and later ones cover earlier ones.
    for b, (t, l, h, w, row, column) in zip(images.tolist(), table.tolist(), strict=True):
        source[b, t : t + h, l : l + w] = own[row : row + h, column : column + w]
    return torch.from_numpy(source)


def corrupt(clean: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Apply a plan: the corrupted images, and the mask of the pixels that were replaced.

    Parameters
    ----------
    clean
        ``[B, C, H, W]`` float, normalised (zero = the data's mean).
    plan
        on the same device.

    Returns
    -------
    ``[B, C, H, W]`` of the same dtype, and ``mask [B, H, W]`` bool (True = corrupted).

    >>> plan = sample_plan(torch.arange(2), Corruption(fills=("zeros",), alien_ratio=0), seed=0,
    ...                    epoch=0, shape=(1, 32, 32), patch_px=16)
    >>> corrupted, mask = corrupt(torch.ones(2, 1, 32, 32), plan)
    >>> bool((corrupted[:, 0][mask] == 0).all()), bool((corrupted[:, 0][~mask] == 1).all())
    (True, True)
    """
    if clean.shape != plan.noise.shape:
        raise SpcxrError(
            f"images of shape {tuple(clean.shape)} and a plan for {tuple(plan.noise.shape)}; "
            "sample the plan for these images"
        )
    kind = plan.kind[:, None, None, None]
    foreign = (kind == ALIEN) | (kind == FILLS.index("other"))
    # Noise is zero for other kinds, so it also serves `zeros`.
    fill = torch.where(foreign, clean[plan.partner], plan.noise.to(clean.dtype))
    if plan.source is not None:
        flat = plan.source.flatten(1)[:, None].expand(-1, clean.shape[1], -1)
        moved = clean.flatten(2).gather(2, flat).view_as(clean)
        fill = torch.where(kind == FILLS.index("shuffle"), moved, fill)
    return torch.where(plan.mask[:, None], fill, clean), plan.mask
