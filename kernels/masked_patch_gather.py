"""masked_patch_gather and visible_patch_gather in Triton: the arithmetic of ``csrc/core/views.h``.

Corrupted views: a program makes the next `BLOCK` elements of one image's rows. Visible patches:
a program makes one row. The noise is the same bits as every other backend's.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from spcxr.kernels.philox import MAX_IMAGE_ID, key_words, normal4
from spcxr.kernels.views import bytes_of, is_hidden, place_of, view_values, views_of

NOISE_STREAM = 3  # STREAMS["noise"]; the view's number stands 8 bits higher
# FillKind of csrc/core/views.h
NOISE, ZEROS, OTHER, SHUFFLE = (tl.constexpr(kind) for kind in range(4))
BLOCK = 1024
# Every float is rounded by itself. With debug on, Triton asserts that no sum overflows; the
# generator's words do, on purpose.
EXACT = {"enable_fp_fusion": False, "sanitize_overflow": False}


class Fill(NamedTuple):
    """What a kernel is told of a fill. ``mask`` is int8; ``unit`` pixels are a cell's side."""

    mask: Any
    unit: tl.constexpr
    kind: Any
    partner: Any
    blocks: Any
    sources: Any
    n_blocks: Any
    image_ids: Any
    stream: Any


@triton.jit
def _shuffled(fill, image, row, column):
    """Where shuffle reads a pixel: the last block over it counts; under none it reads itself."""
    from_row, from_column = row, column
    k = tl.full((), 0, tl.int32)
    while k < fill.n_blocks:
        block = fill.blocks + (image * fill.n_blocks + k) * 4
        source = fill.sources + (image * fill.n_blocks + k) * 2
        down, right = row - tl.load(block), column - tl.load(block + 1)
        within = (down >= 0) & (down < tl.load(block + 2))
        within &= (right >= 0) & (right < tl.load(block + 3))
        from_row = tl.where(within, tl.load(source) + down, from_row)
        from_column = tl.where(within, tl.load(source + 1) + right, from_column)
        k += 1
    return from_row, from_column


