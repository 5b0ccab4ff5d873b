"""Heads on the encoder's tokens: reconstruction (pretraining) and classification."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

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
    def features(tokens: Tensor) -> Tensor:
        """Normed tokens ``[B, 1 + N, D]``, cls first -> ``[B, 2D]``, not yet standardised."""
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)

    def standardise(self, features: Tensor) -> None:
        """Keep mean and deviation of ``features [n, 2D]``; a feature that hardly varies is not
        blown up to more than ten times the others."""
        deviation, mean = torch.std_mean(features.float(), 0, correction=0)
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=0.1 * float(deviation.mean()) + 1e-6))

    def forward(self, tokens: Tensor) -> Tensor:
        """Normed tokens ``[B, 1 + N, D]``, cls first -> logits ``[B, K]``."""
        return self.of_features(self.features(tokens))

    def of_features(self, features: Tensor) -> Tensor:
        """Features ``[B, 2D]``, not yet standardised -> logits ``[B, K]``."""
        return self.fc((features - self.mean) / self.deviation)


class Features(nn.Module):
    """What a head or a probe reads: images ``[B, C, H, W]`` -> concat(cls, mean patch) ``[B, 2D]``.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> Features(encoder)(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 48])
    """

    def __init__(self, encoder: VisionTransformer) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> ``[B, 2D]``, not standardised."""
        return ClassificationHead.features(self.encoder.forward_features(images))


class Classifier(nn.Module):
    """Encoder and classification head: images ``[B, C, H, W]`` -> logits ``[B, K]``.

    >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
    >>> model = Classifier(encoder, ClassificationHead(width=24, classes=3))
    >>> model(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 3])
    """

    def __init__(self, encoder: VisionTransformer, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> logits ``[B, K]``."""
        return self.head(self.encoder.forward_features(images))
