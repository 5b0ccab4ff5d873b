"""Splits by patient: a hash decides, so a patient's side never depends on who else is there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import pyarrow as pa

from spcxr.errors import SpcxrError

Column: TypeAlias = pa.Array  # of text
SPLITS = ("train", "val", "test")
RATIOS = (0.7, 0.15, 0.15)
HELD_OUT = ("val", "test", "drift", "holdout", "external")


def is_training(split: str) -> bool:
    """Whether a split is learned from unless told otherwise: the one rule for all of spcxr.

    Held out is a name that begins with one of `HELD_OUT`; a blank split, not settled yet, is not
    learned from either. All other names are.

    >>> [is_training(split) for split in ("pretrain", "dev", "Validation", "drift_b", "")]
    [True, True, False, False, False]
    """
    return bool(split) and not split.lower().startswith(HELD_OUT)


def hash_split(patient: str, ratios: Sequence[float] = RATIOS, seed: int = 0) -> str:
    """``train``, ``val`` or ``test`` for one patient, from (seed, patient) alone.

    ``ratios`` are the expected shares of the three; they must sum to 1.

    >>> hash_split("p1"), hash_split("p1", seed=3), hash_split("p1", ratios=(1, 0, 0))
    ('val', 'test', 'train')
    """
    if len(ratios) != 3 or min(ratios) < 0 or abs(sum(ratios) - 1) > 1e-6:
        raise SpcxrError(f"split ratios {tuple(ratios)} must be three shares that sum to 1")
    digest = hashlib.blake2b(f"{seed}:{patient}".encode(), digest_size=8).digest()
    point = int.from_bytes(digest, "big") / 2**64
    if point < ratios[0]:
        return "train"
    return "val" if point < ratios[0] + ratios[1] else "test"


def fill_splits(
    patients: Sequence[str] | Column,
    splits: Sequence[str] | Column,
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
) -> Column:
    """Blank splits filled: by the patient's own other rows where there are any, else by hash.

    >>> fill_splits(["a", "a", "b"], ["test", "", ""], ratios=(1, 0, 0)).to_pylist()
    ['test', 'test', 'train']
    """
    which, column = _encoded(splits)
    names = column.to_pylist()
    if not any(names):  # as most sets come: then who else is there need not be known
        people = (patient.as_py() for patient in _text(patients))
        return pa.array([hash_split(person, ratios, seed) for person in people], pa.string())
    who, people = _encoded(patients)
    given = np.array([bool(name) for name in names], bool)[which]
    names += SPLITS
    of = np.full(len(people), -1, np.int32)
    of[who[given]] = which[given]  # where a patient has several, the last row's
    for person in np.flatnonzero(of < 0).tolist():
        chosen = hash_split(people[person].as_py(), ratios, seed)
        of[person] = len(names) - len(SPLITS) + SPLITS.index(chosen)
    return pa.array(names, pa.string()).take(pa.array(np.where(given, which, of[who])))


def refuse_leaks(
    patients: Sequence[str] | Column, splits: Sequence[str] | Column, where: str
) -> None:
    """Refuse a patient who stands in two splits, unless both are learned from (`is_training`).

    Blank splits are not looked at. The message names rows as a spreadsheet counts them (the header
    is row 1), never the patient.

    >>> refuse_leaks(["a", "b", "a"], ["train", "train", "val"], "m.csv")
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: m.csv: rows 2 and 4 are one patient in two splits (train and val); ...
    """
    (who, people), (which, column) = _encoded(patients), _encoded(splits)
    names = column.to_pylist()
    rows = np.flatnonzero(np.array([bool(name) for name in names], bool)[which]).astype(np.int32)
    first = np.zeros(len(people), np.int32)
    first[who[rows[::-1]]] = rows[::-1]  # the last that is assigned stays: each one's first row
    other = which[first[who[rows]]]
    learned = np.array([is_training(name) for name in names], bool)
    leaks = (other != which[rows]) & ~(learned[other] & learned[which[rows]])
    if leaks.any():
        row = int(rows[leaks.argmax()])
        earlier = int(first[who[row]])
        raise SpcxrError(
            f"{where}: rows {earlier + 2} and {row + 2} are one patient in two splits "
            f"({names[which[earlier]]} and {names[which[row]]}); give all rows of a patient one "
            "split, or leave it blank"
        )


def _encoded(cells: Sequence[str] | Column) -> tuple[np.ndarray, Column]:
    """``(n,)`` int32 numbers of the distinct texts, and those: a few bytes a row, no objects."""
    made = _text(cells).dictionary_encode()
    return made.indices.to_numpy(), made.dictionary


def _text(cells: Sequence[str] | Column) -> Column:
    return cells if isinstance(cells, pa.Array) else pa.array(cells, pa.string())
