"""Images in -> a packed store: ``spcxr-train prepare SRC... --out STORE``."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from spcxr.config import Config, ConfigError, setting, to_dict
from spcxr.data.assembly import Assembly, ManifestTasks, join, shared_structures
from spcxr.data.manifest import Manifest, concatenate
from spcxr.data.pieces import Piece, Plan, plan
from spcxr.data.pool import make_pieces
from spcxr.data.presets import PRESET_VERSIONS, Preprocess
from spcxr.data.remote import RemoteFolder
from spcxr.data.shards import refuse_occupied, write_durably
from spcxr.data.sources import SOURCES, index
from spcxr.data.store import Store, StoreWriter
from spcxr.data.structures import settle_structures
from spcxr.errors import Interrupted, NothingDone, SpcxrError
from spcxr.train.interrupt import sigterm_as_ctrl_c

OURS = {"work.json", "lock", "pieces", "store"}  # in OUT.partial
NOT_PART_OF_THE_RESULT = {"workers", "overwrite", "out"}


@dataclass(frozen=True)
class PrepareConfig(Config):
    """Settings of `run`; see ``spcxr-train prepare --help``."""

    sources: tuple[str, ...] = setting(help="image folders, manifests, public sets, or stores")
    out: str = setting(help="the store to make")
    source: str = setting(
        "auto", "what the sources are (auto looks at their files)", choices=("auto", *SOURCES)
    )
    preset: str = setting(
        "minmax", "grey levels of the model's input", choices=tuple(PRESET_VERSIONS)
    )
    size_px: int = setting(224, "side of the square images", low=8, high=4096)
    fit: str = setting("pad", "how an image becomes square", choices=("pad", "crop", "stretch"))
    dtype: str = setting("uint8", "of the stored pixels", choices=("uint8", "uint16"))
    labels: tuple[str, ...] = setting((), "label columns a,b,... (default: all found)")
    structures: tuple[str, ...] = setting(
        (),
        'what masks show: "left lung=1,heart=2" for indexed files, or names in the order of a '
        "cell's files (default: columns mask:NAME, or lung)",
    )
    root: str | None = setting(None, "folder a manifest's paths are relative to")
    class_folders: bool = setting(False, "the folder an image stands in is its class")
    split_ratios: tuple[float, float, float] | None = setting(
        None,
        "train,val,test shares where no split is given (default: 0.7,0.15,0.15; "
        "without any label, mask or split all is train)",
        low=0,
        high=1,
    )
    seed: int = setting(0, "of the split by patient")
    workers: int = setting(-1, "processes; -1 = one per CPU, 0 = none beside this one", low=-1)
    shard: str | None = setting(None, "i/n: only the i-th of n parts (1/4 ... 4/4), to join later")
    overwrite: bool = setting(False, "replace a finished store, discard an unfinished one")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise ConfigError("no sources; give at least one folder, manifest or store")
        if self.split_ratios is not None and abs(sum(self.split_ratios) - 1) > 1e-6:
            raise ConfigError(
                f"split_ratios {self.split_ratios} must sum to 1, as in 0.7,0.15,0.15"
            )
        if self.shard is not None:
            parse_shard(self.shard)


@contextlib.contextmanager
def _lean_arrow() -> Iterator[None]:
    """Arrow on malloc: its own allocator keeps 10 MiB at once, and more of every size it gave."""
    earlier = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(earlier)


@_lean_arrow()
def run(config: PrepareConfig) -> Path:
    """Prepare the sources and return the store's path.

    Work goes on in ``OUT.partial``: the same command continues it after any interruption, and the
    store appears at ``OUT`` in one rename. A source that is a store is joined, which is how the
    parts of ``--shard i/n`` (written to ``OUT.shard-i-of-n``) become one. Splits depend on all rows
    of a patient, so a part keeps those given and leaves the others blank until it is joined.

    Raises
    ------
    SpcxrError
        A source or ``out`` cannot be what it should be.
    NothingDone
        Every file was rejected.
    Interrupted
        Ctrl-C or SIGTERM; what was read so far is kept.
    """
    preprocess = Preprocess(
        preset=config.preset, size_px=config.size_px, fit=config.fit, dtype=config.dtype
    )
    out = out_folder(config)
    if any((Path(source) / "store.json").is_file() for source in config.sources):
        return _join(config, out)
    manifest, shown = settle_structures(_index(config), config.structures, config.sources[0])
    request, work = _request(config), partial_folder(out)
    pieces = plan(ManifestTasks(manifest, shown), preprocess, work / "pieces")
    facts: dict[str, Any] = {"request": request, "inputs": _fingerprint(pieces, manifest)}
    facts["structures"] = list(shown.names)
    if _complete(out, facts, config.overwrite):
        return out
    with (
        _workplace(out, request, config.overwrite),
        _writer(out, preprocess, config.overwrite) as writer,
    ):
        assembly = Assembly(pieces, manifest, writer)
        _read_all(assembly, preprocess, config.workers)
        accepted, rejected = assembly.finish()
        if config.shard is None:
            accepted = accepted.settled(config.split_ratios, config.seed, config.sources[0])
        store = writer.finish(accepted, {**facts, "rejected": rejected})
    _report(store, rejected)
    return out


def _request(config: PrepareConfig) -> dict[str, Any]:
    """The settings that show in the result; what was added later only where it is used, so that
    a store from before is known again."""
    made = {k: v for k, v in to_dict(config).items() if k not in NOT_PART_OF_THE_RESULT}
    if not config.structures:
        del made["structures"]
    return made | {"sources": [os.path.realpath(source) for source in config.sources]}


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` -> (i, n) with 1 <= i <= n.

    >>> parse_shard("2/4")
    (2, 4)
    """
    parts = text.split("/")
    if len(parts) == 2 and all(part.isdecimal() for part in parts):
        i, n = int(parts[0]), int(parts[1])
        if 1 <= i <= n:
            return i, n
    raise ConfigError(f"shard is {text!r}; give i/n with i from 1 to n, as in 1/4")


