"""NIH ChestX-ray14 (Wang et al., CVPR 2017): ``Data_Entry_2017*.csv`` and PNG folders."""

from __future__ import annotations

import re
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.sources.set_tables import here_of, need, with_validation
from spcxr.data.tables import Columns, read_table
from spcxr.errors import SpcxrError

# In the order of the lists with labels: "00000001_000.png 0 1 0 ...".
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
NEEDED = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender")
# The official lists, and those that CheXNet's followers and medical_mae train by.
LISTS = {
    "train_val_list.txt": "",
    "test_list.txt": "test",
    **{f"{name}_{kind}.txt": name for name in ("train", "val") for kind in ("list", "official")},
    "test_official.txt": "test",
}
NAME = re.compile(r"\d{8}_\d{3}\.png")
Listed = dict[str, tuple[str, list[str]]]  # image -> split ("" = train or val), label cells


def matches(root: Path) -> bool:
    """Whether the folder holds the set's own table, or lists with its labels."""
    return _table(root) is not None or any(cells for _, cells in _listed(root).values())


def index(root: Path) -> Manifest:
    """The set as downloaded: the table at the top, images in any folders below.

    Images in the table but not on this disk are left out and counted in the notes (people keep a
    few of the twelve archives). The official ``test_list.txt`` is kept where present; its other
    patients are split 7 : 1 into train and val by hash, unless a list of each is there.

    Without the table, lists that hold labels (``00000001_000.png 0 1 0 ...``) are read alone; then
    nothing is known of view, age and sex.
    """
    table, listed = _table(root), _listed(root)
    if table is not None:
        rows = read_table(table)
        need(rows, (*NEEDED, "View Position"), table)
    elif any(cells for _, cells in listed.values()):
        table, rows = _with_labels(root, listed)
    else:
        raise SpcxrError(f"{root}: no Data_Entry_2017*.csv; put the set's table at its top")
    on_disk = {Path(file).name: file for file in walk(root) if file.lower().endswith(".png")}
    here, notes = here_of(rows["Image Index"], on_disk, "nih", table)
    kept = {key: [cells[i] for i in here] for key, cells in rows.items()}
    columns = _columns(kept, on_disk, {name: split for name, (split, _) in listed.items()})
    return Manifest.from_columns(columns, root=root, labels=FINDINGS, name=str(table), notes=notes)


def _columns(rows: Columns, on_disk: dict[str, str], official: dict[str, str]) -> Columns:
    patients = [f"nih-{patient.zfill(8)}" for patient in rows["Patient ID"]]
    splits = [official.get(name, "") for name in rows["Image Index"]]
    if official:
        splits = with_validation(splits, patients)
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


def _listed(root: Path) -> Listed:
    """Every image of the lists that are there, with its split and, where they have any, labels."""
    made: Listed = {}
    for file, split in LISTS.items():
        if (root / file).is_file():
            lines = (root / file).read_text(errors="replace").splitlines()
            words = [line.split() for line in lines]
            made |= {row[0]: (split, row[1:]) for row in words if row and NAME.fullmatch(row[0])}
    return made


def _with_labels(root: Path, listed: Listed) -> tuple[Path, Columns]:
    """The columns of the set's table, as far as lists with labels tell them, and one such list."""
    table = next(root / file for file in LISTS if (root / file).is_file())
    findings = []
    for image, (_, cells) in listed.items():
        if len(cells) != len(FINDINGS) or not set(cells) <= {"0", "1"}:
            raise SpcxrError(
                f"{table.parent}: a list gives {image} {len(cells)} labels; lists without "
                f"Data_Entry_2017*.csv must give {len(FINDINGS)} of 0 or 1, or put that table there"
            )
        findings.append([name for name, cell in zip(FINDINGS, cells, strict=True) if cell == "1"])
    blank = [""] * len(listed)
    return table, {
        "Image Index": list(listed),
        "Finding Labels": ["|".join(names) for names in findings],
        "Patient ID": [image.partition("_")[0] for image in listed],
        **dict.fromkeys(("Patient Age", "Patient Gender", "View Position"), blank),
    }


def _table(root: Path) -> Path | None:
    tables = sorted(root.glob("Data_Entry_2017*.csv"))
    return tables[-1] if tables else None  # the 2020 revision where both are there
