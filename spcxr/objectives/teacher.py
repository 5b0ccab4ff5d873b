"""The teacher: a slow copy of the student, which learns nothing by itself."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from spcxr.models.averages import follow as average
from spcxr.models.heads import ReconstructionHead
from spcxr.models.over_ranks import BatchNormOverRanks
from spcxr.models.vit import VisionTransformer
from spcxr.objectives.gmml import GMML
from spcxr.objectives.objective import Progress


class Teacher(nn.Module):
    """An encoder and a head whose weights are moving averages of a student's, without gradients.

    It never drops a branch. BatchNorm in its head takes the statistics of its own batch while
    training, as the student's does, for the student's running ones are those of corrupted views:
    ours, as in MoCo v3 (arXiv 2104.02057).

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> teacher = Teacher(encoder, nn.Linear(24, 5)).train()
    >>> teacher(torch.zeros(2, 4, 256), (2, 2)).shape, teacher.encoder.training
    (torch.Size([2, 5, 24]), False)
    """

    def __init__(self, encoder: VisionTransformer, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = copy.deepcopy(encoder), copy.deepcopy(head)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> Teacher:
        """Always eval mode, but for BatchNorm."""
        super().train(False)
        for module in self.modules():
            if isinstance(module, BatchNormOverRanks):
                module.train(mode)
        return self

    @torch.no_grad()
    def forward(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Clean patch rows ``[B, N, C*P*P]`` -> tokens after the final norm ``[B, 1 + N, D]``."""
        embedded = self.encoder.embed_patches(rows, grid)
        (tokens,) = self.encoder.outputs_of(embedded, [self.encoder.depth - 1])
        return self.encoder.norm(tokens)

    def follow(self, encoder: VisionTransformer, head: nn.Module, momentum: float) -> None:
        """Move the weights ``1 - momentum`` of the way to the student's; its buffers are copied."""
        average(self.encoder, encoder, momentum)
        average(self.head, head, momentum)


class TaughtGMML(GMML):
    """GMML beside a head whose outputs a teacher's are compared with: what SiT and MC-SSL share.

    Parameters
    ----------
    reconstruction_weight
        of the loss on hidden pixels, beside what is learned from the teacher.
    teacher_momentum
        at the start; 1 at the end of the run.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        head: ReconstructionHead,
        projection: nn.Module,
        *,
        reconstruction_weight: float,
        teacher_momentum: float,
    ) -> None:
        super().__init__(encoder, head)
        self.projection = projection
        self.teacher = Teacher(encoder, projection)
        self.reconstruction_weight = reconstruction_weight
        self.first_momentum = self.momentum = teacher_momentum

    def begin_step(self, progress: Progress) -> None:
        """The teacher's momentum."""
        self.momentum = momentum_at(progress, self.first_momentum)

    def end_step(self) -> None:
        """The teacher follows."""
        self.teacher.follow(self.encoder, self.projection, self.momentum)


def momentum_at(progress: Progress, start: float) -> float:
    """The teacher's momentum: from ``start`` to 1 by half a cosine over the run (BYOL, DINO).

    >>> [round(momentum_at(Progress(s, 10, 100), 0.996), 4) for s in (0, 50, 100)]
    [0.996, 0.998, 1.0]
    """
    done = min(progress.step / max(progress.total_steps, 1), 1.0)
    return 1.0 - (1.0 - start) * (1.0 + math.cos(math.pi * done)) / 2
