"""A file -> its study, and what a model is shown of it; or the reason why not.

The same for every command that uses a model on files, in threads, ahead of the model.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pydicom

from spcxr.data.presets import Prepared
from spcxr.data.study import Rejected, Study, read_study
from spcxr.errors import SpcxrError
from spcxr.infer import dicom_seg
from spcxr.infer.inputs import Input

LATERAL = "it is a lateral view by its header; the model knows frontal ones"


@dataclass(frozen=True, eq=False)
class Ready:
    """A file as read: its study, what the model is shown of it, and its header for a SEG."""

    given: Input
    study: Study
    prepared: Prepared
    source: pydicom.Dataset | None


@dataclass(frozen=True, eq=False)
class Refused:
    """A file that was not read, and why."""

    given: Input
    reason: str


def read_prepared(
    given: Input, preprocess: Callable[[Study], Prepared], *, with_header: bool = False
) -> Ready | Refused:
    """One file, prepared as a model's images were: by its `Preprocess`, or in another way.

    ``with_header``: keep the header of a DICOM file, and refuse other files.
    """
    try:
        study = read_study(given.path)
        if study.view == "LATERAL":
            raise Rejected(given.path, LATERAL)
        source = dicom_seg.read_source(given.path) if with_header else None
        return Ready(given, study, preprocess(study), source)
    except Rejected as error:
        return Refused(given, error.reason)
    except SpcxrError as error:  # a preset that can make nothing of it
        return Refused(given, str(error))


_silence = ExitStack()
_readers, _door = 0, threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pydicom, highdicom and Pillow from quoting headers while threads read.

    Each reading silences them for itself; but what one thread silences, another one that is done
    first would let loose. Within this, nothing is loose at any time. Of several threads within
    it, the last one out brings back what the first one found.
    """
    global _readers
    with _door:
        if _readers == 0:
            _silence.enter_context(_silenced())
        _readers += 1
    try:
        yield
    finally:
        with _door:
            _readers -= 1
            if _readers == 0:
                _silence.close()


@contextmanager
def _silenced() -> Iterator[None]:
    logger, writer = logging.getLogger("pydicom"), logging.getLogger("highdicom")
    level = writer.level

    def nothing(record: logging.LogRecord) -> bool:
        return False

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.addFilter(nothing)
        writer.setLevel(logging.CRITICAL + 1)  # it has many loggers, and quotes odd names
        try:
            yield
        finally:
            logger.removeFilter(nothing)
            writer.setLevel(level)
