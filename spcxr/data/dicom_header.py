"""A DICOM dataset -> two small dataclasses: who and what it is, and what its stored values mean."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pydicom

from spcxr.data.dicom_pixels import LookUp, PixelTags, Window, usable_window

T = TypeVar("T")
VIEWS = {
    **dict.fromkeys(("PA", "POSTEROANTERIOR"), "PA"),
    **dict.fromkeys(("AP", "ANTEROPOSTERIOR", "APPORTABLE", "APSUPINE", "APERECT"), "AP"),
    **dict.fromkeys(("LL", "RL", "LAT", "LATERAL", "LLAT", "RLAT"), "LATERAL"),
    **dict.fromkeys(("LEFTLATERAL", "RIGHTLATERAL"), "LATERAL"),
}
TERMS = "HFP HFS HFDR HFDL FFDR FFDL FFP FFS LFP LFS RFP RFS AFDR AFDL PFDR PFDL"
POSTURES = "ERECT STANDING UPRIGHT SEMIERECT SITTING SUPINE PRONE RECUMBENT DECUBITUS"
POSITIONS = {"", *TERMS.split(), *POSTURES.split(), *VIEWS}
"""PatientPosition's defined terms (PS3.3 C.7.3.1.1.2) and what radiography writes there instead."""
FOR_PROCESSING_CLASS = "1.2.840.10008.5.1.4.1.1.1.1.1"
DAYS_PER = {"D": 1.0, "W": 7.0, "M": 365.25 / 12, "Y": 365.25}
OLDEST = 120.0
DAMAGED_WORD = "unreadable"


class Damaged(ValueError):
    """A value that pydicom cannot parse or that is none of its kind; says which error, no value."""


@contextmanager
def parsing() -> Iterator[None]:
    """Around calls of pydicom alone: it parses a value when first asked, and may raise anything."""
    try:
        yield
    except Exception as error:
        raise Damaged(f"pydicom: {type(error).__name__}") from error


def value_of(dataset: pydicom.Dataset, keyword: str) -> Any:
    """An element's value, None where missing."""
    with parsing():
        return dataset.get(keyword)


def converted(kind: Callable[[Any], T], value: Any) -> T:
    """A value as a number (or an array of them), unless damage made it something else."""
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise Damaged(f"no number: {type(error).__name__}") from error


def whole(dataset: pydicom.Dataset, keyword: str) -> int:
    """An integer, 0 where missing or blank."""
    return converted(int, value_of(dataset, keyword) or 0)


def first_item(dataset: pydicom.Dataset, keyword: str) -> pydicom.Dataset | None:
    """The first item of a sequence, None where there is none."""
    sequence = value_of(dataset, keyword)
    if sequence is None or len(sequence) == 0:
        return None
    if not isinstance(sequence, pydicom.Sequence):
        raise Damaged("no sequence")
    return sequence[0]


@dataclass(frozen=True)
class Header:
    """What decides whether a file is a chest radiograph, and whose it is.

    Code strings are upper-case letters and digits only (``FORPROCESSING``), "" where missing.
    """

    modality: str
    body_part: str
    position: str
    for_processing: bool
    frames: int
    rows: int
    columns: int
    samples: int
    bits_allocated: int
    photometric: str
    patient_id: str | None
    view: str | None
    sex: str | None
    age: float | None
    site: str | None
    spacing_mm: tuple[float, float] | None
    notes: tuple[str, ...]


def parse_header(dataset: pydicom.Dataset) -> Header:
    """The patient and image part. Raises `Damaged`."""
    age, age_note = parse_age(text(dataset, "PatientAge"))
    modality = word(dataset, "Modality")
    notes = (
        "" if modality else "Modality is missing",
        age_note,
        orientation_note(value_of(dataset, "PatientOrientation")),
        position_note(word(dataset, "PatientPosition")),
    )
    intent, sop_class = word(dataset, "PresentationIntentType"), value_of(dataset, "SOPClassUID")
    return Header(
        modality=modality,
        body_part=_body_part(dataset),
        position=word(dataset, "PatientPosition"),
        for_processing=intent == "FORPROCESSING" or sop_class == FOR_PROCESSING_CLASS,
        frames=whole(dataset, "NumberOfFrames") or 1,
        rows=whole(dataset, "Rows"),
        columns=whole(dataset, "Columns"),
        samples=whole(dataset, "SamplesPerPixel") or 1,
        bits_allocated=whole(dataset, "BitsAllocated"),
        photometric=(text(dataset, "PhotometricInterpretation") or "").upper(),
        patient_id=text(dataset, "PatientID"),
        view=_view(dataset),
        sex=text(dataset, "PatientSex"),
        age=age,
        site=text(dataset, "InstitutionName"),
        spacing_mm=parse_spacing(dataset),
        notes=tuple(n for n in notes if n),
    )


