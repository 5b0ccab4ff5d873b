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
    middle, place = _silhouette(canvas, anatomy, pose, marks)
    # Behind the domes only the rear recess holds lung, more of it towards the sides.
    recess = cavity * step(np.abs(canvas.x) - 0.45, 0.38)
    under = np.clip(below * canvas.scale + 0.5, 0, 1)
    lung = np.maximum(cavity - middle, 0) * (1 - under) + recess * under
    mask = (cavity > 0.02) & (below < 0) & (middle <= 0)
    body = _torso(canvas, anatomy, pose) + _breasts(canvas, anatomy)
    gas = _stomach(canvas, marks, rng)
    heart_mask = (middle > 0) & (canvas.y > 0.82 + 0.12 * place * place) & (below < 0.06)
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
    cavity = 2 * anatomy.depth * bulge[canvas.y_index] * ball(ratio * ratio)
    high = np.linspace(0, 1, 16) ** 2 * 0.24
    medial = curve_table(
        [*high, 0.3, 0.7], [*(0.45 - 0.29 * np.sqrt(1 - (1 - high / 0.24) ** 2)), 0.155, -0.05]
    )
    cavity *= step(side - medial[canvas.y_index] - 0.012, 0.012)
    cavity[canvas.y < 0] = 0
    below = canvas.y - marks.dome[canvas.x_index]
    # The dome's top touches the beam: the path changes as the square root of the depth below it.
    cavity *= np.maximum(1 - np.sqrt(np.maximum(below, 0) / 0.42), 0)
    return cavity, below


def _silhouette(
    canvas: Canvas, anatomy: Anatomy, pose: Pose, marks: Landmarks
) -> tuple[Array, Array]:
    """Path of mediastinum and heart; and each pixel's place between its edges (-1 right, 1 left).

    The edges run through the borders that a radiograph shows: vena cava and right atrium; aortic
    knob, pulmonary trunk, auricle and left ventricle (the four left moguls).
    """
    # Lying down and breathing out both widen the heart (magnification and the raised diaphragm).
    ratio = anatomy.heart * (1.05 if pose.view == "AP" else 1.0) * (1 + 0.4 * pose.raised)
    width = 2 * ratio * lookup(marks.wall, marks.right_dome - 0.1)
    sway = math.sin(pose.turn) * 0.3 * anatomy.depth
    right, left = 0.34 * width - sway, 0.66 * width + sway
    top = 0.9
    tall = lookup(marks.dome, 0.3) - top
    knob = 0.165 + 0.8 * anatomy.aorta
    sail = anatomy.thymus
    steep = anatomy.heart_tilt
    left_edge = [(-0.4, 0.12), (0, 0.145), (0.2, 0.16 + 0.6 * sail), (0.34, 0.17 + sail)]
    round_ = ((-1.1, 0.9), (-0.55, 0.25), (-0.15, 0.0), (0.2, 0.0), (0.7, 0.3), (1.1, 0.85))
    arch = [(0.5 + a * anatomy.aorta, knob - b * anatomy.aorta) for a, b in round_]
    left_edge += [(y, max(x, 0.18 + sail)) for y, x in arch]
    left_edge += [(0.69, 0.21 + sail), (0.78, 0.24 + 0.7 * sail), (top, 0.27)]
    grown = (
        (0.2, 0.28),
        (0.4, 0.3 + 0.45 * steep),
        (0.6, 0.86),
        (0.8, 0.99),
        (0.92, 0.99),
        (1.0, 0.95),
    )
    left_edge += [(top + f * tall, 0.27 + g * (left - 0.27)) for f, g in grown]
    left_edge += [(top + 1.5 * tall, 0.9 * left)]
    right_edge = [(-0.4, 0.12), (0, 0.15), (0.2, 0.175 + 0.6 * sail), (0.5, 0.195 + 0.9 * sail)]
    right_edge += [(0.62, 0.205 + 0.6 * sail), (0.8, 0.2)]
    swell = (
        (0.15, 0.9),
        (0.4, 0.98),
        (0.62, 1.0),
        (0.8, 0.96),
        (1.0, 0.86),
        (1.3, 0.7),
    )
    right_edge += [(top + f * tall, max(g * right, 0.17)) for f, g in swell]
    sides = [np.array(edge).T for edge in (right_edge, left_edge)]
    bend = [anatomy.scoliosis * np.sin(2.2 * at) for at, _ in sides]
    low = curve_table(sides[0][0], bend[0] - sides[0][1])[canvas.y_index]
    high = curve_table(sides[1][0], bend[1] + sides[1][1])[canvas.y_index]
    place = (2 * canvas.x - low - high) / (high - low)
    deep = [(-0.4, 1.2), (0.4, 1.3), (0.7, 1.1), (top + 0.5 * tall, 1.45), (2.2, 1.4)]
    thick = curve_table(*np.array(deep).T)[canvas.y_index] * anatomy.depth
    # Gullet, azygos vein and aorta, before the spine.
    rear = 0.75 * anatomy.depth * np.exp(-np.square(np.square(canvas.x / np.float32(0.16))))
    return (thick + rear) * ball(place * place * np.abs(place)), place


