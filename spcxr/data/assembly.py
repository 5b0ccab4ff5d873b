"""Pieces -> a store, and stores -> one store: what `prepare` ends with."""

from __future__ import annotations

import csv
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spcxr.data.manifest import ADDED, Manifest, concatenate
from spcxr.data.pieces import Made, Piece, Plan, Task, read_piece
from spcxr.data.store import Box, Store, StoreWriter
from spcxr.data.structures import Structures
from spcxr.errors import NothingDone, SpcxrError

Rejections = Iterable[tuple[str, str]]  # path, reason
FROM_HEADER = ("patient_id", "view", "sex", "site", "age")  # the manifest's own cell wins
MEASURED = tuple(name for name in ADDED if name != "source_root")
FACTS = pa.schema(
    [(name, pa.float32() if name == "age" else pa.string()) for name in FROM_HEADER]
    + [(name, ADDED[name]) for name in MEASURED]
)
BOX = ("box_top", "box_left", "box_height", "box_width")
ROWS_AT_ONCE = 64
ROWS_IN_A_BLOCK = 256


class ManifestTasks:
    """The manifest's rows as tasks, made slice by slice: a row of Arrow's is a tenth of objects."""

    def __init__(self, manifest: Manifest, structures: Structures | None = None) -> None:
        self.structures = structures or Structures()
        there = [name for name in self.structures.read if name in manifest.table.column_names]
        self._table = manifest.table.select(["source_root", "path", *there])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, part: slice, /) -> list[Task]:
        start, stop, _ = part.indices(len(self))
        rows = self._table.slice(start, stop - start).to_pylist()
        masks = self.structures.masks
        return [Task(row["source_root"], row["path"], masks(row)) for row in rows]


class Assembly:
    """Streams pieces into a store in their order, while later ones are still being made.

    ``manifest`` has one row for each task of the pieces, in order. Its blank cells for patient,
    view, sex, site and age are filled from the files' headers.
    """

    def __init__(self, pieces: Plan, manifest: Manifest, writer: StoreWriter) -> None:
        self.pieces, self.manifest, self.writer = pieces, manifest, writer
        self._accepted = bytearray()  # 1 or 0 for each row
        self._reasons: dict[str, int] = {}  # each once, numbered
        self._why = array("I")  # of each rejected row
        self._facts: list[dict[str, Any]] = []
        self._blocks = [pa.Table.from_pylist([], FACTS)]
        self._next_piece = 0

    def advance(self) -> None:
        """Take in the pieces that are done, up to the first that is not."""
        while self._next_piece < len(self.pieces) and self.pieces[self._next_piece].done:
            self._take(_read(self.pieces[self._next_piece]))
            self._next_piece += 1

    def finish(self) -> tuple[Manifest, int]:
        """The accepted rows' manifest, and how many were rejected; all pieces must be done.

        Raises
        ------
        NothingDone
            Every file was rejected.
        """
        self.advance()
        if self._next_piece != len(self.pieces):
            raise ValueError(f"piece {self._next_piece} of {len(self.pieces)} is not made yet")
        self._pack()
        rejected, file = len(self._why), self.writer.work / "rejected.csv"
        write_rejections(file, self._rejections())
        if rejected == len(self._accepted):
            for piece in self.pieces:  # nothing worth keeping: the next run tries all anew
                piece.file.unlink()
            path, reason = next(self._rejections())
            raise NothingDone(
                f"all {rejected} files were rejected, {path} because: {reason}; see {file}"
            )
        facts = pa.concat_tables(self._blocks)
        self._blocks.clear()
        kept = np.frombuffer(self._accepted, bool)
        manifest = self.manifest.select(np.flatnonzero(kept)) if rejected else self.manifest
        return _filled(manifest, facts), rejected

    def _take(self, made: Made) -> None:
        accepted = iter(zip(made.images, made.masks, strict=True))
        for row in made.rows:
            self._accepted.append("reason" not in row)
            if "reason" in row:
                self._why.append(self._reasons.setdefault(row["reason"], len(self._reasons)))
            else:
                pixels, mask = next(accepted)
                self.writer.add(pixels, mask, _box(row))
                self._facts.append(row)
        if len(self._facts) >= ROWS_IN_A_BLOCK:
            self._pack()

    def _pack(self) -> None:
        """Keep facts as Arrow does: a dictionary for each of a million rows is a gigabyte."""
        self._blocks.append(pa.Table.from_pylist(self._facts, FACTS))
        self._facts = []

    def _rejections(self) -> Iterator[tuple[str, str]]:
        reasons, tasks = list(self._reasons), self.pieces.tasks
        rows = np.flatnonzero(np.frombuffer(self._accepted, bool) == 0)
        for row, why in zip(rows.tolist(), self._why, strict=True):
            (task,) = tasks[row : row + 1]
            yield f"{task.root}/{task.path}", reasons[why]


