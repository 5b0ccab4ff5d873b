"""Augmentation for fine-tuning: one small warp for an image and its mask, and a change of light.

Sample at the rim, then apply: `plan` turns uniform draws into warps, the rest are pure functions
of them. The draws come from the caller, who takes them by (seed, epoch, image id).

What is left out, and why: solarising and colour do nothing or harm on radiographs, and a mirror
image moves the heart to the right, so flips are off unless asked for. The crop keeps its aspect,
since proportions (the heart's width over the thorax's) are what is read from the picture: so
stretching and elastic deformation, which change them, are off too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.errors import SpcxrError

KNOTS = 5  # a side: control points of an elastic deformation
DRAWS = 9 + 2 * KNOTS**2  # uniform numbers a plan takes for each image
TAIL = 1e-4  # of the normal distribution: no point is moved by more than 3.7 deviations
IGNORE = 255  # a mask pixel of which nothing is known


@dataclass(frozen=True)
class Augmentation:
    """How far images may be changed. All at rest: ``Augmentation((1, 1), 0, 0, 0, 0)``.

    Parameters
    ----------
    crop_scale
        smallest and largest share of the image's area that is kept.
    rotation_deg
        largest rotation to either side, in degrees.
    brightness
        largest shift, as a share of the grey range.
    contrast
        largest relative change of the spread about the image's mean.
    flip_p
        probability of a mirror image.
    stretch
        largest relative change of the width, and of the height, each by itself: proportions too.
    elastic
        standard deviation of the displacements of `KNOTS` x `KNOTS` points, as a share of the
        image's side; between the points bicubic (Ronneberger et al., 2015, section 3.1).

    >>> Augmentation(crop_scale=(0.0, 1.0))
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: crop_scale is (0.0, 1.0); give 0 < low <= high <= 1, as in 0.7,1
    """

    crop_scale: tuple[float, float] = (0.7, 1.0)
    rotation_deg: float = 7.0
    brightness: float = 0.1
    contrast: float = 0.1
    flip_p: float = 0.0
    stretch: float = 0.0
    elastic: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise SpcxrError(
                f"crop_scale is {self.crop_scale}; give 0 < low <= high <= 1, as in 0.7,1"
            )


@dataclass(frozen=True)
class Warps:
    """``theta [B, 2, 3]`` output -> input in `affine_grid`'s coordinates; ``gain, shift [B]``;
    ``bend [B, 2, KNOTS, KNOTS]`` displacements (x, y) in the output, before theta; None: none."""

    theta: Tensor
    gain: Tensor
    shift: Tensor
    bend: Tensor | None = None


def plan(draws: Tensor, law: Augmentation) -> Warps:
    """Uniform draws ``[B, DRAWS]`` in [0, 1) -> the warp and the light of each image.

    >>> still = plan(torch.rand(2, DRAWS), Augmentation((1.0, 1.0), 0, 0, 0, 0))
    >>> torch.equal(still.theta[0], torch.eye(2, 3)), still.gain.tolist()
    (True, [1.0, 1.0])
    """
    draws = draws.float()
    area, x, y, angle, mirror, gain, shift, wide, tall = draws[:, :9].unbind(1)
    low, high = law.crop_scale
    side = (low + (high - low) * area).sqrt()
    turn = torch.deg2rad((2 * angle - 1) * law.rotation_deg)
    face = torch.where(mirror < law.flip_p, -1.0, 1.0)
    cosine, sine = side * turn.cos(), side * turn.sin()
    # The crop's centre lies where the unrotated crop still fits into the image, [-1, 1] wide.
    across, down = (2 * x - 1) * (1 - side), (2 * y - 1) * (1 - side)
    rows = [cosine * face, sine, across, -sine * face, cosine, down]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    theta[:, :, 0] *= (1 + (2 * wide - 1) * law.stretch)[:, None]
    theta[:, :, 1] *= (1 + (2 * tall - 1) * law.stretch)[:, None]
    bend = None
    if law.elastic > 0:
        knots = draws[:, 9:].clamp(TAIL, 1 - TAIL).view(-1, 2, KNOTS, KNOTS)
        bend = 2 * law.elastic * torch.special.ndtri(knots)  # the image is 2 wide
    return Warps(
        theta=theta,
        gain=1 + (2 * gain - 1) * law.contrast,
        shift=(2 * shift - 1) * law.brightness,
        bend=bend,
    )


def warp_images(images: Tensor, warps: Warps, size_px: int | None = None) -> Tensor:
    """Warp (bilinear, black outside) and relight images ``[B, C, S, S]`` float in [0, 1].

    The result is ``[B, C, size_px, size_px]``, of the images' size if it is not given.

    Raises
    ------
    SpcxrError
        images that are not square (a rotation would shear them).

    >>> warps = plan(torch.rand(2, DRAWS), Augmentation())
    >>> warp_images(torch.rand(2, 1, 32, 32), warps).shape
    torch.Size([2, 1, 32, 32])
    """
    own = _square(images)
    size = own if size_px is None else size_px
    warped = F.grid_sample(images, _grid(warps, size, images.device), align_corners=False)
    mean = warped.mean((1, 2, 3), keepdim=True)
    gain, shift = (v.to(images.device)[:, None, None, None] for v in (warps.gain, warps.shift))
    return ((warped - mean) * gain + mean + shift).clamp(0, 1)


def warp_masks(masks: Tensor, warps: Warps, size_px: int) -> Tensor:
    """The same warp of masks ``[B, S, S]`` uint8, nearest, to ``[B, size_px, size_px]`` uint8.

    What comes from outside the image is `IGNORE`: nothing is known of it.

    >>> warps = plan(torch.rand(2, DRAWS), Augmentation())
    >>> warp_masks(torch.zeros(2, 64, 64, dtype=torch.uint8), warps, 32).shape
    torch.Size([2, 32, 32])
    """
    _square(masks)
    # grid_sample pads with 0: sample the distance from IGNORE, so that padding means IGNORE.
    distance = (IGNORE - masks.int())[:, None].float()
    grid = _grid(warps, size_px, masks.device)
    sampled = F.grid_sample(distance, grid, mode="nearest", align_corners=False)
    return (IGNORE - sampled[:, 0].round().int()).to(torch.uint8)


def _grid(warps: Warps, size: int, device: torch.device) -> Tensor:
    theta, shape = warps.theta.to(device), [len(warps.theta), 1, size, size]
    if warps.bend is None:
        return F.affine_grid(theta, shape, align_corners=False)
    still = torch.eye(2, 3, device=device).expand_as(theta)
    field = F.interpolate(warps.bend.to(device), (size, size), mode="bicubic", align_corners=True)
    bent = F.affine_grid(still, shape, align_corners=False) + field.permute(0, 2, 3, 1)
    return bent @ theta[:, None, :, :2].mT + theta[:, None, None, :, 2]


def _square(images: Tensor) -> int:
    height, width = images.shape[-2:]
    if height != width:
        raise SpcxrError(f"images of {height}x{width} px; augmentation takes square ones")
    return height


def rest(count: int) -> Warps:
    """Warps that change nothing, for ``count`` images.

    >>> rest(3).theta.shape
    torch.Size([3, 2, 3])
    """
    return plan(torch.full((count, DRAWS), 0.5), Augmentation((1.0, 1.0), 0.0, 0.0, 0.0, 0.0))
