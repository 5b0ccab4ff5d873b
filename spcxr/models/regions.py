"""Which patches of a radiograph are read: those that touch the lungs.

Burned-in text, borders and labels lie outside the lungs: an encoder that is not given their patches
cannot learn from them. What is left is also less to compute.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # it loads MONAI, and what is here does without
    from spcxr.models.decoder import Segmenter

MARGIN = 0.25  # of a patch's side: lung so near to a patch counts as touching it
LEAST_COVER = 0.05  # of a patch with its margin: less lung is a stray pixel
LEAST_SHARE = 0.05  # of an image's patches: fewer are no lungs
GREYS = 1024  # levels that greys are told apart by where they are equalised
FLAT = 1e-3  # a range of greys that is none: rounding, a sixteenth of a step of 8 bits


class LungSource(Protocol):
    """Whatever knows where the lungs are: a model inside, or masks.

    ``equalise``: whether the greys of what is read are `equalised` too.
    """

    @property
    def equalise(self) -> bool: ...

    def masks(self, grey: Tensor, rows: Any, store: Any) -> Tensor:
        """Grey images ``[B, 1, h, w]`` in [0, 1], their rows and store -> ``[B, h, w]`` bool."""


def patches_touched(masks: Tensor, patch_px: int) -> Tensor:
    """Lung masks ``[B, h, w]`` bool -> the patches to read, ``[B, Gh, Gw]`` bool.

    Ours: a patch is read where lung covers a twentieth of it and a quarter of a patch around it.
    The margin keeps what lies at the lungs' edge (hila, the costophrenic angles, a consolidation
    that a mask leaves out in part); the twentieth leaves out stray pixels. Where fewer than a
    twentieth of the patches were left, no lung was found, and the whole image is read.

    >>> masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    >>> masks[0, 20:30, 20:30] = True
    >>> patches_touched(masks, 16).sum((1, 2)).tolist()
    [1, 16]
    """
    touched = touching(masks, patch_px)
    return touched | no_lungs(touched)[:, None, None]


def touching(masks: Tensor, patch_px: int) -> Tensor:
    """The same, and no patch of an image in which no lung was found.

    >>> touching(torch.zeros(1, 64, 64, dtype=torch.bool), 16).any().item()
    False
    """
    margin = round(MARGIN * patch_px)
    cover = F.avg_pool2d(
        masks[:, None].float(), patch_px + 2 * margin, stride=patch_px, padding=margin
    )
    return cover[:, 0] >= LEAST_COVER


def no_lungs(touched: Tensor) -> Tensor:
    """``[B]`` bool: images with so few patches ``[B, Gh, Gw]`` that no lung was found.

    >>> no_lungs(torch.zeros(2, 4, 4, dtype=torch.bool)).tolist()
    [True, True]
    """
    return touched.flatten(1).float().mean(1) < LEAST_SHARE


def equalised(images: Tensor, visible: Tensor, patch_px: int) -> Tensor:
    """Histogram equalisation over the visible patches alone, each image by itself.

    A grey becomes the normal quantile of its rank among the pixels that are read, told apart in
    `GREYS` levels between the darkest and the brightest of them. So a rising curve that an image's
    greys have gone through changes little, and bright letters or borders that are not read nothing.

    Parameters
    ----------
    images
        ``[B, C, h, w]``; of three channels the first is taken, all being one grey.
    visible
        ``[B, Gh, Gw]`` bool, True = read.

    Returns
    -------
    ``[B, C, h, w]`` float32, over what is read about normal (mean 0, deviation 1) where greys are
    many; 0 where all are one. What is not read is of no meaning, what is no number stays none.

    >>> images = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> visible = torch.tensor([[[True, False], [True, True]]])
    >>> plain, curved = (equalised(curve, visible, 16) for curve in (images, images**2))
    >>> float((plain - curved)[:, :, 16:].abs().mean()) < 0.02
    True
    """
    shape = images.shape
    grey = images[:, 0].float().flatten(1)
    read = visible.repeat_interleave(patch_px, 1).repeat_interleave(patch_px, 2).flatten(1)
    low = grey.masked_fill(~read, math.inf).amin(1, keepdim=True)
    high = grey.masked_fill(~read, -math.inf).amax(1, keepdim=True)
    share = ((grey - low) / (high - low)).masked_fill(high - low < FLAT, 0).nan_to_num()
    level = (share * (GREYS - 1)).round().clamp(0, GREYS - 1).long()
    count = torch.zeros(len(grey), GREYS, dtype=torch.long, device=grey.device)
    count.scatter_add_(1, level, read.long())
    pixels = count.sum(1, keepdim=True).double()
    rank = (count.cumsum(1) - count / 2) / pixels
    least = 0.5 / pixels  # half a pixel: the rank of the darkest where all differ
    quantile = torch.special.ndtri(torch.minimum(torch.maximum(rank, least), 1 - least))
    made = quantile.float().gather(1, level).masked_fill(~grey.isfinite(), math.nan)
    return made.view(shape[0], 1, *shape[2:]).expand(-1, shape[1], -1, -1)


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks ``[B, S, S]`` of any type at another size, nearest pixel.

    >>> resized(torch.eye(2, dtype=torch.uint8)[None], (4, 4))[0, 1].tolist()
    [1, 1, 0, 0]
    """
    if tuple(masks.shape[1:]) == size:
        return masks
    return F.interpolate(masks[:, None].float(), size, mode="nearest-exact")[:, 0].to(masks.dtype)


class LungFinder(nn.Module):
    """A segmentation model within another model: it finds the lungs in what that one is shown.

    It sees the image at its own size and normalised by its own numbers, and is never trained here.

    Parameters
    ----------
    segmenter
        the model.
    mean, std
        of the pixels in [0, 1] that it was trained with.
    numbers
        the class numbers that are lung.
    equalise
        as `LungSource` has it.

    >>> from spcxr.models.decoder import Segmenter, UNETRDecoder
    >>> from spcxr.models.vit import VisionTransformer
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> decoder = UNETRDecoder(width=24, patch_px=16, out_channels=2, base_channels=4)
    >>> finder = LungFinder(Segmenter(encoder, decoder), 0.5, 0.25)
    >>> finder.masks(torch.rand(2, 1, 48, 48)).shape
    torch.Size([2, 48, 48])
    """

    def __init__(
        self,
        segmenter: Segmenter,
        mean: float,
        std: float,
        numbers: tuple[int, ...] = (1,),
        *,
        equalise: bool = False,
    ) -> None:
        super().__init__()
        self.numbers = numbers
        self.equalise = equalise
        self.segmenter = segmenter.requires_grad_(False)
        self.mean, self.std = mean, std
        super().train(False)

    def train(self, mode: bool = True) -> LungFinder:
        """Nothing: it answers alike while the model around it is trained."""
        del mode
        return self

    @torch.no_grad()
    def masks(self, grey: Tensor, rows: Any = None, store: Any = None) -> Tensor:
        """Grey images ``[B, 1, h, w]`` in [0, 1] -> ``[B, h, w]`` bool; rows are not asked for."""
        del rows, store
        size, own = (grey.shape[2], grey.shape[3]), self.segmenter.image_px
        if size != own:
            # Antialiased, as `crop_resize` resamples what the segmenter was trained on.
            grey = F.interpolate(grey, own, mode="bilinear", antialias=True)
        images = (grey - self.mean) / self.std
        channels = self.segmenter.encoder.channels
        logits = self.segmenter(images.expand(-1, channels, -1, -1)).float()
        if size != own:
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        found = logits.argmax(1)
        return torch.isin(found, torch.tensor(self.numbers, device=found.device))
