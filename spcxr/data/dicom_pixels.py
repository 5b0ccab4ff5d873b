"""Stored DICOM values -> pixels with dark air and bright bone: pure array functions.

The order is PS3.3 C.7.6.3 and C.11's: decode, modality LUT or rescale, then the polarity of
MONOCHROME1. The VOI window is carried along in the units of the result, never applied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Window = tuple[float, float]


@dataclass(frozen=True)
class LookUp:
    """A Modality LUT (PS3.3 C.11.1.1): stored value ``first`` maps to ``values[0]``."""

    first: int
    bits: int
    values: np.ndarray


@dataclass(frozen=True)
class PixelTags:
    """What the header says of the stored values.

    Attributes
    ----------
    bits_stored, high_bit, signed
        PS3.5 8.1.1; ``signed`` is PixelRepresentation.
    shift_high_bit
        Whether values have to be moved down when HighBit lies above BitsStored - 1 (native data).
    overlay_bits
        An overlay lies in the unused bits (retired, PS3.3-2004 C.9.2).
    invert
        Low values are meant bright: MONOCHROME1, or PresentationLUTShape INVERSE. The two state
        one fact twice (PS3.3 C.8.11.3.1.2 demands INVERSE of MONOCHROME1), so it counts once.
    slope, intercept, lookup
        The modality LUT, PS3.3 C.11.1; ``lookup`` excludes the other two.
    padding
        (low, high) of the stored values that fill up outside the image, PS3.3 C.7.5.1.1.2.
    window
        (centre, width) in the units after the modality LUT, function LINEAR.
    """

    bits_stored: int
    high_bit: int
    signed: bool = False
    shift_high_bit: bool = False
    overlay_bits: bool = False
    invert: bool = False
    slope: float = 1.0
    intercept: float = 0.0
    lookup: LookUp | None = None
    padding: tuple[int, int] | None = None
    window: Window | None = None


@dataclass(frozen=True, eq=False)
class Pixels:
    """``(H, W)`` uint8 or uint16 in ``[0, 2**bits - 1]``, the window in their units, notes."""

    values: np.ndarray
    bits: int
    window: Window | None
    inverted: bool
    notes: tuple[str, ...]


class OnlyPadding(ValueError):
    """Every pixel is padding."""


def to_pixels(stored: np.ndarray, tags: PixelTags) -> Pixels:
    """Apply the modality LUT and the polarity.

    A linear rescale is not computed: it maps the stored range onto the rescaled one, so only its
    sign shows once the range starts at 0, and the stored integers stay exact. The inverse is taken
    within the *range* (``2**bits - 1 - x``), never by the image's own maximum.

    Parameters
    ----------
    stored
        ``(H, W)`` integers of at most 16 bits, as decoded.

    Raises
    ------
    OnlyPadding
        There is nothing but padding.

    >>> tags = PixelTags(bits_stored=12, high_bit=11, invert=True, window=(2048.0, 4096.0))
    >>> made = to_pixels(np.array([[0, 1000, 3000]], np.uint16), tags)
    >>> made.values, made.bits, made.window
    (array([[4095, 3095, 1095]], dtype=uint16), 12, (2048.0, 4096.0))
    """
    stored, bits, notes = clean_bits(stored, tags)
    padded = _padded(stored, tags.padding)
    if padded is not None and padded.all():
        raise OnlyPadding("every pixel is padding")
    if tags.lookup is not None:
        values, bits = look_up(stored, tags.lookup), tags.lookup.bits
        lowest, falling, slope, intercept = 0, False, 1.0, 0.0
    else:
        lowest = -(2 ** (bits - 1)) if tags.signed else 0
        values, falling = _from_zero(stored, lowest, bits), tags.slope < 0
        slope, intercept = tags.slope, tags.intercept
    inverted = tags.invert != falling
    top = 2**bits - 1
    if inverted:
        values = np.subtract(top, values, dtype=values.dtype)
    if padded is not None and padded.any():
        # Air, yet not 0: padding must not stretch the range that min-max sees.
        values = np.where(padded, values[~padded].min(), values)
        notes = (*notes, "padding pixels taken as air")
    window = _window_of(tags.window, slope, intercept, lowest)
    if window is not None and inverted:
        # C.11.2.1.2.1 centres its ramp on centre - 0.5, which is what has to be mirrored.
        window = top - (window[0] - 0.5) + 0.5, window[1]
    return Pixels(values, bits, window, inverted, notes)


def clean_bits(stored: np.ndarray, tags: PixelTags) -> tuple[np.ndarray, int, tuple[str, ...]]:
    """Put right what disagrees with BitsStored and HighBit; the true number of bits, and notes.

    >>> clean_bits(np.array([[5000]], np.uint16), PixelTags(bits_stored=12, high_bit=11))
    (array([[5000]], dtype=uint16), 13, ('BitsStored is 12, yet the values need 13 bits',))
    """
    bits = tags.bits_stored
    notes: tuple[str, ...] = ()
    if tags.shift_high_bit and tags.high_bit > bits - 1:
        stored = _sign_extended(stored >> (tags.high_bit + 1 - bits), tags)
        notes = ("HighBit lies above BitsStored - 1; values moved down",)
    low, high = int(stored.min()), int(stored.max())
    bottom = -(2 ** (bits - 1)) if tags.signed else 0
    if low >= bottom and high < bottom + 2**bits:
        return stored, bits, notes
    if tags.overlay_bits:
        return _sign_extended(stored, tags), bits, (*notes, "an overlay in the pixels left out")
    if tags.signed and low >= 0 and high < 2**bits:
        return _sign_extended(stored, tags), bits, (*notes, "the sign bit was not extended")
    needed = max(high.bit_length(), (-low - 1).bit_length() if low < 0 else 0) + tags.signed
    said = f"BitsStored is {bits}, yet the values need {needed} bits"
    return stored, needed, (*notes, said)


def _sign_extended(stored: np.ndarray, tags: PixelTags) -> np.ndarray:
    """Keep the lowest BitsStored bits and, where signed, repeat the highest of them."""
    masked = stored & stored.dtype.type(2**tags.bits_stored - 1)
    if not tags.signed:
        return masked
    sign = stored.dtype.type(2 ** (tags.bits_stored - 1))
    return (masked ^ sign) - sign


def _from_zero(stored: np.ndarray, lowest: int, bits: int) -> np.ndarray:
    """Move the range to start at 0, as uint8 or uint16."""
    unsigned = np.dtype(np.uint8 if bits <= 8 else np.uint16)
    if lowest == 0:
        return stored.astype(unsigned, copy=False)
    # In the unsigned type: two's complement wraps to just the right value.
    return stored.astype(unsigned) + unsigned.type(-lowest)


def look_up(stored: np.ndarray, lut: LookUp) -> np.ndarray:
    """Modality LUT: values below the first take the first entry, above the last the last.

    >>> look_up(np.array([[-3, 0, 1, 9]]), LookUp(0, 8, np.array([5, 6, 7], np.uint8)))
    array([[5, 5, 6, 7]], dtype=uint8)
    """
    index = np.clip(stored.astype(np.int32) - lut.first, 0, len(lut.values) - 1)
    return lut.values[index]


def _padded(stored: np.ndarray, padding: tuple[int, int] | None) -> np.ndarray | None:
    if padding is None:
        return None
    low, high = padding
    return (stored >= low) & (stored <= high) if low != high else stored == low


def _window_of(window: Window | None, slope: float, intercept: float, lowest: int) -> Window | None:
    """The window of rescaled values -> in units of the stored range moved to 0."""
    if window is None:
        return None
    ramp_centre = (window[0] - 0.5 - intercept) / slope - lowest
    return ramp_centre + 0.5, (window[1] - 1.0) / abs(slope) + 1.0


def usable_window(centre: float, width: float) -> bool:
    """Finite and at least one wide (PS3.3 C.11.2.1.2.1).

    >>> usable_window(2048, 4096), usable_window(0, 0)
    (True, False)
    """
    return math.isfinite(centre) and math.isfinite(width) and width >= 1


def luminance(rgb: np.ndarray) -> np.ndarray:
    """``(H, W, 3)`` uint8 or uint16 -> ``(H, W)``, ITU-R BT.601; grey stays exactly as it is.

    >>> luminance(np.array([[[7, 7, 7], [255, 0, 0]]], np.uint8))
    array([[ 7, 76]], dtype=uint8)
    """
    weights = np.array([19595, 38470, 7471], np.uint32)  # of 65536; Pillow's own
    return ((rgb.astype(np.uint32) @ weights + 32768) >> 16).astype(rgb.dtype)
