"""GMML: group-masked model learning (arXiv 2205.14986): rebuild what groups of patches hid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spcxr.models.heads import ReconstructionHead
from spcxr.models.patches import unpatchify
from spcxr.models.vit import VisionTransformer


def read_blocks(depth: int) -> tuple[int, ...]:
    """The blocks (from 0) whose outputs are averaged: 6, 8, 10, 12 of 12, scaled to other depths.

    Scaling is ours; in shallow encoders some fall together and count once.

    >>> read_blocks(12), read_blocks(24), read_blocks(4)
    ((5, 7, 9, 11), (11, 15, 19, 23), (1, 2, 3))
    """
    return tuple(sorted({max(round(depth * k / 12), 1) - 1 for k in (6, 8, 10, 12)}))


def masked_l1(predicted: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error over the masked pixels of the batch; 0 where nothing is masked.

    Parameters
    ----------
    predicted, clean
        ``[B, C, H, W]``.
    mask
        ``[B, H, W]`` bool, True = counted.

    Returns
    -------
    float32 scalar.

    >>> mask = torch.tensor([[[True, False]]])
    >>> masked_l1(torch.tensor([[[[3.0, 9.0]]]]), torch.tensor([[[[1.0, 1.0]]]]), mask)
    tensor(2.)
    """
    error = (predicted.float() - clean.float()).abs() * mask[:, None]
    return error.sum() / (mask.sum() * clean.shape[1]).clamp(min=1)


class GMML(nn.Module):
    """Encoder and reconstruction head: (corrupted, clean, mask) -> L1 on the corrupted pixels.

    The head reads the mean of the outputs of blocks 6, 8, 10, 12 (`read_blocks`), then the
    encoder's final LayerNorm.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> objective = GMML(encoder, ReconstructionHead(width=24, patch_px=16))
    >>> images, mask = torch.zeros(2, 1, 32, 32), torch.ones(2, 32, 32, dtype=torch.bool)
    >>> sorted(objective(images, images, mask))
    ['l1', 'loss']
    """

    def __init__(self, encoder: VisionTransformer, head: ReconstructionHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.blocks_read = read_blocks(encoder.depth)

    def reconstruct(self, corrupted: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> the head's guess of the clean ones, the same shape."""
        features = self.encoder.get_intermediate_layers(corrupted, self.blocks_read, norm=False)
        patches = self.encoder.norm(torch.stack(features).mean(0))
        patch_px = self.encoder.patch_px
        grid = (corrupted.shape[2] // patch_px, corrupted.shape[3] // patch_px)
        return unpatchify(self.head(patches), grid, patch_px)

    def forward(self, corrupted: Tensor, clean: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """One step's losses: ``loss`` is the one to minimise, the others are its parts.

        Parameters
        ----------
        corrupted, clean
            ``[B, C, H, W]`` normalised float.
        mask
            ``[B, H, W]`` bool, True = corrupted.
        """
        l1 = masked_l1(self.reconstruct(corrupted), clean, mask)
        return {"loss": l1, "l1": l1.detach()}


def build_gmml(encoder: VisionTransformer) -> GMML:
    """The objective around an encoder, with a fresh head of its width.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> build_gmml(encoder).head.to_pixels.out_features
    256
    """
    head = ReconstructionHead(
        width=encoder.width, patch_px=encoder.patch_px, channels=encoder.channels
    )
    return GMML(encoder, head)
