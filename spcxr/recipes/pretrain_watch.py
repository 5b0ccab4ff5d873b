"""What a pretraining looks at between epochs: the held-out loss, a probe, pictures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from spcxr.infer.predict import Normalisation
from spcxr.ops.masked_patch_gather import masked_patch_gather
from spcxr.ops.patches import unpatchify
from spcxr.ops.views import pixel_mask
from spcxr.recipes import views
from spcxr.recipes.pretrain_start import whole_encoder
from spcxr.train.checkpoint import Position
from spcxr.train.device import Compute, autocast
from spcxr.train.samples import save_grid

if TYPE_CHECKING:
    from spcxr.recipes.pretrain import Loop

SHOWN = 8
AT_ONCE = 64  # whatever a step's size on however many processes: the figure is the same


@torch.no_grad()
def validate(loop: Loop, position: Position) -> Position:
    """The loss on held-out images, whole and corrupted alike each time; the best is remembered.

    Every rank computes it all: they agree without a word.
    """
    training, device = loop.training, loop.training.world.device
    held_out, size = training.held_out, min(AT_ONCE, training.config.batch_size)
    if len(held_out) == 0:
        return position
    training.objective.eval()
    training.objective.begin_step(training.progress(position.step))
    total, hidden = 0.0, 0
    for i in range(0, len(held_out), size):
        batch = views.draw(training.store, held_out[i : i + size], training.law, epoch=None)
        count = views.hidden(batch[0])
        with autocast(device, loop.precision):
            losses = training.objective([v.to(device) for v in batch], dtype=loop.token_type)
        # The loss is a mean over hidden pixels, so batches count by theirs.
        total, hidden = total + float(losses["loss"]) * count, hidden + count
    loss_value = total / max(hidden, 1)
    epoch = position.step // training.epoch_steps
    loop.journal.record("val", position.step, {"loss": loss_value, "epoch": epoch})
    loop.journal.say(f"epoch {epoch} of {training.config.epochs}: held-out loss {loss_value:.4f}")
    # A loss that is not finite is no best: nothing would be less than NaN.
    better = position.best is None or loss_value < position.best
    if math.isfinite(loss_value) and better:
        return replace(position, best=loss_value, best_step=position.step)
    return position


def probe(loop: Loop, epoch: int) -> None:
    """How much the frozen encoder knows of the labels of another store."""
    training, config = loop.training, loop.training.config
    encoder = whole_encoder(training).to(training.world.device)
    if not training.world.first or training.probe is None:
        return  # it took part in bringing the weights together
    store = training.store
    compute = Compute(AT_ONCE, training.world.device, loop.precision)
    found = training.probe(encoder, Normalisation(store.mean, store.std), compute)
    loop.journal.record("probe", epoch * training.epoch_steps, {**found, "epoch": epoch})
    loop.journal.say(
        f"epoch {epoch} of {config.epochs}: AUROC of frozen features over {found['labels']} "
        f"labels: k-NN {found['knn_auroc']:.3f}, linear {found['linear_auroc']:.3f}"
    )


@torch.no_grad()
def picture(loop: Loop, epoch: int) -> None:
    """Some images into ``samples/epoch-*.png``: original, corrupted, reconstruction, mask.

    The reconstruction keeps the pixels that were not hidden.
    """
    training, store, world = loop.training, loop.training.store, loop.training.world
    rows = training.held_out[:SHOWN]
    if len(rows) == 0:
        rows = training.order.take(0, 0, min(SHOWN, len(training.order)))
    view = views.draw(store, rows, training.law, epoch=None)[0].to(world.device)
    training.objective.eval()
    with autocast(world.device, loop.precision):
        rebuilt = training.objective.reconstruct(view, loop.token_type).float()
    assert view.fill is not None
    mask = pixel_mask(view.views, view.fill.mask)
    clean, corrupted, rebuilt = (
        unpatchify(rows.float(), view.views.grid, view.views.patch_px)
        for rows in (
            masked_patch_gather(view.views),
            masked_patch_gather(view.views, view.fill),
            rebuilt,
        )
    )
    columns = {
        "original": clean,
        "corrupted": corrupted,
        "reconstruction": torch.where(mask[:, None], rebuilt, clean),
    }
    if not world.first:
        return  # it took part in the forward pass, which shared-out weights need
    shown = {k: (v[:, 0] * store.std + store.mean).cpu().numpy() for k, v in columns.items()}
    file = training.folder / "samples" / f"epoch-{epoch:04d}.png"
    save_grid(file, {**shown, "mask": mask.float().cpu().numpy()})
