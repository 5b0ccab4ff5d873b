"""A table as people keep them (CSV as Excel or pandas wrote it, or Parquet) -> columns of text."""

from __future__ import annotations

import csv
import gzip
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spcxr.errors import SpcxrError

Columns = dict[str, list[str]]
AGE = re.compile(r"(\d+(?:\.\d+)?)([YMWD+]?)")
OLDEST = 120.0
MOST_KNOWN = 4096
AGE_UNITS = {"": 1, "+": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}


def read_table(path: str | Path) -> Columns:
    """Column name -> cells as stripped text; ``""`` is blank. The suffix ``.parquet`` decides.

    A ``.csv.gz`` is unpacked on the way.

    Byte-order marks, spaces around names and cells, blank lines and pandas' unnamed blank columns
    are taken as meant. Semicolons or tabs between the cells, ragged rows and doubled names are
    refused: guessing there would shift labels.

    Raises
    ------
    SpcxrError
        The file cannot be read as such a table; the line names the row and the remedy.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "m.csv")
    ...     _ = file.write_text("\\ufeffpath , normal\\na.png, 1\\n", encoding="utf-8")
    ...     read_table(file)
    {'path': ['a.png'], 'normal': ['1']}
    """
    path = Path(path)
    if not path.is_file():
        raise SpcxrError(f"{path}: no such file; check the manifest's path")
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)


def _read_csv(path: Path) -> Columns:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", newline="", encoding="utf-8-sig") as file:
            return _columns(path, csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SpcxrError(
            f"{path}: not a UTF-8 CSV ({error}); save it again as UTF-8 CSV"
        ) from error
    except (OSError, EOFError) as error:  # a torn .gz ends too early
        said = getattr(error, "strerror", None) or error
        raise SpcxrError(f"{path}: cannot be read ({said}); check it") from error


def _columns(path: Path, lines: Iterable[list[str]]) -> Columns:
    stripped = ([cell.strip() for cell in line] for line in lines)
    rows = (row for row in stripped if any(row))
    header = next(rows, [])
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and mark in header[0]:
            raise SpcxrError(f"{path}: cells are separated by {name}; save it with commas")
    columns: list[list[str]] = [[] for _ in header]
    known: dict[str, str] = {}  # cells that recur are one string: most of a large table's memory
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise SpcxrError(
                f"{path}: row {number} has {len(row)} cells, the header {len(header)}; "
                "put cells that hold commas in double quotes"
            )
        for cells, cell in zip(columns, row, strict=True):
            if len(known) < MOST_KNOWN:
                known.setdefault(cell, cell)
            cells.append(known.get(cell, cell))
    if not columns or not columns[0]:
        raise SpcxrError(f"{path}: no rows below the header; a manifest needs one row an image")
    return _named(path, header, columns)


def _read_parquet(path: Path) -> Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        line = str(error).splitlines()[0]
        raise SpcxrError(f"{path}: not a readable Parquet file ({line}); write it again") from error
    if not table.num_rows:
        raise SpcxrError(f"{path}: no rows; a manifest needs one row an image")
    cells = [[_text(value) for value in column.to_pylist()] for column in table.columns]
    return _named(path, [name.strip() for name in table.column_names], cells)


def _text(value: Any) -> str:
    """A Parquet value as the text a CSV would hold: whole floats lose their ``.0``."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _named(path: Path, names: list[str], columns: list[list[str]]) -> Columns:
    made: Columns = {}
    for number, (name, cells) in enumerate(zip(names, columns, strict=True), start=1):
        if not name and not any(cells):
            continue  # a trailing comma, as in NIH's own file
        if not name:
            raise SpcxrError(f"{path}: column {number} has no name; name it in the header")
        if name in made:
            raise SpcxrError(f"{path}: column {name!r} stands twice; rename one")
        made[name] = cells
    return made


def years(cell: str) -> float | None:
    """An age cell in years: a number, ``67+`` (at least), or a DICOM age string (PS3.5, VR AS).

    None for what is none, or is over `OLDEST` (999 and 1950 stand for unknown and a birth year).

    >>> years("61"), years("67+"), years("058Y"), years("006M"), years("old"), years("999")
    (61.0, 67.0, 58.0, 0.5, None, None)
    """
    parts = AGE.fullmatch(cell)
    made = float(parts[1]) / AGE_UNITS[parts[2]] if parts else None
    return made if made is not None and made <= OLDEST else None
