"""One drawn chest radiograph, from a seed and an index: pixels and masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spcxr.data.phantom_anatomy import Anatomy, Pose, draw_anatomy, draw_pose
from spcxr.data.phantom_canvas import Array, Canvas, smooth_noise
from spcxr.data.phantom_detector import SITES, Site, expose
from spcxr.data.phantom_disease import LABELS, draw_opacity
from spcxr.data.phantom_marker import burn_in
from spcxr.data.phantom_organs import Organs, draw_organs
from spcxr.data.phantom_skeleton import draw_skeleton
from spcxr.data.phantom_vessels import draw_airways, draw_vessels
from spcxr.errors import SpcxrError

SMALLEST_PX, LARGEST_PX = 64, 2048
AIR = 0.74  # the share of air in a healthy lung at full inspiration


@dataclass(frozen=True)
class Phantom:
    """One drawn radiograph.

    ``pixels`` (H, W) uint16, 0..4095, bone bright; ``lung_mask`` and ``heart_mask`` (H, W) bool,
    the lungs without heart and mediastinum; ``spacing_mm`` (row, column) at the detector.
    """

    pixels: Array
    lung_mask: Array
    heart_mask: Array
    label: str
    site: str
    age: float
    sex: str
    patient_id: str
    view: str
    spacing_mm: tuple[float, float]


def patient_of(index: int) -> tuple[int, int]:
    """An image's patient and that patient's first image: of every four images, two are one's.

    >>> [patient_of(i) for i in range(5)]
    [(0, 0), (1, 1), (2, 2), (2, 2), (3, 4)]
    """
    place = min(index % 4, 2)
    return 3 * (index // 4) + place, index - index % 4 + place


def draw(
    index: int,
    *,
    seed: int = 0,
    site: str = "site-a",
    label: str = "normal",
    child: bool = False,
    size_px: int = 512,
    severity: tuple[float, float] = (0.0, 1.0),
    marker: str = "",
) -> Phantom:
    """Draw image ``index`` of the series ``seed``; it depends on nothing but the arguments.

    With another ``label`` the chest, its pose and its exposure stay the same.

    ``size_px`` is the width (64 to 2048); the height is 1.1 (site-a) or 1.2 (site-b) times that.
    ``label`` is ``normal``, ``pneumonia`` or ``covid``. Two images in four are of one patient
    (`patient_of`) and share the anatomy when ``child`` is the same for both. ``severity`` holds the
    lowest and the highest that a disease may have, from 0 (hardly seen) to 1 (plain). ``marker``
    is a text burned into the finished picture (`phantom_marker`).

    Raises
    ------
    SpcxrError
        An unknown site or label, a size, a severity or an index out of range.

    >>> phantom = draw(3, seed=1, label="covid", size_px=96)
    >>> phantom.pixels.shape, phantom.pixels.dtype.name, phantom.patient_id
    ((106, 96), 'uint16', 'PHANTOM-1-00002')
    """
    check_choice("site", site, tuple(SITES))
    check_choice("label", label, LABELS)
    if not SMALLEST_PX <= size_px <= LARGEST_PX:
        raise SpcxrError(f"size_px {size_px}: choose {SMALLEST_PX} to {LARGEST_PX}")
    if index < 0 or seed < 0:
        raise SpcxrError(f"index {index}, seed {seed}: both must be 0 or more")
    if not 0 <= severity[0] <= severity[1] <= 1:
        raise SpcxrError(f"severity {severity}: choose 0 <= lowest <= highest <= 1")
    patient, first = patient_of(index)
    anatomy = draw_anatomy(np.random.default_rng(np.random.SeedSequence((seed, first, 1))), child)
    rng = np.random.default_rng(np.random.SeedSequence((seed, index)))
    pose = draw_pose(rng, anatomy)
    look = SITES[site]
    canvas = _lay_canvas(anatomy, pose, (round(size_px * look.aspect), size_px))
    organs = draw_organs(canvas, anatomy, pose, rng)
    # A stream of its own: the same chest, posed and exposed the same, whatever fills its lungs.
    disease = rng.spawn(1)[0]
    opacity = draw_opacity(canvas, organs.landmarks, label, child, severity, disease)
    pixels = _radiograph(canvas, anatomy, pose, organs, opacity, look, rng)
    if marker:
        pixels = burn_in(pixels, marker, organs.lung_mask)
    spacing = anatomy.unit_mm / canvas.scale
    return Phantom(
        pixels,
        organs.lung_mask,
        organs.heart_mask,
        label,
        site,
        anatomy.age,
        anatomy.sex,
        f"PHANTOM-{seed}-{patient:05d}",
        pose.view,
        (spacing, spacing),
    )


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices.

    >>> check_choice("site", "x", ("a", "b"))
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: site 'x': choose one of a, b
    """
    if value not in choices:
        raise SpcxrError(f"{what} {value!r}: choose one of {', '.join(choices)}")


def _lay_canvas(anatomy: Anatomy, pose: Pose, shape: tuple[int, int]) -> Canvas:
    """The pixel grid with the lungs in its middle."""
    middle = 0.52 * anatomy.dome_y + 0.12
    origin = (pose.shift[0], middle + pose.shift[1])
    return Canvas(shape, shape[1] / pose.zoom, pose.angle, origin, pose.turn)


def _radiograph(
    canvas: Canvas,
    anatomy: Anatomy,
    pose: Pose,
    organs: Organs,
    opacity: Array,
    look: Site,
    rng: np.random.Generator,
) -> Array:
    """(H, W) uint16: all parts' path lengths added and exposed."""
    bone = draw_skeleton(canvas, anatomy, pose, organs.landmarks, rng)
    vessels = draw_vessels(canvas, organs.lung, rng) * rng.uniform(1.5, 2.2)
    grain = (
        1 + 0.02 * smooth_noise(canvas.shape, 70, rng) + 0.012 * smooth_noise(canvas.shape, 25, rng)
    )
    air = organs.lung * (AIR * grain * (1 - opacity))
    air = np.maximum(air - 0.8 * vessels * (1 - opacity), 0)
    air += organs.gas + 1.15 * draw_airways(canvas, anatomy, pose)
    muscle = 1 + 0.012 * smooth_noise(canvas.shape, 9, rng)
    soft = np.maximum(organs.body * muscle - air, 0)
    return expose(canvas, anatomy.unit_mm * soft, anatomy.unit_mm * bone, look, rng)
