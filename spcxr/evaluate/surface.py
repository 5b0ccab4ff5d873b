"""How far the borders of two masks lie apart: Hausdorff distances, average surface distance.

Definitions are MONAI's (and, before it, DeepMind's ``surface-distance`` at pixel resolution): the
border of a mask are its pixels with one of the four neighbours outside the mask or the image; from
each pixel of a border the distance to the nearest pixel of the other is taken, both ways.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from spcxr.errors import SpcxrError

Array = NDArray[Any]

DISTANCES = ("hd95", "hd", "asd")
PERCENTILE = 95
LEAF = 32  # points of a tree's leaf: quicker than scipy's 10 where a tree is asked once


def borders(masks: Array, known: Array | None = None) -> NDArray[np.bool_]:
    """The border pixels of masks ``(n, H, W)`` bool.

    Beside a pixel that is not ``known`` there is no border: where the mask ends there is unknown.

    >>> borders(np.ones((1, 3, 3), bool)).astype(int)[0].tolist()
    [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    """
    inside = masks if known is None else masks | ~known
    padded = np.pad(inside, ((0, 0), (1, 1), (1, 1)))
    deep = padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1]
    deep &= padded[:, 1:-1, :-2]
    deep &= padded[:, 1:-1, 2:]
    edge = masks & ~deep
    return np.asarray(edge if known is None else edge & known)


def surface_distances(
    predicted: Array, truth: Array, known: Array | None = None, pixel_mm: Array | None = None
) -> tuple[Array, Array]:
    """`DISTANCES` of each pair of masks, in pixels and in mm.

    ``hd95``: the larger of the 95th percentiles of either way; ``hd``: Hausdorff's, the largest
    distance; ``asd``: the mean over both borders together. They equal MONAI's
    ``compute_hausdorff_distance`` (``percentile=95``, none) and
    ``compute_average_surface_distance(symmetric=True)``, but where a mask is empty: MONAI says NaN
    or infinity, we always NaN, for an infinite distance has no mean.

    Parameters
    ----------
    predicted, truth
        ``(n, H, W)`` bool, or 0 and anything else.
    known
        ``(n, H, W)`` bool: pixels that count; all if not given.
    pixel_mm
        ``(n, 2)`` height and width of a pixel in mm, NaN = unknown; they need not be equal.

    Returns
    -------
    two ``(n, 3)`` float64. NaN where one of the masks is empty, or both are; those in mm also where
    the size of a pixel is unknown.

    Raises
    ------
    SpcxrError
        masks of different sizes.

    >>> one, other = np.zeros((2, 1, 9, 9), bool)
    >>> one[0, 2:5, 2:5], other[0, 2:5, 4:7] = True, True
    >>> px, mm = surface_distances(one, other, pixel_mm=np.array([[1.0, 0.5]]))
    >>> px.round(3).tolist(), mm.round(3).tolist()
    ([[2.0, 2.0, 1.0]], [[1.0, 1.0, 0.5]])
    """
    if predicted.shape != truth.shape or predicted.ndim != 3:
        raise SpcxrError(
            f"masks {predicted.shape} and {truth.shape}; give two (n, H, W) of one size"
        )
    edges = [borders(masks.astype(bool), known) for masks in (predicted, truth)]
    sizes = np.full((len(truth), 2), np.nan) if pixel_mm is None else pixel_mm
    px, mm = np.full((2, len(truth), len(DISTANCES)), np.nan)
    for i, (guess, true, size) in enumerate(zip(*edges, sizes, strict=True)):
        points = [np.argwhere(edge).astype(np.float64) for edge in (guess, true)]
        if not (len(points[0]) and len(points[1])):
            continue
        px[i] = _both_ways(*points)
        if size[0] == size[1]:
            mm[i] = px[i] * size[0]
        elif not np.isnan(size).any():
            mm[i] = _both_ways(*(p * size for p in points))
    return px, mm


def _both_ways(first: Array, second: Array) -> tuple[float, float, float]:
    """The distances of two sets of points ``(m, 2)`` and ``(k, 2)``."""
    there = KDTree(second, leafsize=LEAF).query(first)[0]
    back = KDTree(first, leafsize=LEAF).query(second)[0]
    far = [float(np.percentile(way, PERCENTILE)) for way in (there, back)]
    largest = float(max(there.max(), back.max()))
    return max(far), largest, float(np.concatenate([there, back]).mean())
