"""Pulmonary vessels, the trachea and the bronchi: trees of solid tubes."""

from __future__ import annotations

import math

import numpy as np

from spcxr.data.phantom_anatomy import Anatomy, Pose
from spcxr.data.phantom_canvas import Array, Canvas

GENERATIONS = 6


def draw_vessels(canvas: Canvas, lung_mask: Array, rng: np.random.Generator) -> Array:
    """(H, W) float32 path of blood in the lungs' arteries and veins, hila included."""
    total = np.zeros(canvas.shape, np.float32)
    for side in (-1.0, 1.0):
        hilum = (side * 0.25, 0.86) if side < 0 else (side * 0.24, 0.8)
        # Angles from straight out, downwards positive; the lower lobes' vessels are the wider.
        heading = np.array([-1.25, -0.95, -0.5, -0.1, 0.35, 0.7, 1.0, 1.3])
        radius = np.array([0.028, 0.026, 0.022, 0.02, 0.03, 0.036, 0.04, 0.034])
        heading = heading + rng.normal(0, 0.12, heading.size)
        root = np.array(hilum) + rng.normal(0, 0.03, (heading.size, 2))
        total += _tree(canvas, root, heading, radius * rng.uniform(0.8, 1.15), side, rng)
    return total * (0.25 + 0.75 * lung_mask)


def _tree(
    canvas: Canvas,
    root: Array,
    heading: Array,
    radius: Array,
    side: float,
    rng: np.random.Generator,
) -> Array:
    """Branches of six generations, each pair thinner and shorter than its parent."""
    total = np.zeros(canvas.shape, np.float32)
    for generation in range(GENERATIONS):
        length = (0.24 * 0.86**generation) * rng.uniform(0.75, 1.3, radius.size)
        curl = rng.normal(0, 0.22, radius.size)
        steps = max(6, math.ceil(0.3 * 0.86**generation * canvas.scale / 1.2))
        place = np.linspace(0, 1, steps)
        angle = heading[:, None] + curl[:, None] * place
        stride = (length / steps)[:, None]
        x = root[:, :1] + side * np.cumsum(np.cos(angle), 1) * stride
        y = root[:, 1:] + np.cumsum(np.sin(angle), 1) * stride
        path = np.stack([x, y], -1).astype(np.float32)
        normal = np.stack([-side * np.sin(angle), np.cos(angle)], -1).astype(np.float32)
        width = radius[:, None] * (1 - 0.22 * place)
        total += solid(canvas, path, normal, width, stride)
        fork = rng.uniform(0.22, 0.6, radius.size)
        tip = angle[:, -1]
        heading = np.concatenate([tip - fork * 0.7, tip + fork])
        root = np.concatenate([path[:, -1], path[:, -1]])
        radius = np.concatenate([radius * 0.74, radius * 0.66])
    return total


def solid(canvas: Canvas, path: Array, normal: Array, width: Array, stride: Array) -> Array:
    """(H, W) path through solid round tubes.

    ``path``, ``normal`` (m, n, 2); ``width`` the radius, (m, n); ``stride`` the step along (m, 1).
    """
    count = max(3, math.ceil(2 * float(width.max()) * canvas.scale / 1.1))
    offset = (np.arange(count, dtype=np.float32) + 0.5) * (2 / count) - 1
    points = (
        path[:, :, None]
        + (width[..., None] * offset)[..., None].astype(np.float32) * normal[:, :, None]
    )
    chord = 2 * width[..., None] ** 2 * np.sqrt(1 - offset**2) * (2 / count) * stride[..., None]
    return canvas.splat(points, chord.astype(np.float32))


def draw_airways(canvas: Canvas, anatomy: Anatomy, pose: Pose) -> Array:
    """(H, W) float32 path of air in the trachea and the two main bronchi."""
    lean = 0.03 + 0.1 * math.sin(pose.turn)  # the aortic arch pushes the trachea to the right
    calibre = 0.058 if anatomy.child else 0.062
    carina = (-lean, 0.62)
    parts = (
        ([(0.0, -0.7), (0.0, -0.1), (-0.6 * lean, 0.25), carina], calibre, 0.96),
        ([carina, (-0.13, 0.76), (-0.24, 0.93)], 0.045, 0.85),
        ([carina, (0.12, 0.74), (0.26, 0.82)], 0.039, 0.85),
    )
    total = np.zeros(canvas.shape, np.float32)
    for knots, radius, taper in parts:
        at = np.array(knots)
        grid = np.linspace(0, 1, max(8, math.ceil(1.4 * canvas.scale)))
        where = np.linspace(0, 1, len(at))
        path = np.stack([np.interp(grid, where, at[:, k]) for k in range(2)], -1)[None]
        along = np.gradient(path, axis=1)
        stride = np.linalg.norm(along, axis=-1)
        normal = np.stack([-along[..., 1], along[..., 0]], -1) / stride[..., None]
        width = radius * np.linspace(1, taper, grid.size)[None]
        total += solid(canvas, path.astype(np.float32), normal.astype(np.float32), width, stride)
    return total
