"""A piece: a few files read and preprocessed into one ``.npz``, the unit that `prepare` resumes by.

Worker processes import this file and what it needs, and nothing heavier.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from spcxr.data.masks import Mask, read_classes
from spcxr.data.presets import Preprocess
from spcxr.data.study import Rejected, Study, read_study
from spcxr.errors import SpcxrError

FILES_PER_PIECE = 16  # at most: a crash or a kill loses the work on so many
PIECES = 64  # at least, where there are as many files: enough for every worker of a large machine
DIGEST_BYTES = 12


@dataclass(frozen=True, slots=True)
class Task:
    """One image to prepare: its file and the parts of its mask, relative to ``root``."""

    root: str
    path: str
    masks: tuple[Mask, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tasks in a row, and the file that holds (or will hold) what came of them."""

    file: Path
    tasks: tuple[Task, ...]

    @property
    def done(self) -> bool:
        """Whether it is finished; the name holds a hash of the inputs, so it is of these."""
        return self.file.is_file()


@dataclass
class Made:
    """What came of a piece: per task a dictionary of facts, or a ``reason`` why it was rejected."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray | None] = field(default_factory=list)


class Tasks(Protocol):
    """Tasks by slices: a list, or what makes them when asked for (`assembly.ManifestTasks`)."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Sequence[Task]: ...


class Plan:
    """The pieces of a run in order, each made when asked for.

    What it holds of a file is a part of its piece's digest, under a byte: a run of a million files
    has its paths in the manifest's columns once, and never as objects.
    """

    def __init__(self, tasks: Tasks, length: int, folder: Path, digests: bytes) -> None:
        self.tasks, self.length, self.folder, self._digests = tasks, length, folder, digests

    def __len__(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    def __getitem__(self, number: int) -> Piece:
        if not 0 <= number < len(self):
            raise IndexError(f"piece {number} of {len(self)}")
        digest = self._digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES].hex()
        part = self.tasks[number * self.length : (number + 1) * self.length]
        return Piece(self.folder / f"piece-{number:06d}-{digest}.npz", tuple(part))

    def __iter__(self) -> Iterator[Piece]:
        return (self[number] for number in range(len(self)))


def plan(tasks: Tasks, preprocess: Preprocess, folder: Path) -> Plan:
    """Cut the tasks into pieces. A piece's name hashes its settings and its files' size and time.

    So a file that changed, or another setting, is another piece; the worker count never shows.
    """
    settings = json.dumps(preprocess.to_dict(), sort_keys=True)
    digests = bytearray()
    length = min(FILES_PER_PIECE, max(1, len(tasks) // PIECES))
    for start in range(0, len(tasks), length):
        digest = hashlib.blake2b(settings.encode(), digest_size=DIGEST_BYTES)
        for task in tasks[start : start + length]:
            for part in (Mask(task.path), *task.masks):
                # pathlib keeps each name it sees
                stamp = _stamp(os.path.join(task.root, part.file)) if part.file else part.runs
                said = f"\n{part.file} {stamp}"
                if part.number > 1 or part.values:
                    said += f" {part.number} {part.values}"
                digest.update(said.encode(errors="surrogateescape"))
        digests += digest.digest()
    return Plan(tasks, length, folder, bytes(digests))


def _stamp(file: str) -> str:
    try:
        facts = os.stat(file)
    except OSError:
        return "absent"
    return f"{facts.st_size} {facts.st_mtime_ns}"


def never() -> bool:
    """The default of `make_piece`'s ``stopped``."""
    return False


def make_piece(
    piece: Piece,
    preprocess: Preprocess,
    known_bad: Mapping[int, str],
    crumb: Path,
    stopped: Callable[[], bool] = never,
) -> None:
    """Read and preprocess a piece's files; write its file whole or not at all.

    ``known_bad`` maps task positions to the reason they are not tried (a decoder died there).
    ``crumb`` says which task is being read, for whoever finds this process dead. When ``stopped``
    turns true between two files the piece is given up (`InterruptedError`).
    """
    made = Made()
    with crumb.open("wb", buffering=0) as trail:
        for position, task in enumerate(piece.tasks):
            if stopped():
                raise InterruptedError("told to stop")
            os.pwrite(trail.fileno(), b"%08d" % position, 0)
            try:
                if position in known_bad:
                    raise Rejected(task.path, known_bad[position])
                row, pixels, mask = prepare_one(task, preprocess)
            except Rejected as rejected:
                made.rows.append({"reason": rejected.reason})
                continue
            made.rows.append(row)
            made.images.append(pixels)
            made.masks.append(mask)
    _write(piece.file, made, preprocess)
    crumb.unlink()


def prepare_one(
    task: Task, preprocess: Preprocess
) -> tuple[dict[str, Any], np.ndarray, np.ndarray | None]:
    """One file -> (facts for the manifest, ``(S, S)`` pixels, ``(S, S)`` uint8 mask or None).

    Raises
    ------
    Rejected
        With one plain sentence. Decoders' errors of every kind are (`study.decoding`): one file
        must not stop a run of 100 000. A fault of ours is none of the file's, and stops it.
    """
    try:
        study = read_study(Path(task.root, task.path))
        prepared, square = preprocess(study), None
        if task.masks:
            refuse = functools.partial(Rejected, task.path)
            mask = read_classes(task.root, task.masks, study.pixels.shape, refuse)
            square = preprocess.mask(mask)
    except Rejected:
        raise
    except SpcxrError as error:  # a preset that cannot map these grey levels
        raise Rejected(task.path, str(error)) from error
    except MemoryError as error:
        raise Rejected(task.path, "there is not enough memory for it; free some") from error
    return _facts(study, prepared.box), prepared.pixels, square


def _facts(study: Study, box: Sequence[int]) -> dict[str, Any]:
    rows, columns = study.pixels.shape
    spacing = study.spacing_mm or (None, None)
    return {
        "patient_id": study.patient_id or "",
        "view": study.view or "",
        "sex": study.sex or "",
        "site": study.site or "",
        "age": study.age,
        "image_height_px": rows,
        "image_width_px": columns,
        "spacing_row_mm": spacing[0],
        "spacing_column_mm": spacing[1],
        **dict(zip(("box_top", "box_left", "box_height", "box_width"), map(int, box), strict=True)),
        "reader_notes": "; ".join(study.notes),
    }


def _write(file: Path, made: Made, preprocess: Preprocess) -> None:
    size, dtype = preprocess.size_px, preprocess.dtype
    masks = [mask for mask in made.masks if mask is not None]
    arrays = {
        "images": np.array(made.images, dtype).reshape(-1, size, size),
        "masks": np.array(masks, np.uint8).reshape(-1, size, size),
        "has_mask": np.array([mask is not None for mask in made.masks], bool),
        "rows": np.frombuffer(json.dumps(made.rows).encode(), np.uint8),
    }
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        os.replace(temporary, file)
    except OSError as error:  # a full disk, say: the half-written file takes up its space
        temporary.unlink(missing_ok=True)
        error.filename = str(file)
        raise


def read_piece(file: Path) -> Made:
    """What `make_piece` wrote; the zip's checksums are compared on the way."""
    with np.load(file, allow_pickle=False) as arrays:
        rows = json.loads(arrays["rows"].tobytes())
        images, masks, has_mask = arrays["images"], iter(arrays["masks"]), arrays["has_mask"]
    return Made(rows, list(images), [next(masks) if has else None for has in has_mask])
