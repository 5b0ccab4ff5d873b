"""Rows and vectors of many files, kept in parts as they are made and joined at the end.

A part is a parquet file that is written whole or not at all, so that a stopped command goes on
behind the last one; neither writing nor joining holds more than one part in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spcxr.errors import SpcxrError
from spcxr.infer.result_table import Counts, Row, lock, refuse_others

ROWS, BYTES = 1024, 2**26  # of a part, at most
SETTINGS, LOCK = "settings.json", "lock"


@dataclass
class Parts(Counts):
    """What is kept in ``folder``: rows of the schema's columns, in order; vectors may be null."""

    folder: Path
    schema: Any
    waiting: list[Row] = field(default_factory=list)
    bytes: int = 0
    kept: int = 0

    def add(self, row: Row) -> None:
        """Take one row; every so often a part is written."""
        row = row | {"path": as_text(row["path"])}
        self.count(row)
        self.waiting.append({name: row.get(name) for name in self.schema.names})
        self.bytes += sum(v.nbytes for v in row.values() if isinstance(v, np.ndarray))
        if len(self.waiting) >= ROWS or self.bytes >= BYTES:
            self.flush()

    def has(self, path: Path) -> bool:
        """Whether a file has a row."""
        return Path(as_text(str(path))) in self.names

    def flush(self) -> None:
        """Write what waits as a part."""
        if not self.waiting:
            return
        columns = [
            pa.array([row[name] for row in self.waiting], type=self.schema.field(name).type)
            for name in self.schema.names
        ]
        draft = self.folder / ".writing"
        pq.write_table(pa.Table.from_arrays(columns, schema=self.schema), draft, compression="zstd")
        draft.replace(self.folder / f"{self.kept:09d}.parquet")
        self.kept += len(self.waiting)
        self.waiting, self.bytes = [], 0

    def tables(self) -> Iterator[Any]:
        """The parts, in order, each a `pyarrow.Table`."""
        for file in self._files():
            yield pq.read_table(file, schema=self.schema)

    def recount(self) -> None:
        """Take what earlier runs have kept into the counts.

        Raises
        ------
        SpcxrError
            a part that is torn or lacks its rows.
        """
        for file in self._files():
            try:
                names = [name for name in ("path", "status", "reason") if name in self.schema.names]
                rows = pq.read_table(file, columns=names).to_pylist()
                if file.stem != f"{self.kept:09d}":
                    raise ValueError("a part before it is not there")
            except (ValueError, OSError) as error:
                raise SpcxrError(
                    f"{file}: is damaged ({error}); delete {self.folder} and begin anew"
                ) from error
            for row in rows:
                self.count(row)
            self.kept += len(rows)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))


def as_text(path: str) -> str:
    """A path whose bytes are no UTF-8 as text that a parquet file takes.

    >>> as_text("a\\udcff.png")
    'a\\\\udcff.png'
    """
    return path.encode("utf-8", "backslashreplace").decode()


@contextmanager
def open_parts(out: Path, schema: Any, settings: Mapping[str, Any]) -> Iterator[Parts]:
    """The parts of the file ``out``, in the folder ``out.parts``, new or gone on with.

    What waits is written on leaving, whatever the reason; the folder stays if there is a part.

    Raises
    ------
    SpcxrError
        ``out`` is there already or being written, or its parts are of other settings.
    """
    folder = out.with_name(f"{out.name}.parts")
    if out.exists():
        raise SpcxrError(f"{out}: is there already; delete it, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as held:
        lock(held, out)
        refuse_others(folder / SETTINGS, dict(settings))
        parts = Parts(folder, schema)
        parts.recount()
        try:
            yield parts
        finally:
            parts.flush()
            if not parts.kept:  # nothing to go on with, nor to be of other settings
                shutil.rmtree(folder, ignore_errors=True)


def join_parts(parts: Parts, out: Path, write: Callable[[Parts, Path], None]) -> None:
    """Make the file ``out`` of all parts by ``write``, whole or not at all, and drop the parts."""
    parts.flush()
    draft = out.with_name(f".{out.name}.writing")  # of one process, by the parts' lock
    try:
        write(parts, draft)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)
    shutil.rmtree(parts.folder)
