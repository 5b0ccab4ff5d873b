"""What `classify` and `segment` share from the first step on: the loop, and the exported model."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.errors import SpcxrError
from spcxr.infer.normalise import GREY, network_input
from spcxr.models.averages import follow
from spcxr.ops.philox import fold_in, uniform
from spcxr.recipes.finetune import Cohort, FinetuneConfig, Rows, Start
from spcxr.recipes.frames import Frames
from spcxr.train.augment import DRAWS, Warps, plan, warp_images
from spcxr.train.batches import epoch_batches, prefetch, seed_step
from spcxr.train.checkpoint import Checkpoints, Position, load_checkpoint
from spcxr.train.device import Compute, pick_precision, why_not_bf16
from spcxr.train.distributed import World
from spcxr.train.guard import note_bad_step, refuse_endless_bad_steps
from spcxr.train.interrupt import Signals, watch_signals
from spcxr.train.journal import Journal, Silent
from spcxr.train.optim import build_adamw, set_rates, take_step
from spcxr.train.parallel import spread
from spcxr.train.schedule import cosine

SAVE_EVERY_S = 60.0

# --- the loop -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """The rows of a batch, ``(B,)``, the epoch, and the warps that their images went through.

    ``counts`` is false where no row of the step was left for this process, and it only keeps up.
    """

    rows: Rows
    epoch: int
    warps: Warps
    counts: bool = True


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

    def loss(self, model: nn.Module, images: Tensor, drawn: Drawn) -> Tensor:
        """Loss of one batch: warped, normalised images ``[B, 1, h, w]`` on the device."""

    def part(self, drawn: Drawn, whole: Rows) -> float:
        """What this process's `loss` counts in that of the step, of rows ``whole``: the parts of
        all processes add up to 1."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Figures of the validation rows."""


@dataclass(frozen=True)
class Course:
    """One run, ready to be trained: what the loop needs, and the schedule.

    ``stepped`` is what a step calls: the model, or what exchanges its gradients between processes.
    ``ema`` is the moving average of the model, if there is one. ``frames`` are the parts of the
    images that it is shown, if not all of them. ``settled`` says how a run without
    epochs came by its head.
    """

    config: FinetuneConfig
    recipe: str
    folder: Path
    start: Start
    cohort: Cohort
    model: nn.Module
    optimizer: torch.optim.Optimizer
    compute: Compute
    world: World
    stepped: nn.Module
    ema: nn.Module | None = None
    frames: Frames | None = None
    settled: Mapping[str, Any] = field(default_factory=dict)

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

    @property
    def judged(self) -> nn.Module:
        """The weights that are validated and exported."""
        return self.model if self.ema is None else self.ema

    def validates(self, step: int) -> bool:
        """Whether the validation rows are looked at after a step."""
        return step % (self.steps_per_epoch * self.config.validate_every_epochs) == 0

    def came_of(self, position: Position) -> Mapping[str, Any]:
        """How the exported weights came to be: the epoch, counted from 1, that was the best."""
        if self.settled:
            return self.settled
        epoch = (position.best_step or 0) // self.steps_per_epoch
        return {"epoch": epoch, "epochs": self.config.epochs}

    def rate(self, step: int) -> float:
        """Learning rate of a step: warm-up, then a cosine."""
        return cosine(
            step,
            self.steps,
            start=self.config.peak_lr,
            end=min(self.config.min_lr, self.config.peak_lr),
            warmup=round(self.config.warmup * self.steps_per_epoch),
        )

    def momentum(self, step: int) -> float:
        """Of the moving average after a step: the first ones are not held back by the start.

        TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``: min(decay, (1+t)/(10+t)).
        """
        return min(self.config.ema, (1 + step) / (10 + step))

    def share(self, rows: Rows) -> Rows:
        """This process's part of a step's rows; one of them (it counts 0) where none is left."""
        own: Rows = np.array_split(rows, self.world.size)[self.world.rank]
        return own if len(own) else rows[:1]


def set_out(
    config: FinetuneConfig,
    recipe: str,
    folder: Path,
    start: Start,
    cohort: Cohort,
    model: nn.Module,
    world: World,
) -> Course:
    """The course of ``start``'s encoder within ``model``: put on its device, optimiser built."""
    model = model.to(world.device)
    start.encoder.requires_grad_(not config.frozen)
    return Course(
        config=config,
        recipe=recipe,
        folder=folder,
        start=start,
        cohort=cohort,
        model=model,
        optimizer=build_adamw(model, layer_decay=config.decay_per_layer),
        compute=Compute(
            config.batch_size, world.device, pick_precision(config.precision, world.device)
        ),
        world=world,
        stepped=model,
    )


