"""DICOM SEG: pixels, references, codes, what is copied and what is not; judged by other readers."""

import csv
import logging
import re
import shutil
import subprocess
import warnings

import highdicom
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.sr.codedict import codes

from spcxr.data.phantom_dicom import save, to_dataset
from spcxr.data.phantom_draw import draw
from spcxr.infer.segment_files import Wanted, segment_files

NAMES = ("lung", "heart")
WANTED = Wanted(dicom_seg=True, post="none")


def source_of(tmp_path, change=None, name="image", compression="none"):
    data = to_dataset(draw(3, size_px=128), name)
    data.PositionerType = ""  # the one element that the phantoms lack
    if change:
        change(data)
    save(data, tmp_path / f"{name}.dcm", compression)
    return tmp_path / f"{name}.dcm"


def made(model, file, compute, tmp_path):
    out = tmp_path / "out"
    segment_files(model, [file], out, WANTED, compute)
    with (out / "segment.csv").open() as table:
        (row,) = csv.DictReader(table)
    return row, out / row["dicom_seg"], np.asarray(Image.open(out / row["mask"]))


def errors(file):
    """What dciodvfy holds against a file."""
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy is not installed (Debian's dicom3tools)")
    said = subprocess.run(["dciodvfy", str(file)], capture_output=True, text=True, check=False)
    return [line for line in said.stderr.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize("compression", ["none", "jpeg2000"])
def test_pixels_read_back_by_two_readers(drawing, compute, tmp_path, compression):
    file = source_of(tmp_path, compression=compression)
    _, seg, mask = made(drawing(*NAMES), file, compute, tmp_path)
    assert set(np.unique(mask)) == {0, 1, 2}
    read = highdicom.seg.segread(seg)
    uids = [uids[2] for uids in read.get_source_image_uids()]
    frames = read.get_pixels_by_source_instance(uids, segment_numbers=[1, 2])
    np.testing.assert_array_equal(frames[0], np.stack([mask == 1, mask == 2], -1))
    plain = pydicom.dcmread(seg)
    np.testing.assert_array_equal(plain.pixel_array, np.stack([mask == 1, mask == 2]))


def test_it_refers_to_its_image_and_says_what_it_shows(drawing, compute, tmp_path):
    file = source_of(tmp_path)
    _, seg, _ = made(drawing(*NAMES), file, compute, tmp_path)
    source, read = pydicom.dcmread(file), pydicom.dcmread(seg)
    assert (read.Modality, read.SegmentationType) == ("SEG", "BINARY")
    assert read.StudyInstanceUID == source.StudyInstanceUID
    assert read.SeriesInstanceUID != source.SeriesInstanceUID
    assert "FrameOfReferenceUID" not in read
    series = read.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    assert series.ReferencedInstanceSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    for frame in read.PerFrameFunctionalGroupsSequence:
        (image,) = frame.DerivationImageSequence[0].SourceImageSequence
        assert image.ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert image.ReferencedSOPClassUID == source.SOPClassUID
    codes = [s.SegmentedPropertyTypeCodeSequence[0] for s in read.SegmentSequence]
    assert [(c.CodeValue, c.CodingSchemeDesignator) for c in codes] == [
        ("39607008", "SCT"),
        ("80891009", "SCT"),
    ]


def test_a_side_is_a_modifier_of_the_lung(drawing, compute, tmp_path):
    """As PS3.16 has it: CID 7151 lists no left lung, CID 244 the sides."""
    _, seg, _ = made(drawing("Left lung", "right lung"), source_of(tmp_path), compute, tmp_path)
    segments = pydicom.dcmread(seg).SegmentSequence
    for segment, side in zip(segments, [codes.SCT.Left, codes.SCT.Right], strict=True):
        (category,), (kind,) = (
            segment.SegmentedPropertyCategoryCodeSequence,
            segment.SegmentedPropertyTypeCodeSequence,
        )
        (modifier,) = segment.SegmentedPropertyTypeModifierCodeSequence
        assert category.CodeValue == codes.cid7150.AnatomicalStructure.value
        assert kind.CodeValue == codes.cid7151.Lung.value
        assert modifier.CodeValue == side.value
        assert modifier.CodeMeaning == segment.SegmentLabel.split()[0].title()


def test_it_is_valid(drawing, compute, tmp_path):
    file = source_of(tmp_path)
    _, seg, _ = made(drawing("right lung", "left lung", "heart"), file, compute, tmp_path)
    assert errors(file) == []
    assert errors(seg) == []


def strip(data):
    for name in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate",
                 "StudyTime", "StudyID", "AccessionNumber", "PatientOrientation",
                 "ReferringPhysicianName", "PatientAge"):  # fmt: skip
        delattr(data, name)


def test_nothing_is_made_up_of_the_patient(drawing, compute, tmp_path):
    file = source_of(tmp_path, strip)
    row, seg, _ = made(drawing(*NAMES), file, compute, tmp_path)
    read = pydicom.dcmread(seg)
    assert row["status"] == "done"
    assert not any(
        str(e.value) for e in read.group_dataset(0x0010) if e.keyword != "PatientComments"
    )
    assert not any([read.StudyDate, read.StudyTime, read.StudyID, read.AccessionNumber])
    assert errors(seg) == []


def spoil(data):
    data.PatientName = "Secret^Name^a^b^c^d^e"
    data.PatientID = "secret-id"
    data.PatientAge, data.PatientSex = "62", "W"


def test_odd_values_are_not_copied_and_never_quoted(
    drawing, compute, tmp_path, capfd, caplog, recwarn
):
    file = source_of(tmp_path, spoil)
    with caplog.at_level(logging.DEBUG):
        row, seg, _ = made(drawing(*NAMES), file, compute, tmp_path)
    read = pydicom.dcmread(seg)
    assert str(read.PatientID) == "secret-id"
    assert read.PatientSex == ""
    assert "PatientAge" not in read
    said = capfd.readouterr()
    everything = said.out + said.err + caplog.text + (tmp_path / "out" / "segment.csv").read_text()
    everything += " ".join(str(w.message) for w in recwarn) + str(row)
    everything += " ".join(path.name for path in (tmp_path / "out").rglob("*"))
    assert not re.search("secret", everything, re.IGNORECASE)
    assert logging.getLogger("highdicom").level == logging.NOTSET


def write(**values):
    """A change of a dataset; pydicom warns of values that are none of DICOM's."""

    def change(data):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, value in values.items():
                setattr(data, name, value)

    return change


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("StudyDate", "2020.01.02", ""),
        ("StudyDate", "00000000", ""),
        ("StudyDate", "20200102", "20200102"),
        ("StudyTime", "12:33:44", ""),
        ("StudyTime", "123344.1234567", ""),
        ("StudyTime", "1233", "1233"),
        ("PatientBirthDate", "UNKNOWN", ""),
        ("PatientOrientation", ["X1", "??"], ""),
        ("PatientOrientation", "L", ""),
        ("LossyImageCompression", "", "00"),
    ],
)
def test_values_that_are_none_of_dicoms_cost_no_mask(drawing, compute, tmp_path, name, value, kept):
    file = source_of(tmp_path, write(**{name: value}))
    row, seg, _ = made(drawing(*NAMES), file, compute, tmp_path)
    assert row["status"] == "done"
    assert (pydicom.dcmread(seg).get(name) or "") == kept
    assert errors(seg) == []


