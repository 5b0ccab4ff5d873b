"""A table with a row a file, written as each is done, so that a stopped command goes on."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from spcxr.errors import SpcxrError

DONE, REJECTED = "done", "rejected"
Row = dict[str, Any]


@dataclass
class Counts:
    """How many files are done. ``names`` are those of all that have a row, by path."""

    names: dict[Path, str] = field(default_factory=dict, kw_only=True)
    done: int = field(default=0, kw_only=True)
    rejected: int = field(default=0, kw_only=True)
    flagged: int = field(default=0, kw_only=True)
    first_reason: str = field(default="", kw_only=True)

    def add(self, row: Row) -> None:
        """Take a row."""
        self.count(row)

    def has(self, path: Path) -> bool:
        """Whether a file has a row."""
        return path in self.names

    def count(self, row: Row) -> None:
        """Take a row into the counts."""
        self.names[Path(row["path"])] = row.get("name", "")
        self.done += row["status"] == DONE
        self.rejected += row["status"] == REJECTED
        self.flagged += bool(row.get("flags"))
        if row["status"] == REJECTED:
            self.first_reason = self.first_reason or f"{row['path']}: {row['reason']}"


@dataclass
class Table(Counts):
    """The open table; figures are written with so many ``digits``."""

    file: IO[str]
    columns: tuple[str, ...]
    digits: int = 6

    def add(self, row: Row) -> None:
        """Write one row, and see to it that it is on the disk; what has no column is left out."""
        self.count(row)
        self.file.write(csv_line(cell(row.get(name), self.digits) for name in self.columns))
        self.file.flush()


@contextmanager
def open_table(
    file: Path,
    columns: tuple[str, ...],
    settings: Mapping[str, Any],
    *,
    kept: Path,
    digits: int = 6,
) -> Iterator[Table]:
    """The CSV ``file``, new or gone on with; no other process may have it open.

    A line that was cut short is dropped. ``settings`` are kept in the file ``kept``. Without a row
    neither file stays.

    Raises
    ------
    SpcxrError
        ``file`` is being written, is another table, or holds results of another model or other
        settings.
    """
    if file.parent.exists() and not file.parent.is_dir():
        raise SpcxrError(f"{file.parent}: is a file; choose another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        lock(opened, file)
        if opened.tell() and not kept.is_file():
            raise SpcxrError(f"{file}: is not of this command; choose another --out")
        refuse_others(kept, dict(settings))
        table = Table(opened, columns, digits)
        _go_on(opened, table)
        try:
            yield table
        finally:
            if not table.names:  # nothing to go on with, nor to be of other settings
                file.unlink(missing_ok=True)
                kept.unlink(missing_ok=True)


def lock(file: IO[Any], out: Path) -> None:
    """Keep other processes out of ``out`` as long as ``file`` is open.

    Raises
    ------
    SpcxrError
        one is there already.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise SpcxrError(f"{out}: another process writes here; choose another --out") from error


def refuse_others(kept: Path, settings: dict[str, Any]) -> None:
    """Write ``settings`` to ``kept``, or compare them with those that are there.

    Raises
    ------
    SpcxrError
        others are there.
    """
    if not kept.is_file():
        kept.write_text(json.dumps(settings, indent=2) + "\n")
        return
    try:
        before = json.loads(kept.read_text())
        differing = [name for name in settings if before.get(name) != settings[name]]
    except (ValueError, AttributeError) as error:
        raise SpcxrError(f"{kept}: is damaged; choose another --out") from error
    if differing:
        raise SpcxrError(
            f"{kept}: what is there holds results of other settings ({', '.join(differing)}); "
            "choose another --out"
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
        file.write(csv_line(table.columns))
        file.flush()
        return
    for row in csv.DictReader(io.StringIO(whole, newline="")):
        table.count(row)


def csv_line(cells: Iterable[Any]) -> str:
    r"""A line of a CSV.

    >>> csv_line(["a\rb.png", 1])
    '"a\rb.png",1\n'
    """
    made = io.StringIO()
    # What is part of the line's end is quoted: by "\n" alone a "\r" in a name would end the row.
    csv.writer(made, lineterminator="\r\n").writerow(cells)
    return made.getvalue()[:-2] + "\n"


def cell(value: Any, digits: int = 6) -> Any:
    """NaN and None are blank; figures have six digits, or as many as are asked for.

    >>> cell(math.nan), cell(0.123456789), cell(7), cell(0.123456789, 9)
    ('', '0.123457', 7, '0.123456789')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.{digits}g}" if isinstance(value, float) else value
