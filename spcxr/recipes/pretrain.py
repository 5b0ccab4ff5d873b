"""Self-supervised pretraining: hide groups of patches, learn to rebuild what they hid.

build -> resume -> for each epoch: learn, validate, show, save -> export. A run is a function of its
settings and its store: order, crops, masks, noise and drop path follow from (seed, epoch, image id)
and (seed, step), so a run that was stopped anywhere ends as it would have ended.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spcxr import __version__
from spcxr.config import to_dict
from spcxr.evaluate.report import PHANTOMS
from spcxr.models.weights import save_model_folder
from spcxr.ops.masked_patch_gather import masked_patch_gather
from spcxr.ops.patches import unpatchify
from spcxr.ops.views import pixel_mask
from spcxr.recipes import views
from spcxr.recipes.images import any_drawn, open_images
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.recipes.pretrain_start import Training, build, go_on
from spcxr.train.batches import Rows, epoch_batches, prefetch, seed_step
from spcxr.train.checkpoint import Checkpoints, Position
from spcxr.train.device import autocast, pick_precision, why_not_bf16
from spcxr.train.guard import note_bad_step, refuse_endless_bad_steps
from spcxr.train.interrupt import Signals, watch_signals
from spcxr.train.journal import Journal
from spcxr.train.model_card import write_model_card
from spcxr.train.optim import Step, set_rates, take_step
from spcxr.train.run_folder import open_run
from spcxr.train.samples import save_grid

SHOWN = 8


def run(config: PretrainConfig) -> Path:
    """Pretrain, and return the run folder, whose ``model/`` holds the encoder.

    Raises
    ------
    SpcxrError
        data or folder that cannot be used, or losses that stay not finite.
    Interrupted
        Ctrl-C or SIGTERM: saved; the message says how to go on.
    """
    settings = to_dict(config)
    with open_run(config.out, settings, recipe="pretrain", resume=config.resume) as folder:
        # A margin over the input, so that crops are seldom magnified: 256 for 224.
        size_px = round(config.image_px * 8 / 7)
        store = open_images(config.data, folder / "store", size_px=size_px)
        training = build(config, folder, store)
        checkpoints = Checkpoints(folder)
        position = go_on(training, checkpoints)
        books = Journal(
            folder,
            step=position.step,
            images_done=round(position.step / training.epoch_steps * training.epoch_images),
            images_total=config.epochs * training.epoch_images,
        )
        with books as journal, watch_signals() as signals:
            introduce(training, position, journal)
            precision = pick_precision(config.precision, training.device)
            learn(Loop(training, precision, checkpoints, journal, signals), position)
            export(training)
            journal.say(f"the encoder is in {folder / 'model'}")
    return folder


# --- learn ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """A training under way: what is trained, how precisely, and who writes it down."""

    training: Training
    precision: str
    checkpoints: Checkpoints
    journal: Journal
    signals: Signals

    @property
    def token_type(self) -> torch.dtype:
        """What the encoder's first product is computed in."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def save(self, position: Position) -> None:
        """Write a checkpoint."""
        objective, optimizer = self.training.objective, self.training.optimizer
        self.checkpoints.save(position, model=objective, optimizer=optimizer)


def learn(loop: Loop, position: Position) -> None:
    """All epochs that are left: learn, validate, show, save."""
    training, config = loop.training, loop.training.config
    while position.step < training.total_steps:
        position = learn_epoch(loop, position)
        epoch, inside = divmod(position.step, training.epoch_steps)
        last = position.step == training.total_steps
        if not inside:
            position = validate(loop, position)
            if config.sample_every and (epoch % config.sample_every == 0 or last):
                picture(loop, epoch)
        best = position.best_step == position.step
        due = epoch % config.save_every_epochs == 0
        if inside or last or best or due or loop.signals.came:
            loop.save(position)
        if loop.signals.came and not last:
            where = f"step {position.step} of {training.total_steps}"
            loop.signals.raise_interrupted(training.folder, "pretrain", where)


