"""What fills the drawn lungs' air spaces: pneumonia, covid, and what a normal chest may hold.

Each function returns an opacity, the share of air lost in 0..1, so that a patch over more lung is
denser and one next to the heart wipes out its border, as on a radiograph.
"""

from __future__ import annotations

import math

import numpy as np

from spcxr.data.phantom_canvas import Array, Canvas, lookup, smooth_noise, step
from spcxr.data.phantom_organs import Landmarks
from spcxr.data.phantom_vessels import solid

LABELS = ("normal", "pneumonia", "covid")


def draw_opacity(
    canvas: Canvas, marks: Landmarks, label: str, child: bool, rng: np.random.Generator
) -> Array:
    """(H, W) float32 in 0..1: the share of the lung's air that is lost.

    ``pneumonia``: one lobe or a few patches of one lung, often dense, with dark bronchi inside.
    ``covid``: several hazy patches at the periphery of both lower zones. ``normal``: at most an old
    scar or a faint band, which the sick may have as well. Severity runs from hardly seen to plain.
    """
    opacity = _bystanders(canvas, marks, rng)
    if label == "pneumonia":
        opacity = _join(opacity, _pneumonia(canvas, marks, child, rng))
    elif label == "covid":
        opacity = _join(opacity, _covid(canvas, marks, rng))
    return opacity


def _join(first: Array, second: Array) -> Array:
    return 1 - (1 - first) * (1 - second)


def _patch(
    canvas: Canvas,
    centre: tuple[float, float],
    radii: tuple[float, float],
    ragged: float,
    rng: np.random.Generator,
) -> Array:
    """(H, W) 0..1: an ellipse with a ragged, soft edge and an uneven inside."""
    dx, dy = (canvas.x - centre[0]) / radii[0], (canvas.y - centre[1]) / radii[1]
    distance = np.sqrt(dx * dx + dy * dy)
    cells = canvas.shape[1] / canvas.scale  # the image's width in body units
    shape = smooth_noise(canvas.shape, cells / (0.6 * min(radii)), rng)
    fluff = smooth_noise(canvas.shape, cells / 0.06, rng)
    inside = step(1 - distance + ragged * (0.3 * shape + 0.16 * fluff), 0.42)
    return inside * np.clip(1 + 0.22 * fluff + 0.15 * shape, 0, 1.4)


def _pneumonia(canvas: Canvas, marks: Landmarks, child: bool, rng: np.random.Generator) -> Array:
    side = -1.0 if rng.uniform() < 0.6 else 1.0
    dome = marks.right_dome if side < 0 else marks.left_dome
    severity = float(rng.beta(1.5, 1.7))
    if rng.uniform() < (0.4 if child else 0.6):  # lobar
        zone = rng.choice(3, p=(0.3, 0.25, 0.45))
        height = (0.42, 0.62, 0.8)[zone] * dome + rng.normal(0, 0.05)
        out = (0.52, 0.5, 0.55)[zone] + rng.normal(0, 0.05)
        size = 0.24 + 0.16 * severity
        radii = (size * rng.uniform(0.95, 1.3), size * rng.uniform(0.8, 1.2))
        opacity = _patch(canvas, (side * out, height), radii, 0.8, rng)
        if zone == 0 and side < 0 and rng.uniform() < 0.5:  # bounded by the minor fissure
            opacity *= step(height + 0.6 * radii[1] - canvas.y, 0.012)
        opacity *= 0.2 + 0.6 * severity
        bronchi = _bronchograms(canvas, side, rng)
        return np.clip(opacity * (1 - 0.7 * bronchi), 0, 0.95)
    opacity = np.zeros(canvas.shape, np.float32)
    for _ in range(rng.integers(2, 6)):
        height = rng.uniform(0.42, 0.9) * dome
        out = rng.uniform(0.34, 0.75)
        radius = rng.uniform(0.08, 0.15) + 0.06 * severity
        spot = _patch(canvas, (side * out, height), (radius, radius), 1.1, rng)
        opacity = _join(opacity, np.clip(spot, 0, 1) * (0.14 + 0.42 * severity))
    return opacity


