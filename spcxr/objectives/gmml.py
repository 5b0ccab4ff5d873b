"""GMML: group-masked model learning (arXiv 2205.14986): rebuild what groups of patches hid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spcxr.models.heads import ReconstructionHead
from spcxr.models.vit import VisionTransformer
from spcxr.objectives.objective import Objective, View
from spcxr.ops.masked_patch_gather import masked_patch_gather
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss


def read_blocks(depth: int) -> tuple[int, ...]:
    """The blocks (from 0) whose outputs are averaged: 6, 8, 10, 12 of 12, scaled to other depths.

    Scaling is ours; in shallow encoders some fall together and count once.

    >>> read_blocks(12), read_blocks(24), read_blocks(4)
    ((5, 7, 9, 11), (11, 15, 19, 23), (1, 2, 3))
    """
    return tuple(sorted({max(round(depth * k / 12), 1) - 1 for k in (6, 8, 10, 12)}))


class GMML(Objective):
    """Encoder and reconstruction head: corrupted patches -> L1 on what was hidden.

    The head reads the mean of the outputs of blocks 6, 8, 10, 12 (`read_blocks`), then the
    encoder's final LayerNorm.

    >>> from spcxr.objectives.corruption import Corruption, sample_fill
    >>> from spcxr.objectives.objective import whole_view
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> ids = torch.arange(2)
    >>> fill = sample_fill(ids, Corruption(), seed=0, epoch=0, size=(32, 32), patch_px=16)
    >>> view = whole_view(torch.zeros(2, 1, 32, 32), fill, patch_px=16)
    >>> sorted(build_gmml(encoder)([view]))
    ['l1', 'loss']
    """

    def __init__(self, encoder: VisionTransformer, head: ReconstructionHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.blocks_read = read_blocks(encoder.depth)

    def outputs(
        self, rows: Tensor, grid: tuple[int, int], survivors: Tensor | None = None
    ) -> list[Tensor]:
        """Patch rows ``[B, N, C*P*P]`` -> tokens after the blocks that are read, last one last."""
        tokens = self.encoder.embed_patches(rows, grid)
        return self.encoder.outputs_of(tokens, self.blocks_read, survivors=survivors)

    def guess(self, outputs: Sequence[Tensor]) -> Tensor:
        """`outputs` of corrupted rows -> the head's guess of the clean ones ``[B, N, C*P*P]``."""
        return self.head(self.encoder.norm(torch.stack(list(outputs)).mean(0)[:, 1:]))

    def rebuild(
        self, corrupted: Tensor, grid: tuple[int, int], survivors: Tensor | None = None
    ) -> Tensor:
        """Corrupted patch rows ``[B, N, C*P*P]`` -> the head's guess of the clean ones."""
        return self.guess(self.outputs(corrupted, grid, survivors))

    def reconstruct(self, view: View, dtype: torch.dtype = torch.float32) -> Tensor:
        """`rebuild` of a corrupted view, which is made here."""
        rows = masked_patch_gather(view.views, view.fill, dtype=dtype)
        return self.rebuild(rows, view.views.grid, view.survivors)

    def forward(
        self, views: Sequence[View], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """``l1`` of the first view is the loss."""
        rebuilt = self.reconstruct(views[0], dtype)
        l1 = rebuilding_loss(rebuilt, views[:1], distance="l1")
        return {"loss": l1, "l1": l1.detach().clone()}


def rebuilding_loss(rebuilt: Tensor, views: Sequence[View], *, distance: str) -> Tensor:
    """The mean over corrupted views of their loss on what was hidden, times their shares.

    ``rebuilt [V*B, N, C*P*P]``: the guesses of one view after the other.
    """
    total = rebuilt.new_zeros((), dtype=torch.float32)
    for view, guess in zip(views, rebuilt.chunk(len(views)), strict=True):
        assert view.fill is not None
        loss = masked_reconstruction_loss(guess, view.views, view.fill.mask, distance=distance)
        total = total + loss * view.share
    return total / len(views)


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
