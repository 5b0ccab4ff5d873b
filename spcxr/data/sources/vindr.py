"""VinDr-CXR (Nguyen et al., Sci Data 2022; PhysioNet, Kaggle): three radiologists an image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.sources.set_tables import (
    header_of,
    here_of,
    need,
    pictures_by_stem,
    with_validation,
)
from spcxr.data.tables import Columns, read_table
from spcxr.errors import SpcxrError

# Kaggle's table of boxes, and PhysioNet's of boxes and of whole images; the test set has one reader
# (five radiologists' consensus), and so no rad_id.
FOLDERS = ("", "annotations/")
GLOBAL = {"image_labels_train.csv": "", "image_labels_test.csv": "test"}
LOCAL = {"train.csv": "", "annotations_train.csv": "", "annotations_test.csv": "test"}
RENAMED = {"Other disease": "Other diseases"}  # train and test spell it so

Votes = dict[str, dict[str, set[str]]]  # image -> label -> its readers who found it
Readers = dict[str, set[str]]


def matches(root: Path) -> bool:
    """Whether the folder holds one of the set's tables."""
    if any(header_of(file)[:1] == ["image_id"] for file, _ in _tables(root, GLOBAL)):
        return True
    wanted = {"image_id", "class_name", "x_min"}
    return any(wanted <= set(header_of(file)) for file, _ in _tables(root, LOCAL))


def index(root: Path) -> Manifest:
    """One row an image, labels by vote: ``train/<image_id>.dicom`` and ``test/``.

    PhysioNet's tables of whole images (28 labels) are read where they are there, else the boxes:
    a class a radiologist drew a box of, or ``No finding``. Ours: 1 where more than half of an
    image's readers found it, 0 where none did, -1 (uncertain) between. The set names no patients,
    so each image counts as one; an eighth of the training images is ``val``, by hash.
    """
    tables = _tables(root, GLOBAL) or _tables(root, LOCAL)
    if not tables:
        raise SpcxrError(
            f"{root}: no annotations/image_labels_train.csv (PhysioNet) or train.csv (Kaggle); "
            "put the set's tables there"
        )
    votes: Votes = {}
    readers: Readers = {}
    splits: dict[str, str] = {}
    for table, split in tables:
        for image, reader, found in _rows(table):
            readers.setdefault(image, set()).add(reader)
            for name in found:
                votes.setdefault(image, {}).setdefault(name, set()).add(reader)
            splits[image] = split
    on_disk = pictures_by_stem(walk(root))
    images = list(readers)
    here, notes = here_of(images, on_disk, "vindr", tables[0][0])
    kept = [images[row] for row in here]
    labels = sorted({name for found in votes.values() for name in found})
    patients = [f"vindr-{image}" for image in kept]
    columns: Columns = {
        "path": [on_disk[image] for image in kept],
        "patient_id": patients,
        "split": with_validation([splits[image] for image in kept], patients),
        "site": ["vindr"] * len(kept),
    }
    for name in labels:
        columns[name] = [
            verdict(len(votes.get(image, {}).get(name, ())), len(readers[image])) for image in kept
        ]
    return Manifest.from_columns(
        columns, root=root, labels=labels, name=str(tables[0][0]), notes=notes
    )


def verdict(found: int, readers: int) -> str:
    """The label of an image that ``found`` of its ``readers`` found.

    >>> [verdict(n, 3) for n in range(4)], verdict(1, 1)
    (['0', '-1', '1', '1'], '1')
    """
    return "1" if 2 * found > readers else "-1" if found else "0"


def _rows(table: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(image, reader, what the row finds) of either kind of table."""
    rows = read_table(table)
    whole = table.name in GLOBAL
    need(rows, ("image_id",) if whole else ("image_id", "class_name"), table)
    if "test" not in table.name:
        need(rows, ("rad_id",), table)
    readers = rows.get("rad_id", ["consensus"] * len(rows["image_id"]))
    if not whole:
        for image, reader, name in zip(rows["image_id"], readers, rows["class_name"], strict=True):
            yield image, reader, [RENAMED.get(name, name)]
        return
    names = [name for name in rows if name not in {"image_id", "rad_id"}]
    for row, (image, reader) in enumerate(zip(rows["image_id"], readers, strict=True)):
        for name in names:
            if rows[name][row] not in {"0", "1", "0.0", "1.0"}:
                said = f"row {row + 2}, column {name!r} holds {rows[name][row]!r}"
                raise SpcxrError(f"{table}: {said}; a radiologist says 1 or 0")
        found = [name for name in names if float(rows[name][row])]
        yield image, reader, [RENAMED.get(name, name) for name in found]


def _tables(root: Path, names: dict[str, str]) -> list[tuple[Path, str]]:
    """Those of the tables that are there, with the split their images are in."""
    found = [(root / (folder + n), split) for folder in FOLDERS for n, split in names.items()]
    return [(file, split) for file, split in found if file.is_file()]
