"""The losses of masks: Dice with cross-entropy, or with the focal loss; unknown pixels add nothing.

Dice is taken over the whole batch (nnU-Net's choice for 2-D), so that an image in which a structure
is absent does not count as a failure; the background has no Dice term.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss, FocalLoss
from torch import Tensor

from spcxr.train.augment import IGNORE

FOCUS = 2.0  # gamma of arXiv 1708.02002, and MONAI's default
MaskLoss = Callable[[Tensor, Tensor], Tensor]


def dice_and_ce(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice of the structures + cross-entropy over all pixels whose class is known.

    Parameters
    ----------
    logits
        ``[B, 1 + K, H, W]`` float, background first.
    masks
        ``[B, H, W]`` uint8 class numbers, 255 = unknown: adds neither loss nor gradient.

    >>> masks = torch.zeros(1, 4, 4, dtype=torch.uint8); masks[:, :2] = 1
    >>> sure = 50 * F.one_hot(masks.long(), 2).permute(0, 3, 1, 2).float()
    >>> float(dice_and_ce(sure, masks)) < 1e-4
    True
    """
    known, target, one_hot = _settled(logits, masks)
    pixels = F.cross_entropy(logits.float(), target, reduction="none")
    return _dice(logits, one_hot, known) + (pixels * known).sum() / known.sum().clamp(min=1)


def dice_and_focal(logits: Tensor, masks: Tensor) -> Tensor:
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
    count = known.sum().clamp(min=1) * pixels.shape[1]
    return _dice(logits, one_hot, known) + pixels.sum() / count


LOSSES: dict[str, MaskLoss] = {"dice-ce": dice_and_ce, "dice-focal": dice_and_focal}


def over_scales(loss: MaskLoss, logits: Sequence[Tensor], masks: Tensor) -> Tensor:
    """``loss`` of logits at several resolutions, fine to coarse: each weighs half of the finer.

    Deep supervision as nnU-Net does it (arXiv 1904.08128): weights 1, 1/2, 1/4 over their sum, and
    the masks brought down to each size by the nearest pixel.

    >>> masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    >>> alike = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
    >>> round(float(over_scales(lambda x, m: x.new_tensor(float(m.shape[1])), alike, masks)), 4)
    3.3333
    """
    weights = [0.5**depth for depth in range(len(logits))]
    losses = []
    for found in logits:
        size = (found.shape[2], found.shape[3])
        small = F.interpolate(masks[:, None].float(), size, mode="nearest-exact")
        losses.append(loss(found, small[:, 0].to(torch.uint8)))
    weighed = [weight * each for weight, each in zip(weights, losses, strict=True)]
    return torch.stack(weighed).sum() / sum(weights)


def _settled(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Known pixels ``[B, H, W]``, their class numbers, and these one-hot ``[B, 1 + K, H, W]``."""
    known = masks != IGNORE
    target = masks.long().masked_fill(~known, 0)
    one_hot = F.one_hot(target, logits.shape[1]).movedim(-1, 1) * known[:, None]
    return known, target, one_hot.float()


def _dice(logits: Tensor, one_hot: Tensor, known: Tensor) -> Tensor:
    shares = logits.float().softmax(1) * known[:, None]
    found: Tensor = DiceLoss(include_background=False, batch=True)(shares, one_hot)
    return found
