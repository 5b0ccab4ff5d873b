"""The vision transformer: plain, with timm's parameter names and DINO's method names.

Architecture: ViT (arXiv 2010.11929) in DeiT's sizes (arXiv 2012.12877), pre-norm, LayerNorm eps
1e-6, learned positions, one cls token. One-channel input is native; sides need not be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spcxr.errors import SpcxrError
from spcxr.ops.patches import patch_grid


class ViTSize(NamedTuple):
    """Width, depth and heads of a named size."""

    width: int
    depth: int
    heads: int


VIT_SIZES = {
    "vit_tiny": ViTSize(192, 12, 3),
    "vit_small": ViTSize(384, 12, 6),
    "vit_base": ViTSize(768, 12, 12),
    "vit_large": ViTSize(1024, 24, 16),
}


def attend(qkv: Tensor) -> Tensor:
    """Scaled dot-product attention: ``qkv [B, T, 3, h, d]`` -> ``[B, T, h*d]``.

    The one attention call of the encoder; its layout is that of the fused kernel to come.

    >>> attend(torch.zeros(2, 5, 3, 4, 8)).shape
    torch.Size([2, 5, 32])
    """
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def resize_positions(
    pos_embed: Tensor, from_grid: tuple[int, int], to_grid: tuple[int, int]
) -> Tensor:
    """Learned positions ``[1, 1 + N, D]`` resampled to another patch grid (bicubic, antialiased).

    The cls position is kept as it is; an unchanged grid returns the tensor itself.

    Raises
    ------
    SpcxrError
        the positions do not fit ``from_grid``.

    >>> resize_positions(torch.zeros(1, 1 + 4 * 4, 8), (4, 4), (2, 6)).shape
    torch.Size([1, 13, 8])
    """
    count = from_grid[0] * from_grid[1]
    if pos_embed.shape[:2] != (1, 1 + count):
        raise SpcxrError(
            f"positions of shape {tuple(pos_embed.shape)} do not fit a grid of "
            f"{from_grid[0]}x{from_grid[1]} patches and a cls token; give the grid they came from"
        )
    if from_grid == to_grid:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    planes = patches.reshape(1, *from_grid, -1).permute(0, 3, 1, 2).float()
    planes = F.interpolate(planes, to_grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, planes.flatten(2).transpose(1, 2).to(cls.dtype)], 1)


class DropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): drop a residual branch per image, rescale the rest."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """``[B, T, D]`` -> the same; the identity in eval mode or at rate 0."""
        if not self.training or self.rate == 0.0:
            return branch
        keep = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1.0 - self.rate)
        return branch * (keep / (1.0 - self.rate))


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        batch, length, width = tokens.shape
        qkv = self.qkv(tokens).view(batch, length, 3, self.heads, width // self.heads)
        return self.proj(attend(qkv))


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

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B, T, D]`` -> ``[B, T, D]``."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


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


class VisionTransformer(nn.Module):
    """A ViT encoder whose state dict has timm's keys (no head, no mask token).

    Images of another size than ``image_px`` are accepted as long as they divide into patches:
    the positions are resampled for them, as in DINO.

    Parameters
    ----------
    image_px
        sides (height, width) the positions are learned for, or one side of a square.
    patch_px
        side of a patch (8, 14 and 16 are the usual ones).
    drop_path
        stochastic depth of the last block; it grows linearly from 0 at the first.

    Raises
    ------
    SpcxrError
        sides that do not divide into patches, or a width that does not divide into heads.

    >>> encoder = VisionTransformer(image_px=(32, 48), patch_px=16, width=24, depth=2, heads=3)
    >>> encoder.forward_features(torch.zeros(5, 1, 32, 48)).shape
    torch.Size([5, 7, 24])
    >>> encoder(torch.zeros(5, 1, 64, 64)).shape
    torch.Size([5, 24])
    """

    def __init__(
        self,
        *,
        image_px: tuple[int, int] | int,
        patch_px: int,
        channels: int = 1,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise SpcxrError(f"width {width} does not divide into {heads} heads; change either")
        if not 0.0 <= drop_path < 1.0:
            raise SpcxrError(f"drop_path is {drop_path}; it must lie in [0, 1)")
        height, wide = (image_px, image_px) if isinstance(image_px, int) else image_px
        self.image_px = (height, wide)
        self.grid = patch_grid(height, wide, patch_px)
        self.patch_px, self.channels, self.width = patch_px, channels, width
        self.depth, self.heads, self.mlp_ratio = depth, heads, mlp_ratio
        count = self.grid[0] * self.grid[1]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + count, width))
        self.patch_embed = PatchEmbed(patch_px, channels, width)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, rate) for rate in rates)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._initialise()

    def _initialise(self) -> None:
        """Truncated normal of std .02, zero biases; the patch convolution keeps torch's (DeiT)."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` (normalised float) -> tokens ``[B, 1 + N, D]`` with positions.

        Raises
        ------
        SpcxrError
            another channel count, or sides that do not divide into patches.
        """
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise SpcxrError(
                f"images of shape {tuple(images.shape)}; this encoder takes "
                f"[B, {self.channels}, H, W]"
            )
        grid = patch_grid(images.shape[2], images.shape[3], self.patch_px)
        return self._with_positions(self.patch_embed(images), grid)

    def embed_patches(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patch rows ``[B, N, C*P*P]`` -> tokens ``[B, 1 + N, D]``: `embed` of the same images.

        Raises
        ------
        SpcxrError
            rows of another length or number than the encoder and the grid ask for.

        >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
        >>> encoder.embed_patches(torch.zeros(5, 6, 256), (2, 3)).shape
        torch.Size([5, 7, 24])
        """
        wanted = (grid[0] * grid[1], self.channels * self.patch_px**2)
        if rows.ndim != 3 or tuple(rows.shape[1:]) != wanted:
            raise SpcxrError(
                f"patch rows of shape {tuple(rows.shape)}; this encoder takes "
                f"[B, {wanted[0]}, {wanted[1]}] for a grid of {grid[0]}x{grid[1]}"
            )
        return self._with_positions(self.patch_embed.of_rows(rows), grid)

    def _with_positions(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        return tokens + resize_positions(self.pos_embed, self.grid, grid)

    def outputs_of(self, tokens: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Tokens after chosen blocks (from 0), in the order asked for; without the final norm."""
        found = {}
        for number, block in enumerate(self.blocks[: max(blocks) + 1]):
            tokens = block(tokens)
            if number in blocks:
                found[number] = tokens
        return [found[number] for number in blocks]

    def forward_features(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> all tokens after the final norm ``[B, 1 + N, D]``."""
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> the cls feature after the final norm ``[B, D]``."""
        return self.forward_features(images)[:, 0]

    @overload
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: Literal[False] = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...]: ...

    @overload
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int],
        reshape: bool,
        return_class_token: Literal[True],
        norm: bool = True,
    ) -> tuple[tuple[Tensor, Tensor], ...]: ...

    @overload
    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        *,
        return_class_token: Literal[True],
        norm: bool = True,
    ) -> tuple[tuple[Tensor, Tensor], ...]: ...

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Patch features after chosen blocks, shallow to deep (DINOv2's name and meaning).

        Parameters
        ----------
        n
            the last ``n`` blocks, or block numbers counted from 0.
        reshape
            ``[B, D, Gh, Gw]`` instead of ``[B, N, D]``.
        return_class_token
            pairs (patches, cls ``[B, D]``) instead of patches.
        norm
            apply the final LayerNorm to each.

        Raises
        ------
        SpcxrError
            a block number the encoder does not have.

        >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=4, heads=3)
        >>> [f.shape for f in encoder.get_intermediate_layers(torch.zeros(2, 1, 32, 32), [1, 3])]
        [torch.Size([2, 4, 24]), torch.Size([2, 4, 24])]
        """
        wanted = list(range(self.depth - n, self.depth)) if isinstance(n, int) else list(n)
        if not wanted or min(wanted) < 0 or max(wanted) >= self.depth:
            raise SpcxrError(f"blocks {n} of an encoder with {self.depth}; count from 0")
        outputs = self.outputs_of(self.embed(x), wanted)
        if norm:
            outputs = [self.norm(tokens) for tokens in outputs]
        patches = [t[:, 1:] for t in outputs]
        if reshape:
            grid = patch_grid(x.shape[2], x.shape[3], self.patch_px)
            patches = [p.transpose(1, 2).reshape(len(x), self.width, *grid) for p in patches]
        if return_class_token:
            return tuple((p, t[:, 0]) for p, t in zip(patches, outputs, strict=True))
        return tuple(patches)


def build_vit(
    name: str,
    *,
    image_px: tuple[int, int] | int,
    patch_px: int = 16,
    channels: int = 1,
    drop_path: float = 0.0,
) -> VisionTransformer:
    """A `VisionTransformer` of a named size (`VIT_SIZES`).

    Raises
    ------
    SpcxrError
        an unknown name, or sides that do not divide into patches.

    >>> build_vit("vit_tiny", image_px=32).width
    192
    >>> build_vit("vit_huge", image_px=32)
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: no encoder 'vit_huge'; choose one of: vit_tiny, ...
    """
    if name not in VIT_SIZES:
        raise SpcxrError(f"no encoder {name!r}; choose one of: {', '.join(VIT_SIZES)}")
    size = VIT_SIZES[name]
    return VisionTransformer(
        image_px=image_px,
        patch_px=patch_px,
        channels=channels,
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        drop_path=drop_path,
    )
