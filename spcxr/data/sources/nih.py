"""NIH ChestX-ray14 (Wang et al., CVPR 2017): ``Data_Entry_2017*.csv`` and PNG folders."""

from __future__ import annotations

from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.splits import hash_split
from spcxr.data.tables import Columns, read_table
from spcxr.errors import SpcxrError

# In the order of the official lists "00000001_000.png 0 1 0 ...".
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
# 70 / 10 / 20 % as in the paper, once the official 20 % for test are taken out.
TRAIN_VAL = (7 / 8, 1 / 8, 0.0)
LISTS = {"train_val_list.txt": "", "test_list.txt": "test"}


def matches(root: Path) -> bool:
    """Whether the folder holds the set's own table."""
    return _table(root) is not None


def index(root: Path) -> Manifest:
    """The set as downloaded: the table at the top, images in any folders below.

    Images in the table but not on this disk are left out and counted in the notes (people keep a
    few of the twelve archives). The official ``test_list.txt`` is kept where present; its other
    patients are split 7 : 1 into train and val by hash.
    """
    table = _table(root)
    if table is None:
        raise SpcxrError(f"{root}: no Data_Entry_2017*.csv; put the set's table at its top")
    rows = read_table(table)
    needed = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender")
    for name in (*needed, "View Position"):
        if name not in rows:
            raise SpcxrError(f"{table}: no column {name!r}; it is not the set's own table")
    on_disk = {Path(file).name: file for file in walk(root) if file.lower().endswith(".png")}
    here = [i for i, name in enumerate(rows["Image Index"]) if name in on_disk]
    if not here:
        raise SpcxrError(f"{root}: none of the images in {table.name} is below it; unpack them")
    kept = {key: [cells[i] for i in here] for key, cells in rows.items()}
    absent = len(rows["Image Index"]) - len(here)
    notes = (f"nih: {absent} images of the table are not on disk",) if absent else ()
    columns = _columns(kept, on_disk, _official(root))
    return Manifest.from_columns(columns, root=root, labels=FINDINGS, name=str(table), notes=notes)


def _columns(rows: Columns, on_disk: dict[str, str], official: dict[str, str]) -> Columns:
    patients = [f"nih-{patient.zfill(8)}" for patient in rows["Patient ID"]]
    splits = [official.get(name, "") for name in rows["Image Index"]]
    if official:
        pairs = zip(splits, patients, strict=True)
        splits = [split or hash_split(patient, TRAIN_VAL) for split, patient in pairs]
    found = [set(cell.split("|")) for cell in rows["Finding Labels"]]
    return {
        "path": [on_disk[name] for name in rows["Image Index"]],
        "patient_id": patients,
        "split": splits,
        "view": rows["View Position"],
        "age": rows["Patient Age"],
        "sex": rows["Patient Gender"],
        "site": ["nih"] * len(patients),
        **{name: [str(int(name in labels)) for labels in found] for name in FINDINGS},
    }


def _official(root: Path) -> dict[str, str]:
    """File name -> split of the official lists (``""`` = train or val)."""
    made: dict[str, str] = {}
    for file, split in LISTS.items():
        if (root / file).is_file():
            lines = (root / file).read_text().split("\n")
            made |= {line.split()[0]: split for line in lines if line.strip()}
    return made


def _table(root: Path) -> Path | None:
    tables = sorted(root.glob("Data_Entry_2017*.csv"))
    return tables[-1] if tables else None  # the 2020 revision where both are there
