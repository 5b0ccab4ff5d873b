"""Parts joined to one file: csv, json, parquet, npz or safetensors, a part at a time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.infer.result_parts import Parts
from spcxr.infer.result_table import Row, cell, csv_line

Shapes = Mapping[str, tuple[int, ...]]
KEY = "spcxr"  # of the settings in a parquet or safetensors file's own metadata
DIGITS = 9  # hold a float32
ROW = "row"


def refuse_suffix(out: Path, known: tuple[str, ...]) -> None:
    """Refuse a file of another kind than ``known``, or a folder by its name.

    >>> refuse_suffix(Path("a.txt"), (".csv", ".json"))
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: a.txt: --out must end in .csv or .json
    """
    if out.suffix not in known:
        *most, last = known
        raise SpcxrError(f"{out}: --out must end in {', '.join(most)} or {last}")
    if out.is_dir():
        raise SpcxrError(f"{out}: is a folder; choose another --out")


def vector_type(shape: tuple[int, ...]) -> Any:
    """The type of a column of float32 vectors, each of so many numbers.

    >>> str(vector_type((2, 3)))
    'fixed_size_list<item: float>[6]'
    """
    return pa.list_(pa.float32(), int(np.prod(shape)))


def write_parquet(parts: Parts, file: Path, settings: Mapping[str, Any]) -> None:
    """All columns, a row a file; the settings as JSON in the schema's metadata."""
    schema = parts.schema.with_metadata({KEY: json.dumps(settings)})
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in parts.tables():
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def write_json(parts: Parts, file: Path, settings: Mapping[str, Any]) -> None:
    """``{"settings": ..., "rows": [...]}``, one line a row."""
    with file.open("w", encoding="utf-8") as opened:
        opened.write(f'{{"settings": {json.dumps(settings)},\n"rows": [')
        comma = "\n"
        for row in rows_of(parts):
            known = {name: value for name, value in row.items() if value is not None}
            opened.write(comma + json.dumps(known, allow_nan=False))
            comma = ",\n"
        opened.write("\n]}\n")


def write_csv(parts: Parts, file: Path, shapes: Shapes) -> None:
    """A row a file; a vector ``cls`` becomes the columns ``cls_0``, ``cls_1`` and so on."""
    plain = [name for name in parts.schema.names if name not in shapes]
    wide = [f"{name}_{k}" for name, shape in shapes.items() for k in range(int(np.prod(shape)))]
    with file.open("w", newline="", encoding="utf-8") as opened:
        opened.write(csv_line([*plain, *wide]))
        for row in rows_of(parts):
            cells = [cell(row[name], DIGITS) for name in plain]
            for name, shape in shapes.items():
                values = row[name] or [None] * int(np.prod(shape))
                cells += [cell(value, DIGITS) for value in values]
            opened.write(csv_line(cells))


def write_npz(parts: Parts, file: Path, shapes: Shapes) -> None:
    """An array of all vectors of each kind, and ``row``: the number of each in the table."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, shape in shapes.items():
            with _member(archive, name, (parts.done, *shape), "<f4") as member:
                _copy(parts, name, member)
        with _member(archive, ROW, (parts.done,), "<i8") as member:
            member.write(rows_done(parts).tobytes())


def _member(archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], descr: str) -> IO[bytes]:
    member = archive.open(f"{name}.npy", "w", force_zip64=True)
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)
    return member


def write_safetensors(
    parts: Parts, file: Path, shapes: Shapes, settings: Mapping[str, Any]
) -> None:
    """The same as tensors, the settings as JSON in the file's metadata.

    Source: the format's description, github.com/huggingface/safetensors.
    """
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(settings), "format": "pt"}}
    at = 0
    sizes = {name: ("F32", (parts.done, *shape), 4) for name, shape in shapes.items()}
    for name, (kind, shape, width) in {**sizes, ROW: ("I64", (parts.done,), 8)}.items():
        end = at + width * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            _copy(parts, name, opened)
        opened.write(rows_done(parts).tobytes())


def write_rows(parts: Parts, file: Path, shapes: Shapes) -> None:
    """The table beside vectors: ``row`` (from 0) and all columns without vectors, as CSV."""
    plain = [name for name in parts.schema.names if name not in shapes]
    with file.open("w", newline="", encoding="utf-8") as opened:
        opened.write(csv_line([ROW, *plain]))
        for number, row in enumerate(rows_of(parts, plain)):
            opened.write(csv_line([number, *(cell(row[name], DIGITS) for name in plain)]))


def rows_of(parts: Parts, names: list[str] | None = None) -> Iterator[Row]:
    """The rows, one by one; all columns, or some."""
    for table in parts.tables():
        for batch in (table if names is None else table.select(names)).to_batches(64):
            yield from batch.to_pylist()


def rows_done(parts: Parts) -> NDArray[np.int64]:
    """``(n,)`` the numbers of the rows that have a vector."""
    made, first = [np.zeros(0, np.int64)], 0
    for table in parts.tables():
        done = table.column("status").to_numpy() == "done"
        made.append(first + np.flatnonzero(done))
        first += len(done)
    return np.concatenate(made).astype(np.int64)


def _copy(parts: Parts, name: str, file: IO[bytes]) -> None:
    """The vectors of a column that are there, as raw float32, little end first."""
    for table in parts.tables():
        for chunk in table.column(name).drop_null().chunks:
            file.write(chunk.flatten().to_numpy(zero_copy_only=False).astype("<f4").tobytes())
