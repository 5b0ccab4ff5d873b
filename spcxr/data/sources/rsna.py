"""RSNA Pneumonia Detection Challenge (Shih et al., Radiology: AI 2019): boxes on NIH's images."""

from __future__ import annotations

import json
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.sources.set_tables import header_of, here_of, need, pictures_by_stem
from spcxr.data.tables import Columns, read_table
from spcxr.errors import SpcxrError

LABELS = "stage_2_train_labels.csv"
CLASSES = "stage_2_detailed_class_info.csv"
NIH_NAMES = "pneumonia-challenge-dataset-mappings_2018.json"
BOX = ("x", "y", "width", "height")
OPACITY = "Lung Opacity"


def matches(root: Path) -> bool:
    """Whether the folder holds the set's table of boxes."""
    return {"patientId", *BOX, "Target"} <= set(header_of(root / LABELS))


def index(root: Path) -> Manifest:
    """One row an image; its boxes are joined in a column ``boxes`` (``x y width height|...``).

    With ``stage_2_detailed_class_info.csv`` the labels are its three classes (``Normal``,
    ``No Lung Opacity / Not Normal``, ``Lung Opacity``), else ``Lung Opacity`` alone (``Target``).
    Age, sex and view come from the DICOM headers. The images are NIH's, whose patients RSNA's own
    list (`NIH_NAMES`) tells: where it lies beside the tables the patients are NIH's, so that both
    sets know one another's; else each image counts as a patient of its own, and a note says so.
    """
    table = root / LABELS
    if not table.is_file():
        raise SpcxrError(f"{root}: no {LABELS}; put the challenge's tables at its top")
    rows = read_table(table)
    need(rows, ("patientId", *BOX, "Target"), table)
    target: dict[str, str] = {}
    boxes: dict[str, list[str]] = {}
    for row, (image, value) in enumerate(zip(rows["patientId"], rows["Target"], strict=True)):
        if value not in {"0", "1"} or target.setdefault(image, value) != value:
            said = f"row {row + 2}, column 'Target' holds {value!r}"
            raise SpcxrError(f"{table}: {said}; an image is 1 or 0 in all its rows")
        boxes.setdefault(image, [])
        if value == "1":
            boxes[image].append(" ".join(rows[name][row] for name in BOX))
    on_disk = pictures_by_stem(walk(root))
    images = list(target)
    here, notes = here_of(images, on_disk, "rsna", table)
    kept = [images[row] for row in here]
    if not (root / NIH_NAMES).is_file():
        notes += (f"rsna: no {NIH_NAMES}, so each image counts as a patient of its own",)
    labels = _labels(root / CLASSES, kept, target)
    columns = {
        "path": [on_disk[image] for image in kept],
        "patient_id": _patients(root / NIH_NAMES, kept),
        "site": ["rsna"] * len(kept),
        "boxes": ["|".join(boxes[image]) for image in kept],
        **labels,
    }
    return Manifest.from_columns(
        columns, root=root, labels=tuple(labels), name=str(table), notes=notes
    )


def _patients(file: Path, images: list[str]) -> list[str]:
    """NIH's patients (``00000001_000.png`` is of patient 1), as `nih` names them."""
    named: dict[str, str] = {}
    if file.is_file():
        try:
            for entry in json.loads(file.read_text()):
                named[entry["subset_img_id"]] = entry["img_id"].partition("_")[0]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SpcxrError(
                f"{file}: no list of entries with 'subset_img_id' and 'img_id'; get it anew"
            ) from error
    return [f"nih-{named[image]}" if image in named else f"rsna-{image}" for image in images]


def _labels(table: Path, images: list[str], target: dict[str, str]) -> Columns:
    """The three classes of the detailed table, which must say of each image what the boxes do."""
    if not table.is_file():
        return {OPACITY: [target[image] for image in images]}
    rows = read_table(table)
    need(rows, ("patientId", "class"), table)
    of = dict(zip(rows["patientId"], rows["class"], strict=True))
    for image in images:
        if (of.get(image) == OPACITY) != (target[image] == "1"):
            raise SpcxrError(
                f"{table}: column 'class' of {image} is {of.get(image)!r}, but its Target in "
                f"{LABELS} is {target[image]}; get both tables anew"
            )
    return {name: [str(int(of[i] == name)) for i in images] for name in sorted(set(of.values()))}
