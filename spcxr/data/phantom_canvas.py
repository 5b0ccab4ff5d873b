"""The drawing ground of the phantoms: body coordinates on the pixel grid, curves, noise, splats.

Body coordinates are in units of half the thorax' width: x to the patient's left (the right of the
image), y down, z towards the front; (0, 0) is the midline at the height of the lungs' apices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import PchipInterpolator

LOW, HIGH, KNOTS = -3.0, 5.0, 8192  # the span of body coordinates that a curve's table covers
SPACING_PX = 1.0  # of samples: above one pixel, a splat shows its own grain
Array = np.ndarray
Samples = list[tuple[Array, Array]]  # points (..., 2 or 3) and weights (...), float32


@dataclass(frozen=True)
class Canvas:
    """A pixel grid laid over the body: ``pixel = centre + scale * rotate(angle) (body - origin)``.

    ``shape`` (H, W); ``scale`` pixels per body unit; ``angle`` radians, clockwise on the image;
    ``origin`` the body point (x, y) at the image's centre; ``turn`` radians of the patient's turn
    about the long axis: what lies in front (z > 0) moves to +x.

    >>> canvas = Canvas((22, 20), scale=8.0, angle=0.0, origin=(0.0, 1.0), turn=0.0)
    >>> canvas.x.shape, round(float(canvas.x[0, 0]), 3)
    ((22, 20), -1.188)
    """

    shape: tuple[int, int]
    scale: float
    angle: float
    origin: tuple[float, float]
    turn: float

    @cached_property
    def _grids(self) -> tuple[Array, Array]:
        height, width = self.shape
        down = (np.arange(height, dtype=np.float32)[:, None] - (height - 1) / 2) / self.scale
        across = (np.arange(width, dtype=np.float32)[None, :] - (width - 1) / 2) / self.scale
        cos, sin = np.float32(math.cos(self.angle)), np.float32(math.sin(self.angle))
        x = cos * across + sin * down + np.float32(self.origin[0])
        y = cos * down - sin * across + np.float32(self.origin[1])
        return x, y

    @property
    def x(self) -> Array:
        """(H, W) float32: each pixel's x in the body."""
        return self._grids[0]

    @property
    def y(self) -> Array:
        """(H, W) float32: each pixel's y in the body."""
        return self._grids[1]

    @cached_property
    def x_index(self) -> Array:
        """(H, W) int32: where each pixel's x stands in a curve's table."""
        return _table_index(self.x)

    @cached_property
    def y_index(self) -> Array:
        """(H, W) int32: where each pixel's y stands in a curve's table."""
        return _table_index(self.y)

    def to_pixels(self, points: Array) -> tuple[Array, Array]:
        """Rows and columns (fractional) of body ``points`` (..., 2 or 3)."""
        x, y = points[..., 0], points[..., 1]
        if points.shape[-1] == 3 and self.turn:
            x = x + np.float32(math.sin(self.turn)) * points[..., 2]
        x, y = x - np.float32(self.origin[0]), y - np.float32(self.origin[1])
        cos, sin = math.cos(self.angle) * self.scale, math.sin(self.angle) * self.scale
        rows = np.float32(cos) * y + np.float32(sin) * x + np.float32((self.shape[0] - 1) / 2)
        columns = np.float32(cos) * x - np.float32(sin) * y + np.float32((self.shape[1] - 1) / 2)
        return rows, columns

    def window(self, box: tuple[float, float, float, float]) -> tuple[slice, slice]:
        """The pixels that hold the body box (x low, y low, x high, y high)."""
        left, top, right, bottom = box
        corners = np.array([(left, top), (left, bottom), (right, top), (right, bottom)])
        rows, columns = self.to_pixels(corners)
        return _span(rows, self.shape[0]), _span(columns, self.shape[1])

    def splat(self, samples: Samples) -> Array:
        """(H, W) float32: each point's weight shared by its four pixels, per pixel area.

        ``samples`` holds pairs of body points (..., 2 or 3) and weights (...). With volumes (body
        units cubed) for weights, the sum is the drawn things' path length along the beam.
        """
        height, width = self.shape
        parts = []
        for points, weights in samples:
            rows, columns = self.to_pixels(points)
            inside = (rows >= 0) & (rows < height - 1) & (columns >= 0) & (columns < width - 1)
            parts.append((rows[inside], columns[inside], weights[inside]))
        rows, columns, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
        top, left = np.floor(rows), np.floor(columns)
        right = columns - left
        start = top.astype(np.intp) * width + left.astype(np.intp)
        lower = weights * (rows - top)
        total = np.zeros(height * width)
        for shift, part in ((0, weights - lower), (width, lower)):
            moved = part * right
            total += np.bincount(start + shift, part - moved, minlength=total.size)
            total += np.bincount(start + (shift + 1), moved, minlength=total.size)
        return (total * self.scale**2).astype(np.float32).reshape(height, width)


