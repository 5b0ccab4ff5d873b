"""The files of a store: growing ``.npy`` shards, checks, and the rename that publishes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from spcxr.data.remote import RemoteFile, RemoteFolder
from spcxr.errors import SpcxrError

FORMAT, VERSION = "spcxr-store", 1
HASH_BYTES = 2**20


class GrowingArray:
    """One ``.npy`` file written row by row; numpy's header leaves room for the final count."""

    def __init__(self, path: Path, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
        self.path, self.shape, self.dtype, self.rows = path, shape, dtype, 0
        self._file: IO[bytes] = path.open("wb")
        self._header()

    def _header(self) -> None:
        fields = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.shape),
        }
        np.lib.format.write_array_header_1_0(self._file, fields)

    def append(self, image: np.ndarray) -> None:
        try:
            self._file.write(np.ascontiguousarray(image).data)
        except OSError as error:
            error.filename = str(self.path)  # which a write's own error does not say
            raise
        self.rows += 1

    def fill(self, rows: int, value: int) -> None:
        row = np.full(self.shape, value, self.dtype)
        for _ in range(rows):
            self.append(row)

    def abandon(self) -> None:
        """Close a file that is not wanted any more; a full disk cannot make that fail."""
        with contextlib.suppress(OSError):
            self._file.close()

    def close(self) -> dict[str, Any]:
        """Finish the file; its name, size and hash."""
        body = self._file.tell()
        self._file.seek(0)
        self._header()
        wanted = self._file.tell() + self.rows * math.prod(self.shape) * self.dtype.itemsize
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if body != wanted:
            raise SpcxrError(
                f"{self.path}: {body} bytes written instead of {wanted}; free some space, and run "
                "the same command again"
            )
        return {"file": self.path.name, "bytes": body, "sha256": hash_file(self.path)}


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Refuse an ``out`` that holds something, unless it is a store that may be overwritten."""
    if not out.exists():
        return
    if not out.is_dir():
        raise SpcxrError(f"{out}: a file stands there; choose another out")
    if not any(out.iterdir()):
        return
    if not (out / "store.json").is_file():
        raise SpcxrError(f"{out}: holds something that is no store; choose another out")
    if not overwrite:
        raise SpcxrError(f"{out}: holds a finished store; choose another out, or give --overwrite")


def publish(work: Path, out: Path, overwrite: bool) -> None:
    """Rename a finished folder to its place; an old store goes only once the new one is whole."""
    refuse_occupied(out, overwrite)
    if out.exists() and any(out.iterdir()):
        old = out.with_name(out.name + ".replaced")
        if old.exists():
            raise SpcxrError(f"{old}: left by an interrupted overwrite; remove it and run again")
        os.rename(out, old)
        os.rename(work, out)
        shutil.rmtree(old)
    else:
        os.rename(work, out)


def read_facts(path: Path | RemoteFolder) -> dict[str, Any]:
    """``store.json`` of a store, or the refusal of what is none."""
    file = f"{path}/store.json"
    try:
        if isinstance(path, Path):
            _refuse_no_store(path)
            text = Path(file).read_bytes()
        else:
            text = path.read(["store.json"], [None], [None])[0]
        facts = json.loads(text)
    except (OSError, ValueError) as error:
        raise SpcxrError(f"{file}: cannot be read ({error}); prepare the store again") from error
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise SpcxrError(f"{file}: not a store of spcxr's; make one with: spcxr-train prepare")
    if facts["version"] > VERSION:
        raise SpcxrError(
            f"{file}: format {facts['version']}, this spcxr reads up to {VERSION}; update spcxr"
        )
    return facts


def _refuse_no_store(path: Path) -> None:
    if not path.is_dir():
        raise SpcxrError(
            f"{path}: no such store; make one with: spcxr-train prepare SRC --out {path}"
        )
    if not (path / "store.json").is_file():
        unfinished = (path / "work.json").is_file() or path.name.endswith(".partial")
        said = "an unfinished store; run the same prepare again" if unfinished else (
            f"not a store; make one with: spcxr-train prepare {path} --out STORE"
        )  # fmt: skip
        raise SpcxrError(f"{path}: {said}")


def check_size(file: Path, size: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != size:
        said = "missing" if found is None else f"{found} bytes instead of {size}"
        raise SpcxrError(f"{file}: {said}; the store is torn: copy or prepare it again")


def check_hash(file: Path | RemoteFile, sha256: str) -> None:
    if hash_file(file) != sha256:
        raise SpcxrError(f"{file}: its content has changed; copy or prepare the store again")


def hash_file(file: Path | RemoteFile) -> str:
    digest = hashlib.sha256()
    with file.open("rb") if isinstance(file, Path) else file.open() as stream:
        while block := stream.read(HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()


def content_hash(shards: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> str:
    """One hash for all: the files' hashes in order."""
    kinds = ("images", "masks")
    parts = [shard[kind]["sha256"] for shard in shards for kind in kinds if shard.get(kind)]
    return hashlib.sha256("\n".join([*parts, manifest["sha256"]]).encode()).hexdigest()


def write_durably(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
