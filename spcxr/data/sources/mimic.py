"""MIMIC-CXR-JPG (Johnson et al., 2019; PhysioNet): tables of labels, views and the split."""

from __future__ import annotations

import re
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.chexpert import FINDINGS
from spcxr.data.sources.files import walk
from spcxr.data.sources.set_tables import here_of, need
from spcxr.data.tables import Columns, read_table
from spcxr.errors import SpcxrError

NAME = re.compile(r"mimic-cxr-.*-(chexpert|negbio|metadata|split)\.csv(\.gz)?")
LABELLERS = ("chexpert", "negbio")  # the first that is there: CheXpert's is the one papers use
SPLITS = {"train": "train", "validate": "val", "test": "test"}
VIEWS = {"LL": "LATERAL"}  # left lateral; the others are kept as the table has them


def matches(root: Path) -> bool:
    """Whether the folder holds the set's own tables."""
    return {"metadata", "split"} <= _tables(root).keys()


def index(root: Path) -> Manifest:
    """``files/p10/p10000032/s50414267/<dicom_id>.jpg`` with the official split by patient.

    Labels are those of the study, 1, 0, -1 (uncertain) or blank, by CheXpert's labeller where its
    table is there, else by NegBio's. Every view is kept (``view``); a study without a report has
    no labels.
    """
    tables = _tables(root)
    labeller = next((name for name in LABELLERS if name in tables), None)
    for name in ("metadata", "split"):
        if name not in tables:
            raise SpcxrError(f"{root}: no mimic-cxr-*-{name}.csv.gz; put the tables at its top")
    if labeller is None:
        raise SpcxrError(f"{root}: no mimic-cxr-*-chexpert.csv.gz (or -negbio); put it at its top")
    views = _read(tables["metadata"], ("dicom_id", "subject_id", "study_id", "ViewPosition"))
    split = _read(tables["split"], ("dicom_id", "split"))
    studies = _read(tables[labeller], ("study_id", *FINDINGS))
    on_disk = {Path(f).stem: f for f in walk(root) if f.lower().endswith((".jpg", ".png", ".dcm"))}
    here, notes = here_of(views["dicom_id"], on_disk, "mimic", tables["metadata"])
    kept = {name: [cells[row] for row in here] for name, cells in views.items()}
    notes += (f"mimic: labels by the {labeller} labeller",)
    columns = _columns(kept, on_disk, split, studies, tables["split"])
    return Manifest.from_columns(
        columns, root=root, labels=FINDINGS, name=str(tables[labeller]), notes=notes
    )


def _columns(
    rows: Columns, on_disk: dict[str, str], split: Columns, studies: Columns, where: Path
) -> Columns:
    of = dict(zip(split["dicom_id"], split["split"], strict=True))
    splits = [SPLITS.get(of.get(image, "")) for image in rows["dicom_id"]]
    if None in splits:
        image = rows["dicom_id"][splits.index(None)]
        raise SpcxrError(
            f"{where}: no split (train, validate, test) of {image}; get the table anew"
        )
    place = {study: row for row, study in enumerate(studies["study_id"])}
    at = [place.get(study) for study in rows["study_id"]]
    return {
        "path": [on_disk[image] for image in rows["dicom_id"]],
        "patient_id": [f"mimic-p{subject}" for subject in rows["subject_id"]],
        "split": [name or "" for name in splits],
        "view": [VIEWS.get(cell, cell) for cell in rows["ViewPosition"]],
        "site": ["mimic"] * len(at),
        **{name: ["" if row is None else studies[name][row] for row in at] for name in FINDINGS},
    }


def _read(table: Path, names: tuple[str, ...]) -> Columns:
    rows = read_table(table)
    need(rows, names, table)
    return {name: rows[name] for name in names}


def _tables(root: Path) -> dict[str, Path]:
    """Which of the set's tables are there, packed or unpacked; the last version of each."""
    found = [(NAME.fullmatch(file.name), file) for file in sorted(root.glob("mimic-cxr-*.csv*"))]
    return {match[1]: file for match, file in found if match}
