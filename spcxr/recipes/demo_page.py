"""The demo's page and summary: pretrained against scratch, at home and on the other site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spcxr.config import Config, to_dict
from spcxr.data.store import Store
from spcxr.evaluate import pages, plots
from spcxr.evaluate.intervals import Interval, paired_bootstrap
from spcxr.evaluate.report import (
    INTERVALS,
    NOT_A_DEVICE,
    PHANTOMS,
    Cell,
    Fact,
    Picture,
    Report,
    Section,
    Table,
)
from spcxr.recipes.history import curve
from spcxr.recipes.measure import Result

SETS = {"the training site": "test", "the other site": "drift"}
STARTS = ("pretrained", "scratch")
HEADLINE = {"classify": "macro_auroc", "segment": "dice"}
TASKS = {"classify": "Classification", "segment": "Lung segmentation"}
ONE_SEED = (
    "One training seed and a small budget: a gap between the two starts holds for these drawings "
    "and this run; the intervals do not cover the chance of training."
)

Results = Mapping[tuple[str, str], Mapping[str, Result]]


def gains(results: Results, task: str, *, n: int, seed: int) -> dict[str, Interval]:
    """Pretrained minus scratch in the task's headline metric, paired, by test set."""
    metric = HEADLINE[task]
    found = {}
    for name in SETS:
        first, second = (results[task, start][name] for start in STARTS)
        found[name] = paired_bootstrap(
            first.patients, first.statistics[metric], second.statistics[metric], n=n, seed=seed
        )
    return found


def summary(config: Config, results: Results, seconds: Mapping[str, float]) -> dict[str, Any]:
    """The content of ``summary.json``."""
    settings = to_dict(config)
    return {
        "phantoms": True,
        "config": settings,
        "results": {
            task: {
                start: {name: result.overall for name, result in results[task, start].items()}
                for start in STARTS
            }
            | {"gain": gains(results, task, n=settings["n_bootstrap"], seed=settings["seed"])}
            for task in TASKS
        },
        "seconds": seconds,
        "provenance": pages.provenance({"torch": torch.__version__, "seed": settings["seed"]}),
    }


def page(
    config: Config, folder: Path, store: Store, results: Results, seconds: Mapping[str, float]
) -> Report:
    """The report of a finished demo."""
    settings = to_dict(config)
    facts = {
        "torch": torch.__version__,
        "data": f"drawn phantoms ({store.facts['content_hash'][:16]})",
        **{name: settings[name] for name in ("model", "image_px", "label_fraction", "seed")},
    }
    return Report(
        title="spcxr on drawn chest X-rays",
        summary="One encoder, pretrained without labels on images of one site, then fine-tuned "
        "to tell normal, pneumonia-like and covid-like chests apart and to outline the lungs. "
        "The same training from scratch stands beside it, on that site and on one never seen.",
        facts=headline(results),
        sections=[
            *(versus(task, results, settings) for task in TASKS),
            pretraining(folder / "pretrain"),
            learning(folder),
            *details(results),
            data_section(store),
            time_section(seconds),
        ],
        provenance=pages.provenance(facts),
        limitations=[NOT_A_DEVICE, INTERVALS, ONE_SEED],
        banner=PHANTOMS,
    )


def headline(results: Results) -> list[Fact]:
    """The other site's numbers: the ones that matter."""
    name = list(SETS)[-1]
    return [
        Fact(
            f"{pages.TITLES[HEADLINE[task]]}, {start}",
            results[task, start][name].overall[HEADLINE[task]],
            f"{name}, {results[task, start][name].n_rows} images",
        )
        for task in TASKS
        for start in STARTS
    ]


