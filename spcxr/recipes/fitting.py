"""What `classify` and `segment` share from the first step on: the loop, and the exported model."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.report import PHANTOMS, write_json, write_text
from spcxr.infer.predict import Normalisation, network_input
from spcxr.models.weights import save_model_folder
from spcxr.ops.philox import uniform
from spcxr.recipes.finetune import Cohort, FinetuneConfig, Rows, Start
from spcxr.recipes.images import phantoms_among
from spcxr.train.augment import DRAWS, Warps, plan, warp_images
from spcxr.train.batches import epoch_batches, prefetch, seed_step
from spcxr.train.checkpoint import Checkpoints, Position, load_checkpoint
from spcxr.train.device import Compute, pick_device, pick_precision, why_not_bf16
from spcxr.train.guard import note_bad_step, refuse_endless_bad_steps
from spcxr.train.interrupt import Signals, watch_signals
from spcxr.train.journal import Journal
from spcxr.train.model_card import write_model_card
from spcxr.train.optim import build_adamw, set_rates, take_step
from spcxr.train.schedule import cosine

SAVE_EVERY_S = 60.0

# --- the loop -------------------------------------------------------------------------------


class Task(Protocol):
    """What a downstream task adds to the loop."""

    @property
    def score(self) -> str:
        """The figure of `validate` that chooses the best epoch; larger is better."""

    @property
    def said(self) -> str:
        """What is learned, in a line for the log."""

    @property
    def block(self) -> dict[str, Any]:
        """The ``task`` of the exported ``config.json``, by which `load_trained` builds the head."""

    def loss(self, model: nn.Module, images: Tensor, rows: Rows, warps: Warps) -> Tensor:
        """Mean loss of one batch: warped, normalised images ``[B, 1, h, w]`` on the device."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Figures of the validation rows."""


@dataclass(frozen=True)
class Course:
    """One run, ready to be trained: what the loop needs, and the schedule."""

    config: FinetuneConfig
    recipe: str
    folder: Path
    start: Start
    cohort: Cohort
    model: nn.Module
    optimizer: torch.optim.Optimizer
    compute: Compute

    @property
    def rows(self) -> Rows:
        """The rows to learn from."""
        return self.cohort.train

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last may be smaller, so that every label counts."""
        return math.ceil(len(self.rows) / self.config.batch_size)

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.config.epochs * self.steps_per_epoch

    def epoch_of(self, position: Position) -> int:
        """The epoch, counted from 1, after which the weights were best."""
        return (position.best_step or 0) // self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Learning rate of a step: warm-up, then a cosine."""
        return cosine(
            step,
            self.steps,
            start=self.config.peak_lr,
            end=min(self.config.min_lr, self.config.peak_lr),
            warmup=round(self.config.warmup * self.steps_per_epoch),
        )


def set_out(
    config: FinetuneConfig,
    recipe: str,
    folder: Path,
    start: Start,
    cohort: Cohort,
    model: nn.Module,
) -> Course:
    """The course of ``start``'s encoder within ``model``: put on its device, optimiser built."""
    device = pick_device(config.device)
    model = model.to(device)
    start.encoder.requires_grad_(not config.freeze)
    return Course(
        config=config,
        recipe=recipe,
        folder=folder,
        start=start,
        cohort=cohort,
        model=model,
        optimizer=build_adamw(model, layer_decay=config.decay_per_layer),
        compute=Compute(config.batch_size, device, pick_precision(config.precision, device)),
    )


