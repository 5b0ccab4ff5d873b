"""Self-supervised pretraining: hide groups of patches, learn to rebuild what they hid.

build -> resume -> for each epoch: learn, validate, probe, show, save -> export. A run is a function
of its settings and its store: order, crops, masks, noise and stochastic depth follow from (seed,
epoch, image id), so a run that was stopped anywhere ends as it would have ended, on however many
processes.
"""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spcxr import __version__
from spcxr.config import to_dict
from spcxr.data.store import Store
from spcxr.evaluate.report import PHANTOMS
from spcxr.models.foreign import is_foreign
from spcxr.models.weights import load_model_folder, save_model_folder
from spcxr.objectives.objective import View
from spcxr.objectives.table import OBJECTIVES
from spcxr.recipes import views
from spcxr.recipes.images import open_images, phantoms_among
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.recipes.pretrain_start import Training, build, go_on, whole_encoder
from spcxr.recipes.pretrain_watch import picture, probe, validate
from spcxr.train.batches import Rows, prefetch
from spcxr.train.checkpoint import Checkpoints, Position
from spcxr.train.device import autocast, memory_mib, pick_precision, why_not_bf16
from spcxr.train.distributed import World, join_world
from spcxr.train.guard import note_bad_step, refuse_endless_bad_steps
from spcxr.train.heap import keep_freed_memory
from spcxr.train.interrupt import Signals, watch_signals
from spcxr.train.journal import Journal, Silent, cut_records
from spcxr.train.model_card import write_model_card
from spcxr.train.optim import Step, set_rates, take_step
from spcxr.train.parallel import syncing
from spcxr.train.run_folder import FREE, open_run_together
from spcxr.train.trackers import open_trackers


def run(config: PretrainConfig) -> Path:
    """Pretrain, and return the run folder, whose ``model/`` holds the encoder.

    One process of many where torchrun or SLURM says so (`train.distributed`).

    Raises
    ------
    SpcxrError
        data or folder that cannot be used, or losses that stay not finite.
    Interrupted
        Ctrl-C, SIGTERM or SIGUSR1: saved; the message says how to go on.
    """
    with join_world(config.device) as world, run_folder(world, config) as folder:
        store = images_of(world, config, folder)
        keep_freed_memory()
        training = build(config, folder, store, world)
        kept = config.keep_every_epochs * training.epoch_steps
        checkpoints = Checkpoints(folder, last=config.keep_last, every=kept, writes=world.first)
        position = go_on(training, checkpoints)
        with open_books(training, position) as journal, watch_signals() as signals:
            introduce(training, position, journal)
            precision = pick_precision(config.precision, world.device)
            learn(Loop(training, precision, checkpoints, journal, signals), position)
            export(training)
            journal.say(f"the encoder is in {folder / 'model'}")
    return folder


def run_folder(world: World, config: PretrainConfig) -> AbstractContextManager[Path]:
    """The run's folder, opened and locked by rank 0 alone."""
    # A step of an objective that compares images depends on how it is divided into batches.
    free = tuple(f for f in FREE if f != "accumulate" or not OBJECTIVES[config.objective].compares)
    settings, resume = to_dict(config), config.resume
    return open_run_together(
        world, config.out, settings, recipe="pretrain", resume=resume, free=free
    )


def images_of(world: World, config: PretrainConfig, folder: Path) -> Store:
    """The store to learn from; one that has to be prepared is prepared by rank 0."""
    # A margin over the input, so that crops are seldom magnified: 256 for 224.
    size_px = round(max(config.size) * 8 / 7)

    def made() -> str:
        # Weights of ours know which grey levels they have seen.
        place, init, wanted = folder / "store", config.init or "", None
        if init and not is_foreign(init) and not Checkpoints(folder).begun:
            wanted = load_model_folder(init).config["preprocess"]
        return str(open_images(config.data, place, size_px=size_px, wanted=wanted, init=init).path)

    return Store.open(world.once(made))


