"""Splits by patient: a hash decides, so a patient's side never depends on who else is there."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from spcxr.errors import SpcxrError

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
    patients: Sequence[str],
    splits: Sequence[str],
    ratios: Sequence[float] = RATIOS,
    seed: int = 0,
) -> list[str]:
    """Blank splits filled: by the patient's own other rows where there are any, else by hash.

    >>> fill_splits(["a", "a", "b"], ["test", "", ""], ratios=(1, 0, 0))
    ['test', 'test', 'train']
    """
    known = {p: s for p, s in zip(patients, splits, strict=True) if s}
    filled = {p: known.get(p) or hash_split(p, ratios, seed) for p in set(patients)}
    return [s or filled[p] for p, s in zip(patients, splits, strict=True)]


def refuse_leaks(patients: Sequence[str], splits: Sequence[str], where: str) -> None:
    """Refuse a patient who stands in two splits, unless both are learned from (`is_training`).

    Blank splits are not looked at. The message names rows as a spreadsheet counts them (the header
    is row 1), never the patient.

    >>> refuse_leaks(["a", "b", "a"], ["train", "train", "val"], "m.csv")
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: m.csv: rows 2 and 4 are one patient in two splits (train and val); ...
    """
    first: dict[str, tuple[int, str]] = {}
    for number, (patient, split) in enumerate(zip(patients, splits, strict=True), start=2):
        if not split:
            continue
        earlier, other = first.setdefault(patient, (number, split))
        if other != split and not (is_training(other) and is_training(split)):
            raise SpcxrError(
                f"{where}: rows {earlier} and {number} are one patient in two splits "
                f"({other} and {split}); give all rows of a patient one split, or leave it blank"
            )