def fit(course: Course, task: Task) -> Position:
    """Train to the end (or on from the last checkpoint) and load the best epoch's weights.

    Raises
    ------
    Interrupted
        a signal came; the work is saved and the message says how to go on.
    SpcxrError
        losses that stay not finite, a checkpoint of other images, or a score that never was
        defined.
    """
    checkpoints = Checkpoints(course.folder)
    position = _resume(course, checkpoints)
    count = len(course.rows)
    done = position.step * count // course.steps_per_epoch
    total = course.config.epochs * count
    with (
        Journal(course.folder, step=position.step, images_done=done, images_total=total) as journal,
        watch_signals() as signals,
    ):
        journal.say(f"{course.start.origin}; {count} training rows; {course.compute.precision}")
        journal.say(task.said)
        if why := why_not_bf16(course.config.precision, course.compute.device):
            journal.say(why)
        saved = time.monotonic()
        while position.step < course.steps:
            position = _train_epoch(course, task, position, checkpoints, journal, signals)
            position = _judge(course, task, position, journal)
            finished, best = position.step == course.steps, position.best_step == position.step
            # An epoch of a few labelled images takes less time than writing a checkpoint.
            if best or finished or signals.came or time.monotonic() - saved > SAVE_EVERY_S:
                checkpoints.save(position, model=course.model, optimizer=course.optimizer)
                saved = time.monotonic()
            _stop_if_asked(course, position, signals)
    if position.best is None:
        raise SpcxrError(
            f"{course.folder}: the validation {task.score} was never defined; check that the "
            "validation rows hold what is to be found"
        )
    load_checkpoint(checkpoints.best, model=course.model)
    return position


def _resume(course: Course, checkpoints: Checkpoints) -> Position:
    """The last checkpoint's position, or the beginning."""
    store = course.start.store
    data = str(store.facts["content_hash"])
    position = checkpoints.load(model=course.model, optimizer=course.optimizer)
    if position is None:
        return Position(data=data)
    if position.data != data:
        raise SpcxrError(
            f"{store.path}: not the images that {course.folder} began with (their content "
            "differs); restore them, or choose another --out"
        )
    return position


def _train_epoch(
    course: Course,
    task: Task,
    position: Position,
    checkpoints: Checkpoints,
    journal: Journal,
    signals: Signals,
) -> Position:
    """The rest of the epoch that ``position`` stands in; saves and stops when a signal came."""
    config, store = course.config, course.start.store
    epoch, done = divmod(position.step, course.steps_per_epoch)
    batches = epoch_batches(
        course.rows, config.batch_size, seed=config.seed, epoch=epoch, drop_last=False
    )
    course.model.train()
    before = time.perf_counter()
    for rows, pixels in prefetch(store.images, batches[done:]):
        fetched = time.perf_counter()
        figures, taken = _train_step(course, task, position.step, rows, pixels)
        bad = 0 if taken else position.bad_in_a_row + 1
        position = replace(position, step=position.step + 1, bad_in_a_row=bad)
        refuse_endless_bad_steps(course.folder, position.step, bad)
        after = time.perf_counter()
        figures |= {"data_s": fetched - before, "step_s": after - fetched}
        journal.record("train", position.step, figures)
        journal.advance(len(rows), {"loss": figures["loss"]})
        before = after
        if signals.came and position.step % course.steps_per_epoch:
            checkpoints.save(position, model=course.model, optimizer=course.optimizer)
            _stop_if_asked(course, position, signals)
    return position


def _train_step(
    course: Course, task: Task, step: int, rows: Rows, pixels: NDArray[Any]
) -> tuple[dict[str, float], bool]:
    """One update; figures of it, and whether it was made (it is not where it is not finite)."""
    config, epoch = course.config, step // course.steps_per_epoch
    rate = course.rate(step)
    set_rates(course.optimizer, lr=rate, weight_decay=config.weight_decay)
    images, warps = augmented(course, rows, pixels, epoch)
    seed_step(config.seed, step)
    with course.compute.autocast():
        loss = task.loss(course.model, images, rows, warps)
    loss.backward()
    made = take_step(course.optimizer, loss, clip=config.clip)
    if not made.taken:
        note_bad_step(course.folder, step, epoch, rows, made)
    return {"loss": made.loss, "grad_norm": made.grad_norm, "lr": rate}, made.taken


def augmented(course: Course, rows: Rows, pixels: NDArray[Any], epoch: int) -> tuple[Tensor, Warps]:
    """Stored pixels ``(B, S, S)`` -> the network's input, warped, and the warps it went through.

    One image's warp depends on (seed, epoch, image id) alone.
    """
    config, normalisation = course.config, course.start.normalisation
    draws = uniform(torch.from_numpy(rows), DRAWS, seed=config.seed, epoch=epoch, stream="crop")
    warps = plan(draws, config.augmentation)
    size = course.start.encoder.image_px
    grey = network_input(pixels, size, Normalisation(0.0, 1.0), course.compute.device)
    images = (warp_images(grey, warps) - normalisation.mean) / normalisation.std
    return images.expand(-1, course.start.encoder.channels, -1, -1), warps  # 3: grey thrice


