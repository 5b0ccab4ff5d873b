"""Bones of the drawn chest: hollow tubes and plates, deposited as path lengths of bone.

A bone is its cortical shell. Samples of the shell's surface, each with its volume, are splatted
along the beam, so that edges come out brighter than middles and a rib is brightest where it turns
round the side of the chest, as on a radiograph.
"""

from __future__ import annotations

import math

import numpy as np

from spcxr.data.phantom_anatomy import Anatomy, Pose
from spcxr.data.phantom_canvas import Array, Canvas, ball, lookup, smooth_noise, step
from spcxr.data.phantom_organs import Landmarks


def draw_skeleton(
    canvas: Canvas, anatomy: Anatomy, pose: Pose, marks: Landmarks, rng: np.random.Generator
) -> Array:
    """(H, W) float32 path of bone: ribs, clavicles, scapulae, humeri, spine."""
    bone = _ribs(canvas, anatomy, marks, rng)
    bone += _girdle(canvas, anatomy, pose, rng)
    _add_spine(bone, canvas, anatomy, rng)
    return bone


def shell(
    canvas: Canvas, path: Array, out: Array, radii: tuple[Array, Array], cortex: Array
) -> tuple[Array, Array]:
    """Samples (points, volumes) of tubes' cortical shells.

    ``path`` (m, n, 3) centre lines; ``out`` (m, n, 3) unit vectors across them; ``radii`` half the
    size across ``out`` and along it, broadcast to (m, n); ``cortex`` thickness, (m, n).
    """
    along = np.gradient(path, axis=1)
    length = np.linalg.norm(along, axis=-1, keepdims=True)
    across = np.cross(along / np.maximum(length, 1e-6), out)
    tall, deep = (np.broadcast_to(r, path.shape[:2])[..., None] for r in radii)
    count = max(8, math.ceil(2 * math.pi * float(np.max(tall)) * canvas.scale / 1.1))
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False, dtype=np.float32)
    cos, sin = np.cos(turn), np.sin(turn)
    points = path[:, :, None, :] + (tall * cos)[..., None] * across[:, :, None, :]
    points = points + (deep * sin)[..., None] * out[:, :, None, :]
    arc = np.sqrt((tall * sin) ** 2 + (deep * cos) ** 2) * (2 * np.pi / count)
    return points, arc * length * np.asarray(cortex)[..., None]


def _ribs(canvas: Canvas, anatomy: Anatomy, marks: Landmarks, rng: np.random.Generator) -> Array:
    """Eleven pairs of ribs, from the spine round the side to the cartilage in front."""
    steps = math.ceil(2.4 * canvas.scale / 1.1)
    number = np.arange(11, dtype=np.float32)
    number = np.concatenate([number, number])[:, None]
    side = np.repeat([-1.0, 1.0], 11)[:, None].astype(np.float32)
    jitter = rng.normal(0, 0.006, (22, 1)).astype(np.float32)
    start = -0.09 + anatomy.rib_pitch * number + jitter
    share = np.clip(0.45 + 0.12 * number, 0, 1)  # the upper ribs are short and fall less
    fall = anatomy.rib_drop * share * rng.normal(1, 0.03, (22, 1))
    end = np.pi * np.clip(0.86 - 0.021 * number - 0.12 * (number > 8), 0, 1)
    angle = 0.12 + (end - 0.12) * np.linspace(0, 1, steps, dtype=np.float32)
    lateral = start + 0.5 * fall
    wall = np.array([lookup(marks.wall, max(v, 0.045)) for v in lateral[:, 0]])[:, None] + 0.02
    # A rib climbs a little from the spine, turns at its angle, then falls all the way round.
    lean = np.sin(angle / 2) ** 2
    y = start + fall * (lean * 1.05 - 0.16 * np.sin(np.clip(angle * 1.6, 0, np.pi)) * (angle < 2))
    x = side * wall * np.sin(angle) ** 0.92
    z = -anatomy.depth * np.cos(angle)
    path = np.stack([x, y, z], -1).astype(np.float32)
    out = np.stack([side * np.sin(angle), np.zeros_like(angle), -np.cos(angle)], -1)
    front = step(angle - 1.75, 0.5)
    tall = anatomy.rib_height * (1 + 0.25 * front) * np.minimum(0.75 + 0.1 * number, 1)
    cortex = anatomy.cortex * (1 - 0.45 * front) * step(end - angle + 0.03, 0.06)
    points, volumes = shell(canvas, path, out.astype(np.float32), (tall, tall * 0.42), cortex)
    return canvas.splat(points, volumes.astype(np.float32))


