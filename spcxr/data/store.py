"""The store: images packed into ``.npy`` shards that numpy alone can map, and their manifest."""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from spcxr.data.manifest import Manifest
from spcxr.data.masks import LUNG
from spcxr.data.presets import Preprocess
from spcxr.data.remote import RemoteFile, RemoteFolder, is_url
from spcxr.data.shards import (
    FORMAT,
    VERSION,
    GrowingArray,
    check_hash,
    check_size,
    content_hash,
    hash_file,
    publish,
    read_facts,
    refuse_occupied,
    write_durably,
)
from spcxr.data.splits import is_training
from spcxr.errors import SpcxrError

NO_MASK = 255
KINDS, MANIFEST = ("images", "masks"), "manifest.parquet"
OPEN_SHARDS = 64  # mapped at once: each holds one file handle
SHARD_BYTES = 512 * 2**20

Box = tuple[int, int, int, int]


class Store:
    """Images, masks and manifest of one prepared set; row number = image id.

    Files of this machine are memory-mapped; behind a URL (``s3://bucket/store``, ``https://...``,
    ``filecache::s3://...``) the rows that are asked for are read, and no more.

    A folder of ``images-00000.npy ...`` ``(n, S, S)`` uint8 or uint16, ``masks-00000.npy ...``
    uint8 for the shards where a row has a mask (255 = none), ``manifest.parquet``, ``store.json``
    and ``rejected.csv``.

    Attributes
    ----------
    manifest : Manifest
        One row an image.
    preprocess : Preprocess
        How the images were made; travels with every model trained on them.
    mean, std : float
        Of the training rows' content (not their padding), with pixels scaled to [0, 1].
    """

    def __init__(
        self, path: Path | RemoteFolder, facts: Mapping[str, Any], manifest: Manifest
    ) -> None:
        self.path, self.facts, self.manifest = path, dict(facts), manifest
        self.preprocess = Preprocess.from_dict(facts["preprocess"])
        self.mean, self.std = float(facts["mean"]), float(facts["std"])
        self._shards: list[dict[str, Any]] = facts["shards"]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in self._shards)])
        self._map = functools.lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, path: str | Path | RemoteFolder) -> Store:
        """Open a store after a cheap check (version, files, sizes, row counts).

        The manifest's columns are read as they are asked for. Behind a URL, image files are looked
        at only when they are read.

        Raises
        ------
        SpcxrError
            The folder is no store, is unfinished or torn, or was written by a newer spcxr; the URL
            cannot be reached.
        """
        if isinstance(path, str):
            path = RemoteFolder(path) if is_url(path) else Path(path)
        facts = read_facts(path)
        if isinstance(path, Path):
            for shard in facts["shards"]:
                for kind in KINDS:
                    if shard.get(kind):
                        check_size(path / shard[kind]["file"], shard[kind]["bytes"])
            check_size(path / MANIFEST, facts["manifest"]["bytes"])
        manifest = Manifest.read_stored(_file(path, MANIFEST, facts["manifest"]["bytes"]))
        if len(manifest) != sum(shard["rows"] for shard in facts["shards"]):
            raise SpcxrError(f"{path}: manifest and images differ in number; prepare it again")
        return cls(path, facts, replace(manifest, notes=tuple(facts["notes"])))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        size = self.preprocess.size_px
        return f"Store({str(self.path)!r}, {len(self)} images of {size} x {size})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Store.open, (self.path,)  # a worker process maps the files anew

    @property
    def has_masks(self) -> bool:
        """Whether any row has a mask."""
        return any(shard.get("masks") for shard in self._shards)

    @property
    def structures(self) -> tuple[str, ...]:
        """What the masks show: class number k is ``structures[k - 1]``; one lung if not said."""
        return tuple(self.facts.get("structures", LUNG))

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 or uint16."""
        return np.dtype(self.facts["dtype"])

    def images(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """``(n, S, S)`` uint8 or uint16: a copy of the images of these rows, in this order."""
        return self._gather("images", rows, self.dtype)

    def named(self, row: int) -> str:
        """A row in words, for messages: ``stores/a: row 3 (films/7.png)``."""
        return f"{self.path}: row {row} ({self.manifest.column('path')[row]})"

    def masks(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """``(n, S, S)`` uint8 class numbers: k is ``structures[k - 1]``, 0 none of them, 255 where
        nothing is known."""
        if not self.has_masks:
            raise SpcxrError(f"{self.path}: no row has a mask; prepare a manifest with mask_path")
        return self._gather("masks", rows, np.dtype(np.uint8))

    def _gather(
        self, kind: str, rows: Sequence[int] | np.ndarray, dtype: np.dtype[Any]
    ) -> np.ndarray:
        wanted = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"{self.path}: row out of range; the store has {len(self)} rows")
        size = self.preprocess.size_px
        out = np.empty((len(wanted), size, size), dtype)
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        inside = wanted - self._starts[shards]
        if isinstance(self.path, RemoteFolder):
            self._fetch(self.path, kind, shards, inside, out)
            return out
        for slot, (shard, row) in enumerate(zip(shards.tolist(), inside.tolist(), strict=True)):
            mapped = self._map(kind, shard)
            out[slot] = NO_MASK if mapped is None else mapped[row]
        return out

    def _open_shard(self, kind: str, shard: int) -> np.ndarray | None:
        entry = self._shards[shard].get(kind)
        if not entry:
            return None
        # A plain array over the map: np.memmap's own indexing costs microseconds a row.
        file = f"{self.path}/{entry['file']}"
        return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))

    def _fetch(
        self, folder: RemoteFolder, kind: str, shards: np.ndarray, rows: np.ndarray, out: np.ndarray
    ) -> None:
        """Fill ``out`` from the rows ``(n,)`` of these shards ``(n,)``, all asked for at once."""
        names, starts, slots = [], [], []
        for slot, (shard, row) in enumerate(zip(shards.tolist(), rows.tolist(), strict=True)):
            if entry := self._shards[shard].get(kind):
                # A .npy file is a header and the rows: what is not rows is the header.
                first = entry["bytes"] - self._shards[shard]["rows"] * out[slot].nbytes
                names.append(entry["file"])
                starts.append(first + row * out[slot].nbytes)
                slots.append(slot)
            else:
                out[slot] = NO_MASK
        size = out[0].nbytes if len(out) else 0
        for slot, name, found in zip(
            slots, names, folder.read(names, starts, [at + size for at in starts]), strict=True
        ):
            if len(found) != size:
                raise SpcxrError(f"{folder}/{name}: ends early; the store is torn: copy it again")
            out[slot] = np.frombuffer(found, out.dtype).reshape(out[slot].shape)

    def verify(self) -> None:
        """Read every byte and compare with the recorded hashes; refuse a changed store."""
        for shard in self._shards:
            for kind in KINDS:
                if entry := shard.get(kind):
                    check_hash(_file(self.path, entry["file"], entry["bytes"]), entry["sha256"])
        entry = self.facts["manifest"]
        check_hash(_file(self.path, MANIFEST, entry["bytes"]), entry["sha256"])
        if content_hash(self._shards, entry) != self.facts["content_hash"]:
            raise SpcxrError(f"{self.path}/store.json: hashes do not agree; prepare it again")


def _file(path: Path | RemoteFolder, name: str, size: int) -> Path | RemoteFile:
    return path / name if isinstance(path, Path) else RemoteFile(path, name, size)


class StoreWriter:
    """Streams images into a store; memory stays flat, and nothing half-written looks whole.

    Files grow in ``work`` (default ``OUT.partial`` beside ``out``), which `finish` renames to
    ``out``. Leaving the ``with`` block by an error removes what was written.

    >>> import tempfile, numpy as np
    >>> from spcxr.data.manifest import Manifest
    >>> from spcxr.data.presets import Preprocess
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     preprocess = Preprocess(size_px=4)
    ...     with StoreWriter(folder + "/store", preprocess) as writer:
    ...         writer.add(np.full((4, 4), 51, np.uint8))
    ...         store = writer.finish(Manifest.from_columns({"path": ["a.png"]}, root=folder))
    ...     len(store), store.images([0]).shape, round(store.mean, 6), store.std
    (1, (1, 4, 4), 0.2, 0.0)
    """

    def __init__(
        self,
        out: str | Path,
        preprocess: Preprocess,
        *,
        overwrite: bool = False,
        work: str | Path | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.out, self.preprocess, self.overwrite = Path(out), preprocess, overwrite
        refuse_occupied(self.out, overwrite)
        self.work = Path(work) if work else self.out.with_name(self.out.name + ".partial")
        self.dtype = np.dtype(preprocess.dtype)
        size = preprocess.size_px
        self._per_shard = max(1, shard_bytes // (size * size * self.dtype.itemsize))
        self._shards: list[dict[str, Any]] = []
        self._images: GrowingArray | None = None
        self._masks: GrowingArray | None = None
        self._moments = [array("Q"), array("Q"), array("Q")]  # pixels, sum, sum of squares
        if not work and self.work.exists():
            raise SpcxrError(f"{self.work}: left by another run; remove it, or choose another out")
        self.work.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if kind is None:
            self._close_shard()
            return
        for growing in filter(None, (self._images, self._masks)):
            growing.abandon()
        if self.work.exists():
            for file in [*self.work.glob("images-*.npy"), *self.work.glob("masks-*.npy")]:
                file.unlink()
            if not any(self.work.iterdir()):
                self.work.rmdir()

    def add(
        self, pixels: np.ndarray, mask: np.ndarray | None = None, box: Box | None = None
    ) -> None:
        """Append one image.

        ``pixels`` ``(S, S)`` of the preprocess' dtype; ``mask`` ``(S, S)`` uint8 or None; ``box``
        (top, left, height, width) of the content that mean and std are taken over (default: all).
        """
        expected = (self.preprocess.size_px,) * 2
        if pixels.shape != expected or pixels.dtype != self.dtype:
            raise ValueError(f"pixels {pixels.shape} {pixels.dtype}, not {expected} {self.dtype}")
        if self._images is None:
            self._images = GrowingArray(self._file("images"), expected, self.dtype)
        if mask is not None and self._masks is None:
            self._masks = GrowingArray(self._file("masks"), expected, np.dtype(np.uint8))
            self._masks.fill(self._images.rows, NO_MASK)
        self._images.append(pixels)
        if self._masks is not None:
            blank = np.full(expected, NO_MASK, np.uint8)
            self._masks.append(blank if mask is None else mask.astype(np.uint8, copy=False))
        top, left, height, width = box or (0, 0, *expected)
        content = pixels[top : top + height, left : left + width].astype(np.uint64)
        moments = (content.size, int(content.sum()), int((content * content).sum()))
        for column, value in zip(self._moments, moments, strict=True):
            column.append(value)
        if self._images.rows == self._per_shard:
            self._close_shard()

    def finish(self, manifest: Manifest, facts: Mapping[str, Any] | None = None) -> Store:
        """Write manifest and ``store.json`` (with ``facts`` added), rename, open.

        ``manifest`` has one row for each `add`, in order.
        """
        if len(manifest) != len(self._moments[0]):
            raise ValueError(f"{len(manifest)} manifest rows for {len(self._moments[0])} images")
        self._close_shard()
        manifest.write(self.work / MANIFEST)
        entry = {
            "bytes": (self.work / MANIFEST).stat().st_size,
            "sha256": hash_file(self.work / MANIFEST),
        }
        mean, std, over = self._statistics(manifest)
        block = {
            "format": FORMAT,
            "version": VERSION,
            "preprocess": self.preprocess.to_dict(),
            "dtype": self.dtype.name,
            "mean": mean,
            "std": std,
            "statistics_over": over,
            "images": len(manifest),
            "splits": {s: len(manifest.rows(s)) for s in manifest.splits},
            "labels": list(manifest.labels),
            "notes": list(manifest.notes),
            "content_hash": content_hash(self._shards, entry),
            "manifest": entry,
            "shards": self._shards,
            **(facts or {}),
        }
        write_durably(self.work / "store.json", json.dumps(block, indent=1) + "\n")
        publish(self.work, self.out, self.overwrite)
        return Store(self.out, read_facts(self.out), manifest)

    def _statistics(self, manifest: Manifest) -> tuple[float, float, str]:
        """Mean and std of pixels in [0, 1]; exact integer sums, so no order of summing shows."""
        names = [name for name in manifest.splits if is_training(name)]
        rows = manifest.rows(names) if names else np.arange(len(manifest))
        over = "training rows" if names else "all rows (there is no training split)"
        count, total, square = (sum(column[i] for i in rows) for column in self._moments)
        top = int(np.iinfo(self.dtype).max)
        variance = (count * square - total * total) / (count * count)  # Python ints: exact
        return total / count / top, variance**0.5 / top, over

    def _file(self, kind: str) -> Path:
        return self.work / f"{kind}-{len(self._shards):05d}.npy"

    def _close_shard(self) -> None:
        if self._images is None:
            return
        entry = {"rows": self._images.rows, "images": self._images.close()}
        if self._masks is not None:
            entry["masks"] = self._masks.close()
        self._shards.append(entry)
        self._images = self._masks = None
