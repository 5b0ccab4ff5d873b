"""`spcxr explain`: maps lie where they belong on the file's own grid, and are the model's own."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from spcxr.data.presets import Preprocess
from spcxr.data.study import read_study
from spcxr.infer import explain_files as module
from spcxr.infer import heat as heat_module
from spcxr.infer.explain_files import explain_files
from spcxr.infer.inputs import Input
from spcxr.infer.predict import Normalisation, TrainedModel, load_trained, network_input
from spcxr.infer.reading import read_prepared
from spcxr.models.attention_maps import rollout
from spcxr.models.grad_cam import grad_cam
from spcxr.models.heads import ClassificationHead, Classifier
from spcxr.models.vit import VisionTransformer

SIDE, PATCH, NAMES = 32, 8, ("covid", "lung opacity")
GRID = SIDE // PATCH
ROTATE_90 = 6  # Exif: turn by 90 degrees clockwise to show it upright


class LeftHalf:
    """Lungs are where the left half of the image is."""

    equalise = False

    def masks(self, grey, rows=None, store=None):
        found = torch.zeros(len(grey), *grey.shape[2:], dtype=torch.bool)
        found[:, :, : grey.shape[3] // 2 - 4] = True
        return found


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """``trained(...)``: a run of two labels, untrained, handed out for any path."""

    def make(*, multilabel=True, bias=(0.0, 0.0), lungs=None, fit="pad"):
        torch.manual_seed(0)
        encoder = VisionTransformer(image_px=SIDE, patch_px=PATCH, width=24, depth=3, heads=3)
        head = ClassificationHead(width=24, classes=2)
        torch.nn.init.normal_(head.fc.weight, std=0.2)
        head.fc.bias.data += torch.tensor(bias)
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        config = {"preprocess": Preprocess(size_px=SIDE, fit=fit).to_dict()}
        made = TrainedModel(
            Classifier(encoder, head, lungs).eval(),
            "classify",
            NAMES,
            multilabel,
            Normalisation(0.25, 0.25),
            config,
            folder,
        )
        monkeypatch.setattr(module, "load_trained", lambda path, device: made)
        return made

    return make


def rows(out):
    with (out / "explain.csv").open() as file:
        return list(csv.DictReader(file))


def maps(out, row):
    with np.load(out / row["maps"]) as held:
        return dict(held)


def test_maps_are_those_of_the_model(trained, png, compute, tmp_path):
    model, files = trained(), [png("a.png"), png("b.png")]
    out = tmp_path / "o"
    table = explain_files("run", files, out, compute, labels=NAMES[::-1])
    assert (table.done, table.rejected) == (2, 0)
    squares = np.stack([Preprocess(size_px=SIDE)(read_study(file)).pixels for file in files])
    images = network_input(squares, (SIDE, SIDE), model.normalisation)
    wanted = grad_cam(model.model, images, torch.tensor([[1, 0], [1, 0]])).numpy()
    over = rollout(model.model.encoder, images).numpy()
    for k, row in enumerate(rows(out)):
        found = maps(out, row)
        assert found["labels"].tolist() == ["lung opacity", "covid"]
        np.testing.assert_allclose(found["grad_cam"], wanted[k], atol=1e-6)
        np.testing.assert_allclose(found["rollout"], over[k], atol=1e-6)
        assert found["read"].all()
        assert row["explained"] == "lung opacity; covid"
        first, second = row["grad_cam"].split("; ")
        assert (first, second) == (
            f"grad_cam/lung_opacity/{row['name']}.jpg",
            f"grad_cam/covid/{row['name']}.jpg",
        )
        for file in (first, second, row["rollout"]):
            with Image.open(out / file) as picture:
                assert picture.size == (140, 90)  # the file's own


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"bias": (9.0, -9.0)}, "covid"),
        ({"bias": (9.0, 9.0)}, "covid; lung opacity"),
        ({"bias": (-9.0, -8.0)}, "lung opacity"),  # none is called: the likeliest
        ({"bias": (1.0, 9.0), "multilabel": False}, "lung opacity"),
    ],
)
def test_what_is_called_is_explained(trained, png, compute, tmp_path, settings, wanted):
    trained(**settings)
    explain_files("run", [png("a.png")], tmp_path / "o", compute)
    (row,) = rows(tmp_path / "o")
    assert row["explained"] == wanted
    assert len(row["grad_cam"].split("; ")) == len(wanted.split("; "))
    assert 0 <= float(row["p_covid"]) <= 1


@pytest.mark.parametrize("fit", ["pad", "stretch", "crop"])
@pytest.mark.parametrize("shape", [(60, 120), (120, 60), (90, 90)])
def test_a_patch_comes_back_to_the_pixels_it_was_made_of(fit, shape, tmp_path):
    """A map that is 1 on one patch is brightest over the square that this patch shows."""
    preprocess, size = Preprocess(size_px=SIDE, fit=fit), np.array(shape)
    for row, column in ((1, 1), (2, 1), (1, 2), (2, 2)):
        heat = np.zeros((GRID, GRID), np.float32)
        heat[row, column] = 1
        square = np.zeros((SIDE, SIDE), np.uint8)
        square[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = 1
        pixels = np.zeros(shape, np.uint8)
        pixels[0, 0] = 255
        pixels[::7] += np.arange(shape[1], dtype=np.uint8) % 40
        Image.fromarray(pixels).save(tmp_path / "a.png")
        ready = read_prepared(Input(tmp_path / "a.png", "a"), preprocess)
        wide = heat_module.on_the_file(heat, ready, preprocess)
        truth = preprocess.to_original(square, shape, ready.prepared.box)
        assert wide.shape == tuple(size)
        middle = np.argwhere(truth).mean(0)
        weighed = (np.argwhere(wide > 0) * wide[wide > 0][:, None]).sum(0) / wide.sum()
        np.testing.assert_allclose(weighed, middle, atol=size.max() / SIDE)
        assert truth[np.unravel_index(wide.argmax(), shape)]


def test_a_turned_picture_is_drawn_upright(trained, lungs, grey, compute, tmp_path):
    trained()
    upright = grey(lungs(90, 140))
    exif = Image.Exif()
    exif[274] = ROTATE_90
    Image.fromarray(np.rot90(upright)).save(tmp_path / "phone.png", exif=exif)
    Image.fromarray(upright).save(tmp_path / "plain.png")
    files = [tmp_path / "phone.png", tmp_path / "plain.png"]
    explain_files("run", files, tmp_path / "o", compute, png=True)
    drawn = [
        np.asarray(Image.open(tmp_path / "o" / row["rollout"].replace(".jpg", ".png")))
        for row in rows(tmp_path / "o")
    ]
    assert drawn[0].shape == (90, 140)
    np.testing.assert_array_equal(*drawn)


def test_patches_that_are_not_read_stay_blank(trained, png, compute, tmp_path):
    trained(lungs=LeftHalf(), bias=(9.0, 9.0))
    explain_files("run", [png("a.png")], tmp_path / "o", compute, png=True)
    (row,) = rows(tmp_path / "o")
    found = maps(tmp_path / "o", row)
    assert found["read"].tolist() == [[True, True, False, False]] * GRID
    assert not found["rollout"][~found["read"]].any()
    assert not found["grad_cam"][:, ~found["read"]].any()
    grey = read_study(tmp_path / "in" / "a.png").pixels
    for place in (row["rollout"], *row["grad_cam"].split("; ")):
        with Image.open(tmp_path / "o" / place.replace(".jpg", ".png")) as picture:
            assert not np.asarray(picture)[:, 70:].any()
        with Image.open(tmp_path / "o" / place) as picture:
            right = np.asarray(picture.convert("RGB")).astype(int)[:, 90:]
        assert np.abs(right - grey[:, 90:, None]).mean() < 12  # the radiograph as it is, as JPEG


def test_a_label_that_nothing_speaks_for_is_said(trained, png, compute, tmp_path):
    model = trained()
    model.model.head.fc.weight.data.zero_()
    explain_files("run", [png("a.png")], tmp_path / "o", compute, labels=["covid"])
    (row,) = rows(tmp_path / "o")
    assert "no patch speaks for covid" in row["notes"]
    assert not maps(tmp_path / "o", row)["grad_cam"].any()


def test_settings_say_what_was_explained(trained, png, compute, tmp_path):
    trained()
    explain_files("run", [png("a.png")], tmp_path / "o", compute, labels=["covid"])
    said = json.loads((tmp_path / "o" / "explain.json").read_text())
    assert said["explained"] == ["covid"]
    assert said["labels"] == list(NAMES)


def test_a_run_on_disk_is_explained(untrained, png, compute, tmp_path):
    run = untrained()
    assert load_trained(run).names == ("covid",)
    table = explain_files(run, [png("a.png")], tmp_path / "o", compute)
    assert table.done == 1
