"""The losses of masks: Dice with cross-entropy, or with the focal loss; unknown pixels add nothing.

Dice is taken over the whole batch (nnU-Net's choice for 2-D), so that an image in which a structure
is absent does not count as a failure; the background has no Dice term. Every loss is made of sums
over pixels, so that several processes can add them up and have the loss of one large batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from monai.losses import FocalLoss
from torch import Tensor

from spcxr.train.augment import IGNORE
from spcxr.train.distributed import World

FOCUS = 2.0  # gamma of arXiv 1708.02002, and MONAI's default
SMOOTH = 1e-5  # of Dice, above and below: MONAI's
Total = Callable[[Tensor], Tensor]


class MaskLoss(Protocol):
    """Logits ``[B, 1 + K, H, W]`` and masks ``[B, H, W]`` -> the loss of the whole step."""

    def __call__(self, logits: Tensor, masks: Tensor, total: Total = ...) -> Tensor: ...


def own(sums: Tensor) -> Tensor:
    """What one process alone adds up to."""
    return sums


def dice_and_ce(logits: Tensor, masks: Tensor, total: Total = own) -> Tensor:
    """Dice of the structures + cross-entropy over all pixels whose class is known.

    Parameters
    ----------
    logits
        ``[B, 1 + K, H, W]`` float, background first.
    masks
        ``[B, H, W]`` uint8 class numbers, 255 = unknown: adds neither loss nor gradient.
    total
        makes sums over this process's pixels those over the step's (`whole_step`).

    >>> masks = torch.zeros(1, 4, 4, dtype=torch.uint8); masks[:, :2] = 1
    >>> sure = 50 * F.one_hot(masks.long(), 2).permute(0, 3, 1, 2).float()
    >>> float(dice_and_ce(sure, masks)) < 1e-4
    True
    """
    known, target, one_hot = _settled(logits, masks)
    pixels = F.cross_entropy(logits.float(), target, reduction="none")
    return _together(_dice_sums(logits, one_hot, known), (pixels * known).sum(), known.sum(), total)


def dice_and_focal(logits: Tensor, masks: Tensor, total: Total = own) -> Tensor:
    """Dice of the structures + their focal loss, over pixels whose class is known.

    Where all are known it equals MONAI's ``DiceFocalLoss(include_background=False, softmax=True,
    batch=True)``: each structure's focal loss is of its own logit against all else, and the
    background has none. Takes what `dice_and_ce` takes.

    >>> masks = torch.zeros(1, 4, 4, dtype=torch.uint8); masks[:, :2] = 1
    >>> sure = 100 * (F.one_hot(masks.long(), 2).permute(0, 3, 1, 2) - 0.5)
    >>> float(dice_and_focal(sure, masks)) < 1e-4
    True
    """
    known, _, one_hot = _settled(logits, masks)
    focal = FocalLoss(include_background=False, gamma=FOCUS, reduction="none")
    pixels = focal(logits.float(), one_hot) * known[:, None]
    count = known.sum() * pixels.shape[1]
    return _together(_dice_sums(logits, one_hot, known), pixels.sum(), count, total)


LOSSES: dict[str, MaskLoss] = {"dice-ce": dice_and_ce, "dice-focal": dice_and_focal}


def over_scales(
    loss: MaskLoss, logits: Sequence[Tensor], masks: Tensor, total: Total = own
) -> Tensor:
    """``loss`` of logits at several resolutions, fine to coarse: each weighs half of the finer.

    Deep supervision as nnU-Net does it (arXiv 1904.08128): weights 1, 1/2, 1/4 over their sum, and
    the masks brought down to each size by the nearest pixel.

    >>> masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    >>> alike = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
    >>> round(float(over_scales(lambda x, m, _: x.new_tensor(float(m.shape[1])), alike, masks)), 4)
    3.3333
    """
    weights = [0.5**depth for depth in range(len(logits))]
    losses = []
    for found in logits:
        size = (found.shape[2], found.shape[3])
        small = F.interpolate(masks[:, None].float(), size, mode="nearest-exact")
        losses.append(loss(found, small[:, 0].to(torch.uint8), total))
    weighed = [weight * each for weight, each in zip(weights, losses, strict=True)]
    return torch.stack(weighed).sum() / sum(weights)


def whole_step(world: World, *, counts: bool = True) -> Total:
    """Adds up sums over the ranks. The gradient of each is that of its own part, times the number
    of ranks, for gradients are exchanged as means.

    ``counts``: whether this rank's images are some of the step's (false where none was left).
    """

    def total(sums: Tensor) -> Tensor:
        mine = sums * float(counts)
        return world.add_up(mine.detach().clone()) + world.size * (mine - mine.detach())

    return total if world.size > 1 else own


def _settled(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Known pixels ``[B, H, W]``, their class numbers, and these one-hot ``[B, 1 + K, H, W]``."""
    known = masks != IGNORE
    target = masks.long().masked_fill(~known, 0)
    one_hot = F.one_hot(target, logits.shape[1]).movedim(-1, 1) * known[:, None]
    return known, target, one_hot.float()


def _dice_sums(logits: Tensor, one_hot: Tensor, known: Tensor) -> Tensor:
    """Of each structure over the batch ``[2, K]``: what masks share, and what they hold in sum."""
    shares = (logits.float().softmax(1) * known[:, None])[:, 1:]
    truth = one_hot[:, 1:]
    every = (0, 2, 3)
    return torch.stack([(shares * truth).sum(every), shares.sum(every) + truth.sum(every)])


def _together(dice_sums: Tensor, pixels: Tensor, count: Tensor, total: Total) -> Tensor:
    """Mean Dice loss over the structures + the mean over the pixels, all in one exchange."""
    ends = torch.stack([pixels, count.to(pixels)])
    sums = total(torch.cat([dice_sums.flatten(), ends]))
    shared, held = sums[:-2].view_as(dice_sums)
    dice = (2 * shared + SMOOTH) / (held + SMOOTH)
    return (1 - dice).mean() + sums[-2] / sums[-1].clamp(min=1)
