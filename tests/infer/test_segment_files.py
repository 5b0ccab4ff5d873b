"""`spcxr segment` on files: geometry, what is refused, what is gone on with, what is kept quiet."""

import csv
import errno
import gc
import signal
import weakref
from dataclasses import replace
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from pydicom.data import get_testdata_file

from spcxr.cli import use
from spcxr.data.phantom_dicom import save, to_dataset
from spcxr.data.phantom_draw import draw
from spcxr.errors import Interrupted, NothingDone, SpcxrError
from spcxr.infer import reading
from spcxr.infer import segment_files as module
from spcxr.infer.segment_files import Wanted, segment_files

ROTATE_90 = 6  # Exif: turn by 90 degrees clockwise to show it upright


def rows(out):
    with (out / "segment.csv").open() as file:
        return list(csv.DictReader(file))


def iou(mask, truth):
    return np.count_nonzero(mask & truth) / np.count_nonzero(mask | truth)


def read_mask(out, row):
    with Image.open(out / row["mask"]) as image:
        assert image.mode == "P"
        return np.asarray(image)


# --- geometry -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_lie_on_the_files_own_grid(drawing, png, lungs, compute, tmp_path, dtype):
    truth = lungs(90, 140)
    file = png("a.png", truth, dtype)
    out = tmp_path / "out"
    table = segment_files(drawing("lung"), [file], out, Wanted(), compute)
    assert (table.done, table.rejected) == (1, 0)
    (row,) = rows(out)
    mask = read_mask(out, row)
    assert mask.shape == (90, 140)
    assert iou(mask == 1, truth) > 0.9
    assert int(row["area_px_lung"]) == np.count_nonzero(mask)
    # the patient's right is on the image's left
    assert int(row["area_px_right_lung"]) == np.count_nonzero(mask[:, :75])
    assert int(row["area_px_left_lung"]) == np.count_nonzero(mask[:, 75:])
    assert row["area_mm2_lung"] == row["spacing_row_mm"] == ""
    assert "pixel spacing is not known: mm2 left blank" in row["notes"]
    assert row["flags"] == ""
    with Image.open(out / row["overlay"]) as picture:
        assert picture.size[0] == 140


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_other_fits_come_back_too(drawing, png, lungs, compute, tmp_path, fit):
    truth = lungs(90, 140)
    segment_files(
        drawing("lung", fit=fit), [png("a.png", truth)], tmp_path / "o", Wanted(), compute
    )
    mask = read_mask(tmp_path / "o", rows(tmp_path / "o")[0]) == 1
    kept = slice(25, 115) if fit == "crop" else slice(None)
    assert iou(mask[:, kept], truth[:, kept]) > 0.9
    if fit == "crop":
        assert not mask[:, :25].any()
        assert not mask[:, 115:].any()


def test_lungs_that_the_crop_cuts_are_flagged(drawing, png, lungs, compute, tmp_path):
    wide = np.pad(lungs(), ((0, 0), (0, 40)))  # the larger lung lies across the square's edge
    file = png("a.png", wide)
    segment_files(drawing("lung", fit="crop"), [file], tmp_path / "crop", Wanted(), compute)
    segment_files(drawing("lung"), [file], tmp_path / "pad", Wanted(), compute)
    said = "lung touches the border of the image"
    assert said in rows(tmp_path / "crop")[0]["flags"]
    assert said not in rows(tmp_path / "pad")[0]["flags"]


def test_an_exif_rotated_picture_is_segmented_as_it_is_shown(
    drawing, lungs, grey, compute, tmp_path
):
    upright = lungs(90, 140)
    exif = Image.Exif()
    exif[274] = ROTATE_90
    file = tmp_path / "phone.jpg"
    Image.fromarray(np.rot90(grey(upright))).save(file, quality=95, exif=exif)
    segment_files(drawing("lung"), [file], tmp_path / "out", Wanted(), compute)
    (row,) = rows(tmp_path / "out")
    assert iou(read_mask(tmp_path / "out", row) == 1, upright) > 0.9
    assert "turned upright as its EXIF orientation says" in row["notes"]


def test_a_colour_picture_is_read_by_its_luminance(drawing, lungs, grey, compute, tmp_path):
    truth = lungs()
    rgb = np.repeat(grey(truth)[..., None], 3, axis=2)
    rgb[:10, :, 1:] = 0  # a red stripe of noise
    Image.fromarray(rgb).save(tmp_path / "c.png")
    segment_files(drawing("lung"), [tmp_path / "c.png"], tmp_path / "out", Wanted(), compute)
    (row,) = rows(tmp_path / "out")
    assert iou(read_mask(tmp_path / "out", row) == 1, truth) > 0.9


