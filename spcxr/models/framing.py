"""Images larger than the encoder's input, looked at part by part: in windows, or in the lungs' box.

Each is a `Framing` of `Segmenter`: it takes a whole image and gives logits of all of it. While the
model is trained it is shown the parts themselves (`recipes.frames`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from torch import Tensor

from spcxr.models.decoder import Look
from spcxr.models.regions import LungFinder

OVERLAP = 0.5  # of neighbouring windows, as nnU-Net has them
WINDOWS_AT_ONCE = 8
MARGIN = 0.1  # of a box's side, on each side: a finder's border is coarse
STRAY = 0.01  # of the lung on each side of a box is left out: stray pixels
LEAST_LUNG = 0.01  # of an image: less was not found
SURE = 20.0  # the logit of what is taken for certain


@dataclass(frozen=True)
class Windows:
    """Overlapping windows over the whole image, their logits blended with gaussian weights.

    MONAI's sliding window (arXiv 2211.02701); neighbours overlap by half.

    ``image_px`` and ``window_px`` are (height, width).

    >>> windows = Windows((48, 48), (32, 32))
    >>> windows(lambda x: torch.cat([x, 2 * x], 1), torch.ones(1, 1, 48, 48)).unique().tolist()
    [1.0, 2.0]
    """

    image_px: tuple[int, int]
    window_px: tuple[int, int]

    def __call__(self, look: Look, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B, K, H, W]`` float32."""

        def exact(windows: Tensor) -> Tensor:
            return look(windows).float()  # blended in float32, whatever the model computes in

        found: Any = sliding_window_inference(
            images, self.window_px, WINDOWS_AT_ONCE, exact, overlap=OVERLAP, mode="gaussian"
        )
        made: Tensor = found
        return made


@dataclass
class LungBox:
    """Find the lungs, cut out their box with a margin, look at that, and put it back.

    Two stages, for lungs that fill little of an image, as Tiny Lungs does for premature babies
    (their own crop is not described: box and margin are ours). Where no lung is found the whole
    image is the box; ``missed`` counts these images.

    Parameters
    ----------
    finder
        finds the lungs in the whole image.
    mean, std
        by which the images that come are normalised.
    image_px, box_px
        (height, width), square, of the images that come and of the box as it is looked at.
    """

    finder: LungFinder
    mean: float
    std: float
    image_px: tuple[int, int]
    box_px: tuple[int, int]
    missed: int = 0

    def find(self, grey: Tensor) -> tuple[Tensor, Tensor]:
        """Grey images ``[B, 1, h, w]`` in [0, 1] -> `boxes_around` their lungs."""
        return boxes_around(self.finder.to(grey.device).masks(grey))

    def __call__(self, look: Look, images: Tensor) -> Tensor:
        """Images ``[B, C, S, S]`` -> logits ``[B, K, S, S]`` float32; beside the box all is
        background for certain."""
        boxes, found = self.find((images[:, :1] * self.std + self.mean).clamp(0, 1))
        self.missed += int((~found).sum())
        shape = [len(images), images.shape[1], *self.box_px]
        grid = F.affine_grid(into(boxes), shape, align_corners=False)
        cut = F.grid_sample(images, grid.to(images.dtype), align_corners=False)
        return put_back(look(cut).float(), boxes, (images.shape[2], images.shape[3]))


def boxes_around(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Square boxes around lung masks ``[B, S, S]`` bool, and in which images lung was found.

    Returns ``[B, 3]`` float32: centre (x, y) and half the side where the image is [-1, 1] wide, as
    `affine_grid` counts, within the image; ``[B]`` bool. Where lung covers less than a hundredth of
    an image nothing was found, and the box is the whole image. A hundredth of the lung may lie
    beyond each side before the margin is added: else one stray pixel would widen the box.

    >>> masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    >>> masks[0, 40:60, 20:40] = True
    >>> boxes, found = boxes_around(masks)
    >>> [round(x, 4) for x in boxes[0].tolist()], boxes[1].tolist(), found.tolist()
    ([-0.4, 0.0, 0.24], [0.0, 0.0, 1.0], [True, False])
    """
    found = masks.flatten(1).float().mean(1) >= LEAST_LUNG
    made = []
    for axis in (1, 2):  # over rows: where it is across; over columns: how far down
        area = masks.sum(axis).float()
        size, least = area.shape[1], STRAY * area.sum(1, keepdim=True)
        first = (area.cumsum(1) > least).float().argmax(1)
        last = size - (area.flip(1).cumsum(1) > least).float().argmax(1)
        made.append((2 * first / size - 1, 2 * last / size - 1))
    (left, right), (top, bottom) = made
    half = (1 + 2 * MARGIN) / 2 * torch.maximum(right - left, bottom - top)
    half = torch.where(found, half.clamp(max=1.0), 1.0)
    room = 1 - half
    centre = torch.stack([(left + right) / 2, (top + bottom) / 2], 1)
    centre = torch.maximum(torch.minimum(centre, room[:, None]), -room[:, None])
    return torch.cat([centre, half[:, None]], 1), found


def into(boxes: Tensor) -> Tensor:
    """Boxes ``[B, 3]`` -> ``theta [B, 2, 3]``, output -> input: what cuts them out.

    >>> into(torch.tensor([[0.5, -0.5, 0.25]])).tolist()
    [[[0.25, 0.0, 0.5], [0.0, 0.25, -0.5]]]
    """
    x, y, half = boxes.unbind(1)
    none = torch.zeros_like(x)
    return torch.stack([half, none, x, none, half, y], 1).view(-1, 2, 3)


def put_back(logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Logits ``[B, K, h, w]`` of boxes ``[B, 3]`` -> of their images, ``[B, K, *size]``; what is
    beside the box is class 0 for certain.

    >>> put_back(torch.zeros(1, 2, 4, 4), torch.tensor([[0.0, 0.0, 0.5]]), (8, 8))[0, 0, 2].tolist()
    [20.0, 20.0, 0.0, 0.0, 0.0, 0.0, 20.0, 20.0]
    """
    x, y, half = boxes.unbind(1)
    none = torch.zeros_like(x)
    back = torch.stack([1 / half, none, -x / half, none, 1 / half, -y / half], 1).view(-1, 2, 3)
    grid = F.affine_grid(back, [len(logits), 1, *size], align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None]
    # At the rim the nearest logit counts: zeros would pull it towards a draw.
    made = F.grid_sample(logits, grid, padding_mode="border", align_corners=False)
    beside = torch.full((1, logits.shape[1], 1, 1), -SURE, device=logits.device)
    beside[:, 0] = SURE
    return torch.where(inside, made, beside)
