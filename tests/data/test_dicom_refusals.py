"""DICOM headers and damage: what is refused and why, what is read from the rest."""

import io
import zlib

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from spcxr.data import dicom
from spcxr.data.study import Rejected, read_study

CLASS_DX = "1.2.840.10008.5.1.4.1.1.1.1"

# -- what is refused --------------------------------------------------------------------------

SECRET = "Zx9Secret"
REFUSED = [
    ({"Modality": "CT"}, "Modality is CT"),
    ({"BodyPartExamined": "HIP"}, "BodyPartExamined is HIP"),
    ({"BodyPartExamined": "RIBCAGE"}, "BodyPartExamined is RIBCAGE"),
    ({"PatientPosition": "XX"}, "PatientPosition is XX"),
    ({"PatientPosition": "FROG LEG"}, "PatientPosition is FROGLEG"),
    ({"PresentationIntentType": "FOR PROCESSING"}, "FOR PROCESSING"),
    ({"SOPClassUID": CLASS_DX + ".1"}, "FOR PROCESSING"),
    ({"NumberOfFrames": 2}, "2 frames"),
    ({"PhotometricInterpretation": None}, "PhotometricInterpretation is missing"),
    ({"PhotometricInterpretation": "PALETTE COLOR"}, "neither grey nor RGB"),
    ({"PixelData": None}, "no PixelData"),
    ({"Rows": None}, "no Rows or Columns"),
    ({"Rows": 60000, "Columns": 60000}, "over the limit of 67108864"),
    ({"BitsAllocated": 32}, "have 32 bits"),
    ({"BitsStored": 0}, "BitsStored"),
    ({"BitsStored": None}, "pixel description is damaged"),
    ({"RescaleSlope": 0, "RescaleIntercept": 0}, "RescaleSlope"),
    ({"Rows": 81}, "cut short or damaged"),
    ({"Rows": 20}, "more pixels than the one frame"),
    ({"Columns": 3}, "more pixels than the one frame"),
    ({"SamplesPerPixel": None}, "cut short or damaged"),
]


@pytest.mark.parametrize(("tags", "reason"), REFUSED, ids=[r for _, r in REFUSED])
def test_refused_with_a_reason_and_without_the_patient(tags, reason, radiographs, caplog):
    private = dict.fromkeys(("PatientID", "PatientName", "InstitutionName", "StudyID"), SECRET)
    with pytest.raises(Rejected, match=reason) as caught, caplog.at_level("DEBUG"):
        radiographs.read(**private, **tags)
    assert SECRET not in str(caught.value) + caplog.text
    assert "\n" not in str(caught.value)


def test_limit_is_settable(radiographs):
    path = radiographs.save(radiographs.make())
    assert read_study(path, max_pixels=5600).pixels.size == 5600
    with pytest.raises(Rejected, match="over the limit of 5599"):
        read_study(path, max_pixels=5599)


def test_codestream_larger_than_its_header_is_refused_undecoded(radiographs):
    made = radiographs.make()
    made.compress(JPEG2000Lossless)
    data = bytearray(made.PixelData)
    at = data.find(b"\xff\x4f\xff\x51") + 8
    data[at : at + 8] = (60000).to_bytes(4, "big") * 2
    made.PixelData = bytes(data)
    with pytest.raises(Rejected, match="not of the size its header says"):
        read_study(radiographs.save(made))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("SC_rgb_jpeg_gdcm.dcm", (b"\xff\xc3\x00\x11\x08", b"\xff\xc3\x00\x11\xff")),
        ("SC_rgb_jpeg_dcmtk.dcm", (b"\xff\xdb\x00C\x00", b"\xff\xdb\x00C\xff")),
    ],
    ids=["255 bits", "quantisation table"],
)
def test_damage_that_kills_gdcm_is_refused(name, change, radiographs):
    """A segmentation fault and an abort in GDCM 3.2; if they come back, this test run dies."""
    source = pydicom.dcmread(get_testdata_file(name))
    source.Modality, source.BodyPartExamined = "CR", "CHEST"
    data = radiographs.save(source).read_bytes()
    assert change[0] in data
    (radiographs.folder / "bad").write_bytes(data.replace(*change))
    with pytest.raises(Rejected):
        read_study(radiographs.folder / "bad")


