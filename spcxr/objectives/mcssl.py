"""MC-SSL: rebuild what groups of patches hid, and agree with a teacher on what images and patches
are.

arXiv 2111.15340, with the numbers of DiCoM (arXiv 2402.15534), the successor of SPCXR. Rewritten
from the papers; the self-distillation is DINO's (arXiv 2104.14294).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.models.heads import ReconstructionHead
from spcxr.models.over_ranks import sum_over_ranks
from spcxr.models.projection import PrototypeHead
from spcxr.models.vit import VisionTransformer
from spcxr.objectives.gmml import build_gmml, rebuilding_loss
from spcxr.objectives.objective import Progress, View, together
from spcxr.objectives.teacher import TaughtGMML

STUDENT_TEMPERATURE = 0.1
FIRST_TEMPERATURE, SOFTENING_EPOCHS = 0.04, 30.0  # the teacher's, and how long it takes to rise
CENTRE_MOMENTUM = 0.9
FROZEN_EPOCHS = 1.0  # of the prototypes
GLOBAL = 2  # views that are corrupted, and that the teacher sees clean


class MCSSL(TaughtGMML):
    """GMML (MSE) on two views; cross-entropy with the teacher's view of images and of patches.

    The cls tokens of two corrupted views and of small clean ones guess the teacher's of every other
    view; each patch token of a corrupted view guesses the teacher's of the same patch, clean. Cls
    and patches have one head (ours; iBOT, arXiv 2111.07832, finds it better than two) and a centre
    each; all patches count, hidden or not, and the three losses count alike (ours).

    Logits of the patches take most memory: ``2 B * N * prototypes`` floats in each of the
    student's, the teacher's, their softmaxes and a gradient: 103 MB each at B = 8 in 224 px / 16.

    Parameters
    ----------
    teacher_temperature
        after 30 epochs; it rises from .04, or does not where this is less.

    >>> from spcxr.objectives.corruption import Corruption, sample_fill
    >>> from spcxr.objectives.objective import whole_view
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> ids, images = torch.arange(2), torch.zeros(2, 1, 32, 32)
    >>> fill = sample_fill(ids, Corruption(), seed=0, epoch=0, size=(32, 32), patch_px=16)
    >>> view = whole_view(images, fill, patch_px=16)
    >>> local = whole_view(images[..., :16, :16], None, patch_px=16)
    >>> sorted(build_mcssl(encoder, prototypes=50)([view, view, local]))
    ['cls', 'loss', 'mse', 'patch']
    """

    centres: Tensor
    seen: Tensor
    seen_count: Tensor

    def __init__(
        self,
        encoder: VisionTransformer,
        head: ReconstructionHead,
        projection: PrototypeHead,
        *,
        reconstruction_weight: float = 1.0,
        teacher_momentum: float = 0.996,
        teacher_temperature: float = 0.07,
    ) -> None:
        super().__init__(
            encoder,
            head,
            projection,
            reconstruction_weight=reconstruction_weight,
            teacher_momentum=teacher_momentum,
        )
        self.last_temperature = teacher_temperature
        self.temperature = min(FIRST_TEMPERATURE, teacher_temperature)
        self.frozen = False
        count = len(projection.prototypes)
        self.register_buffer("centres", torch.zeros(2, count))  # of cls, of patches
        # Sums of the teacher's logits in this step, and of how many.
        self.register_buffer("seen", torch.zeros(2, count), persistent=False)
        self.register_buffer("seen_count", torch.zeros(2, 1), persistent=False)

    def forward(
        self, views: Sequence[View], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """``loss``: ``mse`` of the corrupted views times its weight, ``cls`` and ``patch``."""
        whole, local = views[:GLOBAL], views[GLOBAL:]
        grid = whole[0].views.grid
        rows, survivors = together(whole, dtype)
        outputs = self.outputs(rows, grid, survivors)
        mse = rebuilding_loss(self.guess(outputs), whole, distance="mse")
        tokens = self.encoder.norm(outputs[-1])
        cls = [tokens[:, 0], *([self._local_cls(local, dtype)] if local else [])]
        taught = self.teacher(together(whole, dtype, clean=True)[0], grid)
        with torch.autocast(tokens.device.type, enabled=False):
            cls_aims, patch_aims = self._aims(taught.float())
            cls_logits = self.projection(torch.cat(cls).float()) / STUDENT_TEMPERATURE
            patch_logits = self.projection(tokens[:, 1:].float()) / STUDENT_TEMPERATURE
            cls_loss = between_views(cls_logits.unflatten(0, (len(views), -1)), cls_aims)
            patch_loss = F.cross_entropy(patch_logits.flatten(0, 1), patch_aims.flatten(0, 1))
        loss = self.reconstruction_weight * mse + cls_loss + patch_loss
        parts = {"mse": mse, "cls": cls_loss, "patch": patch_loss}
        return {"loss": loss} | {name: part.detach() for name, part in parts.items()}

    def _local_cls(self, views: Sequence[View], dtype: torch.dtype) -> Tensor:
        """The cls tokens of small views ``[n*B, D]``, which go through the encoder as one batch."""
        rows, survivors = together(views, dtype)
        embedded = self.encoder.embed_patches(rows, views[0].views.grid)
        (tokens,) = self.encoder.outputs_of(embedded, [self.encoder.depth - 1], survivors=survivors)
        return self.encoder.norm(tokens[:, 0])

    @torch.no_grad()
    def _aims(self, taught: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's normed tokens ``[2B, 1 + N, D]`` -> what the student is to say of cls
        tokens ``[2, B, K]`` and of patches ``[2B, N, K]``: centred, sharpened."""
        logits = self.teacher.head(taught)
        cls, patches = logits[:, 0], logits[:, 1:]
        if self.training:
            self.seen += torch.stack([cls.sum(0), patches.sum((0, 1))])
            self.seen_count += self.seen_count.new_tensor([[len(cls)], [patches[..., 0].numel()]])
        aims = [
            (said - centre).div_(self.temperature).softmax(-1)
            for said, centre in zip((cls, patches), self.centres, strict=True)
        ]
        return aims[0].unflatten(0, (GLOBAL, -1)), aims[1]

    def begin_step(self, progress: Progress) -> None:
        """The teacher's momentum and temperature; whether prototypes are frozen."""
        super().begin_step(progress)
        risen = min(progress.epoch / SOFTENING_EPOCHS, 1.0)
        first = min(FIRST_TEMPERATURE, self.last_temperature)
        self.temperature = first + (self.last_temperature - first) * risen
        self.frozen = progress.epoch < FROZEN_EPOCHS
        self.seen.zero_()
        self.seen_count.zero_()

    def end_backward(self) -> None:
        """Prototypes stay where they are in the first epoch."""
        if self.frozen:
            self.projection.prototypes.grad = None

    @torch.no_grad()
    def end_step(self) -> None:
        """The teacher follows; the centres move to the means of the step on all ranks."""
        super().end_step()
        seen = sum_over_ranks(torch.cat([self.seen, self.seen_count], 1))
        self.centres.lerp_(seen[:, :-1] / seen[:, -1:], 1.0 - CENTRE_MOMENTUM)