def versus(task: str, results: Results, settings: Mapping[str, Any]) -> Section:
    """Pretrained against scratch: every metric, the paired gain, and a picture of both."""
    metric = HEADLINE[task]
    every = {
        f"{start}, {name}": result.overall
        for name in SETS
        for start in STARTS
        for result in [results[task, start][name]]
    }
    gain = gains(results, task, n=settings["n_bootstrap"], seed=settings["seed"])
    rows: list[list[Cell]] = [[name, interval] for name, interval in gain.items()]
    drawn = {
        name: {start: results[task, start][name].overall[metric] for start in STARTS}
        for name in SETS
    }
    return Section(
        f"{TASKS[task]}: pretrained against scratch",
        tables=[
            pages.comparison("Metrics", every, first="start, test set"),
            Table(
                "Gain",
                ["test set", f"{pages.TITLES[metric]}, pretrained minus scratch"],
                rows,
                note="Paired: both models on the same resampled patients. An interval without 0 "
                "speaks for a difference on these images.",
            ),
        ],
        pictures=[pages.interval_picture(drawn, metric, f"{pages.TITLES[metric]} by test set.")],
    )


def pretraining(folder: Path) -> Section:
    """The loss, and what the encoder rebuilds of what it was not shown."""
    train, held = (
        curve(folder, "train", "loss", "training"),
        curve(folder, "val", "loss", "held out"),
    )
    said = f"Loss from {train.y[0]:.3f} to {train.y[-1]:.3f}; held out {held.y[-1]:.3f}."
    drawn = plots.loss_curves([train, held], x_label="epoch", y_label="L1 on hidden pixels")
    samples = sorted((folder / "samples").glob("*.png"))
    pictures = [Picture("Reconstruction loss, in standard deviations of grey.", said, svg=drawn)]
    pictures += [
        Picture(
            "Held-out phantoms: original, corrupted, reconstructed, mask. The reconstruction is "
            "blurred because the loss asks for the most likely grey, not for a sharp guess.",
            "Grid of drawn chests: original, with groups hidden by noise, rebuilt, and the mask.",
            png=sample.read_bytes(),
        )
        for sample in samples[-1:]
    ]
    return Section("Pretraining without labels", pictures=pictures)


def learning(folder: Path) -> Section:
    """Training loss of each task, both starts in one picture."""
    pictures = []
    for task, title in TASKS.items():
        curves = [curve(folder / f"{task}-{s}", "train", "loss", s) for s in STARTS]
        said = "; ".join(f"{c.name} from {c.y[0]:.3f} to {c.y[-1]:.3f}" for c in curves)
        drawn = plots.loss_curves(curves, x_label="epoch", y_label="training loss")
        pictures.append(Picture(title, f"{title}: training loss, {said}.", svg=drawn))
    return Section("Fine-tuning", pictures=pictures)


def details(results: Results) -> list[Section]:
    """The pretrained models on each set, in full."""
    return [
        Section(
            f"{TASKS[task]}, pretrained, {name}",
            result.section.text,
            result.section.tables,
            result.section.pictures,
        )
        for task in TASKS
        for name, result in results[task, STARTS[0]].items()
    ]


def data_section(store: Store) -> Section:
    """What was drawn: how many, of whom, for what."""
    manifest, rows = store.manifest, []
    sites, patients = np.asarray(manifest.column("site")), np.asarray(manifest.patients)
    for split in manifest.splits:
        members = manifest.rows(split)
        where = ", ".join(sorted(set(sites[members].tolist())))
        found: list[Cell] = [split, len(members), len(np.unique(patients[members])), where]
        rows.append(found)
    table = Table("Drawn phantoms", ["split", "images", "patients", "site"], rows)
    return Section("Data", tables=[table])


def time_section(seconds: Mapping[str, float]) -> Section:
    """How long each chapter took."""
    rows: list[list[Cell]] = [[name, f"{value:.0f}"] for name, value in seconds.items()]
    rows.append(["all", f"{sum(seconds.values()):.0f}"])
    return Section("Time", tables=[Table("Seconds on this machine", ["chapter", "s"], rows)])