def _line(canvas: Canvas, knots: Array, bend: float = 0.0) -> Array:
    """(n, 3) float32 points along a polyline of body points, rounded at its corners."""
    knots = np.asarray(knots, np.float64)
    gaps = np.linalg.norm(np.diff(knots, axis=0), axis=1)
    at = np.concatenate([[0], np.cumsum(gaps)])
    where = np.linspace(0, at[-1], max(8, math.ceil(at[-1] * canvas.scale)))
    line = np.stack([np.interp(where, at, knots[:, k]) for k in range(3)], -1)
    if bend > 0:
        reach = max(1, round(bend * canvas.scale))
        kernel = np.hanning(2 * reach + 3)[1:-1]
        padded = np.pad(line, ((reach, reach), (0, 0)), mode="reflect", reflect_type="odd")
        line = np.stack(
            [np.convolve(padded[:, k], kernel / kernel.sum(), "valid") for k in range(3)], -1
        )
    return line.astype(np.float32)


def _girdle(canvas: Canvas, anatomy: Anatomy, pose: Pose, rng: np.random.Generator) -> Array:
    """Clavicles, the scapulae's borders and spines, the humeral heads."""
    bone = np.zeros(canvas.shape, np.float32)
    lift = pose.shoulders + rng.normal(0, 0.02)
    outward = 0.06 if pose.view == "PA" else -0.06  # rolled forward, the blades leave the lungs
    for side in (-1.0, 1.0):
        tilt = lift + rng.normal(0, 0.012)
        clavicle = [(0.1, 0.21, 0.6), (0.3, 0.15 + tilt * 0.3, 0.6), (0.62, 0.07 + 0.7 * tilt, 0.4)]
        clavicle += [(0.9, 0.03 + tilt, 0.1), (1.13, 0.03 + tilt, -0.1)]
        blade = [(1.02, 0.3 + tilt, -0.5), (0.95, 0.6 + tilt, -0.55), (0.83, 0.96, -0.6)]
        blade += [(0.75, 0.82, -0.6), (0.69, 0.32 + tilt, -0.55)]
        spine = [(0.72, 0.24 + tilt, -0.6), (0.95, 0.1 + tilt, -0.5), (1.2, 0.02 + tilt, -0.2)]
        coracoid = [(1.0, 0.17 + tilt, 0.1), (0.95, 0.13 + tilt, 0.2)]
        parts = (
            (clavicle, 0.043, anatomy.cortex * 1.3, 0.12, 0.0),
            (blade, 0.026, anatomy.cortex * 0.7, 0.07, outward),
            (spine, 0.034, anatomy.cortex * 0.7, 0.1, outward),
            (coracoid, 0.045, anatomy.cortex, 0.02, outward),
        )
        for knots, radius, cortex, bend, push in parts:
            moved = [(side * (x + push), y, z) for x, y, z in knots]
            bone += _tube(canvas, _line(canvas, np.array(moved), bend), radius, cortex)
        bone += _humerus(canvas, anatomy, side, lift)
    return bone


def _tube(canvas: Canvas, path: Array, radius: float, cortex: float) -> Array:
    """(H, W) path of bone of one round hollow tube that tapers at its ends."""
    out = np.zeros_like(path)
    out[:, 2] = 1
    place = np.linspace(-1, 1, len(path))
    swell = (1 + 0.3 * place**4) * np.clip(
        (1 - np.abs(place)) * len(path) / (radius * canvas.scale), 0.15, 1
    ) ** 0.5
    radii = (radius * swell)[None]
    thickness = np.full((1, len(path)), cortex)
    points, volumes = shell(canvas, path[None], out[None], (radii, radii), thickness)
    return canvas.splat(points, volumes.astype(np.float32))


def _humerus(canvas: Canvas, anatomy: Anatomy, side: float, lift: float) -> Array:
    """Path of bone of one humeral head and the start of its shaft."""
    centre = (side * 1.24, 0.22 + lift)
    rows, columns = canvas.window(
        (centre[0] - 0.2, centre[1] - 0.2, centre[0] + 0.2, centre[1] + 0.2)
    )
    bone = np.zeros(canvas.shape, np.float32)
    dx, dy = canvas.x[rows, columns] - centre[0], canvas.y[rows, columns] - centre[1]
    squared = (dx * dx + dy * dy) / 0.13**2
    hollow = ball(squared) - 0.93 * ball(squared / 0.9)
    bone[rows, columns] = 0.14 * hollow * anatomy.cortex / 0.008
    shaft = [
        (side * 1.27, 0.28 + lift, 0.0),
        (side * 1.4, 0.7 + lift, 0.0),
        (side * 1.52, 1.2, 0.0),
    ]
    return bone + _tube(canvas, _line(canvas, np.array(shaft), 0.1), 0.075, 2 * anatomy.cortex)


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
    bone[rows, columns] += body * (anatomy.cortex / 0.008)
