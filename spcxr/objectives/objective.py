"""What every objective is: views in, losses out, and what follows the step beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spcxr.models.vit import VisionTransformer
from spcxr.ops.masked_patch_gather import masked_patch_gather
from spcxr.ops.views import Fill, Views, whole_views


class View(NamedTuple):
    """One view of each image of a batch: how it is made, what hides parts of it.

    ``fill`` None: nothing does, the view is there for its meaning alone. ``survivors [B, depth,
    2]`` as in `VisionTransformer.outputs_of`; None: no stochastic depth. ``share`` is a float32
    scalar: the hidden patches or pixels of this view over those of the mean batch of the step. A
    mean over hidden pixels times its share, averaged over the step's batches, is that of the step.
    """

    views: Views
    fill: Fill | None
    survivors: Tensor | None
    share: Tensor

    def to(self, device: torch.device) -> View:
        """The same on another device."""
        return View(
            self.views.to(device),
            None if self.fill is None else self.fill.to(device),
            None if self.survivors is None else self.survivors.to(device, non_blocking=True),
            self.share.to(device, non_blocking=True),
        )


@dataclass(frozen=True)
class Progress:
    """Where a run stands, in updates: ``step`` behind us, of ``total_steps``.

    >>> Progress(step=30, epoch_steps=20, total_steps=120).epoch
    1.5
    """

    step: int
    epoch_steps: int
    total_steps: int

    @property
    def epoch(self) -> float:
        """Epochs behind us."""
        return self.step / self.epoch_steps


class Objective(nn.Module):
    """An encoder, and what is wrapped around it to learn from images alone.

    A step is ``begin_step``, forward and backward on each batch, ``end_backward``, the update,
    ``end_step``. What follows from the step (temperatures, momenta) is set by ``begin_step`` as a
    pure function of it, so going on in mid-run needs the state dict and the step's number alone.
    """

    encoder: VisionTransformer

    def forward(
        self, views: Sequence[View], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """The losses of a batch: ``loss`` is the one to minimise, the others are its parts.

        Each is this batch's part of the step's mean (`View.share`).

        Parameters
        ----------
        views
            of the same images: those that are corrupted first.
        dtype
            of the rows the encoder reads.
        """
        raise NotImplementedError

    def reconstruct(self, view: View, dtype: torch.dtype = torch.float32) -> Tensor:
        """The guess of all patches of a corrupted view, rows ``[B, N, C*P*P]``."""
        raise NotImplementedError

    def begin_step(self, progress: Progress) -> None:
        """Set what follows from the step. By default nothing does."""

    def end_backward(self) -> None:
        """Before the update, with all gradients there."""

    def end_step(self) -> None:
        """After the update, if it was made: a teacher follows its student."""


def whole_view(pixels: Tensor, fill: Fill | None, *, patch_px: int) -> View:
    """Whole images as a view, as tests and examples want it.

    >>> whole_view(torch.zeros(2, 1, 32, 32), None, patch_px=16).views.grid
    (2, 2)
    """
    return View(whole_views(pixels, patch_px=patch_px), fill, None, torch.ones(()))


def together(
    views: Sequence[View], dtype: torch.dtype, *, clean: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Views of one size as one batch, one after the other: patch rows ``[V*B, N, C*P*P]``, and
    survivors ``[V*B, depth, 2]`` or None.

    ``clean``: as they are before anything hides parts of them.

    >>> views = [whole_view(torch.zeros(2, 1, 32, 32), None, patch_px=16)] * 3
    >>> together(views, torch.float32)[0].shape
    torch.Size([6, 4, 256])
    """
    rows = [masked_patch_gather(v.views, None if clean else v.fill, dtype=dtype) for v in views]
    survivors = [v.survivors for v in views if v.survivors is not None]
    return torch.cat(rows), torch.cat(survivors) if survivors else None
