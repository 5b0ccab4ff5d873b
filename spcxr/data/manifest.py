"""The manifest: one row an image, with its patient, its split and its labels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spcxr.data.labels import LABEL_VALUES, almost_labels, parse_labels, twin_labels
from spcxr.data.paths import FILES, RUNS, check_paths, mask_columns, structure_columns
from spcxr.data.remote import RemoteFile
from spcxr.data.rows import RowSet
from spcxr.data.splits import RATIOS, fill_splits, refuse_leaks
from spcxr.data.stored_table import StoredTable, numbers_of
from spcxr.data.tables import read_table, years
from spcxr.errors import SpcxrError

TEXT_COLUMNS = ("path", "patient_id", "split", "view", "site", "sex", "mask_path")
RESERVED = (*TEXT_COLUMNS, "age")
ROWS_IN_A_GROUP = 2**14  # of the Parquet file; what writing holds at once
# What `prepare` adds to a store's manifest; a file that holds them already would be overwritten.
ADDED = {
    "source_root": pa.string(),
    "image_height_px": pa.int32(),
    "image_width_px": pa.int32(),
    "spacing_row_mm": pa.float32(),
    "spacing_column_mm": pa.float32(),
    "box_top": pa.int32(),
    "box_left": pa.int32(),
    "box_height": pa.int32(),
    "box_width": pa.int32(),
    "reader_notes": pa.string(),
}


@dataclass(frozen=True)
class Manifest:
    """A table of images. ``labels`` names the label columns; ``notes`` says what was decided.

    Columns ``path, patient_id, split, view, site, sex, mask_path`` are text (``""`` = unknown),
    ``age`` is float32 years, label columns are int8: 1 yes, 0 no, -1 uncertain, null unknown. Paths
    are relative to ``source_root``; several masks of one image are joined by ``|``. Text columns
    ``mask:NAME`` (paths) and ``rle:NAME`` (run lengths) hold a structure's masks, ``-1`` = absent.

    That of an opened store reads its columns as they are asked for (`StoredTable`); ``table`` is
    all of them in memory.

    >>> m = Manifest.from_columns({"path": ["a.png", "b.png"], "label": ["covid", ""]}, root=".")
    >>> m.labels, m.label_matrix(["covid"]).tolist()
    (('covid',), [[1.0], [nan]])
    """

    columns: pa.Table | StoredTable
    labels: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        root: str | Path | None = None,
        labels: Sequence[str] = (),
    ) -> Manifest:
        """Read a CSV or Parquet manifest; its paths are relative to ``root`` (default: its folder).

        ``labels`` names the label columns; by default they are every column that is not reserved
        and whose cells are all 1, 0, -1 or blank, and the values of a text column ``label``
        (``a|b`` = both), one column each.

        Raises
        ------
        SpcxrError
            No ``path`` column, a path outside the root, the same image and mask twice, a label
            cell that is no label, a patient in two splits. The line names the row as
            a spreadsheet counts it (the header is row 1).
        """
        path = Path(path)
        columns = read_table(path)
        root = path.parent if root is None else root
        made = cls.from_columns(columns, root=root, labels=labels, name=str(path))
        refuse_leaks(made._patients(), made._text("split"), str(path))
        return made

    @classmethod
    def from_columns(
        cls,
        columns: Mapping[str, Sequence[str]],
        *,
        root: str | Path,
        labels: Sequence[str] = (),
        name: str = "manifest",
        notes: tuple[str, ...] = (),
    ) -> Manifest:
        """Build from columns of text; the same checks as `read` (but no check for leaks)."""
        text = {key: list(map(str, cells)) for key, cells in columns.items()}
        if any(cell != cell.lower() for cell in text.get("split", ())):
            # Else `Test` and `test` would be two splits, and a flag would find one of them.
            text["split"] = [cell.lower() for cell in text["split"]]
            notes += (f"{name}: names of splits are read in lower case",)
        if "path" not in text:
            found = ", ".join(text) or "nothing"
            raise SpcxrError(f"{name}: no column 'path'; rename one of its columns: {found}")
        for key in ADDED:
            if key in text:
                raise SpcxrError(
                    f"{name}: column {key!r} is one that prepare writes; "
                    "rename or drop it, or give the manifest the store was made from"
                )
        rows = len(text["path"])
        blank = [""] * rows  # one for all: nobody writes to a blank cell
        for key in TEXT_COLUMNS:
            text.setdefault(key, blank)
        check_paths(text, Path(root), name)
        reserved = (*RESERVED, *mask_columns(text, name))
        parsed = parse_labels(text, reserved, tuple(labels), name)
        if not labels:
            notes += almost_labels(text, {*reserved, "label", *parsed}, name)
            notes += twin_labels(parsed, name)
        arrays: dict[str, pa.Array] = {}
        for key, cells in text.items():
            arrays[key] = pa.array(cells, pa.string())
        ages = text.get("age", blank)
        arrays["age"] = pa.array([years(cell) for cell in ages], pa.float32())
        if odd := sum(bool(cell) for cell in ages) - (rows - arrays["age"].null_count):
            notes += (f"{name}: {odd} cells of column 'age' are no age up to 120: unknown",)
        arrays |= {key: pa.array(values, pa.int8()) for key, values in parsed.items()}
        arrays["source_root"] = pa.repeat(pa.scalar(os.path.realpath(root), pa.string()), rows)
        order = [*RESERVED, *parsed, *(key for key in arrays if key not in {*RESERVED, *parsed})]
        return cls(pa.table({key: arrays[key] for key in order}), tuple(parsed), notes)

    def __len__(self) -> int:
        return self.columns.num_rows

    @property
    def table(self) -> pa.Table:
        """All columns, in memory."""
        return self.columns.whole if isinstance(self.columns, StoredTable) else self.columns

    def column(self, name: str) -> list[Any]:
        """The cells of one column."""
        if name not in self.columns.column_names:
            raise SpcxrError(f"no column {name!r}; found: {', '.join(self.columns.column_names)}")
        return self.columns.column(name).to_pylist()

    @property
    def patients(self) -> np.ndarray:
        """``(n,)`` text: the patient of each row. A row without one is its own patient.

        >>> Manifest.from_columns({"path": ["a.png"]}, root=".").patients.tolist()
        ['file:a.png']
        """
        return np.array(self._patients().to_pylist(), dtype=np.str_)

    def _patients(self, rooted: bool = False) -> pa.Array:
        """The same as one Arrow array; ``rooted``: files' names with the root they are in."""
        known, path = self._text("patient_id"), self._text("path")
        parts = [self._text("source_root"), "/file:", path] if rooted else ["file:", path]
        own = pc.binary_join_element_wise(*parts, "")
        return pc.if_else(pc.equal(known, ""), own, known)

    def _text(self, name: str) -> pa.Array:
        column = self.columns.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def rows(self, splits: str | Sequence[str]) -> np.ndarray:
        """``(m,)`` int64: the rows of these splits, in order; upper and lower case are one.

        >>> m = Manifest.from_columns({"path": ["a", "b"], "split": ["train", "val"]}, root=".")
        >>> m.rows("val"), m.rows(["train", "val"])
        (array([1]), array([0, 1]))
        """
        return np.flatnonzero(self._within(splits)).astype(np.int64)

    def row_set(self, splits: str | Sequence[str]) -> RowSet:
        """The same rows in a bit each.

        >>> m = Manifest.from_columns({"path": ["a", "b"], "split": ["train", "val"]}, root=".")
        >>> m.row_set("val")[np.array([0])]
        array([1])
        """
        return RowSet.of_mask(self._within(splits))

    def row_sets(self, splits: str | Sequence[str], by: str) -> dict[str, RowSet]:
        """The same rows, for each value of a column of text that occurs in them.

        >>> columns = {"path": ["a", "b"], "split": ["train"] * 2, "site": ["x", "y"]}
        >>> [len(rows) for rows in Manifest.from_columns(columns, root=".").row_sets(
        ...     "train", by="site").values()]
        [1, 1]
        """
        within = self._within(splits)
        numbers, names = numbers_of(self._parts(by, numbered=True))
        found = {
            name: np.flatnonzero(within & (numbers == i)).astype(np.int64)
            for i, name in enumerate(names)
        }
        return {name: RowSet.from_rows(rows) for name, rows in found.items() if len(rows)}

    def rows_of_patients(self, prefix: str) -> np.ndarray:
        """``(m,)`` int64: the rows whose ``patient_id`` begins with this.

        >>> m = Manifest.from_columns({"path": ["a", "b"], "patient_id": ["p1", "x1"]}, root=".")
        >>> m.rows_of_patients("x")
        array([1])
        """
        begins = [
            np.asarray(pc.starts_with(part, prefix).to_numpy(zero_copy_only=False), bool)
            for part in self._parts("patient_id")
        ]
        return np.flatnonzero(np.concatenate([np.zeros(0, bool), *begins])).astype(np.int64)

    def _within(self, splits: str | Sequence[str]) -> np.ndarray:
        """``(n,)`` bool: whether a row is in one of these splits."""
        names = (splits,) if isinstance(splits, str) else splits
        wanted = {name.lower() for name in names}
        numbers, found = numbers_of(self._parts("split", numbered=True))
        return np.array([name.lower() in wanted for name in found], bool)[numbers]

    def _parts(self, name: str, *, numbered: bool = False) -> Iterable[pa.Array]:
        """A column in parts; of a stored one no more than two are in memory."""
        if isinstance(self.columns, StoredTable):
            return self.columns.parts(name, numbered=numbered)
        return self.columns.column(name).chunks

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that occur, in order of first appearance."""
        return tuple(numbers_of(self._parts("split", numbered=True))[1])

    def label_matrix(self, names: Sequence[str] | None = None) -> np.ndarray:
        """``(n, K)`` float32 of 1, 0, -1 (uncertain) and NaN (unknown); all labels by default."""
        names = self.labels if names is None else names
        for name in names:
            if name not in self.labels:
                raise SpcxrError(self._why_no_label(name))
        columns = [self.columns.column(name).cast(pa.float32()).fill_null(np.nan) for name in names]
        made = [np.asarray(column.to_numpy()) for column in columns]
        return np.stack(made, axis=1) if made else np.zeros((len(self), 0), np.float32)

    def _why_no_label(self, name: str) -> str:
        """What is wrong with a column that was not taken as a label, or is not there."""
        known = ", ".join(self.labels) or "none"
        said = f"no label {name!r}; the manifest's labels: {known}"
        if name in RESERVED or name not in self.columns.column_names:
            return said
        cells = ["" if cell is None else str(cell) for cell in self.column(name)]
        if not any(cells):
            return f"{said}; column {name!r} is blank in all rows: fill it in"
        odd = next((row for row, cell in enumerate(cells) if cell not in LABEL_VALUES), None)
        if odd is None:
            return f"{said}; column {name!r} was left out: prepare the images anew with --labels"
        return (
            f"{said}; column {name!r} holds {cells[odd][:20]!r} for {self.column('path')[odd]}: "
            "a label is 1, 0, -1 (uncertain) or blank (unknown)"
        )

    def select(self, rows: Sequence[int] | np.ndarray) -> Manifest:
        """The same manifest with these rows only, in this order."""
        return replace(self, columns=self.table.take(pa.array(np.asarray(rows, np.int64))))

    def with_columns(self, columns: Mapping[str, pa.Array]) -> Manifest:
        """The same manifest with columns replaced or added."""
        table = self.table
        for name, array in columns.items():
            if name in table.column_names:
                table = table.set_column(table.column_names.index(name), name, array)
            else:
                table = table.append_column(name, array)
        return replace(self, columns=table)

    def with_labels(self, labels: Sequence[str]) -> Manifest:
        """The same table with only these label columns counted as labels."""
        self.label_matrix(labels)  # refuses an unknown one
        return replace(self, labels=tuple(labels))

    def drawn(self, structure: str) -> np.ndarray:
        """``(n,)`` bool: the rows where a column of this structure's masks is filled."""
        found = np.zeros(len(self), bool)
        for name in (f"{FILES}{structure}", f"{RUNS}{structure}"):
            if name in self.columns.column_names:
                found |= ~np.asarray(pc.equal(self._text(name), ""))
        return found

    @property
    def masked(self) -> np.ndarray:
        """``(n,)`` bool: the rows that have a mask, of all structures if these have columns.

        >>> columns = {"path": ["a", "b"], "mask:lung": ["l.png", "-1"], "rle:heart": ["1 2", ""]}
        >>> Manifest.from_columns(columns, root=".").masked.tolist()
        [True, False]
        """
        filled: np.ndarray = ~np.asarray(pc.equal(self._text("mask_path"), ""))
        if names := structure_columns(self.columns.column_names):
            filled = filled | np.stack([self.drawn(name) for name in names]).all(0)
        return filled

    @property
    def testable(self) -> bool:
        """Whether any row has a label, a mask or a split: something to measure a model by."""
        known = any(self.columns.column(name).null_count < len(self) for name in self.labels)
        return known or bool(self._filled("split") or self.masked.any())

    def _filled(self, name: str) -> int:
        """How many cells of a column of text are not blank."""
        return len(self) - int(pc.sum(pc.equal(self.columns.column(name), "")).as_py() or 0)

    def settled(
        self, ratios: Sequence[float] | None = None, seed: int = 0, where: str = "manifest"
    ) -> Manifest:
        """Blank splits filled by patient (`splits.fill_splits`) and noted; leaks refused.

        Without ``ratios`` they are `splits.RATIOS`, and all rows are for training where there is
        nothing to test on (`testable`).
        """
        notes = list(self.notes)
        blank = len(self) - self._filled("split")
        if ratios is None and not self.testable:
            ratios = (1.0, 0.0, 0.0)
            notes.append(f"no label, mask or split to test by: all {blank} rows are in split train;"
                         " give --split-ratios to hold some out")  # fmt: skip
        elif blank:
            shares = "/".join(f"{r:g}" for r in ratios or RATIOS)
            notes.append(f"{blank} rows had no split: train/val/test {shares} by patient hash, "
                         f"seed {seed}")  # fmt: skip
        if alone := len(self) - self._filled("patient_id"):
            notes.append(f"{alone} rows have no patient_id: each counts as a patient of its own")
        splits = fill_splits(self._patients(), self._text("split"), ratios or RATIOS, seed)
        if self._filled("split"):  # else each is its patient's, and none can be in two
            # Two sources may hold files of one name: those are not one patient.
            several = len(pc.unique(self.table.column("source_root"))) > 1
            refuse_leaks(self._patients(rooted=several), splits, where)
        return replace(self.with_columns({"split": splits}), notes=tuple(notes))

    def write(self, path: str | Path) -> None:
        """Write as Parquet, with the label names in its metadata (`notes` go to ``store.json``)."""
        metadata = {b"spcxr": json.dumps({"labels": self.labels}).encode()}
        table = self.table.replace_schema_metadata(metadata)
        with pq.ParquetWriter(path, table.schema, memory_pool=pa.default_memory_pool()) as writer:
            for start in range(0, max(1, len(self)), ROWS_IN_A_GROUP):
                writer.write_table(table.slice(start, ROWS_IN_A_GROUP).combine_chunks())

    @classmethod
    def read_stored(cls, path: Path | RemoteFile) -> Manifest:
        """Open what `write` wrote; columns are read when they are asked for."""
        table = StoredTable(path)
        return cls(table, table.labels)


