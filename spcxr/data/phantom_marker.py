"""Text burned into a drawn radiograph: a shortcut that tells the label and is no sign of disease.

Hospitals mark portable and intensive-care images, and those patients are sicker: networks learn the
mark instead of the lung (Zech et al., 2018, doi 10.1371/journal.pmed.1002683). Planted here, it can
be shown who falls for it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spcxr.data.phantom_canvas import Array

MARKERS = ("PORTABLE", "ICU", "BEDSIDE")
WHITE = 4095
GLARE = 0.97  # of the range: what a burned-in letter shows
HEIGHT = 0.07  # of the image's width: a letter's
BOLD = 0.006  # of the image's width: added round each stroke
GAP = 0.02  # of the image's width: from the edge


def choose_marker(seed: int, index: int, probability: float) -> str:
    """The text of image ``index`` of a series: one of `MARKERS`, or blank.

    A stream of its own: the drawn chest does not depend on the text.

    >>> choose_marker(0, 3, 0.0), choose_marker(0, 3, 1.0) in MARKERS
    ('', True)
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, index, 2)))
    text = str(rng.choice(MARKERS))
    return text if rng.uniform() < probability else ""


def burn_in(pixels: Array, text: str, lungs: Array) -> Array:
    """(H, W) uint16 with ``text`` in the upper corner, left or right, that covers less lung.

    The letters stand on nothing: the picture shows between them.

    >>> blank = np.zeros((110, 100), np.uint16)
    >>> np.argwhere(burn_in(blank, "ICU", blank > 0)).max(0).tolist() < [20, 40]
    True
    """
    height, width = pixels.shape
    font = ImageFont.load_default(max(round(HEIGHT * width), 6))
    gap, bold = round(GAP * width), round(BOLD * width)
    stamps = []
    for across, anchor in ((gap, "la"), (width - 1 - gap, "ra")):
        canvas = Image.new("L", (width, height))
        pen = ImageDraw.Draw(canvas)
        pen.text((across, gap), text, fill=255, font=font, anchor=anchor, stroke_width=bold)
        stamps.append(np.asarray(canvas, np.float32) / 255)
    ink = min(stamps, key=lambda stamp: float((stamp * lungs).sum()))
    burned = pixels * (1 - ink) + GLARE * WHITE * ink
    return np.rint(np.maximum(pixels, burned)).astype(np.uint16)
