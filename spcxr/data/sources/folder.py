"""A plain folder of images, at any depth: DICOM, PNG, JPEG, TIFF, told apart by content."""

from __future__ import annotations

import sys
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.paths import Inside
from spcxr.data.sources.files import walk
from spcxr.errors import SpcxrError

# Kermany et al., Cell 2018 (paediatric pneumonia) and its many followers: train/NORMAL/x.jpeg
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def index(root: Path, *, class_folders: bool = False) -> Manifest:
    """Every file below ``root`` that is not hidden, one row each.

    Patient, view, age and sex come from the DICOM headers when the files are read. Where *every*
    file stands at ``<split>/<class>/...`` with the split called train, val or test, both are taken
    from the folders; with ``class_folders`` the folder a file stands in is its class.

    Raises
    ------
    SpcxrError
        No file, or ``class_folders`` with a file that stands in no sub-folder.
    """
    found, inside = walk(root), Inside(root)
    files = [file for file in found if inside.relative(file) is not None]
    if not files:
        raise SpcxrError(f"{root}: no files in this folder; give one that holds images")
    columns = {"path": files}
    notes: tuple[str, ...] = ()
    if away := len(found) - len(files):
        notes += (f"{root.name}: {away} links that lead out of the folder were left out",)
    if all(file.count("/") >= 2 and _top(file).lower() in SPLIT_FOLDERS for file in files):
        columns["split"] = [_split(_top(file)) for file in files]
        columns["label"] = [sys.intern(file.split("/")[1]) for file in files]
        notes += (f"{root.name}: split and class taken from the folders' names",)
    elif class_folders:
        for file in files:
            if "/" not in file:
                raise SpcxrError(f"{root}: {file} stands in no class folder; move it into one")
        columns["label"] = [sys.intern(file.split("/")[-2]) for file in files]
        notes += (f"{root.name}: class taken from the folders' names",)
    return Manifest.from_columns(columns, root=root, name=str(root), notes=notes)


def _top(file: str) -> str:
    return file.partition("/")[0]


def _split(folder: str) -> str:
    low = folder.lower()
    return "val" if low.startswith("val") else "train" if low.startswith("train") else "test"
