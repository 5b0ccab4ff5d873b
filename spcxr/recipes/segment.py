"""Fine-tune an encoder and a UNETR decoder for lung masks.

open the images -> find the rows with masks -> build -> fit -> export the best epoch -> test it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.config import setting, to_dict
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics
from spcxr.evaluate.intervals import Interval
from spcxr.evaluate.overlays import side_by_side
from spcxr.evaluate.summary import summarise_masks
from spcxr.infer.predict import predict_masks
from spcxr.models.decoder import Segmenter, UNETRDecoder
from spcxr.recipes.finetune import Cohort, FinetuneConfig, Start, begin, rows_of, take_fraction
from spcxr.recipes.fitting import Course, Drawn, fit, set_out
from spcxr.recipes.masks import Figures, examples, overlaps
from spcxr.recipes.outcome import export, write_results
from spcxr.train.augment import IGNORE, warp_masks
from spcxr.train.checkpoint import Position
from spcxr.train.device import pick_device
from spcxr.train.distributed import World
from spcxr.train.run_folder import open_run

Rows = NDArray[np.int64]
RECIPE = "segment"
MASKS_AT_ONCE = 64
STRUCTURE = "lung"  # what the masks' class 1 shows


@dataclass(frozen=True)
class SegmentConfig(FinetuneConfig):
    """Settings of `segment`: those of `FinetuneConfig`, and the decoder's size."""

    base_channels: int = setting(16, "channels of the decoder at full resolution", low=4)

    @property
    def usual_lr(self) -> float:
        """The decoder begins as noise and has most of the way to go; the encoder is held back by
        its layer decay."""
        return 1e-3


def run(config: SegmentConfig) -> Path:
    """Fine-tune, and return the run folder: ``model/``, ``metrics.json``, ``samples/``.

    Raises
    ------
    SpcxrError
        data, masks, splits or an init that cannot be used; the message names the remedy.
    Interrupted
        Ctrl-C or SIGTERM: saved; the message says how to go on.
    """
    with open_run(config.out, to_dict(config), recipe=RECIPE, resume=config.resume) as folder:
        start = begin(config, folder)
        course, task = build(config, folder, start, choose_cohort(config, start.store))
        position = fit(course, task)
        export(course, task, position, course.model.get_submodule("decoder"))
        report(course, task, position)
    return folder


# --- what is to be learned ------------------------------------------------------------------


def choose_cohort(config: SegmentConfig, store: Store) -> Cohort:
    """Find the rows that have masks, and refuse masks that cannot be learned or judged.

    Raises
    ------
    SpcxrError
        no masks, a split without any, training or validation masks that are all empty, or masks
        of more than one structure.
    """
    if not store.has_masks:
        raise SpcxrError(
            f"{store.path}: no row has a mask; add a mask_path column and prepare it again"
        )
    train, val, test = (_masked_rows(store, *chosen) for chosen in config.splits)
    patients = store.manifest.patients[train]
    one_stratum = np.zeros(len(train), np.int64)
    train = train[take_fraction(patients, one_stratum, config.label_fraction, config.seed)]
    for rows, where in ((train, "training"), (val, "validation"), (test, "test")):
        found = classes_in(store, rows)
        if unnamed := [k for k in found if k > 1]:
            raise SpcxrError(
                f"{store.path}: masks of the {where} rows hold class {unnamed[0]}; one structure "
                "can be learned: give masks of 0 and 1 (255 = unknown)"
            )
        if not found and where != "test":
            raise SpcxrError(
                f"{store.path}: no {STRUCTURE} in any mask of the {where} rows; check the masks"
            )
    return Cohort(train, val, test)


def _masked_rows(store: Store, splits: tuple[str, ...], flag: str) -> Rows:
    rows = rows_of(store, splits, flag)
    paths = store.manifest.column("mask_path")
    rows = rows[[bool(paths[row]) for row in rows.tolist()]]
    if splits and len(rows) == 0:
        raise SpcxrError(
            f"{store.path}: no row of {', '.join(splits)} has a mask; choose with {flag}"
        )
    return rows


def classes_in(store: Store, rows: Rows) -> list[int]:
    """The class numbers above 0 that occur in the masks of ``rows``."""
    there = np.zeros(256, bool)
    for first in range(0, len(rows), MASKS_AT_ONCE):
        masks = store.masks(rows[first : first + MASKS_AT_ONCE])
        there |= np.bincount(masks.ravel(), minlength=256) > 0
    return [int(k) for k in np.flatnonzero(there) if k not in (0, IGNORE)]


# --- loss -----------------------------------------------------------------------------------


