"""What may be mended in a predicted mask: stray pieces and holes. Stated, and optional."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from spcxr.errors import SpcxrError

Mask = NDArray[np.uint8]

POSTS = ("default", "none", "largest", "holes")
# Pieces of each structure that anatomy allows. What is not named here (an opacity, say) may be in
# any number of pieces and have holes: it is left as it is.
PIECES = {"lung": 2, "lungs": 2, "left lung": 1, "right lung": 1, "heart": 1}
LEAST_PIECE = 1 / 20  # of the largest: a smaller one is a speck, not the other lung


def tidy(mask: Mask, structures: tuple[str, ...], post: str = "default") -> Mask:
    """A mask without stray pieces and holes.

    Ours, in this order: of each structure in `PIECES` the largest pieces are kept (those that touch
    by a corner are one piece), without those smaller than a twentieth of the largest; then holes
    in it become part of it, but for pixels of another structure.

    Parameters
    ----------
    mask
        ``(H, W)`` uint8 class numbers, 0 = background.
    structures
        names of the classes from 1.
    post
        ``default`` does both, ``largest`` or ``holes`` one, ``none`` neither.

    Raises
    ------
    SpcxrError
        another ``post``.

    >>> mask = np.zeros((5, 9), np.uint8)
    >>> mask[1:4, 1:4] = 1; mask[2, 2] = 0; mask[0, 8] = 1
    >>> tidy(mask, ("heart",))[:, 1:].tolist()[0], int(tidy(mask, ("heart",)).sum())
    ([0, 0, 0, 0, 0, 0, 0, 0], 9)
    """
    if post not in POSTS:
        raise SpcxrError(f"post is {post!r}; choose one of: {', '.join(POSTS)}")
    made = mask.copy()
    if post == "none":
        return made
    for number, name in enumerate(structures, start=1):
        most = PIECES.get(name.lower())
        if most is None:
            continue
        if post in ("default", "largest"):
            made[(made == number) & ~largest_pieces(made == number, most)] = 0
        if post in ("default", "holes"):
            made[ndimage.binary_fill_holes(made == number) & (made == 0)] = number
    return made


def largest_pieces(inside: NDArray[Any], most: int) -> NDArray[np.bool_]:
    """The ``most`` largest pieces of ``(H, W)`` bool, specks left out.

    >>> largest_pieces(np.array([[1, 1, 0, 1, 0, 1, 1]], bool), 2).astype(int).tolist()
    [[1, 1, 0, 0, 0, 1, 1]]
    """
    pieces, sizes = pieces_of(inside)
    kept = np.zeros(len(sizes), bool)
    kept[np.argsort(-sizes, kind="stable")[:most]] = True
    kept &= sizes >= LEAST_PIECE * sizes.max(initial=0)
    kept[0] = False
    found: NDArray[np.bool_] = kept[pieces]
    return found


def pieces_of(inside: NDArray[Any]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Numbered pieces ``(H, W)`` int32 from 1, and pixels of each (of number 0: 0).

    >>> pieces_of(np.eye(2, dtype=bool))[1].tolist()
    [0, 2]
    """
    pieces, count = ndimage.label(inside, structure=np.ones((3, 3)))
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    sizes[0] = 0
    return pieces, sizes
