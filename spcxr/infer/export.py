"""``spcxr export``: a model as other programs load it, checked against the model itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spcxr import __version__
from spcxr.errors import SpcxrError
from spcxr.infer.export_card import CARD, write_card
from spcxr.infer.export_check import Check, check_images
from spcxr.infer.export_files import (
    OPSETS,
    Job,
    need_onnx,
    write_aoti,
    write_onnx,
    write_pt2,
)
from spcxr.infer.export_graphs import Exported, take_apart
from spcxr.infer.export_timm import write_timm
from spcxr.models.weights import replace_folder

FORMATS = ("timm", "onnx", "pt2", "aoti")
WRITERS: dict[str, Callable[..., list[Check]]] = {
    "onnx": write_onnx,
    "pt2": write_pt2,
    "aoti": write_aoti,
}
FACTS = "export.json"
# Beside a classifier's weights: what its probabilities are tempered by, and called from.
BESIDE = ("calibration.json", "thresholds.json")


@dataclass(frozen=True)
class Wanted:
    """How a model is to be exported.

    ``channels``: 1 or 3, None = the encoder's own; ``opset``: ONNX's, None = the least; ``batch``:
    images at once, None = any number; ``images``: files to check on, () = drawn phantoms.

    Raises
    ------
    SpcxrError
        a setting that the format does not have.
    """

    format: str
    channels: int | None = None
    opset: int | None = None
    batch: int | None = None
    pure_aten: bool = False
    encoder_only: bool = False
    images: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SpcxrError(f"no format {self.format!r}; choose one of: {', '.join(FORMATS)}")
        if self.opset is not None and self.format != "onnx":
            raise SpcxrError(f"--opset is for onnx, not for {self.format}; leave it out")
        if self.opset is not None and not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise SpcxrError(f"opset {self.opset}; choose {OPSETS[0]} to {OPSETS[1]}")
        if self.pure_aten and self.format not in ("pt2", "aoti"):
            raise SpcxrError(
                f"--pure-aten is for pt2 and aoti, not for {self.format}; leave it out"
            )
        if self.batch is not None and (self.batch < 1 or self.format == "timm"):
            raise SpcxrError(f"batch {self.batch} for {self.format}; give 1 or more, not for timm")


def export(model: str | Path, out: str | Path, wanted: Wanted) -> list[Check]:
    """Write ``out``: the files, ``export.json`` (input, preprocessing, labels), ``README.md``.

    Every file is read back and run on the images of the check; nothing is left at ``out`` unless
    all of them answer as the model does. An earlier export of that name is replaced.

    Returns
    -------
    the checks, one a file.

    Raises
    ------
    SpcxrError
        a model that cannot be exported, a place that holds something else, a missing extra, a
        file whose answers differ.
    """
    folder, place = Path(out), Path(out).resolve()
    _refuse_taken(folder)
    if place == Path.cwd():  # it is renamed into place, and one would stand nowhere
        raise SpcxrError(f"{folder}: is the folder you are in; give --out a name within it")
    if wanted.format == "onnx":
        need_onnx()
    only = wanted.encoder_only or wanted.format == "timm"
    exported = take_apart(model, wanted.channels, encoder_only=only)
    if exported.folder.resolve() == place:
        raise SpcxrError(f"{folder}: is the model that is read; choose another --out")
    draft = place.with_name(f".{place.name}.writing-{os.getpid()}")
    job = Job(
        folder=draft,
        channels=exported.channels,
        batch=wanted.batch,
        opset=wanted.opset or OPSETS[0],
        pure_aten=wanted.pure_aten,
        grey=check_images(wanted.images, exported.config, exported.encoder.image_px),
        facts=facts_of(exported, wanted),
    )
    try:
        draft.mkdir(parents=True)
        checks = _written(exported, job, wanted.format)
        _write_beside(exported, job, checks)
        replace_folder(draft, place)
    except OSError as error:
        said = error.strerror or error
        raise SpcxrError(
            f"{folder}: cannot be written ({said}); free some space or choose another --out"
        ) from error
    except RuntimeError as error:  # torch's, of many lines
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SpcxrError(
            f"{folder}: torch does not export this as {wanted.format} ({line}); --debug says more"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return checks


def _refuse_taken(folder: Path) -> None:
    """An empty folder and an earlier export may be written over; anything else may not."""
    if not folder.exists():
        return
    there = {file.name for file in folder.iterdir()} if folder.is_dir() else {folder.name}
    files = _exported_before(folder / FACTS)
    if there and not files:
        raise SpcxrError(f"{folder}: exists and is no earlier export; choose another --out")
    made = {FACTS, CARD, "config.json", *BESIDE, *files, *(f"{name}.data" for name in files)}
    if others := sorted(there - made):
        raise SpcxrError(
            f"{folder}: holds {others[0]}, which no export wrote; move it, or choose another --out"
        )


def _exported_before(facts: Path) -> tuple[str, ...]:
    """The files that an earlier export's facts name; () where there are no such facts."""
    try:
        found = json.loads(facts.read_text())
        return tuple(found["files"]) if "spcxr_version" in found else ()
    except (OSError, ValueError, TypeError, KeyError):
        return ()


def _written(exported: Exported, job: Job, kind: str) -> list[Check]:
    if kind == "timm":
        job.folder.rmdir()  # which its writer makes itself, whole or not at all
        return write_timm(exported, job)
    return [check for graph in exported.graphs for check in WRITERS[kind](graph, job)]


def _write_beside(exported: Exported, job: Job, checks: list[Check]) -> None:
    """Facts, card and a classifier's own small files."""
    found = {check.file: {"differences": check.differences, "by": check.by} for check in checks}
    text = json.dumps(job.facts | {"files": found}, indent=2) + "\n"
    (job.folder / FACTS).write_text(text)
    if exported.names:
        for name in BESIDE:
            if (exported.folder / name).is_file():
                shutil.copyfile(exported.folder / name, job.folder / name)
    write_card(exported, job, checks)


def facts_of(exported: Exported, wanted: Wanted) -> dict[str, Any]:
    """What whoever runs the files must know, ready for JSON; no path and no patient."""
    task = exported.config.get("task") if exported.names else None
    provenance = dict(exported.config.get("provenance") or {})
    if isinstance(provenance.get("init"), str):
        provenance["init"] = Path(provenance["init"]).name
    segments = task is not None and task["kind"] == "segment"
    labels = ["background", *exported.names] if segments else list(exported.names)
    shape = [wanted.batch or "batch", exported.channels, *exported.encoder.image_px]
    return {
        "spcxr_version": __version__,
        "torch_version": torch.__version__,
        "format": wanted.format,
        "input": {
            "name": "images",
            "shape": shape,
            "dtype": "float32",
            "values": "grey levels in [0, 1], 0 = black = air"
            + ("" if wanted.format == "timm" else "; mean and std are taken out inside"),
        },
        "batch": wanted.batch,
        "channels": exported.channels,
        "image_px": list(exported.encoder.image_px),
        "outputs": {graph.name: list(graph.outputs) for graph in exported.graphs},
        "preprocess": exported.config["preprocess"],
        "mean": exported.normalisation.mean,
        "std": exported.normalisation.std,
        "task": None if task is None else task["kind"],
        "labels": labels,  # of the channels of logits and probabilities, in order
        "multilabel": bool(task and task.get("multilabel", False)),
        "provenance": provenance,
    }
