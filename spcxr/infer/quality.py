"""What looks wrong in a mask: flags for a person to look at, never a reason to hide it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spcxr.data.study import Study
from spcxr.infer.measures import LEFT, LUNGS, RIGHT, Measures, direction, square_mm

# Ours: wide bounds that no whole chest, of a premature baby or of a large adult, should leave.
LEAST_SHARE, MOST_SHARE = 0.04, 0.65  # of the image
LEAST_CM2, MOST_CM2 = 8.0, 1200.0
MOST_UNEQUAL = 3.0  # the larger lung over the smaller
BORDER_SHARE = 0.02  # of an edge of the image, or of what was seen of it, that is lung
WHOLE = (slice(None), slice(None))


def flags(
    mask: NDArray[np.uint8],
    structures: tuple[str, ...],
    study: Study,
    found: Measures,
    seen: tuple[slice, slice] = WHOLE,
) -> tuple[str, ...]:
    """Plain words for what is odd; none where nothing is.

    Parameters
    ----------
    mask
        ``(H, W)`` uint8 class numbers on the grid of ``study.pixels``.
    structures
        names of the classes from 1.
    found
        what `measure` says of them.
    seen
        rows and columns that the model was shown (`Preprocess.window`).

    >>> from spcxr.infer.measures import measure
    >>> mask = np.zeros((8, 8), np.uint8); mask[2:5, 2:6] = 1
    >>> study = Study(mask, bits=8)
    >>> flags(mask, ("lung",), study, measure(mask, ("lung",), study))
    ('one lung, or two that touch',)
    """
    said: list[str] = []
    lungs = found.lungs_px
    if lungs == 0:
        said.append("no lung")
    elif lungs is not None:
        said += _of_lungs(lungs, structures, study, found)
        if _at_the_border(mask[seen], structures):
            said.append("lung touches the border of the image")
    said += [
        f"no {name}"
        for name in structures
        if name.lower() not in (*LUNGS, LEFT, RIGHT) and not found.areas_px[name.lower()]
    ]
    if lungs and direction(study) is None:
        said.append("sides are not known: turned, by its header")
    return tuple(said)


def _of_lungs(lungs: int, structures: tuple[str, ...], study: Study, found: Measures) -> list[str]:
    said = []
    whole = any(name.lower() in LUNGS for name in structures)
    if found.lung_pieces == 1:
        said.append("one lung, or two that touch" if whole else "one lung")
    elif (found.lung_pieces or 0) > 2:
        said.append(f"lungs in {found.lung_pieces} pieces")
    share, area = lungs / study.pixels.size, square_mm(lungs, study.spacing_mm) / 100
    if not LEAST_SHARE <= share <= MOST_SHARE:
        said.append(f"lungs are {100 * share:.3g} % of the image")
    if area < LEAST_CM2 or area > MOST_CM2:  # neither, where the spacing is not known
        said.append(f"lungs of {area:.3g} cm2")
    sides = [found.areas_px.get(side, 0) for side in (RIGHT, LEFT)]
    if min(sides) and max(sides) > MOST_UNEQUAL * min(sides):
        said.append("lungs of unequal size")
    return said


def _at_the_border(mask: NDArray[np.uint8], structures: tuple[str, ...]) -> bool:
    lungs = [k for k, n in enumerate(structures, start=1) if n.lower() in (*LUNGS, LEFT, RIGHT)]
    edges = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    return any(np.isin(edge, lungs).mean() > BORDER_SHARE for edge in edges)
