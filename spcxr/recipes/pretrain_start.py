"""What a pretraining begins with: rows, encoder, objective, optimiser, schedules, position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from spcxr.data.rows import RowSet
from spcxr.data.splits import is_training
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.models.vit import VIT_SIZES, VisionTransformer, build_vit
from spcxr.models.weights import load_encoder_weights
from spcxr.objectives.objective import Objective, Progress
from spcxr.objectives.table import OBJECTIVES
from spcxr.recipes.images import refuse_other_preprocess
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.recipes.probe import Probe
from spcxr.recipes.views import ViewLaw
from spcxr.train.batches import Rows
from spcxr.train.checkpoint import Checkpoints, Position
from spcxr.train.distributed import World
from spcxr.train.optim import build_adamw
from spcxr.train.order import Order
from spcxr.train.parallel import blocks_of, spread, whole
from spcxr.train.schedule import cosine

MOST_VALIDATED = 512  # held-out images an epoch's loss is taken over: a figure, not a study


@dataclass(frozen=True)
class Training:
    """All that a step needs, and the schedules.

    ``stepped`` is what a step calls: the objective, or what exchanges its gradients between ranks.
    """

    config: PretrainConfig
    world: World
    folder: Path
    store: Store
    order: Order
    rows: RowSet
    held_out: Rows
    law: ViewLaw
    objective: Objective
    stepped: nn.Module
    optimizer: torch.optim.Optimizer
    probe: Probe | None = None
    origin: str = ""  # of the weights, in words

    @property
    def epoch_steps(self) -> int:
        """Updates an epoch; an incomplete last one is left out, unless it is the only one."""
        return max(len(self.order) // self.config.batch_size, 1)

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.epoch_steps * self.config.epochs

    @property
    def epoch_images(self) -> int:
        """Images an epoch."""
        return min(self.epoch_steps * self.config.batch_size, len(self.order))

    def progress(self, step: int) -> Progress:
        """Where the run stands after so many steps."""
        return Progress(step, self.epoch_steps, self.total_steps)

    def lr(self, step: int) -> float:
        """Learning rate of the step after ``step`` steps."""
        c = self.config
        peak, warmup = c.base_lr * c.batch_size / 256, round(c.warmup * self.epoch_steps)
        return cosine(step, self.total_steps, start=peak, end=c.min_lr, warmup=warmup)

    def weight_decay(self, step: int) -> float:
        """Weight decay of the same step."""
        c = self.config
        return cosine(step, self.total_steps, start=c.weight_decay, end=c.weight_decay_end)

    def rows_of(self, step: int) -> tuple[Rows, list[Rows]]:
        """The rows of a step on all ranks, and the parts of them that are this rank's."""
        c, world = self.config, self.world
        epoch, inside = divmod(step, self.epoch_steps)
        first = inside * c.batch_size
        rows = self.order.take(epoch, first, min(first + c.batch_size, len(self.order)))
        size = c.part(world.size)
        mine = range(world.rank * c.accumulate, (world.rank + 1) * c.accumulate)
        parts = [rows[part * size : (part + 1) * size] for part in mine]
        return rows, [part for part in parts if len(part)]


def choose_rows(config: PretrainConfig, store: Store) -> tuple[Order, RowSet, Rows]:
    """Images to learn from in their order, their rows; rows of val* to watch the loss on (at most
    `MOST_VALIDATED`)."""
    found = store.manifest.splits
    wanted = config.splits or tuple(s for s in found if is_training(s))
    known = {s.lower() for s in found}
    if missing := [s for s in wanted if s.lower() not in known]:
        raise SpcxrError(f"{store.path}: no split {missing[0]!r}; it has: {', '.join(found)}")
    rows = store.manifest.row_set(wanted)
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
    return weigh_sites(config, store, wanted, rows), rows, held_out


