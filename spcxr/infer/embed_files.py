"""Files and folders through an encoder: a vector of each, in one file.

The vectors are kept in parts as they are made (`result_parts`) and joined at the end, so that a
hundred thousand files need no more memory than a thousand, and a stopped command goes on.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spcxr.data.presets import Preprocess
from spcxr.errors import SpcxrError
from spcxr.infer import result_files
from spcxr.infer.encoder import load_encoder
from spcxr.infer.header_ids import IDS, header_ids
from spcxr.infer.input_range import unlike_training
from spcxr.infer.inputs import Input
from spcxr.infer.normalise import Normalisation
from spcxr.infer.reading import Ready, Refused, read_prepared
from spcxr.infer.result_parts import Parts, join_parts, open_parts
from spcxr.infer.result_table import Counts, Row
from spcxr.infer.stream import Work, refuse_nothing, version_of, work_through, writing_to
from spcxr.train.device import Compute

TOKENS = {"cls": ("cls",), "patch": ("patches",), "both": ("cls", "patches")}
FORMATS = (".parquet", ".npz", ".safetensors", ".csv", ".json")
OF_WORDS = (".csv", ".json")  # numbers written out: for the vector of an image, not of each patch
Matrix = NDArray[np.float32]
# The vectors of one file: cls (D,) and patches (Gh, Gw, D), or those of them that are wanted.
Answer = dict[str, Matrix]


@dataclass(frozen=True)
class Embedder:
    """An encoder for prepared images, and what is to be known of it.

    ``encode``: ``(B, S, S)`` uint8 or uint16 -> cls ``(B, D)`` and patches ``(B, Gh, Gw, D)``,
    float32. ``grid`` is (Gh, Gw), ``normalisation`` that of the training images, ``others`` what
    else the vectors depend on, as plain values.
    """

    encode: Callable[[NDArray[Any]], tuple[Matrix, Matrix]]
    preprocess: Preprocess
    normalisation: Normalisation
    grid: tuple[int, int]
    width: int
    version: str
    others: Mapping[str, Any] = field(default_factory=dict)


def open_embedder(
    model: str | Path, compute: Compute, told: Mapping[str, Any] | None = None
) -> Embedder:
    """The encoder of a run, a model folder, or weights of another library (`load_encoder`).

    ``told``: settings of `load_encoder` for such weights; what was assumed goes to standard error.

    Raises
    ------
    SpcxrError
        no such model, or settings that are not its own.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        encoder = load_encoder(model, compute.device, compute.precision, **(told or {}))
    for one in said:
        print(f"warning: {one.message}", file=sys.stderr)

    def encode(squares: NDArray[Any]) -> tuple[Matrix, Matrix]:
        found = encoder.encode(squares)
        return found.cls.cpu().numpy(), found.patches.cpu().numpy()

    return Embedder(
        encode,
        encoder.preprocess,
        Normalisation(float(encoder.mean.mean()), float(encoder.std.mean())),
        encoder.vit.grid,
        encoder.vit.width,
        version_of(Path(model)),
        {
            "mean": [round(value, 6) for value in encoder.mean.flatten().tolist()],
            "std": [round(value, 6) for value in encoder.std.flatten().tolist()],
            "heads": encoder.vit.heads,
            "precision": compute.precision,
        },
    )


