"""What fills the drawn lungs' air spaces: pneumonia, covid, and what a normal chest may hold.

Each function returns an opacity, the share of air lost in 0..1, so that a patch over more lung is
denser and one next to the heart wipes out its border, as on a radiograph.
"""

from __future__ import annotations

import numpy as np

from spcxr.data.phantom_canvas import Array, Canvas, lookup, smooth_noise, step
from spcxr.data.phantom_organs import Landmarks
from spcxr.data.phantom_vessels import branch

Pair = tuple[float, float]
LABELS = ("normal", "pneumonia", "covid")


def draw_opacity(
    canvas: Canvas,
    marks: Landmarks,
    label: str,
    child: bool,
    severity: Pair,
    rng: np.random.Generator,
) -> Array:
    """(H, W) float32 in 0..1: the share of the lung's air that is lost.

    ``pneumonia``: one lobe or a few patches of one lung, often dense, with dark bronchi inside.
    ``covid``: several hazy patches at the periphery of both lower zones. ``normal``: at most an old
    scar or a faint band, which the sick may have as well. ``severity`` is its lowest and highest
    value: 0 is hardly seen, 1 plain.
    """
    haze = _Haze(canvas, rng)
    if label == "pneumonia":
        _add_pneumonia(haze, marks, child, severity)
    elif label == "covid":
        _add_covid(haze, marks, severity)
    _add_bystanders(haze, marks)
    return haze.opacity


class _Haze:
    """An opacity that grows patch by patch; all patches share one fine texture."""

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas, self.rng = canvas, rng
        self.width = canvas.shape[1] / canvas.scale  # of the image, in body units
        self.opacity = np.zeros(canvas.shape, np.float32)
        self.fluff = smooth_noise(canvas.shape, self.width / 0.07, rng)
        self.fluff += smooth_noise(canvas.shape, self.width / 0.035, rng)

    def window(self, centre: Pair, reach: Pair) -> tuple[slice, slice]:
        """The pixels within ``reach`` of ``centre``."""
        (x, y), (wide, tall) = centre, reach
        return self.canvas.window((x - wide, y - tall, x + wide, y + tall))

    def add(self, centre: Pair, radii: Pair, ragged: float, density: float) -> None:
        """Add an ellipse with a ragged, soft edge and an uneven inside."""
        here = self.window(centre, (1.9 * radii[0], 1.9 * radii[1]))
        x, y, fluff = self.canvas.x[here], self.canvas.y[here], self.fluff[here]
        if not x.size:
            return
        dx, dy = (x - centre[0]) / radii[0], (y - centre[1]) / radii[1]
        cells = x.shape[1] / self.canvas.scale / (0.55 * min(radii))
        shape = smooth_noise(x.shape, cells, self.rng)
        inside = 1 - np.sqrt(dx * dx + dy * dy) + ragged * (0.26 * shape + 0.07 * fluff)
        patch = step(inside, 0.55) * (1 + 0.09 * fluff + 0.1 * shape)
        self.join(here, np.clip(density * patch, 0, 0.95))

    def join(self, here: tuple[slice, slice], opacity: Array) -> None:
        """What one veil lets through, the next one dims."""
        self.opacity[here] = 1 - (1 - self.opacity[here]) * (1 - opacity)


def within(limits: Pair, share: float) -> float:
    """The value that lies ``share`` of the way from the lower limit to the upper."""
    return limits[0] + (limits[1] - limits[0]) * share


def _add_pneumonia(haze: _Haze, marks: Landmarks, child: bool, limits: Pair) -> None:
    rng = haze.rng
    side = -1.0 if rng.uniform() < 0.6 else 1.0
    dome = marks.right_dome if side < 0 else marks.left_dome
    severity = within(limits, float(rng.beta(1.5, 1.7)))
    if rng.uniform() < (0.4 if child else 0.6):
        _add_lobe(haze, side, dome, severity)
        return
    for _ in range(rng.integers(2, 6)):
        centre = (side * rng.uniform(0.34, 0.75), rng.uniform(0.42, 0.9) * dome)
        radius = rng.uniform(0.08, 0.15) + 0.06 * severity
        haze.add(centre, (radius, radius), 1.1, 0.14 + 0.42 * severity)


def _add_lobe(haze: _Haze, side: float, dome: float, severity: float) -> None:
    """A consolidation about an upper, middle or lower lobe, with open bronchi inside."""
    rng = haze.rng
    zone = rng.choice(3, p=(0.3, 0.25, 0.45))
    height = (0.42, 0.62, 0.8)[zone] * dome + rng.normal(0, 0.05)
    out = (0.52, 0.5, 0.55)[zone] + rng.normal(0, 0.05)
    size = 0.24 + 0.16 * severity
    radii = (size * rng.uniform(0.95, 1.3), size * rng.uniform(0.8, 1.2))
    haze.add((side * out, height), radii, 0.8, 0.2 + 0.6 * severity)
    if zone == 0 and side < 0 and rng.uniform() < 0.5:  # bounded by the minor fissure
        haze.opacity *= step(height + 0.6 * radii[1] - haze.canvas.y, 0.012)
    heading = np.linspace(-1.1, 1.2, 7) + rng.normal(0, 0.12, 7)
    root = np.array((side * 0.26, 0.85)) + rng.normal(0, 0.02, (7, 2))
    bronchi = branch(haze.canvas, root, heading, np.full(7, 0.015), side, rng, generations=4)
    haze.opacity *= 1 - 0.4 * np.clip(haze.canvas.splat(bronchi) / 0.035, 0, 1)


def _add_covid(haze: _Haze, marks: Landmarks, limits: Pair) -> None:
    rng = haze.rng
    severity = within(limits, float(rng.beta(1.5, 1.5)))
    for side, dome in ((-1.0, marks.right_dome), (1.0, marks.left_dome)):
        for _ in range(rng.integers(1, 5)):
            height = dome * rng.triangular(0.35, 0.85, 0.98)
            out = lookup(marks.wall, height) - rng.uniform(0.04, 0.24)
            radii = (rng.uniform(0.1, 0.2) + 0.07 * severity, rng.uniform(0.12, 0.26))
            density = (0.07 + 0.36 * severity) * rng.uniform(0.7, 1.2)
            haze.add((side * out, height), radii, 0.9, density)


def _add_bystanders(haze: _Haze, marks: Landmarks) -> None:
    """Findings that name no class: a scar at an apex, a thin band at a base, a small haze."""
    rng = haze.rng
    if rng.uniform() < 0.25:
        side = rng.choice((-1.0, 1.0))
        haze.add((side * 0.45, 0.16), (0.2, 0.09), 1.2, rng.uniform(0.1, 0.35))
    if rng.uniform() < 0.3:
        side = rng.choice((-1.0, 1.0))
        centre = (side * rng.uniform(0.35, 0.75), rng.uniform(0.4, 0.95) * marks.right_dome)
        haze.add(centre, (0.16, 0.16), 1.0, rng.uniform(0.04, 0.16))
    if rng.uniform() < 0.25:
        side = rng.choice((-1.0, 1.0))
        base = (marks.right_dome if side < 0 else marks.left_dome) - rng.uniform(0.06, 0.25)
        middle, slope = side * rng.uniform(0.4, 0.7), rng.normal(0, 0.25)
        here = haze.window((middle, base), (0.5, 0.2))
        dx, dy = haze.canvas.x[here] - middle, haze.canvas.y[here] - base
        off, along = (dy - slope * dx) / rng.uniform(0.008, 0.016), dx / rng.uniform(0.12, 0.25)
        haze.join(here, rng.uniform(0.1, 0.3) * np.exp(-off * off - along * along))
