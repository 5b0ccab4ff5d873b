"""DICOM pixels: against pydicom's own reading, the standard's arithmetic and the real files."""

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from spcxr.data import dicom, presets
from spcxr.data.dicom_header import parse_pixel_tags
from spcxr.data.dicom_pixels import to_pixels
from spcxr.data.study import MAX_PIXELS, Rejected, read_study


def unit(study) -> np.ndarray:
    """Pixels as a fraction of their range."""
    return study.pixels / (2**study.bits - 1)


# -- against pydicom --------------------------------------------------------------------------

GREY_FILES = {
    "MR_small.dcm": "Explicit VR Little Endian",
    "MR_small_implicit.dcm": "Implicit VR Little Endian",
    "MR_small_bigendian.dcm": "Explicit VR Big Endian",
    "MR_small_RLE.dcm": "RLE Lossless",
    "MR_small_jp2klossless.dcm": "JPEG 2000 Image Compression (Lossless Only)",
    "J2K_pixelrep_mismatch.dcm": "JPEG 2000 Image Compression (Lossless Only)",
    "JPEG2000.dcm": "JPEG 2000 Image Compression",
    "693_J2KI.dcm": "JPEG 2000 Image Compression",
    "MR_small_jpeg_ls_lossless.dcm": "JPEG-LS Lossless Image Compression",
    "JPEGLSNearLossless_16.dcm": "JPEG-LS Lossy (Near-Lossless) Image Compression",
    "JPEGLSNearLossless_08.dcm": "JPEG-LS Lossy (Near-Lossless) Image Compression",
    "image_dfl.dcm": "Deflated Explicit VR Little Endian",
    "CT_small.dcm": "Explicit VR Little Endian",
    "examples_overlay.dcm": "Explicit VR Little Endian",
}


@pytest.mark.parametrize("name", GREY_FILES)
def test_grey_values_are_pydicoms(name):
    """Undoing our mapping gives pydicom's decoded and rescaled values, exactly."""
    path = get_testdata_file(name)
    source = pydicom.dcmread(path)
    assert source.file_meta.TransferSyntaxUID.name == GREY_FILES[name]
    if "PixelPaddingValue" in source:
        del source.PixelPaddingValue  # its effect has a test of its own
    tags, _ = parse_pixel_tags(source)
    made = to_pixels(dicom.decode(path, source), tags)
    stored = made.values.astype(np.int64) - (2 ** (made.bits - 1) if tags.signed else 0)
    expected = apply_modality_lut(source.pixel_array, source)
    np.testing.assert_array_equal(stored * tags.slope + tags.intercept, expected)


COLOUR_FILES = {
    "SC_rgb_jpeg_dcmtk.dcm": "JPEG Baseline (Process 1)",
    "SC_rgb_jpeg_gdcm.dcm": "JPEG Lossless, Non-Hierarchical, First-Order Prediction",
    "SC_rgb_gdcm_KY.dcm": "JPEG 2000 Image Compression",
    "SC_rgb_jls_lossy_sample.dcm": "JPEG-LS Lossy",
    "SC_rgb_rle_16bit.dcm": "RLE Lossless",
    "SC_ybr_full_422_uncompressed.dcm": "Explicit VR Little Endian",
}


@pytest.mark.parametrize("name", COLOUR_FILES)
def test_colour_becomes_luminance_with_a_note(name, radiographs):
    source = pydicom.dcmread(get_testdata_file(name))
    assert source.file_meta.TransferSyntaxUID.name.startswith(COLOUR_FILES[name])
    source.Modality, source.BodyPartExamined = "CR", "CHEST"
    study = read_study(radiographs.save(source))
    expected = source.pixel_array @ np.array([0.299, 0.587, 0.114])
    assert np.abs(study.pixels - expected).max() <= 1
    assert any("colour" in note for note in study.notes)