@triton.jit
def _filling(v, fill, count, image, first, hidden, row, column, k0, k1, epoch):
    """What stands in the place of hidden elements, ``first`` and on."""
    kind = tl.load(fill.kind + image)
    tl.device_assert((kind >= 0) & (kind <= 3), "kind must be 0 to 3")
    value = tl.zeros(hidden.shape, tl.float32)
    if kind == NOISE:
        image_id = tl.load(fill.image_ids + image)
        tl.device_assert((image_id >= 0) & (image_id < MAX_IMAGE_ID), "image id not in [0, 2**48)")
        index = (first // 4 + tl.arange(0, hidden.shape[0] // 4)).to(tl.uint32)
        value = normal4(index, image_id, fill.stream, k0, k1, epoch)
    if kind >= OTHER:
        shown = image
        if kind == OTHER:
            shown = tl.load(fill.partner + image)
            tl.device_assert((shown >= 0) & (shown < count), "partner is no row of the batch")
        else:
            row, column = _shuffled(fill, image, row, column)
            # Values on a GPU are not checked beforehand: nothing beyond the image is read.
            hidden &= (row >= 0) & (row < v.out_h) & (column >= 0) & (column < v.out_w)
        channel, _row, _column = place_of(first + tl.arange(0, hidden.shape[0]), v)
        value = view_values(v, shown, channel, row, column, hidden)
    return value


# debug keeps the assertions; the key's words change from run to run and must not be compiled in.
@triton.jit(debug=True, do_not_specialize=["k0", "k1", "epoch"])
def gather_kernel(tokens, v, fill, count, k0, k1, epoch, BLOCK: tl.constexpr):
    """``tokens [B, N * C*P*P]``; program ``b * chunks + chunk``."""
    length: tl.constexpr = v.channels * v.out_h * v.out_w
    chunks: tl.constexpr = (length + BLOCK - 1) // BLOCK
    image = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * BLOCK
    element = first + tl.arange(0, BLOCK)
    inside = element < length
    channel, row, column = place_of(element, v)
    value = view_values(v, image, channel, row, column, inside)
    if fill is not None:
        hidden = is_hidden(fill.mask, v, fill.unit, image, row, column, inside)
        if tl.max(hidden.to(tl.int32), 0) > 0:
            filling = _filling(v, fill, count, image, first, hidden, row, column, k0, k1, epoch)
            value = tl.where(hidden, filling, value)
    tl.store(tokens + image * length + element, value.to(tokens.dtype.element_ty), mask=inside)


@triton.jit
def list_kernel(mask, starts, images, ids, rows, PATCHES: tl.constexpr, BLOCK: tl.constexpr):
    """Program ``b``: which image and patch each of its rows shows, from ``starts[b]`` on."""
    image = tl.program_id(0)
    row = tl.load(starts + image)
    for first in range(0, PATCHES, BLOCK):
        n = first + tl.arange(0, BLOCK)
        hidden = tl.load(mask + image.to(tl.int64) * PATCHES + n, mask=n < PATCHES, other=1)
        visible = (hidden == 0).to(tl.int32)
        place = row + tl.cumsum(visible, 0) - 1
        wanted = (visible != 0) & (place < rows)
        tl.store(images + place, tl.zeros_like(n) + image, mask=wanted)
        tl.store(ids + place, n, mask=wanted)
        row += tl.sum(visible, 0)


@triton.jit
def visible_kernel(tokens, v, images, ids, BLOCK: tl.constexpr):
    """``tokens [rows, C*P*P]``; program ``row * chunks + chunk``. No image (-1): zeros."""
    length: tl.constexpr = v.channels * v.patch * v.patch
    chunks: tl.constexpr = (length + BLOCK - 1) // BLOCK
    at = tl.program_id(0) // chunks
    element = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    inside = element < length
    image = tl.load(images + at).to(tl.int64)
    value = tl.zeros((BLOCK,), tl.float32)
    if image >= 0:
        channel, row, column = place_of(tl.load(ids + at) * length + element, v)
        value = view_values(v, image, channel, row, column, inside)
    place = tokens + at.to(tl.int64) * length + element
    tl.store(place, value.to(tokens.dtype.element_ty), mask=inside)


def masked_patch_gather(*words: Any) -> torch.Tensor:
    """``torch.ops.spcxr.masked_patch_gather`` in Triton; no mask: the clean views.

    ``words`` are the op's arguments: those of `views_of`, the fill's, the dtype.
    """
    pixels, size, patch = words[0], words[5], words[6]
    mask, kind, partner, blocks, sources, image_ids, seed, epoch, view, dtype = words[7:]
    count, channels = pixels.shape[:2]
    v = views_of(*words[:7])
    fill = None
    if mask is not None:
        unit = tl.constexpr(size[0] // mask.shape[1])
        lists = (t.contiguous() for t in (kind, partner, blocks, sources))
        stream = NOISE_STREAM | view << 8
        fill = Fill(bytes_of(mask), unit, *lists, blocks.shape[1], image_ids.contiguous(), stream)
    patches = (size[0] // patch) * (size[1] // patch)
    tokens = pixels.new_empty((count, patches, channels * patch * patch), dtype=dtype)
    if count:
        key, chunks = key_words(seed, epoch), triton.cdiv(tokens[0].numel(), BLOCK)
        with torch.cuda.device_of(pixels):  # Triton launches on the current device
            gather_kernel[(count * chunks,)](
                tokens, v, fill, count, *key, BLOCK, num_warps=8, **EXACT
            )
    return tokens


def visible_patch_gather(*words: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``torch.ops.spcxr.visible_patch_gather`` in Triton. No GPU is waited for.

    ``words`` are the op's arguments: those of `views_of`, mask, rows, dtype.
    """
    pixels, patch, (mask, rows, dtype) = words[0], words[6], words[7:]
    count, length = len(pixels), pixels.shape[1] * patch * patch
    starts = pixels.new_zeros((count + 1,), dtype=torch.int32)
    starts[1:] = (~mask).flatten(1).sum(1).cumsum(0)
    tokens = pixels.new_empty((rows, length), dtype=dtype)
    images = pixels.new_full((rows,), -1, dtype=torch.int32)
    ids = torch.full_like(images, -1)
    patches = mask.shape[1] * mask.shape[2]
    v = views_of(*words[:7])
    block = min(triton.next_power_of_2(length), BLOCK)
    with torch.cuda.device_of(pixels):
        if count and rows:
            tall = min(triton.next_power_of_2(patches), BLOCK)
            list_kernel[(count,)](bytes_of(mask), starts, images, ids, rows, patches, tall)
        if rows:
            programs = rows * triton.cdiv(length, block)
            warps = max(block // 256, 1)
            visible_kernel[(programs,)](tokens, v, images, ids, block, num_warps=warps, **EXACT)
    return tokens, ids, starts
