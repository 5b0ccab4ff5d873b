"""What a command was given, files and folders -> files, each with a name of its own.

Names of results come from names of files alone, never from what a header says.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spcxr.errors import SpcxrError

LONGEST = 240


@dataclass(frozen=True)
class Input:
    """A file, and the name (with ``/`` for folders) that its results go by."""

    path: Path
    name: str


def find_inputs(
    given: Sequence[str | Path],
    taken: Mapping[Path, str] | None = None,
    out: Path | None = None,
) -> list[Input]:
    """Every file once, in the order given; those of a folder sorted, with its sub-folders' names.

    A name is the file's without its suffix; where two would be one, those keep the suffix, and
    from then on are numbered.

    Parameters
    ----------
    taken
        files of earlier runs and the names that they have, and keep.
    out
        the folder or file of the results: neither it, nor what lies in it or is kept beside it
        until all is done, is an input of a folder around it.

    Raises
    ------
    SpcxrError
        something that is not there, a folder without files, or one that is ``out`` itself.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a.dcm", "a.png", "b.png"):
    ...         Path(folder, name).touch()
    ...     [found.name for found in find_inputs([folder])]
    ['a.dcm', 'a.png', 'b']
    """
    files = _files(given, out)
    names = _names(files, taken or {})
    return [Input(path, name) for path, name in zip(files, names, strict=True)]


def _files(given: Sequence[str | Path], out: Path | None) -> dict[Path, Path]:
    """Where each file is -> what it is called below what was given."""
    files: dict[Path, Path] = {}
    seen: set[str] = set()
    for one in map(Path, given):
        if not one.exists():
            raise SpcxrError(f"{one}: no such file or folder; check the path")
        if one.is_dir():
            found = {one / name: Path(name) for name in _walk_beside(one, out)}
            if not found:
                raise SpcxrError(f"{one}: no files in this folder; give one that holds images")
        else:
            found = {one: Path(one.name)}
        for path, called in found.items():
            place = os.path.abspath(path)  # one file may be given as a.png and ./b/../a.png
            if place not in seen:
                seen.add(place)
                files[path] = called
    return files


def _walk_beside(folder: Path, out: Path | None) -> list[str]:
    """The files below a folder, without those of ``out``: results are no radiographs."""
    from spcxr.data.sources.files import walk  # the readers of public sets: not at start-up

    names = walk(folder)
    if out is None or not (place := out.resolve()).is_relative_to(folder.resolve()):
        return names
    if (below := place.relative_to(folder.resolve())) == Path():
        raise SpcxrError(f"{out}: is an input, too; choose another --out")
    beside = (f"{out.name}.parts", f"{out.name}.rows.csv", f"{out.stem}.settings.json")
    ours = tuple(below.with_name(name).as_posix() for name in (out.name, *beside))
    inside = tuple(f"{name}/" for name in ours)
    return [name for name in names if name not in ours and not name.startswith(inside)]


def _names(files: Mapping[Path, Path], taken: Mapping[Path, str]) -> list[str]:
    """For file systems that are blind to case, too: ``A.png`` and ``a.png`` must not be one."""
    short = [_short(called) for called in files.values()]
    often = Counter(name.lower() for name in short)
    seen = {name.lower() for name in taken.values()}
    names = []
    for (path, called), plain in zip(files.items(), short, strict=True):
        if path in taken:
            names.append(taken[path])
            continue
        wanted = _fitting(called) if often[plain.lower()] > 1 else plain
        number, name = 1, wanted
        while name.lower() in seen:
            number += 1
            name = f"{wanted}-{number}"
        seen.add(name.lower())
        names.append(name)
    return names


def _short(called: Path) -> str:
    """Without its suffix; the last number of a UID is none.

    >>> _short(Path("a/b.png")), _short(Path("1.2.840.10008.77"))
    ('a/b', '1.2.840.10008.77')
    """
    return _fitting(called if called.suffix[1:].isdigit() else called.with_suffix(""))


def _fitting(called: Path) -> str:
    """A file system's names have 255 bytes at most; what is cut leaves room for number and suffix.

    >>> len(_fitting(Path("a" * 255)))
    240
    """
    fits = os.fsencode(called.name)[:LONGEST]
    return called.with_name(fits.decode(errors="ignore") or "_").as_posix()
