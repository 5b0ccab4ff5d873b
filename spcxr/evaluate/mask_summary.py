"""The metrics of a set of masks: by structure and over all of them, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics
from spcxr.evaluate.intervals import Interval, Statistic, bootstrap_all
from spcxr.evaluate.ranking import by_resample, like, ratio
from spcxr.evaluate.report import NOT_WRITTEN
from spcxr.evaluate.summary import mean_of_known
from spcxr.evaluate.surface import DISTANCES, surface_distances

Array = NDArray[Any]

IN_PX = tuple(f"{name}_px" for name in DISTANCES)
IN_MM = tuple(f"{name}_mm" for name in DISTANCES)
METRICS = ("dice", "iou", *IN_PX, *IN_MM)
AREAS = ("true_px", "predicted_px")
FIGURES = (*METRICS, *AREAS)  # of one structure in one image


def mask_figures(
    predicted: Array,
    truth: Array,
    known: Array,
    pixel_mm: Array | None,
) -> Array:
    """`FIGURES` of one structure in each image.

    Parameters
    ----------
    predicted, truth, known
        ``(n, H, W)`` bool; only ``known`` pixels count.
    pixel_mm
        ``(n, 2)`` height and width of a pixel in mm, NaN = unknown; None: all distances, those in
        pixels too, are left NaN, which saves most of the time.

    Returns
    -------
    ``(n, F)`` float64. Both masks empty: all metrics are NaN. One empty: Dice and IoU are 0, and
    the distances, which would be infinite, NaN. No pixel known: the areas are NaN as well.

    >>> mask = np.zeros((1, 4, 4), bool); mask[0, 1:3, 1:3] = True
    >>> found = mask_figures(mask, mask, np.ones_like(mask), np.full((1, 2), 0.5))
    >>> dict(zip(FIGURES, found[0].tolist()))["dice"], found[0, -2:].tolist()
    (1.0, [4.0, 4.0])
    """
    made = np.full((len(truth), len(FIGURES)), np.nan)
    made[:, 0] = metrics.dice(predicted, truth, known)
    made[:, 1] = metrics.iou(predicted, truth, known)
    if pixel_mm is not None:
        px, mm = surface_distances(predicted & known, truth & known, known, pixel_mm)
        made[:, 2 : len(METRICS)] = np.concatenate([px, mm], 1)
    areas = [(mask & known).sum((1, 2)) for mask in (truth, predicted)]
    made[:, len(METRICS) :] = np.stack(areas, 1)
    made[known.sum((1, 2)) == 0] = np.nan
    return made


class MaskMeans:
    """Means over images of ``found (n, K, F)`` for any weights of the rows; NaN is left out.

    >>> found = np.array([[[0.5]], [[np.nan]], [[1.0]]])
    >>> MaskMeans(found)(np.array([[1, 1, 1], [3, 1, 1]])).ravel().tolist()
    [0.75, 0.625]
    """

    def __init__(self, found: Array) -> None:
        self._shape = found.shape[1:]
        flat = found.reshape(len(found), -1)
        self._known = ~np.isnan(flat).T
        self._values = np.where(self._known, flat.T, 0.0)
        self._last: tuple[Array, Array] | None = None

    def __call__(self, weights: Array) -> Array:
        """``(K, F)``, or ``(R, K, F)`` for weights ``(R, n)``. Those of the last are kept: the
        statistics of one bootstrap ask in turn."""
        if self._last is None or self._last[0] is not weights:
            table = by_resample(weights, self._values.shape[1]).astype(np.float64)
            made = ratio(self._values @ table, self._known.astype(np.float64) @ table)
            self._last = weights, like(made.T.reshape(-1, *self._shape), weights)
        return self._last[1]

    def of(self, structure: int, figure: int) -> Statistic:
        """The mean of one structure's figure."""
        return lambda weights: self(weights)[..., structure, figure]

    def over_structures(self, figure: int) -> Statistic:
        """The mean over structures of their means; a structure without one is left out."""
        return lambda weights: mean_of_known(self(weights)[..., figure])