def weigh_sites(config: PretrainConfig, store: Store, splits: Sequence[str], rows: RowSet) -> Order:
    """The order of the splits' rows, with sites in the shares that ``site_weights`` asks for.

    Raises
    ------
    SpcxrError
        weights that are no numbers, or of sites that are not there.
    """
    if not config.site_weights:
        return Order(rows, seed=config.seed)
    weights = {}
    for entry in config.site_weights:
        site, equals, weight = entry.rpartition("=")
        if site in weights:
            raise SpcxrError(f"--site-weights names site {site!r} twice; keep one")
        try:
            weights[site] = float(weight if equals else "none")
        except ValueError as error:
            raise SpcxrError(f"--site-weights {entry!r}; give site=number, as in a=2") from error
    groups = store.manifest.row_sets(splits, by="site")
    try:
        return Order(rows, seed=config.seed, weights=weights, groups=groups)
    except SpcxrError as error:
        raise SpcxrError(f"{store.path}: --site-{error}") from error


def probe_of(config: PretrainConfig, store: Store) -> Probe | None:
    """What probes the encoder between epochs, on a store prepared like the one to learn from."""
    if not config.probe:
        return None
    labelled = Store.open(config.probe)
    refuse_other_preprocess(labelled, store.preprocess.to_dict(), config.data)
    return Probe(labelled)


def build_encoder(config: PretrainConfig) -> VisionTransformer:
    """The encoder that the settings ask for, with weights drawn from torch's generator."""
    return build_vit(
        config.model,
        image_px=config.size,
        patch_px=config.patch_px,
        channels=config.channels,
        drop_path=config.drop_path,
    )


def whole_encoder(training: Training) -> VisionTransformer:
    """The encoder by itself, with weights that were shared out brought together, by every rank."""
    state = training.objective.encoder.state_dict()
    encoder = build_encoder(training.config)
    encoder.load_state_dict({name: whole(value) for name, value in state.items()})
    return encoder


def build(config: PretrainConfig, folder: Path, store: Store, world: World) -> Training:
    """Encoder, objective and optimiser on their device; weights of the seed, or of ``init``."""
    order, rows, held_out = choose_rows(config, store)
    if world.size > 1 and len(order) < config.batch_size:
        raise SpcxrError(
            f"{store.path}: {len(order)} images to learn from, fewer than a step of "
            f"{config.batch_size} on {world.size} processes; lower --batch-size, or use one process"
        )
    config.part(world.size)  # refuses a step that does not divide
    torch.manual_seed(config.seed)
    encoder = build_encoder(config)
    origin = ""
    if config.init and not Checkpoints(folder).begun:
        origin = f"encoder from {config.init}: {load_encoder_weights(encoder, config.init)}"
    encoder.recompute = config.recompute
    objective = OBJECTIVES[config.objective].build(encoder, **config.options).to(world.device)
    if config.compile == "on" or (config.compile == "auto" and world.device.type == "cuda"):
        for block in blocks_of(objective):
            block.compile()
    large = VIT_SIZES[config.model].width >= VIT_SIZES["vit_large"].width
    on_gpus = world.device.type == "cuda"
    shard = config.parallel == "fsdp" or (config.parallel == "auto" and large and on_gpus)
    stepped = spread(objective, world, shard=shard, methods=("reconstruct",))
    return Training(
        config,
        world,
        folder,
        store,
        order,
        rows,
        held_out,
        config.law(encoder.drop_rates),
        objective,
        stepped,
        build_adamw(objective),
        probe_of(config, store),
        origin,
    )


def go_on(training: Training, checkpoints: Checkpoints) -> Position:
    """Where to start: at the last checkpoint, or at the beginning."""
    data = str(training.store.facts["content_hash"])
    position = checkpoints.load(model=training.objective, optimizer=training.optimizer)
    first = training.world.once(lambda: str(position.step if position else 0))
    if int(first) != (position.step if position else 0):
        raise SpcxrError(
            f"{training.folder}: rank {training.world.rank} finds another checkpoint there than "
            "rank 0; give an --out on a file system that all nodes share"
        )
    if position is None:
        return Position(data=data)
    if position.data != data:
        raise SpcxrError(
            f"{training.store.path}: not the images that {training.folder} began with (their "
            "content differs); restore them, or choose another --out"
        )
    return position