def learn_epoch(loop: Loop, position: Position) -> Position:
    """The steps that are left of this epoch; fewer when a signal comes."""
    training, config, step = loop.training, loop.training.config, position.step
    epoch, done = divmod(step, training.epoch_steps)
    batches = epoch_batches(training.rows, config.images_a_step, seed=config.seed, epoch=epoch)

    def fetch(rows: Rows) -> list[views.Batch]:
        parts = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
        return [views.draw(training.store, part, config.law, epoch) for part in parts]

    training.objective.train()
    clock = time.perf_counter()
    for rows, parts in prefetch(fetch, batches[done:], threads=fetchers(training.device)):
        fetched = time.perf_counter()
        outcome, losses = learn_step(loop, parts, step)
        step += 1
        bad_in_a_row = 0 if outcome.taken else position.bad_in_a_row + 1
        position = replace(position, step=step, bad_in_a_row=bad_in_a_row)
        now = time.perf_counter()
        figures = {
            **losses,
            "grad_norm": outcome.grad_norm,
            "lr": training.lr(step - 1),
            "weight_decay": training.weight_decay(step - 1),
            "epoch": epoch + 1,
            "data_s": fetched - clock,
            "step_s": now - fetched,
            "images_s": len(rows) / (now - clock),
        }
        loop.journal.record("train", step, figures)
        loop.journal.advance(len(rows), {"loss": outcome.loss, "epoch": epoch + 1})
        clock = now
        if not outcome.taken:
            note_bad_step(training.folder, step, epoch, rows, outcome)
            refuse_endless_bad_steps(training.folder, step, bad_in_a_row)
        # The last step's checkpoint waits for its validation.
        if step % training.epoch_steps:
            if loop.signals.came:
                break
            if loop.checkpoints.age_s > config.save_every_s:
                loop.save(position)
    return position


def fetchers(device: torch.device) -> int:
    """Threads that read and draw ahead: one beside a CPU that trains, several beside a GPU."""
    return 1 if device.type == "cpu" else min(8, len(os.sched_getaffinity(0)))


def learn_step(loop: Loop, parts: list[views.Batch], step: int) -> tuple[Step, dict[str, float]]:
    """One update from the batches of a step, and each loss of the whole step.

    The losses are means over hidden pixels, so a batch counts by those of its own: the gradient
    is that of one large batch (whose images would find their partners across the parts).
    """
    training, config = loop.training, loop.training.config
    seed_step(config.seed, step)
    hidden = [int(part.fill.mask.sum()) for part in parts]
    losses: dict[str, Tensor] = {}
    for part, count in zip(parts, hidden, strict=True):
        found = losses_of(loop, part)
        share = count / max(sum(hidden), 1)
        (found["loss"] * share).backward()
        for name, value in found.items():
            losses[name] = losses.get(name, 0.0) + value.detach() * share
    rates = {"lr": training.lr(step), "weight_decay": training.weight_decay(step)}
    set_rates(training.optimizer, lr=rates["lr"], weight_decay=rates["weight_decay"])
    outcome = take_step(training.optimizer, losses["loss"], clip=config.clip)
    return outcome, {name: float(value) for name, value in losses.items()}


def losses_of(loop: Loop, batch: views.Batch) -> dict[str, Tensor]:
    """Move a batch to the device and ask the objective, which corrupts it there."""
    here = batch.to(loop.training.device)
    with autocast(loop.training.device, loop.precision):
        return loop.training.objective(*here, dtype=loop.token_type)


