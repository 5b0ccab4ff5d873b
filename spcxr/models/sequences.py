"""How rows of tokens divide into images, and which tokens may be looked at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spcxr.errors import SpcxrError
from spcxr.ops.masked_attention import masked_attention
from spcxr.ops.masked_patch_gather import Packed
from spcxr.ops.patches import patch_grid, patchify


class Sequences(NamedTuple):
    """What attention and stochastic depth need to know of a batch.

    Without ``cu_seqlens`` tokens are ``[B, T, D]``, every image has all of them; with it they are
    packed, ``[T, D]``: image b has the rows from ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``, at
    most ``n_max`` of them, and ``image_of_row [T]`` says whose a row is (B: padding).
    ``key_bits`` (`pack_key_mask`) hides tokens from all others.
    """

    key_bits: Tensor | None = None
    cu_seqlens: Tensor | None = None
    n_max: int | None = None
    image_of_row: Tensor | None = None

    def attend(self, qkv: Tensor) -> Tensor:
        """``[B, T, 3, h, d]`` -> ``[B, T, h*d]``, or the same without B: the encoder's attention.

        >>> Sequences().attend(torch.zeros(2, 5, 3, 4, 8)).shape
        torch.Size([2, 5, 32])
        """
        return masked_attention(
            qkv, key_mask=self.key_bits, cu_seqlens=self.cu_seqlens, n_max=self.n_max
        )

    def each_image(self, numbers: Tensor) -> Tensor:
        """One number an image, ``[B]``, shaped to multiply tokens."""
        if self.image_of_row is None:
            return numbers[:, None, None]
        padded = torch.cat([numbers, numbers.new_ones(1)])
        return padded[self.image_of_row][:, None]


DENSE = Sequences()


class PackedTokens(NamedTuple):
    """Encoded images without padding between them: the cls token of each, then its patches.

    ``tokens [T, D]``; ``ids [T]`` int32, the number of a patch in its image, -1 for a cls token and
    for padding; ``cu_seqlens [B + 1]`` int32, the row of each image's cls token.
    """

    tokens: Tensor
    ids: Tensor
    cu_seqlens: Tensor

    @property
    def cls(self) -> Tensor:
        """The cls token of each image, ``[B, D]``."""
        return self.tokens[self.cu_seqlens[:-1]]

    @property
    def cls_and_mean(self) -> Tensor:
        """Concat(cls, mean of the patches that are there) of each image, ``[B, 2D]``.

        0 for the mean of no patch. Nothing is padded, no device is waited for, and the order of
        the sums is fixed.

        >>> tokens = torch.tensor([[1.0], [2.0], [4.0], [7.0], [8.0], [0.0]])
        >>> ids, starts = torch.tensor([-1, 0, 3, -1, 2, -1]), torch.tensor([0, 3, 5])
        >>> PackedTokens(tokens, ids.int(), starts.int()).cls_and_mean.tolist()
        [[1.0, 3.0], [7.0, 8.0]]
        """
        images, rows = self.cu_seqlens.shape[0] - 1, self.tokens.shape[0]
        counts = self.cu_seqlens.diff().long()
        # Segments in turn: a cls token, its patches; last the rows that are padding.
        padding = rows - self.cu_seqlens[-1:].long()
        pairs = torch.stack([torch.ones_like(counts), counts - 1], 1).flatten()
        lengths = torch.cat([pairs, padding])
        # unsafe: checking that the lengths add up would wait for the device; they do.
        means = torch.segment_reduce(self.tokens, "mean", lengths=lengths, unsafe=True, initial=0.0)
        return means[: 2 * images].reshape(images, 2 * self.tokens.shape[1])


def sequences_of(starts: Tensor, rows: int, most: int) -> tuple[Sequences, Tensor, Tensor]:
    """Patches packed from ``starts [B + 1]`` on, with room made for a cls token an image.

    Returns the sequences, the new row of each of the ``rows`` patches, and that of each cls token.

    >>> starts = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> sequences, patches, cls = sequences_of(starts, rows=4, most=2)
    >>> sequences.cu_seqlens.tolist(), patches.tolist(), cls.tolist()
    ([0, 3, 5], [1, 2, 4, 5], [0, 3])
    """
    images = starts.shape[0] - 1
    numbers = torch.arange(images + 1, dtype=torch.int32, device=starts.device)
    cu_seqlens = starts + numbers
    patch = torch.arange(rows, dtype=torch.int32, device=starts.device)
    owner = torch.searchsorted(starts[1:].contiguous(), patch, right=True)
    row = torch.arange(rows + images, dtype=torch.int32, device=starts.device)
    image_of_row = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True)
    sequences = Sequences(None, cu_seqlens, 1 + most, image_of_row)
    return sequences, patch + (owner + 1).clamp(max=images), cu_seqlens[:-1].long()


Grid = tuple[int, int]


def pack_images(
    images: Tensor | Sequence[Tensor], visible: Tensor | Sequence[Tensor] | None, patch_px: int
) -> tuple[Packed, list[Grid]]:
    """Patch rows of images ``[C, H, W]``, of one size or of many, and their distinct grids.

    With ``visible`` (bool ``[Gh, Gw]`` an image) those alone; how many they are is waited for.
    ``ids`` count through the grids one after the other: patch n of the k-th has the number n, plus
    the patches of the grids before it.

    Raises
    ------
    SpcxrError
        no image, sides that do not divide into patches, or masks that do not fit the images.

    >>> packed, grids = pack_images([torch.zeros(1, 32, 16), torch.zeros(1, 16, 16)], None, 16)
    >>> packed.ids.tolist(), packed.cu_seqlens.tolist(), grids
    ([0, 1, 2], [0, 2, 3], [(2, 1), (1, 1)])
    """
    if len(images) == 0 and not isinstance(images, Tensor):
        raise SpcxrError("no images to pack; give one at least")
    if bad := [list(image.shape) for image in images if image.ndim != 3]:
        raise SpcxrError(f"an image of shape {bad[0]}; give [C, H, W]")
    if visible is not None and len(visible) != len(images):
        raise SpcxrError(f"{len(visible)} masks for {len(images)} images; give one each")
    if isinstance(images, Tensor):
        batches = [images]
        masks = [None if visible is None else _one_tensor(visible, images)]
    else:
        batches = [image[None] for image in images]
        masks = [None] * len(images) if visible is None else [mask[None] for mask in visible]
    grids = [patch_grid(batch.shape[2], batch.shape[3], patch_px) for batch in batches]
    distinct = list(dict.fromkeys(grids))
    before = dict(zip(distinct, accumulate((h * w for h, w in distinct), initial=0), strict=False))
    found = [
        _visible_rows(batch, mask, grid, patch_px)
        for batch, mask, grid in zip(batches, masks, grids, strict=True)
    ]
    rows, numbers, counts = zip(*found, strict=True)
    ids = [n + before[grid] for n, grid in zip(numbers, grids, strict=True)]
    starts = F.pad(torch.cat(counts).cumsum(0), (1, 0)).int()
    return Packed(torch.cat(rows), torch.cat(ids), starts), distinct


def _one_tensor(masks: Tensor | Sequence[Tensor], images: Tensor) -> Tensor:
    if isinstance(masks, Tensor):
        return masks
    if len({mask.shape for mask in masks}) > 1:
        raise SpcxrError("masks of several sizes for images of one; give bool of the patch grid")
    return torch.stack(list(masks)) if masks else images.new_zeros((0, 0, 0), dtype=torch.bool)


def _visible_rows(
    images: Tensor, visible: Tensor | None, grid: Grid, patch_px: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[T, C*P*P]`` and numbers ``[T]`` of the patches, and how many each image has."""
    batch, count = len(images), grid[0] * grid[1]
    rows = patchify(images, patch_px)
    numbers = torch.arange(count, dtype=torch.int32, device=images.device).expand(batch, count)
    if visible is None:
        counts = torch.full((batch,), count, device=images.device)
        return rows.flatten(0, 1), numbers.flatten(), counts
    if tuple(visible.shape[1:]) != grid or visible.dtype != torch.bool:
        raise SpcxrError(
            f"visible is {tuple(visible.shape[1:])} {visible.dtype} for an image of "
            f"{grid[0]}x{grid[1]} patches; give bool of that grid"
        )
    kept = visible.flatten(1)
    # Of a mask on the CPU the places are found there: a GPU is then not waited for.
    places = kept.flatten().nonzero()[:, 0].to(images.device)
    counts = kept.sum(1).to(images.device)
    return rows.flatten(0, 1)[places], numbers.flatten()[places], counts
