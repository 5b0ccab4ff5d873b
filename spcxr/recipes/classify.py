"""Fine-tune an encoder for labels: several findings at once, or one class of many.

open the images -> settle labels and rows -> build -> fit -> export the best epoch -> test it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.config import setting, to_dict
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.metrics import auroc, by_class
from spcxr.evaluate.summary import ClassSummary, summarise_classes
from spcxr.infer.predict import predict_classes, probabilities
from spcxr.models.heads import ClassificationHead, Classifier, Features
from spcxr.recipes.finetune import Cohort, FinetuneConfig, Start, begin, rows_of, take_fraction
from spcxr.recipes.fitting import Course, export, fit, set_out, write_results
from spcxr.recipes.targets import (
    Matrix,
    Rows,
    Targets,
    class_weights,
    is_one_of_many,
    keep_chosen,
    refuse_unlearnable,
    settle_uncertain,
)
from spcxr.train.augment import Warps
from spcxr.train.checkpoint import Position
from spcxr.train.run_folder import open_run

RECIPE = "classify"
STANDARDISED_ON = 1024  # training images at most


@dataclass(frozen=True)
class ClassifyConfig(FinetuneConfig):
    """Settings of `classify`: those of `FinetuneConfig`, and what the labels mean."""

    labels: tuple[str, ...] = setting((), "label columns a,b,...; all if not given")
    task: str = setting(
        "auto",
        "one class of many, or labels that may come together",
        choices=("auto", "multiclass", "multilabel"),
    )
    uncertain: str = setting(
        "ignore", "what a label of -1 counts as", choices=("ignore", "ones", "zeros")
    )
    class_weights: str = setting("none", "auto: rare labels count more", choices=("none", "auto"))


def run(config: ClassifyConfig) -> Path:
    """Fine-tune, and return the run folder: ``model/``, ``metrics.json``, ``predictions.csv``.

    Raises
    ------
    SpcxrError
        data, labels, splits or an init that cannot be used; the message names the remedy.
    Interrupted
        Ctrl-C or SIGTERM: saved; the message says how to go on.
    """
    with open_run(config.out, to_dict(config), recipe=RECIPE, resume=config.resume) as folder:
        start = begin(config, folder)
        course, task = build(config, folder, start, choose_cohort(config, start.store))
        position = fit(course, task)
        export(course, task, position, course.model.get_submodule("head"))
        report(course, task, position)
    return folder


# --- what is to be learned ------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled(Cohort):
    """Rows with labels, and the targets that they hold."""

    targets: Targets


def choose_cohort(config: ClassifyConfig, store: Store) -> Labelled:
    """Settle labels, kind of task and rows.

    Raises
    ------
    SpcxrError
        no labels, an empty split, labels that cannot be learned or judged, or a task asked for
        that the labels do not fit.
    """
    names = config.labels or store.manifest.labels
    if not names:
        raise SpcxrError(
            f"{store.path}: no label columns; add one (1, 0, -1 or blank) to the manifest and "
            "prepare it again"
        )
    values = settle_uncertain(store.manifest.label_matrix(names), config.uncertain)
    if config.task != "multilabel":
        rows = np.concatenate([rows_of(store, *chosen) for chosen in config.splits])
        every = store.manifest.label_matrix(store.manifest.labels)[rows]
        values[rows] = keep_chosen(values[rows], settle_uncertain(every, config.uncertain))
    whole = Targets(tuple(names), False, values)
    train, val, test = (_labelled_rows(whole, store, *chosen) for chosen in config.splits)
    used = values[np.concatenate([train, val, test])]
    targets = Targets(tuple(names), _is_multilabel(config.task, used, store), values)
    train = train[_fraction(config, store, targets, train)]
    refuse_unlearnable(targets, train, str(store.path))
    if np.isnan(macro_auroc(values[val], np.zeros_like(values[val]))):
        raise SpcxrError(
            f"{store.path}: no label takes both values in the validation rows, so no epoch can be "
            "chosen by them; widen --val-splits"
        )
    return Labelled(train, val, test, targets)


def _labelled_rows(whole: Targets, store: Store, splits: tuple[str, ...], flag: str) -> Rows:
    rows = whole.labelled(rows_of(store, splits, flag))
    if splits and len(rows) == 0:
        raise SpcxrError(
            f"{store.path}: {', '.join(whole.names)} blank in all rows of {', '.join(splits)}; "
            f"choose other --labels or {flag}"
        )
    return rows


def _is_multilabel(task: str, used: Matrix, store: Store) -> bool:
    """What ``--task`` says, checked; ``auto`` looks at the labels."""
    one_each = is_one_of_many(used)
    if task == "multiclass" and not one_each:
        raise SpcxrError(
            f"{store.path}: not every labelled row has exactly one class out of two or more; "
            "choose --task multilabel, or other --labels"
        )
    return task == "multilabel" or not one_each


def _fraction(
    config: ClassifyConfig, store: Store, targets: Targets, rows: Rows
) -> NDArray[np.bool_]:
    """Which of ``rows`` ``--label-fraction`` keeps; of one class of many, some of each class."""
    classes = targets.values[rows].argmax(1)
    strata = np.zeros_like(classes) if targets.multilabel else classes
    patients = store.manifest.patients[rows]
    return take_fraction(patients, strata, config.label_fraction, config.seed)


# --- losses ---------------------------------------------------------------------------------


def masked_bce(logits: Tensor, values: Tensor, positive_weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy over the known labels: logits and values ``[B, K]``, NaN = unknown.

    The mean over known entries of the batch; an unknown one adds neither loss nor gradient.

    >>> float(masked_bce(torch.zeros(1, 2), torch.tensor([[1.0, float("nan")]])))
    0.6931471824645996
    """
    known = ~torch.isnan(values)
    loss = F.binary_cross_entropy_with_logits(
        logits, values.nan_to_num(0.0), pos_weight=positive_weight, reduction="none"
    )
    return (loss * known).sum() / known.sum().clamp(min=1)


