"""MAE on group masks: encode the visible patches alone, rebuild the pixels of the others.

MAE (arXiv 2111.06377) with the groups of GMML instead of single patches: ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spcxr.models.mae_decoder import MAEDecoder
from spcxr.models.vit import VisionTransformer
from spcxr.objectives.objective import Objective, View
from spcxr.ops.masked_patch_gather import visible_patch_gather
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss


class MAE(Objective):
    """Encoder and decoder: visible patches, packed without padding -> MSE on the hidden ones.

    Whole patches are hidden; what would fill them is not looked at.

    >>> from spcxr.objectives.corruption import Corruption, sample_fill
    >>> from spcxr.objectives.objective import whole_view
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> law = Corruption(alien_ratio=0.0, fills=("zeros",), align_patches=True)
    >>> fill = sample_fill(torch.arange(2), law, seed=0, epoch=0, size=(32, 32), patch_px=16)
    >>> view = whole_view(torch.zeros(2, 1, 32, 32), fill, patch_px=16)
    >>> sorted(build_mae(encoder)([view]))
    ['loss', 'mse']
    """

    def __init__(
        self, encoder: VisionTransformer, decoder: MAEDecoder, *, normalise_patches: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.normalise_patches = normalise_patches

    def reconstruct(self, view: View, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoder's guess of all patches of a view whose visible ones are encoded."""
        assert view.fill is not None
        packed = visible_patch_gather(view.views, view.fill.mask, dtype=dtype)
        grid = view.views.grid
        seen = self.encoder.encode_packed(packed, [grid], view.survivors)
        return self.decoder(seen, grid)

    def forward(
        self, views: Sequence[View], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """``mse`` of the first view is the loss; its mask is one of patches."""
        view = views[0]
        assert view.fill is not None
        mse = masked_reconstruction_loss(
            self.reconstruct(view, dtype),
            view.views,
            view.fill.mask,
            distance="mse",
            normalise_patches=self.normalise_patches,
        )
        mse = mse * view.share
        return {"loss": mse, "mse": mse.detach().clone()}


def build_mae(encoder: VisionTransformer, *, normalise_patches: bool = False) -> MAE:
    """The objective around an encoder, with a fresh decoder of half its width.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> build_mae(encoder).decoder.to_pixels.out_features
    256
    """
    heads = max(encoder.heads // 2, 1)
    decoder = MAEDecoder(
        from_width=encoder.width,
        grid=encoder.grid,
        row_length=encoder.channels * encoder.patch_px**2,
        width=heads * (encoder.width // encoder.heads),
        heads=heads,
    )
    return MAE(encoder, decoder, normalise_patches=normalise_patches)
