"""What a fitted task leaves behind: the exported model, its predictions, its metrics."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from spcxr.data.store import Store
from spcxr.evaluate.report import PHANTOMS, write_json, write_text
from spcxr.models.weights import save_model_folder
from spcxr.recipes.finetune import SCRATCH, Rows
from spcxr.recipes.fitting import Course, Task
from spcxr.recipes.images import phantoms_among
from spcxr.recipes.leaks import write_trained_on
from spcxr.train.checkpoint import Position
from spcxr.train.model_card import write_model_card


def finished(folder: Path) -> bool:
    """Whether a run is whole: its model is exported and, last of all, its metrics are written."""
    return all((folder / n).is_file() for n in ("model/config.json", "metrics.json"))


def export(course: Course, task: Task, position: Position, head: nn.Module) -> Path:
    """Write ``RUN/model`` and its card: encoder, head, preprocessing, how they came to be, and
    digests of whom they were trained on and chosen by."""
    config, start, block = course.config, course.start, task.block
    phantoms = phantoms_among(start.store, course.rows)
    provenance = {
        "recipe": course.recipe,
        "init": config.init,
        "data": position.data,
        "phantoms": phantoms,
        "training_rows": len(course.rows),
        "training_patients": len(np.unique(start.store.manifest.patients[course.rows])),
        **course.came_of(position),
        "validation": {task.score: position.best},
        "seed": config.seed,
        "precision": course.compute.precision,
    }
    folder = save_model_folder(
        course.folder / "model",
        start.encoder,
        preprocess=start.store.preprocess.to_dict(),
        mean=start.normalisation.mean,
        std=start.normalisation.std,
        task=block,
        head=head,
        provenance=provenance,
    )
    init = "" if config.init == SCRATCH else config.init
    write_trained_on(folder, start.store, course.rows, course.cohort.val, init)
    answers = block.get("labels") or block.get("structures") or []
    facts = {
        **provenance,
        "preprocess": start.store.preprocess.to_dict(),
        "metrics": "metrics.json, with intervals; for patients like those of the test rows only",
    }
    title = f"{course.recipe}: {', '.join(answers)}"
    write_model_card(course.folder, title, facts, banner=PHANTOMS if phantoms else "")
    return folder


def write_results(
    course: Course,
    task: Task,
    position: Position,
    columns: Mapping[str, NDArray[Any]],
    summarise: Callable[[slice], Any],
) -> None:
    """``predictions.csv`` and ``metrics.json``: what the best epoch's weights make of the rows.

    Parameters
    ----------
    columns
        what was predicted of each of the cohort's ``judged`` rows, ``(n,)`` by name.
    summarise
        metrics of one part of those rows.
    """
    cohort, store = course.cohort, course.start.store
    write_predictions(course.folder / "predictions.csv", store, cohort.judged, columns)
    facts = {
        "recipe": course.recipe,
        "task": task.said,
        "phantoms": phantoms_among(store, cohort.judged),
        "rows": {"train": len(cohort.train), "val": len(cohort.val), "test": len(cohort.test)},
        **course.came_of(position),
        **{name: summarise(part) for name, part in cohort.parts.items()},
    }
    write_json(course.folder / "metrics.json", facts)


def write_predictions(
    path: Path, store: Store, rows: Rows, columns: Mapping[str, NDArray[Any]]
) -> Path:
    """A CSV of ``path, split`` and these columns ``(n,)``, a row each; NaN is left blank."""
    paths, splits = store.manifest.column("path"), store.manifest.column("split")
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "split", *columns])
    for place, row in enumerate(rows.tolist()):
        values = [column[place] for column in columns.values()]
        shown = ["" if np.isnan(value) else f"{value:.6g}" for value in values]
        writer.writerow([paths[row], splits[row], *shown])
    return write_text(path, text.getvalue())