def out_folder(config: PrepareConfig) -> Path:
    """Where the store goes: ``OUT``, or ``OUT.shard-02-of-10`` for one part."""
    out = Path(config.out)
    if config.shard is None:
        return out
    i, n = parse_shard(config.shard)
    return out.with_name(f"{out.name}.shard-{i:0{len(str(n))}d}-of-{n}")


def _index(config: PrepareConfig) -> Manifest:
    """One manifest of all sources; with ``--shard``, its part."""
    made = [
        index(
            source,
            config.source,
            labels=config.labels,
            root=config.root,
            class_folders=config.class_folders,
        )
        for source in config.sources
    ]
    manifest = concatenate(made)
    if config.shard is None:
        return manifest
    i, n = parse_shard(config.shard)
    rows = range((i - 1) * len(manifest) // n, i * len(manifest) // n)
    if not rows:
        raise SpcxrError(
            f"shard {config.shard} of {len(manifest)} images is empty; take fewer parts"
        )
    return manifest.select(np.asarray(rows))


def _fingerprint(pieces: Plan, manifest: Manifest) -> str:
    """Changes when any input file, or any cell of the manifest, does."""
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece.file.name.encode())
    sink = pa.PythonFile(_Hashing(digest), "w")  # a copy of the table would be large
    with pa.ipc.new_stream(sink, manifest.table.schema) as stream:
        stream.write_table(manifest.table.combine_chunks())
    return digest.hexdigest()


class _Hashing(io.RawIOBase):
    """A file that only hashes what is written to it."""

    def __init__(self, digest: Any) -> None:
        super().__init__()
        self._digest = digest

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)


