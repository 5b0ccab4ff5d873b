"""Heads on the encoder's tokens: reconstruction (pretraining) and classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spcxr.models.drawn import draw_matrices
from spcxr.models.regions import LungSource
from spcxr.models.sequences import PackedTokens
from spcxr.models.vit import VisionTransformer


class ReconstructionHead(nn.Module):
    """Tokens -> pixels: 3 x (Linear D->D, GELU), then one Linear D -> C*P*P per token.

    The last map equals a transposed convolution of kernel = stride = P, for grids of any shape.
    The head of GMML (arXiv 2205.14986) and its successors. It is not part of the exported encoder.

    >>> head = ReconstructionHead(width=24, patch_px=16)
    >>> head(torch.zeros(2, 6, 24)).shape
    torch.Size([2, 6, 256])
    """

    def __init__(self, *, width: int, patch_px: int, channels: int = 1, layers: int = 3) -> None:
        super().__init__()
        self.patch_px, self.channels = patch_px, channels
        hidden = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.GELU())]
        self.mlp = nn.Sequential(*hidden)
        self.to_pixels = nn.Linear(width, channels * patch_px * patch_px)
        draw_matrices(self)

    def forward(self, patches: Tensor) -> Tensor:
        """Patch tokens ``[B, N, D]`` -> patch rows ``[B, N, C*P*P]`` (see `ops.patches`)."""
        return self.to_pixels(self.mlp(patches))


class ClassificationHead(nn.Module):
    """Logits from concat(cls, mean patch), standardised: one Linear 2D -> K.

    Source: DINO's linear evaluation (arXiv 2104.14294): cls and the mean of the patch tokens, both
    after the encoder's final norm; weights N(0, .01), zero bias. (medical_mae reads one of the
    two, MAE's way.) Ours: each feature less its mean over training images, over its deviation, as
    `standardise` found them at the start; MAE's linear probe has a BatchNorm there. Pretrained
    features differ little between images, and a head on them as they are hardly learns.

    >>> head = ClassificationHead(width=24, classes=3)
    >>> head(torch.zeros(2, 7, 24)).shape
    torch.Size([2, 3])
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, *, width: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * width, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)
        self.register_buffer("mean", torch.zeros(2 * width))
        self.register_buffer("deviation", torch.ones(2 * width))

    @staticmethod
    def features(tokens: Tensor | PackedTokens) -> Tensor:
        """Normed tokens ``[B, 1 + N, D]``, cls first, or packed -> ``[B, 2D]``, not yet
        standardised."""
        if isinstance(tokens, PackedTokens):
            return tokens.cls_and_mean
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)

    def standardise(self, features: Tensor) -> None:
        """Keep mean and deviation of ``features [n, 2D]``; a feature that hardly varies is not
        blown up to more than ten times the others."""
        deviation, mean = torch.std_mean(features.float(), 0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=0.1 * float(deviation.mean()) + 1e-6))

    def forward(self, tokens: Tensor | PackedTokens) -> Tensor:
        """Normed tokens ``[B, 1 + N, D]``, cls first, or packed -> logits ``[B, K]``."""
        return self.of_features(self.features(tokens))

    def of_features(self, features: Tensor) -> Tensor:
        """Features ``[B, 2D]``, not yet standardised -> logits ``[B, K]``."""
        return self.fc((features - self.mean) / self.deviation)


def tokens_read(
    encoder: VisionTransformer, images: Tensor, visible: Tensor | None
) -> Tensor | PackedTokens:
    """Normed tokens of whole images ``[B, C, H, W]``, or packed ones of their visible patches.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> corner = torch.tensor([[[True, False], [False, False]]])
    >>> tokens_read(encoder, torch.zeros(1, 1, 32, 32), corner).tokens.shape
    torch.Size([2, 24])
    """
    if visible is None:
        return encoder.forward_features(images)
    return encoder.encode_visible(images, visible)


class Features(nn.Module):
    """What a head or a probe reads: images ``[B, C, H, W]`` -> concat(cls, mean patch) ``[B, 2D]``.

    ``lungs`` is as in `Classifier`.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> Features(encoder)(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 48])
    """

    def __init__(self, encoder: VisionTransformer, lungs: LungSource | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.lungs = lungs

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Images ``[B, C, H, W]``, all patches or the visible ones -> ``[B, 2D]``, not
        standardised."""
        return ClassificationHead.features(tokens_read(self.encoder, images, visible))


class Classifier(nn.Module):
    """Encoder and classification head: images ``[B, C, H, W]`` -> logits ``[B, K]``.

    With ``visible`` the encoder is given those patches alone and the head reads concat(cls, mean
    of them): a patch that is left out costs nothing and tells nothing.

    Parameters
    ----------
    lungs
        how the prediction loop finds the lungs whose patches are to be read
        (`spcxr.models.regions`); None: whole images. It is not asked by ``forward``.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> model = Classifier(encoder, ClassificationHead(width=24, classes=3))
    >>> model(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 3])
    >>> model(torch.zeros(1, 1, 32, 32), torch.tensor([[[True, False], [False, True]]])).shape
    torch.Size([1, 3])
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        head: nn.Module,
        lungs: LungSource | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.lungs = lungs

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """Images ``[B, C, H, W]``, all patches or the ``visible [B, Gh, Gw]`` bool ones -> logits
        ``[B, K]``.

        Raises
        ------
        SpcxrError
            images that the encoder does not take, or a mask of another grid.
        """
        return self.head(tokens_read(self.encoder, images, visible))
