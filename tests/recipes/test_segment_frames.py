"""Images larger than the encoder's input: native larger grids, windows, and the lungs' box."""

import json
import shutil

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer

from spcxr.config import ConfigError
from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.errors import SpcxrError
from spcxr.infer.predict import load_trained, predict_masks
from spcxr.models.framing import LungBox, Windows, boxes_around, into, put_back
from spcxr.recipes.frames import Frames
from spcxr.recipes.segment import SegmentConfig, run
from spcxr.train.augment import DRAWS, Augmentation, plan, rest, warp_images, warp_masks
from spcxr.train.device import Compute

SIDE, SMALL = 64, 32
ROW = torch.arange(2)


def make(folder, *, there=True, count=16):
    """Images of 64 px with a bright square of 20 px, or (some) without anything."""
    rng = np.random.default_rng(0)
    with StoreWriter(folder / "store", Preprocess(size_px=SIDE)) as writer:
        for i in range(count):
            image = rng.integers(0, 60, (SIDE, SIDE)).astype(np.uint8)
            mask = np.zeros((SIDE, SIDE), np.uint8)
            if there or i % 8 != 3:
                top, left = rng.integers(4, SIDE - 24, 2)
                image[top : top + 20, left : left + 20] = 230
                mask[top : top + 20, left : left + 20] = 1
            writer.add(image, mask)
        text = {
            "path": [f"{i}.png" for i in range(count)],
            "split": [("train", "train", "val", "test")[i % 4] for i in range(count)],
            "mask_path": [f"m{i}.png" for i in range(count)],
        }
        return writer.finish(Manifest.from_columns(text, root=folder))


def config(store, init, out, **settings):
    made = {"epochs": 1, "batch_size": 8, "device": "cpu", "precision": "fp32"}
    made |= {"decoder": "linear", "base_lr": 1e-2}
    return SegmentConfig(data=str(store.path), init=str(init), out=str(out), **(made | settings))


def predicted(folder, store, split="test"):
    trained, rows = load_trained(folder), store.manifest.rows(split)
    compute = Compute(8, torch.device("cpu"), "fp32")
    found = predict_masks(trained.model, store, rows, trained.normalisation, compute)
    return trained, np.concatenate([masks for _, masks in found])


def dice_of(folder):
    return json.loads((folder / "metrics.json").read_text())["test"]["lung"]["dice"]["value"]


def dice(found, truth):
    return np.mean(2 * (found & truth).sum((1, 2)) / (found.sum((1, 2)) + truth.sum((1, 2))))


def test_a_larger_grid_than_the_inits(tiny_init, tmp_path):
    store = make(tmp_path)
    folder = run(config(store, tiny_init, tmp_path / "run", image_px=SIDE))
    trained, masks = predicted(folder, store)
    assert trained.model.encoder.image_px == trained.model.image_px == (SIDE, SIDE)
    truth = store.masks(store.manifest.rows("test"))
    assert dice_of(folder) == pytest.approx(dice(masks == 1, truth == 1), abs=1e-5)


# --- windows --------------------------------------------------------------------------------


def test_windows_are_monais():
    torch.manual_seed(0)
    image, layer = torch.randn(2, 1, 80, 80), torch.nn.Conv2d(1, 3, 5, padding=2)
    ours = Windows((80, 80), (SMALL, SMALL))(layer, image)
    monai = SlidingWindowInferer((SMALL, SMALL), overlap=0.5, mode="gaussian")(image, layer)
    torch.testing.assert_close(ours, monai)


def test_a_window_is_shown_as_large_as_it_is():
    """At rest: a part of the image at its own scale, and the mask's same part."""
    image = torch.rand(2, 1, SIDE, SIDE)
    frames = Frames((SIDE, SIDE), share=SMALL / SIDE)
    law = frames.law(Augmentation((1.0, 1.0), 0, 0, 0, 0))
    draws = torch.full((2, DRAWS), 0.5)
    draws[0, 1], draws[0, 2] = 0.0, 1.0 - 1e-7  # to the left, to the foot
    warps = frames.placed(plan(draws, law), ROW.numpy())
    shown = warp_images(image, warps, SMALL)
    torch.testing.assert_close(shown[0], image[0, :, 32:, :32], atol=1e-4, rtol=0)
    torch.testing.assert_close(shown[1], image[1, :, 16:48, 16:48], atol=1e-4, rtol=0)
    masks = (image[:, 0] > 0.5).to(torch.uint8)
    assert torch.equal(warp_masks(masks, warps, SMALL)[1], masks[1, 16:48, 16:48])


def test_a_run_in_windows(tiny_init, tmp_path):
    store = make(tmp_path)
    folder = run(config(store, tiny_init, tmp_path / "run", window_px=SMALL, epochs=2))
    trained, masks = predicted(folder, store)
    assert trained.model.encoder.image_px == (SMALL, SMALL)
    assert trained.model.image_px == (SIDE, SIDE)
    truth = store.masks(store.manifest.rows("test"))
    assert dice_of(folder) == pytest.approx(dice(masks == 1, truth == 1), abs=1e-5)
    assert dice_of(folder) > 0.1
    with pytest.raises(SpcxrError, match="images of 64 px are smaller than --window-px 96"):
        run(config(store, tiny_init, tmp_path / "other", window_px=96))


# --- the lungs' box -------------------------------------------------------------------------


