"""Fine-tune an encoder and a decoder for masks: of the lung, or of several structures.

open the images -> find the rows with masks -> build -> fit -> export the best epoch -> test it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from spcxr.config import ConfigError, setting, to_dict
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics
from spcxr.evaluate.intervals import Interval
from spcxr.evaluate.mask_summary import FIGURES
from spcxr.evaluate.overlays import legend_of, side_by_side
from spcxr.evaluate.summary import mean_of_known, summarise_masks
from spcxr.infer.predict import predict_masks, read_whole
from spcxr.infer.regions import FINDER
from spcxr.models.decoder import DECODERS, Segmenter, build_decoder
from spcxr.models.weights import load_model_folder
from spcxr.recipes.few_shot import take_patients
from spcxr.recipes.finetune import Cohort, FinetuneConfig, Start, begin, rows_of, take_fraction
from spcxr.recipes.fitting import Course, Drawn, fit, set_out
from spcxr.recipes.frames import in_lung_box, in_windows
from spcxr.recipes.mask_losses import LOSSES, over_scales, whole_step
from spcxr.recipes.masks import Figures, examples, figures, pixel_mm, say_read_whole
from spcxr.recipes.outcome import export, finished, write_results
from spcxr.recipes.seeds import run_seeds
from spcxr.train.augment import IGNORE, warp_masks
from spcxr.train.checkpoint import Position
from spcxr.train.distributed import World, join_world
from spcxr.train.parallel import predict_together
from spcxr.train.run_folder import open_run_together

Rows = NDArray[np.int64]
RECIPE = "segment"
MASKS_AT_ONCE = 64
# Of each image, at the end: how far masks overlap, and how far their borders lie apart.
REPORTED = ("dice", "iou", "hd95_px", "hd95_mm")


@dataclass(frozen=True)
class SegmentConfig(FinetuneConfig):
    """Settings of `segment`: those of `FinetuneConfig`, the decoder and the loss."""

    decoder: str = setting("unet", "or UNETR, or a light one", choices=(*DECODERS, "linear", "mlp"))
    base_channels: int = setting(16, "channels: unet at half resolution, unetr at full", low=4)
    deep_supervision: bool = setting(
        False, "unet, unetr: learn from logits at a half and a quarter of the resolution too"
    )
    window_px: int | None = setting(
        None,
        "side of windows: learn from random ones of images of --image-px (else the store's), "
        "predict by overlapping ones",
        low=16,
    )
    crop_from: str | None = setting(
        None, "segment run that finds the lungs: learn from and predict in their box alone"
    )
    labels: int = setting(0, "training patients with masks to use, nested by seed; 0: all", low=0)
    loss: str = setting("dice-ce", "of the masks", choices=tuple(LOSSES))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels and self.label_fraction < 1:
            raise ConfigError("give labels or label_fraction, not both")
        if self.window_px and self.crop_from:
            raise ConfigError("give window_px or crop_from, not both")
        if self.window_px and self.image_px and self.window_px > self.image_px:
            raise ConfigError(
                f"window_px {self.window_px} is larger than image_px {self.image_px}; give less"
            )
        if self.deep_supervision and self.decoder not in DECODERS:
            raise ConfigError(
                f"deep_supervision is of {' and '.join(DECODERS)}; leave it out with decoder "
                f"{self.decoder}"
            )

    @property
    def encoder_px(self) -> int | None:
        """The side of what the encoder is shown."""
        return self.window_px or self.image_px

    @property
    def usual_lr(self) -> float:
        """The decoder begins as noise and has most of the way to go; the encoder is held back by
        its layer decay."""
        return 1e-3


def run(config: SegmentConfig) -> Path:
    """Fine-tune, and return the run folder: ``model/``, ``metrics.json``, ``samples/``.

    With several seeds the folder holds a run for each, and ``summary.json`` (`seeds.run_seeds`).

    One process of many where torchrun or SLURM says so (`train.distributed`).

    Raises
    ------
    SpcxrError
        data, masks, splits or an init that cannot be used; the message names the remedy.
    Interrupted
        Ctrl-C or SIGTERM: saved; the message says how to go on.
    """
    with join_world(config.device) as world:
        if config.seeds > 1:
            return run_seeds(world, config, run_once, RECIPE)
        return run_once(world, config)


def run_once(world: World, config: SegmentConfig, place: Path | None = None) -> Path:
    """One run, of one seed; images are prepared at ``place``, or in the run. A finished one is
    left as it is."""
    settings = to_dict(config)
    opened = open_run_together(world, config.out, settings, recipe=RECIPE, resume=config.resume)
    with opened as folder:
        if world.once(lambda: str(finished(folder))) == "True":
            return folder
        start = begin(config, folder, world, place)
        course, task = build(config, folder, start, choose_cohort(config, start.store), world)
        position = fit(course, task)
        found = task.measure(course.model, course.cohort.judged, pixel_mm(start.store))
        if world.first:
            made = export(course, task, position, course.model.get_submodule("decoder"))
            if config.crop_from:
                finder = load_model_folder(config.crop_from).folder
                shutil.copytree(finder, made / FINDER, dirs_exist_ok=True)
            report(course, task, position, found)
    return folder


# --- what is to be learned ------------------------------------------------------------------


def choose_cohort(config: SegmentConfig, store: Store) -> Cohort:
    """Find the rows that have masks, and refuse masks that cannot be learned or judged.

    Raises
    ------
    SpcxrError
        no masks, a split without any, a structure that no training or validation mask holds, or
        one that the store does not name.
    """
    if not store.has_masks:
        raise SpcxrError(
            f"{store.path}: no row has a mask; add a column mask_path, or mask:NAME for each "
            "structure, and prepare it again"
        )
    train, val, test = (_masked_rows(store, *chosen) for chosen in config.splits)
    patients = store.manifest.patients[train]
    one_stratum = np.zeros(len(train), np.int64)
    if config.labels:
        train = train[take_patients(patients, config.labels, config.seed)]
    else:
        train = train[take_fraction(patients, one_stratum, config.label_fraction, config.seed)]
    names = store.structures
    for rows, where in ((train, "training"), (val, "validation"), (test, "test")):
        found = classes_in(store, rows)
        if unnamed := [k for k in found if k > len(names)]:
            raise SpcxrError(
                f"{store.path}: masks of the {where} rows hold class {unnamed[0]}, and the store "
                f"names {len(names)} ({', '.join(names)}); prepare it again with --structures"
            )
        absent = [name for k, name in enumerate(names, 1) if k not in found]
        if absent and where != "test":
            raise SpcxrError(
                f"{store.path}: no {absent[0]} in any mask of the {where} rows; check the masks"
            )
    return Cohort(train, val, test)


def _masked_rows(store: Store, splits: tuple[str, ...], flag: str) -> Rows:
    rows = rows_of(store, splits, flag)
    rows = rows[store.manifest.masked[rows]]
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


# --- the run --------------------------------------------------------------------------------


def build(
    config: SegmentConfig, folder: Path, start: Start, cohort: Cohort, world: World
) -> tuple[Course, Segmentation]:
    """Decoder, optimiser and task on their device."""
    block: dict[str, Any] = {
        "kind": RECIPE,
        "structures": list(start.store.structures),
        "decoder": config.decoder,
        "loss": config.loss,
    }
    if config.decoder in DECODERS:
        block |= {
            "base_channels": config.base_channels,
            "deep_supervision": config.deep_supervision,
        }
    model = Segmenter(start.encoder, build_decoder(block, start.encoder))
    course = set_out(config, RECIPE, folder, start, cohort, model, world)
    if config.window_px:
        side = config.image_px or start.store.preprocess.size_px
        course, more = in_windows(side, course, model)
        block |= more
    elif config.crop_from:
        course, more = in_lung_box(load_model_folder(config.crop_from).folder, course, model)
        block |= more
    return course, Segmentation(course, block)


@dataclass(frozen=True)
class Segmentation:
    """The `Task` of the loop: what is lost on a batch, and how well the validation rows go."""

    course: Course
    block: dict[str, Any]
    score: str = "dice"

    @property
    def structures(self) -> tuple[str, ...]:
        """What the masks show, in the order of their class numbers."""
        return tuple(self.block["structures"])

    @property
    def said(self) -> str:
        """What the masks show."""
        return f"masks of {', '.join(self.structures)}"

    def loss(self, model: nn.Module, images: Tensor, drawn: Drawn) -> Tensor:
        """The masks go through the images' own warps."""
        stored = torch.from_numpy(self.course.start.store.masks(drawn.rows)).to(images.device)
        masks = warp_masks(stored, drawn.warps, images.shape[-1])
        logits, between = model(images), LOSSES[self.block["loss"]]
        total = whole_step(self.course.world, counts=drawn.counts)
        if isinstance(logits, tuple):
            return over_scales(between, logits, masks, total)
        return between(logits, masks, total)

    def part(self, drawn: Drawn, whole: Rows) -> float:
        """Every process knows the loss of the whole step: Dice is of all its pixels."""
        return 1 / self.course.world.size

    def measure(self, model: nn.Module, rows: Rows, sizes: Figures | None = None) -> Figures:
        """`mask_figures` ``(n, K, F)`` of each image and structure, at the store's resolution;
        distances too if there are ``sizes`` of the pixels. Each process takes its share."""
        store, world, names = self.course.start.store, self.course.world, self.structures

        def computed(some: Rows) -> Figures:
            found = figures(store, self.predict(model, some), names, sizes)
            return found.reshape(len(some), len(names) * len(FIGURES))

        before = read_whole(model)
        found = predict_together(world, computed, rows)
        lost = torch.tensor(float(read_whole(model) - before), device=world.device)
        lost = world.add_up(lost)
        if world.first:
            say_read_whole(int(lost), len(rows), str(self.course.folder))
        return found.reshape(len(rows), len(names), len(FIGURES))

    def predict(self, model: nn.Module, rows: Rows) -> Iterator[tuple[Rows, NDArray[np.uint8]]]:
        """Batches of (rows, class numbers ``(b, S, S)``), from unchanged images."""
        start = self.course.start
        return predict_masks(model, start.store, rows, start.normalisation, self.course.compute)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Dice and IoU: means over the images, and of these over the structures; Dice of each
        structure where there are several."""
        found = self.measure(model, self.course.cohort.val)
        dice, iou = (mean_each(found[:, :, FIGURES.index(key)]) for key in ("dice", "iou"))
        figures = {"dice": float(dice.mean()), "iou": float(iou.mean())}
        if len(dice) > 1:
            each = zip(self.structures, dice.tolist(), strict=True)
            figures |= {f"dice {name}": value for name, value in each}
        return figures


def mean_each(figures: Figures) -> Figures:
    """``(n, K)`` -> the mean ``(K,)`` of each structure over the images where it is defined.

    >>> mean_each(np.array([[0.5, np.nan], [1.0, 0.25]])).tolist()
    [0.75, 0.25]
    """
    return np.array([float(metrics.mean(column)) for column in figures.T])


def report(course: Course, task: Segmentation, position: Position, found: Figures) -> None:
    """Write what the exported weights make of the validation and test rows: ``found (n, K, F)``.

    A structure that a part's masks do not show, and that was not found there, is left out.
    """
    rows = course.cohort.judged
    patients = course.start.store.manifest.patients[rows]
    each = {
        name: {key: found[:, k, FIGURES.index(key)] for key in REPORTED}
        for k, name in enumerate(task.structures)
    }

    def summarise(part: slice) -> dict[str, dict[str, Interval]]:
        return {
            name: summarise_masks(
                {key: values[part] for key, values in columns.items()},
                patients[part],
                seed=course.config.seed,
            )
            for name, columns in each.items()
            if not np.isnan(columns["dice"][part]).all()
        }

    cells = {f"{key}_{n}": values for n, columns in each.items() for key, values in columns.items()}
    write_results(course, task, position, cells, summarise)
    over_all = mean_of_known(found[:, :, 0])
    *_, shown = course.cohort.parts.values()
    picture(course, task, rows[shown], over_all[shown])


def picture(course: Course, task: Segmentation, rows: Rows, dice: Figures) -> Path | None:
    """Best, median and worst image by Dice: the radiograph above, both outlines below."""
    shown = examples(course.start.store, rows, dice, partial(task.predict, course.model))
    if not shown:
        return None
    file = course.folder / "samples" / "overlays.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(side_by_side(shown, legend_of(task.structures)))
    return file
