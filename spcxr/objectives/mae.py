"""MAE on group masks: encode the visible patches alone, rebuild the pixels of the others.

MAE (arXiv 2111.06377) with the groups of GMML instead of single patches: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spcxr.models.mae_decoder import MAEDecoder
from spcxr.models.vit import VisionTransformer
from spcxr.ops.masked_patch_gather import visible_patch_gather
from spcxr.ops.masked_reconstruction_loss import masked_reconstruction_loss
from spcxr.ops.views import Fill, Views


class MAE(nn.Module):
    """Encoder and decoder: visible patches, packed without padding -> MSE on the hidden ones.

    Whole patches are hidden; what would fill them is not looked at.

    >>> from spcxr.objectives.corruption import Corruption, sample_fill
    >>> from spcxr.ops.views import whole_views
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> views = whole_views(torch.zeros(2, 1, 32, 32), patch_px=16)
    >>> law = Corruption(alien_ratio=0.0, fills=("zeros",), align_patches=True)
    >>> fill = sample_fill(torch.arange(2), law, seed=0, epoch=0, size=(32, 32), patch_px=16)
    >>> sorted(build_mae(encoder)(views, fill))
    ['loss', 'mse']
    """

    def __init__(
        self, encoder: VisionTransformer, decoder: MAEDecoder, *, normalise_patches: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.normalise_patches = normalise_patches

    def reconstruct(self, views: Views, fill: Fill, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoder's guess of all patches, rows ``[B, N, C*P*P]``."""
        packed = visible_patch_gather(views, fill.mask, dtype=dtype)
        return self.decoder(self.encoder.encode_packed(packed, [views.grid]), views.grid)

    def forward(
        self, views: Views, fill: Fill, dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """One step's losses, as `GMML.forward`; ``fill.mask`` is one of patches."""
        rebuilt = self.reconstruct(views, fill, dtype)
        mse = masked_reconstruction_loss(
            rebuilt, views, fill.mask, distance="mse", normalise_patches=self.normalise_patches
        )
        return {"loss": mse, "mse": mse.detach()}


def build_mae(encoder: VisionTransformer) -> MAE:
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
    return MAE(encoder, decoder)