def between_views(logits: Tensor, aims: Tensor) -> Tensor:
    """Mean cross-entropy of views with all views of the teacher's but the same one.

    Parameters
    ----------
    logits
        ``[V, B, K]`` the student's; the first T views are the teacher's.
    aims
        ``[T, B, K]`` probabilities.

    >>> between_views(torch.zeros(3, 1, 2), torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])).exp()
    tensor(2.)
    """
    losses = torch.einsum("tbk,vbk->tv", aims, -logits.log_softmax(-1)) / logits.shape[1]
    return (losses.sum() - losses.diagonal().sum()) / (losses.numel() - len(aims))


def build_mcssl(
    encoder: VisionTransformer,
    *,
    prototypes: int = 8192,
    reconstruction_weight: float = 1.0,
    teacher_momentum: float = 0.996,
    teacher_temperature: float = 0.07,
    hidden: int = 2048,
) -> MCSSL:
    """The objective around an encoder, with fresh heads of its width and a teacher like it.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> build_mcssl(encoder, prototypes=50).centres.shape
    torch.Size([2, 50])
    """
    return MCSSL(
        encoder,
        build_gmml(encoder).head,
        PrototypeHead(width=encoder.width, prototypes=prototypes, hidden=hidden),
        reconstruction_weight=reconstruction_weight,
        teacher_momentum=teacher_momentum,
        teacher_temperature=teacher_temperature,
    )
