"""Pictures of what a run does: a grid of columns, one row an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

GAP_PX = 4
TITLE_PX = 16
COLUMN_PX = 128  # smaller images are magnified, so that the titles fit above their columns


def save_grid(path: Path, columns: dict[str, NDArray[np.float32]]) -> Path:
    """Write a grey PNG with a titled column for each entry.

    Parameters
    ----------
    columns
        title -> ``(n, H, W)`` float in [0, 1] (clipped), all of one shape.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     shown = {"original": np.zeros((3, 8, 8)), "mask": np.ones((3, 8, 8))}
    ...     with Image.open(save_grid(Path(place) / "a.png", shown)) as page:
    ...         page.size
    (260, 412)
    """
    stacked = np.stack(list(columns.values()), 1)
    times = -(-COLUMN_PX // stacked.shape[-1])
    stacked = stacked.repeat(times, 2).repeat(times, 3)
    rows, count, height, width = stacked.shape
    page = np.full(
        (TITLE_PX + rows * (height + GAP_PX), count * (width + GAP_PX) - GAP_PX), 24, np.uint8
    )
    levels = (np.clip(stacked, 0, 1) * 255 + 0.5).astype(np.uint8)
    for r in range(rows):
        for c in range(count):
            top, left = TITLE_PX + r * (height + GAP_PX), c * (width + GAP_PX)
            page[top : top + height, left : left + width] = levels[r, c]
    image = Image.fromarray(page)
    draw = ImageDraw.Draw(image)
    for c, title in enumerate(columns):
        draw.text((c * (width + GAP_PX) + 2, 2), title, fill=220)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.writing")
    image.save(draft, format="PNG")
    draft.replace(path)
    return path
