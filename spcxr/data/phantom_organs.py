"""Soft tissue and air of the drawn chest: path lengths along the beam, in body units."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from spcxr.data.phantom_anatomy import Anatomy, Pose
from spcxr.data.phantom_canvas import Array, Canvas, ball, curve_table, lookup, step


@dataclass(frozen=True)
class Organs:
    """Paths (H, W) float32: ``body`` all of the patient, ``lung`` aerated lung, ``gas`` other air.

    ``lung_mask`` both lungs without heart and mediastinum, above the domes; ``heart_mask``.
    """

    body: Array
    lung: Array
    gas: Array
    lung_mask: Array
    heart_mask: Array
    landmarks: Landmarks


@dataclass(frozen=True)
class Landmarks:
    """Where the other parts find the lungs: curves' tables and points, in body units."""

    wall: Array  # half-width of the rib cage's inside at each y
    dome: Array  # the diaphragm's y at each x
    right_dome: float
    left_dome: float


def draw_organs(canvas: Canvas, anatomy: Anatomy, pose: Pose, rng: np.random.Generator) -> Organs:
    """Torso, lungs, heart and mediastinum, diaphragm and gastric bubble."""
    marks = _landmarks(anatomy, pose)
    cavity, below = _cavity(canvas, anatomy, marks)
    heart = _heart(canvas, anatomy, pose, marks)
    middle = np.maximum(_mediastinum(canvas, anatomy), heart)
    lung = np.maximum(cavity - middle, 0)
    mask = (cavity > 0.02) & (below < 0) & (middle <= 0)
    body = _torso(canvas, anatomy, pose) + _breasts(canvas, anatomy)
    gas = _stomach(canvas, marks, rng)
    heart_mask = (heart > 0) & (below < 0.06)
    return Organs(body, lung, gas, mask, heart_mask, marks)


def _landmarks(anatomy: Anatomy, pose: Pose) -> Landmarks:
    """The rib cage's inner wall and the two domes."""
    down = np.concatenate([np.linspace(0, 1, 24) ** 2 * 0.6, np.linspace(0.66, 2.6, 12)])
    span, power = (1.25, 1.75) if anatomy.child else (0.98, 1.9)
    rise = 1 - (1 - np.minimum(down / span, 1)) ** 2.4
    widest = 0.95 + anatomy.flare * np.clip(down - 0.6, 0, 1.2)
    tuck = 0.09 * np.clip(down - 1.75, 0, 0.8) ** 2  # the cage narrows below the costal margin
    wall = curve_table(down, 0.45 + (widest - 0.45) * rise ** (1 / power) - tuck)
    right = anatomy.dome_y - pose.raised
    left = right + 0.075
    across = np.linspace(-1.2, 1.2, 161)
    dome = np.empty_like(across)
    for side, top in ((-1, right), (1, left)):
        outward = side * across - 0.46
        lateral = lookup(wall, top + 0.3) - 0.46 + 0.012
        reach = np.where(outward > 0, lateral, 0.52)
        fall = np.where(outward > 0, 0.4, 0.15)
        there = top + fall * (1 - ball((outward / reach) ** 2))
        dome = np.where(side * across > 0, there, dome)
    seam = np.abs(across) < 0.12  # the domes join under the heart
    dome[seam] = np.interp(across[seam], across[~seam], dome[~seam])
    return Landmarks(wall, curve_table(across, dome), right, left)


def _cavity(canvas: Canvas, anatomy: Anatomy, marks: Landmarks) -> tuple[Array, Array]:
    """Path inside the rib cage above the diaphragm; and how far each pixel lies below a dome."""
    side = np.abs(canvas.x)
    ratio = side / marks.wall[canvas.y_index]
    bulge = curve_table([0, 0.02, 0.1, 0.3, 0.8, 1.6], [0, 0.16, 0.34, 0.62, 0.95, 1.0])
    cavity = 2 * anatomy.depth * bulge[canvas.y_index] * ball(ratio**2) ** 0.8
    high = np.linspace(0, 1, 16) ** 2 * 0.24
    medial = curve_table(high, 0.45 - 0.29 * np.sqrt(1 - (1 - high / 0.24) ** 2))
    cavity *= step(side - medial[canvas.y_index] - 0.012, 0.012)
    cavity[canvas.y < 0] = 0
    below = canvas.y - marks.dome[canvas.x_index]
    # The dome's top touches the beam: the path changes as the square root of the depth below it.
    cavity *= np.maximum(1 - np.sqrt(np.maximum(below, 0) / 0.42), 0)
    return cavity, below


def _mediastinum(canvas: Canvas, anatomy: Anatomy) -> Array:
    """Path of the great vessels and the column of tissue before the spine."""
    sail = anatomy.thymus
    down = [-0.3, 0.1, 0.3, 0.45, 0.6, 0.8, 1.1, 2.2]
    extra = np.array([0, 0.2, 0.8, 1.0, 1.0, 0.5, 0, 0])
    right = np.array([0.14, 0.165, 0.19, 0.205, 0.21, 0.2, 0.18, 0.17]) + 0.9 * sail * extra
    left = np.array([0.14, 0.165, 0.175, 0.18, 0.18, 0.18, 0.17, 0.15]) + sail * extra
    drift = anatomy.scoliosis * np.sin(np.array(down) * 2.2)
    edges = [curve_table(down, values) for values in (drift - right, drift + left)]
    low, high = (edge[canvas.y_index] for edge in edges)
    ratio = (canvas.x - (low + high) / 2) / ((high - low) / 2)
    column = 1.7 * anatomy.depth * ball(ratio**4)
    radius = anatomy.aorta
    knob = _blob(canvas, (0.27 - radius + 0.4 * (radius - 0.09), 0.5), radius, radius * 1.1)
    trunk = _blob(canvas, (0.13, 0.76), 0.125, 0.17)
    return np.maximum(np.maximum(column, 0.75 * knob), 0.6 * trunk)


