"""What a manifest's masks show: one structure or several, and in which columns they stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from spcxr.data.manifest import Manifest
from spcxr.data.masks import LUNG, UNKNOWN, Mask
from spcxr.data.paths import ABSENT, FILES, RUNS, split_paths, structure_columns
from spcxr.errors import SpcxrError


@dataclass(frozen=True)
class Structures:
    """What the masks of a manifest show, and in which columns.

    ``names`` in the order of their class numbers. ``values`` are those of indexed files in
    ``mask_path``; ``columns`` says that each structure has a column of its own.
    """

    names: tuple[str, ...] = LUNG
    values: tuple[int, ...] = ()
    columns: bool = False

    @property
    def read(self) -> tuple[str, ...]:
        """The columns that may be read, in the order of `masks`' cells."""
        own = tuple(f"{kind}{name}" for name in self.names for kind in (FILES, RUNS))
        return own if self.columns else ("mask_path",)

    def masks(self, cells: Mapping[str, str]) -> tuple[Mask, ...]:
        """The parts of one row's mask; none where there is no mask, or not of all structures.

        >>> Structures(("left lung", "right lung")).masks({"mask_path": "l.png|r.png"})[1].number
        2
        >>> Structures(("lung", "heart"), columns=True).masks({"mask:lung": "a.png"})
        ()
        """
        if self.columns:
            parts = [self._own(number, name, cells) for number, name in enumerate(self.names, 1)]
            return tuple(part for own in parts for part in own) if all(parts) else ()
        files = split_paths(cells["mask_path"])
        if self.values:
            return tuple(Mask(file, values=self.values) for file in files)
        by_place = len(self.names) > 1
        return tuple(Mask(f, number=k if by_place else 1) for k, f in enumerate(files, 1))

    @staticmethod
    def _own(number: int, name: str, cells: Mapping[str, str]) -> list[Mask]:
        cell, runs = (cells.get(f"{kind}{name}") or "" for kind in (FILES, RUNS))
        if runs or cell == ABSENT:
            return [Mask(runs=runs or ABSENT, number=number)]
        return [Mask(file, number=number) for file in split_paths(cell)]


def settle_structures(
    manifest: Manifest, wanted: Sequence[str], where: str
) -> tuple[Manifest, Structures]:
    """What the masks show: the columns ``mask:NAME`` and ``rle:NAME``, or what is ``wanted``.

    Parameters
    ----------
    wanted
        ``NAME=VALUE`` each for indexed files in ``mask_path``; ``NAME`` each for the files of a
        ``mask_path`` cell in their order (one name: all of them, united), or to choose among
        the columns. None: all columns, or a lung.

    Returns
    -------
    The manifest, with a note where masks of some structures only are left out; the structures.

    Raises
    ------
    SpcxrError
        names that do not fit the columns, or cells with another number of files.
    """
    found = structure_columns(manifest.columns.column_names)
    if not found:
        made = _parsed(wanted)
        if len(made.names) > 1 and not made.values:
            _refuse_other_counts(manifest, len(made.names), where)
        return manifest, made
    names = tuple(wanted) or found
    if odd := [name for name in names if name not in found]:
        raise SpcxrError(
            f"{where}: no column {FILES}{odd[0]}; the masks' columns are of: {', '.join(found)}"
        )
    if any(manifest.column("mask_path")):
        raise SpcxrError(
            f"{where}: has masks in mask_path and in columns {FILES}NAME; keep one kind"
        )
    made = Structures(names, columns=True)
    return replace(manifest, notes=(*manifest.notes, *_in_part(manifest, made, where))), made


def _parsed(wanted: Sequence[str]) -> Structures:
    if not wanted:
        return Structures()
    pairs = [text.rpartition("=") for text in wanted]
    names = tuple((name if equals else rest).strip() for name, equals, rest in pairs)
    if len(set(names)) != len(names) or not all(names):
        raise SpcxrError(f"structures {', '.join(wanted)}: give each a name of its own")
    if not any(equals for _, equals, _ in pairs):
        return Structures(names)
    values = [rest.strip() for _, equals, rest in pairs if equals]
    fit = [int(v) for v in values if v.isdecimal() and 0 < int(v) < UNKNOWN]
    if len(fit) != len(names) or len(set(fit)) != len(fit):
        raise SpcxrError(
            f"structures {', '.join(wanted)}: give each a value from 1 to {UNKNOWN - 1} of its "
            'own, as in "left lung=1,right lung=2" (0 is none of them, 255 unknown)'
        )
    return Structures(names, tuple(fit))


def _refuse_other_counts(manifest: Manifest, count: int, where: str) -> None:
    for path, cell in zip(manifest.column("path"), manifest.column("mask_path"), strict=True):
        if (found := len(split_paths(cell))) not in (0, count):
            raise SpcxrError(
                f"{where}: {path} has {found} mask files for {count} structures; give a file "
                "each (a.png|b.png), or NAME=VALUE each for indexed files"
            )


def _in_part(manifest: Manifest, structures: Structures, where: str) -> Iterator[str]:
    filled = np.stack([manifest.drawn(name) for name in structures.names])
    if count := int((filled.any(0) & ~filled.all(0)).sum()):
        yield (
            f"{where}: {count} rows have masks of some structures only (of all: "
            f"{', '.join(structures.names)}) and count as without a mask; {ABSENT} says that a "
            "structure is absent"
        )
