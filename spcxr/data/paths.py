"""Paths of a manifest: below its root, and each image once; which columns hold masks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from spcxr.data.tables import Columns
from spcxr.errors import SpcxrError

FILES, RUNS = "mask:", "rle:"  # and a structure's name: the columns that hold its masks
ABSENT = "-1"  # in such a column: the structure is known not to be there


def split_paths(cell: str) -> tuple[str, ...]:
    """The paths in one ``mask_path`` cell.

    >>> split_paths("left.png|right.png"), split_paths("")
    (('left.png', 'right.png'), ())
    """
    return tuple(part for part in cell.split("|") if part)


def check_paths(text: Columns, root: Path, name: str) -> None:
    """Make paths relative to the root; refuse those that leave it, and doubled rows."""
    inside = Inside(root)
    files = ["mask_path", *(key for key in text if key.startswith(FILES))]
    for index in range(len(text["path"])):
        number = index + 2
        if not text["path"][index]:
            raise SpcxrError(f"{name}: row {number} has no path; fill it or drop the row")
        for key in ("path", *files):
            cell = text[key][index]
            if cell == ABSENT and key.startswith(FILES):
                continue
            parts = split_paths(cell) if key in files else [cell]
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


def structure_columns(names: Iterable[str]) -> tuple[str, ...]:
    """The structures that have mask columns of their own, in the columns' order.

    >>> structure_columns(["path", "mask:left lung", "rle:heart", "mask:heart"])
    ('left lung', 'heart')
    """
    kinds = (FILES, RUNS)
    found = (n.removeprefix(k) for n in names for k in kinds if n.startswith(k))
    return tuple(dict.fromkeys(filter(None, found)))


def mask_columns(text: Columns, name: str) -> tuple[str, ...]:
    """The columns of structures' masks; refused where one structure has two in a row."""
    columns = tuple(key for key in text if key.startswith((FILES, RUNS)))
    for structure in structure_columns(columns):
        pair = [text.get(f"{kind}{structure}", ()) for kind in (FILES, RUNS)]
        for number, cells in enumerate(zip(*pair, strict=False), start=2):
            if all(cells):
                raise SpcxrError(
                    f"{name}: row {number} has {structure} in {FILES}{structure} and in "
                    f"{RUNS}{structure}; keep one"
                )
    return columns


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
