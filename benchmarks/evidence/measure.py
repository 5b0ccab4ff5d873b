"""From the predictions of a row's runs to its figures: over seeds, with intervals over patients.

The figure of an arm is the mean over its seeds; a resample of the patients is drawn once for all
seeds of all arms, so that differences are paired by patient, with the seeds averaged.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics
from spcxr.evaluate.intervals import Statistic, resample_counts
from spcxr.evaluate.summary import summarise_classes
from spcxr.evaluate.thresholds import choose_thresholds
from spcxr.infer.operating import operating_point
from spcxr.infer.predict import TrainedModel, load_trained
from spcxr.recipes.leaks import find_leaks, refuse_leaks
from spcxr.recipes.measure import judge, predict
from spcxr.recipes.sweep import headline, predict_corrupted
from spcxr.recipes.testset import Result, Settings, TestSet
from spcxr.train.device import pick_precision

Array = NDArray[Any]
RESAMPLES = 2000
FALL = "fall"
BATCH_SIZE = 64
MASKS = ("dice", "iou", "hd95_px")
SETTLED = "balanced_accuracy_settled"
OVERALL = ("macro_auroc", "balanced_accuracy", "accuracy", "macro_average_precision")


@dataclass(frozen=True)
class Measured:
    """One run on one split: its metrics as functions of row weights, and whose rows they are."""

    statistics: Mapping[str, Statistic]
    patients: Array
    paths: tuple[str, ...]


def measure_run(
    folder: Path, store: Store, split: str = "test", without: Mapping[str, str] | None = None
) -> Measured:
    """The metrics of ``RUN/predictions.csv`` on one split; ``without`` the rows of whom a column of
    the store holds a text.

    Raises
    ------
    SpcxrError
        no row of that split.
    """
    with (folder / "predictions.csv").open(newline="") as file:
        every = list(csv.DictReader(file))
    paths = store.manifest.column("path")
    left_out = {
        path
        for column, text in (without or {}).items()
        for path, cell in zip(paths, store.manifest.column(column), strict=True)
        if cell == text
    }
    rows = [row for row in every if row["split"] == split and row["path"] not in left_out]
    if not rows:
        raise SpcxrError(f"{folder}: predictions.csv has no row of split {split}; choose another")
    whose = dict(zip(paths, store.manifest.patients, strict=True))
    who = np.array([whose[row["path"]] for row in rows])
    columns, own = _columns(rows), _columns([row for row in every if row["split"] == "val"])
    statistics = _statistics(columns, who) | _settled(own, columns)
    return Measured(statistics, who, tuple(row["path"] for row in rows))


def _columns(rows: Sequence[Mapping[str, str]]) -> dict[str, Array]:
    return {name: np.array([_number(row[name]) for row in rows])
            for name in (rows[0] if rows else ()) if name not in ("path", "split")}  # fmt: skip


def _settled(own: Mapping[str, Array], columns: Mapping[str, Array]) -> dict[str, Statistic]:
    """Of two classes, `SETTLED`: balanced accuracy where the second is called from the probability
    that serves validation rows best (``own``; Youden's index), instead of from one half."""
    names = [name for name in columns if f"p_{name}" in columns]
    if len(names) != 2 or not own:
        return {}
    name = names[1]
    values, scores = own[name][:, None], own[f"p_{name}"][:, None]
    called = columns[f"p_{name}"] >= choose_thresholds(values, scores)["youden"][0]
    sides = [np.where(columns[name] == side, called == side, np.nan) for side in (0, 1)]
    return {SETTLED: lambda w: sum(metrics.mean(side, w) for side in sides) / 2}


def _number(cell: str) -> float:
    return float(cell) if cell else float("nan")


def _statistics(columns: Mapping[str, Array], who: Array) -> dict[str, Statistic]:
    names = tuple(name for name in columns if f"p_{name}" in columns)
    if not names:  # masks: a figure an image
        return {
            name.removesuffix("_lung"): lambda w, values=values: metrics.mean(values, w)
            for name, values in columns.items()
            if name.startswith(MASKS) and not np.isnan(values).all()
        }
    truth, scores = (np.column_stack([columns[p + n] for n in names]) for p in ("", "p_"))
    return class_statistics(truth, scores, who, names)


def class_statistics(
    truth: Array, scores: Array, who: Array, names: tuple[str, ...]
) -> dict[str, Statistic]:
    """`OVERALL`, as `evaluate` computes them, where they are defined for the kind of task."""
    multilabel = not bool((np.nansum(truth, 1) == 1).all())
    made = summarise_classes(truth, scores, who, names, multilabel=multilabel, n=1)
    return {name: made.statistics[name] for name in OVERALL if name in made.statistics}


def measure_elsewhere(folder: Path, store: Store, corruptions: Sequence[str] = ()) -> Measured:
    """A trained run on the test rows of any store; with ``corruptions`` also ``fall``, by how much
    its mean AUROC is less on corrupted images, the mean over kinds and strengths.

    Raises
    ------
    SpcxrError
        a patient or picture of its training is among the rows.
    """
    device = torch.device("cpu")
    precision = pick_precision("auto", device)
    settings = Settings(BATCH_SIZE, device, precision, n_bootstrap=100)
    trained, rows = load_trained(folder, device), store.manifest.rows("test")
    refuse_leaks(find_leaks(trained.folder, store, rows), str(store.path), str(folder))
    test_set = TestSet(store.path.name, str(store.path), store, rows)
    result = judge(trained, test_set, predict(trained, test_set, settings), settings)
    statistics = {name: result.statistics[name] for name in OVERALL if name in result.statistics}
    if corruptions:
        statistics[FALL] = _mean_fall(trained, result, corruptions, settings)
    paths = store.manifest.column("path")
    return Measured(statistics, result.patients, tuple(paths[row] for row in result.measured))


def _mean_fall(
    trained: TrainedModel, result: Result, corruptions: Sequence[str], settings: Settings
) -> Statistic:
    usable, point = np.isin(result.rows, result.measured), operating_point(trained, None)
    found = predict_corrupted(trained, result.test_set, settings, corruptions)
    figures = [
        headline(result.answers, point.scores(some[usable], multilabel=trained.multilabel))
        for some in found.values()
    ]
    clean = headline(result.answers, result.answers.scores)
    return lambda w: clean(w) - np.mean([figure(w) for figure in figures], 0)


# --- over seeds, and between arms -----------------------------------------------------------


def compare_arms(
    arms: Mapping[str, Sequence[Measured]],
    pairs: Sequence[Sequence[str]],
    wanted: Sequence[str],
    *,
    n: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of the arms and the paired differences, ``{metric: {arm or "a - b": facts}}``, of
    the metrics ``wanted``; an arm that has not one of them is left out there.

    Of a difference ``p`` is the two-sided bootstrap value: twice the smaller share of resamples
    on one side of 0, (k + 1) / (n + 1). It cannot be less than 2 / (n + 1).

    Raises
    ------
    SpcxrError
        arms that were measured on other rows.

    >>> who = np.array(list("abcdef"))
    >>> def run(values):
    ...     return Measured({"dice": lambda w: metrics.mean(values, w)}, who, tuple(who))
    >>> one, two = run(np.linspace(0.6, 0.8, 6)), run(np.linspace(0.5, 0.7, 6))
    >>> made = compare_arms({"a": [one, one], "b": [two]}, [("a", "b")], ["dice"], n=99)["dice"]
    >>> round(made["a - b"]["value"], 3), made["a - b"]["p"], made["a"]["n_patients"]
    (0.1, 0.02, 6)
    """
    first = next(iter(arms.values()))[0]
    for arm, runs in arms.items():
        if any(run.paths != first.paths for run in runs):
            raise SpcxrError(f"{arm}: measured on other rows than the first arm; run them anew")
    blocks = list(resample_counts(first.patients, n=n, seed=seed))
    ones, rows = np.ones(len(first.patients)), (len(first.paths), len(np.unique(first.patients)))
    made: dict[str, Any] = {}
    for metric in wanted:
        here = {arm: runs for arm, runs in arms.items() if metric in runs[0].statistics}
        drawn = {arm: _over_seeds(runs, metric, blocks) for arm, runs in here.items()}
        found: dict[str, Any] = {}
        for arm, runs in here.items():
            each = [float(run.statistics[metric](ones)) for run in runs]
            found[arm] = {"value": float(np.mean(each)), **_ends(drawn[arm]), "seeds": each}
            found[arm] |= {"n_images": rows[0], "n_patients": rows[1]}
        for a, b in pairs:
            if a in here and b in here:
                gaps = drawn[a] - drawn[b]
                value = found[a]["value"] - found[b]["value"]
                found[f"{a} - {b}"] = {"value": value, **_ends(gaps), "p": p_value(gaps)}
        if found:
            made[metric] = found
    return made


def _over_seeds(runs: Sequence[Measured], metric: str, blocks: Sequence[Array]) -> Array:
    """The mean over the runs in each resample ``(n,)``."""
    return np.mean(
        [np.concatenate([run.statistics[metric](block) for block in blocks]) for run in runs], 0
    )


def _ends(draws: Array) -> dict[str, float]:
    low, high = np.nanquantile(draws, [0.025, 0.975]).tolist()
    return {"low": low, "high": high}


def p_value(gaps: Array) -> float:
    """Two-sided, of resampled differences ``(n,)``.

    >>> p_value(np.ones(99)), p_value(np.array([-1.0, 1.0] * 50))
    (0.02, 1.0)
    """
    known = gaps[~np.isnan(gaps)]
    least = min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(2 * (least + 1) / (len(known) + 1), 1.0)


# --- thumbnails -----------------------------------------------------------------------------

BASELINE = "thumbnails"
THUMBNAIL = 32
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)


def thumbnails(store: Store, rows: Array) -> Array:
    """``(n, 1024)`` float32 in 0 to 1: means of squares of 32 x 32."""
    images = store.images(rows).astype(np.float32) / np.iinfo(store.dtype).max
    side = images.shape[-1] // THUMBNAIL * THUMBNAIL
    images = images[:, :side, :side].reshape(len(rows), THUMBNAIL, side // THUMBNAIL, THUMBNAIL, -1)
    return images.mean((2, 4)).reshape(len(rows), -1)


def thumbnail_baseline(
    store: Store, cohort: Any, judge: Callable[[Array, Array], float]
) -> Measured:
    """A logistic regression on thumbnails, measured on the test rows: what of the task can be
    solved without seeing anything.

    ``cohort`` is `classify`'s (`choose_cohort`), so it learns from the very rows of a run; its
    penalty is chosen by ``judge`` (macro AUROC) on the validation rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multioutput import MultiOutputClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    targets, best = cohort.targets, (-1.0, None)
    values = {part: targets.values[rows] for part, rows in
              (("train", cohort.train), ("val", cohort.val), ("test", cohort.test))}  # fmt: skip
    for penalty in PENALTIES:
        head = LogisticRegression(C=penalty, max_iter=500)
        model = make_pipeline(
            StandardScaler(), MultiOutputClassifier(head) if targets.multilabel else head
        )
        truth = values["train"] if targets.multilabel else values["train"].argmax(1)
        model.fit(thumbnails(store, cohort.train), truth)
        scores = _chances(model, thumbnails(store, cohort.val), targets)
        if (found := judge(values["val"], scores)) > best[0]:
            best = (found, model)
    scores = _chances(best[1], thumbnails(store, cohort.test), targets)
    who = store.manifest.patients[cohort.test]
    paths = tuple(store.manifest.column("path")[row] for row in cohort.test.tolist())
    return Measured(class_statistics(values["test"], scores, who, targets.names), who, paths)


def _chances(model: Any, pictures: Array, targets: Any) -> Array:
    found = model.predict_proba(pictures)
    if targets.multilabel:
        return np.column_stack([one[:, -1] for one in found])
    made = np.zeros((len(pictures), len(targets.names)))
    made[:, model.classes_] = found
    return made
