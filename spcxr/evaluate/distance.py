"""How far two sets of features lie apart: maximum mean discrepancy and Fréchet distance.

Both compare what an encoder makes of two sets of images, without any label: a set that lies far
from the one a model was measured on is one its figures say little about.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import pdist

from spcxr.errors import SpcxrError

Array = NDArray[Any]

ROWS_AT_ONCE = 1024
MOST_FOR_WIDTH = 1000  # rows that the kernel's width is taken from


@dataclass(frozen=True)
class Discrepancy:
    """``mmd2``: the squared discrepancy, unbiased, so it may be below 0; ``p`` of no difference.

    ``width`` is the kernel's; ``n_permutations`` stand behind ``p``, which is 1 / (1 + them) at
    least.
    """

    mmd2: float
    p: float
    width: float
    n_permutations: int


def mmd(
    first: ArrayLike,
    second: ArrayLike,
    patients: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    n_permutations: int = 199,
    seed: int = 0,
) -> Discrepancy:
    """Squared maximum mean discrepancy under ``k(x, y) = exp(-|x - y|² / (2 width²))``.

    The unbiased estimator of Gretton et al. 2012 (JMLR 13, equation 3), the width by their median
    heuristic: the median distance between rows of both sets together. ``p`` from permutations of
    the patients. Ours: pairs of rows of one patient are left out, as they are alike whatever the
    sets are; with one row a patient it is equation 3.

    Parameters
    ----------
    first, second
        ``(n, D)`` and ``(m, D)`` features.
    patients
        ``(n,)`` and ``(m,)``: who each row is; each row by itself if not given. Who is in both sets
        counts as two.

    Raises
    ------
    SpcxrError
        fewer than two patients in a set, widths that differ, or features that are not finite.

    >>> rng = np.random.default_rng(0)
    >>> same = mmd(rng.normal(size=(80, 4)), rng.normal(size=(90, 4)))
    >>> moved = mmd(rng.normal(size=(80, 4)), rng.normal(size=(90, 4)) + 1)
    >>> same.p > 0.05, moved.p, same.mmd2 < 0.02 < moved.mmd2
    (True, 0.005, True)
    """
    a, b = _checked(first, second)
    given = patients if patients is not None else (np.arange(len(a)), np.arange(len(b)))
    units = [np.unique(np.asarray(who), return_inverse=True)[1] for who in given]
    counts = [np.bincount(of) for of in units]
    if min(len(count) for count in counts) < 2:
        raise SpcxrError("a set of fewer than two patients has no discrepancy; take more rows")
    rows = np.concatenate([a, b])
    # About their mean, or float32 would lose what little features of an encoder differ by.
    rows = (rows - rows.mean(0)).astype(np.float32)
    unit = np.concatenate([units[0], units[1] + len(counts[0])])
    order = np.argsort(unit, kind="stable")
    sizes = np.concatenate(counts).astype(np.float64)
    # (U, 1 + n_permutations): whether a patient is in the first set, as it is and as it might be.
    rng = np.random.default_rng(seed)
    here = np.arange(len(sizes)) < len(counts[0])
    sides = np.stack([here, *(rng.permutation(here) for _ in range(n_permutations))], 1)
    width = _median_distance(rows)
    sums = _sums_between(rows[order], unit[order], sides.astype(np.float32), width)
    found = _unbiased(sums, sizes, sides)
    # Equal up to rounding counts as reached, else ties of small sets would look like evidence.
    reached = found[1:] >= found[0] - 1e-9
    p = (1 + int(reached.sum())) / (1 + n_permutations)
    return Discrepancy(float(found[0]), p, width, n_permutations)


def _checked(first: ArrayLike, second: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise SpcxrError(f"features {a.shape} and {b.shape}; give (n, D) and (m, D)")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise SpcxrError("features that are not finite; the encoder is broken, or use fp32")
    return a, b


def _median_distance(rows: Array) -> float:
    """Over at most `MOST_FOR_WIDTH` rows, spread evenly; 1 where all rows are the same."""
    chosen = np.linspace(0, len(rows) - 1, min(len(rows), MOST_FOR_WIDTH)).astype(np.int64)
    return float(np.median(pdist(rows[chosen]))) or 1.0


def _sums_between(rows: Array, unit: Array, sides: Array, width: float) -> Array:
    """Sums of the kernel over pairs of rows of different patients: ``(2, R)``.

    ``[0]``: both in the first set, ``[1]``: one in either, counted once. By blocks: the whole
    kernel of 20 000 rows would take 1.6 GB. ``rows`` are sorted by ``unit``.
    """
    squares = np.einsum("nd,nd->n", rows, rows)
    starts = np.flatnonzero(np.diff(unit, prepend=-1))
    total = np.zeros((3, sides.shape[1]))
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        kernel = rows[part] @ rows.T
        kernel *= -2
        kernel += squares[part, None]
        kernel += squares
        np.maximum(kernel, 0, out=kernel)
        kernel *= np.float32(-0.5 / width**2)
        np.exp(kernel, out=kernel)
        if len(starts) < len(rows):
            kernel = np.add.reduceat(kernel, starts, axis=1)
        kernel[np.arange(len(kernel)), unit[part]] = 0
        inside, own = sides[unit[part]].astype(np.float64), kernel @ sides
        total[0] += (inside * own).sum(0)
        total[1] += ((1 - inside) * own).sum(0)
        total[2] += kernel.sum(dtype=np.float64)
    return total


def _unbiased(sums: Array, sizes: Array, sides: Array) -> Array:
    """The estimator for each column of ``sides``."""
    within, across, everything = sums
    rows = np.stack([sizes @ sides, sizes @ ~sides])
    pairs = rows**2 - np.stack([sizes**2 @ sides, sizes**2 @ ~sides])
    rest = everything - within - 2 * across
    return within / pairs[0] + rest / pairs[1] - 2 * across / (rows[0] * rows[1])


def frechet(first: ArrayLike, second: ArrayLike) -> float:
    """Squared Fréchet distance of two Gaussians with the sets' means and covariances.

    ``|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½)`` (Dowson & Landau 1982; the FID of Heusel et al. 2017
    is this on Inception's features). It is biased upwards, the more the fewer the rows: compare
    only sets of about equal size. Ours: where a set has no more rows than features, its covariance
    is shrunk towards a multiple of the identity as far as Ledoit & Wolf 2004 say (`is_shrunk`).

    Parameters
    ----------
    first, second
        ``(n, D)`` and ``(m, D)`` features.

    Raises
    ------
    SpcxrError
        fewer than two rows, widths that differ, or features that are not finite.

    >>> rng = np.random.default_rng(0)
    >>> a = rng.normal(size=(4000, 3))
    >>> round(frechet(a, a + [2, 0, 0]), 6), round(frechet(a, 2 * a - a.mean(0)), 1)
    (4.0, 3.0)
    """
    a, b = _checked(first, second)
    if min(len(a), len(b)) < 2:
        raise SpcxrError("a set of fewer than two rows has no covariance; take more rows")
    gap = a.mean(0) - b.mean(0)
    one, other = _covariance(a), _covariance(b)
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    # S1^½ S2 S1^½ has the eigenvalues of S1 S2, and is symmetric: no complex root to cut off.
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other @ root), 0)).sum()
    # Rounding leaves a little below 0 where the sets are the same.
    return max(float(gap @ gap + np.trace(one) + np.trace(other) - 2 * shared), 0.0)


def is_shrunk(features: ArrayLike) -> bool:
    """Whether `frechet` shrinks the covariance of ``(n, D)`` features: not more rows than features.

    >>> is_shrunk(np.zeros((5, 5))), is_shrunk(np.zeros((6, 5)))
    (True, False)
    """
    rows, width = np.shape(features)
    return rows <= width


def _covariance(x: Array) -> Array:
    centred = x - x.mean(0)
    n, width = x.shape
    if not is_shrunk(x):
        return centred.T @ centred / (n - 1)
    made = centred.T @ centred / n
    level = np.trace(made) / width
    spread = (made**2).sum() - width * level**2
    error = ((centred**2).sum(1) ** 2).mean() - (made**2).sum()
    share = 1.0 if spread <= 0 else min(max(error / n, 0.0) / spread, 1.0)
    return (1 - share) * made + share * level * np.eye(width)
