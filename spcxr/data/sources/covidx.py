"""COVIDx (Wang et al., Sci Rep 2020; COVID-Net on GitHub, Kaggle): lists of train and test."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from spcxr.data.manifest import Manifest
from spcxr.data.sources.files import walk
from spcxr.data.sources.set_tables import here_of, with_validation
from spcxr.data.tables import Columns
from spcxr.errors import SpcxrError

CLASSES = {"normal", "pneumonia", "COVID-19"}  # the lists of A; those of B are positive, negative
POSITIVE = {"positive": "1", "negative": "0"}
FOLDERS = ("", "labels")
SPLITS = {"train": "", "val": "val", "test": "test"}  # of training, an eighth is val where no list
RENAMED = {"rnsa": "rsna"}  # in the lists of COVIDx9
# Collections whose own readers name these very patients: its script takes their ids over. So a
# patient who is in both sets is one.
OWN_READERS = {"cohen": "covid-chestxray", "rsna": "rsna"}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
Row = tuple[str, str, str, str]  # patient, file, class, source


def matches(root: Path) -> bool:
    """Whether the folder holds the set's lists, a training one among them."""
    return any(_first(file) is not None for file in _lists(root, "train"))


def index(root: Path) -> Manifest:
    """``patientid filename class source`` a line, separated by spaces; images in any folders.
    (Some lists have no source in some lines.)

    The lists of A (normal, pneumonia, COVID-19) give three labels, those of B (positive, negative)
    the label ``COVID-19``. ``site`` is the collection an image came from (``covidx-rsna``): most
    classes come from collections of their own, so look at the results by site. Patients of
    covid-chestxray-dataset and of RSNA (without its list of NIH's) are called what those sets'
    readers call them. Where no ``val`` list is there, an eighth of the training patients is
    ``val``, by hash.
    """
    rows: list[Row] = []
    splits: list[str] = []
    first: Path | None = None
    for name, split in SPLITS.items():
        lists = [file for file in _lists(root, name) if _first(file) is not None]
        if len(lists) > 1:
            said = " and ".join(str(file.relative_to(root)) for file in lists[:2])
            raise SpcxrError(f"{root}: {said} are two {name} lists; keep those of one version")
        if lists:
            first = first or lists[0]
            found = _read(lists[0])
            rows += found
            splits += [split] * len(found)
    if first is None:
        raise SpcxrError(f"{root}: no train*.txt with lines 'patientid filename class source'")
    if "val" in splits:
        splits = [split or "train" for split in splits]
    on_disk = {Path(file).name: file for file in walk(root)}
    here, notes = here_of([row[1] for row in rows], on_disk, "covidx", first)
    return _manifest(
        root, first, [rows[i] for i in here], [splits[i] for i in here], on_disk, notes
    )


def _manifest(
    root: Path,
    first: Path,
    rows: list[Row],
    splits: list[str],
    on_disk: dict[str, str],
    notes: tuple[str, ...],
) -> Manifest:
    # A number such as 3 is a patient of one collection, and another of the next.
    patients = [
        _joined(OWN_READERS.get(source) or _joined("covidx", source), patient)
        for patient, _, _, source in rows
    ]
    classes = [row[2] for row in rows]
    columns: Columns = {
        "path": [on_disk[row[1]] for row in rows],
        "patient_id": patients,
        "split": with_validation(splits, patients),
        "site": [sys.intern(_joined("covidx", row[3])) for row in rows],
    }
    labels: tuple[str, ...] = ("COVID-19",)
    if set(classes) <= POSITIVE.keys():
        columns["COVID-19"] = [POSITIVE[name] for name in classes]
    elif set(classes) <= CLASSES:
        labels = tuple(sorted(CLASSES))
        columns |= {label: [str(int(label == name)) for name in classes] for label in labels}
    else:
        odd = next(name for name in classes if name not in CLASSES)
        raise SpcxrError(
            f"{first}: class {odd!r} is none of {', '.join(sorted(CLASSES))}, and the lists of A "
            "and B (positive, negative) are not mixed; keep the lists of one"
        )
    return Manifest.from_columns(columns, root=root, labels=labels, name=str(first), notes=notes)


def _joined(*parts: str) -> str:
    return "-".join(filter(None, parts))


def _read(file: Path) -> list[Row]:
    """The lines of a list; one that stands twice (COVIDx4 has one) counts once."""
    rows: dict[Row, None] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        if (row := _parse(line)) is None:
            raise SpcxrError(
                f"{file}: line {number} is not 'patientid filename class source', separated by "
                "spaces; get the list anew"
            )
        rows[row] = None
    return list(rows)


def _parse(line: str) -> Row | None:
    """A line from its end: what stands before the file name is the patient.

    Lists up to COVIDx7 leave out the source of some lines: of RSNA's, which are named by UUIDs.

    >>> _parse("3 SARS-Fig8a-day0.jpeg pneumonia cohen")
    ('3', 'SARS-Fig8a-day0.jpeg', 'pneumonia', 'cohen')
    >>> _parse("a b.png normal"), _parse("patientid filename class source")
    (('a', 'b.png', 'normal', ''), None)
    """
    words = line.split()
    known = {*CLASSES, *POSITIVE}
    if words and words[-1] in known:
        words.append("rsna" if UUID.fullmatch(words[0]) else "")
    if len(words) < 4 or "." not in words[-3] or words[-2] not in known:
        return None
    source = RENAMED.get(words[-1], words[-1])
    return " ".join(words[:-3]), words[-3], words[-2], source


def _first(file: Path) -> Row | None:
    try:
        with file.open(encoding="utf-8-sig", errors="replace") as lines:
            return _parse(lines.readline(1000))
    except OSError:
        return None  # a folder, or not ours to read


def _lists(root: Path, name: str) -> list[Path]:
    return [file for folder in FOLDERS for file in sorted((root / folder).glob(f"{name}*.txt"))]
