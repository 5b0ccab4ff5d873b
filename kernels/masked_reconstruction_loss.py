"""masked_reconstruction_loss in Triton: target, distances and slopes of a patch in one program.

Each patch leaves one partial sum; a second kernel adds them in a fixed order: no atomics, the same
bits in every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from spcxr.kernels.views import bytes_of, is_hidden, place_of, view_values, views_of

PATCH_VARIANCE_FLOOR = tl.constexpr(1e-6)  # kPatchVarianceFloor of csrc/core/views.h
BLOCK = 2048  # most elements a program holds; a longer patch is computed in turns
SUM_BLOCK = 1024
EXACT = {"enable_fp_fusion": False}  # every float is rounded by itself


@triton.jit
def _part(v, mask, image, n, first, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Elements ``first`` and on of a patch: (which are hidden, which are there, their places)."""
    length: tl.constexpr = v.channels * v.patch * v.patch
    element = first + tl.arange(0, BLOCK)
    inside = element < length
    channel, row, column = place_of(n * length + element, v)
    return is_hidden(mask, v, UNIT, image, row, column, inside), inside, channel, row, column


@triton.jit
def _moments(value, inside):
    """(mean, sum of squared deviations, count) of a tile."""
    count = tl.sum(inside.to(tl.float32), 0)
    mean = tl.sum(tl.where(inside, value, 0.0), 0) / count
    away = tl.where(inside, value - mean, 0.0)
    return mean, tl.sum(away * away, 0), count


@triton.jit
def _patch_moments(v, mask, image, n, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """(mean, deviation) of a patch, part by part (Chan, Golub and LeVeque 1979)."""
    length: tl.constexpr = v.channels * v.patch * v.patch
    mean, squares, seen = 0.0, 0.0, 0.0
    for first in tl.static_range(0, length, BLOCK):
        _hidden, inside, channel, row, column = _part(v, mask, image, n, first, UNIT, BLOCK)
        value = view_values(v, image, channel, row, column, inside)
        next_mean, next_squares, count = _moments(value, inside)
        apart = next_mean - mean
        mean += apart * count / (seen + count)
        squares += next_squares + apart * apart * seen * count / (seen + count)
        seen += count
    variance = squares / (length - 1 if length > 1 else 1)
    return mean, tl.sqrt_rn(variance + PATCH_VARIANCE_FLOOR)


@triton.jit
def loss_kernel(
    partial,
    slopes,
    predicted,
    v,
    mask,
    UNIT: tl.constexpr,
    SQUARED: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program ``b * N + n``: the sum over a patch and its slopes, neither weighted."""
    length: tl.constexpr = v.channels * v.patch * v.patch
    patches: tl.constexpr = v.grid_h * v.grid_w
    image = (tl.program_id(0) // patches).to(tl.int64)
    n = tl.program_id(0) % patches
    start = tl.program_id(0).to(tl.int64) * length
    if NORMALISE:
        mean, deviation = _patch_moments(v, mask, image, n, UNIT, BLOCK)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, length, BLOCK):
        hidden, inside, channel, row, column = _part(v, mask, image, n, first, UNIT, BLOCK)
        place = start + first + tl.arange(0, BLOCK)
        slope = tl.zeros((BLOCK,), tl.float32)
        if tl.max(hidden.to(tl.int32), 0) > 0:
            clean = view_values(v, image, channel, row, column, inside)
            if NORMALISE:
                clean = (clean - mean) / deviation
            guess = tl.load(predicted + place, mask=inside, other=0).to(tl.float32)
            error = tl.where(hidden, guess - clean, 0.0)
            if SQUARED:
                total += tl.sum(error * error, 0)
                slope = error
            else:
                total += tl.sum(tl.abs(error), 0)
                slope = (error > 0).to(tl.float32) - (error < 0).to(tl.float32)
        if slopes is not None:
            tl.store(slopes + place, slope.to(slopes.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0), total)


@triton.jit
def mean_kernel(
    loss,
    weight,
    partial,
    count,
    hidden_cells,
    ELEMENTS: tl.constexpr,
    SQUARED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the partial sums in float64, a fixed share a lane, and their mean; what a slope
    weighs in the gradient."""
    total = tl.zeros((BLOCK,), tl.float64)
    first = tl.full((), 0, tl.int32)
    while first < count:  # the interpreter cannot take range() of a tensor
        place = first + tl.arange(0, BLOCK)
        total += tl.load(partial + place, mask=place < count, other=0).to(tl.float64)
        first += BLOCK
    hidden = tl.maximum(tl.load(hidden_cells) * ELEMENTS, 1).to(tl.float64)
    tl.store(loss, (tl.sum(total, 0) / hidden).to(tl.float32))
    tl.store(weight, ((2.0 if SQUARED else 1.0) / hidden).to(tl.float32))


def masked_reconstruction_loss(
    predicted: torch.Tensor, *words: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``torch.ops.spcxr.masked_reconstruction_loss`` in Triton.

    ``words`` are the op's further arguments: those of `views_of`, mask, squared,
    normalise_patches, needs_gradient.
    """
    pixels, size = words[0], words[5]
    mask, squared, normalise_patches, needs_gradient = words[7:]
    predicted = predicted.contiguous()
    loss, weight = (predicted.new_zeros((), dtype=torch.float32) for _ in range(2))
    kept = torch.float32 if squared else torch.int8
    slopes = torch.empty_like(predicted, dtype=kept) if needs_gradient else None
    count, length = predicted.shape[0] * predicted.shape[1], predicted.shape[2]
    if count:
        v = views_of(*words[:7])
        unit = size[0] // mask.shape[1]
        partial = predicted.new_empty((count,), dtype=torch.float32)
        hidden_cells = mask.sum()
        block = min(triton.next_power_of_2(length), BLOCK)
        law = (unit, squared, normalise_patches, block)
        warps = max(block // 256, 1)
        with torch.cuda.device_of(predicted):  # Triton launches on the current device
            loss_kernel[(count,)](
                partial,
                slopes,
                predicted,
                v,
                bytes_of(mask),
                *law,
                num_warps=warps,
                **EXACT,
            )
            elements = unit * unit * pixels.shape[1]
            rest = (hidden_cells, elements, squared, SUM_BLOCK)
            mean_kernel[(1,)](loss, weight, partial, count, *rest, **EXACT)
    return loss, predicted.new_empty(0, dtype=kept) if slopes is None else slopes, weight