def parse_pixel_tags(dataset: pydicom.Dataset) -> tuple[PixelTags, tuple[str, ...]]:
    """What the stored values mean, and notes. Raises `Damaged`."""
    photometric = (text(dataset, "PhotometricInterpretation") or "").upper()
    shape = word(dataset, "PresentationLUTShape")
    window, notes = _window(dataset)
    if (photometric, shape) in {("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")}:
        notes = (*notes, f"{photometric} contradicts PresentationLUTShape {shape}; inverted")
    if value_of(dataset, "BitsStored") is None:
        raise Damaged("no BitsStored")
    bits_stored, high_bit = whole(dataset, "BitsStored"), value_of(dataset, "HighBit")
    slope = value_of(dataset, "RescaleSlope")
    with parsing():
        encapsulated = dataset.file_meta.TransferSyntaxUID.is_encapsulated
        overlay_bits = any(
            tag.group & 0xFFE1 == 0x6000 and tag.elem == 0x0102 and dataset[tag].value
            for tag in dataset.keys()  # noqa: SIM118  (iterating the dataset parses every value)
        )
    tags = PixelTags(
        bits_stored=bits_stored,
        high_bit=bits_stored - 1 if high_bit is None else converted(int, high_bit),
        signed=whole(dataset, "PixelRepresentation") != 0,
        shift_high_bit=not encapsulated,
        overlay_bits=overlay_bits,
        invert=photometric == "MONOCHROME1" or shape == "INVERSE",
        slope=1.0 if slope is None else converted(float, slope),
        intercept=converted(float, value_of(dataset, "RescaleIntercept") or 0.0),
        lookup=_modality_lut(dataset),
        padding=_padding(dataset),
        window=window,
    )
    return tags, notes


def text(dataset: pydicom.Dataset, keyword: str) -> str | None:
    """A value as stripped text, None where missing or blank."""
    with parsing():
        value = str(dataset.get(keyword) or "")
    return value.strip() or None


def word(dataset: pydicom.Dataset, keyword: str) -> str:
    """A code string as upper-case letters and digits only: vendors differ in all else.

    Damage may let a value run into the next element; what is not printable is not quoted either.
    """
    with parsing():
        value = str(dataset.get(keyword) or "")
    value = value.strip(" \0").upper()
    return re.sub(r"[^A-Z0-9]", "", value) if value.isprintable() else DAMAGED_WORD


def parse_age(age: str | None) -> tuple[float | None, str]:
    """PatientAge -> years and a note ("" = none).

    ``nnnD|W|M|Y`` (PS3.5 6.2, AS); bare digits, which public sets write, are years.

    >>> parse_age("034Y"), parse_age("006M"), parse_age("62")
    ((34.0, ''), (0.5, ''), (62.0, ''))
    >>> parse_age("411Y")
    (None, 'the age is not usable')
    """
    if age is None:
        return None, ""
    found = re.fullmatch(r"(\d{1,3})([DWMY]?)", age.upper())
    if found is None:
        return None, "the age is not usable"
    years = int(found[1]) * DAYS_PER[found[2] or "Y"] / DAYS_PER["Y"]
    return (years, "") if years <= OLDEST else (None, "the age is not usable")


def parse_spacing(dataset: pydicom.Dataset) -> tuple[float, float] | None:
    """(row, column) pixel spacing in mm (PS3.3 10.7.1.3).

    PixelSpacing where given; else ImagerPixelSpacing, which lies at the detector, divided by
    EstimatedRadiographicMagnificationFactor where that is stated.

    >>> d = pydicom.Dataset()
    >>> d.ImagerPixelSpacing, d.EstimatedRadiographicMagnificationFactor = [0.2, 0.2], 1.25
    >>> parse_spacing(d)
    (0.16, 0.16)
    """
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        pair = value_of(dataset, keyword)
        if not is_pair(pair):
            continue
        row, column = (converted(float, v) for v in pair)
        if not all(math.isfinite(v) and v > 0 for v in (row, column)):
            continue
        factor = converted(
            float, value_of(dataset, "EstimatedRadiographicMagnificationFactor") or 1.0
        )
        if keyword == "ImagerPixelSpacing" and math.isfinite(factor) and factor > 0:
            row, column = row / factor, column / factor
        return row, column
    return None


def orientation_note(orientation: Any) -> str:
    """PatientOrientation against the usual frontal display: rows to the left, columns to the feet.

    >>> orientation_note(["L", "F"]), orientation_note(["R", "F"])
    ('', 'stored mirrored left-right (PatientOrientation), kept so')
    """
    if not is_pair(orientation):
        return ""
    row, column = (str(v).strip().upper()[:1] for v in orientation)
    if row in ("F", "H") or column in ("L", "R"):
        return "stored turned on its side (PatientOrientation), kept so"
    if row == "R" and column == "H":
        return "stored turned by half a circle (PatientOrientation), kept so"
    if row == "R":
        return "stored mirrored left-right (PatientOrientation), kept so"
    if column == "H":
        return "stored upside down (PatientOrientation), kept so"
    return ""


