"""The loop of every command that uses a model on files.

list the files -> read and prepare them in threads -> ask the model in batches -> finish in threads
-> a row each, in order. Memory does not grow with the number of files.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from spcxr import __version__
from spcxr.data.study import Rejected
from spcxr.errors import Interrupted, NothingDone, SpcxrError
from spcxr.infer.input_range import UNLIKE
from spcxr.infer.inputs import Input, find_inputs
from spcxr.infer.reading import Ready, Refused, quiet
from spcxr.infer.result_table import DONE, REJECTED, Counts, Row
from spcxr.train.batches import prefetch
from spcxr.train.interrupt import watch_signals

THREADS = 2
WEIGHTS = ("config.json", "head.safetensors", "model.safetensors", "pytorch_model.bin")
A = TypeVar("A")


@dataclass(frozen=True)
class Work(Generic[A]):
    """What a command does with its files.

    Parameters
    ----------
    name
        of the command, shown beside the bar.
    read
        a file -> what the model is shown of it; called by threads.
    answer
        a batch of them, none refused -> the model's answer to each, in order.
    finish
        a file and its answer -> cells of its row; called by threads. It may raise `Rejected`.
    batch_size
        files at a time, at most.
    """

    name: str
    read: Callable[[Input], Ready | Refused]
    answer: Callable[[list[Ready]], Sequence[A]]
    finish: Callable[[Ready, A], Row]
    batch_size: int


def work_through(work: Work[A], given: Sequence[str | Path], rows: Counts, out: Path) -> None:
    """A row for each file of ``given`` that has none yet, in order, with one bar.

    A signal stops between two rows. How many images looked unlike the training images is said on
    standard error.

    Raises
    ------
    SpcxrError
        inputs that are not there, or a model that fails.
    Interrupted
        Ctrl-C or SIGTERM; what has a row is kept.
    """
    todo = [one for one in find_inputs(given, rows.names, out) if not rows.has(one.path)]
    unlike = 0
    ahead, pace = work.batch_size + THREADS, 0.2 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=len(todo), desc=work.name, unit="image", mininterval=pace)
    with (
        quiet(),
        watch_signals() as signals,
        bar,
        closing(prefetch(work.read, todo, threads=THREADS, ahead=ahead)) as read,
        closing(_answered(work, (one for _, one in read))) as answered,
        closing(
            prefetch(lambda one: _row(work, one), answered, threads=THREADS, ahead=1)
        ) as finished,
    ):
        for _, row in finished:
            rows.add(row)
            bar.update()
            unlike += UNLIKE in (row.get("notes") or "")
            if signals.came and bar.n < len(todo):
                raise Interrupted(
                    f"{out}: stopped by {signals.came} with {bar.n} of {len(todo)} images "
                    "done; the same command goes on from there"
                )
    if unlike:
        print(
            f"warning: {unlike} of {len(todo)} images have {UNLIKE} (see their notes): were they "
            "prepared otherwise?",
            file=sys.stderr,
        )


@contextmanager
def writing_to(out: Path) -> Iterator[None]:
    """Within this an error of a write that names no file names ``out``.

    >>> with writing_to(Path("o")):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'o'
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(out)
        raise


def refuse_nothing(rows: Counts, table: Path) -> None:
    """Raise where every file was rejected.

    Raises
    ------
    NothingDone
        with the reason of the first.
    """
    if not rows.done:
        raise NothingDone(f"{rows.first_reason} (all {rows.rejected} rejected: see {table})")


def _answered(
    work: Work[A], read: Iterator[Ready | Refused]
) -> Generator[tuple[Ready, A] | Refused, None, None]:
    """Batch by batch, in order."""
    while several := list(itertools.islice(read, work.batch_size)):
        ready = [one for one in several if isinstance(one, Ready)]
        try:
            answers = iter(work.answer(ready) if ready else ())
        except SpcxrError as error:
            files = ", ".join(str(one.given.path) for one in ready)
            raise SpcxrError(f"{files}: {error}") from error
        for one in several:
            yield one if isinstance(one, Refused) else (one, next(answers))


def _row(work: Work[A], one: tuple[Ready, A] | Refused) -> Row:
    given = one.given if isinstance(one, Refused) else one[0].given
    row: Row = {"path": str(given.path), "name": given.name}
    try:
        if isinstance(one, Refused):
            raise Rejected(given.path, one.reason)
        return row | {"status": DONE} | work.finish(*one)
    except Rejected as error:
        return row | {"status": REJECTED, "reason": error.reason}


def version_of(model: Path) -> str:
    """This spcxr and the weights of a run, a model folder or a file, in a few characters.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     len(version_of(Path(file.name)).split()[1])
    12
    """
    made: Any = hashlib.blake2b(digest_size=6)
    folders = (model, model / "model", model / "lungs", model / "model" / "lungs")
    for file in (model, *(folder / name for folder in folders for name in WEIGHTS)):
        if file.is_file():
            with file.open("rb") as opened:
                while part := opened.read(2**20):
                    made.update(part)
    return f"{__version__} {made.hexdigest()}"