def one_of_many(logits: Tensor, values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of logits ``[B, K]`` against one-hot ``values [B, K]``, classes weighted.

    >>> round(float(one_of_many(torch.zeros(1, 4), torch.eye(4)[:1])), 4)
    1.3863
    """
    return F.cross_entropy(logits, values.argmax(1), weight=weight)


# --- the run --------------------------------------------------------------------------------


def build(
    config: ClassifyConfig, folder: Path, start: Start, cohort: Labelled
) -> tuple[Course, Classification]:
    """Head, optimiser and task on their device."""
    targets = cohort.targets
    head = ClassificationHead(width=start.encoder.width, classes=len(targets.names))
    course = set_out(config, RECIPE, folder, start, cohort, Classifier(start.encoder, head))
    _standardise(head, course)
    weight = None
    if config.class_weights == "auto":
        weights = class_weights(targets.values[cohort.train], multilabel=targets.multilabel)
        weight = torch.from_numpy(weights).to(course.compute.device)
    return course, Classification(course, cohort, weight)


def _standardise(head: ClassificationHead, course: Course) -> None:
    """By the features of up to `STANDARDISED_ON` training images, spread over all of them."""
    places = np.linspace(0, len(course.rows) - 1, min(len(course.rows), STANDARDISED_ON))
    rows, start = course.rows[places.astype(np.int64)], course.start
    model = Features(start.encoder)
    found = predict_classes(model, start.store, rows, start.normalisation, course.compute)
    head.standardise(torch.from_numpy(found))


@dataclass(frozen=True)
class Classification:
    """The `Task` of the loop: what is lost on a batch, and how well the validation rows go."""

    course: Course
    cohort: Labelled
    weight: Tensor | None
    score: str = "macro_auroc"

    @property
    def said(self) -> str:
        """The settled kind of task and its labels."""
        return self.cohort.targets.said

    @property
    def block(self) -> dict[str, Any]:
        """The labels, in the order of the logits."""
        targets = self.cohort.targets
        return {
            "kind": RECIPE,
            "labels": list(targets.names),
            "multilabel": targets.multilabel,
        }

    def loss(self, model: nn.Module, images: Tensor, rows: Rows, warps: Warps) -> Tensor:
        """Labels stay what they are, however the image is warped."""
        return self.between(model(images), rows)

    def between(self, logits: Tensor, rows: Rows) -> Tensor:
        """Loss of logits ``[B, K]`` against the labels of ``rows``."""
        targets = self.cohort.targets
        values = torch.from_numpy(targets.values[rows]).to(logits.device)
        compare = masked_bce if targets.multilabel else one_of_many
        return compare(logits.float(), values, self.weight)

    def predict(self, model: nn.Module, rows: Rows) -> Matrix:
        """Logits ``(n, K)`` of ``rows``, unchanged images."""
        start = self.course.start
        return predict_classes(model, start.store, rows, start.normalisation, self.course.compute)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and macro AUROC; accuracy where one class of many is asked for."""
        rows, targets = self.cohort.val, self.cohort.targets
        logits, values = self.predict(model, rows), targets.values[rows]
        loss = self.between(torch.from_numpy(logits).to(self.course.compute.device), rows)
        figures = {"loss": float(loss), "macro_auroc": macro_auroc(values, logits)}
        if not targets.multilabel:
            scores = probabilities(logits, multilabel=False)
            figures["macro_auroc"] = macro_auroc(values, scores)
            figures["accuracy"] = float((logits.argmax(1) == values.argmax(1)).mean())
        return figures


def macro_auroc(values: Matrix, scores: NDArray[Any]) -> float:
    """Mean AUROC over the labels that take both values; NaN where none does.

    >>> macro_auroc(np.array([[0, 1], [1, 1]], np.float32), np.array([[0.1, 0.5], [0.9, 0.5]]))
    1.0
    """
    found = by_class(auroc, values, scores)
    return float(found[~np.isnan(found)].mean()) if (~np.isnan(found)).any() else float("nan")


def report(course: Course, task: Classification, position: Position) -> None:
    """Predict validation and test rows with the best epoch's weights; write what came of it."""
    targets, rows = task.cohort.targets, task.cohort.judged
    scores = probabilities(task.predict(course.model, rows), multilabel=targets.multilabel)
    columns: dict[str, NDArray[Any]] = {}
    for name, truth, score in zip(targets.names, targets.values[rows].T, scores.T, strict=True):
        columns |= {name: truth, f"p_{name}": score}

    def summarise(part: slice) -> ClassSummary:
        return summarise_classes(
            targets.values[rows[part]],
            scores[part],
            course.start.store.manifest.patients[rows[part]],
            targets.names,
            multilabel=targets.multilabel,
            seed=course.config.seed,
        )

    write_results(course, task, position, columns, summarise)