@dataclass(frozen=True)
class Loop:
    """A course under way: what is learned, and who writes it down."""

    course: Course
    task: Task
    checkpoints: Checkpoints
    journal: Journal
    signals: Signals

    def save(self, position: Position) -> None:
        """Write a checkpoint."""
        course = self.course
        self.checkpoints.save(
            position, model=course.model, optimizer=course.optimizer, ema=course.ema
        )


def fit(course: Course, task: Task) -> Position:
    """Train to the end (or on from the last checkpoint) and load the best epoch's weights.

    Raises
    ------
    Interrupted
        a signal came, to any process; the work is saved and the message says how to go on.
    SpcxrError
        losses that stay not finite, a checkpoint of other images, or a score that never was
        defined.
    """
    course = replace(
        course,
        stepped=spread(course.model, course.world, shard=False, methods=()),
        ema=copy.deepcopy(course.model).requires_grad_(False) if course.config.ema else None,
    )
    checkpoints = Checkpoints(course.folder, writes=course.world.first)
    position = _resume(course, checkpoints)
    with open_books(course, position) as journal, watch_signals() as signals:
        introduce(course, task, journal)
        loop, saved = Loop(course, task, checkpoints, journal, signals), time.monotonic()
        while position.step < course.steps:
            position, stopped = _train_epoch(loop, position)
            finished = position.step == course.steps
            if finished or course.validates(position.step):
                position = _judge(loop, position)
            best = position.best_step == position.step
            # An epoch of a few labelled images takes less time than writing a checkpoint.
            due = time.monotonic() - saved > SAVE_EVERY_S
            if best or finished or stopped or due:
                loop.save(position)
                saved = time.monotonic()
            if stopped and not finished:
                # A rank that ends has torchrun end the others, and rank 0 may still be writing.
                float(course.world.add_up(torch.zeros((), device=course.world.device)))
                where = f"step {position.step} of {course.steps}"
                signals.raise_interrupted(course.folder, course.recipe, where)
    if position.best is None:
        raise SpcxrError(
            f"{course.folder}: the validation {task.score} was never defined; check that the "
            "validation rows hold what is to be found"
        )
    course.world.once(lambda: "saved")  # by rank 0
    load_checkpoint(checkpoints.best, model=course.model, ema=course.ema)
    course.model.load_state_dict(course.judged.state_dict())
    return position


def open_books(course: Course, position: Position) -> Journal:
    """The journal of the run; a silent one on all ranks but the first."""
    if not course.world.first:
        return Silent()
    count = len(course.rows)
    done = position.step * count // course.steps_per_epoch
    total = course.config.epochs * count
    return Journal(course.folder, step=position.step, images_done=done, images_total=total)


def introduce(course: Course, task: Task, journal: Journal) -> None:
    """Say what is about to be learned, from what, on how many processes, how precisely."""
    ranks = f"; {course.world.size} processes" if course.world.size > 1 else ""
    rows = f"{len(course.rows)} training rows"
    journal.say(f"{course.start.origin}; {rows}{ranks}; {course.compute.precision}")
    journal.say(task.said)
    if why := why_not_bf16(course.config.precision, course.compute.device):
        journal.say(why)


def _resume(course: Course, checkpoints: Checkpoints) -> Position:
    """The last checkpoint's position, or the beginning."""
    store, world = course.start.store, course.world
    data = str(store.facts["content_hash"])
    position = checkpoints.load(model=course.model, optimizer=course.optimizer, ema=course.ema)
    own = str(position.step if position else 0)
    if world.once(lambda: own) != own:
        raise SpcxrError(
            f"{course.folder}: rank {world.rank} finds another checkpoint there than rank 0; give "
            "an --out on a file system that all nodes share"
        )
    if position is None:
        return Position(data=data)
    if position.data != data:
        raise SpcxrError(
            f"{store.path}: not the images that {course.folder} began with (their content "
            "differs); restore them, or choose another --out"
        )
    return position


