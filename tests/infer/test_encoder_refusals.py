"""What cannot be encoded is refused in one line that says why, and never encoded as something."""

import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from encoder_cases import SIDE, grey, made, phantom
from PIL import Image

from spcxr.data.study import Rejected
from spcxr.errors import SpcxrError


def saved(file, pixels):
    Image.fromarray(pixels).save(file)
    return file


def picture(height, width):
    """Colours that differ."""
    return np.stack([grey(height, width, seed) for seed in range(3)], -1)


def header_of(file, width, height):
    """A PNG that says it has these sides: nothing that large need be written."""
    data = saved(file, grey(8, 8)).read_bytes()
    sides = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    file.write_bytes(data[:12] + sides + struct.pack(">I", zlib.crc32(sides)) + data[33:])
    return file


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def empty(file):
    file.touch()
    return file


FILES = {
    "ct.dcm": (lambda f: phantom(f, Modality="CT"), "Modality is CT"),
    "lateral.dcm": (lambda f: phantom(f, ViewPosition="LL"), "lateral"),
    "frames.dcm": (lambda f: phantom(f, NumberOfFrames=2), "2 frames"),
    "photometric.dcm": (
        lambda f: phantom(f, PhotometricInterpretation=None),
        "PhotometricInterpretation is missing",
    ),
    "cut.dcm": (lambda f: cut(phantom(f)), "cut short|damaged"),
    "cut.png": (lambda f: cut(saved(f, grey())), "cut short|damaged|decoded"),
    "empty.dcm": (empty, "it is empty"),
    "constant.png": (lambda f: saved(f, np.full((50, 40), 7, np.uint8)), "the same value"),
    "mask.png": (lambda f: saved(f, np.eye(50, dtype=np.uint8) * 255), "two grey levels"),
    "one.png": (lambda f: saved(f, np.ones((1, 1), np.uint8)), "the same value"),
    "huge.png": (lambda f: header_of(f, 20000, 20000), "larger than Pillow decodes"),
    "nothing.png": (lambda f: f, "no such file"),
    "text.png": (lambda f: f.write_text("a radiograph") and f, "it is no DICOM, PNG"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    write, reason = FILES[name]
    good, bad = saved(tmp_path / "good.png", grey()), write(tmp_path / name)
    with pytest.raises(Rejected, match=reason) as refused:
        made()([good, bad])
    assert str(refused.value).startswith(f"{bad}: ")
    assert "\n" not in str(refused.value)
    assert "PHANTOM" not in str(refused.value)


def holed(value):
    array = grey() / 255
    array[3, 4] = value
    return array


ARRAYS = [
    (picture(50, 40), r"\[50, 40, 3\].*colour"),
    (np.zeros((2, 3, 4, 5), np.uint8), r"\[2, 3, 4, 5\]"),
    (np.zeros((0, 5), np.uint8), r"\[0, 5\]"),
    (np.full((50, 40), 9, np.uint8), "image 0: every pixel"),
    (np.ones((1, 1), np.uint16), "image 0: every pixel"),
    (holed(np.nan), "not finite"),
    (holed(np.inf), "not finite"),
    (grey().astype(np.float32), r"run from .*\[0, 1\].*torch tensor"),
    (grey() / 255 - 0.5, r"run from -0.5 .*\[0, 1\]"),
    (grey().astype(np.int64), "int64; give uint8"),
    (grey() > 100, "bool; give uint8"),
    (np.stack([grey(), np.full_like(grey(), 3)]), "image 1: every pixel"),
]


@pytest.mark.parametrize(("array", "reason"), ARRAYS, ids=[reason for _, reason in ARRAYS])
def test_arrays(array, reason):
    with pytest.raises(Rejected, match=reason):
        made()(array)


NOISE = torch.rand(2, 1, SIDE, SIDE)
TENSORS = [
    (NOISE * 255, "values from .* but this network reads .*black -2 to white 3"),
    (NOISE.masked_fill(NOISE > 0.99, torch.nan), "not finite"),
    (NOISE.masked_fill(NOISE > 0.99, torch.inf), "not finite"),
    (NOISE.long(), r"int64; give \[B, S, S\] of uint8 or uint16"),
    (NOISE[:, 0, :50].byte(), r"\[2, 50, 64\] of torch.uint8; give \[B, S, S\]"),
    (NOISE[:, 0], r"\[2, 64, 64\] of floats; give \[B, C, H, W\]"),
    (NOISE.expand(-1, 3, -1, -1), r"takes \[B, 1, H, W\]"),
    (NOISE[..., :50], "does not divide into patches"),
    ((NOISE * 255).byte().expand(-1, 3, -1, -1), r"\[2, 3, 64, 64\] of torch.uint8; .*grey"),
    ([], "nothing to encode"),
    ([NOISE[0], "a.png"], "a Tensor among the images"),
    ({"image": 1}, "No such|no such"),
    ([3.5], "a float among the images"),
    (None, "a NoneType; give paths"),
    (Image.fromarray(grey()), r"a Image; give paths, .*np.asarray\(image\)"),
]


@pytest.mark.parametrize(("tensor", "reason"), TENSORS, ids=[reason for _, reason in TENSORS])
def test_tensors(tensor, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SpcxrError, match=reason):
            made()(tensor)


def test_batches_of_nothing():
    with pytest.raises(SpcxrError, match="batch_size is 0; give 1 or more"):
        made()(grey(), batch_size=0)


def test_pixels_between_0_and_1_are_suspected():
    with pytest.warns(UserWarning, match=r"these look like pixels in \[0, 1\]"):
        made()(NOISE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made()(NOISE * 4 - 2)
        made()(torch.zeros(1, 1, SIDE, SIDE))
        made()(torch.randn(2, 1, SIDE, SIDE))


def test_what_is_odd_about_files_is_said_once(tmp_path, caplog):
    """As `prepare` does: a colour picture is read by its luminance."""
    files = [saved(tmp_path / f"{n}.png", picture(50 + n, 40)) for n in range(3)]
    features = made()([*files, grey()])
    assert features.cls.shape[0] == 4
    (record,) = caplog.records
    assert record.message == f"{files[0]} (and 2 more): a colour picture, read by its luminance"