@torch.no_grad()
def validate(loop: Loop, position: Position) -> Position:
    """The loss on held-out images, whole and corrupted alike each time; the best is remembered."""
    training, size = loop.training, loop.training.config.batch_size
    if len(training.held_out) == 0:
        return position
    training.objective.eval()
    total, hidden = 0.0, 0
    for i in range(0, len(training.held_out), size):
        rows = training.held_out[i : i + size]
        batch = views.draw(training.store, rows, training.config.law, epoch=None)
        count = int(batch.fill.mask.sum())
        # The loss is a mean over hidden pixels, so batches count by theirs.
        total, hidden = total + float(losses_of(loop, batch)["loss"]) * count, hidden + count
    loss_value = total / max(hidden, 1)
    epoch = position.step // training.epoch_steps
    loop.journal.record("val", position.step, {"loss": loss_value, "epoch": epoch})
    loop.journal.say(f"epoch {epoch} of {training.config.epochs}: held-out loss {loss_value:.4f}")
    if position.best is None or loss_value < position.best:
        return replace(position, best=loss_value, best_step=position.step)
    return position


@torch.no_grad()
def picture(loop: Loop, epoch: int) -> None:
    """Some images into ``samples/epoch-*.png``: original, corrupted, reconstruction, mask.

    The reconstruction keeps the pixels that were not hidden.
    """
    training, store = loop.training, loop.training.store
    rows = (training.held_out if len(training.held_out) else training.rows)[:SHOWN]
    batch = views.draw(store, rows, training.config.law, epoch=None).to(training.device)
    training.objective.eval()
    with autocast(training.device, loop.precision):
        rebuilt = training.objective.reconstruct(*batch, dtype=loop.token_type).float()
    mask = pixel_mask(batch.views, batch.fill.mask)
    clean, corrupted, rebuilt = (
        unpatchify(rows.float(), batch.views.grid, batch.views.patch_px)
        for rows in (masked_patch_gather(batch.views), masked_patch_gather(*batch), rebuilt)
    )
    columns = {
        "original": clean,
        "corrupted": corrupted,
        "reconstruction": torch.where(mask[:, None], rebuilt, clean),
    }
    shown = {k: (v[:, 0] * store.std + store.mean).cpu().numpy() for k, v in columns.items()}
    file = training.folder / "samples" / f"epoch-{epoch:04d}.png"
    save_grid(file, {**shown, "mask": mask.float().cpu().numpy()})


# --- words and the end ----------------------------------------------------------------------


def introduce(training: Training, position: Position, journal: Journal) -> None:
    """Say what is about to be done."""
    config, size = training.config, training.store.preprocess.size_px
    journal.say(
        f"spcxr {__version__}: {config.objective} with {config.model}/{config.patch_px} at "
        f"{config.image_px} px on {training.device}; {len(training.rows)} images, "
        f"{len(training.held_out)} held out, {training.total_steps} steps"
    )
    if size < config.image_px:
        journal.say(f"the store's images of {size} px are magnified to {config.image_px} px")
    if why := why_not_bf16(config.precision, training.device):
        journal.say(why)
    if config.init and not position.step:
        journal.say(f"encoder from {config.init}")
    if position.step:
        journal.say(f"going on after step {position.step} of {training.total_steps}")


def export(training: Training) -> None:
    """The encoder as a model folder, with its preprocessing and how it came to be; its card."""
    config, store = training.config, training.store
    phantoms = any_drawn(store.manifest.patients[training.rows])
    provenance = {
        "recipe": "pretrain",
        "objective": config.objective,
        "epochs": config.epochs,
        "steps": training.total_steps,
        "images": len(training.rows),
        "seed": config.seed,
        "init": config.init,
        "data": store.facts["content_hash"],
        "phantoms": phantoms,
        "spcxr_version": __version__,
    }
    save_model_folder(
        training.folder / "model",
        training.objective.encoder,
        preprocess=store.preprocess.to_dict(),
        mean=store.mean,
        std=store.std,
        task=None,
        head=None,
        provenance=provenance,
    )
    title = f"{config.model}/{config.patch_px} at {config.image_px} px, pretrained on radiographs"
    facts = {**provenance, "preprocess": store.preprocess.preset}
    write_model_card(training.folder, title, facts, banner=PHANTOMS if phantoms else "")