def dice_and_ce(logits: Tensor, masks: Tensor) -> Tensor:
    """Dice of the structure + cross-entropy over all pixels whose class is known.

    Dice is taken over the whole batch (nnU-Net's choice for 2-D), so that an image in which
    the structure is absent does not count as a failure; the background has no Dice term.

    Parameters
    ----------
    logits
        ``[B, 1 + K, H, W]`` float, background first.
    masks
        ``[B, H, W]`` uint8 class numbers, 255 = unknown: adds neither loss nor gradient.

    >>> import torch
    >>> masks = torch.zeros(1, 4, 4, dtype=torch.uint8); masks[:, :2] = 1
    >>> sure = 50 * F.one_hot(masks.long(), 2).permute(0, 3, 1, 2).float()
    >>> float(dice_and_ce(sure, masks)) < 1e-4
    True
    """
    known = masks != IGNORE
    target = masks.long().masked_fill(~known, 0)
    one_hot = F.one_hot(target, logits.shape[1]).movedim(-1, 1) * known[:, None]
    shares = logits.float().softmax(1) * known[:, None]
    dice = DiceLoss(include_background=False, batch=True)(shares, one_hot.float())
    pixels = F.cross_entropy(logits.float(), target, reduction="none")
    return dice + (pixels * known).sum() / known.sum().clamp(min=1)


# --- the run --------------------------------------------------------------------------------


def build(
    config: SegmentConfig, folder: Path, start: Start, cohort: Cohort
) -> tuple[Course, Segmentation]:
    """Decoder, optimiser and task on their device."""
    decoder = UNETRDecoder(
        width=start.encoder.width,
        patch_px=start.encoder.patch_px,
        out_channels=2,
        channels=start.encoder.channels,
        base_channels=config.base_channels,
    )
    model, alone = Segmenter(start.encoder, decoder), World(pick_device(config.device))
    course = set_out(config, RECIPE, folder, start, cohort, model, alone)
    return course, Segmentation(course, config.base_channels)


@dataclass(frozen=True)
class Segmentation:
    """The `Task` of the loop: what is lost on a batch, and how well the validation rows go."""

    course: Course
    base_channels: int
    score: str = "dice"

    @property
    def said(self) -> str:
        """What the masks show."""
        return f"masks of {STRUCTURE}"

    @property
    def block(self) -> dict[str, Any]:
        """The structure of class 1, and the decoder's size."""
        return {
            "kind": RECIPE,
            "structures": [STRUCTURE],
            "base_channels": self.base_channels,
        }

    def loss(self, model: nn.Module, images: Tensor, drawn: Drawn) -> Tensor:
        """The masks go through the images' own warps."""
        masks = torch.from_numpy(self.course.start.store.masks(drawn.rows)).to(images.device)
        return dice_and_ce(model(images), warp_masks(masks, drawn.warps, images.shape[-1]))

    def amount(self, rows: Rows) -> float:
        """Images; Dice over a batch cannot be shared out, so there is one process."""
        return float(len(rows))

    def measure(self, model: nn.Module, rows: Rows) -> tuple[Figures, Figures]:
        """Dice and IoU ``(n,)`` of each image, at the store's resolution; NaN = both empty."""
        return overlaps(self.course.start.store, self.predict(model, rows))

    def predict(self, model: nn.Module, rows: Rows) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
        """Batches of (rows, class numbers ``(b, S, S)``), from unchanged images."""
        start = self.course.start
        return predict_masks(model, start.store, rows, start.normalisation, self.course.compute)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Mean Dice and IoU over the images."""
        dice, iou = self.measure(model, self.course.cohort.val)
        return {"dice": float(metrics.mean(dice)), "iou": float(metrics.mean(iou))}


def report(course: Course, task: Segmentation, position: Position) -> None:
    """Measure validation and test rows with the best epoch's weights; write what came of it."""
    rows = course.cohort.judged
    dice, iou = task.measure(course.model, rows)
    patients = course.start.store.manifest.patients[rows]

    def summarise(part: slice) -> dict[str, dict[str, Interval]]:
        found = summarise_masks(dice[part], iou[part], patients[part], seed=course.config.seed)
        return {STRUCTURE: found}

    columns = {f"dice_{STRUCTURE}": dice, f"iou_{STRUCTURE}": iou}
    write_results(course, task, position, columns, summarise)
    *_, shown = course.cohort.parts.values()
    picture(course, task, rows[shown], dice[shown])


def picture(course: Course, task: Segmentation, rows: Rows, dice: Figures) -> Path | None:
    """Best, median and worst image by Dice: the radiograph above, both outlines below."""
    shown = examples(course.start.store, rows, dice, partial(task.predict, course.model))
    if not shown:
        return None
    file = course.folder / "samples" / "overlays.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(side_by_side(shown))
    return file