def concatenate(manifests: Sequence[Manifest]) -> Manifest:
    """One manifest of several; a column that one of them lacks is unknown there.

    >>> a = Manifest.from_columns({"path": ["a"], "x": ["1"]}, root=".")
    >>> b = Manifest.from_columns({"path": ["b"], "y": ["0"]}, root=".")
    >>> concatenate([a, b]).label_matrix(["x", "y"]).tolist()
    [[1.0, nan], [nan, 0.0]]
    """
    labels = tuple(dict.fromkeys(name for m in manifests for name in m.labels))
    for name in labels:
        kinds = {m.table.schema.field(name).type for m in manifests if name in m.table.column_names}
        if kinds != {pa.int8()}:
            raise SpcxrError(
                f"column {name!r} is a label in one source and text in another; "
                "rename it in one, or name the label columns with --labels"
            )
    bare = [m.table.replace_schema_metadata(None) for m in manifests]
    table = pa.concat_tables(bare, promote_options="default")
    notes = tuple(dict.fromkeys(note for m in manifests for note in m.notes))
    if not any(twin_labels(m.labels, "") for m in manifests):
        notes += twin_labels(labels, "all sources together")
    made = Manifest(table.combine_chunks(), labels, notes)
    blanks = {
        field.name: made.table.column(field.name).fill_null("")
        for field in made.table.schema
        if field.type == pa.string() and made.table.column(field.name).null_count
    }
    return made.with_columns(blanks)