def _read(piece: Piece) -> Made:
    try:
        return read_piece(piece.file)
    except (zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        piece.file.unlink(missing_ok=True)
        raise SpcxrError(
            f"{piece.file}: damaged and removed; run the same prepare again to make it anew"
        ) from error


def _filled(manifest: Manifest, facts: pa.Table) -> Manifest:
    """The manifest with its blank cells filled from ``facts``, and what was measured added."""
    columns = {name: facts.column(name).combine_chunks() for name in MEASURED}
    for name in FROM_HEADER:
        own, found = manifest.table.column(name), facts.column(name)
        blank = own.is_null() if name == "age" else pc.equal(own, "")
        columns[name] = pc.if_else(blank, found, own).combine_chunks()
    return manifest.with_columns(columns)


def _box(row: Mapping[str, Any]) -> Box:
    top, left, height, width = (int(row[name]) for name in BOX)
    return top, left, height, width


def join(stores: Sequence[Store], writer: StoreWriter) -> tuple[Manifest, int]:
    """Stream the rows of several stores, in order, into one: its manifest, and how many rejected.

    Raises
    ------
    SpcxrError
        The stores were prepared with different settings, or their masks show other structures.
    """
    shared_structures(stores)
    first = stores[0]
    for store in stores[1:]:
        if store.preprocess != first.preprocess:
            raise SpcxrError(
                f"{store.path}: prepared otherwise than {first.path} ({store.preprocess} and "
                f"{first.preprocess}); join stores of one preset, size, fit and dtype"
            )
    for store in stores:
        for pixels, mask, box in _rows(store):
            writer.add(pixels, mask, box)
    files = [Path(f"{store.path}/rejected.csv") for store in stores]
    write_rejections(writer.work / "rejected.csv", chain.from_iterable(map(read_rejections, files)))
    rejected = sum(1 for file in files for _ in read_rejections(file))
    return concatenate([store.manifest for store in stores]), rejected


def shared_structures(stores: Sequence[Store]) -> tuple[str, ...]:
    """What the masks of all these stores show.

    Raises
    ------
    SpcxrError
        not the same in each store that has masks.
    """
    having = [store for store in stores if store.has_masks] or stores[:1]
    for store in having[1:]:
        if store.structures != having[0].structures:
            said = [", ".join(s.structures) for s in (store, having[0])]
            raise SpcxrError(
                f"{store.path}: its masks show {said[0]}, and those of {having[0].path} {said[1]}; "
                "join stores of the same structures"
            )
    return having[0].structures


def _rows(store: Store) -> Iterator[tuple[np.ndarray, np.ndarray | None, Box | None]]:
    table = store.manifest.table
    known = set(BOX) <= set(table.column_names)
    for start in range(0, len(store), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(store)))
        images = store.images(rows)
        masks = store.masks(rows) if store.has_masks else [None] * len(rows)
        boxes = (
            table.slice(start, len(rows)).select(BOX).to_pylist() if known else [None] * len(rows)
        )
        for pixels, mask, box in zip(images, masks, boxes, strict=True):
            blank = mask is None or bool((mask == 255).all())
            yield pixels, None if blank else mask, box and _box(box)


def write_rejections(file: Path, rejected: Rejections) -> None:
    """``rejected.csv``: path and one plain reason a row."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "reason"))
        writer.writerows(rejected)


def read_rejections(file: Path) -> Iterator[tuple[str, str]]:
    """The rows of a ``rejected.csv``; none where there is no such file (a store made by hand)."""
    if file.is_file():
        with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
            yield from ((row[0], row[1]) for row in islice(csv.reader(stream), 1, None))
