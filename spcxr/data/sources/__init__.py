"""Public sets and plain folders -> `Manifest`. To add one: a module and a line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from spcxr.data.manifest import Manifest
from spcxr.data.sources import (
    chexpert,
    covid_chestxray,
    covidx,
    folder,
    jsrt,
    mimic,
    montgomery,
    nih,
    rsna,
    shenzhen,
    siim,
    vindr,
)
from spcxr.errors import SpcxrError


class PublicSet(Protocol):
    """The module of a set: which files it is known by, and how they are read."""

    def matches(self, root: Path) -> bool: ...

    def index(self, root: Path) -> Manifest: ...


# Each names where its set comes from and which of its files it reads. The first that matches a
# folder is taken; jsrt, known by its images' names alone, comes last.
PUBLIC_SETS: dict[str, PublicSet] = {
    "nih": nih,
    "chexpert": chexpert,
    "mimic": mimic,
    "rsna": rsna,
    "siim": siim,
    "vindr": vindr,
    "covidx": covidx,
    "covid-chestxray": covid_chestxray,
    "montgomery": montgomery,
    "shenzhen": shenzhen,
    "jsrt": jsrt,
}
SOURCES = ("folder", "csv", *PUBLIC_SETS)
TABLES = (".csv", ".parquet")


def detect(path: str | Path) -> str:
    """Which source a path is: by the files it holds, never by its name.

    A ``.csv`` or ``.parquet`` file, or a folder with ``manifest.csv``, is ``csv``; a public set is
    known by its own table; what is left is ``folder``.
    """
    path = Path(path)
    if not path.exists():
        raise SpcxrError(f"{path}: no such file or folder; check the path")
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return "csv"
        raise SpcxrError(f"{path}: a single file; give a folder or a .csv / .parquet manifest")
    if any((path / f"manifest{suffix}").is_file() for suffix in TABLES):
        return "csv"
    return next((name for name, known in PUBLIC_SETS.items() if known.matches(path)), "folder")


def index(
    path: str | Path,
    source: str = "auto",
    *,
    labels: Sequence[str] = (),
    root: str | Path | None = None,
    class_folders: bool = False,
) -> Manifest:
    """The manifest of one source.

    Parameters
    ----------
    source
        A name in `SOURCES`, or ``auto`` (`detect`).
    labels
        The label columns to keep (default: all that the source has).
    root
        Only for ``csv``: the folder its paths are relative to (default: the manifest's own).
    class_folders
        Only for ``folder``: the folder an image stands in is its class.

    Raises
    ------
    SpcxrError
        The source is not there or not what its name says; the line names the remedy.
    """
    path, source = Path(path), detect(path) if source == "auto" else source
    if not path.exists():
        raise SpcxrError(f"{path}: no such file or folder; check the path")
    if source == "csv":
        return Manifest.read(_table(path), root=root, labels=labels)
    if not path.is_dir():
        raise SpcxrError(f"{path}: not a folder, as --source {source} needs")
    if source == "folder":
        manifest = folder.index(path, class_folders=class_folders)
    else:
        manifest = PUBLIC_SETS[source].index(path)
    return manifest.with_labels(labels) if labels else manifest


def _table(path: Path) -> Path:
    if path.is_file():
        return path
    for suffix in TABLES:
        if (file := path / f"manifest{suffix}").is_file():
            return file
    raise SpcxrError(f"{path}: holds no manifest.csv; name the manifest file itself")