def embed_files(
    model: str | Path,
    given: Sequence[str | Path],
    out: str | Path,
    compute: Compute,
    *,
    tokens: str = "cls",
    with_ids: bool = False,
    told: Mapping[str, Any] | None = None,
) -> Counts:
    """Embed every file of ``given``, in order, into the file ``out``.

    Parquet, CSV and JSON have a row a file, its vector blank where it was rejected. npz and
    safetensors hold the vectors of the files that were read, and ``row``, the number of each in
    the table ``OUT.rows.csv`` that is written beside them.

    Parameters
    ----------
    tokens
        ``cls``, ``patch`` or ``both`` (`TOKENS`); CSV and JSON take ``cls`` alone.
    with_ids
        add `header_ids.IDS` of DICOM headers.
    told
        ``preprocess``, ``mean``, ``std`` and ``heads`` of another library's weights, as
        `load_encoder` takes them.

    Returns
    -------
    how many files are done and rejected.

    Raises
    ------
    SpcxrError
        no such model or inputs; an ``out`` that is there, or is being made with other settings.
    NothingDone
        every file was rejected.
    Interrupted
        Ctrl-C or SIGTERM; what was made is kept.
    """
    out = Path(out)
    result_files.refuse_suffix(out, FORMATS)
    if tokens not in TOKENS:
        raise SpcxrError(f"tokens is {tokens!r}; choose one of: {', '.join(TOKENS)}")
    if tokens != "cls" and out.suffix in OF_WORDS:
        raise SpcxrError(f"{out}: {out.suffix} holds cls alone; use .parquet, .npz or .safetensors")
    tool = Embedding(open_embedder(model, compute, told), tokens, with_ids=with_ids)
    work = Work("embed", tool.read, tool.answer, tool.row, compute.batch_size)
    opened = open_parts(out, tool.schema, tool.settings)
    with writing_to(out), opened as parts:
        work_through(work, given, parts, out)
        if out.suffix in (".npz", ".safetensors"):
            parts.flush()
            table = out.with_name(f"{out.name}.rows.csv")
            result_files.write_rows(parts, table, tool.shapes)
        join_parts(parts, out, partial(tool.write, out.suffix))
    refuse_nothing(parts, out)
    return parts


class Embedding:
    """An encoder and which of its vectors are wanted."""

    def __init__(self, embedder: Embedder, tokens: str, *, with_ids: bool) -> None:
        self.embedder, self.with_ids = embedder, with_ids
        whole = {"cls": (embedder.width,), "patches": (*embedder.grid, embedder.width)}
        self.shapes = {name: whole[name] for name in TOKENS[tokens]}

    @property
    def schema(self) -> Any:
        """Of the table: what is said of the file, and its vectors, flat."""
        said = ("path", "status", "reason", "notes", *(IDS if self.with_ids else ()))
        vectors = {name: result_files.vector_type(shape) for name, shape in self.shapes.items()}
        return pa.schema([*((name, pa.string()) for name in said), *vectors.items()])

    @property
    def settings(self) -> dict[str, Any]:
        """What the vectors are, as plain values."""
        return {
            "model": self.embedder.version,
            "preprocess": self.embedder.preprocess.to_dict(),
            **self.embedder.others,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "with_ids": self.with_ids,
        }

    def read(self, given: Input) -> Ready | Refused:
        """One file, prepared as the encoder's training images were."""
        return read_prepared(given, self.embedder.preprocess)

    def answer(self, ready: list[Ready]) -> list[Answer]:
        """The vectors of each file of a batch."""
        squares = np.stack([one.prepared.pixels for one in ready])
        found = dict(zip(("cls", "patches"), self.embedder.encode(squares), strict=True))
        if not all(np.isfinite(values).all() for values in found.values()):
            raise SpcxrError("the encoder's output is not finite; try --precision fp32")
        return [{name: found[name][k] for name in self.shapes} for k in range(len(ready))]

    def row(self, ready: Ready, answer: Answer) -> Row:
        """The cells of a file's row."""
        odd = unlike_training(ready.prepared.pixels, self.embedder.normalisation)
        row: Row = {"notes": "; ".join((*ready.study.notes, *((odd,) if odd else ())))}
        row |= header_ids(ready.given.path) if self.with_ids else {}
        return row | {name: values.ravel() for name, values in answer.items()}

    def write(self, kind: str, parts: Parts, file: Path) -> None:
        """Join the parts to a file of a kind in `FORMATS`."""
        if kind == ".parquet":
            result_files.write_parquet(parts, file, self.settings)
        elif kind == ".json":
            result_files.write_json(parts, file, self.settings)
        elif kind == ".csv":
            result_files.write_csv(parts, file, self.shapes)
        elif kind == ".npz":
            result_files.write_npz(parts, file, self.shapes)
        else:
            result_files.write_safetensors(parts, file, self.shapes, self.settings)