@contextlib.contextmanager
def _workplace(out: Path, request: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """``OUT.partial``: made, or taken up again when it was begun with the same settings.

    It is removed at the end, and kept when an error or a signal ends the work. Where every file was
    rejected only ``rejected.csv`` is worth keeping: the next prepare may have other settings.
    """
    refuse_occupied(out, overwrite)
    work = partial_folder(out)
    note = work / "work.json"
    if work.exists() and {file.name for file in work.iterdir()} - OURS:
        raise SpcxrError(f"{work}: not left by prepare; move it away, or choose another --out")
    try:
        (work / "pieces").mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise SpcxrError(
            f"{work}: cannot be written ({error.strerror}); choose another --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SpcxrError(f"{work}: another prepare is at work here; wait for it") from error
        begun = json.loads(note.read_text()) if note.is_file() else request
        if begun != request and not overwrite:
            names = ", ".join(sorted(k for k in request if begun.get(k) != request[k]))
            raise SpcxrError(
                f"{work}: begun with other settings ({names}); use the same, another --out, "
                "or --overwrite to begin anew"
            )
        write_durably(note, json.dumps(request))
        shutil.rmtree(work / "store", ignore_errors=True)
        try:
            yield
        except NothingDone:
            note.unlink()
            shutil.rmtree(work / "pieces")
            raise
        shutil.rmtree(work)


def partial_folder(out: Path) -> Path:
    """Where the work on ``out`` stands until it is whole."""
    return out.with_name(out.name + ".partial")


def _writer(out: Path, preprocess: Preprocess, overwrite: bool) -> StoreWriter:
    return StoreWriter(out, preprocess, overwrite=overwrite, work=partial_folder(out) / "store")


def _complete(out: Path, facts: dict[str, Any], overwrite: bool) -> bool:
    """Whether ``out`` already is this very store; anything else that stands there is refused."""
    if overwrite or not (out / "store.json").is_file():
        return False
    store = Store.open(out)
    old = store.facts.get("request", {})
    names = [k for k, v in facts["request"].items() if old.get(k) != v]
    if not names and store.facts.get("inputs") == facts["inputs"]:
        _say(f"{out}: already complete, {len(store)} images")
        _forget(partial_folder(out), facts["request"])
        return True
    changed = "files that have changed since, or by another version"
    why = f"other settings ({', '.join(names)})" if names else changed
    raise SpcxrError(f"{out}: holds a store made from {why}; choose another --out, or --overwrite")


def _forget(work: Path, request: dict[str, Any]) -> None:
    """Remove what a run left that was killed after its store was whole."""
    note = work / "work.json"
    if note.is_file() and json.loads(note.read_text()) == request:
        shutil.rmtree(work)


def _read_all(assembly: Assembly, preprocess: Preprocess, workers: int) -> None:
    """Read every file that is not read yet, with one bar; Ctrl-C and SIGTERM keep the rest."""
    pieces = assembly.pieces
    total = len(pieces.tasks)
    before = sum(len(piece.tasks) for piece in pieces if piece.done)
    wanted = {piece.file.stem for piece in pieces}
    for file in pieces[0].file.parent.iterdir():
        if file.suffix != ".crashed" and file.stem not in wanted:
            file.unlink()  # of files that have changed since, or half-written
    pace = 0.2 if sys.stderr.isatty() else 10.0
    processes = len(os.sched_getaffinity(0)) if workers < 0 else workers
    name = assembly.writer.out.name
    with tqdm(total=total, initial=before, desc=name, unit="image", mininterval=pace) as bar:

        def made(piece: Piece) -> None:
            bar.update(len(piece.tasks))
            assembly.advance()

        try:
            with sigterm_as_ctrl_c():
                make_pieces(pieces, preprocess, processes, made)
        except KeyboardInterrupt as error:
            raise Interrupted(
                f"stopped with {bar.n} of {total} images read; the same command goes on from there"
            ) from error


def _join(config: PrepareConfig, out: Path) -> Path:
    """Sources that are stores -> one store; parts of a shard in order, with their own settings."""
    stores = [Store.open(source) for source in config.sources]
    seen: dict[str, Path | RemoteFolder] = {}
    for store in stores:
        twin = seen.setdefault(store.facts["content_hash"], store.path)
        if twin is not store.path:
            raise SpcxrError(f"{store.path}: the same images as {twin}; give each store once")
    requests = [store.facts.get("request", {}) for store in stores]
    shards = [str(made.get("shard") or "") for made in requests]
    ratios, seed = config.split_ratios, config.seed
    if all(shards):
        parts = [parse_shard(shard) for shard in shards]
        count = parts[0][1]
        if sorted(parts) != [(i, count) for i in range(1, count + 1)]:
            raise SpcxrError(f"{out}: joining needs each of the {count} parts once; got {shards}")
        stores = [store for _, store in sorted(zip(parts, stores, strict=True), key=lambda p: p[0])]
        ratios, seed = (requests[0].get(name) for name in ("split_ratios", "seed"))
        if any((made.get("split_ratios"), made.get("seed")) != (ratios, seed) for made in requests):
            raise SpcxrError(f"{out}: the parts differ in --split-ratios or --seed; make them anew")
    elif any(shards):
        raise SpcxrError(f"{out}: some sources are parts of a --shard; join those first")
    request = {
        "sources": [os.path.realpath(str(store.path)) for store in stores],
        "split_ratios": ratios and list(ratios),
        "seed": seed,
    }
    hashes = [store.facts["content_hash"] for store in stores]
    facts: dict[str, Any] = {"request": request}
    facts["inputs"] = hashlib.sha256("".join(hashes).encode()).hexdigest()
    facts["structures"] = list(shared_structures(stores))
    if _complete(out, facts, config.overwrite):
        return out
    with (
        _workplace(out, request, config.overwrite),
        _writer(out, stores[0].preprocess, config.overwrite) as writer,
    ):
        manifest, rejected = join(stores, writer)
        manifest = manifest.settled(ratios, seed, str(out))
        store = writer.finish(manifest, {**facts, "rejected": rejected})
    _report(store, rejected)
    return out


def _report(store: Store, rejected: int) -> None:
    splits = store.facts["splits"].items()
    counts = ", ".join(f"{name or 'split when joined'} {n}" for name, n in splits)
    seen = ", see rejected.csv" if rejected else ""
    _say(f"{store.path}: {len(store)} images ({counts}); {rejected} rejected{seen}")
    _say(f"labels: {', '.join(store.manifest.labels) or 'none'}")
    for note in store.manifest.notes:
        _say(f"note: {note}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)
