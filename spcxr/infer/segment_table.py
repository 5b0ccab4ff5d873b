"""``segment.csv``: one row a file, written as each is done, so that a stopped command goes on."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from spcxr.errors import SpcxrError
from spcxr.infer.measures import LEFT, LUNGS, RIGHT

TABLE, SETTINGS = "segment.csv", "segment.json"
DONE, REJECTED = "done", "rejected"
Row = dict[str, Any]


def columns(structures: tuple[str, ...]) -> tuple[str, ...]:
    """Of the table of a model; one of whole lungs has areas of both sides as well.

    >>> [name for name in columns(("heart",)) if name.startswith("area")]
    ['area_px_heart', 'area_mm2_heart']
    """
    areas = [
        f"area_{unit}_{name.replace(' ', '_')}"
        for unit in ("px", "mm2")
        for name in measured(structures)
    ]
    return (
        *("path", "name", "status", "reason", "flags", "notes"),
        *("mask", "overlay", "dicom_seg", "uncertainty_map"),
        *("height_px", "width_px", "spacing_row_mm", "spacing_column_mm", *areas),
        *("cardiothoracic_ratio", "uncertainty", "flip_dice"),
    )


def measured(structures: tuple[str, ...]) -> tuple[str, ...]:
    """Structures, and sides of whole lungs, in lower case.

    >>> measured(("Lung", "Heart"))
    ('lung', 'heart', 'right lung', 'left lung')
    """
    low = tuple(name.lower() for name in structures)
    whole = any(name in LUNGS for name in low)
    return (*low, *(side for side in (RIGHT, LEFT) if whole and side not in low))


@dataclass
class Table:
    """The open table. ``names`` are those of the files that are done or rejected, by path."""

    file: IO[str]
    columns: tuple[str, ...]
    names: dict[Path, str] = field(default_factory=dict)
    done: int = 0
    rejected: int = 0
    flagged: int = 0
    first_reason: str = ""

    def add(self, row: Row) -> None:
        """Write one row, and see to it that it is on the disk."""
        self.count(row)
        writer = csv.DictWriter(self.file, self.columns, restval="", lineterminator="\n")
        writer.writerow({name: _cell(value) for name, value in row.items()})
        self.file.flush()

    def count(self, row: Row) -> None:
        """Take a row into the counts."""
        self.names[Path(row["path"])] = row["name"]
        self.done += row["status"] == DONE
        self.rejected += row["status"] == REJECTED
        self.flagged += bool(row.get("flags"))
        if row["status"] == REJECTED:
            self.first_reason = self.first_reason or f"{row['path']}: {row['reason']}"


@contextmanager
def open_table(
    out: Path, structures: tuple[str, ...], settings: Mapping[str, Any]
) -> Iterator[Table]:
    """The table of ``out``, new or gone on with; no other process may have it open.

    A line that was cut short is dropped.

    Raises
    ------
    SpcxrError
        ``out`` is a file, is being written, or holds results of another model or other settings.
    """
    if out.exists() and not out.is_dir():
        raise SpcxrError(f"{out}: is a file; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with (out / TABLE).open("a+", newline="", encoding="utf-8", errors="surrogateescape") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SpcxrError(f"{out}: another process writes here; choose another --out") from error
        _refuse_others(out, dict(settings))
        table = Table(file, columns(structures))
        _go_on(file, table)
        yield table


def _refuse_others(out: Path, settings: dict[str, Any]) -> None:
    file = out / SETTINGS
    if not file.is_file():
        file.write_text(json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = json.loads(file.read_text())
        differing = [name for name in settings if before.get(name) != settings[name]]
    except (ValueError, AttributeError) as error:
        raise SpcxrError(f"{file}: is damaged; choose another --out") from error
    if differing:
        raise SpcxrError(
            f"{out}: holds results of other settings ({', '.join(differing)}); choose another --out"
        )


def _go_on(file: IO[str], table: Table) -> None:
    """Count the rows that are there; write the head where there are none."""
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind("\n") + 1]
    while whole.count('"') % 2:  # the cut is inside a name of two lines
        whole = whole[: whole.rfind("\n", 0, -1) + 1]
    if len(whole) < len(text):
        file.truncate(len(whole.encode("utf-8", "surrogateescape")))
    if not whole:
        csv.writer(file, lineterminator="\n").writerow(table.columns)
        file.flush()
        return
    for row in csv.DictReader(io.StringIO(whole, newline="")):
        table.count(row)


def _cell(value: Any) -> Any:
    """NaN and None are blank; figures have six digits.

    >>> _cell(math.nan), _cell(0.123456789), _cell(7)
    ('', '0.123457', 7)
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else value
