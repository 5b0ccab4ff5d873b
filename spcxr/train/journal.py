"""What a run says: metrics.jsonl, TensorBoard, trackers, train.log, and one progress bar."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from spcxr.train.trackers import Tracker

logger = logging.getLogger("spcxr")


class _AboveBar(logging.Handler):
    """Log lines to stderr without tearing the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class Journal:
    """The books of one run, open for as long as it trains.

    ``metrics.jsonl`` gets a line a record, written through to the system at once, so that a killed
    process loses none. When a run goes on, records after the checkpoint's step are cut off: each
    step stands there once.

    Parameters
    ----------
    step
        steps behind us: 0 for a fresh run.
    images_done, images_total
        of the whole run, for the bar and its estimate of the time left.
    trackers
        told each record too, and closed with the journal (`open_trackers`).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     with Journal(Path(place), step=0, images_done=0, images_total=8, quiet=True) as journal:
    ...         journal.record("train", 1, {"loss": 0.5})
    ...     read_records(Path(place))
    [{'step': 1, 'kind': 'train', 'loss': 0.5}]
    """

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        images_done: int,
        images_total: int,
        quiet: bool = False,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.folder, self._trackers = folder, trackers
        self._file = folder / "metrics.jsonl"
        cut_records(self._file, step)
        self._records = self._file.open("a")
        self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self._handlers: list[logging.Handler] = [logging.FileHandler(folder / "train.log")]
        if not quiet:
            self._handlers.append(_AboveBar())
        for handler in self._handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)
        self._level = logger.level
        logger.setLevel(logging.INFO)
        # A log file is no terminal: a line each half minute instead of ten a second.
        every = 0.1 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=images_total,
            initial=images_done,
            unit="img",
            unit_scale=True,
            mininterval=every,
            disable=quiet,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._records.close()
        self._board.close()
        for tracker in self._trackers:
            tracker.close()
        for handler in self._handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(self._level)

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One record: ``kind`` (train, val, ...), the steps behind us, and figures by name.

        Figures that are not finite are written as null: JSON has no NaN.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._records.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self._records.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        for tracker in self._trackers:
            tracker.log(step, {f"{kind}/{name}": value for name, value in values.items()})

    def advance(self, images: int, shown: Mapping[str, float]) -> None:
        """Move the bar on by ``images`` and show these figures beside it."""
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in shown.items()}, refresh=False)
        self._bar.update(images)

    def say(self, line: str) -> None:
        """A line for train.log and the terminal. It must not name patients or files of theirs."""
        logger.info("%s", line)


class Silent(Journal):
    """The journal of a rank that writes nothing."""

    def __init__(self) -> None:
        """No files."""

    def __exit__(self, *error: object) -> None:
        """Nothing to close."""

    def record(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""

    def advance(self, images: int, shown: Mapping[str, float]) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""


def cut_records(file: Path, step: int) -> None:
    """Remove the records after ``step``, and a last line that was cut short."""
    if not file.is_file():
        return
    kept = [line for line in _whole_lines(file) if json.loads(line)["step"] <= step]
    draft = file.with_name(f".{file.name}.writing")
    draft.write_text("".join(line + "\n" for line in kept))
    os.replace(draft, file)


def read_records(folder: Path) -> list[dict[str, float | str | None]]:
    """All records of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in _whole_lines(folder / "metrics.jsonl")]


def _whole_lines(file: Path) -> list[str]:
    text = file.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
