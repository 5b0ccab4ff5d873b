"""Several test sets: how far figures fall from the first to each other one, and how far it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.evaluate import pages
from spcxr.evaluate.distance import Discrepancy, frechet, is_shrunk, mmd
from spcxr.evaluate.intervals import Interval, Statistic, bootstrap_differences
from spcxr.evaluate.label_metrics import LabelMetrics
from spcxr.evaluate.report import Cell, Section, Table
from spcxr.evaluate.summary import mean_of_known
from spcxr.infer.predict import TrainedModel, predict_classes
from spcxr.models.heads import Features
from spcxr.recipes.leaks import identities
from spcxr.recipes.testset import Result, Rows, Settings, TestSet, in_batches

Array = NDArray[Any]

MACRO = ("macro_auroc", "macro_average_precision")
MEANING = (
    "The first set's figure less the other's: above 0 is a fall, and an interval that holds 0 is "
    "no proof of one. Sets without a common patient are resampled each by itself. Average "
    "precision and accuracy also follow how frequent the classes are; of Brier score, "
    "calibration error and distances less is better, so a fall is below 0."
)


@dataclass(frozen=True)
class Drift:
    """From the reference set to another: falls by metric, and the distance of their features.

    ``classes`` are those with AUROC on both sets, over which means are taken; ``shared_patients``
    are in both.
    """

    falls: Mapping[str, Interval]
    classes: tuple[str, ...]
    shared_patients: int
    distance: Distance | None


@dataclass(frozen=True)
class Distance:
    """Between the features of ``images`` of either set; see `evaluate.distance`."""

    images: tuple[int, int]
    mmd: Discrepancy
    frechet: float
    shrunk: bool


@dataclass(frozen=True)
class Sample:
    """Features ``(n, 2D)`` of some rows of a set, and who the rows are ``(n,)``."""

    features: Array
    patients: Array


def sample_features(
    trained: TrainedModel, test_set: TestSet, settings: Settings, most: int
) -> Sample:
    """The encoder's features of at most ``most`` rows, spread evenly; every process takes part."""
    rows = test_set.rows
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.int64)]
    encoder = trained.model.encoder
    model = Features(encoder, getattr(trained.model, "lungs", None)).eval()

    def work(batch: Rows) -> Array:
        return predict_classes(model, test_set.store, batch, trained.normalisation, settings)

    name = f"{test_set.name}, features"
    features = in_batches(rows, settings, name, work, 2 * encoder.width)
    return Sample(features, identities(test_set.store.manifest, rows))


def drift(
    reference: Result, other: Result, samples: tuple[Sample, Sample] | None, settings: Settings
) -> Drift:
    """Everything that is said of ``other`` beside ``reference``."""
    classes = common_classes(reference, other)
    sides = [statistics(result, classes) for result in (reference, other)]
    own, theirs = (identities(r.test_set.store.manifest, r.measured) for r in (reference, other))
    falls = bootstrap_differences(
        (own, theirs),
        {name: (sides[0][name], sides[1][name]) for name in sides[0] if name in sides[1]},
        n=settings.n_bootstrap,
        seed=settings.seed,
    )
    shared = len(np.intersect1d(own, theirs))
    distance = between(*samples, seed=settings.seed) if samples else None
    return Drift(falls, classes, shared, distance)


def common_classes(first: Result, second: Result) -> tuple[str, ...]:
    """The classes that have an AUROC on both sets; none for masks."""
    if first.answers is None:
        return ()
    found = [result.details["by_class"] for result in (first, second)]
    defined = [{n for n, m in f.items() if not np.isnan(m["auroc"].value)} for f in found]
    return tuple(name for name in first.answers.names if name in defined[0] & defined[1])


def statistics(result: Result, classes: Sequence[str]) -> dict[str, Statistic]:
    """Metric -> statistic of the weights of the measured rows.

    Means are over ``classes`` alone, so that no set is measured on others than its reference.
    """
    made = {name: s for name, s in result.statistics.items() if name not in MACRO}
    if result.answers is None or not classes:
        return made
    answers = result.answers
    if len(classes) < len(answers.names):
        made.clear()  # an accuracy over other classes is another quantity
    columns = [answers.names.index(name) for name in classes]
    scores = answers.scores[:, columns]
    each = LabelMetrics(answers.truth[:, columns], scores, np.zeros_like(scores))
    means = {f"macro_{key}": _mean_of(each, key) for key in ("auroc", "average_precision")}
    ranks = {f"AUROC of {name}": _of_class(each, k) for k, name in enumerate(classes)}
    return means | made | ranks


def _mean_of(each: LabelMetrics, key: str) -> Statistic:
    return lambda weights: mean_of_known(each(weights)[key])


def _of_class(each: LabelMetrics, k: int) -> Statistic:
    return lambda weights: each(weights)["auroc"][..., k]


def between(first: Sample, second: Sample, *, seed: int) -> Distance | None:
    """How far two samples of features lie apart; None where one is of a single patient."""
    if min(len(np.unique(sample.patients)) for sample in (first, second)) < 2:
        return None
    pair = first.features, second.features
    return Distance(
        images=(len(pair[0]), len(pair[1])),
        mmd=mmd(*pair, (first.patients, second.patients), seed=seed),
        frechet=frechet(*pair),
        shrunk=is_shrunk(pair[0]) or is_shrunk(pair[1]),
    )


# --- the page -------------------------------------------------------------------------------


def drift_section(reference: str, headline: str, found: Mapping[str, Drift]) -> Section:
    """The table of the fall, the falls drawn, and the distances; sets by name."""
    falls = {name: d.falls for name, d in found.items()}
    title = f"fall of {pages.TITLES[headline]}"
    drawn = {name: {title: f[headline]} for name, f in falls.items() if headline in f}
    note = MEANING
    for name, d in found.items():
        if d.classes:
            note += f" {name}: over {', '.join(d.classes)}."
        if d.shared_patients:
            note += (
                f" {name}: {d.shared_patients} patients are in both sets, and are resampled "
                "together."
            )
    metrics = dict.fromkeys(metric for fall in falls.values() for metric in fall)
    rows: list[list[Cell]] = [
        [pages.TITLES.get(metric, metric), *(fall.get(metric) for fall in falls.values())]
        for metric in metrics
    ]
    tables = [Table(f"Fall from {reference}", ["metric", *falls], rows, note)]
    if any(d.distance for d in found.values()):
        tables.append(_distances(reference, found))
    pictures = []
    if any(not np.isnan(i.value) for row in drawn.values() for i in row.values()):
        caption = f"{title} from {reference}; 0, the dotted line, is no fall."
        pictures.append(pages.interval_picture(drawn, title, caption, mark=0.0))
    return Section("Drift", tables=tables, pictures=pictures)


def _distances(reference: str, found: Mapping[str, Drift]) -> Table:
    rows: list[list[Cell]] = [
        [name, f"{d.images[0]} and {d.images[1]}", f"{d.mmd.mmd2:.4f}", d.mmd.p, d.frechet]
        for name, drift in found.items()
        if (d := drift.distance)
    ]
    note = (
        "Of the encoder's features, labels unseen. MMD²: unbiased, Gaussian kernel of the median "
        "width, below 0 at times where there is no difference; p by permutation of patients. "
        "Fréchet distance: biased upwards by few images, so compare rows of equal numbers."
    )
    if any(d.distance.shrunk for d in found.values() if d.distance):
        note += " Fewer images than features in a set: its covariance is shrunk (Ledoit and Wolf)."
    columns = ["set", "images compared", "MMD²", "p", "Fréchet distance"]
    return Table(f"Distance from {reference}", columns, rows, note)