def _train_epoch(loop: Loop, position: Position) -> tuple[Position, bool]:
    """The rest of the epoch that ``position`` stands in; less when a signal comes, to any rank."""
    course, config = loop.course, loop.course.config
    epoch, done = divmod(position.step, course.steps_per_epoch)
    batches = epoch_batches(
        course.rows, config.batch_size, seed=config.seed, epoch=epoch, drop_last=False
    )[done:]
    own = [course.share(rows) for rows in batches]
    course.stepped.train()
    before, stopped = time.perf_counter(), False
    for whole, (rows, pixels) in zip(
        batches, prefetch(course.start.store.images, own), strict=True
    ):
        fetched = time.perf_counter()
        figures, taken, stopped = _train_step(loop, position.step, (whole, rows), pixels)
        bad = 0 if taken else position.bad_in_a_row + 1
        position = replace(position, step=position.step + 1, bad_in_a_row=bad)
        refuse_endless_bad_steps(course.folder, position.step, bad)
        after = time.perf_counter()
        figures |= {"data_s": fetched - before, "step_s": after - fetched}
        loop.journal.record("train", position.step, figures)
        loop.journal.advance(len(whole), {"loss": figures["loss"]})
        before = after
        if stopped:
            break
    return position, stopped


def _train_step(
    loop: Loop, step: int, batch: tuple[Rows, Rows], pixels: NDArray[Any]
) -> tuple[dict[str, float], bool, bool]:
    """One update from all ranks' shares of a step's rows.

    ``batch`` is (the step's rows, this rank's). Returns figures of the step, whether it was made
    (it is not where it is not finite), and whether any rank was asked to stop.
    """
    course, (whole, rows) = loop.course, batch
    config, world, epoch = course.config, course.world, step // course.steps_per_epoch
    rate = course.rate(step)
    set_rates(course.optimizer, lr=rate, weight_decay=config.weight_decay)
    images, warps = augmented(course, rows, pixels, epoch)
    # Each rank drops branches of its own: the one of two ranks where it drops none at all.
    seed_step(config.seed if world.first else fold_in(config.seed, world.rank), step)
    drawn = Drawn(rows, epoch, warps, counts=world.rank < len(whole))
    with course.compute.autocast():
        loss = loop.task.loss(course.stepped, images, drawn)
    if world.size > 1:
        # Gradients are means over ranks: weighed like this they are those of one large batch.
        loss = loss * (loop.task.part(drawn, whole) * world.size)
    loss.backward()
    wish = torch.tensor([float(loop.signals.came is not None)], device=world.device)
    told = world.add_up(torch.cat([loss.detach().float()[None] / world.size, wish]))
    made = take_step(course.optimizer, told[0], clip=config.clip, beside=told[1:])
    if made.taken and course.ema is not None:
        follow(course.ema, course.model, course.momentum(step))
    if not made.taken and world.first:
        note_bad_step(course.folder, step, epoch, whole, made)
    # Alone, a signal that came since then is seen at once.
    stopped = made.beside[0] > 0 or (world.size == 1 and loop.signals.came is not None)
    return {"loss": made.loss, "grad_norm": made.grad_norm, "lr": rate}, made.taken, stopped


def augmented(course: Course, rows: Rows, pixels: NDArray[Any], epoch: int) -> tuple[Tensor, Warps]:
    """Stored pixels ``(B, S, S)`` -> the network's input, warped, and the warps it went through.

    One image's warp depends on (seed, epoch, image id) alone.
    """
    config, normalisation = course.config, course.start.normalisation
    size, law = course.start.encoder.image_px, config.augmentation
    frames = course.frames or Frames(size)
    draws = uniform(torch.from_numpy(rows), DRAWS, seed=config.seed, epoch=epoch, stream="crop")
    warps = frames.placed(plan(draws, frames.law(law)), rows)
    grey = network_input(pixels, frames.image_px, GREY, course.compute.device)
    warped = warp_images(grey, warps, size[1])
    return normalisation.of_grey(warped, course.start.encoder.channels), warps


def _judge(loop: Loop, position: Position) -> Position:
    """Validate after an epoch; the position knows whether it is the best so far.

    Of equal scores the later epoch is kept: on few validation rows AUROC soon stands at its top,
    while the loss still falls.
    """
    course, task = loop.course, loop.task
    figures = task.validate(course.judged)
    loop.journal.record("val", position.step, figures)
    score, epoch = figures[task.score], position.step // course.steps_per_epoch
    better = math.isfinite(score) and (position.best is None or score >= position.best)
    said = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    best = ", the best" if better else ""
    loop.journal.say(f"epoch {epoch}/{course.config.epochs}: {said}{best}")
    return replace(position, best=score, best_step=position.step) if better else position
