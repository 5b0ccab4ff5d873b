"""Views in Triton: a box of an image, resampled, scaled and cut into patches.

The twin of ``csrc/core/views.h``, a tile of elements at a time instead of one pixel.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Views(NamedTuple):
    """What a kernel is told of a batch of views; constexprs are compiled in. Strides in pixels."""

    pixels: Any
    boxes: Any  # [B, 4] float32 or None: the whole image
    flip: Any  # [B] int8 or None
    scale: Any
    shift: Any
    image_stride: Any
    channel_stride: Any
    row_stride: Any
    source_h: Any
    source_w: Any
    channels: tl.constexpr
    out_h: tl.constexpr
    out_w: tl.constexpr
    patch: tl.constexpr
    grid_h: tl.constexpr
    grid_w: tl.constexpr


def views_of(
    pixels: torch.Tensor,
    boxes: torch.Tensor | None,
    flip: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor,
    size: list[int],
    patch: int,
) -> Views:
    """The arguments of an op as a kernel takes them."""
    laid = [pixels.stride(0), pixels.stride(1), pixels.stride(2), pixels.shape[2], pixels.shape[3]]
    fixed = (pixels.shape[1], *size, patch, size[0] // patch, size[1] // patch)
    return Views(
        pixels,
        None if boxes is None else boxes.contiguous(),
        None if flip is None else bytes_of(flip),
        scale.contiguous(),
        shift.contiguous(),
        *laid,
        *(tl.constexpr(number) for number in fixed),
    )


def bytes_of(flags: torch.Tensor) -> torch.Tensor:
    """bool as the int8 that Triton loads."""
    return flags.contiguous().view(torch.int8)


@triton.jit
def place_of(element, v):
    """(channel, row, column) in its view of element ``n * C*P*P + e``.

    Divisions are of ``element`` itself: of a remainder Triton does not see that neighbours stay
    neighbours, and loads a byte at a time.
    """
    n = element // (v.channels * v.patch * v.patch)
    channel = element // (v.patch * v.patch) % v.channels
    row = n // v.grid_w * v.patch + element // v.patch % v.patch
    column = n % v.grid_w * v.patch + element % v.patch
    return channel, row, column


@triton.jit
def _axis(boxes, image, first: tl.constexpr, source, out: tl.constexpr):
    """(start, step, reach) of an axis; ``first`` is 0 for rows, 1 for columns."""
    if boxes is None:
        # Not source.to(): a size of 1 is compiled in, and is no tensor then.
        start, extent = 0.0, tl.full((), 0.0, tl.float32) + source
    else:
        start = tl.load(boxes + image * 4 + first)
        extent = tl.load(boxes + image * 4 + first + 2)
    step = tl.div_rn(extent, tl.full((), out, tl.float32))
    return start, step, tl.maximum(step, 1.0)


@triton.jit
def _weight(centre, pixel, reach):
    return tl.maximum(1.0 - tl.abs(pixel.to(tl.float32) + 0.5 - centre) / reach, 0.0)


@triton.jit
def _first(centre, reach, source):
    """The first pixel that may have a weight; inside the image whatever the box holds."""
    edge = centre - reach - 0.5
    return tl.minimum(tl.where(edge > 0, edge, 0.0), source - 1.0).to(tl.int32)


@triton.jit
def _resampled(v, image, channel, y, x, reach_y, reach_x, wanted):
    """The mean of the pixels around (y, x) under a triangle; centres in source pixels.

    A tap that passes the image's border or the triangle's has no weight and is not read.
    """
    plane = v.pixels + image * v.image_stride + channel.to(tl.int64) * v.channel_stride
    top, left = _first(y, reach_y, v.source_h), _first(x, reach_x, v.source_w)
    taps_y = tl.minimum(tl.ceil(2 * reach_y + 1), v.source_h).to(tl.int32)
    taps_x = tl.minimum(tl.ceil(2 * reach_x + 1), v.source_w).to(tl.int32)
    total = tl.zeros_like(y)
    weights_y = tl.zeros_like(y)
    weights_x = tl.zeros_like(y)
    j = tl.full((), 0, tl.int32)
    while j < taps_x:  # the interpreter cannot take range() of a tensor
        inside = left + j < v.source_w
        weights_x += tl.where(inside, _weight(x, left + j, reach_x), 0.0)
        j += 1
    i = tl.full((), 0, tl.int32)
    while i < taps_y:
        row = top + i
        weight = tl.where(row < v.source_h, _weight(y, row, reach_y), 0.0)
        line = plane + row.to(tl.int64) * v.row_stride
        across = tl.zeros_like(y)
        j = tl.full((), 0, tl.int32)
        while j < taps_x:
            column = left + j
            sideways = tl.where(column < v.source_w, _weight(x, column, reach_x), 0.0)
            read = wanted & (weight > 0) & (sideways > 0)
            across += sideways * tl.load(line + column, mask=read, other=0).to(tl.float32)
            j += 1
        total += weight * across
        weights_y += weight
        i += 1
    return total / (weights_y * weights_x)


@triton.jit
def view_values(v, image, channel, row, column, wanted):
    """Pixels of an image's view, float32: ``view_value`` of csrc/core/views.h.

    ``image`` is a scalar int64; what is not ``wanted`` is anything.
    """
    start_y, step_y, reach_y = _axis(v.boxes, image, 0, v.source_h, v.out_h)
    start_x, step_x, reach_x = _axis(v.boxes, image, 1, v.source_w, v.out_w)
    turned = tl.full((), 0, tl.int1)
    if v.flip is not None:
        turned = tl.load(v.flip + image) != 0
    same_y = (start_y == 0) & (step_y == 1) & (v.source_h == v.out_h)
    same_x = (start_x == 0) & (step_x == 1) & (v.source_w == v.out_w) & (turned == 0)
    if same_y & same_x:
        plane = v.pixels + image * v.image_stride + channel.to(tl.int64) * v.channel_stride
        place = plane + row.to(tl.int64) * v.row_stride + column
        grey = tl.load(place, mask=wanted, other=0).to(tl.float32)
    else:
        across = tl.where(turned, v.out_w - 1 - column, column)
        y = start_y + (row.to(tl.float32) + 0.5) * step_y
        x = start_x + (across.to(tl.float32) + 0.5) * step_x
        grey = _resampled(v, image, channel, y, x, reach_y, reach_x, wanted)
    return grey * tl.load(v.scale + image) + tl.load(v.shift + image)


@triton.jit
def is_hidden(mask, v, unit: tl.constexpr, image, row, column, inside):
    """Which elements a mask ``[B, out_h / unit, out_w / unit]`` hides."""
    height: tl.constexpr = v.out_h // unit
    width: tl.constexpr = v.out_w // unit
    cell = mask + image * (height * width) + row // unit * width + column // unit
    return tl.load(cell, mask=inside, other=0) != 0
