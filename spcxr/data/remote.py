"""A store behind a URL, read by byte ranges through fsspec: S3, GCS, HTTP, memory and the like."""

from __future__ import annotations

import functools
import io
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import fsspec

from spcxr.errors import SpcxrError

TRIES = 4
FIRST_WAIT_S = 0.5  # before the second try; doubled before each other
BUFFER_BYTES = 2**20
FINAL = (FileNotFoundError, PermissionError, NotImplementedError)  # trying again does not help


def is_url(path: object) -> bool:
    """Whether a path is a URL, chained ones included.

    >>> is_url("s3://bucket/store"), is_url("filecache::https://host/store"), is_url("runs/store")
    (True, True, False)
    """
    return "://" in str(path)


@dataclass(frozen=True)
class RemoteFolder:
    """A folder behind a URL that fsspec understands; ``filecache::URL`` keeps a local copy.

    It connects when it is first read, in each process anew.

    >>> fsspec.filesystem("memory").pipe("/folder/a.txt", b"hello")
    >>> RemoteFolder("memory://folder").read(["a.txt", "a.txt"], [0, 3], [2, 5])
    [b'he', b'lo']
    """

    url: str

    def __str__(self) -> str:
        return self.url.rstrip("/")

    def read(
        self,
        names: Sequence[str],
        starts: Sequence[int | None],
        ends: Sequence[int | None],
    ) -> list[bytes]:
        """Byte ranges of files below the folder, all at once; None is a file's own start or end.

        What fails is asked for again, up to `TRIES` times in all, with longer and longer waits.

        Raises
        ------
        SpcxrError
            the address is of no kind that is installed, or a file cannot be read.
        """
        fs, root = _connected(self.url, os.getpid())
        made: dict[int, bytes] = {}
        left, wait = list(range(len(names))), FIRST_WAIT_S
        for attempt in range(1, TRIES + 1):
            answers = fs.cat_ranges(
                [f"{root}/{names[i]}" for i in left],
                [starts[i] for i in left],
                [ends[i] for i in left],
                on_error="return",
            )
            failed = [i for i, found in zip(left, answers, strict=True) if _is_error(found)]
            made |= {i: found for i, found in zip(left, answers, strict=True) if i not in failed}
            if not failed:
                return [made[i] for i in range(len(names))]
            error = answers[left.index(failed[0])]
            if attempt == TRIES or isinstance(error, FINAL):
                raise _refusal(f"{self}/{names[failed[0]]}", error) from error
            left = failed
            time.sleep(wait)
            wait *= 2
        raise AssertionError("the last try returns or raises")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a `RemoteFolder` whose size in bytes is known."""

    folder: RemoteFolder
    name: str
    size: int

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    def open(self) -> io.BufferedReader:
        """To be read as any file; what is read goes through `RemoteFolder.read`."""
        return io.BufferedReader(_Ranges(self), BUFFER_BYTES)


class _Ranges(io.RawIOBase):
    """The file-like face of a `RemoteFile`."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence, self._file.size)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._file.size)
        if end <= self._at:
            return 0
        found = self._file.folder.read([self._file.name], [self._at], [end])[0]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


@functools.lru_cache(maxsize=16)
def _connected(url: str, process: int) -> tuple[Any, str]:
    """The file system and the folder's path in it; a process that was forked makes its own."""
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise SpcxrError(f"{url}: cannot be reached ({line}); install what it needs") from error
    return fs, root.rstrip("/")


def _is_error(found: object) -> bool:
    return isinstance(found, BaseException)


def _refusal(file: str, error: BaseException) -> SpcxrError:
    if isinstance(error, FileNotFoundError):
        return SpcxrError(f"{file}: no such file; check the address, or copy the store there")
    line = (str(error).splitlines() or [""])[0]
    said = f"{type(error).__name__}: {line}" if line else type(error).__name__
    return SpcxrError(f"{file}: cannot be read ({said}); check access and connection, run again")
