"""Choosing the reader by content, and what every reader refuses."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image

from spcxr.data.masks import read_mask
from spcxr.data.study import Rejected, Study, range_notes, read_study

RAMP = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8)


def test_content_decides_not_the_suffix(tmp_path, radiographs):
    Image.fromarray(RAMP).save(tmp_path / "a.dcm", "PNG")
    np.testing.assert_array_equal(read_study(tmp_path / "a.dcm").pixels, RAMP)
    path = radiographs.save(radiographs.make(), "b.jpg")
    np.testing.assert_array_equal(read_study(path).pixels, radiographs.gradient)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"hello, this is text\n" * 20, "no DICOM, PNG, JPEG, TIFF or WebP"),
        (b"%PDF-1.7\n" + bytes(200), "no DICOM"),
        (b"\0" * 128 + b"DICM", "holds no image"),
        (bytes([8, 0, 5, 0]) + b"\xff" * 200, "holds no image"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "cannot be decoded"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "cannot be decoded"),
        (b"II*\0" + b"\xff" * 50, "cannot be decoded"),
    ],
)
def test_wrong_content_is_refused(content, reason, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(Rejected, match=reason) as caught:
        read_study(tmp_path / "x.png")
    assert caught.value.path == str(tmp_path / "x.png")
    assert str(caught.value) == f"{caught.value.path}: {caught.value.reason}"


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(Rejected, match="no such file"):
        read_study(tmp_path / "none.png")
    with pytest.raises(Rejected, match="a folder"):
        read_study(tmp_path)


def test_rejected_crosses_processes():
    error = pickle.loads(pickle.dumps(Rejected("a.dcm", "it is empty")))
    assert (error.path, error.reason, str(error)) == ("a.dcm", "it is empty", "a.dcm: it is empty")


def test_values_that_show_nothing_are_refused():
    with pytest.raises(Rejected, match="same value"):
        range_notes("x", np.full((300, 300), 9, np.uint8), 8)
    mask = np.zeros((300, 300), np.uint8)
    mask[50:80] = 255
    with pytest.raises(Rejected, match="two grey levels"):
        range_notes("x", mask, 8)
    mask[7, 7] = 3  # a third level that the probe for levels may miss
    assert range_notes("x", mask, 8) == ("only 3 grey levels",)


def test_suspicious_ranges_are_noted():
    assert range_notes("x", RAMP, 8) == ()
    assert range_notes("x", RAMP.astype(np.uint16), 16) == (
        "values span only 0 to 88 of 0 to 65535",
    )
    assert range_notes("x", RAMP // 8, 8) == ("only 12 grey levels",)


def test_a_study_is_grey_and_unsigned():
    for pixels in (np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2), np.int16)):
        with pytest.raises(ValueError, match="not \\(H, W\\)"):
            Study(pixels, bits=8)
    with pytest.raises(ValueError, match="do not fit"):
        Study(RAMP, bits=12)


def test_a_pipe_is_rejected_unopened(tmp_path):
    """Opening one would wait for a writer that never comes."""
    os.mkfifo(tmp_path / "pipe.png")
    for read in (read_study, read_mask):
        with pytest.raises(Rejected, match="it is a pipe, socket or device, not an image file"):
            read(tmp_path / "pipe.png")
