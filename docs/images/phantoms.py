"""Draws docs/images/phantoms.png: nine phantoms, each row another kind of chest.

.venv/bin/python docs/images/phantoms.py
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spcxr.data.phantom import LABELS, draw

ROWS = (("site-a", False, "adult, site A (DX)"), ("site-b", False, "adult, site B (CR)"),
        ("site-a", True, "child, site A (DX)"))  # fmt: skip
FIRST = {"adult, site A (DX)": 440, "adult, site B (CR)": 412, "child, site A (DX)": 424}
WIDTH, HEIGHT, CAPTION, GAP = 340, 380, 24, 8


def tile(index: int, site: str, label: str, child: bool) -> Image.Image:
    """One phantom as a viewer would show it: percentile window, aspect kept."""
    pixels = draw(index, site=site, label=label, child=child, size_px=680).pixels.astype(float)
    low, high = np.percentile(pixels, (0.5, 99.5))
    grey = Image.fromarray((np.clip((pixels - low) / (high - low), 0, 1) * 255).astype(np.uint8))
    grey.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    return grey


def main() -> None:
    page = Image.new("L", (3 * (WIDTH + GAP) + GAP, 3 * (HEIGHT + CAPTION + GAP) + 40), 16)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(13)
    for r, (site, child, who) in enumerate(ROWS):
        for c, label in enumerate(LABELS):
            x, y = GAP + c * (WIDTH + GAP), GAP + r * (HEIGHT + CAPTION + GAP)
            drawn = tile(FIRST[who] + 4 * c, site, label, child)
            page.paste(drawn, (x + (WIDTH - drawn.width) // 2, y))
            name = label if label == "normal" else f"{label}-like"
            pen.text((x + WIDTH // 2, y + HEIGHT + 4), f"{name}: {who}", 220, font, anchor="ma")
    note = "Drawings, not patients: phantoms by spcxr.data.phantom"
    pen.text((page.width // 2, page.height - 26), note, 150, font, anchor="ma")
    page.save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
