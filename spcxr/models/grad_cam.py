"""Grad-CAM on the patch grid: which patches speak for a label, as far as the head can tell.

Source: Selvaraju et al., arXiv 1610.02391, on the tokens that enter the last block, laid out as the
grid they come from.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.models.heads import ClassificationHead, Classifier
from spcxr.models.sequences import DENSE, Sequences
from spcxr.ops.attention_reference import pack_key_mask
from spcxr.ops.patches import patch_grid


def grad_cam(
    model: Classifier, images: Tensor, labels: Tensor, visible: Tensor | None = None
) -> Tensor:
    """How much each patch speaks for a label: its token along the mean gradient of the logit.

    The channels of the last block's input are weighted by the label's gradient, averaged over the
    patches that are read, and summed; what speaks against the label counts as 0.

    Parameters
    ----------
    model
        in eval mode; its weights get no gradient.
    images
        ``[B, C, H, W]`` normalised float, on the model's device.
    labels
        ``[B, L]`` int64: the labels to explain, by number, of each image.
    visible
        ``[B, Gh, Gw]`` bool, True = read; None: all patches.

    Returns
    -------
    ``[B, L, Gh, Gw]`` float32, 0 or more, of no fixed scale. Patches that are not read are 0.

    Raises
    ------
    SpcxrError
        a mask of another grid.

    >>> from spcxr.models.vit import VisionTransformer
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> model = Classifier(encoder, ClassificationHead(width=24, classes=3)).eval()
    >>> grad_cam(model, torch.rand(2, 1, 32, 48), torch.tensor([[0, 2], [1, 1]])).shape
    torch.Size([2, 2, 2, 3])
    """
    encoder: Any = model.encoder
    grid = patch_grid(images.shape[2], images.shape[3], encoder.patch_px)
    hidden, sequences = _hidden(images, visible, grid)
    with torch.no_grad():
        tokens = encoder.embed(images)
        for block in encoder.blocks[:-1]:
            tokens = block(tokens, sequences)
    with torch.enable_grad():
        entering = tokens.detach().requires_grad_()
        read = encoder.norm(encoder.blocks[-1](entering, sequences))
        head: Any = model.head
        logits = head.of_features(_features(read, hidden)).float()
        # An image's logits depend on its own tokens alone: one backward pass explains a label of
        # every image at once.
        chosen = logits.gather(1, labels).sum(0)
        slopes = [torch.autograd.grad(one, entering, retain_graph=True)[0] for one in chosen]
    patches = entering.detach()[:, 1:].float()
    shown = torch.stack([_weighed(patches, slope[:, 1:].float(), hidden) for slope in slopes], 1)
    return shown.unflatten(2, grid)


def _hidden(
    images: Tensor, visible: Tensor | None, grid: tuple[int, int]
) -> tuple[Tensor | None, Sequences]:
    """Patches that are not read, ``[B, N]`` bool, and the attention without them."""
    if visible is None:
        return None, DENSE
    if tuple(visible.shape) != (len(images), *grid) or visible.dtype != torch.bool:
        raise SpcxrError(
            f"visible is {tuple(visible.shape)} {visible.dtype}; give "
            f"[{len(images)}, {grid[0]}, {grid[1]}] bool"
        )
    hidden = ~visible.flatten(1)
    # Hidden from all others, a token tells them nothing: the same as not to read it.
    return hidden, Sequences(pack_key_mask(F.pad(hidden, (1, 0))))


def _features(tokens: Tensor, hidden: Tensor | None) -> Tensor:
    """What the head reads of normed tokens ``[B, 1 + N, D]``: ``[B, 2D]``."""
    if hidden is None:
        return ClassificationHead.features(tokens)
    read = (~hidden)[..., None]
    mean = (tokens[:, 1:] * read).sum(1) / read.sum(1).clamp(min=1)
    return torch.cat([tokens[:, 0], mean], 1)


def _weighed(patches: Tensor, slope: Tensor, hidden: Tensor | None) -> Tensor:
    """``[B, N]`` of tokens and the logit's gradient by them, both ``[B, N, D]``."""
    if hidden is None:
        return (patches * slope.mean(1, keepdim=True)).sum(2).clamp(min=0)
    read = (~hidden)[..., None]
    weight = (slope * read).sum(1, keepdim=True) / read.sum(1, keepdim=True).clamp(min=1)
    return (patches * weight).sum(2).clamp(min=0).masked_fill(hidden, 0.0)
