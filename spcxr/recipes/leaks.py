"""Whom a model was trained on, as digests beside its weights, and whether a test set holds them.

``trained_on.json`` in the model folder names no one: each patient and each picture of the training
and validation rows is a BLAKE2b digest under a key that stands in the file. Who has a list of ids
can still try each of them, so a file of patients that are secret is to be kept as secret.

What counts as one patient, in stores that may have been prepared apart (ours):

- an id that tells (``nih-00000013``, a UID, a number of eight digits or more) is that patient
  wherever it stands;
- a mere number (``1``, ``p007``, ``patient00012``) tells only within the folder the images came
  from: two sources count their patients from 1. Where only the number agrees it is said, and not
  counted;
- a row without an id is the image's file.

The very pixels are compared as well, whoever's they are said to be, where both stores were prepared
alike; images of a single grey level are not.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.data.manifest import Manifest
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.report import write_json

Rows = NDArray[np.int64]

FILE, FORMAT = "trained_on.json", 1
MERE_NUMBER = re.compile(
    r"(p|pt|pat|patient|case|subject|subj|sub|id|no|nr)?[\s_.-]*(\d{1,7})", re.IGNORECASE
)
ROWS_AT_ONCE = 256
DIGEST_BYTES = 12


@dataclass(frozen=True)
class Leaks:
    """What a test set shares with the rows a model was trained on or chosen by.

    ``rows`` of the set are of ``patients`` who were there; ``copies`` of them are the very pixels.
    ``first`` is the path of the first such row. ``doubtful`` patients share no more than a number
    with one of another folder. ``pixels_compared``: whether the stores were prepared alike.
    """

    patients: int
    rows: int
    copies: int
    first: str
    doubtful: int
    pixels_compared: bool


def mere_number(patient: str) -> str:
    """The number, where an id is no more than that; else ``""``.

    >>> mere_number("7"), mere_number("Patient_0007"), mere_number("nih-00000007")
    ('7', '7', '')
    """
    found = MERE_NUMBER.fullmatch(patient.strip())
    return (found.group(2).lstrip("0") or "0") if found else ""


def identities(manifest: Manifest, rows: Rows) -> NDArray[np.str_]:
    """Who each of these rows is, comparable between stores: ``(n,)`` text.

    >>> columns = {"path": ["a.png", "b.png", "c.png"], "patient_id": ["nih-1", "7", ""]}
    >>> identities(Manifest.from_columns(columns, root="/data"), np.arange(3)).tolist()
    ['nih-1', '/data#7', '/data/c.png']
    """
    columns = [manifest.column(name) for name in ("patient_id", "source_root", "path")]
    made = []
    for row in rows.tolist():
        patient, root, path = (column[row] for column in columns)
        number = mere_number(patient)
        made.append(f"{root}#{number}" if number else patient or f"{root}/{path}")
    return np.array(made, dtype=np.str_)


# --- written by training --------------------------------------------------------------------


def write_trained_on(
    model_folder: Path, store: Store, train: Rows, val: Rows, init: str = ""
) -> Path:
    """Write ``trained_on.json``: digests of the rows learned from, and of those chosen by.

    What the ``init`` that training began with was trained on by labels or masks is kept as well
    (``before``): fine-tuned twice, a model knows the patients of both times.

    Parameters
    ----------
    model_folder
        the exported model's.
    train, val
        rows ``(n,)`` of the store.
    init
        the run, model folder or weights that the encoder came from; ``""``: none.

    Returns
    -------
    the file. Equal runs write equal files.

    Raises
    ------
    SpcxrError
        a list beside the init that cannot be read.
    """
    rows = np.unique(np.concatenate([train, val]))
    salt = hashlib.blake2b(str(store.facts["content_hash"]).encode(), digest_size=16).hexdigest()
    ids = store.manifest.column("patient_id")
    numbers = {mere_number(ids[row]) for row in rows.tolist()} - {""}
    shown = {_digest(salt, picture) for picture in pictures(store, rows) if picture}
    facts = {
        "format": FORMAT,
        "what": "keyed BLAKE2b digests of the patients and pictures trained on or chosen by",
        "salt": salt,
        "preprocess": store.preprocess.to_dict(),
        "rows": {"train": len(train), "val": len(val)},
        # Sorted, so that nothing is told by the order.
        "patients": sorted({_digest(salt, who) for who in identities(store.manifest, rows)}),
        "numbers": sorted(_digest(salt, f"#{number}") for number in numbers),
        "pictures": sorted(shown),
        "before": _told_before(init),
    }
    return write_json(model_folder / FILE, facts)


def _told_before(init: str) -> list[dict[str, Any]]:
    """What stands in an init's list, and what that one kept of its own init's, each by itself."""
    place = Path(init)
    folders = [place.parent] if place.is_file() else [place / "model", place]
    file = next((f / FILE for f in folders if init and (f / FILE).is_file()), None)
    if file is None:
        return []
    return _lists(file)


def _lists(file: Path) -> list[dict[str, Any]]:
    """What stands in a model's list, and what it kept of its init's, each by itself."""
    known = _read(file)
    return [{k: v for k, v in known.items() if k != "before"}, *known.get("before", [])]


def _digest(salt: str, text: str) -> str:
    key = bytes.fromhex(salt)
    return hashlib.blake2b(text.encode(), key=key, digest_size=DIGEST_BYTES).hexdigest()


def pictures(store: Store, rows: Rows) -> list[str]:
    """A digest of the pixels of each of ``rows (n,)``; ``""`` for an image of one grey level."""
    made = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        for image in store.images(rows[start : start + ROWS_AT_ONCE]):
            digest = hashlib.blake2b(image.tobytes(), digest_size=DIGEST_BYTES)
            made.append(digest.hexdigest() if image.min() < image.max() else "")
    return made


def copies_among(digests: list[str]) -> int:
    """How many of these `pictures` are an earlier one of them.

    >>> copies_among(["aa", "", "bb", "aa", ""])
    1
    """
    told = [digest for digest in digests if digest]
    return len(told) - len(set(told))


# --- read by evaluate -----------------------------------------------------------------------


def find_leaks(
    model_folder: Path, store: Store, rows: Rows, shown: list[str] | None = None
) -> Leaks | None:
    """Look for the patients and pictures of a model's training among ``rows (n,)`` of a store.

    Those of a model within it, which finds the lungs, are its own too.

    ``shown`` are the rows' `pictures`, where they are known already.

    Returns
    -------
    None where the model has no ``trained_on.json``: it is not known.

    Raises
    ------
    SpcxrError
        a file that cannot be read.
    """
    file = model_folder / FILE
    if not file.is_file():
        return None
    own = store.preprocess.to_dict()
    # A model that finds the lungs lies in a folder within, with a list of its own.
    lists = [told for each in (file, *model_folder.rglob(f"*/{FILE}")) for told in _lists(each)]
    alike_prepared = [told["preprocess"] == own for told in lists]
    if shown is None:
        shown = pictures(store, rows) if any(alike_prepared) else [""] * len(rows)
    who, ids = identities(store.manifest, rows), store.manifest.column("patient_id")
    numbers = [f"#{n}" if (n := mere_number(ids[row])) else "" for row in rows.tolist()]
    met, copied, alike = (np.zeros(len(rows), bool) for _ in range(3))
    for told, compared in zip(lists, alike_prepared, strict=True):
        met |= _among(told, "patients", who.tolist())
        alike |= _among(told, "numbers", numbers)
        if compared:
            copied |= _among(told, "pictures", shown)
    shared = met | copied
    first = store.manifest.column("path")[int(rows[shared.argmax()])] if shared.any() else ""
    return Leaks(
        patients=len(np.unique(who[shared])),
        rows=int(shared.sum()),
        copies=int(copied.sum()),
        first=first,
        doubtful=len(np.unique(who[alike & ~shared])),
        pixels_compared=all(alike_prepared),
    )


def _among(told: Mapping[str, Any], name: str, texts: Sequence[str]) -> NDArray[np.bool_]:
    """``(n,)`` whether each of these texts is in one of a list's columns; ``""`` never is."""
    kept = set(told[name])
    return np.array([bool(t) and _digest(told["salt"], t) in kept for t in texts], bool)


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text())
        wanted = ("salt", "preprocess", "patients", "numbers", "pictures")
        whole = known["format"] == FORMAT and all(name in known for name in wanted)
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise SpcxrError(
            f"{file}: not readable as the list of whom the model was trained on; restore it, or "
            "remove it to measure without knowing"
        )
    return dict(known)