@pytest.mark.parametrize(
    ("repertoire", "name"),
    [
        ("ISO_IR 100", "M\u00fcller^J\u00f6rg"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce"),
        ("ISO_IR 192", "Wang^XiaoDong=\u738b^\u5c0f\u4e1c"),
    ],
)
def test_names_in_other_letters_are_the_same(drawing, compute, tmp_path, repertoire, name):
    change = write(SpecificCharacterSet=repertoire, PatientName=name, StudyDescription=name[-2:])
    row, seg, _ = made(drawing(*NAMES), source_of(tmp_path, change), compute, tmp_path)
    read = pydicom.dcmread(seg)
    assert row["status"] == "done"
    assert (str(read.PatientName), read.StudyDescription) == (name, name[-2:])
    assert read.SpecificCharacterSet == "ISO_IR 192"
    assert errors(seg) == []


@pytest.mark.parametrize("lacking", ["SeriesInstanceUID", "StudyInstanceUID"])
def test_an_image_that_cannot_be_referred_to(drawing, compute, tmp_path, lacking):
    good = source_of(tmp_path, name="good")
    bad = source_of(tmp_path, lambda data: delattr(data, lacking), name="bad")
    out = tmp_path / "out"
    table = segment_files(drawing(*NAMES), [good, bad], out, WANTED, compute)
    assert (table.done, table.rejected) == (1, 1)
    assert table.first_reason.endswith(f"it has no {lacking}, so a DICOM SEG cannot refer to it")


def test_a_png_is_no_source_of_a_seg(drawing, png, compute, tmp_path):
    given = [source_of(tmp_path), png("a.png")]
    table = segment_files(drawing(*NAMES), given, tmp_path / "out", WANTED, compute)
    assert table.first_reason.endswith(
        "a.png: it is no DICOM file, so a DICOM SEG has nothing to refer to"
    )


def test_where_nothing_is_found_there_is_no_seg(drawing, compute, tmp_path, monkeypatch):
    model = drawing(*NAMES)
    monkeypatch.setattr("spcxr.infer.segment_files.tidy", lambda mask, *_: np.zeros_like(mask))
    file, out = source_of(tmp_path), tmp_path / "out"
    segment_files(model, [file], out, WANTED, compute)
    with (out / "segment.csv").open() as table:
        (row,) = csv.DictReader(table)
    assert row["dicom_seg"] == ""
    assert row["flags"] == "no lung; no heart"


@pytest.mark.shared
def test_real_radiographs(drawing, compute, tmp_path, shared_data):
    """What the public DICOMs are like: masks, valid SEGs, and the four that are no chest."""
    out = tmp_path / "out"
    table = segment_files(drawing(*NAMES), [shared_data / "dicom"], out, WANTED, compute)
    assert (table.done, table.rejected) == (6, 4)
    segs = sorted((out / "dicom_seg").iterdir())
    assert len(segs) == 6
    for seg in segs:
        assert highdicom.seg.segread(seg).number_of_segments == 2
        assert errors(seg) == []