def open_books(training: Training, position: Position) -> Journal:
    """The journal of the run, with its trackers; silent ones on all ranks but the first."""
    config = training.config
    if not training.world.first:
        return Silent()
    cut_records(training.folder / "bad_steps.jsonl", position.step)
    return Journal(
        training.folder,
        step=position.step,
        images_done=round(position.step / training.epoch_steps * training.epoch_images),
        images_total=config.epochs * training.epoch_images,
        trackers=open_trackers(config.track, training.folder, to_dict(config)),
    )


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
        position, stopped = learn_epoch(loop, position)
        epoch, inside = divmod(position.step, training.epoch_steps)
        last = position.step == training.total_steps
        if not inside:
            position = validate(loop, position)
            if training.probe and (epoch % config.probe_every == 0 or last):
                probe(loop, epoch)
            if config.sample_every and (epoch % config.sample_every == 0 or last):
                picture(loop, epoch)
        best = position.best_step == position.step
        if inside or last or best or stopped or epoch % config.save_every_epochs == 0:
            loop.save(position)
        if stopped and not last:
            # A rank that ends has torchrun end the others, and rank 0 may still be writing.
            float(training.world.add_up(torch.zeros((), device=training.world.device)))
            where = f"step {position.step} of {training.total_steps}"
            loop.signals.raise_interrupted(training.folder, "pretrain", where)


def learn_epoch(loop: Loop, position: Position) -> tuple[Position, bool]:
    """The steps that are left of this epoch; fewer when a signal comes, to any rank."""
    training, step = loop.training, position.step
    epoch = step // training.epoch_steps
    steps = range(step, (epoch + 1) * training.epoch_steps)

    def fetch(step: int) -> list[tuple[View, ...]]:
        return [part_of(training, rows, epoch) for rows in training.rows_of(step)[1]]

    training.stepped.train()
    clock = time.perf_counter()
    for step, parts in prefetch(fetch, steps, threads=fetchers(training.world.device)):
        fetched = time.perf_counter()
        done = learn_step(loop, parts, step)
        now = time.perf_counter()
        bad_in_a_row = 0 if done.outcome.taken else position.bad_in_a_row + 1
        position = replace(position, step=step + 1, bad_in_a_row=bad_in_a_row)
        times = {"data_s": fetched - clock, "step_s": now - fetched}
        note(loop, step, done, times)
        clock = now
        if bad_in_a_row == 1:
            loop.save(position)  # the weights that met it, to replay it
        refuse_endless_bad_steps(training.folder, step + 1, bad_in_a_row)
        # The last step's checkpoint waits for its validation.
        if position.step % training.epoch_steps:
            if done.stop:
                return position, True
            if done.save:
                loop.save(position)
    return position, done.stop


def part_of(training: Training, rows: Rows, epoch: int) -> tuple[View, ...]:
    """The views of some of a step's images, ready to cross over to a GPU while it computes."""
    drawn = views.draw(training.store, rows, training.law, epoch)
    return views.pinned(drawn) if training.world.device.type == "cuda" else drawn


def fetchers(device: torch.device) -> int:
    """Threads that read and draw ahead: one beside a CPU that trains, several beside a GPU."""
    return 1 if device.type == "cpu" else min(8, len(os.sched_getaffinity(0)))


@dataclass(frozen=True)
class Done:
    """A step behind us: its losses, and what all ranks do after it."""

    outcome: Step
    losses: dict[str, float]
    stop: bool
    save: bool


def learn_step(loop: Loop, parts: list[tuple[View, ...]], step: int) -> Done:
    """One update from all ranks' batches of a step, and each loss of the whole step.

    Ranks exchange gradients, one tensor before the step and one after it; the device is waited for
    once, when losses and gradient norm are read.
    """
    training, world = loop.training, loop.training.world
    objective = training.objective
    objective.begin_step(training.progress(step))
    shares, wishes = agree(loop, parts)
    figures: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        with syncing(training.stepped, number == len(parts) - 1):
            here = views.weigh(part, shares[number], world.device)
            with autocast(world.device, loop.precision):
                losses = training.stepped(here, dtype=loop.token_type)
            (losses["loss"] / len(parts)).backward()
        for name, value in losses.items():
            share = value.detach().float() / (len(parts) * world.size)
            figures[name] = figures.get(name, 0.0) + share
    objective.end_backward()
    names = list(figures)
    told = world.add_up(torch.stack([figures[name] for name in names]))
    rates = {"lr": training.lr(step), "weight_decay": training.weight_decay(step)}
    set_rates(training.optimizer, **rates)
    loss, clip = told[names.index("loss")], training.config.clip
    outcome = take_step(training.optimizer, loss, clip=clip, beside=torch.cat([told, wishes]))
    if outcome.taken:
        objective.end_step()
    *values, stop, save = outcome.beside
    return Done(outcome, dict(zip(names, values, strict=True)), stop > 0, save > 0)


