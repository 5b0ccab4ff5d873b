"""Masks as people save them, and the pieces that a run resumes by."""

import os

import numpy as np
import pytest
from PIL import Image

from spcxr.data.masks import Mask, read_mask
from spcxr.data.pieces import FILES_PER_PIECE, Task, plan, prepare_one
from spcxr.data.presets import Preprocess
from spcxr.data.raster import ORIENTATION
from spcxr.data.study import Rejected, read_study
from spcxr.errors import SpcxrError

MASKS = {
    "0/255": (np.array([[0, 255]], np.uint8), [[0, 1]]),
    "0/1": (np.array([[0, 1]], np.uint8), [[0, 1]]),
    "soft edge": (np.array([[0, 100, 200]], np.uint8), [[0, 0, 1]]),
    "bits": (np.array([[False, True]]), [[0, 1]]),
    "colour": (np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8), [[0, 1]]),
    "16 bit": (np.array([[0, 65535]], np.uint16), [[0, 1]]),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_as_people_save_them(tmp_path, kind):
    pixels, expected = MASKS[kind]
    Image.fromarray(pixels).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), expected)


def test_a_map_of_labels_is_no_mask(tmp_path):
    Image.fromarray(np.array([[0, 1, 2]], np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(Rejected, match="holds values up to 2; masks are 0 / 1 or 0 / 255"):
        read_mask(tmp_path / "m.png")
    (tmp_path / "t.png").write_bytes(b"\x89PNG and no more")
    for name in ("t.png", "absent.png"):
        with pytest.raises(Rejected, match="cannot be read"):
            read_mask(tmp_path / name)


@pytest.mark.parametrize(("files", "length"), [(1, 1), (64, 1), (200, 3), (5000, 16)])
def test_pieces_are_many_and_short(tmp_path, files, length):
    """Enough for every worker, whatever their number: it must not show in the result."""
    made = plan([Task("/", "a")] * files, Preprocess(size_px=8), tmp_path)
    assert [len(piece.tasks) for piece in made][:-1] == [length] * (len(made) - 1)
    assert sum(len(piece.tasks) for piece in made) == files


def test_a_piece_is_named_by_its_files_and_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("spcxr.data.pieces.PIECES", 1)
    (tmp_path / "a.png").write_bytes(b"1")
    tasks = [Task(str(tmp_path), f"{name}.png") for name in "ab"] * FILES_PER_PIECE
    names = [piece.file.name for piece in plan(tasks, Preprocess(size_px=8), tmp_path)]
    assert len(set(names)) == 2
    assert names == [piece.file.name for piece in plan(tasks, Preprocess(size_px=8), tmp_path)]
    assert names != [piece.file.name for piece in plan(tasks, Preprocess(size_px=9), tmp_path)]
    before = (tmp_path / "a.png").stat()
    (tmp_path / "a.png").write_bytes(b"2")
    os.utime(tmp_path / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert names != [piece.file.name for piece in plan(tasks, Preprocess(size_px=8), tmp_path)]


class Odd(Exception):
    """No error that anyone would list."""


def failing(error):
    def call(*positional, **named):
        raise error

    return call


def test_whatever_a_decoder_raises_is_a_reason_but_a_broken_install_is_not(tmp_path, monkeypatch):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    task = Task(str(tmp_path), "a.png", (Mask("a.png"),))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", failing(Odd("PatientName Smith")))
    with pytest.raises(Rejected, match=r"damaged or cut short \(Pillow: Odd\)") as caught:
        prepare_one(task, Preprocess())
    assert "Smith" not in str(caught.value)
    with pytest.raises(Rejected, match=r"its mask cannot be read \(Pillow: Odd\)"):
        read_mask(tmp_path / "a.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", failing(ImportError("no libopenjp2.so")))
    with pytest.raises(ImportError):
        prepare_one(task, Preprocess())


@pytest.mark.parametrize(
    ("name", "error", "seen"),
    [
        ("pieces.read_study", TypeError("ours"), TypeError),
        ("raster.is_coloured", TypeError("ours"), TypeError),
        ("presets.resize", KeyError("ours"), KeyError),
        ("presets.resize", MemoryError(), Rejected),
        ("presets.resize", SpcxrError("a preset's word"), Rejected),
    ],
)
def test_a_fault_of_ours_is_no_fault_of_the_file(tmp_path, monkeypatch, name, error, seen):
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(f"spcxr.data.{name}", failing(error))
    with pytest.raises(seen):
        prepare_one(Task(str(tmp_path), "a.png"), Preprocess())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_masks_turn_as_the_images_do(tmp_path, orientation):
    pixels = np.zeros((6, 9), np.uint8)
    pixels[:2, :3], pixels[0, 8] = 255, 99
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for name in ("a.png", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name, exif=exif)
        turned = read_study(tmp_path / name).pixels
        np.testing.assert_array_equal(read_mask(tmp_path / name), turned == 255)
        assert turned.shape == ((9, 6) if orientation > 4 else (6, 9))
