"""Pieces -> a store, and stores -> one store: what `prepare` ends with."""

from __future__ import annotations

import csv
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from spcxr.data.manifest import ADDED, Manifest, concatenate
from spcxr.data.pieces import Made, Piece, read_piece
from spcxr.data.store import Box, Store, StoreWriter
from spcxr.errors import NothingDone, SpcxrError

Rejections = list[tuple[str, str]]  # path, reason
FROM_HEADER = ("patient_id", "view", "sex", "site", "age")  # the manifest's own cell wins
MEASURED = tuple(name for name in ADDED if name != "source_root")
FACTS = pa.schema(
    [(name, pa.float32() if name == "age" else pa.string()) for name in FROM_HEADER]
    + [(name, ADDED[name]) for name in MEASURED]
)
BOX = ("box_top", "box_left", "box_height", "box_width")
ROWS_AT_ONCE = 64
ROWS_IN_A_BLOCK = 4096


class Assembly:
    """Streams pieces into a store in their order, while later ones are still being made.

    ``manifest`` has one row for each task of the pieces, in order. Its blank cells for patient,
    view, sex, site and age are filled from the files' headers.
    """

    def __init__(self, pieces: Sequence[Piece], manifest: Manifest, writer: StoreWriter) -> None:
        self.pieces, self.manifest, self.writer = pieces, manifest, writer
        self._reasons: dict[int, str] = {}
        self._facts: list[dict[str, Any]] = []
        self._blocks = [pa.Table.from_pylist([], FACTS)]
        self._next_piece = self._next_row = 0

    def advance(self) -> None:
        """Take in the pieces that are done, up to the first that is not."""
        while self._next_piece < len(self.pieces) and self.pieces[self._next_piece].done:
            self._take(_read(self.pieces[self._next_piece]))
            self._next_piece += 1

    def finish(self) -> tuple[Manifest, Rejections]:
        """The accepted rows' manifest, and what was rejected; all pieces must be done.

        Raises
        ------
        NothingDone
            Every file was rejected.
        """
        self.advance()
        if self._next_piece != len(self.pieces):
            raise ValueError(f"piece {self._next_piece} of {len(self.pieces)} is not made yet")
        self._pack()
        rejected, file = self._rejections(), self.writer.work / "rejected.csv"
        write_rejections(file, rejected)
        kept = [row for row in range(len(self.manifest)) if row not in self._reasons]
        if not kept:
            for piece in self.pieces:  # nothing worth keeping: the next run tries all anew
                piece.file.unlink()
            path, reason = rejected[0]
            raise NothingDone(
                f"all {len(rejected)} files were rejected, {path} because: {reason}; see {file}"
            )
        facts = pa.concat_tables(self._blocks).combine_chunks()
        return _filled(self.manifest.select(kept), facts), rejected

    def _take(self, made: Made) -> None:
        accepted = iter(zip(made.images, made.masks, strict=True))
        for row in made.rows:
            if "reason" in row:
                self._reasons[self._next_row] = sys.intern(row["reason"])
            else:
                pixels, mask = next(accepted)
                self.writer.add(pixels, mask, _box(row))
                self._facts.append(row)
            self._next_row += 1
        if len(self._facts) >= ROWS_IN_A_BLOCK:
            self._pack()

    def _pack(self) -> None:
        """Keep facts as Arrow does: a dictionary for each of a million rows is a gigabyte."""
        self._blocks.append(pa.Table.from_pylist(self._facts, FACTS))
        self._facts = []

    def _rejections(self) -> Rejections:
        part = self.manifest.select(list(self._reasons))
        roots, paths = part.column("source_root"), part.column("path")
        files = (f"{root}/{path}" for root, path in zip(roots, paths, strict=True))
        return list(zip(files, self._reasons.values(), strict=True))


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
    columns = {name: facts.column(name) for name in MEASURED}
    for name in FROM_HEADER:
        own, found = manifest.table.column(name), facts.column(name)
        blank = own.is_null() if name == "age" else pc.equal(own, "")
        columns[name] = pc.if_else(blank, found, own)
    return manifest.with_columns(columns)


def _box(row: Mapping[str, Any]) -> Box:
    top, left, height, width = (int(row[name]) for name in BOX)
    return top, left, height, width


def join(stores: Sequence[Store], writer: StoreWriter) -> tuple[Manifest, Rejections]:
    """Stream the rows of several stores, in order, into one.

    Raises
    ------
    SpcxrError
        The stores were prepared with different settings.
    """
    first = stores[0]
    for store in stores[1:]:
        if store.preprocess != first.preprocess:
            raise SpcxrError(
                f"{store.path}: prepared otherwise than {first.path} ({store.preprocess} and "
                f"{first.preprocess}); join stores of one preset, size, fit and dtype"
            )
    rejected: Rejections = []
    for store in stores:
        for pixels, mask, box in _rows(store):
            writer.add(pixels, mask, box)
        rejected += read_rejections(store.path / "rejected.csv")
    write_rejections(writer.work / "rejected.csv", rejected)
    return concatenate([store.manifest for store in stores]), rejected


def _rows(store: Store) -> Iterator[tuple[np.ndarray, np.ndarray | None, Box | None]]:
    table = store.manifest.table
    known = set(BOX) <= set(table.column_names)
    boxes = [store.manifest.column(name) for name in BOX] if known else []
    for start in range(0, len(store), ROWS_AT_ONCE):
        rows = np.arange(start, min(start + ROWS_AT_ONCE, len(store)))
        images = store.images(rows)
        masks = store.masks(rows) if store.has_masks else [None] * len(rows)
        for row, pixels, mask in zip(rows.tolist(), images, masks, strict=True):
            blank = mask is None or bool((mask == 255).all())
            box = (
                _box({name: cells[row] for name, cells in zip(BOX, boxes, strict=True)})
                if known
                else None
            )
            yield pixels, None if blank else mask, box


def write_rejections(file: Path, rejected: Rejections) -> None:
    """``rejected.csv``: path and one plain reason a row."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "reason"))
        writer.writerows(rejected)


def read_rejections(file: Path) -> Rejections:
    """The rows of a ``rejected.csv``; none where there is no such file (a store made by hand)."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8", errors="surrogateescape") as stream:
        return [(row[0], row[1]) for row in csv.reader(stream)][1:]