def agree(loop: Loop, parts: list[tuple[View, ...]]) -> tuple[Tensor, Tensor]:
    """Shares of the views in the step's mean ``[parts, V]``; how many ranks wish to stop, to save.

    A loss is a mean over hidden pixels, so a batch counts by those of its own: the gradient is that
    of one large batch.
    """
    world = loop.training.world
    counts = torch.tensor([[views.hidden(view) for view in part] for part in parts]).float()
    due = world.first and loop.checkpoints.age_s > loop.training.config.save_every_s
    wishes = torch.tensor([loop.signals.came is not None, due]).float()
    told = torch.cat([counts.flatten(), counts.sum(0), wishes]).to(world.device, non_blocking=True)
    own, total = told[: counts.numel()].view_as(counts), world.add_up(told[counts.numel() :])
    shares = own * (len(parts) * world.size) / total[:-2].clamp(min=1.0)
    return shares, total[-2:]


def note(loop: Loop, step: int, done: Done, times: dict[str, float]) -> None:
    """Write a step down."""
    training, epoch = loop.training, step // loop.training.epoch_steps
    images = min(training.config.batch_size, len(training.order))
    figures = {
        **done.losses,
        "grad_norm": done.outcome.grad_norm,
        "lr": training.lr(step),
        "weight_decay": training.weight_decay(step),
        "epoch": epoch + 1,
        **times,
        "images_s": images / sum(times.values()),
        "memory_mib": memory_mib(training.world.device),
    }
    loop.journal.record("train", step + 1, figures)
    loop.journal.advance(images, {"loss": done.outcome.loss, "epoch": epoch + 1})
    if not done.outcome.taken and training.world.first:
        rows = training.rows_of(step)[0]
        note_bad_step(training.folder, step + 1, epoch, rows, done.outcome)


# --- words and the end ----------------------------------------------------------------------


def pixels(config: PretrainConfig) -> str:
    """Sides of the input in words: 224, or 224x320."""
    return "x".join(str(side) for side in dict.fromkeys(config.size))


def introduce(training: Training, position: Position, journal: Journal) -> None:
    """Say what is about to be done."""
    config, world, size = training.config, training.world, training.store.preprocess.size_px
    ranks = f", {world.size} processes" if world.size > 1 else ""
    journal.say(
        f"spcxr {__version__}: {config.objective} with {config.model}/{config.patch_px} at "
        f"{pixels(config)} px on {world.device}{ranks}; {len(training.order)} images, "
        f"{len(training.held_out)} held out, {training.total_steps} steps"
    )
    if size < max(config.size):
        journal.say(f"the store's images of {size} px are magnified to {pixels(config)} px")
    if why := why_not_bf16(config.precision, world.device):
        journal.say(why)
    if training.origin and not position.step:
        journal.say(training.origin)
    if position.step:
        journal.say(f"going on after step {position.step} of {training.total_steps}")


def export(training: Training) -> None:
    """The encoder as a model folder, with its preprocessing and how it came to be; its card."""
    config, store = training.config, training.store
    encoder = whole_encoder(training)
    if not training.world.first:
        return
    phantoms = phantoms_among(store, training.rows)
    provenance = {
        "recipe": "pretrain",
        "objective": config.objective,
        "epochs": config.epochs,
        "steps": training.total_steps,
        "images": len(training.order),
        "seed": config.seed,
        "init": config.init,
        "data": store.facts["content_hash"],
        "phantoms": phantoms,
        "spcxr_version": __version__,
    }
    save_model_folder(
        training.folder / "model",
        encoder,
        preprocess=store.preprocess.to_dict(),
        mean=store.mean,
        std=store.std,
        task=None,
        head=None,
        provenance=provenance,
    )
    title = f"{config.model}/{config.patch_px} at {pixels(config)} px, pretrained on radiographs"
    facts = {**provenance, "preprocess": store.preprocess.preset}
    write_model_card(training.folder, title, facts, banner=PHANTOMS if phantoms else "")
