"""What the readers of public sets share: their tables, what is on disk, what is held out."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path

from spcxr.data.splits import hash_split
from spcxr.data.tables import Columns
from spcxr.errors import SpcxrError

# Of the patients that an official list leaves for training: train, val. 70 / 10 / 20 % with a
# fifth held out for test, as NIH's paper has it.
TRAIN_VAL = (7 / 8, 1 / 8, 0.0)
SEXES = {"female": "F", "male": "M", "f": "F", "m": "M"}
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")


def header_of(file: Path) -> list[str]:
    """The column names of a CSV (or .csv.gz), without the spaces around; none where unreadable.

    Enough to know a set by, where reading the whole table would take seconds.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile("w", suffix=".csv") as table:
    ...     _ = table.write("ImageId, EncodedPixels\\n")
    ...     table.flush()
    ...     header_of(Path(table.name))
    ['ImageId', 'EncodedPixels']
    """
    if not file.is_file():
        return []
    opened = gzip.open if file.suffix == ".gz" else open
    try:
        with opened(file, "rt", newline="", encoding="utf-8-sig") as lines:
            return [cell.strip() for cell in next(csv.reader(lines), [])]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error):
        return []  # another kind of file; whoever reads it in full says what is wrong


def need(rows: Columns, names: Iterable[str], table: Path) -> None:
    """Refuse a table that lacks one of these columns.

    >>> need({"Path": []}, ["Path", "Sex"], Path("train.csv"))
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: train.csv: no column 'Sex'; it is not the set's own table (it has ...
    """
    for name in names:
        if name not in rows:
            found = ", ".join(list(rows)[:8])
            raise SpcxrError(
                f"{table}: no column {name!r}; it is not the set's own table (it has {found})"
            )


def sex_of(cell: str) -> str:
    """``F``, ``M`` or ``""``.

    >>> sex_of("Female"), sex_of("M"), sex_of("Unknown")
    ('F', 'M', '')
    """
    return SEXES.get(cell.lower(), "")


def pictures_by_stem(files: Iterable[str]) -> dict[str, str]:
    """File name without suffix -> path, of what may be an image; the first of several is kept.

    >>> pictures_by_stem(["train/a.dicom", "train.csv"])
    {'a': 'train/a.dicom'}
    """
    made: dict[str, str] = {}
    for file in files:
        name = file.rpartition("/")[2]
        stem, dot, suffix = name.rpartition(".")
        if dot + suffix.lower() in PICTURES:
            made.setdefault(stem, file)
    return made


def here_of(
    wanted: Sequence[str], on_disk: dict[str, str], name: str, table: Path
) -> tuple[list[int], tuple[str, ...]]:
    """Rows whose image is on this disk, and a note of how many are not (people keep a part).

    Raises
    ------
    SpcxrError
        none of the table's images is there.

    >>> here_of(["a", "b"], {"b": "x/b.png"}, "nih", Path("t.csv"))
    ([1], ('nih: 1 images of the table are not on disk',))
    """
    here = [row for row, key in enumerate(wanted) if key in on_disk]
    if not here:
        raise SpcxrError(f"{table}: none of its images is below {table.parent}; unpack them there")
    absent = len(wanted) - len(here)
    return here, (f"{name}: {absent} images of the table are not on disk",) if absent else ()


def with_validation(splits: Sequence[str], patients: Sequence[str]) -> list[str]:
    """Blank splits as train or val by the patient's hash (`TRAIN_VAL`); the others as they are.

    >>> with_validation(["test", ""], ["a", "b"])
    ['test', 'train']
    """
    pairs = zip(splits, patients, strict=True)
    return [split or hash_split(patient, TRAIN_VAL) for split, patient in pairs]
