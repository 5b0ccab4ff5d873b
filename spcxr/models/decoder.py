"""Segmentation: encoder and decoder. Three decoders, of MONAI's blocks in two dimensions.

A U-Net that the encoder joins at the bottom (the default, ours), UNETR (arXiv 2103.10504; the only
decoder named in this line of work, Tiny Lungs; the paper's own is not known), and light ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from monai.networks.blocks import (
    Convolution,
    ResidualUnit,
    UnetrBasicBlock,
    UnetrPrUpBlock,
    UnetrUpBlock,
)
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
        raise SpcxrError(f"an encoder of {depth} blocks; the decoders read 4 depths")
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


class UNetDecoder(nn.Module):
    """A U-Net of the image (arXiv 1505.04597) at whose bottom the encoder's features join in.

    Borders are drawn from the image by the U-Net, which learns them from few masks; what is where
    it hears from the encoder, at the bottom alone, so nothing coarse is brought up by itself as in
    UNETR. Ours; the U-Net's blocks are those of MONAI's ``UNet`` (residual units, strided and
    transposed convolutions, instance norm).

    Parameters
    ----------
    width
        D of the encoder.
    patch_px
        16 or 8: four or three halvings lead to its grid.
    out_channels
        K, one plane of logits per class.
    channels
        of the image.
    base_channels
        at a half of the resolution; half as many at the full one, twice at each coarser level.
    deep
        while training, logits at a half and a quarter of the resolution are given too.

    Raises
    ------
    SpcxrError
        another patch size.

    >>> decoder = UNetDecoder(width=24, patch_px=16, out_channels=2, base_channels=4)
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
        deep: bool = False,
    ) -> None:
        super().__init__()
        if patch_px not in STEPS:
            raise SpcxrError(f"patches of {patch_px} px; the U-Net decoder takes 16 or 8")
        # Channels of each level, from the image's own resolution to the bottom.
        sides = [base_channels * 2**k // 2 for k in range(int(math.log2(patch_px)) + 2)]
        deepest, bottom = sides[-2:]
        self.down = nn.ModuleList(
            ResidualUnit(2, before, after, strides=2, subunits=2)
            for before, after in zip([channels, *sides[1:-2]], sides[1:-1], strict=True)
        )
        self.joined = nn.Conv2d(4 * width, deepest, kernel_size=1)
        self.bottom = ResidualUnit(2, 2 * deepest, bottom, subunits=2)
        below = [bottom + deepest, *(2 * side for side in reversed(sides[1:-2]))]
        self.up = nn.ModuleList(map(_rise, below, reversed(sides[:-2])))
        heads = [nn.Conv2d(side, out_channels, kernel_size=1) for side in sides[: 3 if deep else 1]]
        self.out = nn.ModuleList(heads)

    def forward(self, images: Tensor, features: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Images ``[B, C, H, W]`` and four features ``[B, D, Gh, Gw]``, shallow to deep.

        Returns logits as `UNETRDecoder` does.
        """
        skips, x = [], images
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = self.bottom(torch.cat([x, self.joined(torch.cat(list(features), 1))], 1))
        found = []
        for up in self.up:
            x = up(torch.cat([x, skips.pop()], 1))
            found.append(x)
        logits = tuple(out(x) for out, x in zip(self.out, reversed(found), strict=False))
        return logits if self.training and len(logits) > 1 else logits[0]


def _rise(in_channels: int, channels: int) -> nn.Module:
    """One step up of a U-Net: twice the resolution, then a residual unit."""
    return nn.Sequential(
        Convolution(2, in_channels, channels, strides=2, is_transposed=True),
        ResidualUnit(2, channels, channels, subunits=1),
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
    deep
        while training, logits at a half and a quarter of the resolution are given too.

    Raises
    ------
    SpcxrError
        another patch size.

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
        deep: bool = False,
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
        self.out2 = nn.Conv2d(c2, out_channels, kernel_size=1) if deep else None
        self.out4 = nn.Conv2d(c4, out_channels, kernel_size=1) if deep else None

    def forward(self, images: Tensor, features: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """Images ``[B, C, H, W]`` and four features ``[B, D, Gh, Gw]``, shallow to deep.

        Returns logits ``[B, K, H, W]``; while a deep one is trained, those of a half and a quarter
        of the resolution with them, fine to coarse.
        """
        z3, z6, z9, z12 = features
        x = self.decoder5(z12, self.encoder4(z9))
        quarter = self.decoder4(x, self.encoder3(z6))
        half = self.decoder3(quarter, self.encoder2(z3))
        logits: Tensor = self.out(self.decoder2(half, self.encoder1(images)))
        if self.out2 is None or self.out4 is None or not self.training:
            return logits
        return logits, self.out2(half), self.out4(quarter)


class PatchDecoder(nn.Module):
    """A light decoder for few labels: the patch features of four depths -> logits, brought up.

    Every patch is judged by itself, and the logits are resampled bilinearly to the image's size
    (SETR's naive decoder and DINOv2's linear evaluation, arXiv 2012.15840 and 2304.07193, both from
    several depths). Borders are as smooth as the patches are large.

    Parameters
    ----------
    width
        D of the encoder.
    out_channels
        K, one plane of logits per class.
    hidden
        units of one hidden layer; 0: none, a linear decoder.

    >>> decoder = PatchDecoder(width=24, out_channels=2)
    >>> decoder(torch.zeros(1, 1, 32, 48), [torch.zeros(1, 24, 2, 3)] * 4).shape
    torch.Size([1, 2, 32, 48])
    """

    def __init__(self, *, width: int, out_channels: int, hidden: int = 0) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(4 * width, hidden or out_channels, kernel_size=1)]
        if hidden:
            layers += [nn.GELU(), nn.Conv2d(hidden, out_channels, kernel_size=1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor, features: Sequence[Tensor]) -> Tensor:
        """Four features ``[B, D, Gh, Gw]`` -> logits ``[B, K, H, W]`` at the images' size."""
        logits = self.layers(torch.cat(list(features), 1))
        size = (images.shape[2], images.shape[3])
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


DECODERS: dict[str, Any] = {"unet": UNetDecoder, "unetr": UNETRDecoder}


def build_decoder(task: Mapping[str, Any], encoder: VisionTransformer) -> nn.Module:
    """The decoder that the ``task`` of a segmentation model's ``config.json`` asks for.

    Raises
    ------
    SpcxrError
        an encoder it does not fit, or a kind that is not known.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> type(build_decoder({"structures": ["lung"], "decoder": "mlp"}, encoder)).__name__
    'PatchDecoder'
    """
    kind, classes = task.get("decoder", "unetr"), 1 + len(task["structures"])
    if kind in {"linear", "mlp"}:
        hidden = encoder.width if kind == "mlp" else 0
        return PatchDecoder(width=encoder.width, out_channels=classes, hidden=hidden)
    if kind not in DECODERS:
        raise SpcxrError(f"decoder {kind!r} is not known; use a newer spcxr")
    return DECODERS[kind](
        width=encoder.width,
        patch_px=encoder.patch_px,
        out_channels=classes,
        channels=encoder.channels,
        base_channels=task.get("base_channels", 16),
        deep=bool(task.get("deep_supervision", False)),
    )


# --- encoder and decoder ---------------------------------------------------------------------

Look = Callable[[Tensor], Tensor]


class Framing(Protocol):
    """How an image that is larger than the encoder's input is looked at, part by part."""

    @property
    def image_px(self) -> tuple[int, int]:
        """(height, width) of the images it takes."""

    def __call__(self, look: Look, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B, K, H, W]``; ``look`` does it at the encoder's
        size."""


class Segmenter(nn.Module):
    """Encoder and decoder: images ``[B, C, H, W]`` -> logits ``[B, K, H, W]``, background first.

    All four features pass the encoder's final norm (ours; UNETR norms the last one only): their
    scale then does not depend on how the encoder was pretrained.

    ``framing`` looks at larger images part by part. It is no part of the weights: while the model
    is trained it is shown the parts themselves.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
    >>> decoder = UNETRDecoder(width=24, patch_px=16, out_channels=2, base_channels=4)
    >>> Segmenter(encoder, decoder)(torch.zeros(1, 1, 32, 32)).shape
    torch.Size([1, 2, 32, 32])
    """

    def __init__(
        self, encoder: VisionTransformer, decoder: nn.Module, framing: Framing | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.framing = framing
        self.blocks_read = decoder_blocks(encoder.depth)

    @property
    def image_px(self) -> tuple[int, int]:
        """(height, width) of the images it takes once it is trained."""
        return self.encoder.image_px if self.framing is None else self.framing.image_px

    def forward(self, images: Tensor) -> Any:
        """Images ``[B, C, H, W]`` -> logits ``[B, K, H, W]``; of a deep decoder in training, a
        tuple of several."""
        if self.framing is None or self.training:
            return self.look(images)
        return self.framing(self.look, images)

    def look(self, images: Tensor) -> Any:
        """The same at the encoder's size, all at once."""
        features = self.encoder.get_intermediate_layers(images, self.blocks_read, reshape=True)
        return self.decoder(images, features)
