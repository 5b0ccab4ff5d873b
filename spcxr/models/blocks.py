"""The layers of the vision transformer, with timm's parameter names.

Tokens are ``[B, T, D]``, or packed ``[T, D]``; `Sequences` says which, and whom they may look at.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spcxr.models.sequences import DENSE, Sequences


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a residual branch per image, rescale the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(
        self, tokens: Tensor, branch: Tensor, sequences: Sequences, factor: Tensor | None = None
    ) -> Tensor:
        """Tokens and a branch of theirs -> their sum.

        ``factor [B]`` is what the branch of each image counts (`sample_survivors` draws it); None:
        drawn here from torch's generator, or 1 in eval mode and at rate 0.
        """
        if factor is None and self.training and self.rate > 0.0:
            starts = sequences.cu_seqlens
            images = branch.shape[0] if starts is None else starts.shape[0] - 1
            factor = branch.new_empty(images).bernoulli_(1.0 - self.rate) / (1.0 - self.rate)
        if factor is None:
            return tokens + branch
        return torch.addcmul(tokens, branch, sequences.each_image(factor.to(branch.dtype)))


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, sequences: Sequences = DENSE) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``, or packed ``[T, D]`` -> ``[T, D]``."""
        qkv = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))
        return self.proj(sequences.attend(qkv))


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width, int(width * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(
        self, tokens: Tensor, sequences: Sequences = DENSE, survivors: Tensor | None = None
    ) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``, or packed ``[T, D]`` -> ``[T, D]``.

        ``survivors [B, 2]``: what attention's and the MLP's branch of each image count.
        """
        first, second = (None, None) if survivors is None else survivors.unbind(1)
        branch = self.attn(self.norm1(tokens), sequences)
        tokens = self.drop_path(tokens, branch, sequences, first)
        return self.drop_path(tokens, self.mlp(self.norm2(tokens)), sequences, second)


def recomputed(
    block: nn.Module, tokens: Tensor, sequences: Sequences, survivors: Tensor | None
) -> Tensor:
    """``block(...)``, whose insides are computed again in the backward pass instead of kept."""
    # Branches that draw for themselves must draw alike again.
    drawn = survivors is None
    answer: Tensor = checkpoint(
        block, tokens, sequences, survivors, use_reentrant=False, preserve_rng_state=drawn
    )
    return answer


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map, kept as a convolution (timm's key)."""

    def __init__(self, patch_px: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_px, stride=patch_px)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, C, H, W]`` -> ``[B, N, D]``."""
        return self.proj(images).flatten(2).transpose(1, 2)

    def of_rows(self, rows: Tensor) -> Tensor:
        """The same of images that are cut into patch rows ``[B, N, C*P*P]`` already."""
        return F.linear(rows, self.proj.weight.flatten(1), self.proj.bias)
