"""The whole story on drawn phantoms: prepare -> pretrain -> classify, segment -> the other site.

Each downstream task is trained twice with the same budget, from the pretrained encoder and from
scratch, and measured on the site it was trained on and on one it has never seen.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from spcxr.config import Config, setting, to_dict
from spcxr.data import phantom
from spcxr.data.store import Store
from spcxr.evaluate.report import write_json, write_report
from spcxr.infer.predict import load_trained
from spcxr.models.vit import VIT_SIZES
from spcxr.recipes import classify, prepare, pretrain, segment
from spcxr.recipes.demo_page import SETS, STARTS, page, summary
from spcxr.recipes.finetune import FinetuneConfig
from spcxr.recipes.measure import Result, Settings, TestSet, measure
from spcxr.train.device import pick_device, pick_precision
from spcxr.train.run_folder import open_run

Made = TypeVar("Made")


@dataclass(frozen=True)
class DemoConfig(Config):
    """Settings of `run`. The defaults take minutes on two cores; the page says how many."""

    out: str = setting(help="folder to write")
    phantom_count: int = setting(720, "chests to draw", low=60)
    drawn_px: int = setting(256, "side of the drawn DICOM images", low=128)
    model: str = setting("vit_tiny", "encoder", choices=tuple(VIT_SIZES))
    image_px: int = setting(96, "side of the encoder's input", low=32)
    patch_px: int = setting(16, "side of a patch", low=4)
    pretrain_epochs: int = setting(36, "passes over the unlabelled images", low=1)
    classify_epochs: int = setting(18, "passes over the labelled images", low=1)
    segment_epochs: int = setting(4, "passes over the images with masks", low=1)
    label_fraction: float = setting(1.0, "share of the labels used", low=0.01, high=1.0)
    n_bootstrap: int = setting(2000, "resamples of the patients for an interval", low=100)
    seed: int = setting(0, "of drawings, weights, order, masks and resamples", low=0)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "bf16 where it is fast, or", choices=("auto", "bf16", "fp32"))

    def __post_init__(self) -> None:
        super().__post_init__()
        # Every chapter's settings are checked before the first one is drawn.
        nowhere = Path(self.out)
        pretrain_settings(self, nowhere, nowhere)
        for task in ("classify", "segment"):
            task_settings(self, nowhere, nowhere, task, "scratch")


def run(config: DemoConfig) -> Path:
    """Do it all and return the report's path; a demo that was stopped goes on where it was.

    Writes ``phantoms/`` (DICOM, masks, manifest), ``store/``, a run folder for each training,
    ``summary.json`` and ``report.html``.
    """
    with open_run(config.out, to_dict(config), recipe="demo") as folder:
        chapter = Chapters(folder / "seconds.json")
        manifest = chapter("draw phantoms", lambda: draw(config, folder / "phantoms"))
        data = chapter("prepare", lambda: prepare.run(store_settings(config, folder, manifest)))
        chapter("pretrain", lambda: pretrain.run(pretrain_settings(config, folder, data)))
        store, results = Store.open(data), {}
        for task, recipe in (("classify", classify), ("segment", segment)):
            for start in STARTS:
                settings = task_settings(config, folder, data, task, start)
                chapter(f"{task}, {start}", partial(recipe.run, settings))
                results[task, start] = chapter(
                    "evaluate", partial(evaluate, config, settings.out, store)
                )
        write_json(folder / "summary.json", summary(config, results, chapter.seconds))
        return write_report(
            folder / "report.html", page(config, folder, store, results, chapter.seconds)
        )


class Chapters:
    """Announces each chapter, and keeps its seconds, over interruptions too, in a JSON file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.seconds: dict[str, float] = json.loads(file.read_text()) if file.is_file() else {}

    def __call__(self, name: str, work: Callable[[], Made]) -> Made:
        """Do ``work`` and add its seconds to the chapter's."""
        print(f"== {name}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        made = work()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        write_json(self._file, self.seconds)
        return made


def evaluate(config: DemoConfig, run_folder: str, store: Store) -> dict[str, Result]:
    """One trained model on both sites: name of the set -> what was found."""
    device = pick_device(config.device)
    settings = Settings(
        batch_size=64,
        device=device,
        precision=pick_precision(config.precision, device),
        n_bootstrap=config.n_bootstrap,
        seed=config.seed,
    )
    trained = load_trained(run_folder, device)
    sets = [
        TestSet(name, str(store.path), store, store.manifest.rows(split))
        for name, split in SETS.items()
    ]
    return {test_set.name: measure(trained, test_set, settings) for test_set in sets}


def draw(config: DemoConfig, folder: Path) -> Path:
    """The phantoms' manifest; drawn under another name first, so that a folder of it is whole."""
    if not folder.exists():
        draft = folder.with_name(folder.name + ".partial")
        shutil.rmtree(draft, ignore_errors=True)
        series = phantom.Series(
            count=config.phantom_count,
            seed=config.seed,
            size_px=config.drawn_px,
            # Plain findings: a few hundred steps must do.
            severity=(0.7, 1.0),
        )
        phantom.write(draft, series, workers=len(os.sched_getaffinity(0)))
        draft.rename(folder)
    return folder / "manifest.csv"


def store_settings(config: DemoConfig, folder: Path, manifest: Path) -> prepare.PrepareConfig:
    """A margin over the input, so that crops are seldom magnified."""
    size_px = round(config.image_px * 8 / 7)
    return prepare.PrepareConfig(
        sources=(str(manifest),), out=str(folder / "store"), size_px=size_px
    )


def pretrain_settings(config: DemoConfig, folder: Path, store: Path) -> pretrain.PretrainConfig:
    """GMML on the training site's images; no label and no mask is read."""
    return pretrain.PretrainConfig(
        data=str(store),
        out=str(folder / "pretrain"),
        model=config.model,
        image_px=(config.image_px,),
        patch_px=config.patch_px,
        epochs=config.pretrain_epochs,
        # GMML's 5e-4 is for 800 epochs of large batches; here a few hundred steps must do. At four
        # times the rate they rebuild as well, and leave an encoder that learns to classify slowly.
        batch_size=32,
        base_lr=2e-3,
        sample_every=config.pretrain_epochs,
        seed=config.seed,
        device=config.device,
        precision=config.precision,
    )


def task_settings(
    config: DemoConfig, folder: Path, store: Path, task: str, start: str
) -> FinetuneConfig:
    """One downstream run: all is the same for both starts but the start itself."""
    pretrained = start == "pretrained"
    shared = FinetuneConfig(
        data=str(store),
        init=str(folder / "pretrain") if pretrained else "scratch",
        out=str(folder / f"{task}-{start}"),
        model=None if pretrained else config.model,
        image_px=config.image_px,
        patch_px=config.patch_px,
        label_fraction=config.label_fraction,
        batch_size=16,
        base_lr=5e-4 if task == "classify" else None,
        # So short a pretraining leaves the lower blocks as much to learn as the others.
        layer_decay=1.0,
        epochs=config.classify_epochs if task == "classify" else config.segment_epochs,
        seed=config.seed,
        device=config.device,
        precision=config.precision,
    )
    if task == "classify":
        # Moving an opacity about, or its grey, asks for more steps than a demo has.
        still = replace(
            shared,
            crop_scale=(1.0, 1.0),
            rotation_deg=0.0,
            brightness=0.0,
            contrast=0.0,
            drop_path=0.0,
        )
        return classify.ClassifyConfig(**to_dict(still))
    return segment.SegmentConfig(**to_dict(shared))