def _blob(canvas: Canvas, centre: tuple[float, float], wide: float, tall: float) -> Array:
    """Relative path through an upright ellipsoid, 1 at its centre."""
    dx, dy = (canvas.x - centre[0]) / wide, (canvas.y - centre[1]) / tall
    return ball(dx * dx + dy * dy)


def _heart(canvas: Canvas, anatomy: Anatomy, pose: Pose, marks: Landmarks) -> Array:
    """Path through the heart: the ventricles' tilted ellipsoid and the right atrium's."""
    # Lying down and breathing out both widen the shadow (magnification and the raised diaphragm).
    ratio = anatomy.heart * (1.05 if pose.view == "AP" else 1.0) * (1 + 0.4 * pose.raised)
    width = 2 * ratio * lookup(marks.wall, marks.right_dome - 0.1)
    right, left = 0.33 * width, 0.67 * width
    reach = (left + 0.55 * right) / 2
    cos, sin = math.cos(anatomy.heart_tilt), math.sin(anatomy.heart_tilt)
    flat = 0.72
    long = reach / math.hypot(cos, flat * sin)
    drop = long * math.hypot(sin, flat * cos)
    floor = lookup(marks.dome, 0.3)
    shift = math.sin(pose.turn) * 0.3 * anatomy.depth
    dx = canvas.x - (left - reach + shift)
    dy = canvas.y - (floor + 0.08 - drop)
    along, beside = (cos * dx + sin * dy) / long, (cos * dy - sin * dx) / (flat * long)
    ventricles = ball(np.abs(along) ** 2.2 + np.abs(beside) ** 2.2)
    atrium = _blob(canvas, (0.2 - right + shift, floor - 0.3), 0.2, 0.33)
    return 1.25 * anatomy.depth * np.maximum(ventricles, 0.9 * atrium)


def _torso(canvas: Canvas, anatomy: Anatomy, pose: Pose) -> Array:
    """Path through trunk, neck and shoulder girdle, joined smoothly."""
    wall, y = anatomy.wall, canvas.y
    down = [-0.2, 0.1, 0.5, 0.9, 1.4, 2.0, 2.8]
    half = [0.8, 0.98, 1.04, 1.03, 1.0, 1.0, 1.0]
    outline = curve_table(down, [h + wall for h in half])
    thick = curve_table(down, [d * (anatomy.depth + wall) for d in (0.4, 0.6, 0.85, 1, 1, 1, 1.05)])
    ratio = canvas.x / outline[canvas.y_index]
    trunk = 2 * thick[canvas.y_index] * ball(np.abs(ratio) ** 2.5) * step(y + 0.02, 0.28)
    broad = 0.31 + 0.6 * wall + (0.04 if anatomy.child else 0)
    neck = 1.9 * broad * ball((canvas.x / broad) ** 2) * step(0.25 - y, 0.35)
    at = np.array([0.15, 0.45, 0.8, 1.1, 1.4, 2.0])
    axis = np.array([-0.1, 0.03, 0.12, 0.2, 0.36, 0.85]) + pose.shoulders * at
    radius = np.array([0.28, 0.21, 0.24, 0.27, 0.26, 0.25]) * (1 + 0.8 * (wall - 0.1))
    both = np.concatenate([-at[::-1], at])
    level = curve_table(both, np.concatenate([axis[::-1], axis]))[canvas.x_index]
    round_ = curve_table(both, np.concatenate([radius[::-1], radius]))[canvas.x_index]
    girdle = 1.8 * round_ * ball(((y - level) / round_) ** 2)
    return np.sqrt(trunk**2 + neck**2 + girdle**2)


def _breasts(canvas: Canvas, anatomy: Anatomy) -> Array:
    """Path through two soft half-balls over the lower lungs; sharpest at their lower edge."""
    if anatomy.breast <= 0:
        return np.zeros((), np.float32)
    low = 1.1 + 0.5 * anatomy.breast + 0.002 * (anatomy.age - 20)
    dx, dy = (np.abs(canvas.x) - 0.52) / 0.42, canvas.y - low
    dy = np.where(dy > 0, dy / 0.3, dy / 0.55)
    return 2 * anatomy.breast * ball(dx * dx + dy * dy)


def _stomach(canvas: Canvas, marks: Landmarks, rng: np.random.Generator) -> Array:
    """Path through the gas under the left dome (and, at times, in the colon's bend beside it)."""
    wide, tall = rng.uniform(0.08, 0.24), rng.uniform(0.05, 0.13)
    centre = (rng.uniform(0.3, 0.5), marks.left_dome + 0.06 + tall)
    gas = rng.uniform(0.1, 0.5) * _blob(canvas, centre, wide, tall)
    for _ in range(rng.integers(0, 4)):
        spot = (rng.uniform(0.1, 0.8), marks.left_dome + rng.uniform(0.3, 0.6))
        size = rng.uniform(0.05, 0.12)
        gas = np.maximum(gas, 0.3 * _blob(canvas, spot, size, 0.8 * size))
    under = canvas.y - marks.dome[canvas.x_index] - 0.05
    return gas * step(under, 0.012)
