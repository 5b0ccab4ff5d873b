"""What ``spcxr info MODEL`` says: what a model is, what it answers, and how it came to be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spcxr.evaluate.calibration import read_calibration
from spcxr.evaluate.report import plain
from spcxr.evaluate.thresholds import read_thresholds
from spcxr.infer.stream import version_of
from spcxr.models.weights import LoadedModel, load_model_folder


def describe(model: str | Path) -> dict[str, Any]:
    """Facts about a run or model folder as plain values, ready for JSON; of no patient.

    Raises
    ------
    SpcxrError
        no such model, or one whose files are torn.
    """
    loaded = load_model_folder(model)
    task, numbers = loaded.config.get("task"), loaded.config["pretrained_cfg"]
    encoder = loaded.encoder
    return {
        "model": str(loaded.folder),
        "version": version_of(loaded.folder),
        "written by": f"spcxr {loaded.config['spcxr_version']}",
        "answers": _answers(loaded, task),
        "encoder": {
            "architecture": loaded.config.get("architecture"),
            "image_px": list(encoder.image_px),
            "patch_px": encoder.patch_px,
            "channels": encoder.channels,
            "width": encoder.width,
            "depth": encoder.depth,
            "heads": encoder.heads,
            "parameters": sum(p.numel() for p in encoder.parameters()),
        },
        "preprocess": loaded.config["preprocess"],
        "mean": numbers["mean"][0],
        "std": numbers["std"][0],
        "provenance": loaded.config.get("provenance") or {},
        "files": {
            file.relative_to(loaded.folder).as_posix(): f"{file.stat().st_size} bytes"
            for file in sorted(loaded.folder.rglob("*"))
            if file.is_file()
        },
    }


def _answers(loaded: LoadedModel, task: Mapping[str, Any] | None) -> dict[str, Any]:
    """The task, and where its probabilities are cut."""
    if task is None:
        return {"kind": "encoder", "for": "embed, or --init of classify and segment"}
    said = {"kind": task.get("kind"), **{k: v for k, v in task.items() if k != "kind"}}
    if loaded.head_state is not None and task.get("method") == "knn":
        said["remembers"] = f"{len(loaded.head_state['features'])} training images, as numbers"
    if task.get("kind") != "classify":
        return said
    names = tuple(task["labels"])
    temperatures = read_calibration(loaded.folder, names)
    thresholds = read_thresholds(loaded.folder, names)
    said["temperatures"] = "none" if temperatures is None else plain(temperatures)
    if thresholds is None:
        return said | {"thresholds": "none: a half"}
    each = {r: dict(zip(names, plain(found), strict=True)) for r, found in thresholds.items()}
    return said | {"thresholds": each}
