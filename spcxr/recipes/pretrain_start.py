"""What a pretraining begins with: rows, encoder, objective, optimiser, schedules, position."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from spcxr.data.splits import is_training
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.models.vit import build_vit
from spcxr.models.weights import load_encoder_weights
from spcxr.objectives.table import OBJECTIVES, Objective
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.train.batches import Rows
from spcxr.train.checkpoint import Checkpoints, Position
from spcxr.train.device import pick_device
from spcxr.train.optim import build_adamw
from spcxr.train.schedule import cosine

MOST_VALIDATED = 512  # held-out images an epoch's loss is taken over: a figure, not a study


@dataclass(frozen=True)
class Training:
    """All that a step needs, and the schedules."""

    config: PretrainConfig
    folder: Path
    store: Store
    rows: Rows
    held_out: Rows
    device: torch.device
    objective: Objective
    optimizer: torch.optim.Optimizer

    @property
    def epoch_steps(self) -> int:
        """Updates an epoch; an incomplete last one is left out, unless it is the only one."""
        return max(len(self.rows) // self.config.images_a_step, 1)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.epoch_steps * self.config.epochs

    @property
    def epoch_images(self) -> int:
        """Images an epoch."""
        return min(self.epoch_steps * self.config.images_a_step, len(self.rows))

    def lr(self, step: int) -> float:
        """Learning rate of the step after ``step`` steps."""
        c = self.config
        peak, warmup = c.base_lr * c.images_a_step / 256, round(c.warmup * self.epoch_steps)
        return cosine(step, self.total_steps, start=peak, end=c.min_lr, warmup=warmup)

    def weight_decay(self, step: int) -> float:
        """Weight decay of the same step."""
        c = self.config
        return cosine(step, self.total_steps, start=c.weight_decay, end=c.weight_decay_end)


def choose_rows(config: PretrainConfig, store: Store) -> tuple[Rows, Rows]:
    """Rows to learn from, and rows of val* to watch the loss on (at most `MOST_VALIDATED`)."""
    found = store.manifest.splits
    wanted = config.splits or tuple(s for s in found if is_training(s))
    if missing := [s for s in wanted if not len(store.manifest.rows(s))]:
        raise SpcxrError(f"{store.path}: no split {missing[0]!r}; it has: {', '.join(found)}")
    rows = store.manifest.rows(wanted)
    if len(rows) == 0:
        raise SpcxrError(
            f"{store.path}: no rows to learn from outside {', '.join(found) or 'any split'}; "
            "name the --splits to use"
        )
    learned = {s.lower() for s in wanted}  # Train and train are one split
    watched = tuple(s for s in found if s.lower().startswith("val") and s.lower() not in learned)
    held_out = store.manifest.rows(watched)
    if len(held_out) > MOST_VALIDATED:
        held_out = held_out[np.linspace(0, len(held_out) - 1, MOST_VALIDATED).astype(np.int64)]
    return rows, held_out


def build(config: PretrainConfig, folder: Path, store: Store) -> Training:
    """Encoder, objective and optimiser on their device, with the seed's weights."""
    rows, held_out = choose_rows(config, store)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    encoder = build_vit(
        config.model,
        image_px=config.image_px,
        patch_px=config.patch_px,
        drop_path=config.drop_path,
    )
    objective = OBJECTIVES[config.objective].build(encoder).to(device)
    optimizer = build_adamw(objective)
    return Training(config, folder, store, rows, held_out, device, objective, optimizer)


def go_on(training: Training, checkpoints: Checkpoints) -> Position:
    """Where to start: at the last checkpoint, or at the beginning, with the weights of ``init``."""
    data = str(training.store.facts["content_hash"])
    position = checkpoints.load(model=training.objective, optimizer=training.optimizer)
    if position is None:
        if training.config.init:
            load_encoder_weights(training.objective.encoder, training.config.init)
        return Position(data=data)
    if position.data != data:
        raise SpcxrError(
            f"{training.store.path}: not the images that {training.folder} began with (their "
            "content differs); restore them, or choose another --out"
        )
    return position
