"""DICOM radiographs: open, parse, refuse what is no chest X-ray for viewing, decode.

Pixels stay on the file's own grid, so that masks and results line up with it: an image stored
mirrored or turned (PatientOrientation) is noted, not flipped. FieldOfViewHorizontalFlip needs
nothing: PatientOrientation describes the image as stored, after that flip (PS3.3 C.8.11.4).
"""

from __future__ import annotations

import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder, pixel_array
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from spcxr.data.dicom_header import Damaged, Header, parse_header, parse_pixel_tags, whole
from spcxr.data.dicom_pixels import OnlyPadding, PixelTags, luminance, to_pixels
from spcxr.data.raster import is_coloured
from spcxr.data.study import Rejected, Study, decoding, range_notes

MODALITIES = ("CR", "DX", "DR", "RG")
CHEST_WORDS = ("CHEST", "THORAX", "TORAX", "LUNG")
NO_BODY_PART = ("", "UNKNOWN", "OTHER", "NONE", "UNSPECIFIED")
MEANINGLESS_POSITION = "XX"
OTHER_POSITIONS = ("FROGLEG", "LITHOTOMY", "SKYLINE", "SUNRISE", "MORTISE", "WATERS", "TOWNE")
"""In PatientPosition: no chest is imaged so. It is free text in radiography, so no more is asked of
it; `dicom_header.position_note` notes what is none of the usual."""
GREY, COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR")
PLUGINS = {
    **dict.fromkeys((JPEGBaseline8Bit, JPEGExtended12Bit), "pillow"),
    **dict.fromkeys((JPEG2000Lossless, JPEG2000), "pylibjpeg"),
    **dict.fromkeys((JPEGLSLossless, JPEGLSNearLossless), "pyjpegls"),
}
"""Preferred decoders. pydicom would take GDCM first, which ends the process on damaged JPEGs; it is
left what only it decodes, lossless JPEG."""
HEADER = "its DICOM header is damaged"
MAX_HEADER_BYTES = 2**24
END_OF_CODESTREAM = b"\xff\xd9"  # JPEG, JPEG-LS and JPEG 2000 alike
FRAME_HEADERS = {0xF7, *range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF markers, LS and JPEG
_OPENINGS = {
    struct.pack(order + "HH", group, element)
    for order in "<>"
    for group, elements in ((2, (0, 1, 2, 3, 16)), (8, (0, 1, 5, 6, 8, 18, 20, 22, 32)))
    for element in elements
}


def starts_like_dicom(head: bytes) -> bool:
    """Whether the first 132 bytes or more of a file are DICOM's (PS3.10 7.1), or open with a group
    0002 or 0008 element: a DICOM file without its preamble.

    >>> starts_like_dicom(bytes([8, 0, 5, 0]) + b"CS"), starts_like_dicom(b"GIF89a")
    (True, False)
    """
    return head[128:132] == b"DICM" or head[:4] in _OPENINGS


def read(path: str | Path, max_pixels: int) -> Study:
    """Read one DICOM file as a `Study`, in every transfer syntax the installed decoders know.

    Parameters
    ----------
    max_pixels
        Larger Rows x Columns are refused before anything is decoded.

    Raises
    ------
    Rejected
        Damaged; not one frame of a chest radiograph made for viewing; or a kind of pixels that
        leaves open what is black.

    >>> from pydicom.data import get_testdata_file
    >>> read(get_testdata_file("CT_small.dcm"), 2**26)
    Traceback (most recent call last):
    spcxr.data.study.Rejected: ...CT_small.dcm: its Modality is CT, not one of CR, DX, DR, RG
    """
    with _values(path, HEADER):
        dataset = _open(path, max_pixels)
        header = parse_header(dataset)
    refuse(path, header, max_pixels)
    if "PixelData" not in dataset:
        raise Rejected(path, "it holds no PixelData, or was cut short before it")
    with _values(path, "its DICOM pixel description is damaged"):
        tags, tag_notes = parse_pixel_tags(dataset)
    _check_tags(path, tags)
    stored = decode(path, dataset)
    colour: tuple[str, ...] = ()
    if stored.ndim == 3:
        if is_coloured(stored[::4, ::4], 2 ** max(0, tags.bits_stored - 8)):
            colour = ("a colour picture, read by its luminance",)
        stored = luminance(stored)
    try:
        made = to_pixels(stored, tags)
    except OnlyPadding as error:
        raise Rejected(path, str(error)) from error
    seen = range_notes(path, made.values, made.bits)
    return Study(
        made.values,
        made.bits,
        window=made.window,
        spacing_mm=header.spacing_mm,
        patient_id=header.patient_id,
        view=header.view,
        sex=header.sex,
        age=header.age,
        site=header.site,
        inverted=made.inverted,
        notes=(*header.notes, *tag_notes, *colour, *made.notes, *seen),
    )


def refuse(path: str | Path, header: Header, max_pixels: int) -> None:
    """Refuse what the header says is no single chest radiograph made for viewing.

    Raises
    ------
    Rejected
        With the first reason found.
    """
    if header.modality and header.modality not in MODALITIES:
        known = ", ".join(MODALITIES)
        raise Rejected(path, f"its Modality is {_quoted(header.modality)}, not one of {known}")
    known_part = header.body_part not in NO_BODY_PART
    if known_part and not any(w in header.body_part for w in CHEST_WORDS):
        raise Rejected(path, f"its BodyPartExamined is {_quoted(header.body_part)}, not the chest")
    position = header.position
    if position == MEANINGLESS_POSITION or any(w in position for w in OTHER_POSITIONS):
        raise Rejected(path, f"its PatientPosition is {_quoted(position)}, none of a chest X-ray")
    if header.for_processing:
        raise Rejected(path, "it is FOR PROCESSING (raw); export the image FOR PRESENTATION")
    if header.frames != 1:
        raise Rejected(path, f"it has {header.frames} frames, not one radiograph")
    if header.rows < 1 or header.columns < 1:
        raise Rejected(path, "it holds no image: no Rows or Columns, or cut short before them")
    if header.rows * header.columns > max_pixels:
        size = f"{header.columns} x {header.rows}"
        raise Rejected(path, f"it has {size} pixels, over the limit of {max_pixels} (max_pixels)")
    if header.bits_allocated not in (8, 16):
        raise Rejected(
            path, f"its pixels have {header.bits_allocated} bits; only 8 and 16 are read"
        )
    if not header.photometric:
        raise Rejected(path, "PhotometricInterpretation is missing: black and white are unknown")
    grey = header.photometric in GREY and header.samples == 1
    if not grey and not (header.photometric.startswith(COLOUR) and header.samples == 3):
        raise Rejected(path, "its PhotometricInterpretation is neither grey nor RGB or YBR")


def _quoted(code: str) -> str:
    """A code string for a message; a longer value than the standard allows may be anything."""
    return code if len(code) <= 16 else "another word"


def decode(path: str | Path, dataset: pydicom.Dataset) -> np.ndarray:
    """The stored values: ``(H, W)`` or ``(H, W, 3)`` integers, nothing applied but YBR -> RGB.

    Raises
    ------
    Rejected
        Cut short, damaged, or in a transfer syntax no installed decoder knows.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_encapsulated and syntax != RLELossless:
        with _quiet(), decoding(path, "pydicom", "its compressed pixels are damaged"):
            frame = get_frame(dataset.PixelData, 0, number_of_frames=1)
        says = parse_codestream(frame)
        with _values(path, "its compressed pixels are damaged"):
            keywords = ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")
            *size, bits_allocated = (whole(dataset, keyword) for keyword in keywords)
        if END_OF_CODESTREAM not in frame[-16:]:
            raise Rejected(path, "its compressed pixels are cut short")
        if says is None or [says.rows, says.columns, says.samples] != size:
            raise Rejected(path, "its compressed pixels are not of the size its header says")
        if says.bits > bits_allocated:
            raise Rejected(
                path, f"its compressed pixels say {says.bits} bits, more than its header"
            )
    if (reason := undecodable(syntax, int(dataset.BitsStored))) is not None:
        raise Rejected(path, reason)
    chosen = plugin(syntax)
    reason = f"its pixels ({syntax.name}) are cut short or damaged"
    with _quiet(), decoding(path, chosen or "pydicom", reason):
        # Unused bits stay as they are: pydicom would wrap values when BitsStored is too small.
        stored = pixel_array(
            dataset,
            correct_unused_bits=False,
            view_only=True,
            decoding_plugin=chosen,
        )
    # Of pixels enough for several frames pydicom makes several, whatever the header says.
    if stored.ndim != (2 if int(dataset.SamplesPerPixel) == 1 else 3):
        raise Rejected(path, "it holds more pixels than the one frame its header says")
    return stored


def plugin(syntax: UID) -> str:
    """The decoder to use; "" leaves the choice to pydicom."""
    wanted = PLUGINS.get(syntax, "")
    return wanted if wanted and wanted in get_decoder(syntax).available_plugins else ""


def undecodable(syntax: UID, bits_stored: int) -> str | None:
    """Why no installed decoder reads this transfer syntax, or None."""
    if syntax == JPEGExtended12Bit and bits_stored > 8:
        return "it is 12-bit JPEG Extended, which no free decoder reads; convert it to JPEG 2000"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        return "its transfer syntax is none of a still image that pydicom knows; convert it"
    if not decoder.is_available:
        return f"{syntax.name} needs more decoders; pip install 'spcxr[dicom]'"
    return None


@dataclass(frozen=True)
class Codestream:
    """What a JPEG, JPEG-LS or JPEG 2000 codestream says of itself."""

    rows: int
    columns: int
    bits: int
    samples: int


def parse_codestream(data: bytes) -> Codestream | None:
    """The frame header of a codestream, None where there is none.

    Decoders allocate by these numbers, not by the DICOM header's: a bomb or damage may differ.

    >>> parse_codestream(bytes.fromhex("ffd8 fff7 000b 08 0010 0020 01 011100"))
    Codestream(rows=16, columns=32, bits=8, samples=1)
    """
    start = data.find(b"\xff\x4f\xff\x51", 0, 256)  # JPEG 2000: SOC, SIZ
    if start >= 0:
        if len(data) < start + 43:
            return None
        right, bottom, left, top = struct.unpack(">4I", data[start + 8 : start + 24])
        samples, depth = struct.unpack(">HB", data[start + 40 : start + 43])
        return Codestream(bottom - top, right - left, (depth & 0x7F) + 1, samples)
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in FRAME_HEADERS:
            bits, rows, columns, samples = struct.unpack(">BHHB", data[at + 4 : at + 10])
            return Codestream(rows, columns, bits, samples)
        else:
            at += 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
    return None


@contextmanager
def _quiet() -> Iterator[None]:
    """pydicom warns of odd values, logs them too, and quotes the patient's name if it is odd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("pydicom").addFilter(_say_nothing)
        try:
            yield
        finally:
            logging.getLogger("pydicom").removeFilter(_say_nothing)


@contextmanager
def _values(path: str | Path, reason: str) -> Iterator[None]:
    """Values that pydicom cannot parse, or that are none of their kind, become a `Rejected`."""
    try:
        with _quiet():
            yield
    except Damaged as error:
        raise Rejected(path, f"{reason} ({error})") from error


def _say_nothing(record: logging.LogRecord) -> bool:
    return False


def _open(path: str | Path, max_pixels: int) -> pydicom.Dataset:
    """Read the file; one without file meta information gets the transfer syntax it shows."""
    head = _bytes(path, 1024)
    if DeflatedExplicitVRLittleEndian.encode() in head:
        # Not more than 16 bits of 3 samples a pixel.
        _refuse_inflation(path, _bytes(path), 6 * max_pixels + MAX_HEADER_BYTES)
    with decoding(path, "pydicom", HEADER):
        dataset = pydicom.dcmread(path, force=head[128:132] != b"DICM")
        known = "TransferSyntaxUID" in dataset.file_meta
        implicit, little = dataset.original_encoding
    if not known:
        explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
    return dataset


def _bytes(path: str | Path, count: int = -1) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise Rejected(path, f"it cannot be read ({error.strerror})") from error


def _refuse_inflation(path: str | Path, data: bytes, limit: int) -> None:
    """Inflate a deflated dataset once, bounded, so that a bomb does not go off."""
    if data[132:136] != b"\2\0\0\0" or len(data) < 144:
        raise Rejected(path, "it is deflated and lacks the length of its file meta information")
    start = 144 + struct.unpack("<I", data[140:144])[0]  # the end of group 0002, PS3.10 7.1
    with decoding(path, "zlib", HEADER):
        length = len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[start:], limit))
    if length == limit:
        raise Rejected(path, "it unpacks to more than the limit on its size (max_pixels)")


def _check_tags(path: str | Path, tags: PixelTags) -> None:
    if tags.slope == 0 or not np.isfinite([tags.slope, tags.intercept]).all():
        raise Rejected(path, "its RescaleSlope or RescaleIntercept is not usable")
    if not 2 <= tags.bits_stored <= 16 or not tags.bits_stored - 1 <= tags.high_bit <= 15:
        raise Rejected(path, "its BitsStored and HighBit do not go together")
