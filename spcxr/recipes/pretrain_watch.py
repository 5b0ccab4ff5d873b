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
REBUILDING = ("l1", "mse")  # one of them is among each objective's losses
AT_ONCE = 64  # whatever a step's size on however many processes: the figure is the same


@torch.no_grad()
def validate(loop: Loop, position: Position) -> Position:
    """The losses on held-out images, whole and corrupted alike each time; the best is remembered.

    Judged by how well hidden pixels are rebuilt: what is learned from a teacher moves with the
    teacher. Every rank computes it all, which costs no more time than rank 0 alone.
    """
    training, device = loop.training, loop.training.world.device
    held_out, size = training.held_out, min(AT_ONCE, training.config.batch_size)
    if len(held_out) == 0:
        return position
    training.objective.eval()
    training.objective.begin_step(training.progress(position.step))
    totals: dict[str, float] = {}
    hidden = 0
    for i in range(0, len(held_out), size):
        batch = views.draw(training.store, held_out[i : i + size], training.law, epoch=None)
        count = views.hidden(batch[0])
        with autocast(device, loop.precision):
            losses = training.objective([v.to(device) for v in batch], dtype=loop.token_type)
        # Means over hidden pixels, so batches count by theirs.
        hidden += count
        for name, value in losses.items():
            totals[name] = totals.get(name, 0.0) + float(value) * count
    # Devices may differ in a last digit, and all ranks must agree which epoch is the best.
    world = training.world
    sums = world.add_up(torch.tensor(list(totals.values()), device=device)) / world.size
    found = {n: total / max(hidden, 1) for n, total in zip(totals, sums.tolist(), strict=True)}
    judged = next(name for name in REBUILDING if name in found)
    epoch = position.step // training.epoch_steps
    loop.journal.record("val", position.step, {**found, "epoch": epoch})
    said = f"held-out {judged} {found[judged]:.4f}"
    loop.journal.say(f"epoch {epoch} of {training.config.epochs}: {said}")
    # A loss that is not finite is no best: nothing would be less than NaN.
    better = position.best is None or found[judged] < position.best
    if math.isfinite(found[judged]) and better:
        return replace(position, best=found[judged], best_step=position.step)
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