def test_grey_in_colour_channels_has_no_note(radiographs):
    grey = (radiographs.gradient // 16).astype(np.uint8)
    study = radiographs.read(np.stack([grey] * 3, -1), PhotometricInterpretation="RGB")
    np.testing.assert_array_equal(study.pixels, grey)
    assert study.notes == ()


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
@pytest.mark.parametrize("signed", [False, True])
def test_compressed_equals_native(syntax, signed, radiographs):
    pixels = (radiographs.gradient.astype(np.int16) - 1500) if signed else radiographs.gradient
    native = read_study(radiographs.save(radiographs.make(pixels)))
    packed = radiographs.make(pixels)
    packed.compress(syntax)
    study = read_study(radiographs.save(packed, "packed.dcm"))
    np.testing.assert_array_equal(study.pixels, native.pixels)
    assert study.bits == native.bits == 12


# -- polarity and range -----------------------------------------------------------------------


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2.5, -1024), (-1, 4095)])
def test_polarity_and_range(photometric, signed, slope, intercept, radiographs):
    """PS3.3 C.7.6.3.1.2 and C.11.1 in floats: the fraction of the *rescaled range*."""
    pixels = radiographs.gradient.astype(np.int16) - 2000 if signed else radiographs.gradient
    study = radiographs.read(
        pixels,
        PhotometricInterpretation=photometric,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
    )
    ends = np.array([-2048, 2047] if signed else [0, 4095]) * slope + intercept
    fraction = (pixels * float(slope) + intercept - ends.min()) / (ends.max() - ends.min())
    if photometric == "MONOCHROME1":
        fraction = 1 - fraction
    np.testing.assert_allclose(unit(study), fraction, atol=1e-9)


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME1", "INVERSE", True),  # said twice, done once
        ("MONOCHROME1", None, True),
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "IDENTITY", True),
    ],
)
def test_inverse_counts_once(photometric, shape, inverted, radiographs):
    tags = {"PresentationLUTShape": shape} if shape else {}
    study = radiographs.read(PhotometricInterpretation=photometric, **tags)
    np.testing.assert_array_equal(
        study.pixels, 4095 - radiographs.gradient if inverted else radiographs.gradient
    )
    contradicts = (photometric == "MONOCHROME2") == (shape == "INVERSE") and shape is not None
    assert any("contradicts" in n for n in study.notes) == contradicts
    assert study.inverted == inverted


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(("slope", "intercept"), [(1, 0), (2, -1000), (-1, 4095)])
def test_window_shows_what_pydicom_shows(photometric, slope, intercept, radiographs):
    made = radiographs.make(
        PhotometricInterpretation=photometric,
        WindowCenter=1800,
        WindowWidth=1500,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
    )
    study = read_study(radiographs.save(made))
    shown = presets.voi(study, lambda image: image)
    rescaled = apply_modality_lut(radiographs.gradient, made)
    expected = apply_windowing(rescaled, made)
    ends = apply_windowing(np.array([-1e6, 1e6]), made)
    expected = (expected - ends[0]) / (ends[1] - ends[0])
    if photometric == "MONOCHROME1":
        expected = 1 - expected
    np.testing.assert_allclose(shown, expected, atol=1e-5)


def test_several_windows_are_noted_and_the_first_kept(radiographs):
    study = radiographs.read(WindowCenter=[2000, 900], WindowWidth=[3000, 400])
    assert study.window == (2000, 3000)
    assert study.notes == ("the first of 2 windows is kept",)


def test_a_window_of_no_width_is_not_kept(radiographs):
    study = radiographs.read(WindowCenter=2000, WindowWidth=0)
    assert study.window is None
    assert study.notes == ("the window is not usable",)