def refuse_leaks(leaks: Leaks | None, where: str, model: str) -> None:
    """Refuse a test set that holds a patient or picture of the model's training.

    >>> refuse_leaks(Leaks(2, 3, 0, "a.png", 0, True), "store: test", "runs/tb")
    Traceback (most recent call last):
    spcxr.errors.SpcxrError: store: test: 2 patients (3 rows, the first a.png) were in ...
    """
    if leaks is None or not leaks.rows:
        return
    many = "patient" if leaks.patients == 1 else "patients"
    raise SpcxrError(
        f"{where}: {leaks.patients} {many} ({leaks.rows} rows, the first {leaks.first}) were in "
        f"training or choice of {model}; test on others, or measure all the same with --allow-leak"
    )


def said(leaks: Leaks | None) -> str:
    """A line for the report.

    >>> said(None)
    'not known: the model does not say whom it was trained on'
    >>> said(Leaks(0, 0, 0, "", 3, False))
    'none found; pixels not compared (prepared at other settings); 3 share no more than a number'
    """
    if leaks is None:
        return "not known: the model does not say whom it was trained on"
    parts = ["none found"]
    if leaks.rows:
        parts = [f"{leaks.patients} patients, {leaks.rows} images, {leaks.copies} pixel by pixel"]
    if not leaks.pixels_compared:
        parts.append("pixels not compared (prepared at other settings)")
    if leaks.doubtful:
        parts.append(f"{leaks.doubtful} share no more than a number")
    return "; ".join(parts)
