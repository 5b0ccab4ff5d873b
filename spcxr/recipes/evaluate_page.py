"""What `evaluate` writes: ``predictions.csv``, ``metrics.json`` and the page."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spcxr.evaluate import calibration, pages, thresholds
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
from spcxr.infer.predict import TrainedModel
from spcxr.recipes.card import card_section
from spcxr.recipes.cases import cases_section
from spcxr.recipes.compare import comparison_section
from spcxr.recipes.drift import Drift, drift_section
from spcxr.recipes.history import curves_section
from spcxr.recipes.inventory import summary_section
from spcxr.recipes.leaks import Leaks, said
from spcxr.recipes.sweep import HEADLINE, Fall, corruption_section
from spcxr.recipes.testset import Result, Settings, TestSet

Models = Mapping[str, TrainedModel]  # by the folder given; what is evaluated stands first
SHIFT = (
    "Sets differ in who was imaged and how; a gap between two of them may be either, and a set "
    "that shares sites with training flatters the model."
)
LEAK = "Not a test: {} of the {} rows of {} are of patients {} was trained on or chosen by."


@dataclass(frozen=True)
class Given:
    """What a test set is beside its labels: ``leaks`` from each model's training; ``copies``,
    images that are pixel by pixel an earlier one of the set."""

    leaks: Mapping[str, Leaks | None]
    copies: int


@dataclass(frozen=True)
class Found:
    """All that was found on one test set; ``drift`` from the first set, None for that one."""

    result: Result
    given: Given
    corrupted: Mapping[str, Mapping[str, Fall]]
    against: Mapping[str, pages.Comparison] | None
    drift: Drift | None

    @property
    def name(self) -> str:
        """The test set's."""
        return self.result.test_set.name

    def leaks_said(self, run: str) -> list[str]:
        """A warning for each model that was trained on some of the rows; ``run`` is the model."""
        return [
            LEAK.format(
                leak.rows,
                len(self.result.rows),
                self.name,
                "the model" if model == run else Path(model).resolve().name,
            )
            for model, leak in self.given.leaks.items()
            if leak and leak.rows
        ]


def write_all(
    folder: Path,
    models: Models,
    found: Sequence[Found],
    described: Mapping[str, object],
    settings: Settings,
) -> Path:
    """Write ``predictions.csv``, ``metrics.json`` and, last, ``report.html``, which it returns."""
    facts = pages.provenance(described)
    write_predictions(folder / "predictions.csv", [one.result for one in found])
    write_json(folder / "metrics.json", as_json(models, found, facts, settings))
    return write_report(folder / "report.html", page(models, found, facts))


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
    models: Models, found: Sequence[Found], facts: Mapping[str, str], settings: Settings
) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    trained = next(iter(models.values()))
    sets = {
        one.name: {
            "rows": one.result.n_rows,
            "patients": one.result.n_patients,
            "data": one.result.test_set.source,
            "phantoms": one.result.test_set.drawn,
            "leaks": one.given.leaks,
            "copies": one.given.copies,
            "overall": one.result.overall,
            **one.result.details,
            "corruptions": one.corrupted,
            "against": one.against,
            "drift": one.drift,
        }
        for one in found
    }
    task = {"kind": trained.kind, "names": trained.names, "multilabel": trained.multilabel}
    return {"task": task, "n_bootstrap": settings.n_bootstrap, "sets": sets, "provenance": facts}


def describe(models: Models, settings: Settings, sets: Sequence[TestSet]) -> dict[str, object]:
    """Where the numbers come from, for the page and ``metrics.json``."""
    (run, trained), *others = models.items()
    hashes = {s.source: s.store.facts["content_hash"][:16] for s in sets}
    preprocess = ", ".join(f"{k} {v}" for k, v in trained.config["preprocess"].items())
    rivals = [
        f"{name} ({weights_hash(rival)[:16]}, calibration {settled_hash(rival)[:16]})"
        for name, rival in others
    ]
    return {
        "torch": torch.__version__,
        "model": run,
        "weights": weights_hash(trained)[:16],
        "calibration": settled_hash(trained)[:16],
        **({"against": ", ".join(rivals)} if rivals else {}),
        "trained by": f"spcxr {trained.config['spcxr_version']}",
        "preprocessing": preprocess,
        "data": ", ".join(f"{name} ({digest})" for name, digest in hashes.items()),
        "device": settings.device,
        "precision": settings.precision,
        "seed": settings.seed,
        "resamples": settings.n_bootstrap,
    }