def test_modality_lut_is_pydicoms(tmp_path, radiographs):
    item = Dataset()
    values = (np.arange(2000) ** 2 // 61).astype(np.uint16)  # 16 bits, not linear
    item.LUTDescriptor, item.ModalityLUTType = [2000, 100, 16], "US"
    item.add_new(0x00283006, "OW", values.tobytes())
    made = radiographs.make(ModalityLUTSequence=[item], PhotometricInterpretation="MONOCHROME1")
    study = read_study(radiographs.save(made))
    expected = apply_modality_lut(radiographs.gradient, pydicom.dcmread(tmp_path / "x.dcm"))
    assert study.bits == 16
    np.testing.assert_array_equal(study.pixels, 65535 - expected)


def test_padding_is_air_and_does_not_stretch_the_range(radiographs):
    pixels = radiographs.gradient + 500
    pixels[:, :5], pixels[0] = 4095, 4094  # collimated away, stored white
    study = radiographs.read(pixels, PixelPaddingValue=4095, PixelPaddingRangeLimit=4094)
    content = pixels[1:, 5:]
    np.testing.assert_array_equal(study.pixels[1:, 5:], content)
    assert set(np.unique(study.pixels[:, :5])) == {content.min()}
    assert "padding pixels taken as air" in study.notes
    with pytest.raises(Rejected, match="every pixel is padding"):
        radiographs.read(np.full((9, 9), 7, np.uint16), PixelPaddingValue=7)


def test_bits_that_disagree(radiographs):
    wide = radiographs.gradient * 3  # up to 9069: 14 bits
    study = radiographs.read(wide, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(study.pixels, 2**14 - 1 - wide)
    assert study.notes == ("BitsStored is 12, yet the values need 14 bits",)

    overlay = radiographs.gradient | ((radiographs.gradient % 2) << 15).astype(np.uint16)
    made = radiographs.make(overlay)
    made.add_new(0x60000102, "US", 15)  # OverlayBitPosition
    study = read_study(radiographs.save(made))
    np.testing.assert_array_equal(study.pixels, radiographs.gradient)
    assert study.notes == ("an overlay in the pixels left out",)

    study = radiographs.read(radiographs.gradient << 4, HighBit=15)
    np.testing.assert_array_equal(study.pixels, radiographs.gradient)

    signed = radiographs.gradient.astype(np.int16) - 1500
    not_extended = (signed & 0xFFF).astype(np.int16)
    study = radiographs.read(not_extended)
    np.testing.assert_array_equal(study.pixels, signed + 2048)


# -- the real ones ----------------------------------------------------------------------------


@pytest.mark.shared
def test_shared_dicoms(shared_data):
    folder = shared_data / "dicom"
    for name, reason in (
        ("udacity_test4", "RIBCAGE"),
        ("udacity_test5", "Modality is CT"),
        ("udacity_test6", "PatientPosition is XX"),
        ("wg04_RG2_hip_JPLY", "HIP"),
    ):
        with pytest.raises(Rejected, match=reason):
            read_study(folder / f"{name}.dcm")
    for name in ("udacity_test1", "udacity_test2", "udacity_test3", "rsna_pa_txrv"):
        study = read_study(folder / f"{name}.dcm")
        expected = pydicom.dcmread(folder / f"{name}.dcm").pixel_array
        np.testing.assert_array_equal(study.pixels, expected)
        assert study.view in ("PA", "AP")
    # The tag is the law, also where it is false.
    true, false = (read_study(folder / f"rsna_pa_txrv{n}.dcm") for n in ("", "_fake_mono1"))
    np.testing.assert_array_equal(false.pixels, 255 - true.pixels)
    ten_bit = read_study(folder / "dwv_cr_mono1_10_chest.dcm")
    stored = pydicom.dcmread(folder / "dwv_cr_mono1_10_chest.dcm").pixel_array
    np.testing.assert_array_equal(ten_bit.pixels, 1023 - stored)
    assert stored.max() < 1023  # so that inverting by the image's maximum would show


def test_limit_is_what_the_docs_say():
    assert MAX_PIXELS == 8192 * 8192
