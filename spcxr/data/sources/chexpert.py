"""CheXpert (Irvin et al., AAAI 2019): ``train.csv``, ``valid.csv``, patients in the paths."""

from __future__ import annotations

import re
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.sources.set_tables import header_of, here_of, need, sex_of, with_validation
from spcxr.data.tables import Columns, read_table
from spcxr.errors import SpcxrError

FINDINGS = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
ABOUT = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
TABLES = ("train.csv", "valid.csv")
TESTS = ("test.csv", "test_labels.csv")  # released later; that of CheXlocalize has labels alone
# patient00001/study1/view1_frontal.jpg, whatever folders stand before it
TAIL = re.compile(r"(?P<patient>patient\d+)/study\d+/view\d+_(frontal|lateral)\.\w+$")


def matches(root: Path) -> bool:
    """Whether the folder holds one of the set's own tables."""
    return any({"Path", "Frontal/Lateral"} <= set(header_of(root / name)) for name in TABLES)


def index(root: Path) -> Manifest:
    """Every view of the tables, frontal and lateral; labels 1, 0, -1 (uncertain), blank.

    The folder is the one that holds the tables; images are known by their path from the patient
    on, so that the small set, the full one and its batches in folders are all read. ``view`` is
    ``AP``, ``PA`` or ``LATERAL`` (``FRONTAL`` where the projection is not said).

    Ours: without ``test.csv``, ``valid.csv`` is the split ``test`` (three radiologists labelled
    it, a program ``train.csv``), and an eighth of the training patients is ``val``, by hash. With
    ``test.csv`` (or ``test_labels.csv``) the three are ``train``, ``val`` and ``test``.
    """
    tables = [root / name for name in TABLES if (root / name).is_file()]
    if not tables:
        raise SpcxrError(f"{root}: no train.csv or valid.csv; put the set's tables at its top")
    tests = [root / name for name in TESTS if FINDINGS[0] in header_of(root / name)][:1]
    parts: Columns = {name: [] for name in ("Path", *ABOUT, *FINDINGS, "table")}
    for table in tables + tests:
        rows = read_table(table)
        need(rows, ("Path", *FINDINGS, *([] if table in tests else ABOUT)), table)
        blank = [""] * len(rows["Path"])
        for name in ("Path", *ABOUT, *FINDINGS):
            parts[name] += rows.get(name, blank)
        parts["table"] += [table.name] * len(blank)
    on_disk = {_tail(file): file for file in walk(root) if TAIL.search(file)}
    tails = [_tail(path) for path in parts["Path"]]
    here, notes = here_of(tails, on_disk, "chexpert", tables[0])
    kept = {name: [cells[row] for row in here] for name, cells in parts.items()}
    paths = [on_disk[tails[row]] for row in here]
    if not tests and TABLES[1] in kept["table"]:
        notes += ("chexpert: no test.csv, so valid.csv is the split test",)
    columns = _columns(kept, paths, bool(tests))
    return Manifest.from_columns(
        columns, root=root, labels=FINDINGS, name=str(tables[0]), notes=notes
    )


def _columns(rows: Columns, paths: list[str], held_out: bool) -> Columns:
    patients = [f"chexpert-{_patient(path)}" for path in paths]
    split = {"train.csv": "train" if held_out else "", "valid.csv": "val" if held_out else "test"}
    splits = [split.get(name, "test") for name in rows["table"]]
    sides = zip(paths, rows["AP/PA"], strict=True)
    return {
        "path": paths,
        "patient_id": patients,
        "split": with_validation(splits, patients),
        "view": [_view(path, projection) for path, projection in sides],
        "age": rows["Age"],
        "sex": [sex_of(cell) for cell in rows["Sex"]],
        "site": ["chexpert"] * len(paths),
        **{name: rows[name] for name in FINDINGS},
    }


def _tail(path: str) -> str:
    """From the patient on; a path without one as it is, which no file on disk has."""
    found = TAIL.search(path)
    return found[0] if found else path


def _patient(path: str) -> str:
    found = TAIL.search(path)
    return found["patient"] if found else ""


def _view(path: str, projection: str) -> str:
    """The manifest's word for a view; the file's name says the side.

    >>> _view("view1_frontal.jpg", "PA"), _view("view2_lateral.jpg", "")
    ('PA', 'LATERAL')
    >>> _view("view1_frontal.jpg", "")
    'FRONTAL'
    """
    side = Path(path).stem.rpartition("_")[2]
    return "LATERAL" if side == "lateral" else projection.upper() or side.upper()
