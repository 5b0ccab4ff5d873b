"""Pieces -> a store, and stores -> one store: what `prepare` ends with."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spcxr.data.manifest import ADDED, Manifest, concatenate
from spcxr.data.pieces import Made, Piece, read_piece
from spcxr.data.store import Box, Store, StoreWriter
from spcxr.errors import NothingDone, SpcxrError

Rejections = list[tuple[str, str]]  # path, reason
FROM_HEADER = ("patient_id", "view", "sex", "site", "age")  # the manifest's own cell wins
MEASURED = tuple(name for name in ADDED if name != "source_root")
BOX = ("box_top", "box_left", "box_height", "box_width")
ROWS_AT_ONCE = 64


class Assembly:
    """Streams pieces into a store in their order, while later ones are still being made.

    ``manifest`` has one row for each task of the pieces, in order. Its blank cells for patient,
    view, sex, site and age are filled from the files' headers.
    """

    def __init__(self, pieces: Sequence[Piece], manifest: Manifest, writer: StoreWriter) -> None:
        self.pieces, self.manifest, self.writer = pieces, manifest, writer
        self._files = list(
            zip(manifest.column("source_root"), manifest.column("path"), strict=True)
        )
        self._rejected: Rejections = []
        self._kept: list[int] = []
        self._facts: dict[str, list[Any]] = {name: [] for name in (*FROM_HEADER, *MEASURED)}
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
        rejected, file = self._rejected, self.writer.work / "rejected.csv"
        write_rejections(file, rejected)
        if not self._kept:
            for piece in self.pieces:  # nothing worth keeping: the next run tries all anew
                piece.file.unlink()
            path, reason = rejected[0]
            raise NothingDone(
                f"all {len(rejected)} files were rejected, {path} because: {reason}; see {file}"
            )
        return _filled(self.manifest.select(self._kept), self._facts), rejected

    def _take(self, made: Made) -> None:
        accepted = iter(zip(made.images, made.masks, strict=True))
        for row in made.rows:
            if "reason" in row:
                root, path = self._files[self._next_row]
                self._rejected.append((f"{root}/{path}", row["reason"]))
            else:
                pixels, mask = next(accepted)
                self.writer.add(pixels, mask, _box(row))
                self._kept.append(self._next_row)
                for name, cells in self._facts.items():
                    cells.append(row[name])
            self._next_row += 1


def _read(piece: Piece) -> Made:
    try:
        return read_piece(piece.file)
    except (zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        piece.file.unlink(missing_ok=True)
        raise SpcxrError(
            f"{piece.file}: damaged and removed; run the same prepare again to make it anew"
        ) from error


def _filled(manifest: Manifest, facts: Mapping[str, list[Any]]) -> Manifest:
    columns: dict[str, pa.Array] = {}
    for name in FROM_HEADER:
        own = manifest.column(name)
        merged = [
            found if cell in ("", None) else cell
            for cell, found in zip(own, facts[name], strict=True)
        ]
        columns[name] = pa.array(merged, pa.float32() if name == "age" else pa.string())
    for name in MEASURED:
        columns[name] = pa.array(facts[name], ADDED[name])
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
