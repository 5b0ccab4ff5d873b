"""One radiograph as read from a file, whatever the file: the contract every reader fulfils."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spcxr.errors import SpcxrError

MAX_PIXELS = 2**26
"""Largest image read unless told otherwise: 8192 x 8192. The largest detectors give 18 million."""

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
TIFF = (b"II*\0", b"MM\0*")
WEBP = (b"RIFF", b"WEBP")  # public sets hold some, named .jpg
FEW_LEVELS = 32
NARROW_RANGE = 1 / 64
PROBE_SIDE = 128  # grey levels are counted on about this many rows and columns


class Rejected(SpcxrError):
    """A file that cannot be used: ``path`` and ``reason``, one plain sentence without patient data.

    >>> error = Rejected("a.dcm", "it is empty")
    >>> str(error), error.reason
    ('a.dcm: it is empty', 'it is empty')
    """

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(str(path), reason)  # both in args, so that worker processes can pickle it
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@contextmanager
def decoding(path: str | Path, decoder: str, reason: str) -> Iterator[None]:
    """Around calls of a third-party decoder, and nothing of ours: all it raises is `Rejected`.

    Damage makes a library raise anything. Its words are left out, for they may quote the header;
    a package that is broken (`ImportError`) is no fault of the file.

    >>> with decoding("a.png", "Pillow", "it cannot be decoded"):
    ...     raise ArithmeticError("Smith^Jane")
    Traceback (most recent call last):
    spcxr.data.study.Rejected: a.png: it cannot be decoded (Pillow: ArithmeticError)
    """
    try:
        yield
    except (Rejected, ImportError):
        raise
    except Exception as error:
        raise Rejected(path, f"{reason} ({decoder}: {type(error).__name__})") from error


@dataclass(frozen=True, eq=False)
class Study:
    """One radiograph: dark air, bright bone, on the pixel grid of its file.

    Attributes
    ----------
    pixels
        ``(H, W)`` uint8 or uint16, 0 = black = air. A MONOCHROME1 image is already inverted and the
        modality LUT applied; the VOI window is not (PS3.3 C.11).
    bits
        The pixels' range is ``[0, 2**bits - 1]``.
    window
        (centre, width) of the VOI window in the units of ``pixels``, as PS3.3 C.11.2.1.2 defines
        them, or None.
    spacing_mm
        (row, column) distance of pixel centres in mm, or None (PS3.3 10.7).
    patient_id, view, sex, site
        From the header, or None. ``view`` is ``PA``, ``AP``, ``LATERAL`` or the header's own word.
        For manifests only: never printed, logged or part of a message.
    age
        In years, or None.
    inverted
        Whether the stored values ran the other way (needed to repeat what other tools did).
    notes
        Guards that fired: plain sentences without patient data.

    >>> study = Study(np.array([[0, 4095], [7, 9]], np.uint16), bits=12)
    >>> study.pixels.shape, study.age
    ((2, 2), None)
    """

    pixels: np.ndarray
    bits: int
    window: tuple[float, float] | None = None
    spacing_mm: tuple[float, float] | None = None
    patient_id: str | None = None
    view: str | None = None
    sex: str | None = None
    age: float | None = None
    site: str | None = None
    inverted: bool = False
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.pixels.ndim != 2 or self.pixels.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"pixels {self.pixels.shape} {self.pixels.dtype}: not (H, W) uint8|16")
        if not 1 <= self.bits <= 8 * self.pixels.dtype.itemsize:
            raise ValueError(f"{self.bits} bits do not fit {self.pixels.dtype}")


def read_study(path: str | Path, max_pixels: int = MAX_PIXELS) -> Study:
    """Read one DICOM, PNG, JPEG, TIFF or WebP radiograph. The content decides, never the suffix.

    Parameters
    ----------
    max_pixels
        Refuse larger images before decoding them (a small file can claim to hold gigabytes).
        Raster files are further bound by Pillow's own limit of 179 million pixels.

    Raises
    ------
    Rejected
        The file cannot be read, or is no single radiograph of a chest as far as its header tells.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.NamedTemporaryFile(suffix=".dcm") as file:  # a PNG, whatever its name says
    ...     Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(file, "PNG")
    ...     study = read_study(file.name)
    >>> study.pixels.shape, study.bits, int(study.pixels[7, 7])
    ((8, 8), 8, 63)
    """
    import spcxr.data.dicom as dicom  # here: the readers build on this module
    import spcxr.data.raster as raster

    path = Path(path)
    head = _first_bytes(path)
    if dicom.starts_like_dicom(head):
        return dicom.read(path, max_pixels)
    if head.startswith((PNG, JPEG, *TIFF)) or (head[:4], head[8:12]) == WEBP:
        return raster.read(path, max_pixels)
    raise Rejected(path, "it is no DICOM, PNG, JPEG, TIFF or WebP file")


def refuse_irregular(path: Path) -> None:
    """Refuse a folder, pipe, socket or device: to open a pipe waits for a writer, for ever."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return  # opening it says why
    if stat.S_ISDIR(mode):
        raise Rejected(path, "it is a folder, not an image")
    if not stat.S_ISREG(mode):
        raise Rejected(path, "it is a pipe, socket or device, not an image file")


def _first_bytes(path: Path) -> bytes:
    refuse_irregular(path)
    try:
        with path.open("rb") as file:
            head = file.read(132)
    except FileNotFoundError as error:
        raise Rejected(path, "there is no such file") from error
    except OSError as error:
        raise Rejected(path, f"it cannot be opened ({error.strerror})") from error
    if not head:
        raise Rejected(path, "it is empty")
    return head


def range_notes(path: str | Path, pixels: np.ndarray, bits: int) -> tuple[str, ...]:
    """Look at the values themselves: refuse what shows nothing, note what looks unlike an X-ray.

    Parameters
    ----------
    pixels
        ``(H, W)`` uint8 or uint16 in ``[0, 2**bits - 1]``.

    Raises
    ------
    Rejected
        Every pixel has the same value, or there are only two values (a mask).

    >>> range_notes("a.png", np.arange(16, dtype=np.uint8).reshape(4, 4), 4)
    ('only 16 grey levels',)
    """
    low, high = int(pixels.min()), int(pixels.max())
    if low == high:
        raise Rejected(path, "every pixel has the same value")
    step = tuple(max(1, side // PROBE_SIDE) for side in pixels.shape)
    levels = int(np.count_nonzero(np.bincount(pixels[:: step[0], :: step[1]].ravel())))
    if levels <= 2:
        levels = len(np.unique(pixels))
        if levels == 2:
            raise Rejected(path, "it has only two grey levels: a mask or a drawing, no radiograph")
    notes = []
    if levels < FEW_LEVELS:
        notes.append(f"only {levels} grey levels")
    if high - low < NARROW_RANGE * (2**bits - 1):
        notes.append(f"values span only {low} to {high} of 0 to {2**bits - 1}")
    return tuple(notes)
