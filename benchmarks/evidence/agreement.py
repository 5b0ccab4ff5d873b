"""How far two sets of human masks of the same radiographs agree: what a model's Dice is up against.

    python benchmarks/evidence/agreement.py ../shared/data/open

Of ``seg_manifest.csv`` every image that has masks of two sources is taken, whatever its split:
nothing is learned from it. Masks are compared at the size of the study's stores.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evidence.run import SIZE_PX
from evidence.stores import read_manifest
from spcxr.data.masks import read_mask
from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics
from spcxr.evaluate.intervals import bootstrap


def agreement(data: Path) -> tuple[NDArray[Any], NDArray[Any], set[tuple[str, str]]]:
    """Dice ``(n,)`` of each image's two masks, its patients ``(n,)``, and the pairs of sources.

    Raises
    ------
    SpcxrError
        no image has masks of two sources.
    """
    of_image: dict[str, dict[str, dict[str, str]]] = {}
    for row in read_manifest(data, "seg"):
        of_image.setdefault(row["path"], {})[row["mask_source"]] = dict(row)
    found, patients, sources = [], [], set()
    for masks in of_image.values():
        for one, two in combinations(sorted(masks), 2):
            pair = [_mask(data / masks[name]["mask_path"])[None] for name in (one, two)]
            found.append(float(metrics.dice(*pair)[0]))
            patients.append(masks[one]["patient_id"])
            sources.add((one, two))
    if not found:
        raise SpcxrError(f"{data}: no image has masks of two sources; there is nothing to compare")
    return np.array(found), np.array(patients), sources


def _mask(path: Path) -> NDArray[Any]:
    whole = Image.fromarray(255 * read_mask(path))
    return np.array(whole.resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)) > 127


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DATA")
    try:
        each, whose, pairs = agreement(Path(sys.argv[1]))
    except (SpcxrError, OSError) as error:
        sys.exit(f"error: {error}")
    mean = bootstrap(whose, lambda w: metrics.mean(each, w), seed=0)
    print(f"{' and '.join(' against '.join(pair) for pair in sorted(pairs))}: {len(each)} images, "
          f"{len(set(whose))} patients; Dice {mean.value:.3f} ({mean.low:.3f} to {mean.high:.3f}), "
          f"from {each.min():.3f} to {each.max():.3f}")  # fmt: skip
