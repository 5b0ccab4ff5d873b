"""Pieces over worker processes: bounded, interruptible, and a file that kills its reader is found.

Workers are spawned (fork is unsafe beside threads), ignore Ctrl-C (the parent decides), stop
between two files when told to (or are ended, when one file holds them up), and leave when the
parent is gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

from spcxr.data.pieces import Piece, Plan, make_piece
from spcxr.data.presets import Preprocess
from spcxr.errors import SpcxrError

CRASHED = "the process that read it died (a decoder's crash, or out of memory)"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES = 256 * 2**20
GRACE_S = 5.0  # for the file that a worker is reading when all are told to stop
QUEUED_PER_WORKER = 3  # enough that no worker waits, few enough that memory stays flat


def make_pieces(
    pieces: Plan,
    preprocess: Preprocess,
    workers: int,
    made: Callable[[Piece], object],
) -> None:
    """Make the pieces that are not done yet; ``made`` is told of each when it is.

    ``workers`` = 0 stays in this process, for a debugger. A file whose reading kills its process
    is rejected and the run goes on: the pieces that were under way are tried again one by one,
    and the one that dies again is read on without that file.
    """
    todo = _not_done(pieces)
    if workers == 0:
        for piece in map(pieces.__getitem__, todo):
            make_piece(piece, preprocess, _known_bad(piece), _crumb(piece))
            made(piece)
        return
    while todo:
        waiting = map(pieces.__getitem__, todo)
        for piece in _in_parallel(waiting, preprocess, min(workers, len(todo)), made):
            _crumb(piece).unlink(missing_ok=True)
            while _in_parallel([piece], preprocess, 1, made):
                _blame(piece)
        todo = _not_done(pieces)


def _not_done(pieces: Plan) -> list[int]:
    """Numbers, not pieces: those would hold a task for each file of the run."""
    return [number for number, piece in enumerate(pieces) if not piece.done]


def _in_parallel(
    todo: Iterable[Piece], preprocess: Preprocess, workers: int, made: Callable[[Piece], object]
) -> list[Piece]:
    """Work through ``todo``; the pieces being read when a worker died, or ``[]``."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    waiting = iter(todo)
    running: dict[Future[None], Piece] = {}
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start_worker, (stop,)) as pool:
        try:
            while True:
                room = workers * QUEUED_PER_WORKER - len(running)
                for piece in itertools.islice(waiting, room):
                    work = (piece, preprocess, _known_bad(piece), _crumb(piece))
                    running[pool.submit(_work, *work)] = piece
                if not running:
                    return []
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    future.result()
                    made(running.pop(future))
        except BrokenProcessPool:
            for piece in (piece for piece in running.values() if piece.done):
                made(piece)
            lost = [piece for piece in running.values() if not piece.done]
            return [piece for piece in lost if _crumb(piece).is_file()] or lost
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            _end(running, set(multiprocessing.active_children()) - others)
            raise


def _end(running: Iterable[Future[None]], workers: Iterable[BaseProcess]) -> None:
    """Give the files under way some seconds, then end the workers (a second Ctrl-C: at once)."""
    deadline = time.monotonic() + GRACE_S
    try:
        for future in running:
            with contextlib.suppress(CancelledError, TimeoutError):
                future.exception(max(0.0, deadline - time.monotonic()))
    finally:
        for worker in workers:
            worker.terminate()


_stop: Event | None = None


def _start_worker(stop: Event) -> None:
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _keep_freed_memory()
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _keep_freed_memory() -> None:
    """Let glibc reuse image buffers, not give them back to the kernel after every file.

    Half of a worker's time on 1 megapixel JPEGs went into faulting the same pages in again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none, and no need
    if mallopt is not None:
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, KEPT_BYTES)


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _work(piece: Piece, preprocess: Preprocess, known_bad: dict[int, str], crumb: Path) -> None:
    make_piece(piece, preprocess, known_bad, crumb, _stopped)


def _stopped() -> bool:
    return _stop is not None and _stop.is_set()


def _crumb(piece: Piece) -> Path:
    return piece.file.with_suffix(".at")


def _known_bad(piece: Piece) -> dict[int, str]:
    """Tasks of a piece that killed their reader in an earlier try (kept for later runs too)."""
    file = piece.file.with_suffix(".crashed")
    positions = json.loads(file.read_text()) if file.is_file() else []
    return dict.fromkeys(positions, CRASHED)


def _blame(piece: Piece) -> None:
    """Note the task that was being read when the process died."""
    crumb, known = _crumb(piece), _known_bad(piece)
    position = int(crumb.read_text() or -1) if crumb.is_file() else -1
    if position < 0 or position in known:
        raise SpcxrError(
            "worker processes die before they read a file; free memory, call prepare below "
            "`if __name__ == '__main__':` in a script, or try --workers 0"
        )
    crumb.unlink()
    piece.file.with_suffix(".crashed").write_text(json.dumps(sorted({*known, position})))