def _table_index(values: Array) -> Array:
    index = (values - np.float32(LOW)) * np.float32((KNOTS - 1) / (HIGH - LOW))
    return np.clip(index, 0, KNOTS - 1).astype(np.int32)


def _span(positions: Array, length: int) -> slice:
    low, high = math.floor(positions.min()) - 1, math.ceil(positions.max()) + 2
    return slice(min(max(low, 0), length), min(max(high, 0), length))


def curve_table(at: ArrayLike, values: ArrayLike) -> Array:
    """(KNOTS,) float32: a smooth monotone-piecewise curve through points, flat outside them.

    >>> table = curve_table([0, 1, 2], [0, 1, 4])
    >>> [round(float(table[_table_index(np.array(t))]), 1) for t in (-1, 0, 1, 2, 3)]
    [0.0, 0.0, 1.0, 4.0, 4.0]
    """
    at, values = np.asarray(at), np.asarray(values)
    grid = np.clip(np.linspace(LOW, HIGH, KNOTS), at[0], at[-1])
    return PchipInterpolator(at, values)(grid).astype(np.float32)


def lookup(table: Array, value: float) -> float:
    """One value of a curve's table.

    >>> round(lookup(curve_table([0, 1], [0, 2]), 0.5), 2)
    1.0
    """
    return float(table[int(_table_index(np.array(value)))])


def polyline(canvas: Canvas, knots: ArrayLike, bend: float = 0.0) -> Array:
    """(n, 2 or 3) float32: evenly spaced points along lines through ``knots``, in body units.

    ``bend`` rounds the corners over about that length.

    >>> polyline(Canvas((9, 9), 2.0, 0.0, (0.0, 0.0), 0.0), [(0, 0), (4, 0)]).shape
    (8, 2)
    """
    knots = np.asarray(knots, np.float64)
    at = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(knots, axis=0), axis=1))])
    where = np.linspace(0, at[-1], max(8, math.ceil(at[-1] * canvas.scale / SPACING_PX)))
    columns = [np.interp(where, at, column) for column in knots.T]
    if bend > 0:
        reach = min(max(1, round(bend * canvas.scale / SPACING_PX)), where.size - 1)
        kernel = np.hanning(2 * reach + 3)[1:-1] / (reach + 1)
        columns = [np.pad(c, reach, mode="reflect", reflect_type="odd") for c in columns]
        columns = [np.convolve(column, kernel, "valid") for column in columns]
    return np.stack(columns, -1).astype(np.float32)


def ball(squared: Array) -> Array:
    """sqrt(1 - q) where q < 1, else 0: the path through a ball at relative distance sqrt(q).

    >>> ball(np.array([0.0, 0.75, 2.0])).tolist()
    [1.0, 0.5, 0.0]
    """
    return np.sqrt(np.maximum(1 - squared, 0))


def step(values: Array, width: float) -> Array:
    """A smooth step from 0 (below ``-width``) to 1 (above ``width``).

    >>> step(np.array([-2.0, 0.0, 2.0]), 1.0).tolist()
    [0.0, 0.5, 1.0]
    """
    t = np.clip(values * (0.5 / width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def smooth_noise(shape: tuple[int, int], cells: float, rng: np.random.Generator) -> Array:
    """(H, W) float32 noise of unit variance, about ``cells`` blobs across the width.

    >>> field = smooth_noise((64, 64), 8, np.random.default_rng(0))
    >>> field.shape, bool(0.7 < field.std() < 1.3)
    ((64, 64), True)
    """
    down, across = (_spread(n, cells * n / shape[1]) for n in shape)
    knots = rng.standard_normal((down.shape[1], across.shape[1]), dtype=np.float32)
    return down @ knots @ across.T


def _spread(length: int, cells: float) -> Array:
    """(length, knots) weights: cubic B-splines on a knot grid, each row of unit energy."""
    knots = math.ceil(cells) + 3
    where = np.arange(length, dtype=np.float32)[:, None] * np.float32(cells / length) + 1
    gap = np.abs(where - np.arange(knots, dtype=np.float32))
    near, far = 4 - 6 * gap**2 + 3 * gap**3, np.maximum(2 - gap, 0) ** 3
    weights = np.where(gap < 1, near, far)
    return weights / np.sqrt((weights**2).sum(1, keepdims=True))


def blur_wide(image: Array, cells: float) -> Array:
    """(H, W): the image smoothed over about ``width / cells`` pixels, by a coarse spline fit.

    >>> np.allclose(blur_wide(np.full((40, 30), 2.0, np.float32), 4), 2)
    True
    """
    down, across = (_spread(n, cells * n / image.shape[1]) for n in image.shape)
    down, across = (w / w.sum(1, keepdims=True) for w in (down, across))
    coarse = (down / down.sum(0).clip(1e-6)).T @ image @ (across / across.sum(0).clip(1e-6))
    return down @ coarse @ across.T