def weights_hash(trained: TrainedModel) -> str:
    """Of encoder and head as loaded: a run trained anew at the same path is another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trained.model.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def settled_hash(trained: TrainedModel) -> str:
    """Of the temperatures and thresholds beside the weights; ``none`` where there are none."""
    files = [trained.folder / name for name in (calibration.FILE, thresholds.FILE)]
    texts = [file.read_bytes() for file in files if file.is_file()]
    return hashlib.sha256(b"".join(texts)).hexdigest() if texts else "none"


# --- the page -------------------------------------------------------------------------------


def page(models: Models, found: Sequence[Found], facts: Mapping[str, str]) -> Report:
    """The report: the headline of each set, all sets side by side, then each by itself."""
    run, trained = next(iter(models.items()))
    headline = HEADLINE[trained.kind]
    title = pages.TITLES[headline]
    results = [one.result for one in found]
    what = "Classification" if trained.kind == "classify" else "Segmentation"
    banners = [leak for one in found for leak in one.leaks_said(run)]
    banners += [PHANTOMS] if any(result.test_set.drawn for result in results) else []
    return Report(
        title=f"{what} of chest X-rays: {Path(run).resolve().name}",
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
        sections=[
            overview(results, headline),
            *drift_part(found, headline),
            *(section for one in found for section in set_part(models, one)),
            data_section(trained, found),
            *filter(None, [curves_section(trained.folder)]),
            card_section(trained),
        ],
        provenance=facts,
        limitations=[NOT_A_DEVICE, INTERVALS, *([SHIFT] if len(results) > 1 else [])],
        banner=" ".join(banners),
    )


def overview(results: Sequence[Result], headline: str) -> Section:
    """All sets side by side."""
    side_by_side = {result.test_set.name: result.overall for result in results}
    title = pages.TITLES[headline]
    pictures = []
    if len(results) > 1:
        rows = {name: {title: found[headline]} for name, found in side_by_side.items()}
        pictures.append(pages.interval_picture(rows, headline, f"{title} of each set."))
    return Section(
        "All sets" if len(results) > 1 else "Results",
        tables=[pages.comparison("Metrics", side_by_side, first="set")],
        pictures=pictures,
    )


def drift_part(found: Sequence[Found], headline: str) -> list[Section]:
    """The fall from the first set to each other one; nothing where there is one set."""
    drifts = {one.name: one.drift for one in found if one.drift}
    return [drift_section(found[0].name, headline, drifts)] if drifts else []


def set_part(models: Models, found: Found) -> list[Section]:
    """One set by itself: its metrics, the other model's, its corrupted images, single cases."""
    trained, result = next(iter(models.values())), found.result
    made = [result.section]
    if found.against is not None:
        one, other = (Path(name).resolve().name for name in models)
        names = (one, other) if one != other else ("the model", "the other model")
        made.append(comparison_section(result, found.against, names))
    if found.corrupted:
        made.append(corruption_section(trained.kind, result, found.corrupted))
    if result.answers is not None:
        measured = replace(result.test_set, rows=result.measured)
        made.append(cases_section(trained, measured, result.answers.truth, result.answers.scores))
    return made


def data_section(trained: TrainedModel, found: Sequence[Found]) -> Section:
    """What each set holds, and whom of the training."""
    names = trained.names if trained.kind == "classify" else ()
    holds = summary_section([one.result.test_set for one in found], names)
    counts: list[list[Cell]] = [
        [one.name, one.result.n_rows, one.result.n_patients, one.given.copies] for one in found
    ]
    note = "Copies: images that are, pixel by pixel, an earlier one of the set."
    overlap: list[list[Cell]] = [
        [one.name, Path(model).resolve().name, said(leaks)]
        for one in found
        for model, leaks in one.given.leaks.items()
    ]
    tables = [
        *holds.tables,
        Table("Measured", ["set", "images", "patients", "copies"], counts, note),
        Table("Patients seen in training", ["set", "model", "of its training"], overlap),
    ]
    return replace(holds, tables=tables)