def _judge(course: Course, task: Task, position: Position, journal: Journal) -> Position:
    """Validate after an epoch; the position knows whether it is the best so far.

    Of equal scores the later epoch is kept: on few validation rows AUROC soon stands at its top,
    while the loss still falls.
    """
    figures = task.validate(course.model)
    journal.record("val", position.step, figures)
    score, epoch = figures[task.score], position.step // course.steps_per_epoch
    better = math.isfinite(score) and (position.best is None or score >= position.best)
    said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    journal.say(f"epoch {epoch}/{course.config.epochs}: {said}{', the best' if better else ''}")
    return replace(position, best=score, best_step=position.step) if better else position


def _stop_if_asked(course: Course, position: Position, signals: Signals) -> None:
    if signals.came and position.step < course.steps:
        where = f"step {position.step} of {course.steps}"
        signals.raise_interrupted(course.folder, course.recipe, where)


# --- the end --------------------------------------------------------------------------------


def export(course: Course, task: Task, position: Position, head: nn.Module) -> Path:
    """Write ``RUN/model`` and its card: encoder, head, preprocessing, and how they came to be."""
    config, start, block = course.config, course.start, task.block
    phantoms = phantoms_among(start.store, course.rows)
    provenance = {
        "recipe": course.recipe,
        "init": config.init,
        "data": position.data,
        "phantoms": phantoms,
        "training_rows": len(course.rows),
        "epoch": course.epoch_of(position),
        "epochs": config.epochs,
        "validation": {task.score: position.best},
        "seed": config.seed,
        "precision": course.compute.precision,
    }
    folder = save_model_folder(
        course.folder / "model",
        start.encoder,
        preprocess=start.store.preprocess.to_dict(),
        mean=start.normalisation.mean,
        std=start.normalisation.std,
        task=block,
        head=head,
        provenance=provenance,
    )
    answers = block.get("labels") or block.get("structures") or []
    facts = {
        **provenance,
        "preprocess": start.store.preprocess.to_dict(),
        "metrics": "metrics.json, with intervals; for patients like those of the test rows only",
    }
    title = f"{course.recipe}: {', '.join(answers)}"
    write_model_card(course.folder, title, facts, banner=PHANTOMS if phantoms else "")
    return folder


def write_results(
    course: Course,
    task: Task,
    position: Position,
    columns: Mapping[str, NDArray[Any]],
    summarise: Callable[[slice], Any],
) -> None:
    """``predictions.csv`` and ``metrics.json``: what the best epoch's weights make of the rows.

    Parameters
    ----------
    columns
        what was predicted of each of the cohort's ``judged`` rows, ``(n,)`` by name.
    summarise
        metrics of one part of those rows.
    """
    cohort, store = course.cohort, course.start.store
    write_predictions(course.folder / "predictions.csv", store, cohort.judged, columns)
    facts = {
        "recipe": course.recipe,
        "task": task.said,
        "phantoms": phantoms_among(store, cohort.judged),
        "rows": {"train": len(cohort.train), "val": len(cohort.val), "test": len(cohort.test)},
        "epoch": course.epoch_of(position),
        **{name: summarise(part) for name, part in cohort.parts.items()},
    }
    write_json(course.folder / "metrics.json", facts)


def write_predictions(
    path: Path, store: Store, rows: Rows, columns: Mapping[str, NDArray[Any]]
) -> Path:
    """A CSV of ``path, split`` and these columns ``(n,)``, a row each; NaN is left blank."""
    paths, splits = store.manifest.column("path"), store.manifest.column("split")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "split", *columns])
    for place, row in enumerate(rows.tolist()):
        values = [column[place] for column in columns.values()]
        shown = ["" if np.isnan(value) else f"{value:.6g}" for value in values]
        writer.writerow([paths[row], splits[row], *shown])
    return write_text(path, text.getvalue())
