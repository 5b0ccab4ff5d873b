"""The one antialiased resize of the input side, and nearest-neighbour for masks.

Each axis is a sparse matrix (triangle filter, stretched by the ratio when shrinking, clipped at
the border and normalised), as in Pillow's and torch's antialiased bilinear resize and in
`spcxr.ops.crop_resize`. Pixel centres lie at half-integers: image corner maps to image corner.
scipy's sparse product is faster here than either library, single-threaded and safe after a fork.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import sparse

BAND_ROWS = 256


def resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Antialiased bilinear resize, unrounded.

    Parameters
    ----------
    image
        ``(H, W)`` uint8, uint16 or float32.
    shape
        (height, width) of the result in pixels, at least 1.

    Returns
    -------
    ``(h, w)`` float32 in the image's grey levels; never outside the image's own range by more than
    float32 rounding.

    >>> resize(np.array([[0, 10, 20, 30]], np.uint8), (1, 2))
    array([[ 7.142..., 22.857...]], dtype=float32)
    """
    if image.shape == tuple(shape):
        return image.astype(np.float32)
    # Rows first: the sparse product then runs along whole contiguous image rows.
    return _filter_rows(_filter_rows(image, shape[0]).T, shape[1]).T


def _filter_rows(image: np.ndarray, out: int) -> np.ndarray:
    """``(H, W)`` -> ``(out, W)`` float32."""
    width = image.shape[1]
    # A cache line wider than needed: at a power of two, the transpose after it would have all of a
    # column fall into the same few cache sets (and take most of the time).
    made = np.empty((out, width + 16), np.float32)[:, :width]
    for rows, source, weights in axis_filter(image.shape[0], out):
        # In bands, so that the float32 copy of the image stays in the cache.
        made[rows] = weights @ np.ascontiguousarray(image[source], np.float32)
    return made


@functools.lru_cache(maxsize=256)
def axis_filter(source: int, out: int) -> tuple[tuple[slice, slice, sparse.csr_array], ...]:
    """The filter of one axis in bands of (result rows, source rows, float32 weights).

    Each row of the weights sums to 1.

    >>> [(out, source, weights)] = axis_filter(2, 1)
    >>> out, source, weights.toarray()
    (slice(0, 1, None), slice(0, 2, None), array([[0.5, 0.5]], dtype=float32))
    """
    step = source / out
    reach = max(step, 1.0)
    centre = (np.arange(out) + 0.5) * step
    first = np.floor(centre - reach).astype(np.int64)
    pixel = first[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
    weight = 1.0 - np.abs(pixel + 0.5 - centre[:, None]) / reach
    weight[(pixel < 0) | (pixel >= source) | (weight < 0)] = 0.0
    weight /= weight.sum(axis=1, keepdims=True)
    row, tap = np.nonzero(weight)
    values, column = weight[row, tap].astype(np.float32), pixel[row, tap]
    bands = []
    for top in range(0, out, per_band := max(1, int(BAND_ROWS / step))):
        here = (row >= top) & (row < top + per_band)
        low, high = int(column[here].min()), int(column[here].max()) + 1
        size = (min(per_band, out - top), high - low)
        weights = sparse.csr_array((values[here], (row[here] - top, column[here] - low)), size)
        bands.append((slice(top, top + size[0]), slice(low, high), weights))
    return tuple(bands)


def resize_nearest(array: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The value of the pixel whose cell holds the new pixel's centre; same dtype.

    Parameters
    ----------
    array
        ``(..., H, W)`` of any dtype.
    shape
        (height, width) of the result in pixels.

    >>> resize_nearest(np.array([[1, 2, 3, 4]]), (1, 2))
    array([[2, 4]])
    """
    # (2i + 1) * in // (2 * out) is floor((i + 0.5) * in / out) in exact integers.
    rows, columns = (
        (2 * np.arange(out) + 1) * source // (2 * out)
        for source, out in zip(array.shape[-2:], shape, strict=True)
    )
    return array[..., rows[:, None], columns[None, :]]
