"""Measure a trained model on one test set or several, with intervals, and write the report."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spcxr.config import Config, ConfigError, setting, to_dict
from spcxr.errors import SpcxrError
from spcxr.evaluate import pages
from spcxr.evaluate.report import (
    INTERVALS,
    NOT_A_DEVICE,
    PHANTOMS,
    Cell,
    Fact,
    Report,
    Section,
    Table,
    write_json,
    write_report,
    write_text,
)
from spcxr.infer.predict import TrainedModel, load_trained
from spcxr.recipes.images import open_images
from spcxr.recipes.measure import Result, Settings, TestSet, measure
from spcxr.train.device import pick_device, pick_precision
from spcxr.train.run_folder import open_run

EVERY_SPLIT = "all"
HEADLINE = {"classify": "macro_auroc", "segment": "dice"}
SHIFT = (
    "Sets differ in who was imaged and how; a gap between two of them may be either, and a set "
    "that shares sites with training flatters the model."
)


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Settings of `run`; see ``spcxr-train evaluate --help``."""

    run: str = setting(help="run or model folder of classify or segment")
    data: tuple[str, ...] = setting(help="stores, manifest CSVs or image folders: a,b,...")
    out: str = setting(help="folder to write")
    splits: tuple[str, ...] = setting(
        ("test",), "splits to measure, each by itself; 'all' for every row at once"
    )
    n_bootstrap: int = setting(2000, "resamples of the patients for an interval", low=100)
    threshold: float = setting(
        0.5, "probability from which a label is called (several findings)", low=0.0, high=1.0
    )
    seed: int = setting(0, "of the resamples", low=0)
    batch_size: int = setting(64, "images at a time", low=1)
    device: str = setting("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    precision: str = setting("auto", "bf16 where it is fast, or", choices=("auto", "bf16", "fp32"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data or not self.splits:
            raise ConfigError("data and splits must name one each at least")
        if EVERY_SPLIT in self.splits and len(self.splits) > 1:
            raise ConfigError("splits names 'all' and others; give either")


def run(config: EvaluateConfig) -> Path:
    """Evaluate ``config.run`` on each data set and split; returns the report's path.

    Writes ``predictions.csv`` (paths as in the manifest, no patient), ``metrics.json`` and
    ``report.html`` into ``out``, the report last.

    Raises
    ------
    SpcxrError
        no trained task, data prepared otherwise than the weights know, a split or label that the
        data do not have, or an ``out`` that holds something else or an evaluation of other
        weights, data or settings. A finished one of the same is left as it is.
    """
    device = pick_device(config.device)
    settings = Settings(
        batch_size=config.batch_size,
        device=device,
        precision=pick_precision(config.precision, device),
        n_bootstrap=config.n_bootstrap,
        seed=config.seed,
        threshold=config.threshold,
    )
    trained = load_trained(config.run, device)
    with open_run(config.out, to_dict(config), recipe="evaluate") as folder:
        report = folder / "report.html"
        sets = list(choose_sets(config, trained, folder))
        described = describe(config, trained, settings, sets)
        if report.exists():
            refuse_other(folder, described)
            print(f"{folder}: already complete", file=sys.stderr)
            return report
        results = [measure(trained, test_set, settings) for test_set in sets]
        facts = pages.provenance(described)
        write_predictions(folder / "predictions.csv", results)
        write_json(folder / "metrics.json", as_json(config, trained, results, facts))
        return write_report(report, page(config, trained, results, facts))


def refuse_other(folder: Path, described: Mapping[str, object]) -> None:
    """Refuse a finished evaluation whose ``metrics.json`` does not say that it is this very one."""
    try:
        found = json.loads((folder / "metrics.json").read_text())["provenance"]
    except (OSError, ValueError, KeyError):
        found = {}
    changed = [name for name, value in described.items() if found.get(name) != str(value)]
    if changed:
        raise SpcxrError(
            f"{folder}: holds a finished evaluation with other {', '.join(changed)}; "
            "choose another --out"
        )


def weights_hash(trained: TrainedModel) -> str:
    """Of encoder and head as loaded: a run trained anew at the same path is another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trained.model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# --- data -----------------------------------------------------------------------------------


def choose_sets(config: EvaluateConfig, trained: TrainedModel, folder: Path) -> Iterator[TestSet]:
    """Every (data, split) that has rows, named so that no two are alike.

    Raises
    ------
    SpcxrError
        data without a row in any of the splits.
    """
    wanted, size_px = trained.config["preprocess"], trained.config["preprocess"]["size_px"]
    stems = [Path(path).stem for path in config.data]
    for number, path in enumerate(config.data):
        made = folder / f"store-{number}"
        store = open_images(path, made, size_px=size_px, wanted=wanted, init=config.run)
        name = stems[number] if stems.count(stems[number]) == 1 else path
        if config.splits == (EVERY_SPLIT,):
            yield TestSet(name, path, store, np.arange(len(store), dtype=np.int64))
            continue
        found = [split for split in config.splits if len(store.manifest.rows(split))]
        if not found:
            raise SpcxrError(
                f"{path}: no row in split {', '.join(config.splits)}; it has "
                f"{', '.join(store.manifest.splits) or 'none'}: choose with --splits, or 'all'"
            )
        for split in found:
            yield TestSet(f"{name}: {split}", path, store, store.manifest.rows(split))


# --- what is written ------------------------------------------------------------------------


def write_predictions(path: Path, results: Sequence[Result]) -> Path:
    """One CSV of all sets: set, row of the store, path, split, then what was predicted."""
    rows: list[dict[str, str]] = []
    for result in results:
        manifest = result.test_set.store.manifest
        paths, splits = manifest.column("path"), manifest.column("split")
        for row, predicted in zip(result.rows.tolist(), result.predictions, strict=True):
            where = {"set": result.test_set.name, "row": str(row), "path": paths[row]}
            rows.append(where | {"split": splits[row]} | predicted)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return write_text(path, text.getvalue())


def as_json(
    config: EvaluateConfig,
    trained: TrainedModel,
    results: Sequence[Result],
    facts: Mapping[str, str],
) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    sets = {
        result.test_set.name: {
            "rows": result.n_rows,
            "patients": result.n_patients,
            "data": result.test_set.source,
            "phantoms": result.test_set.drawn,
            "overall": result.overall,
            **result.details,
        }
        for result in results
    }
    task = {"kind": trained.kind, "names": trained.names, "multilabel": trained.multilabel}
    return {"task": task, "n_bootstrap": config.n_bootstrap, "sets": sets, "provenance": facts}


def describe(
    config: EvaluateConfig, trained: TrainedModel, settings: Settings, sets: Sequence[TestSet]
) -> dict[str, object]:
    """Where the numbers come from, for the page and ``metrics.json``."""
    hashes = {s.source: s.store.facts["content_hash"][:16] for s in sets}
    preprocess = ", ".join(f"{k} {v}" for k, v in trained.config["preprocess"].items())
    return {
        "torch": torch.__version__,
        "model": config.run,
        "weights": weights_hash(trained)[:16],
        "trained by": f"spcxr {trained.config['spcxr_version']}",
        "preprocessing": preprocess,
        "data": ", ".join(f"{name} ({digest})" for name, digest in hashes.items()),
        "device": settings.device,
        "precision": settings.precision,
        "seed": settings.seed,
        "resamples": settings.n_bootstrap,
    }


def page(
    config: EvaluateConfig,
    trained: TrainedModel,
    results: Sequence[Result],
    facts: Mapping[str, str],
) -> Report:
    """The report: the headline of each set, all sets side by side, then each by itself."""
    headline = HEADLINE[trained.kind]
    title = pages.TITLES[headline]
    side_by_side = {result.test_set.name: result.overall for result in results}
    pictures = []
    if len(results) > 1:
        rows = {name: {title: found[headline]} for name, found in side_by_side.items()}
        pictures.append(pages.interval_picture(rows, headline, f"{title} of each set."))
    what = "Classification" if trained.kind == "classify" else "Segmentation"
    overview = Section(
        "All sets" if len(results) > 1 else "Results",
        tables=[pages.comparison("Metrics", side_by_side, first="set")],
        pictures=pictures,
    )
    drawn = any(result.test_set.drawn for result in results)
    return Report(
        title=f"{what} of chest X-rays: {Path(config.run).resolve().name}",
        summary=f"{', '.join(trained.names)}: measured on {len(results)} "
        f"{'set' if len(results) == 1 else 'sets'}, with 95 % intervals over patients.",
        facts=[
            Fact(
                f"{title}, {result.test_set.name}",
                result.overall[headline],
                f"{result.n_rows} images, {result.n_patients} patients",
            )
            for result in results[:4]
        ],
        sections=[overview, *(result.section for result in results), data_section(results)],
        provenance=facts,
        limitations=[NOT_A_DEVICE, INTERVALS, *([SHIFT] if len(results) > 1 else [])],
        banner=PHANTOMS if drawn else "",
    )


def data_section(results: Sequence[Result]) -> Section:
    """What each set holds."""
    rows: list[list[Cell]] = []
    for result in results:
        test_set = result.test_set
        sites = sorted({str(site) for site in test_set.column("site") if site})
        shown = ", ".join(sites[:4]) + (f" and {len(sites) - 4} more" if sites[4:] else "")
        rows.append(
            [test_set.name, len(test_set.rows), result.n_rows, result.n_patients, shown or "–"]
        )
    columns = ["set", "images", "of them measured", "patients", "sites"]
    return Section("Data", tables=[Table("Test sets", columns, rows)])
