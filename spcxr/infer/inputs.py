"""What a command of the use side was given: files and folders -> files, each with a name of its own.

Names of results come from names of files alone, never from what a header says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spcxr.data.sources.files import walk
from spcxr.errors import SpcxrError


@dataclass(frozen=True)
class Input:
    """A file, and the name (with ``/`` for folders) that its results go by."""

    path: Path
    name: str


def find_inputs(given: Sequence[str | Path]) -> list[Input]:
    """Every file once, in the order given; those of a folder sorted, with its sub-folders' names.

    A name is the file's without its suffix; where two would be one, those keep the suffix, and
    from then on are numbered.

    Raises
    ------
    SpcxrError
        something that is not there, or a folder without files.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a.dcm", "a.png", "b.png"):
    ...         Path(folder, name).touch()
    ...     [found.name for found in find_inputs([folder])]
    ['a.dcm', 'a.png', 'b']
    """
    files: dict[Path, Path] = {}  # where it is -> what it is called below what was given
    for one in map(Path, given):
        if not one.exists():
            raise SpcxrError(f"{one}: no such file or folder; check the path")
        if one.is_dir():
            found = {one / name: Path(name) for name in walk(one)}
            if not found:
                raise SpcxrError(f"{one}: no files in this folder; give one that holds images")
        else:
            found = {one: Path(one.name)}
        for path, called in found.items():
            files.setdefault(path, called)
    return [
        Input(path, name) for path, name in zip(files, _names(list(files.values())), strict=True)
    ]


def _names(called: list[Path]) -> list[str]:
    """Of case-blind file systems, too: ``A.png`` and ``a.png`` must not be one."""
    short = [path.with_suffix("").as_posix() for path in called]
    often = Counter(name.lower() for name in short)
    names = [
        path.as_posix() if often[name.lower()] > 1 else name
        for path, name in zip(called, short, strict=True)
    ]
    seen: set[str] = set()
    for position, name in enumerate(names):
        number, unique = 1, name
        while unique.lower() in seen:
            number += 1
            unique = f"{name}-{number}"
        seen.add(unique.lower())
        names[position] = unique
    return names
