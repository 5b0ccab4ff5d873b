"""PNG, JPEG, TIFF and WebP radiographs, 8 and 16 bit. Raster files are taken as bright-is-bone."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from spcxr.data.study import Rejected, Study, decoding, range_notes

FORMATS = ("PNG", "JPEG", "TIFF", "WEBP")
COLOUR_TOLERANCE = 16  # grey levels between channels that JPEG's chroma may add to a grey picture
WHITE_IS_ZERO, PHOTOMETRIC, BITS_PER_SAMPLE, ORIENTATION = 0, 262, 258, 274
DAMAGED = "it cannot be decoded: damaged or cut short"


def read(path: str | Path, max_pixels: int) -> Study:
    """Read one PNG, JPEG, TIFF or WebP as a `Study`.

    The orientation that EXIF or TIFF asks for is applied. Colour becomes luminance (ITU-R 601) and
    transparency black, both with a note when they change anything.

    Parameters
    ----------
    max_pixels
        Larger images are refused before they are decoded.

    Raises
    ------
    Rejected
        Damaged or truncated, several pages, too large, a pixel type without a fixed range.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 999).save(file, "TIFF")
    ...     study = read(file.name, 100)
    >>> study.bits, int(study.pixels.max())
    (16, 62937)
    """
    with warnings.catch_warnings():
        # Pillow warns of size (max_pixels decides here) and of odd EXIF, which the pixels outlive.
        warnings.simplefilter("ignore")
        image, facts = _load(path, max_pixels)
        pixels, notes = _to_grey(path, image)
    stored_bits, inverted, turned = facts
    bits = max(stored_bits, int(pixels.max()).bit_length()) if pixels.dtype == np.uint16 else 8
    if inverted:
        pixels = np.subtract(2**bits - 1, pixels, dtype=np.uint16)
    if turned:
        notes = (*notes, "turned upright as its EXIF orientation says")
    notes = (*notes, *range_notes(path, pixels, bits))
    return Study(pixels, bits, inverted=inverted, notes=notes)


def _load(path: str | Path, max_pixels: int) -> tuple[Image.Image, tuple[int, bool, bool]]:
    """The upright picture, all in memory; its bits, whether white is zero, whether it turned."""
    # A file object: given a name, Pillow 13 maps plain TIFFs into memory and scrambles
    # those that are to be turned by 90 degrees.
    with decoding(path, "Pillow", DAMAGED), Path(path).open("rb") as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_header(path, image, max_pixels)
                facts = _bits_per_sample(image), _is_inverted_16_bit(image)
                upright, turned = load_upright(image)
                return upright, (*facts, turned)
        except Image.DecompressionBombError as error:
            raise Rejected(path, "it is larger than Pillow decodes; make it smaller") from error


def load_upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """Decode, and turn as EXIF or TIFF asks for; whether there was something to turn."""
    turned = image.getexif().get(ORIENTATION, 1) != 1  # TIFF forgets it in load()
    image.load()
    return (ImageOps.exif_transpose(image) if turned else image), turned


def _check_header(path: str | Path, image: Image.Image, max_pixels: int) -> None:
    """Refuse by what the header says, before anything is decoded."""
    width, height = image.size
    if width * height > max_pixels:
        raise Rejected(
            path, f"it has {width} x {height} pixels, over the limit of {max_pixels} (max_pixels)"
        )
    # A JPEG may carry a preview as second frame (MPO); the first one is the picture.
    if image.format != "MPO" and (count := getattr(image, "n_frames", 1)) > 1:
        raise Rejected(path, f"it has {count} pages; save the radiograph as a file of its own")


def _bits_per_sample(image: Image.Image) -> int:
    """12 for a 12-bit TIFF, 16 for all else that has more than 8."""
    if image.format == "TIFF":
        return int(image.tag_v2.get(BITS_PER_SAMPLE, (16,))[0])  # type: ignore[attr-defined]
    return 16


def _is_inverted_16_bit(image: Image.Image) -> bool:
    """A WhiteIsZero TIFF of more than 8 bits, which Pillow (unlike 8-bit ones) leaves as stored."""
    if image.format != "TIFF" or not image.mode.startswith("I;16"):
        return False
    return image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO  # type: ignore[attr-defined]


def _to_grey(path: str | Path, image: Image.Image) -> tuple[np.ndarray, tuple[str, ...]]:
    """Any Pillow mode -> ``(H, W)`` uint8 or uint16 and notes."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16), ()  # also to the machine's byte order
    if image.mode == "I":
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise Rejected(path, "its pixels do not fit 16 bits unsigned; save it as 8 or 16 bit")
        return wide.astype(np.uint16), ()
    if image.mode == "F":
        raise Rejected(path, "its pixels are floating point, without a range; save 8 or 16 bit")
    notes: tuple[str, ...] = ()
    with decoding(path, "Pillow", DAMAGED):
        if image.has_transparency_data and (merged := _on_black(image)) is not None:
            image, notes = merged, ("transparent pixels taken as black",)
        if image.mode in ("1", "L", "LA"):
            return np.asarray(image.convert("L")), notes
        colour = image if image.mode in ("RGB", "RGBA") else image.convert("RGB")
        probe = np.asarray(colour.resize(_a_quarter(colour.size), Image.Resampling.NEAREST))
        pixels = np.asarray(colour.convert("L"))
    if is_coloured(probe):
        notes = (*notes, "a colour picture, read by its luminance")
    return pixels, notes


def _a_quarter(size: tuple[int, int]) -> tuple[int, int]:
    return max(1, size[0] // 4), max(1, size[1] // 4)


def _on_black(image: Image.Image) -> Image.Image | None:
    """A picture laid on black, which is air; None when it is opaque throughout."""
    layered = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
    if layered.getchannel("A").getextrema()[0] == 255:
        return None
    layered = layered.convert("RGBA")
    black = Image.new("RGBA", layered.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, layered).convert("RGB")


def is_coloured(rgb: np.ndarray, scale: int = 1) -> bool:
    """Whether the channels differ by more than JPEG's chroma would.

    ``rgb`` is ``(H, W, 3)`` or more channels; ``scale`` is one 8-bit grey level in its units.

    >>> is_coloured(np.array([[[9, 9, 9], [9, 12, 9]]], np.uint8))
    False
    """
    red, green, blue = (rgb[..., i].astype(np.int32) for i in range(3))
    limit = COLOUR_TOLERANCE * scale
    return bool(np.any(np.abs(red - green) > limit) or np.any(np.abs(blue - green) > limit))
