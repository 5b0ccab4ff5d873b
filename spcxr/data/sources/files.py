"""Walking a set's folder: every file once, in one order, hidden ones left out."""

from __future__ import annotations

import os
from pathlib import Path

from spcxr.errors import SpcxrError

# Files that stand beside images on every disc and are no images; any other file is tried.
NOT_IMAGES = {"dicomdir", "thumbs.db", "desktop.ini"}


def walk(root: Path) -> list[str]:
    """Paths of all files below ``root``, relative to it with ``/``, sorted; hidden ones left out.

    Links to folders are not followed: they may lead in a circle.

    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("b.png", ".hidden", "a/c.png", "DICOMDIR"):
    ...         file = pathlib.Path(folder, name)
    ...         file.parent.mkdir(exist_ok=True)
    ...         file.touch()
    ...     walk(pathlib.Path(folder))
    ['a/c.png', 'b.png']
    """
    found: list[str] = []
    for folder, below, names in os.walk(root, onerror=_refuse):
        below[:] = [name for name in below if not name.startswith(".")]
        inside = os.path.relpath(folder, root)
        prefix = "" if inside == "." else inside.replace(os.sep, "/") + "/"
        found += [
            prefix + name
            for name in names
            if not name.startswith(".") and name.lower() not in NOT_IMAGES
        ]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise SpcxrError(f"{error.filename}: cannot be listed ({error.strerror}); check permissions")


def by_stem(files: list[str], where: Path) -> dict[str, str]:
    """File name without suffix -> path; two files of one stem are refused."""
    made: dict[str, str] = {}
    for file in files:
        stem = Path(file).stem
        if stem in made:
            raise SpcxrError(f"{where}: {made[stem]} and {file} have one name; keep one of them")
        made[stem] = file
    return made
