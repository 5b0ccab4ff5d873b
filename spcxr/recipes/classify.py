"""Fine-tune an encoder for labels: several findings at once, or one class of many.

open the images -> settle labels and rows -> build -> fit -> export the best epoch -> test it.
With ``--method linear`` or ``knn`` the encoder stays as it is, and `frozen` fits the head; with
``--seeds`` the whole is done several times over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.config import ConfigError, setting, to_dict
from spcxr.evaluate.calibration import settle_operating_point
from spcxr.evaluate.summary import ClassSummary, summarise_classes
from spcxr.infer.predict import predict_classes, probabilities
from spcxr.models.heads import ClassificationHead, Classifier, Features
from spcxr.recipes import frozen, seeds
from spcxr.recipes.attend import LUNGS, KnownLungs, find_lungs
from spcxr.recipes.cohort import Labelled, choose_cohort, macro_auroc
from spcxr.recipes.finetune import SCRATCH, FinetuneConfig, Start, begin
from spcxr.recipes.fitting import Course, Drawn, fit, set_out
from spcxr.recipes.losses import masked_bce, one_of_many
from spcxr.recipes.outcome import export, finished, write_results
from spcxr.recipes.presets import PRESETS
from spcxr.recipes.targets import POLICIES, SOFT, Matrix, Rows, class_weights
from spcxr.train.checkpoint import Position
from spcxr.train.distributed import World, join_world
from spcxr.train.parallel import predict_together
from spcxr.train.run_folder import open_run_together

RECIPE = "classify"
STANDARDISED_ON = 1024  # training images at most


@dataclass(frozen=True)
class ClassifyConfig(FinetuneConfig):
    """Settings of `classify`: those of `FinetuneConfig`, what the labels mean, how the head is
    fitted.

    ``linear`` and ``knn`` look at each image once and unchanged: epochs, batches' rates, decay and
    augmentation do nothing there. ``recipe`` fills in the settings of `PRESETS` below those of the
    ``--config`` file and the flags (`config.resolve`); a config that is made in Python is as given.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    labels: tuple[str, ...] = setting((), "label columns a,b,...; all if not given")
    task: str = setting(
        "auto",
        "one class of many, or labels that may come together",
        choices=("auto", "multiclass", "multilabel"),
    )
    method: str = setting(
        "full",
        "fine-tune all weights (or the head alone: --freeze), or on frozen features, computed "
        "once, a logistic regression or k-NN",
        choices=("full", "linear", "knn"),
    )
    head_init: str = setting(
        "random",
        "what the head begins as, with method full: linear is a logistic regression on the "
        "features that the encoder begins with (LP-FT)",
        choices=("random", "linear"),
    )
    recipe: str = setting("none", "settings of a paper, to begin with", choices=("none", *PRESETS))
    uncertain: str = setting("ignore", "what a label of -1 counts as", choices=POLICIES)
    class_weights: str = setting("none", "auto: rare labels count more", choices=("none", "auto"))
    label_smoothing: float = setting(
        0.0, "share of each target dealt out to all classes alike", low=0.0, high=0.9
    )
    labels_per_class: int = setting(
        0, "training patients of each class to use, nested by seed; 0: all", low=0
    )
    attend: str = setting(
        "image", "what is read: the whole image, or the lungs' patches", choices=("image", LUNGS)
    )
    lungs_from: str | None = setting(
        None, "segment run that finds the lungs; the data's masks if not given"
    )
    equalise: bool = setting(
        False, "with --attend lungs: equalise the greys of what is read, image by image"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels_per_class and self.label_fraction < 1:
            raise ConfigError("give labels_per_class or label_fraction, not both")
        if self.lungs_from is not None and self.attend != LUNGS:
            raise ConfigError("lungs_from is given, but whole images are read; add --attend lungs")
        if self.equalise and self.attend != LUNGS:
            raise ConfigError("equalise is of what --attend lungs reads; add it, or leave it out")
        if self.method == "full":
            return
        if self.head_init != "random":
            raise ConfigError(
                f"head_init {self.head_init} is what method full begins with; leave it out with "
                f"method {self.method}"
            )
        if self.init == SCRATCH:
            raise ConfigError(f"method {self.method} with init scratch judges random features; "
                              "give an --init")  # fmt: skip
        if self.uncertain in SOFT or self.label_smoothing or self.ema:
            raise ConfigError(
                f"uncertain {self.uncertain}, label_smoothing and ema are of training by steps; "
                f"leave them out with method {self.method}"
            )
        if self.seeds > 1 and not self.labels_per_class and self.label_fraction == 1:
            raise ConfigError(
                f"seeds with method {self.method}: on all labels nothing is drawn, and the runs "
                "are one; give labels_per_class or label_fraction, or leave it out"
            )
        if self.method == "knn" and self.class_weights != "none":
            raise ConfigError("class_weights with method knn: votes have no loss; leave it out")

    @property
    def frozen(self) -> bool:
        """Whether the encoder stays as it is."""
        return self.freeze or self.method != "full"


def run(config: ClassifyConfig) -> Path:
    """Fine-tune, and return the run folder: ``model/``, ``metrics.json``, ``predictions.csv``.

    One process of many where torchrun or SLURM says so (`train.distributed`). With several seeds
    the folder holds a run for each, and ``summary.json`` (`seeds.run_seeds`).

    Raises
    ------
    SpcxrError
        data, labels, splits or an init that cannot be used; the message names the remedy.
    Interrupted
        Ctrl-C or SIGTERM: saved; the message says how to go on.
    """
    with join_world(config.device) as world:
        if config.seeds > 1:
            return seeds.run_seeds(world, config, run_once, RECIPE)
        return run_once(world, config)


def run_once(world: World, config: ClassifyConfig, place: Path | None = None) -> Path:
    """One run, of one seed; images are prepared at ``place``, or in the run. A finished one is
    left as it is."""
    settings = to_dict(config)
    opened = open_run_together(world, config.out, settings, recipe=RECIPE, resume=config.resume)
    with opened as folder:
        if world.once(lambda: str(finished(folder))) == "True":
            return folder
        start = begin(config, folder, world, place)
        course, task = build(config, folder, start, choose_cohort(config, start.store), world)
        if config.head_init == "linear":
            course = frozen.begin_linear(course, task)
            task = replace(task, course=course)
        if config.method == "full":
            position = fit(course, task)
            logits = task.predict(course.model, task.cohort.judged)
        else:
            course, position, logits = frozen.learn(course, task)
            task = replace(task, course=course)
        if world.first:
            made = export(course, task, position, course.model.get_submodule("head"))
            if task.lungs is not None:
                task.lungs.export(made)
            report(course, task, position, logits)
    return folder


# --- the run --------------------------------------------------------------------------------


def build(
    config: ClassifyConfig, folder: Path, start: Start, cohort: Labelled, world: World
) -> tuple[Course, Classification]:
    """Head, optimiser and task on their device."""
    targets = cohort.targets
    head = ClassificationHead(width=start.encoder.width, classes=len(targets.names))
    model = Classifier(start.encoder, head)
    course, lungs = set_out(config, RECIPE, folder, start, cohort, model, world), None
    if config.attend == LUNGS:
        lungs = find_lungs(
            start, cohort, course.compute, config.lungs_from, equalise=config.equalise
        )
        for made in (course.model, course.ema):
            if made is not None:
                made.lungs = lungs  # type: ignore[assignment]
    if config.method == "full" and config.head_init == "random":  # a probe standardises by itself
        _standardise(head, course, lungs)
    weight = None
    if config.class_weights == "auto":
        weights = class_weights(targets.values[cohort.train], multilabel=targets.multilabel)
        weight = torch.from_numpy(weights).to(course.compute.device)
    return course, Classification(config, course, cohort, weight, lungs)


def _standardise(head: ClassificationHead, course: Course, lungs: KnownLungs | None) -> None:
    """By the features of up to `STANDARDISED_ON` training images, spread over all of them."""
    places = np.linspace(0, len(course.rows) - 1, min(len(course.rows), STANDARDISED_ON))
    rows, start = course.rows[places.astype(np.int64)], course.start
    model = Features(start.encoder, lungs)

    def computed(some: Rows) -> Matrix:
        return predict_classes(model, start.store, some, start.normalisation, course.compute)

    head.standardise(torch.from_numpy(predict_together(course.world, computed, rows)))


@dataclass(frozen=True)
class Classification:
    """The `Task` of the loop: what is lost on a batch, and how well the validation rows go."""

    config: ClassifyConfig
    course: Course
    cohort: Labelled
    weight: Tensor | None
    lungs: KnownLungs | None = None
    score: str = field(default="macro_auroc")

    @property
    def said(self) -> str:
        """The settled kind of task and its labels, and what is read if not whole images."""
        said = self.cohort.targets.said
        return said if self.lungs is None else f"{said}; {self.lungs.said}"

    @property
    def block(self) -> dict[str, Any]:
        """The labels, in the order of the logits, and what kind of head gives these."""
        targets = self.cohort.targets
        return {
            "kind": RECIPE,
            "labels": list(targets.names),
            "multilabel": targets.multilabel,
            "method": self.config.method,
            **self.course.settled,
            **({} if self.lungs is None else self.lungs.block),
        }

    def loss(self, model: nn.Module, images: Tensor, drawn: Drawn) -> Tensor:
        """Labels stay what they are, however the image is warped; soft ones are drawn anew. The
        lungs move with the image."""
        seed = self.config.seed
        values = self.cohort.drawn(drawn.rows, seed=seed, epoch=drawn.epoch)
        logits = (
            model(images)
            if self.lungs is None
            else model(*self.lungs.warped(images, drawn.rows, drawn.warps))
        )
        return self.between(logits, values, smoothing=self.config.label_smoothing)

    def between(self, logits: Tensor, values: Matrix, *, smoothing: float = 0.0) -> Tensor:
        """Loss of logits ``[B, K]`` against values ``(B, K)``, NaN = unknown."""
        compare = masked_bce if self.cohort.targets.multilabel else one_of_many
        target = torch.from_numpy(values).to(logits.device)
        return compare(logits.float(), target, self.weight, smoothing=smoothing)

    def part(self, drawn: Drawn, whole: Rows) -> float:
        """Its share of the labels that the step's mean is taken over."""
        return self._amount(drawn.rows) / self._amount(whole) if drawn.counts else 0.0

    def _amount(self, rows: Rows) -> float:
        """Known labels; of one class of many the rows, weighed by class."""
        targets = self.cohort.targets
        if targets.multilabel:
            return float(self.cohort.known(rows))
        classes = targets.values[rows].argmax(1)
        return float(len(rows)) if self.weight is None else float(self.weight[classes].sum())

    def predict(self, model: nn.Module, rows: Rows) -> Matrix:
        """Logits ``(n, K)`` of ``rows``, unchanged images; each process computes its share."""
        start, compute = self.course.start, self.course.compute

        def computed(some: Rows) -> Matrix:
            return predict_classes(model, start.store, some, start.normalisation, compute)

        return predict_together(self.course.world, computed, rows)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss and macro AUROC; accuracy where one class of many is asked for."""
        rows, targets = self.cohort.val, self.cohort.targets
        logits, values = self.predict(model, rows), targets.values[rows]
        loss = self.between(torch.from_numpy(logits).to(self.course.compute.device), values)
        figures = {"loss": float(loss), "macro_auroc": macro_auroc(values, logits)}
        if not targets.multilabel:
            scores = probabilities(logits, multilabel=False)
            figures["macro_auroc"] = macro_auroc(values, scores)
            figures["accuracy"] = float((logits.argmax(1) == values.argmax(1)).mean())
        return figures


def report(course: Course, task: Classification, position: Position, logits: Matrix) -> None:
    """Write what the exported weights make of the validation and test rows: ``logits (n, K)``.

    The validation rows settle the model's temperatures and thresholds; the figures written here
    are those of its plain probabilities.
    """
    targets, rows = task.cohort.targets, task.cohort.judged
    part = task.cohort.parts["validation"]
    settle_operating_point(
        course.folder / "model",
        targets.names,
        logits[part],
        targets.values[rows[part]],
        multilabel=targets.multilabel,
    )
    scores = probabilities(logits, multilabel=targets.multilabel)
    columns: dict[str, NDArray[Any]] = {}
    for name, truth, score in zip(targets.names, targets.values[rows].T, scores.T, strict=True):
        columns |= {name: truth, f"p_{name}": score}
    if task.lungs is not None:
        columns["patches_read"] = task.lungs.shares(rows)  # 1: whole, for no lung was found

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
