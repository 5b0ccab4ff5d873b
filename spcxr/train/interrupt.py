"""Ctrl-C and a scheduler's signals: finish the step, save, say how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from spcxr.errors import Interrupted

# SIGTERM: kill, containers, SLURM at the time limit; SIGUSR1: SLURM's --signal ahead of it.
WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """The signal that came, by name; None as long as none did."""

    def __init__(self) -> None:
        self.came: str | None = None

    def raise_interrupted(self, folder: Path, recipe: str, where: str) -> None:
        """Raise what a stopped run ends with. Call it once the work is saved."""
        raise Interrupted(
            f"{folder}: stopped by {self.came or 'a signal to another process'} at {where}, and "
            "saved; go on with: "
            f"spcxr-train {recipe} --config {folder / 'config.yaml'} --resume auto"
        )


@contextmanager
def watch_signals() -> Iterator[Signals]:
    """Note SIGINT, SIGTERM and SIGUSR1 instead of dying; a second Ctrl-C stops at once.

    Signals reach Python's main thread only: in another thread (a notebook's, a server's) nothing
    is watched, and the process' own handlers stay in force.

    >>> with watch_signals() as signals:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     signals.came
    'SIGTERM'
    """
    signals = Signals()

    def note(number: int, frame: FrameType | None) -> None:
        if signals.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.came = signals.came or signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.signal(number, note) for number in WATCHED}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises `KeyboardInterrupt`, as Ctrl-C does: for work that cleans up as it goes.

    >>> with sigterm_as_ctrl_c():
    ...     try:
    ...         signal.raise_signal(signal.SIGTERM)
    ...     except KeyboardInterrupt:
    ...         print("cleaning up")
    cleaning up
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier or signal.SIG_DFL)
