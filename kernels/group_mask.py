"""group_mask in Triton: one program an image, the cells of one rectangle in parallel.

The integer arithmetic is that of ``csrc/core/group_mask.h``; the result is the same bits.
"""

import torch
import triton
import triton.language as tl
from spcxr.kernels.philox import MAX_IMAGE_ID, key_words, stream_words

GROUPS_STREAM = tl.constexpr(1)  # STREAMS["groups"]
NUM_WARPS = 4
# A cell is counted by the thread that covers it: as many lanes as threads, so that no cell of a
# tile belongs to two.
TILE = tl.constexpr(32 * NUM_WARPS)
# With debug on, Triton asserts that no sum overflows; the generator's words do, on purpose.
OPTIONS = {"num_warps": NUM_WARPS, "sanitize_overflow": False}


@triton.jit
def _below(word, n: tl.constexpr):
    return tl.umulhi(word, tl.full((), n, tl.uint32))


@triton.jit
def _side(word, low: tl.constexpr, span: tl.constexpr, most: tl.constexpr):
    drawn = (tl.full((), low, tl.uint32) + _below(word, span) + 32768) >> 16
    return tl.minimum(drawn.to(tl.int32), most)


@triton.jit
def _cover(mask, top, left, height, width, GRID_H: tl.constexpr, GRID_W: tl.constexpr):
    """Cover a rectangle (wrapping at the border); return how many cells were not covered before."""
    fresh = tl.full((), 0, tl.int32)
    first = tl.full((), 0, tl.int32)
    while first < height * width:  # the interpreter cannot take range() of a tensor
        i = first + tl.arange(0, TILE)
        cell = (top + i // width) % GRID_H * GRID_W + (left + i % width) % GRID_W
        before = tl.load(mask + cell, mask=i < height * width, other=1)
        fresh += tl.sum((before == 0).to(tl.int32), 0)
        tl.store(mask + cell, tl.full((TILE,), 1, tl.int8), mask=i < height * width)
        first += TILE
    tl.debug_barrier()  # the next rectangle reads what other threads wrote
    return fresh


@triton.jit
def _list(blocks, listed, top, left, height, width):
    """Write one block, unless it is empty; return how many are listed now."""
    if (height > 0) & (width > 0):
        place = blocks + listed * 4
        tl.store(place, top)
        tl.store(place + 1, left)
        tl.store(place + 2, height)
        tl.store(place + 3, width)
        listed += 1
    return listed


# debug keeps the assertion; the key's words change from run to run and must not be compiled in.
@triton.jit(debug=True, do_not_specialize=["k0", "k1", "epoch"])
def group_mask_kernel(
    image_ids,
    blocks,
    mask,
    k0,
    k1,
    epoch,
    GRID_H: tl.constexpr,
    GRID_W: tl.constexpr,
    TARGET_LOW: tl.constexpr,
    TARGET_SPAN: tl.constexpr,
    H_LOW: tl.constexpr,
    H_SPAN: tl.constexpr,
    W_LOW: tl.constexpr,
    W_SPAN: tl.constexpr,
    TORUS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    """``blocks`` and ``mask`` (int8) come zeroed. Keys and epoch are an unsigned word's bits in
    int32."""
    image = tl.program_id(0).to(tl.int64)
    image_id = tl.load(image_ids + image)
    tl.device_assert((image_id >= 0) & (image_id < MAX_IMAGE_ID), "image id not in [0, 2**48)")
    blocks += image * (MAX_BLOCKS * 4)
    mask += image * (GRID_H * GRID_W)
    index = tl.full((), 0, tl.uint32)
    w0, _w1, _w2, _w3 = stream_words(index, image_id, GROUPS_STREAM, k0, k1, epoch)
    goal = tl.full((), TARGET_LOW, tl.uint32) + _below(w0, TARGET_SPAN)
    target = ((goal + 127) >> 7).to(tl.int32)
    CORNER_H: tl.constexpr = GRID_H if TORUS or GRID_H == 1 else GRID_H - 1
    CORNER_W: tl.constexpr = GRID_W if TORUS or GRID_W == 1 else GRID_W - 1

    covered = tl.full((), 0, tl.int32)
    listed = tl.full((), 0, tl.int32)
    while (covered < target) & (listed + 4 <= MAX_BLOCKS):
        index += 1
        w0, w1, w2, w3 = stream_words(index, image_id, GROUPS_STREAM, k0, k1, epoch)
        top, left = _below(w0, CORNER_H).to(tl.int32), _below(w1, CORNER_W).to(tl.int32)
        height = _side(w2, H_LOW, H_SPAN, GRID_H)
        width = _side(w3, W_LOW, W_SPAN, GRID_W)
        inner_h, inner_w = tl.minimum(height, GRID_H - top), tl.minimum(width, GRID_W - left)
        if not TORUS:
            height, width = inner_h, inner_w
        covered += _cover(mask, top, left, height, width, GRID_H, GRID_W)
        listed = _list(blocks, listed, top, left, inner_h, inner_w)
        listed = _list(blocks, listed, top, 0, inner_h, width - inner_w)
        listed = _list(blocks, listed, 0, left, height - inner_h, inner_w)
        listed = _list(blocks, listed, 0, 0, height - inner_h, width - inner_w)


def group_mask(
    image_ids: torch.Tensor,
    seed: int,
    epoch: int,
    grid: list[int],
    target: list[int],
    sides: list[int],
    torus: bool,
    max_blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``torch.ops.spcxr.group_mask`` in Triton; the parameters are those of `Law`."""
    count = len(image_ids)
    blocks = image_ids.new_zeros((count, max_blocks, 4), dtype=torch.int32)
    mask = image_ids.new_zeros((count, *grid), dtype=torch.int8)
    if count:
        law = (*grid, *target, *sides, torus, max_blocks)
        with torch.cuda.device_of(image_ids):  # Triton launches on the current device
            group_mask_kernel[(count,)](
                image_ids.contiguous(), blocks, mask, *key_words(seed, epoch), *law, **OPTIONS
            )
    return blocks, mask.view(torch.bool)