@pytest.mark.parametrize(
    "syntax", [u for u in pydicom.uid.AllTransferSyntaxes if u.is_compressed and u.is_encapsulated]
)
def test_gdcm_is_only_asked_for_lossless_jpeg(syntax):
    """It ends the process on other damaged files."""
    if dicom.undecodable(syntax, 8) is None and dicom.plugin(syntax) == "":
        left_to_pydicom = pydicom.pixels.get_decoder(syntax).available_plugins
        assert "gdcm" not in left_to_pydicom or "Lossless, Non-Hierarchical" in syntax.name


def test_deflate_bomb_is_refused(radiographs):
    made = radiographs.make()
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = radiographs.folder / "x.dcm"
    made.save_as(path, enforce_file_format=True)
    np.testing.assert_array_equal(read_study(path).pixels, radiographs.gradient)
    data = path.read_bytes()
    start = 144 + int.from_bytes(data[140:144], "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = packer.compress(b"\0" * (dicom.MAX_HEADER_BYTES + 10**6)) + packer.flush()
    path.write_bytes(data[:start] + bomb)
    with pytest.raises(Rejected, match="unpacks to more"):
        read_study(path, max_pixels=10**4)


@pytest.mark.parametrize("syntax", [None, JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_cut_short_anywhere_is_refused(syntax, radiographs):
    noise = np.random.default_rng(0).integers(0, 4096, (80, 70)).astype(np.uint16)
    made = radiographs.make(noise, PatientID="7")
    if syntax:
        made.compress(syntax)
    data = radiographs.save(made).read_bytes()
    for keep in (1, 100, 140, 300, 700, len(data) // 2, len(data) - 20):
        (radiographs.folder / "cut.dcm").write_bytes(data[:keep])
        with pytest.raises(Rejected):
            read_study(radiographs.folder / "cut.dcm")


def test_lossy_jpeg_cut_inside_its_frame_is_refused(radiographs):
    source = pydicom.dcmread(get_testdata_file("SC_rgb_jpeg_dcmtk.dcm"))
    source.Modality, source.BodyPartExamined = "CR", "CHEST"
    frame = pydicom.encaps.get_frame(source.PixelData, 0, number_of_frames=1)
    source.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2]])
    with pytest.raises(Rejected, match="cut short"):
        read_study(radiographs.save(source))


def test_twelve_bit_jpeg_says_what_to_do(radiographs):
    source = pydicom.dcmread(get_testdata_file("JPGExtended.dcm"))
    source.Modality, source.BodyPartExamined = "CR", "CHEST"
    with pytest.raises(Rejected, match=r"12-bit JPEG Extended, .* convert it"):
        read_study(radiographs.save(source))


def test_damaged_bytes_never_escape_as_another_error(tmp_path, radiographs):
    """Random damage ends in a Study or in a Rejected, nothing else."""
    rng = np.random.default_rng(7)
    seeds = []
    for syntax in (None, JPEG2000Lossless, JPEGLSLossless, RLELossless):
        made = radiographs.make(
            WindowCenter=5, WindowWidth=6, PatientAge="034Y", PixelSpacing=[1, 1]
        )
        if syntax:
            made.compress(syntax)
        seeds.append(radiographs.save(made).read_bytes())
    read_count = 0
    for _ in range(300):
        data = bytearray(seeds[rng.integers(len(seeds))])
        for _ in range(rng.choice([1, 2, 8])):
            data[rng.integers(len(data))] = rng.choice([0, 255, rng.integers(256)])
        (radiographs.folder / "x.dcm").write_bytes(data)
        try:
            read_study(radiographs.folder / "x.dcm")
            read_count += 1
        except Rejected:
            pass
    assert 50 < read_count < 300


@pytest.mark.parametrize("name", ["parse_header", "parse_pixel_tags", "parse_codestream"])
def test_a_fault_of_ours_is_not_called_damage(name, radiographs, monkeypatch):
    def wrong(*rest):
        raise TypeError("ours")

    made = radiographs.make()
    made.compress(JPEG2000Lossless)
    path = radiographs.save(made)
    monkeypatch.setattr(dicom, name, wrong)
    with pytest.raises(TypeError, match="ours"):
        read_study(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dcmread", r"header is damaged \(pydicom: Odd\)"),
        ("get_frame", r"compressed pixels are damaged \(pydicom: Odd\)"),
        ("pixel_array", r"cut short or damaged \(pylibjpeg: Odd\)"),
    ],
)
def test_decoders_may_raise_anything_and_are_named(name, reason, radiographs, monkeypatch):
    class Odd(Exception):
        pass

    def wrong(*rest, **named):
        raise Odd(SECRET)

    made = radiographs.make()
    made.compress(JPEG2000Lossless)
    path = radiographs.save(made)
    monkeypatch.setattr(pydicom if name == "dcmread" else dicom, name, wrong)
    with pytest.raises(Rejected, match=reason) as caught:
        read_study(path)
    assert SECRET not in str(caught.value)


