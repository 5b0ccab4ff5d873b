"""Left and right of images that are stored mirrored or turned, by their header."""

import csv

import numpy as np
import pydicom
import pytest
from PIL import Image

from spcxr.data.phantom_dicom import save, to_dataset
from spcxr.data.phantom_draw import draw
from spcxr.errors import NothingDone
from spcxr.infer.segment_files import Wanted, segment_files

SIDES = ("left lung", "right lung")
WANTED = Wanted(dicom_seg=True, post="none")


def stored(lungs, grey, orientation, tmp_path):
    """A DICOM of two lungs, of which the patient's right one is larger, stored as said."""
    pixels = grey(lungs(), np.uint16)
    if orientation[0] == "R":
        pixels = pixels[:, ::-1]
    if orientation[1] == "H":
        pixels = pixels[::-1]
    data = to_dataset(draw(3, size_px=64), "sides")
    data.PhotometricInterpretation, data.PresentationLUTShape = "MONOCHROME2", "IDENTITY"
    data.BitsStored, data.HighBit = 16, 15
    data.Rows, data.Columns = pixels.shape
    data.PixelData = np.ascontiguousarray(pixels).tobytes()
    data.PatientOrientation = list(orientation)
    save(data, tmp_path / "sides.dcm")
    return tmp_path / "sides.dcm", pixels > 40000


def results(out):
    with (out / "segment.csv").open() as file:
        (row,) = csv.DictReader(file)
    return row, np.asarray(Image.open(out / row["mask"]))


@pytest.mark.parametrize("orientation", ["LF", "RF", "RH"])
def test_each_lung_has_the_patients_side(
    drawing, halves, lungs, grey, compute, tmp_path, orientation
):
    file, truth = stored(lungs, grey, orientation, tmp_path)
    out = tmp_path / "out"
    segment_files(drawing(*SIDES, model=halves), [file], out, WANTED, compute)
    row, mask = results(out)
    agree = np.count_nonzero((mask > 0) & truth) / np.count_nonzero((mask > 0) | truth)
    assert agree > 0.9  # on the grid of the file
    assert int(row["area_px_right_lung"]) > 1.3 * int(row["area_px_left_lung"])
    on_left = mask[:, :70] if orientation[0] == "L" else mask[:, 70:]
    assert set(np.unique(on_left)) == {0, 2}
    seg = pydicom.dcmread(out / row["dicom_seg"])
    right = [s.SegmentLabel for s in seg.SegmentSequence].index("right lung")
    np.testing.assert_array_equal(seg.pixel_array[right], mask == 2)


@pytest.mark.parametrize("orientation", ["LF", "RF", "LH"])
def test_whole_lungs_and_their_map_lie_where_the_file_has_them(
    drawing, lungs, grey, compute, tmp_path, orientation
):
    file, truth = stored(lungs, grey, orientation, tmp_path)
    out = tmp_path / "out"
    wanted = Wanted(uncertainty=True)
    segment_files(drawing("lung"), [file], out, wanted, compute)
    row, mask = results(out)
    assert np.count_nonzero((mask > 0) & truth) > 0.9 * np.count_nonzero(truth)
    doubt = np.asarray(Image.open(out / row["uncertainty_map"]))
    assert doubt[truth].max() > 0  # at the lungs' edges, and nowhere far from them
    assert doubt[:, :10].max() == 0
    if orientation != "LH":  # upside down by a mirror, or by a half turn? Not known
        assert int(row["area_px_right_lung"]) > int(row["area_px_left_lung"])


@pytest.mark.parametrize("orientation", [["F", "L"], ["L", "H"]])
def test_sides_that_are_not_known_are_not_written_as_a_seg(
    drawing, halves, lungs, grey, compute, tmp_path, orientation
):
    file, _ = stored(lungs, grey, orientation, tmp_path)
    model = drawing(*SIDES, model=halves)
    with pytest.raises(NothingDone, match="a DICOM SEG of left and right would be a guess"):
        segment_files(model, [file], tmp_path / "seg", WANTED, compute)
    segment_files(model, [file], tmp_path / "out", Wanted(), compute)
    row, _ = results(tmp_path / "out")
    assert "sides are not known: turned, by its header" in row["flags"]