def _blob(canvas: Canvas, centre: tuple[float, float], wide: float, tall: float) -> Array:
    """Relative path through an upright ellipsoid, 1 at its centre."""
    dx, dy = (canvas.x - centre[0]) / wide, (canvas.y - centre[1]) / tall
    return ball(dx * dx + dy * dy)


def _torso(canvas: Canvas, anatomy: Anatomy, pose: Pose) -> Array:
    """Path through trunk, neck and shoulder girdle, joined smoothly."""
    wall, y = anatomy.wall, canvas.y
    down = [-0.2, 0.1, 0.5, 0.9, 1.4, 2.0, 2.8]
    half = [0.8, 0.98, 1.04, 1.03, 1.0, 1.0, 1.0]
    outline = curve_table(down, [h + wall for h in half])
    thick = curve_table(down, [d * (anatomy.depth + wall) for d in (0.4, 0.6, 0.85, 1, 1, 1, 1.05)])
    ratio = canvas.x / outline[canvas.y_index]
    trunk = (
        2
        * thick[canvas.y_index]
        * ball(ratio * ratio * np.sqrt(np.abs(ratio)))
        * step(y + 0.02, 0.28)
    )
    broad = 0.31 + 0.6 * wall + (0.04 if anatomy.child else 0)
    neck = 1.9 * broad * ball((canvas.x / broad) ** 2) * step(0.25 - y, 0.35)
    head = 1.2 * _blob(canvas, (2 * pose.angle, pose.chin - 0.5), 0.48, 0.5)
    at = np.array([0.15, 0.45, 0.8, 1.1, 1.4, 2.0])
    axis = np.array([-0.1, 0.03, 0.12, 0.2, 0.36, 0.85]) + pose.shoulders * at
    radius = np.array([0.28, 0.21, 0.24, 0.27, 0.26, 0.25]) * (1 + 0.8 * (wall - 0.1))
    both = np.concatenate([-at[::-1], at])
    level = curve_table(both, np.concatenate([axis[::-1], axis]))[canvas.x_index]
    round_ = curve_table(both, np.concatenate([radius[::-1], radius]))[canvas.x_index]
    girdle = 1.8 * round_ * ball(((y - level) / round_) ** 2)
    return np.sqrt(trunk**2 + neck**2 + girdle**2 + head**2)


def _breasts(canvas: Canvas, anatomy: Anatomy) -> Array:
    """Path through two soft half-balls over the lower lungs; sharpest at their lower edge."""
    if anatomy.breast <= 0:
        return np.zeros((), np.float32)
    low = 1.12 + anatomy.breast + 0.002 * (anatomy.age - 20)
    dx, dy = (np.abs(canvas.x) - 0.56) / 0.44, canvas.y - low
    dy = np.where(dy > 0, dy / 0.32, dy / 0.8)
    return 2 * anatomy.breast * np.maximum(1 - dx * dx - dy * dy, 0)


def _stomach(canvas: Canvas, marks: Landmarks, rng: np.random.Generator) -> Array:
    """Path through the gas under the left dome (and, at times, in the colon's bend beside it)."""
    wide, tall = rng.uniform(0.08, 0.24), rng.uniform(0.05, 0.13)
    centre = (rng.uniform(0.3, 0.5), marks.left_dome + 0.06 + tall)
    gas = rng.uniform(0.1, 0.5) * _blob(canvas, centre, wide, tall)
    for _ in range(rng.integers(0, 4)):
        spot = (rng.uniform(0.1, 0.8), marks.left_dome + rng.uniform(0.3, 0.6))
        size = rng.uniform(0.05, 0.12)
        gas = np.maximum(gas, 0.2 * _blob(canvas, spot, size, 0.7 * size) ** 2)
    under = canvas.y - marks.dome[canvas.x_index] - 0.05
    return gas * step(under, 0.012)