def test_boxes_are_square_hold_the_lungs_and_stay_inside():
    masks = torch.zeros(4, 100, 100, dtype=torch.bool)
    masks[0, 10:90, 40:60] = True  # tall
    masks[1, 0:30, 0:30] = True  # in a corner
    masks[1, 90, 90] = True  # and a stray pixel far away
    masks[2, 50, 50] = True  # a stray pixel
    masks[3] = True
    boxes, found = boxes_around(masks)
    assert found.tolist() == [True, True, False, True]
    x, y, half = boxes.T
    for k in (0, 1):
        down, across = torch.nonzero(masks[k, :90, :90]).T
        for place, centre in ((down, y[k]), (across, x[k])):
            assert (centre - half[k]) <= 2 * place.min() / 100 - 1
            assert (centre + half[k]) >= 2 * (place.max() + 1) / 100 - 1
    assert half[0] == pytest.approx(0.8 * 1.2)
    assert half[1] == pytest.approx(0.3 * 1.2)
    assert (boxes[:, :2].abs() + half[:, None] <= 1 + 1e-6).all()
    assert boxes[2].tolist() == boxes[3].tolist() == [0, 0, 1]


def test_what_is_cut_out_is_put_back_where_it_was():
    boxes = torch.tensor([[0.25, -0.25, 0.5], [0.0, 0.0, 1.0]])
    image = torch.rand(2, 3, SIDE, SIDE)
    cut = torch.nn.functional.grid_sample(
        image,
        torch.nn.functional.affine_grid(into(boxes), [2, 3, SMALL, SMALL], align_corners=False),
        align_corners=False,
    )
    torch.testing.assert_close(cut[0], image[0, :, 8:40, 24:56])
    back = put_back(cut, boxes, (SIDE, SIDE))
    torch.testing.assert_close(back[0, :, 8:40, 24:56], image[0, :, 8:40, 24:56])
    assert back[0, :, 0, 0].tolist() == [20, -20, -20]
    assert (back[1].abs() < 2).all()


def test_augmentation_is_done_within_the_box():
    boxes = torch.tensor([[0, 0, 1.0], [0.25, -0.25, 0.5]])
    frames = Frames((SIDE, SIDE), rows=np.array([3, 7]), boxes=boxes)
    image = torch.rand(1, 1, SIDE, SIDE)
    shown = warp_images(image, frames.placed(rest(1), np.array([7])), SMALL)
    torch.testing.assert_close(shown[0], image[0, :, 8:40, 24:56], atol=1e-5, rtol=0)
    strong = plan(torch.rand(1, DRAWS), Augmentation(rotation_deg=40.0))
    twice = warp_images(image[:, :, 8:40, 24:56], strong)
    once = warp_images(image, frames.placed(strong, np.array([7])), SMALL)
    inside = slice(10, 22)  # at the rim the one sees black and the other the image
    assert (twice - once)[..., inside, inside].abs().mean() < 0.02


class Bright(torch.nn.Module):
    """Finds what is bright, without learning."""

    def masks(self, grey):
        return grey[:, 0] > 0.7


def test_the_lungs_box_alone_is_looked_at():
    image = torch.zeros(2, 1, SIDE, SIDE)
    image[0, 0, 20:40, 10:30] = 1.0
    seen = []

    def look(parts):
        seen.append(parts)
        return torch.cat([0.5 - parts, parts - 0.5], 1)

    box = LungBox(Bright(), 0.0, 1.0, (SIDE, SIDE), (SMALL, SMALL))
    logits = box(look, image)
    assert seen[0].shape == (2, 1, SMALL, SMALL)
    assert seen[0][0].mean() > 0.6  # 20 of 24 px a side
    assert torch.equal(logits.argmax(1)[0] == 1, image[0, 0] == 1)
    assert box.missed == 1
    assert not logits.argmax(1)[1].any()


def test_a_run_in_the_lungs_box(tiny_init, tmp_path, capsys):
    store = make(tmp_path, there=False)
    coarse = run(config(store, tiny_init, tmp_path / "coarse", epochs=5, batch_size=4))
    folder = run(config(store, tiny_init, tmp_path / "run", crop_from=str(coarse)))
    assert "lungs' boxes of 8 training images, read at" in capsys.readouterr().err
    shutil.rmtree(coarse)  # the model holds what it needs
    moved = tmp_path / "moved"
    shutil.copytree(folder / "model", moved)
    trained, masks = predicted(moved, store)
    side = trained.model.image_px[0]
    assert SMALL <= side <= SIDE
    assert isinstance(trained.model.framing, LungBox)
    assert not any("finder" in name for name, _ in trained.model.named_parameters())
    truth = store.masks(store.manifest.rows("test"))
    empty = ~((masks == 1) | (truth == 1)).any((1, 2))
    found = dice((masks == 1)[~empty], (truth == 1)[~empty])
    assert dice_of(folder) == pytest.approx(found, abs=1e-5)
    shutil.rmtree(moved / "finder")
    with pytest.raises(SpcxrError, match=r"finder/ .* is not there; copy the whole model folder"):
        load_trained(moved)


def test_settings_that_contradict_each_other(tmp_path):
    with pytest.raises(ConfigError, match="window_px or crop_from, not both"):
        SegmentConfig(data="d", init="i", out="o", window_px=32, crop_from="run")
    with pytest.raises(ConfigError, match="window_px 64 is larger than image_px 32"):
        SegmentConfig(data="d", init="i", out="o", window_px=64, image_px=32)