def position_note(position: str) -> str:
    """Free text is not quoted: it may be anything.

    >>> position_note("ERECT"), position_note("HALFSITTING")
    ('', 'PatientPosition is none of the usual words; not used')
    """
    return "" if position in POSITIONS else "PatientPosition is none of the usual words; not used"


def is_pair(value: object) -> bool:
    """Whether a multi-valued element holds two values."""
    return isinstance(value, (list, tuple, pydicom.multival.MultiValue)) and len(value) == 2


def _body_part(dataset: pydicom.Dataset) -> str:
    """BodyPartExamined, else what AnatomicRegionSequence calls it (PS3.3 C.8.11.2)."""
    named = word(dataset, "BodyPartExamined")
    if named:
        return named
    region = first_item(dataset, "AnatomicRegionSequence")
    return "" if region is None else word(region, "CodeMeaning")


def _view(dataset: pydicom.Dataset) -> str | None:
    """``PA``, ``AP``, ``LATERAL`` or the header's own word for another view.

    ViewPosition first; then ViewCodeSequence; then PatientPosition, where some public sets put it.
    """
    own = word(dataset, "ViewPosition")
    if own:
        return VIEWS.get(own, own)
    code = first_item(dataset, "ViewCodeSequence")
    meaning = "" if code is None else word(code, "CodeMeaning")
    for known in (meaning, word(dataset, "PatientPosition")):
        if known in VIEWS:
            return VIEWS[known]
    return None


def _window(dataset: pydicom.Dataset) -> tuple[Window | None, tuple[str, ...]]:
    """The first window (several are alternative views, PS3.3 C.11.2.1.2), and notes."""
    notes: list[str] = []
    if value_of(dataset, "VOILUTSequence"):
        notes.append("a VOI LUT Sequence is not applied")
    centres, widths = (_numbers(value_of(dataset, k)) for k in ("WindowCenter", "WindowWidth"))
    if not centres and not widths:
        return None, tuple(notes)
    if not centres or not widths or not usable_window(centres[0], widths[0]):
        return None, (*notes, "the window is not usable")
    if len(centres) > 1:
        notes.append(f"the first of {len(centres)} windows is kept")
    function = word(dataset, "VOILUTFunction")
    if function == "LINEAREXACT":  # C.11.2.1.3.2: the same ramp, counted without the half steps
        return (centres[0] + 0.5, widths[0] + 1.0), tuple(notes)
    if function not in ("", "LINEAR"):
        notes.append("the window's function is not linear; its centre and width are kept")
    return (centres[0], widths[0]), tuple(notes)


def _numbers(value: Any) -> list[float]:
    many = value if isinstance(value, (list, tuple, pydicom.multival.MultiValue)) else [value]
    return [converted(float, v) for v in many if v is not None and v != ""]


def _padding(dataset: pydicom.Dataset) -> tuple[int, int] | None:
    """PixelPaddingValue and PixelPaddingRangeLimit, PS3.3 C.7.5.1.1.2."""
    value = value_of(dataset, "PixelPaddingValue")
    if value is None:
        return None
    limit = value_of(dataset, "PixelPaddingRangeLimit")
    ends = converted(int, value), converted(int, value if limit is None else limit)
    return min(ends), max(ends)


def _modality_lut(dataset: pydicom.Dataset) -> LookUp | None:
    """The first Modality LUT, PS3.3 C.11.1.1: descriptor = (entries, first value mapped, bits)."""
    item = first_item(dataset, "ModalityLUTSequence")
    if item is None:
        return None
    numbers, data = _numbers(value_of(item, "LUTDescriptor")), value_of(item, "LUTData")
    if len(numbers) != 3 or data is None:
        raise Damaged("no Modality LUT")
    entries, first, bits = (converted(int, n) for n in numbers)
    if isinstance(data, bytes):
        order = ">" if dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.2" else "<"
        values = converted(lambda d: np.frombuffer(d, f"{order}u2"), data)
    else:
        values = converted(lambda d: np.array(d, dtype=np.int64, ndmin=1), data)
    values = values[: entries or 2**16]  # C.11.1.1: 0 means 2**16 entries
    known = 1 <= bits <= 16 and -(2**15) <= first < 2**16
    if not known or values.ndim != 1 or not len(values) or int(values.max()) >= 2**bits:
        raise Damaged("Modality LUT does not agree with its descriptor")
    return LookUp(first, bits, values.astype(np.uint8 if bits <= 8 else np.uint16))
