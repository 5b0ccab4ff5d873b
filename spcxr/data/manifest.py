"""The manifest: one row an image, with its patient, its split and its labels."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from spcxr.data.labels import almost_labels, parse_labels, twin_labels
from spcxr.data.splits import RATIOS, fill_splits, refuse_leaks
from spcxr.data.tables import Columns, read_table, years
from spcxr.errors import SpcxrError

TEXT_COLUMNS = ("path", "patient_id", "split", "view", "site", "sex", "mask_path")
RESERVED = (*TEXT_COLUMNS, "age")
ROWS_IN_A_GROUP = 2**10  # of the Parquet file; what writing holds at once
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
    are relative to ``source_root``; several masks of one image are joined by ``|``.

    >>> m = Manifest.from_columns({"path": ["a.png", "b.png"], "label": ["covid", ""]}, root=".")
    >>> m.labels, m.label_matrix(["covid"]).tolist()
    (('covid',), [[1.0], [nan]])
    """

    table: pa.Table
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
        _check_paths(text, Path(root), name)
        parsed = parse_labels(text, RESERVED, tuple(labels), name)
        if not labels:
            notes += almost_labels(text, {*RESERVED, "label", *parsed}, name)
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
        return self.table.num_rows

    def column(self, name: str) -> list[Any]:
        """The cells of one column."""
        if name not in self.table.column_names:
            raise SpcxrError(f"no column {name!r}; found: {', '.join(self.table.column_names)}")
        return self.table.column(name).to_pylist()

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
        column = self.table.column(name)
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()

    def rows(self, splits: str | Sequence[str]) -> np.ndarray:
        """``(m,)`` int64: the rows of these splits, in order; upper and lower case are one.

        >>> m = Manifest.from_columns({"path": ["a", "b"], "split": ["train", "val"]}, root=".")
        >>> m.rows("val"), m.rows(["train", "val"])
        (array([1]), array([0, 1]))
        """
        names = (splits,) if isinstance(splits, str) else splits
        wanted = {name.lower() for name in names}
        meant = pa.array([name for name in self.splits if name.lower() in wanted], pa.string())
        return np.flatnonzero(pc.is_in(self._text("split"), meant)).astype(np.int64)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits that occur, in order of first appearance."""
        return tuple(pc.unique(self.table.column("split")).to_pylist())

    def label_matrix(self, names: Sequence[str] | None = None) -> np.ndarray:
        """``(n, K)`` float32 of 1, 0, -1 (uncertain) and NaN (unknown); all labels by default."""
        names = self.labels if names is None else names
        for name in names:
            if name not in self.labels:
                known = ", ".join(self.labels) or "none"
                raise SpcxrError(f"no label {name!r}; the manifest's labels: {known}")
        columns = [self.table.column(name).cast(pa.float32()).fill_null(np.nan) for name in names]
        made = [np.asarray(column.to_numpy()) for column in columns]
        return np.stack(made, axis=1) if made else np.zeros((len(self), 0), np.float32)

    def select(self, rows: Sequence[int] | np.ndarray) -> Manifest:
        """The same manifest with these rows only, in this order."""
        return replace(self, table=self.table.take(pa.array(np.asarray(rows, np.int64))))

    def with_columns(self, columns: Mapping[str, pa.Array]) -> Manifest:
        """The same manifest with columns replaced or added."""
        table = self.table
        for name, array in columns.items():
            if name in table.column_names:
                table = table.set_column(table.column_names.index(name), name, array)
            else:
                table = table.append_column(name, array)
        return replace(self, table=table)

    def with_labels(self, labels: Sequence[str]) -> Manifest:
        """The same table with only these label columns counted as labels."""
        self.label_matrix(labels)  # refuses an unknown one
        return replace(self, labels=tuple(labels))

    @property
    def testable(self) -> bool:
        """Whether any row has a label, a mask or a split: something to measure a model by."""
        known = any(self.table.column(name).null_count < len(self) for name in self.labels)
        return known or any(self._filled(name) for name in ("mask_path", "split"))

    def _filled(self, name: str) -> int:
        """How many cells of a column of text are not blank."""
        return len(self) - int(pc.sum(pc.equal(self.table.column(name), "")).as_py() or 0)

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
    def read_stored(cls, path: str | Path) -> Manifest:
        """Read what `write` wrote."""
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            line = str(error).splitlines()[0]
            raise SpcxrError(f"{path}: cannot be read ({line}); prepare the store again") from error
        block = json.loads((table.schema.metadata or {}).get(b"spcxr", b"null"))
        if not isinstance(block, dict):
            raise SpcxrError(f"{path}: not a store's manifest; prepare the store again")
        return cls(table, tuple(block["labels"]))


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


def split_paths(cell: str) -> tuple[str, ...]:
    """The paths in one ``mask_path`` cell.

    >>> split_paths("left.png|right.png"), split_paths("")
    (('left.png', 'right.png'), ())
    """
    return tuple(part for part in cell.split("|") if part)


def _check_paths(text: Columns, root: Path, name: str) -> None:
    """Make paths relative to the root; refuse those that leave it, and doubled rows."""
    inside = Inside(root)
    for index in range(len(text["path"])):
        number = index + 2
        if not text["path"][index]:
            raise SpcxrError(f"{name}: row {number} has no path; fill it or drop the row")
        for key in ("path", "mask_path"):
            cell = text[key][index]
            parts = split_paths(cell) if key == "mask_path" else [cell]
            if any("\\" in part and not Path(root, part).exists() for part in parts):
                raise SpcxrError(
                    f"{name}: row {number}, column {key!r}: {cell} has backslashes, as "
                    "Windows writes paths; write them with / and relative to the root"
                )
            made = [inside.relative(part) for part in parts]
            if None in made:
                raise SpcxrError(
                    f"{name}: row {number}, column {key!r}: {cell} leaves the root "
                    f"{root}; put the files below it, or name their folder with --root"
                )
            if (joined := "|".join(filter(None, made))) != cell:  # else a second string a file
                text[key][index] = joined
    _refuse_doubled(text["path"], text["mask_path"], name)


def _refuse_doubled(paths: Sequence[str], masks: Sequence[str], name: str) -> None:
    rows = zip(paths, masks, strict=True)
    if len(np.unique(np.fromiter(map(hash, rows), np.int64, len(paths)))) == len(paths):
        return  # 16 bytes a file, where a dictionary of the pairs takes 250
    seen: dict[tuple[str, str], int] = {}
    for number, pair in enumerate(zip(paths, masks, strict=True), start=2):
        earlier = seen.setdefault(pair, number)
        if earlier != number:
            raise SpcxrError(
                f"{name}: rows {earlier} and {number} are the same image ({pair[0]}); drop one"
            )


class Inside:
    """Tells whether a path stays below a root once links are followed (folders are cached)."""

    def __init__(self, root: str | Path) -> None:
        self.root = os.path.realpath(root)
        self._folders: dict[str, str] = {}

    def relative(self, path: str) -> str | None:
        """The path relative to the root as written, or None when it leaves the root."""
        full = os.path.normpath(os.path.join(self.root, path))
        folder, file = os.path.split(full)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        real = os.path.join(self._folders[folder], file)
        if os.path.islink(real):
            real = os.path.realpath(real)
        if not real.startswith(self.root.rstrip(os.sep) + os.sep):
            return None
        if not full.startswith(self.root.rstrip(os.sep) + os.sep):
            full = real  # reached through another name of the root
        return os.path.relpath(full, self.root).replace(os.sep, "/")
