"""Where an encoder looks: attention of the cls token, and attention rollout.

The fused kernels keep no probabilities, so they are computed again here in plain torch from the
queries and keys of each block. Memory is ``[B, heads, T, T]`` of one block: for a few images.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.models.sequences import DENSE, Sequences
from spcxr.models.vit import VisionTransformer
from spcxr.ops.attention_reference import pack_key_mask
from spcxr.ops.patches import patch_grid


@torch.inference_mode()
def cls_attention(
    encoder: VisionTransformer, images: Tensor, layer: int = -1, visible: Tensor | None = None
) -> Tensor:
    """How much the cls token looks at each patch, head by head, in one block.

    Parameters
    ----------
    images
        ``[B, C, H, W]`` normalised float, on the encoder's device.
    layer
        the block, counted from 0, or from -1 backwards.
    visible
        ``[B, Gh, Gw]`` bool, True = read; None: all patches.

    Returns
    -------
    ``[B, heads, Gh, Gw]`` float32 in [0, 1]; with the share that the cls token gives itself they
    sum to 1. Patches that are not read are 0.

    Raises
    ------
    SpcxrError
        a block the encoder does not have, or a mask of another grid.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> cls_attention(encoder, torch.zeros(2, 1, 32, 48)).shape
    torch.Size([2, 3, 2, 3])
    """
    if not -encoder.depth <= layer < encoder.depth:
        raise SpcxrError(f"block {layer} of an encoder with {encoder.depth}; count from 0 or -1")
    grid = patch_grid(images.shape[2], images.shape[3], encoder.patch_px)
    with closing(_shares(encoder, images, visible)) as blocks:
        shares = next(islice(blocks, layer % encoder.depth, None))
    return shares[:, :, 0, 1:].unflatten(2, grid)


@torch.inference_mode()
def rollout(encoder: VisionTransformer, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention rollout: how much each patch reaches the last cls token through all blocks.

    Source: Abnar and Zuidema, arXiv 2005.00928: heads are averaged, half of each token's share is
    its own (the residual branch), and the blocks are multiplied. It tells what the encoder's
    summary is made of, the same for every label, and nothing of what the head makes of it.

    Parameters
    ----------
    images, visible
        as in `cls_attention`.

    Returns
    -------
    ``[B, Gh, Gw]`` float32; with the cls token's own share they sum to 1. Patches that are not
    read are 0.

    Raises
    ------
    SpcxrError
        a mask of another grid.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> lung = torch.tensor([[[True, False], [True, True]]])
    >>> rollout(encoder, torch.zeros(1, 1, 32, 32), lung)[0, 0, 1]
    tensor(0.)
    """
    grid = patch_grid(images.shape[2], images.shape[3], encoder.patch_px)
    made: Tensor | None = None
    for shares in _shares(encoder, images, visible):
        mean = shares.mean(1)
        own = torch.eye(mean.shape[1], device=mean.device)
        block = (mean + own) / 2
        made = block if made is None else block @ made
    assert made is not None  # an encoder has a block
    return made[:, 0, 1:].unflatten(1, grid)


def _shares(
    encoder: VisionTransformer, images: Tensor, visible: Tensor | None
) -> Generator[Tensor, None, None]:
    """Attention ``[B, heads, T, T]`` of each block, shallow to deep; rows sum to 1."""
    hidden, sequences = None, DENSE
    if visible is not None:
        grid = patch_grid(images.shape[2], images.shape[3], encoder.patch_px)
        if tuple(visible.shape) != (len(images), *grid) or visible.dtype != torch.bool:
            raise SpcxrError(
                f"visible is {tuple(visible.shape)} {visible.dtype}; give "
                f"[{len(images)}, {grid[0]}, {grid[1]}] bool"
            )
        hidden = F.pad(~visible.flatten(1), (1, 0))
        # Hidden from all others, a token tells them nothing: the same as not to read it.
        sequences = Sequences(pack_key_mask(hidden))
    was_training = encoder.training
    encoder.eval()  # without stochastic depth
    try:
        tokens = encoder.embed(images)
        for block in encoder.blocks:
            yield _softmax(block, tokens, hidden)
            tokens = block(tokens, sequences)
    finally:
        encoder.train(was_training)


def _softmax(block: Any, tokens: Tensor, hidden: Tensor | None) -> Tensor:
    """What each token gives each other in one block, in float32."""
    qkv = block.attn.qkv(block.norm1(tokens)).unflatten(-1, (3, block.attn.heads, -1))
    q, k, _ = qkv.float().unbind(2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    if hidden is not None:
        logits = logits.masked_fill(hidden[:, None, None], -torch.inf)
    return logits.softmax(-1)