# -- header ----------------------------------------------------------------------------------


def test_single_frame_multiframe_and_missing_modality_are_read(radiographs):
    study = radiographs.read(NumberOfFrames=1, Modality=None)
    np.testing.assert_array_equal(study.pixels, radiographs.gradient)
    assert study.notes == ("Modality is missing",)


@pytest.mark.parametrize(
    "position", ["UPRIGHT AP", "HALF SITTING", "STANDING PA", "LATERAL DECUBITUS", "BED"]
)
def test_free_text_positions_are_read_and_noted_unquoted(position, radiographs):
    study = radiographs.read(PatientPosition=position)
    assert study.notes == ("PatientPosition is none of the usual words; not used",)
    assert radiographs.read(PatientPosition="ERECT").notes == ()


@pytest.mark.parametrize("part", ["CHEST", "Chest", "PORT CHEST", "THORAX", "TORAX", "", None])
def test_words_for_the_chest(part, radiographs):
    assert radiographs.read(BodyPartExamined=part).bits == 12


def test_anatomic_region_stands_in_for_the_body_part(radiographs):
    item = Dataset()
    item.CodeMeaning = "Pelvis"
    with pytest.raises(Rejected, match="PELVIS"):
        radiographs.read(BodyPartExamined=None, AnatomicRegionSequence=[item])


@pytest.mark.parametrize(
    ("tags", "view"),
    [
        ({"ViewPosition": "PA"}, "PA"),
        ({"ViewPosition": "LL"}, "LATERAL"),
        ({"ViewPosition": "LATERAL"}, "LATERAL"),
        ({"ViewPosition": "LORDOTIC"}, "LORDOTIC"),
        ({"PatientPosition": "AP"}, "AP"),
        ({"ViewPosition": "PA", "PatientPosition": "ERECT"}, "PA"),
        ({}, None),
    ],
)
def test_view(tags, view, radiographs):
    assert radiographs.read(**tags).view == view


def test_patient_columns(radiographs):
    study = radiographs.read(
        PatientID=" 17 ", PatientSex="F", PatientAge="006M", InstitutionName="North"
    )
    assert (study.patient_id, study.sex, study.age, study.site) == ("17", "F", 0.5, "North")
    assert radiographs.read().patient_id is None


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({"PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [0.3, 0.3]}, (0.2, 0.1)),
        ({"ImagerPixelSpacing": [0.3, 0.3]}, (0.3, 0.3)),
        (
            {"ImagerPixelSpacing": [0.3, 0.3], "EstimatedRadiographicMagnificationFactor": 1.5},
            (0.2, 0.2),
        ),
        ({"PixelSpacing": [0, 0], "ImagerPixelSpacing": [0.3, 0.3]}, (0.3, 0.3)),
        ({}, None),
    ],
)
def test_spacing(tags, spacing, radiographs):
    found = radiographs.read(**tags).spacing_mm
    assert found == (spacing and pytest.approx(spacing))


def test_orientation_is_noted_and_pixels_stay_on_the_files_grid(radiographs):
    study = radiographs.read(PatientOrientation=["R", "F"])
    np.testing.assert_array_equal(study.pixels, radiographs.gradient)
    assert "mirrored" in study.notes[0]
    assert radiographs.read(PatientOrientation=["L", "F"]).notes == ()


def test_odd_values_are_not_logged(radiographs, caplog):
    """pydicom warns of values that break their type and quotes them."""
    name = SECRET + "^" * 9 + "=" * 9
    with caplog.at_level("DEBUG"):
        made = radiographs.make(PatientName=name, PatientID=SECRET * 30, PatientAge=SECRET)
        path = radiographs.save(made)
        assert SECRET in caplog.text  # pydicom, writing it
        caplog.clear()
        study = read_study(path)
    assert SECRET not in caplog.text + "".join(study.notes)
    assert study.notes == ("the age is not usable",)


@pytest.mark.parametrize("implicit", [True, False])
def test_without_preamble(implicit, radiographs):
    made, buffer = radiographs.make(), io.BytesIO()
    bare = Dataset()
    bare.update(made)
    pydicom.dcmwrite(buffer, bare, implicit_vr=implicit, little_endian=True)
    assert buffer.getvalue()[128:132] != b"DICM"
    (radiographs.folder / "bare").write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(
        read_study(radiographs.folder / "bare").pixels, radiographs.gradient
    )