@dataclass(frozen=True)
class Empties:
    """Images by what is empty: nothing to find and nothing found; missed; found where none is.

    ``unknown``: no pixel of the mask is known.
    """

    both: int
    missed: int
    false_alarm: int
    unknown: int


@dataclass(frozen=True)
class MaskSummary:
    """How well masks are predicted on one set.

    ``overall`` holds the mean over structures of each of the metrics and, of several structures,
    ``Dice of NAME``; ``statistics`` the same as functions of row weights over the rows of
    ``patients`` (all rows, so that two models' are the same ones). ``without_spacing`` counts
    images whose pixels are of unknown size.
    """

    names: tuple[str, ...]
    overall: Mapping[str, Interval]
    statistics: Mapping[str, Statistic] = field(metadata=NOT_WRITTEN)
    patients: Array = field(metadata=NOT_WRITTEN)
    by_structure: Mapping[str, Mapping[str, Interval]]
    empties: Mapping[str, Empties]
    without_spacing: int


def summarise_structures(
    found: Array,
    patients: Array,
    names: Sequence[str],
    pixel_mm: Array,
    *,
    n: int = 2000,
    seed: int = 0,
) -> MaskSummary:
    """Means over the images, with intervals over patients.

    Metrics in mm are there if the size of a pixel is known in any image, and then over those
    images alone.

    Parameters
    ----------
    found
        ``(n, K, F)`` of `mask_figures`.
    patients
        ``(n,)`` pseudonyms, resampled whole.
    pixel_mm
        ``(n, 2)``, NaN = unknown.

    Raises
    ------
    SpcxrError
        no image with anything to measure.

    >>> mask = np.zeros((2, 4, 4), bool); mask[:, 1:3, 1:3] = True
    >>> size = np.full((2, 2), np.nan)
    >>> figures = mask_figures(mask, mask[::-1], np.ones_like(mask), size)[:, None]
    >>> made = summarise_structures(figures, np.array(["a", "b"]), ("lung",), size, n=100)
    >>> str(made.overall["dice"]), "hd95_mm" in made.overall, made.without_spacing
    ('1.000 (1.000 to 1.000)', False, 2)
    """
    if np.isnan(found[:, :, 0]).all():
        raise SpcxrError("no image with a mask to measure; check mask_path and the splits")
    unsized = np.isnan(pixel_mm).any(1)
    keys = [name for name in METRICS if name not in IN_MM or not unsized.all()]
    places = {name: FIGURES.index(name) for name in keys}
    means = MaskMeans(found)
    overall = {name: means.over_structures(place) for name, place in places.items()}
    if len(names) > 1:
        overall |= {f"Dice of {name}": means.of(k, 0) for k, name in enumerate(names)}
    single = {
        (k, key): means.of(k, place) for k in range(len(names)) for key, place in places.items()
    }
    there = ~np.isnan(found)
    rows = {name: np.asarray(there[:, :, place].any(1)) for name, place in places.items()}
    rows |= {f"Dice of {name}": there[:, k, 0] for k, name in enumerate(names)}
    rows |= {f"{k}/{key}": there[:, k, places[key]] for k, key in single}
    made = bootstrap_all(
        patients,
        overall | {f"{k}/{key}": statistic for (k, key), statistic in single.items()},
        n=n,
        seed=seed,
        rows=rows,
    )
    return MaskSummary(
        names=tuple(names),
        overall={name: made[name] for name in overall},
        statistics=overall,
        patients=np.asarray(patients),
        by_structure={
            name: {key: made[f"{k}/{key}"] for key in keys} for k, name in enumerate(names)
        },
        empties={name: _empties(found[:, k, -2:]) for k, name in enumerate(names)},
        without_spacing=int(unsized.sum()),
    )


def _empties(areas: Array) -> Empties:
    """Of the true and the predicted area ``(n, 2)``."""
    true, guess = areas.T
    return Empties(
        both=int(((true == 0) & (guess == 0)).sum()),
        missed=int(((true > 0) & (guess == 0)).sum()),
        false_alarm=int(((true == 0) & (guess > 0)).sum()),
        unknown=int(np.isnan(true).sum()),
    )
