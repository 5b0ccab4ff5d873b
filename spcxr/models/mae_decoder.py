"""The decoder of masked autoencoders: visible tokens -> pixels of every patch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spcxr.errors import SpcxrError
from spcxr.models.blocks import Block
from spcxr.models.drawn import draw_matrices, sine_cosine_positions
from spcxr.models.positions import resize_positions
from spcxr.models.sequences import Grid, PackedTokens
from spcxr.ops.checks import values_seen


class MAEDecoder(nn.Module):
    """A light transformer over the visible tokens and one learned token for each hidden patch.

    After MAE (arXiv 2111.06377): Linear D -> width, mask tokens, positions, blocks, LayerNorm,
    Linear -> C*P*P. Ours: positions are learned, from sines on;
    half of the encoder's width and four blocks (MAE: 512 and eight), since the encoder is kept.

    >>> decoder = MAEDecoder(from_width=24, grid=(2, 2), row_length=256, width=12, heads=3)
    >>> starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> ids = torch.tensor([-1, 3, -1], dtype=torch.int32)
    >>> decoder(PackedTokens(torch.zeros(3, 24), ids, starts), (2, 2)).shape
    torch.Size([2, 4, 256])
    """

    def __init__(
        self,
        *,
        from_width: int,
        grid: Grid,
        row_length: int,
        width: int,
        heads: int,
        depth: int = 4,
    ) -> None:
        super().__init__()
        if width % heads:
            raise SpcxrError(f"width {width} does not divide into {heads} heads; change either")
        self.grid = grid
        self.embed = nn.Linear(from_width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        self.blocks = nn.ModuleList(Block(width, heads, 4.0, 0.0) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.to_pixels = nn.Linear(width, row_length)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        draw_matrices(self)
        self.pos_embed.data[0, 1:] = sine_cosine_positions(grid, width)

    def forward(self, seen: PackedTokens, grid: Grid) -> Tensor:
        """Encoded visible tokens -> patch rows ``[B, N, C*P*P]`` of all patches of ``grid``."""
        tokens = self._placed(self.embed(seen.tokens), seen, 1 + grid[0] * grid[1])
        tokens = tokens + resize_positions(self.pos_embed, self.grid, grid)
        for block in self.blocks:
            tokens = block(tokens)
        return self.to_pixels(self.norm(tokens)[:, 1:])

    def _placed(self, rows: Tensor, seen: PackedTokens, length: int) -> Tensor:
        """Rows ``[T, width]`` at their places in ``[B, length, width]``, mask tokens elsewhere."""
        if values_seen(seen.ids) and len(seen.ids) and int(seen.ids.max()) + 1 >= length:
            raise SpcxrError(
                f"patch {int(seen.ids.max())} of a grid of {length - 1} patches; decode images of "
                "one size at a time"
            )
        images = seen.cu_seqlens.shape[0] - 1
        numbers = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        image = torch.searchsorted(seen.cu_seqlens[1:].contiguous(), numbers, right=True)
        # Rows of padding belong to an image past the last, which is cut off.
        place = image * length + seen.ids.long() + 1
        empty = self.mask_token.to(rows.dtype).expand((images + 1) * length, -1)
        return empty.index_copy(0, place, rows)[: images * length].unflatten(0, (images, length))
