"""Pulmonary vessels, the trachea and the bronchi: trees of solid tubes."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import gaussian_filter

from spcxr.data.phantom_anatomy import Anatomy, Pose
from spcxr.data.phantom_canvas import SPACING_PX, Array, Canvas, Samples, polyline

CROWDED = 0.3  # most blood along one ray, in body units


def draw_vessels(canvas: Canvas, lung: Array, rng: np.random.Generator) -> Array:
    """(H, W) float32 path of blood in the lungs' arteries and veins, hila included.

    ``lung`` (H, W) the path of lung: no vessel is drawn where there is none to see it against.
    """
    samples: Samples = []
    hila = np.zeros(canvas.shape, np.float32)
    for side in (-1.0, 1.0):
        hilum = (side * 0.25, 0.86) if side < 0 else (side * 0.24, 0.8)
        # Angles from straight out, downwards positive; the lower lobes' vessels are the wider.
        heading = np.array([-1.25, -0.95, -0.5, -0.1, 0.35, 0.7, 1.0, 1.3])
        radius = np.array([0.036, 0.034, 0.028, 0.026, 0.04, 0.046, 0.05, 0.042])
        heading = heading + rng.normal(0, 0.12, heading.size)
        root = np.array(hilum) + rng.normal(0, 0.04, (heading.size, 2))
        samples += branch(canvas, root, heading, radius * rng.uniform(0.8, 1.15), side, rng)
        dx, dy = (canvas.x - hilum[0] - side * 0.02) / 0.08, (canvas.y - hilum[1] - 0.03) / 0.16
        hila += 0.07 * np.exp(-2 * (dx * dx + dy * dy))
    blood = gaussian_filter(canvas.splat(samples), 0.6 * canvas.shape[1] / 512) + hila
    blood = CROWDED * (1 - np.exp(-blood / CROWDED))
    return blood * np.minimum(lung / 0.4, 1)


def branch(
    canvas: Canvas,
    root: Array,
    heading: Array,
    radius: Array,
    side: float,
    rng: np.random.Generator,
    generations: int = 6,
) -> Samples:
    """A tree of solid tubes: each pair of branches thinner and shorter than its parent.

    ``root`` (m, 2) body points; ``heading`` (m,) radians from straight out, downwards positive;
    ``radius`` (m,); ``side`` -1 or 1, the way out.
    """
    samples = []
    for generation in range(generations):
        length = (0.24 * 0.86**generation) * rng.uniform(0.75, 1.3, radius.size)
        curl = rng.normal(0, 0.32, radius.size)
        steps = max(6, math.ceil(0.3 * 0.86**generation * canvas.scale / SPACING_PX))
        place = np.linspace(0, 1, steps)
        angle = heading[:, None] + curl[:, None] * place
        stride = (length / steps)[:, None]
        x = root[:, :1] + side * np.cumsum(np.cos(angle), 1) * stride
        y = root[:, 1:] + np.cumsum(np.sin(angle), 1) * stride
        path = np.stack([x, y], -1).astype(np.float32)
        normal = np.stack([-side * np.sin(angle), np.cos(angle)], -1).astype(np.float32)
        width = radius[:, None] * (1 - 0.22 * place)
        points, volumes = solid(canvas, path, normal, width, stride)
        ends = np.minimum(np.minimum(6 * place + 0.3, 6 * (1 - place) + 0.5), 1)
        samples.append((points, volumes * ends.astype(np.float32)[:, None]))
        fork = rng.uniform(0.22, 0.6, radius.size)
        tip = angle[:, -1]
        heading = np.concatenate([tip - fork * 0.7, tip + fork])
        root = np.concatenate([path[:, -1], path[:, -1]])
        radius = np.concatenate([radius * 0.74, radius * 0.66])
    return samples


def solid(
    canvas: Canvas, path: Array, normal: Array, width: Array, stride: Array
) -> tuple[Array, Array]:
    """Samples (points (m, n, k, 2), volumes (m, n, k)) of solid round tubes, float32.

    ``path``, ``normal`` (m, n, 2); ``width`` the radius, (m, n); ``stride`` the step along (m, 1).
    """
    count = max(3, math.ceil(2 * float(width.max()) * canvas.scale / SPACING_PX))
    offset = (np.arange(count, dtype=np.float32) + 0.5) * (2 / count) - 1
    points = (
        path[:, :, None]
        + (width[..., None] * offset)[..., None].astype(np.float32) * normal[:, :, None]
    )
    chord = 2 * width[..., None] ** 2 * np.sqrt(1 - offset**2) * (2 / count) * stride[..., None]
    return points, chord.astype(np.float32)


def draw_airways(canvas: Canvas, anatomy: Anatomy, pose: Pose) -> Array:
    """(H, W) float32 path of air in the trachea and the two main bronchi."""
    lean = 0.03 + 0.1 * math.sin(pose.turn)  # the aortic arch pushes the trachea to the right
    calibre = 0.062 if anatomy.child else 0.068
    carina = (-lean, 0.62)
    parts = (
        ([(0.0, -0.7), (0.0, -0.1), (-0.6 * lean, 0.25), carina], calibre, 0.96, 1.0),
        ([(-lean - 0.02, 0.56), (-0.13, 0.74), (-0.24, 0.93)], 0.045, 0.8, 0.6),
        ([(-lean + 0.02, 0.56), (0.1, 0.73), (0.26, 0.83)], 0.039, 0.8, 0.6),
    )
    samples = []
    for knots, radius, taper, share in parts:
        path = polyline(canvas, knots, 0.1)[None]
        along = np.gradient(path, axis=1)
        stride = np.linalg.norm(along, axis=-1)
        normal = np.stack([-along[..., 1], along[..., 0]], -1) / stride[..., None]
        width = radius * np.linspace(1, taper, path.shape[1], dtype=np.float32)[None]
        points, volumes = solid(canvas, path, normal, width, stride)
        fade = np.minimum(np.linspace(12, 0, path.shape[1], dtype=np.float32), 1)
        samples.append((points, share * fade[:, None] * volumes))
    return canvas.splat(samples)