def test_stored_inverted_is_the_same_mask(drawing, compute, tmp_path):
    """MONOCHROME1 and MONOCHROME2 of one phantom."""
    phantom = draw(3, size_px=128)
    for name, site in (("two", "site-a"), ("one", "site-b")):
        save(to_dataset(replace(phantom, site=site), name), tmp_path / f"{name}.dcm")
    files = [tmp_path / "two.dcm", tmp_path / "one.dcm"]
    segment_files(drawing("a", "b"), files, tmp_path / "out", Wanted(post="none"), compute)
    first, second = (read_mask(tmp_path / "out", row) for row in rows(tmp_path / "out"))
    assert set(np.unique(first)) == {0, 1, 2}
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("spacing", [(0.5, 0.2), None])
def test_square_millimetres_of_pixels_that_are_not_square(drawing, compute, tmp_path, spacing):
    data = to_dataset(draw(1, size_px=64), "s")
    del data.ImagerPixelSpacing, data.PixelSpacing
    if spacing:
        data.PixelSpacing = list(spacing)
    save(data, tmp_path / "s.dcm")
    segment_files(drawing("bright"), [tmp_path / "s.dcm"], tmp_path / "out", Wanted(), compute)
    (row,) = rows(tmp_path / "out")
    area = int(row["area_px_bright"])
    assert area > 0
    if spacing:
        assert float(row["area_mm2_bright"]) == pytest.approx(0.1 * area, rel=1e-4)
    else:
        assert row["area_mm2_bright"] == ""
        assert "mm2 left blank" in row["notes"]


# --- what is refused ------------------------------------------------------------------------


def test_bad_files_have_a_row_and_the_rest_goes_on(drawing, png, compute, tmp_path):
    good = png("good.png")
    folder = good.parent
    (folder / "empty.dcm").touch()
    (folder / "torn.png").write_bytes(good.read_bytes()[:200])
    (folder / "note.txt").write_text("no image")
    lateral = to_dataset(draw(2, size_px=64), "l")
    lateral.ViewPosition = "LL"
    save(lateral, folder / "side.dcm")
    given = [folder, get_testdata_file("CT_small.dcm")]
    table = segment_files(drawing("lung"), given, tmp_path / "out", Wanted(), compute)
    assert (table.done, table.rejected) == (1, 5)
    reasons = {row["name"]: row["reason"] for row in rows(tmp_path / "out")}
    assert reasons == {
        "good": "",
        "empty": "it is empty",
        "torn": reasons["torn"],
        "note": "it is no DICOM, PNG, JPEG, TIFF or WebP file",
        "side": "it is a lateral view by its header; the model knows frontal ones",
        "CT_small": "its Modality is CT, not one of CR, DX, DR, RG",
    }
    assert "damaged or cut short" in reasons["torn"]


def test_nothing_done_is_exit_code_1(untrained, tmp_path):
    (tmp_path / "empty.png").touch()
    model = untrained("lung")
    flags = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    for _ in range(2):  # also when there is nothing left to do
        run = CliRunner().invoke(use, ["segment", str(model), str(tmp_path / "empty.png"), *flags])
        assert run.exit_code == 1
        assert "empty.png: it is empty (all 1 rejected: see " in run.output


@pytest.mark.parametrize(
    ("structures", "arguments", "said"),
    [
        ((), [], "draws no masks; give a run of spcxr-train segment"),
        (("square",), ["--dicom-seg"], "no code is known for 'square'"),
        (("lung",), ["--out", "in/a.png"], "is a file; choose another --out"),
    ],
)
def test_requests_that_cannot_be(
    untrained, png, tmp_path, monkeypatch, structures, arguments, said
):
    monkeypatch.chdir(tmp_path)
    file = png("a.png")
    command = ["segment", str(untrained(*structures)), str(file), "--out", "out", *arguments]
    run = CliRunner().invoke(use, command)
    assert run.exit_code == 2
    assert run.output.count("\n") == 1
    assert said in run.output


def test_a_place_that_is_not_there(untrained, tmp_path):
    run = CliRunner().invoke(
        use, ["segment", str(untrained("lung")), "nowhere", "--out", str(tmp_path / "o")]
    )
    assert (run.exit_code, run.output) == (
        2,
        "error: nowhere: no such file or folder; check the path\n",
    )


# --- many files -----------------------------------------------------------------------------


def test_a_stopped_command_goes_on(drawing, png, compute, tmp_path, monkeypatch):
    files = [png(f"{name}.png") for name in "abcdef"]
    model, whole, out = drawing("lung"), tmp_path / "whole", tmp_path / "out"
    segment_files(model, files, whole, Wanted(), compute)

    def stopping(*arguments, **settings):
        if len(list((out / "masks").glob("*.png"))) >= 3:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **settings)

    real = module.pictures.save_mask
    with monkeypatch.context() as patch:
        patch.setattr(module.pictures, "save_mask", stopping)
        with pytest.raises(Interrupted, match=r"stopped by SIGTERM with \d of 6 images done"):
            segment_files(model, files, out, Wanted(), compute)
    kept = len(rows(out))
    assert 0 < kept < 6
    with (out / "segment.csv").open("a") as file:
        file.write("torn line without an e")
    read = []
    real_read = reading.read_study
    monkeypatch.setattr(reading, "read_study", lambda path: read.append(path) or real_read(path))
    table = segment_files(model, files, out, Wanted(), compute)
    assert sorted(read) == files[kept:]
    assert table.done == 6
    assert (out / "segment.csv").read_text() == (whole / "segment.csv").read_text()


