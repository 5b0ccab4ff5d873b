"""What a command was given, files and folders -> files, each with a name of its own.

Names of results come from names of files alone, never from what a header says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spcxr.errors import SpcxrError


@dataclass(frozen=True)
class Input:
    """A file, and the name (with ``/`` for folders) that its results go by."""

    path: Path
    name: str


def find_inputs(
    given: Sequence[str | Path], taken: Mapping[Path, str] | None = None
) -> list[Input]:
    """Every file once, in the order given; those of a folder sorted, with its sub-folders' names.

    A name is the file's without its suffix; where two would be one, those keep the suffix, and
    from then on are numbered.

    Parameters
    ----------
    taken
        files of earlier runs and the names that they have, and keep.

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
    from spcxr.data.sources.files import walk  # here: beside it stands pyarrow

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
    names = _names(files, taken or {})
    return [Input(path, name) for path, name in zip(files, names, strict=True)]


def _names(files: Mapping[Path, Path], taken: Mapping[Path, str]) -> list[str]:
    """For file systems that are blind to case, too: ``A.png`` and ``a.png`` must not be one."""
    short = [called.with_suffix("").as_posix() for called in files.values()]
    often = Counter(name.lower() for name in short)
    seen = {name.lower() for name in taken.values()}
    names = []
    for (path, called), plain in zip(files.items(), short, strict=True):
        if path in taken:
            names.append(taken[path])
            continue
        wanted = called.as_posix() if often[plain.lower()] > 1 else plain
        number, name = 1, wanted
        while name.lower() in seen:
            number += 1
            name = f"{wanted}-{number}"
        seen.add(name.lower())
        names.append(name)
    return names
