"""Bones of the drawn chest: hollow tubes and plates, deposited as path lengths of bone.

A bone is its cortical shell. Samples of the shell's surface, each with its volume, are splatted
along the beam, so that edges come out brighter than middles and a rib is brightest where it turns
round the side of the chest, as on a radiograph.
"""

from __future__ import annotations

import math

import numpy as np

from spcxr.data.phantom_anatomy import Anatomy, Pose
from spcxr.data.phantom_canvas import (
    SPACING_PX,
    Array,
    Canvas,
    Samples,
    ball,
    lookup,
    polyline,
    smooth_noise,
    step,
)
from spcxr.data.phantom_organs import Landmarks

SPONGY = 0.1  # density of spongy bone beside compact bone


def draw_skeleton(
    canvas: Canvas, anatomy: Anatomy, pose: Pose, marks: Landmarks, rng: np.random.Generator
) -> Array:
    """(H, W) float32 path of bone: ribs, clavicles, scapulae, humeri, jaw, spine."""
    samples = _ribs(canvas, anatomy, marks, rng)
    samples += _girdle(canvas, anatomy, pose, rng)
    samples += _jaw(canvas, anatomy, pose)
    bone = canvas.splat(samples)
    for side in (-1.0, 1.0):
        _add_blade(bone, canvas, anatomy, pose, side)
        _add_humeral_head(bone, canvas, anatomy, (side * 1.24, 0.22 + pose.shoulders))
    _add_spine(bone, canvas, anatomy, rng)
    return bone


def shell(
    canvas: Canvas, path: Array, out: Array, radii: tuple[Array, Array], cortex: Array
) -> tuple[Array, Array]:
    """Samples (points (m, n, k, 3), volumes (m, n, k)) of tubular bones, float32.

    A shell of compact bone round spongy bone of a tenth its density.

    ``path`` (m, n, 3) centre lines; ``out`` (m, n, 3) unit vectors across them; ``radii`` half the
    size across ``out`` and along it, broadcast to (m, n); ``cortex`` thickness, (m, n).
    """
    along = np.gradient(path, axis=1)
    length = np.linalg.norm(along, axis=-1, keepdims=True)
    across = np.cross(along / np.maximum(length, 1e-6), out).astype(np.float32)
    tall, deep = (np.broadcast_to(r, path.shape[:2]).astype(np.float32)[..., None] for r in radii)
    # Even steps across the tube, so that each falls on its own row of pixels; front and back.
    count = max(5, math.ceil(2 * float(np.max(tall)) * canvas.scale / SPACING_PX))
    bounds = np.arccos(np.linspace(1, -1, count + 1, dtype=np.float32))
    turn, gap = (bounds[1:] + bounds[:-1]) / 2, np.diff(bounds)
    turn, gap = np.concatenate([turn, -turn]), np.concatenate([gap, gap])
    cos, sin = np.cos(turn), np.sin(turn)
    points = np.empty((*path.shape[:2], turn.size, 3), np.float32)
    for axis in range(3):
        points[..., axis] = path[..., axis, None] + tall * cos * across[..., axis, None]
        points[..., axis] += deep * sin * out[..., axis, None]
    arc = np.sqrt((tall * sin) ** 2 + (deep * cos) ** 2) * gap
    cortex = np.asarray(cortex, np.float32)[..., None]
    spongy = SPONGY * deep * np.abs(sin) * tall * np.float32(2 / count)
    return points, (arc * cortex + spongy * (cortex > 0)) * length.astype(np.float32)


