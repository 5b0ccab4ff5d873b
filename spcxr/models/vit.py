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
from spcxr.models.blocks import Block, PatchEmbed, recomputed
from spcxr.models.drawn import draw_matrices, sine_cosine_positions
from spcxr.models.positions import resize_positions
from spcxr.models.sequences import (
    DENSE,
    Grid,
    PackedTokens,
    Sequences,
    pack_images,
    sequences_of,
)
from spcxr.ops.attention_reference import pack_key_mask
from spcxr.ops.masked_patch_gather import Packed
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
        self.drop_rates = tuple(drop_path * i / max(depth - 1, 1) for i in range(depth))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, r) for r in self.drop_rates)
        self.recompute = False  # blocks again in the backward pass: less memory, more time
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if not self.cls_token.is_meta:  # on meta: its weights are about to be read from a file
            self._initialise()

    def _initialise(self) -> None:
        """MAE's law (`drawn`): positions begin as sines and are learned from there (ours: MAE's
        stay); the patch convolution keeps torch's."""
        draw_matrices(self)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.pos_embed.data[0, 1:] = sine_cosine_positions(self.grid, self.width)

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
        tokens = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], 1)
        return tokens + resize_positions(self.pos_embed, self.grid, grid)

    def embed_packed(
        self, packed: Packed, grids: Sequence[Grid] | None = None
    ) -> tuple[PackedTokens, Sequences]:
        """Packed patch rows -> tokens with positions, and how they divide into images.

        ``packed.ids`` are numbers in the encoder's own grid, or in ``grids`` one after the other.
        """
        length = self.channels * self.patch_px**2
        if packed.tokens.ndim != 2 or packed.tokens.shape[1] != length:
            raise SpcxrError(
                f"patch rows of shape {tuple(packed.tokens.shape)}; this {self.channels}-channel "
                f"encoder takes [T, {length}]"
            )
        grids = [self.grid] if grids is None else grids
        tables = [resize_positions(self.pos_embed, self.grid, grid)[0, 1:] for grid in grids]
        sequences, patch, cls = sequences_of(
            packed.cu_seqlens, packed.ids.shape[0], max(h * w for h, w in grids)
        )
        patches = self.patch_embed.of_rows(packed.tokens)
        patches = patches + torch.cat(tables)[packed.ids.clamp(min=0)]
        first = (self.cls_token + self.pos_embed[:, :1])[0].to(patches.dtype)
        firsts = first.expand(cls.shape[0], -1)
        tokens = patches.new_zeros(patch.shape[0] + cls.shape[0], self.width)
        tokens = tokens.index_copy(0, patch, patches).index_copy(0, cls, firsts)
        ids = packed.ids.new_full((tokens.shape[0],), -1).index_copy(0, patch, packed.ids)
        assert sequences.cu_seqlens is not None
        return PackedTokens(tokens, ids, sequences.cu_seqlens), sequences

    def encode_packed(
        self,
        packed: Packed,
        grids: Sequence[Grid] | None = None,
        survivors: Tensor | None = None,
    ) -> PackedTokens:
        """Patches as `visible_patch_gather` packs them -> tokens after the final norm.

        Nothing is spent on patches that are not there; no device is waited for.

        >>> from spcxr.ops.masked_patch_gather import visible_patch_gather
        >>> from spcxr.ops.views import whole_views
        >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
        >>> views = whole_views(torch.zeros(2, 1, 32, 32, dtype=torch.uint8), patch_px=16)
        >>> hidden = torch.tensor([[[True, False], [False, False]]] * 2)
        >>> encoder.encode_packed(visible_patch_gather(views, hidden)).ids.tolist()
        [-1, 1, 2, 3, -1, 1, 2, 3]
        """
        embedded, sequences = self.embed_packed(packed, grids)
        (tokens,) = self.outputs_of(embedded.tokens, [self.depth - 1], sequences, survivors)
        return embedded._replace(tokens=self.norm(tokens))

    def encode_visible(
        self,
        images: Tensor | Sequence[Tensor],
        visible: Tensor | Sequence[Tensor] | None = None,
    ) -> PackedTokens:
        """Images of one size or of many, their visible patches alone -> tokens, packed.

        Parameters
        ----------
        images
            ``[B, C, H, W]``, or a sequence of ``[C, H, W]`` whose sides divide into patches; the
            positions are resampled for each grid, and no image is padded or distorted.
        visible
            ``[B, Gh, Gw]`` bool or one ``[Gh, Gw]`` an image, True = encoded. None: all patches.

        >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
        >>> encoder.encode_visible([torch.zeros(1, 32, 48), torch.zeros(1, 16, 16)]).cls.shape
        torch.Size([2, 24])
        """
        return self.encode_packed(*pack_images(images, visible, self.patch_px))

    def outputs_of(
        self,
        tokens: Tensor,
        blocks: Sequence[int],
        sequences: Sequences = DENSE,
        survivors: Tensor | None = None,
    ) -> list[Tensor]:
        """Tokens after chosen blocks (from 0), in the order asked for; without the final norm.

        ``survivors [B, depth, 2]``: what each image's residual branches count (`Block`).
        """
        found = {}
        for number, block in enumerate(self.blocks[: max(blocks) + 1]):
            kept = None if survivors is None else survivors[:, number]
            run = recomputed if self.recompute and torch.is_grad_enabled() else Block.__call__
            tokens = run(block, tokens, sequences, kept)
            if number in blocks:
                found[number] = tokens
        return [found[number] for number in blocks]

    def forward_features(self, images: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Images ``[B, C, H, W]`` -> all tokens after the final norm ``[B, 1 + N, D]``.

        Patches of ``key_mask [B, Gh, Gw]`` (bool, True = hidden) keep their tokens, but no token
        looks at them.

        Raises
        ------
        SpcxrError
            images that the encoder does not take, or a mask of another grid.
        """
        tokens, sequences = self.embed(images), DENSE
        if key_mask is not None:
            grid = patch_grid(images.shape[2], images.shape[3], self.patch_px)
            if tuple(key_mask.shape) != (images.shape[0], *grid) or key_mask.dtype != torch.bool:
                raise SpcxrError(
                    f"key mask is {tuple(key_mask.shape)} {key_mask.dtype}; give "
                    f"[{len(images)}, {grid[0]}, {grid[1]}] bool"
                )
            sequences = Sequences(pack_key_mask(F.pad(key_mask.flatten(1), (1, 0))))
        return self.norm(self.outputs_of(tokens, [self.depth - 1], sequences)[0])

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        visible: Tensor | Sequence[Tensor] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """The cls feature after the final norm ``[B, D]``.

        Of whole images ``[B, C, H, W]``; of their ``visible`` patches alone, or of images of
        several sizes (`encode_visible`); with patches hidden from attention by ``key_mask``
        (`forward_features`).

        >>> encoder = VisionTransformer(image_px=32, patch_px=16, width=24, depth=2, heads=3)
        >>> lung = torch.tensor([[[True, True], [False, True]]])
        >>> encoder(torch.zeros(1, 1, 32, 32), visible=lung).shape
        torch.Size([1, 24])
        """
        if visible is None and isinstance(images, Tensor):
            return self.forward_features(images, key_mask)[:, 0]
        if key_mask is not None:
            raise SpcxrError("key_mask is for whole images of one size; give it or visible")
        return self.encode_visible(images, visible).cls

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
        outputs = [self.norm(tokens) for tokens in outputs] if norm else outputs
        patches = [t[:, 1:] for t in outputs]
        if reshape:
            grid = patch_grid(x.shape[2], x.shape[3], self.patch_px)
            patches = [p.transpose(1, 2).unflatten(2, grid) for p in patches]
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
