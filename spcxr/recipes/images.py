"""The images a recipe works on: a store, or one prepared of whatever ``--data`` names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spcxr.data.remote import is_url
from spcxr.data.rows import RowSet
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.recipes import prepare

PHANTOM_PATIENT = "PHANTOM-"


def any_drawn(patients: NDArray[Any]) -> bool:
    """Whether any of these pseudonyms ``(n,)`` is a drawn phantom's.

    >>> any_drawn(np.array(["p1", "PHANTOM-0-00003"])), any_drawn(np.array(["p1"]))
    (True, False)
    """
    return any(str(patient).startswith(PHANTOM_PATIENT) for patient in np.unique(patients))


def phantoms_among(store: Store, rows: NDArray[np.int64] | RowSet) -> bool:
    """Whether any of these rows of a store is a drawn phantom's; no text is kept of any row."""
    drawn = store.manifest.rows_of_patients(PHANTOM_PATIENT)
    if isinstance(rows, RowSet):
        return bool(rows.holds(drawn).any())
    return bool(np.isin(drawn, rows).any())


def open_images(
    data: str,
    made: Path,
    *,
    size_px: int,
    wanted: Mapping[str, Any] | None = None,
    init: str = "",
) -> Store:
    """The store that ``data`` is, or one made of it at ``made`` as ``wanted`` says.

    A store that was made before is used again only if it holds these very files: `prepare` looks
    at them each time.

    Parameters
    ----------
    size_px
        side of the images to be made; those of ``wanted``, where larger.
    wanted
        the ``preprocess`` that weights were trained with, if there are any, and the ``init``
        they came from, for messages.

    Raises
    ------
    SpcxrError
        files that have changed since ``made`` was, or a store prepared otherwise than ``wanted``.
    """
    preprocess = wanted or {}
    if is_url(data) or (Path(data) / "store.json").is_file():
        store = Store.open(data)
    else:
        settings = prepare.PrepareConfig(
            sources=(data,),
            out=str(made),
            preset=preprocess.get("preset", "minmax"),
            size_px=max(size_px, preprocess.get("size_px", 0)),
            fit=preprocess.get("fit", "pad"),
            dtype=preprocess.get("dtype", "uint8"),
        )
        store = Store.open(_prepared(settings))
    if wanted is not None:
        refuse_other_preprocess(store, wanted, init)
        own, seen = store.preprocess.size_px, wanted.get("size_px", 0)
        if own < seen:
            print(
                f"{store.path}: images of {own} px, enlarged for {init}, which was trained on "
                f"{seen}; prepare them with --size-px {seen} for detail",
                file=sys.stderr,
            )
    return store


def _prepared(settings: prepare.PrepareConfig) -> Path:
    """Prepare; what `prepare` would mend by a flag of its own is mended here by hand."""
    try:
        return prepare.run(settings)
    except SpcxrError as error:
        fault, _, remedy = str(error).rpartition("; ")
        if "--overwrite" in remedy:
            remedy = "remove that folder to prepare the images anew, or choose another --out"
        elif "--root" in remedy or "--labels" in remedy:
            remedy += ": of spcxr-train prepare, whose store can be given as --data"
        else:
            raise
        raise SpcxrError(f"{fault}; {remedy}") from error


def refuse_other_preprocess(store: Store, wanted: Mapping[str, Any], init: str) -> None:
    """Refuse images whose grey levels or geometry are not those the weights have seen.

    The size may differ (images are resampled for the encoder), and the depth of the pixels.
    """
    own = store.preprocess.to_dict()
    other = [k for k in ("preset", "version", "fit") if own[k] != wanted.get(k)]
    if other:
        said = ", ".join(f"{k} {own[k]}, not {wanted.get(k)}" for k in other)
        raise SpcxrError(
            f"{store.path}: prepared otherwise than {init} was trained on ({said}); prepare the "
            f"images with --preset {wanted.get('preset')} --fit {wanted.get('fit')}"
        )