def _ribs(canvas: Canvas, anatomy: Anatomy, marks: Landmarks, rng: np.random.Generator) -> Samples:
    """Eleven pairs of ribs, from the spine round the side to the cartilage in front."""
    steps = math.ceil(2.3 * canvas.scale / SPACING_PX)
    number = np.arange(11, dtype=np.float32)
    number = np.concatenate([number, number])[:, None]
    side = np.repeat([-1.0, 1.0], 11)[:, None].astype(np.float32)
    jitter = rng.normal(0, 0.006, (22, 1)).astype(np.float32)
    start = -0.05 + anatomy.rib_pitch * number + jitter
    # The upper ribs are short and fall less, the lowest fall the most.
    share = np.clip(0.45 + 0.12 * number, 0, 1) + 0.07 * np.maximum(number - 6, 0)
    fall = anatomy.rib_drop * share * rng.normal(1, 0.03, (22, 1))
    end = np.pi * np.clip(0.86 - 0.021 * number - 0.12 * (number > 8), 0, 1)
    angle = 0.12 + (end - 0.12) * np.linspace(0, 1, steps, dtype=np.float32)
    lateral = start + 0.5 * fall
    wall = np.array([lookup(marks.wall, max(v, 0.045)) for v in lateral[:, 0]])[:, None] + 0.02
    # A rib climbs a little from the spine, turns at its angle, then falls all the way round.
    lean, hump = np.sin(angle / 2) ** 2, 0.16 - 0.03 * np.maximum(number - 7, 0)
    y = start + fall * (lean * 1.05 - hump * np.sin(np.clip(angle * 1.6, 0, np.pi)) * (angle < 2))
    x = side * wall * np.sin(angle) ** 0.92
    z = -anatomy.depth * np.cos(angle)
    path = np.stack([x, y, z], -1).astype(np.float32)
    out = np.stack([side * np.sin(angle), np.zeros_like(angle), -np.cos(angle)], -1)
    front = step(angle - 1.75, 0.5)
    tall = anatomy.rib_height * (1 + 0.25 * front) * np.minimum(0.75 + 0.1 * number, 1)
    shade = 1.35 - 0.7 * np.sin(angle) ** 6  # at the side less than physics has: else a white rim
    shade *= np.where(number > 8, 0.6, 1)  # floating ribs are thin
    shade *= (1 - 0.6 * front) * step(end - angle + 0.03, 0.06)
    radii = (tall, tall * 0.42)
    return [shell(canvas, path, out.astype(np.float32), radii, anatomy.cortex * shade)]


def _girdle(canvas: Canvas, anatomy: Anatomy, pose: Pose, rng: np.random.Generator) -> Samples:
    """Clavicles, the spines of the scapulae, the humeral shafts."""
    samples: Samples = []
    lift = max(pose.shoulders, -0.2) + rng.normal(0, 0.02)
    outward = 0.06 if pose.view == "PA" else -0.06  # rolled forward, the blades leave the lungs
    for side in (-1.0, 1.0):
        tilt = lift + rng.normal(0, 0.012)
        clavicle = [(0.1, 0.21), (0.3, 0.15 + tilt * 0.3), (0.62, 0.07 + 0.7 * tilt)]
        clavicle += [(0.9, 0.03 + tilt), (1.13, 0.03 + tilt)]
        spine = [(0.72, 0.24 + tilt), (0.95, 0.1 + tilt), (1.2, 0.02 + tilt)]
        parts = (
            (clavicle, 0.043, anatomy.cortex * 1.3, 0.12, 0.0),
            (spine, 0.034, anatomy.cortex * 0.7, 0.1, outward),
        )
        for knots, radius, cortex, bend, push in parts:
            moved = [(side * (x + push), y, 0.0) for x, y in knots]
            samples += _tube(canvas, polyline(canvas, np.array(moved), bend), radius, cortex)
        samples += _humeral_shaft(canvas, anatomy, side, pose.shoulders)
    return samples


def _tube(canvas: Canvas, path: Array, radius: float, cortex: float) -> Samples:
    """One round bone along ``path`` (n, 3): its cortex, and spongy bone inside; closed ends."""
    out = np.zeros_like(path)
    out[:, 2] = 1
    place = np.linspace(-1, 1, len(path), dtype=np.float32)
    from_end = (1 - np.abs(place)) * len(path) * SPACING_PX / (2 * radius * canvas.scale)
    swell = (1 + 0.25 * place**4) * np.sqrt(np.clip(from_end, 0.25, 1))
    size = (radius * swell)[None]
    return [shell(canvas, path[None], out[None], (size, size), np.full((1, len(path)), cortex))]


def _humeral_shaft(canvas: Canvas, anatomy: Anatomy, side: float, lift: float) -> Samples:
    """From the humeral head down beside the chest; or up, when the arms are raised."""
    raised = min(max(-lift / 0.4, 0), 1)
    elbow = (side * (1.52 + 0.4 * raised), 1.2 - 1.75 * raised, 0.0)
    middle = (side * (1.38 + 0.12 * raised), 0.62 - 0.85 * raised, 0.0)
    shaft = np.array([(side * 1.27, 0.28 + lift, 0.0), middle, elbow])
    return _tube(canvas, polyline(canvas, shaft, 0.1), 0.075, 2 * anatomy.cortex)


