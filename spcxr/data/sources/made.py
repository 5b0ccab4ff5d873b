"""Files a reader must make of a set's own before `prepare` can read them: masks, raw images."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from spcxr.errors import SpcxrError

FOLDER = "spcxr-made"  # below the set's own folder: paths of a manifest do not leave it


def png(pixels: np.ndarray) -> bytes:
    """``(H, W)`` uint8 or uint16 as a PNG.

    >>> png(np.zeros((2, 2), np.uint8))[:4]
    b'\\x89PNG'
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # a quarter of the time
    return buffer.getvalue()


def make_once(root: Path, name: str, make: Callable[[], bytes]) -> str:
    """The path (relative to ``root``) of a made file; made where it is not there, else kept.

    A file is kept, not written again, since its time is part of what `prepare` goes on by; so
    ``name`` must hold whatever the content depends on.

    Raises
    ------
    SpcxrError
        The set's folder cannot be written to.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     made = make_once(Path(folder), "a.txt", lambda: b"x")
    ...     again = make_once(Path(folder), "a.txt", lambda: b"never made")
    ...     made == again, Path(folder, made).read_bytes()
    (True, b'x')
    """
    file = root / FOLDER / name
    if not file.is_file():
        content = make()
        try:
            file.parent.mkdir(exist_ok=True)
            draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
            try:
                draft.write_bytes(content)
                draft.replace(file)
            finally:
                draft.unlink(missing_ok=True)  # of a full disk, say
        except OSError as error:
            raise SpcxrError(
                f"{file}: cannot be written ({error.strerror}), but this set's files must be "
                "converted first; make its folder writable, or copy it"
            ) from error
    return f"{FOLDER}/{name}"
