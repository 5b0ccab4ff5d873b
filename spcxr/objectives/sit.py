"""SiT: rebuild what groups of patches hid, and know an image again in another view of it.

arXiv 2104.03602: GMML's reconstruction of two corrupted views, and a contrast between the student's
features of one and the teacher's of the other, clean. Rewritten from the paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.models.over_ranks import rows_over_ranks
from spcxr.models.projection import ProjectionHead
from spcxr.models.vit import VisionTransformer
from spcxr.objectives.gmml import build_gmml, rebuilding_loss
from spcxr.objectives.objective import View, together
from spcxr.objectives.teacher import TaughtGMML

TEMPERATURE = 0.2


class SiT(TaughtGMML):
    """GMML on two views, and InfoNCE between each and the teacher's other one.

    Queries and keys are projections of the cls token after the final norm; BatchNorm in the
    projection sees both views as one batch (ours). In training the keys are those of all ranks.

    ``reconstruction_weight`` is SiT's lambda: 1; 5 for small data.

    >>> from spcxr.objectives.corruption import Corruption, sample_fill
    >>> from spcxr.objectives.objective import whole_view
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> ids = torch.arange(2)
    >>> fill = sample_fill(ids, Corruption(), seed=0, epoch=0, size=(32, 32), patch_px=16)
    >>> view = whole_view(torch.zeros(2, 1, 32, 32), fill, patch_px=16)
    >>> sorted(build_sit(encoder)([view, view]))
    ['contrast', 'l1', 'loss']
    """

    def forward(
        self, views: Sequence[View], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """``loss``: ``l1`` of both views times its weight, and their ``contrast``."""
        grid = views[0].views.grid
        rows, survivors = together(views, dtype)
        outputs = self.outputs(rows, grid, survivors)
        l1 = rebuilding_loss(self.guess(outputs), views, distance="l1")
        cls = self.encoder.norm(outputs[-1][:, 0])
        taught = self.teacher(together(views, dtype, clean=True)[0], grid)[:, 0]
        with torch.autocast(cls.device.type, enabled=False):
            queries = self.projection(cls.float()).chunk(2)
            with torch.no_grad():
                keys = self.teacher.head(taught.float()).chunk(2)
            contrast = self._contrast(queries[0], keys[1]) + self._contrast(queries[1], keys[0])
        loss = self.reconstruction_weight * l1 + contrast
        return {"loss": loss, "l1": l1.detach(), "contrast": contrast.detach()}

    def _contrast(self, queries: Tensor, keys: Tensor) -> Tensor:
        """InfoNCE of unit vectors ``[B, d]``: which key is one's own; times 2 tau (MoCo v3)."""
        # Held-out images are looked at by every rank alone.
        found, first = rows_over_ranks(keys) if self.training else (keys, 0)
        own = torch.arange(first, first + len(queries), device=queries.device)
        return 2 * TEMPERATURE * F.cross_entropy(queries @ found.T / TEMPERATURE, own)


def build_sit(
    encoder: VisionTransformer,
    *,
    reconstruction_weight: float = 1.0,
    teacher_momentum: float = 0.996,
) -> SiT:
    """The objective around an encoder, with fresh heads of its width and a teacher like it.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> build_sit(encoder).projection.layers[-1].num_features
    256
    """
    return SiT(
        encoder,
        build_gmml(encoder).head,
        ProjectionHead(width=encoder.width),
        reconstruction_weight=reconstruction_weight,
        teacher_momentum=teacher_momentum,
    )
