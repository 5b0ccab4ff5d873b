"""covid-chestxray-dataset (Cohen et al., 2020; ieee8023 on GitHub): ``metadata.csv``, images."""

from __future__ import annotations

from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.sources.set_tables import header_of, need
from spcxr.data.tables import read_table
from spcxr.errors import SpcxrError

NEEDED = ("patientid", "finding", "view", "modality", "folder", "filename")
FRONTAL = {"PA", "AP", "AP SUPINE", "AP ERECT"}
UNKNOWN = {"", "todo", "unknown"}


def matches(root: Path) -> bool:
    """Whether the folder holds the set's own table."""
    return set(NEEDED) <= set(header_of(root / "metadata.csv"))


def index(root: Path) -> Manifest:
    """Frontal radiographs of the table; CT and lateral views are left out, and counted in notes.

    ``Pneumonia/Viral/COVID-19`` gives the labels ``Pneumonia``, ``Viral`` and ``COVID-19``; a
    finding ``todo`` or ``Unknown`` is unknown in all of them.
    """
    table = root / "metadata.csv"
    rows = read_table(table)
    need(rows, NEEDED, table)
    count = len(rows["filename"])
    paths = [f"{f}/{n}" for f, n in zip(rows["folder"], rows["filename"], strict=True)]
    on_disk = set(walk(root))
    frontal = [rows["modality"][i].lower() == "x-ray" and rows["view"][i].upper() in FRONTAL
               for i in range(count)]  # fmt: skip
    here = [i for i in range(count) if frontal[i] and paths[i] in on_disk]
    if not here:
        raise SpcxrError(f"{root}: none of the frontal images in metadata.csv is below it")
    other, absent = count - sum(frontal), sum(frontal) - len(here)
    notes = [f"covid-chestxray: {other} CT and lateral images left out"] if other else []
    notes += [f"covid-chestxray: {absent} images of the table are not on disk"] if absent else []
    blank = [""] * count
    columns = {
        "path": paths,
        "patient_id": [f"covid-chestxray-{p}" if p else "" for p in rows["patientid"]],
        "view": [view.upper() for view in rows["view"]],
        "age": rows.get("age", blank),
        "sex": rows.get("sex", blank),
        "site": ["covid-chestxray"] * count,
        "label": [_findings(cell) for cell in rows["finding"]],
    }
    kept = {key: [cells[i] for i in here] for key, cells in columns.items()}
    return Manifest.from_columns(kept, root=root, name=str(table), notes=tuple(notes))


def _findings(cell: str) -> str:
    """One finding cell as ``|``-joined labels.

    >>> _findings("Pneumonia/Viral/COVID-19"), _findings("COVID-19, ARDS"), _findings("todo")
    ('Pneumonia|Viral|COVID-19', 'COVID-19|ARDS', '')
    """
    parts = [part.strip() for part in cell.replace(",", "/").split("/")]
    return "|".join(part for part in parts if part.lower() not in UNKNOWN)