def _add_humeral_head(
    bone: Array, canvas: Canvas, anatomy: Anatomy, centre: tuple[float, float]
) -> None:
    """Add one humeral head, a ball with a thin rind, to ``bone``."""
    x, y = centre
    rows, columns = canvas.window((x - 0.2, y - 0.2, x + 0.2, y + 0.2))
    dx, dy = canvas.x[rows, columns] - x, canvas.y[rows, columns] - y
    squared = (dx * dx + dy * dy) / 0.13**2
    rind = ball(squared) - 0.93 * ball(squared / 0.9)
    bone[rows, columns] += 22 * anatomy.cortex * rind


def _add_blade(bone: Array, canvas: Canvas, anatomy: Anatomy, pose: Pose, side: float) -> None:
    """Add one scapula's blade to ``bone``: a thin three-cornered plate with a thicker border."""
    # Rolled forward (PA) the blades leave the lungs; lying down (AP) they overlap them.
    push = 0.07 if pose.view == "PA" else -0.07
    lift = 0.7 * max(pose.shoulders, -0.2)
    corners = np.array([(0.7 + push, 0.2), (1.0 + push, 0.26), (0.82 + push, 1.0)])
    corners[:, 1] += lift
    (inner, top), (outer, bottom) = corners.min(0), corners.max(0)
    low, high = sorted((side * inner, side * outer))
    rows, columns = canvas.window((low, top, high, bottom))
    x, y = side * canvas.x[rows, columns], canvas.y[rows, columns]
    depth = np.full(x.shape, np.inf, np.float32)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        distance = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / math.hypot(bx - ax, by - ay)
        depth = np.minimum(depth, distance.astype(np.float32))
    plate = step(depth, 0.012) * (1 + 1.6 * np.exp(-np.square((depth - 0.015) / 0.018)))
    bone[rows, columns] += 0.9 * anatomy.cortex * plate


def _jaw(canvas: Canvas, anatomy: Anatomy, pose: Pose) -> Samples:
    """The mandible's arch; seen where the image reaches the chin."""
    middle, chin = 2 * pose.angle, pose.chin
    arch = [(-0.4, -0.5), (-0.36, -0.2), (-0.15, -0.06), (0.15, -0.06), (0.36, -0.2), (0.4, -0.5)]
    knots = np.array([(middle + x, chin + y, 0.3) for x, y in arch])
    return _tube(canvas, polyline(canvas, knots, 0.15), 0.07, 2 * anatomy.cortex)


def _add_spine(bone: Array, canvas: Canvas, anatomy: Anatomy, rng: np.random.Generator) -> None:
    """Add the vertebrae to ``bone``: bodies, end plates, pedicles and processes."""
    rows, columns = canvas.window((-0.4, -1.2, 0.4, 3.2))
    y = canvas.y[rows, columns]
    x = canvas.x[rows, columns] - anatomy.scoliosis * np.sin(2.2 * y) + 0.3 * math.sin(canvas.turn)
    pitch = anatomy.rib_pitch * (1 + 0.05 * np.clip(y, -0.5, 2))
    level = (y + 0.09) / pitch
    phase = level - np.floor(level)  # 0 at a vertebra's upper plate
    half = (
        (0.105 if anatomy.child else 0.112)
        * (1 + 0.09 * np.clip(y, 0, 2))
        * (1 - 0.07 * np.sin(np.pi * phase))
    )
    edge = np.abs(x) / half
    inside = step(1 - edge, 0.06)
    disc = step(np.abs(phase - 0.5) - 0.42, 0.05)
    plate = np.exp(-(((np.abs(phase - 0.5) - 0.38) / 0.05) ** 2))
    rim = np.exp(-(((edge - 0.94) / 0.08) ** 2)) * (1 - disc)
    grain = 1 + 0.14 * smooth_noise(y.shape, 30, rng)
    body = inside * ((0.075 * grain) * (1 - 0.75 * disc) + 0.028 * plate) + 0.035 * rim
    eye = ((np.abs(x) - 0.085) / 0.028) ** 2 + ((phase - 0.36) / 0.24) ** 2
    body += 0.05 * np.exp(-((np.sqrt(eye) - 1) ** 2) / 0.06)
    thorn = (x / 0.022) ** 2 + ((phase - 0.75) / 0.3) ** 2
    body += 0.055 * np.exp(-(thorn**2))
    wing = ((np.abs(x) - 0.17) / 0.07) ** 2 + ((phase - 0.35) / 0.2) ** 2
    body += 0.03 * np.exp(-(wing**2)) * step(1.9 - y, 0.2)
    bone[rows, columns] += 0.4 * body * (anatomy.cortex / 0.009)
