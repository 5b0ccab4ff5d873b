"""Segmentation: the UNETR decoder (arXiv 2103.10504) from MONAI's blocks, in two dimensions.

UNETR is the only decoder named in this line of work (Tiny Lungs); the paper's own is not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai.networks.blocks import UnetrBasicBlock, UnetrPrUpBlock, UnetrUpBlock
from torch import Tensor, nn

from spcxr.errors import SpcxrError
from spcxr.models.vit import VisionTransformer

# Upsampling of the four decoder steps, deepest first; their product is the patch side. Patch 8
# has one doubling less, so its deepest step joins two features of the same grid.
STEPS = {16: (2, 2, 2, 2), 8: (1, 2, 2, 2)}


def decoder_blocks(depth: int) -> tuple[int, ...]:
    """The four blocks (from 0) whose outputs the decoder reads: z3, z6, z9, z12 of 12.

    >>> decoder_blocks(12), decoder_blocks(4)
    ((2, 5, 8, 11), (0, 1, 2, 3))
    """
    if depth < 4:
        raise SpcxrError(f"an encoder of {depth} blocks; the UNETR decoder reads 4 depths")
    return tuple(round(depth * k / 4) - 1 for k in (1, 2, 3, 4))


def _lift(width: int, channels: int, factor: int) -> nn.Module:
    """Patch features brought up by ``factor``: a transposed convolution per doubling."""
    return UnetrPrUpBlock(
        spatial_dims=2,
        in_channels=width,
        out_channels=channels,
        num_layer=max(int(math.log2(factor)) - 1, 0),
        kernel_size=3,
        stride=1,
        upsample_kernel_size=min(factor, 2),
        norm_name="instance",
        conv_block=True,
        res_block=True,
    )


def _join(in_channels: int, channels: int, factor: int) -> nn.Module:
    """One decoder step: upsample by ``factor``, concatenate the skip, convolve."""
    return UnetrUpBlock(
        spatial_dims=2,
        in_channels=in_channels,
        out_channels=channels,
        kernel_size=3,
        upsample_kernel_size=factor,
        norm_name="instance",
        res_block=True,
    )


class UNETRDecoder(nn.Module):
    """Features of four depths and the image -> logits at the image's size.

    Parameters
    ----------
    width
        D of the encoder.
    patch_px
        16 or 8.
    out_channels
        K, one plane of logits per class.
    base_channels
        channels at full resolution (16 in UNETR); they double with each coarser level.

    Raises
    ------
    SpcxrError
        another patch size.

    >>> import torch
    >>> decoder = UNETRDecoder(width=24, patch_px=16, out_channels=2, base_channels=4)
    >>> features = [torch.zeros(1, 24, 2, 3)] * 4
    >>> decoder(torch.zeros(1, 1, 32, 48), features).shape
    torch.Size([1, 2, 32, 48])
    """

    def __init__(
        self,
        *,
        width: int,
        patch_px: int,
        out_channels: int,
        channels: int = 1,
        base_channels: int = 16,
    ) -> None:
        super().__init__()
        if patch_px not in STEPS:
            raise SpcxrError(f"patches of {patch_px} px; the UNETR decoder takes 16 or 8")
        step5, step4, step3, step2 = STEPS[patch_px]
        c1, c2, c4, c8 = (base_channels * k for k in (1, 2, 4, 8))
        self.encoder1 = UnetrBasicBlock(2, channels, c1, 3, 1, "instance", res_block=True)
        self.encoder2 = _lift(width, c2, step5 * step4 * step3)
        self.encoder3 = _lift(width, c4, step5 * step4)
        self.encoder4 = _lift(width, c8, step5)
        self.decoder5 = _join(width, c8, step5)
        self.decoder4 = _join(c8, c4, step4)
        self.decoder3 = _join(c4, c2, step3)
        self.decoder2 = _join(c2, c1, step2)
        self.out = nn.Conv2d(c1, out_channels, kernel_size=1)

    def forward(self, images: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Images ``[B, C, H, W]`` and four features ``[B, D, Gh, Gw]``, shallow to deep.

        Returns logits ``[B, K, H, W]``.
        """
        z3, z6, z9, z12 = features
        x = self.decoder5(z12, self.encoder4(z9))
        x = self.decoder4(x, self.encoder3(z6))
        x = self.decoder3(x, self.encoder2(z3))
        return self.out(self.decoder2(x, self.encoder1(images)))


class Segmenter(nn.Module):
    """Encoder and UNETR decoder: images ``[B, C, H, W]`` -> logits ``[B, K, H, W]``.

    All four features pass the encoder's final norm (ours; UNETR norms the last one only): their
    scale then does not depend on how the encoder was pretrained.

    >>> import torch
    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> decoder = UNETRDecoder(width=24, patch_px=16, out_channels=2, base_channels=4)
    >>> Segmenter(encoder, decoder)(torch.zeros(1, 1, 32, 32)).shape
    torch.Size([1, 2, 32, 32])
    """

    def __init__(self, encoder: VisionTransformer, decoder: UNETRDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.blocks_read = decoder_blocks(encoder.depth)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B, K, H, W]``."""
        features = self.encoder.get_intermediate_layers(images, self.blocks_read, reshape=True)
        return self.decoder(images, features)