def _bronchograms(canvas: Canvas, side: float, rng: np.random.Generator) -> Array:
    """(H, W) 0..1: bronchi that stay open, from the hilum outwards."""
    count = 9
    angle = np.linspace(-1.1, 1.3, count)[:, None] + rng.normal(0, 0.08, (count, 1))
    steps = math.ceil(0.55 * canvas.scale)
    place = np.linspace(0, 1, steps)
    angle = angle + rng.normal(0, 0.3, (count, 1)) * place
    stride = np.full((count, 1), 0.6 / steps)
    x = side * (0.26 + np.cumsum(np.cos(angle), 1) * stride)
    y = 0.85 + np.cumsum(np.sin(angle), 1) * stride
    path = np.stack([x, y], -1).astype(np.float32)
    normal = np.stack([-side * np.sin(angle), np.cos(angle)], -1).astype(np.float32)
    width = 0.02 - 0.01 * place + np.zeros((count, 1))
    return np.clip(solid(canvas, path, normal, width, stride) / 0.03, 0, 1)


def _covid(canvas: Canvas, marks: Landmarks, rng: np.random.Generator) -> Array:
    severity = float(rng.beta(1.5, 1.5))
    opacity = np.zeros(canvas.shape, np.float32)
    for side, dome in ((-1.0, marks.right_dome), (1.0, marks.left_dome)):
        for _ in range(rng.integers(2, 5)):
            height = dome * rng.triangular(0.35, 0.85, 0.98)
            out = lookup(marks.wall, height) - rng.uniform(0.04, 0.24)
            radii = (rng.uniform(0.1, 0.2) + 0.07 * severity, rng.uniform(0.12, 0.26))
            patch = _patch(canvas, (side * out, height), radii, 1.2, rng)
            dense = (0.08 + 0.42 * severity) * rng.uniform(0.7, 1.2)
            opacity = _join(opacity, np.clip(dense * patch, 0, 1))
    # Thickened septa inside the haze: fine and irregular.
    cells = canvas.shape[1] / canvas.scale / 0.035
    septa = np.abs(smooth_noise(canvas.shape, cells, rng))
    return np.clip(opacity * (1.25 - 0.4 * septa), 0, 0.9)


def _bystanders(canvas: Canvas, marks: Landmarks, rng: np.random.Generator) -> Array:
    """Findings that name no class: a scar at an apex, a thin band at a base, a small haze."""
    opacity = np.zeros(canvas.shape, np.float32)
    if rng.uniform() < 0.25:
        side = rng.choice((-1.0, 1.0))
        spot = _patch(canvas, (side * 0.45, 0.16), (0.2, 0.09), 1.2, rng)
        opacity = _join(opacity, np.clip(spot, 0, 1) * rng.uniform(0.1, 0.35))
    if rng.uniform() < 0.25:
        side = rng.choice((-1.0, 1.0))
        base = (marks.right_dome if side < 0 else marks.left_dome) - rng.uniform(0.06, 0.25)
        slope = rng.normal(0, 0.25)
        middle = rng.uniform(0.4, 0.7)
        off = (canvas.y - base - slope * (side * canvas.x - middle)) / rng.uniform(0.008, 0.016)
        ends = ((side * canvas.x - middle) / rng.uniform(0.12, 0.25)) ** 2
        opacity = _join(opacity, rng.uniform(0.1, 0.3) * np.exp(-off * off - ends * ends))
    if rng.uniform() < 0.3:
        side = rng.choice((-1.0, 1.0))
        centre = (side * rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.95) * marks.right_dome)
        haze = _patch(canvas, centre, (0.16, 0.16), 1.0, rng)
        opacity = _join(opacity, np.clip(haze, 0, 1) * rng.uniform(0.04, 0.16))
    return opacity