def test_other_settings_are_refused(drawing, png, compute, tmp_path):
    model, file = drawing("lung"), png("a.png")
    segment_files(model, [file], tmp_path / "out", Wanted(), compute)
    with pytest.raises(SpcxrError, match=r"holds results of other settings \(post\)"):
        segment_files(model, [file], tmp_path / "out", Wanted(post="none"), compute)


def test_a_full_disk_is_named(drawing, png, compute, tmp_path, monkeypatch):
    def full(mask, file):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write says it

    monkeypatch.setattr(module.pictures, "save_mask", full)
    with pytest.raises(OSError, match="No space left") as caught:
        segment_files(drawing("lung"), [png("a.png")], tmp_path / "out", Wanted(), compute)
    assert caught.value.filename == str(tmp_path / "out")


def test_masks_of_many_structures(tmp_path):
    mask = np.arange(255, dtype=np.uint8)[None]
    for most in (1, 8, 16, 254):
        module.pictures.save_mask(mask[:, : most + 1], tmp_path / "m.png")
        np.testing.assert_array_equal(Image.open(tmp_path / "m.png"), mask[:, : most + 1])


def test_memory_does_not_grow_with_the_number_of_files(
    drawing, png, compute, tmp_path, monkeypatch
):
    files = [png(f"{i:02d}.png") for i in range(32)]
    alive, most = weakref.WeakSet(), []

    class Counted(reading.Ready):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            alive.add(self)
            gc.collect(0)
            most.append(len(alive))

    monkeypatch.setattr(reading, "Ready", Counted)
    segment_files(drawing("lung"), files, tmp_path / "out", Wanted(overlay=False), compute)
    assert len(most) == 32
    assert max(most) <= 20  # read ahead, a batch, and those being written


# --- uncertainty ----------------------------------------------------------------------------


def test_a_model_blind_to_sides_agrees_with_its_mirror(drawing, png, compute, tmp_path):
    out = tmp_path / "out"
    segment_files(drawing("lung"), [png("a.png")], out, Wanted(uncertainty=True), compute)
    (row,) = rows(out)
    assert float(row["flip_dice"]) > 0.99
    assert 0 <= float(row["uncertainty"]) < 0.2
    with Image.open(out / row["uncertainty_map"]) as image:
        assert (image.mode, image.size) == ("L", (140, 90))


def test_all_rejected_names_the_first(drawing, compute, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(NothingDone, match=r"a.png: it is no DICOM"):
        segment_files(drawing("lung"), [tmp_path / "a.png"], tmp_path / "o", Wanted(), compute)


def test_a_broken_model_names_its_files(drawing, png, compute, tmp_path):
    model = drawing("lung")
    module.load_trained(model, "cpu").model.steps.fill_(np.nan)
    with pytest.raises(SpcxrError, match=r"a\.png: .*the model's output is not finite"):
        segment_files(model, [png("a.png")], tmp_path / "out", Wanted(), compute)


def test_every_flag_has_help():
    for parameter in use.commands["segment"].params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name


def test_long_legends_go_on_in_a_next_line():
    pixels = np.eye(64, dtype=np.uint8)
    short = module.pictures.overlay(pixels, pixels, ("lung",))
    long = module.pictures.overlay(pixels, pixels, ("right lung", "left lung", "heart"))
    line = module.pictures.LEGEND_PX
    assert (short.height, long.height) == (64 + line, 64 + 3 * line)
    colours = [np.asarray(long)[64 + line * k + line // 2, 12].tolist() for k in range(3)]
    assert colours == [list(colour) for colour in module.pictures.COLOURS[:3]]


def test_images_that_a_finder_missed_are_counted(drawing, png, compute, tmp_path, capsys):
    """A model that looks at the lungs' box says how often it found none."""
    model = drawing("lung")
    levels = module.load_trained(model, "cpu").model
    levels.framing = SimpleNamespace(missed=3)
    levels.register_forward_hook(lambda *_: setattr(levels.framing, "missed", 5))
    segment_files(model, [png("a.png")], tmp_path / "out", Wanted(), compute)
    assert "no lung found in 2 images: read whole" in capsys.readouterr().err


def test_what_the_preset_cannot_prepare_is_a_row_too(drawing, png, compute, tmp_path, monkeypatch):
    model, good, flat = drawing("lung"), png("a.png"), png("b.png")
    real = module.Preprocess.__call__

    def refusing(self, study):
        if study.pixels.shape == (7, 7):
            raise SpcxrError("every pixel of the image has the same value; leave it out")
        return real(self, study)

    Image.fromarray(np.arange(49, dtype=np.uint8).reshape(7, 7)).save(flat)
    monkeypatch.setattr(module.Preprocess, "__call__", refusing)
    table = segment_files(model, [good, flat], tmp_path / "out", Wanted(), compute)
    assert (table.done, table.rejected) == (1, 1)
    assert table.first_reason.startswith(f"{flat}: every pixel of the image has the same value")
