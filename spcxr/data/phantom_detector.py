"""From path lengths to a 12-bit picture: attenuation, scatter, noise, and two sites' detectors.

Beer-Lambert with one effective energy (about 60 keV): soft tissue 0.0205 and cortical bone 0.057
per mm (NIST XCOM, rounded). Scatter is a wide blur of the primary beam. The picture is logarithmic
in exposure, then treated as vendors do: range compression, sharpening, a sigmoid look-up table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from spcxr.data.phantom_canvas import Array, Canvas, blur_wide, polyline, smooth_noise
from spcxr.data.phantom_vessels import solid

SOFT_PER_MM, BONE_PER_MM = 0.0205, 0.057
BITS = 12
WHITE = 2**BITS - 1
LETTERS = {
    "L": [[(0, 0), (0, 1)], [(0, 1), (0.6, 1)]],
    "R": [
        [(0, 0), (0, 1)],
        [(0, 0), (0.42, 0), (0.58, 0.12), (0.58, 0.36), (0.42, 0.5), (0, 0.5)],
        [(0.26, 0.5), (0.62, 1)],
    ],
}


@dataclass(frozen=True)
class Site:
    """How one hospital's pictures look. ``modality`` DX or CR; the rest are relative strengths."""

    modality: str
    inverted: bool  # stored as MONOCHROME1
    aspect: float  # height over width
    compression: float  # of the slow changes of exposure
    sharpening: float
    slope: float  # of the sigmoid
    middle: float  # where the sigmoid's middle lies, 0..1
    blur_px: float  # at 512 pixels across
    photons: float  # per pixel in the open beam
    scatter: float
    grid: float  # strength of the anti-scatter grid's lines
    letter: str


SITES = {
    "site-a": Site("DX", False, 1.1, 0.45, 0.7, 4.4, 0.52, 0.0, 20000.0, 0.2, 0.0, "L"),
    "site-b": Site("CR", True, 1.2, 0.3, 0.0, 4.2, 0.46, 0.75, 5000.0, 0.35, 0.006, "R"),
}


def expose(
    canvas: Canvas, soft_mm: Array, bone_mm: Array, site: Site, rng: np.random.Generator
) -> Array:
    """(H, W) uint16, 0..4095, bone bright. ``soft_mm`` and ``bone_mm`` are (H, W) path lengths."""
    attenuation = SOFT_PER_MM * soft_mm + (BONE_PER_MM - SOFT_PER_MM) * bone_mm
    lead = _letter(canvas, site, rng)
    if site.modality == "CR":
        attenuation = attenuation + 3.0 * lead
    beam = np.exp(-attenuation)
    # Thick parts scatter more than they let through, so bones fade below the diaphragm.
    beam += site.scatter * blur_wide(beam * np.maximum(attenuation / 2, 0) ** 1.5, 9) + 0.0015
    heel = 1 + rng.normal(0, 0.05) * np.linspace(-1, 1, canvas.shape[0], dtype=np.float32)
    beam *= heel[:, None]
    if site.blur_px:
        beam = gaussian_filter(beam, site.blur_px * canvas.shape[1] / 512)
    dose = site.photons * rng.uniform(0.6, 1.6) * np.exp(0.4 * float(attenuation.mean()))
    noise = rng.standard_normal(canvas.shape, dtype=np.float32)
    beam += noise * np.sqrt(beam / np.float32(dose))
    picture = _look(-np.log(np.maximum(beam, 2e-4)), canvas, site, rng)
    if site.modality == "DX":
        picture = np.maximum(picture, 0.97 * lead)
    picture = _collimate(picture, site, rng)
    return np.rint(np.clip(picture, 0, 1) * WHITE).astype(np.uint16)


def _look(logged: Array, canvas: Canvas, site: Site, rng: np.random.Generator) -> Array:
    """(H, W) 0..1: the log exposure as the site shows it."""
    # The open beam carries nothing: it must not decide the range compression round the patient.
    low, high = np.quantile(logged[::6, ::6], (0.02, 0.985))
    shown = np.clip(logged, low - 0.1, None)
    shown = shown - site.compression * (blur_wide(shown, 6) - shown.mean())
    if site.sharpening:
        shown += site.sharpening * (shown - gaussian_filter(shown, 2.5 * canvas.shape[1] / 512))
    if site.grid:
        rows = np.arange(canvas.shape[0], dtype=np.float32)[:, None]
        shown += site.grid * (high - low) * np.sin(rows * np.float32(2 * np.pi / 3.37))
        shown += 0.012 * smooth_noise(canvas.shape, 3, rng) * (high - low)
    low, high = np.quantile(shown[::6, ::6], (0.03, 0.99))
    value = (shown - low) / (high - low)
    slope = site.slope * rng.uniform(0.85, 1.15)
    middle = site.middle + rng.normal(0, 0.035)
    curve = 1 / (1 + np.exp(-slope * (value - middle)))
    bottom, top = (1 / (1 + np.exp(-slope * (v - middle))) for v in (-0.1, 1.1))
    return (curve - bottom) / (top - bottom)


def _letter(canvas: Canvas, site: Site, rng: np.random.Generator) -> Array:
    """(H, W) 0..1: the side marker, L by the patient's left or R by the right."""
    left = site.letter == "R"  # the patient's right is on the image's left
    column = rng.uniform(0.05, 0.1) if left else rng.uniform(0.88, 0.93)
    row = rng.uniform(0.12, 0.3) if left else rng.uniform(0.05, 0.1)
    corner = np.array([column * canvas.shape[1], row * canvas.shape[0]])
    size = (0.05 if left else 0.04) * canvas.shape[1]
    lean = rng.normal(0, 0.12) if left else 0.0
    turn = np.array([[np.cos(lean), -np.sin(lean)], [np.sin(lean), np.cos(lean)]])
    pixels = Canvas(
        canvas.shape, 1.0, 0.0, ((canvas.shape[1] - 1) / 2, (canvas.shape[0] - 1) / 2), 0.0
    )
    samples = []
    width = 0.085 * size
    for stroke in LETTERS[site.letter]:
        knots = np.array(stroke) * size @ turn.T + corner
        path = polyline(pixels, knots)[None]
        along = np.gradient(path, axis=1)
        stride = np.linalg.norm(along, axis=-1)
        normal = np.stack([-along[..., 1], along[..., 0]], -1) / stride[..., None]
        radii = np.full(stride.shape, width)
        samples.append(solid(pixels, path, normal, radii, stride))
    return np.clip(pixels.splat(samples) / (1.2 * width), 0, 1)


def _collimate(picture: Array, site: Site, rng: np.random.Generator) -> Array:
    """The picture within the collimator's edges: black outside at site-a, a pale rim at site-b."""
    height, width = picture.shape
    margins = np.maximum(rng.normal(0.012, 0.016, 4), 0) * (height, height, width, width)
    tilt = rng.normal(0, 0.006)
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)[None]
    down = rows + np.float32(tilt) * (columns - width / 2)
    across = columns - np.float32(tilt) * (rows - height / 2)
    inner = np.minimum(down - margins[0], height - 1 - margins[1] - down)
    inner = np.minimum(inner, np.minimum(across - margins[2], width - 1 - margins[3] - across))
    if site.modality == "DX":
        return picture * np.clip(inner + 0.5, 0, 1)
    shade = np.clip(1 - inner / (0.006 * width), 0, 1)
    return picture + (0.75 - picture) * 0.7 * shade
