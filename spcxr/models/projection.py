"""Heads in whose space images are compared: SiT's projection, DINO's prototypes.

Neither is part of the exported encoder. Both are computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcxr.models.over_ranks import BatchNormOverRanks


class ProjectionHead(nn.Module):
    """Image features -> unit vectors: 3 linear layers, a BatchNorm after each.

    SiT (arXiv 2104.03602) has 256 outputs and BatchNorm. What is not known of it is ours: the form
    of MoCo v3 (arXiv 2104.02057; ReLU between the layers, no biases, no scale in the last norm),
    as wide inside as the encoder's MLP.

    >>> head = ProjectionHead(width=24)
    >>> head(torch.randn(5, 24)).norm(dim=1).round().tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """

    def __init__(self, *, width: int, outputs: int = 256) -> None:
        super().__init__()
        hidden = 4 * width
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            BatchNormOverRanks(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden, bias=False),
            BatchNormOverRanks(hidden),
            nn.ReLU(),
            nn.Linear(hidden, outputs, bias=False),
            BatchNormOverRanks(outputs, affine=False),
        )
        _initialise(self)

    def forward(self, features: Tensor) -> Tensor:
        """Features ``[B, D]`` -> ``[B, outputs]`` of length 1."""
        return F.normalize(self.layers(features), dim=-1)


class PrototypeHead(nn.Module):
    """Tokens -> their cosines with learned prototypes: the head of DINO (arXiv 2104.14294).

    3 linear layers with GELU between, a bottleneck whose vectors have length 1, and a
    weight-normalised layer without bias whose norms are fixed to 1.

    >>> head = PrototypeHead(width=24, prototypes=50)
    >>> head(torch.randn(2, 7, 24)).shape
    torch.Size([2, 7, 50])
    """

    def __init__(
        self, *, width: int, prototypes: int = 8192, hidden: int = 2048, bottleneck: int = 256
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.prototypes, std=0.02)
        _initialise(self)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[..., D]`` -> cosines ``[..., prototypes]``."""
        bottleneck = F.normalize(self.mlp(tokens), dim=-1)
        return F.linear(bottleneck, F.normalize(self.prototypes, dim=-1))


def _initialise(head: nn.Module) -> None:
    """DINO's law: truncated normal of std .02, zero biases."""
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
