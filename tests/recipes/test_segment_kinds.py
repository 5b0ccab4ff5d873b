"""Fine-tuning for masks of several structures, by every decoder and loss."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from monai.losses import DiceFocalLoss
from PIL import Image
from torch.nn.functional import one_hot

from spcxr.config import ConfigError
from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.errors import SpcxrError
from spcxr.evaluate.overlays import CAPTION_PX, GAP_PX, structure_colours
from spcxr.infer.predict import load_trained, predict_masks
from spcxr.models.decoder import build_decoder
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import load_model_folder
from spcxr.recipes.mask_losses import dice_and_ce, dice_and_focal, over_scales
from spcxr.recipes.segment import Segmentation, SegmentConfig, choose_cohort, run
from spcxr.train.device import Compute
from spcxr.train.journal import read_records

NAMES = ("left lung", "right lung")


@pytest.fixture(scope="module")
def two_lungs(tmp_path_factory):
    """A store of 32 px: a bright bar on the left half (1), a grey one on the right (2)."""
    folder, count = tmp_path_factory.mktemp("two"), 32
    rng = np.random.default_rng(0)
    splits = [("train", "train", "val", "test")[i % 4] for i in range(count)]
    with StoreWriter(folder / "store", Preprocess(size_px=32)) as writer:
        for _ in range(count):
            image = rng.integers(0, 40, (32, 32)).astype(np.uint8)
            mask = np.zeros((32, 32), np.uint8)
            for k, (left, grey) in enumerate(((2, 240), (18, 140)), start=1):
                top = int(rng.integers(2, 14))
                image[top : top + 14, left : left + 11] = grey
                mask[top : top + 14, left : left + 11] = k
            writer.add(image, mask)
        text = {
            "path": [f"{i}.png" for i in range(count)],
            "split": splits,
            "patient_id": [f"p{i // 2}" if splits[i] == "train" else f"q{i}" for i in range(count)],
            "mask_path": [f"m{i}.png" for i in range(count)],
        }
        manifest = Manifest.from_columns(text, root=folder)
        return writer.finish(manifest, {"structures": list(NAMES)})


def config(store, init, out, **settings):
    made = {"epochs": 1, "batch_size": 8, "device": "cpu", "precision": "fp32", "base_channels": 4}
    return SegmentConfig(data=str(store.path), init=str(init), out=str(out), **(made | settings))


def figures(folder, name):
    return [r[name] for r in read_records(folder) if name in r]


def predicted(folder, store, rows):
    trained = load_trained(folder)
    compute = Compute(8, torch.device("cpu"), "fp32")
    found = predict_masks(trained.model, store, rows, trained.normalisation, compute)
    return trained, np.concatenate([masks for _, masks in found])


# --- losses ---------------------------------------------------------------------------------


def drawn(classes, count=2, side=8):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, classes, side, side, generator=generator)
    return logits, torch.randint(0, classes, (count, side, side), generator=generator).byte()


@pytest.mark.parametrize("classes", [2, 4])
def test_dice_and_focal_is_monais_where_all_is_known(classes):
    logits, masks = drawn(classes)
    monai = DiceFocalLoss(include_background=False, softmax=True, batch=True)
    target = one_hot(masks.long(), classes).movedim(-1, 1)
    assert dice_and_focal(logits, masks).item() == pytest.approx(monai(logits, target).item(), 1e-5)


def test_unknown_pixels_add_nothing_to_the_focal_loss():
    logits, masks = drawn(3)
    logits.requires_grad_()
    masks[:, :, 4:] = 255
    loss = dice_and_focal(logits, masks)
    loss.backward()
    assert (logits.grad[..., 4:] == 0).all()
    half = dice_and_focal(logits.detach()[..., :4], masks[..., :4])
    assert loss.item() == pytest.approx(half.item(), 1e-5)
    nothing = dice_and_focal(logits.detach(), torch.full_like(masks, 255))
    assert torch.isfinite(nothing)


def test_coarse_logits_weigh_half_of_finer_ones():
    logits, masks = drawn(3)
    coarse = logits[..., ::2, ::2]
    by_hand = 2 * dice_and_ce(logits, masks) + dice_and_ce(coarse, masks[:, 1::2, 1::2])
    assert over_scales(dice_and_ce, [logits, coarse], masks).item() == pytest.approx(
        by_hand.item() / 3, 1e-5
    )


# --- decoders -------------------------------------------------------------------------------


def test_a_deep_decoder_gives_three_sizes_in_training_and_one_afterwards():
    encoder = VisionTransformer(image_px=32, patch_px=8, width=24, depth=4, heads=3)
    task = {"structures": NAMES, "base_channels": 4, "deep_supervision": True}
    decoder = build_decoder(task, encoder)
    features = [torch.zeros(1, 24, 4, 4)] * 4
    shapes = [tuple(x.shape) for x in decoder(torch.zeros(1, 1, 32, 32), features)]
    assert shapes == [(1, 3, 32, 32), (1, 3, 16, 16), (1, 3, 8, 8)]
    assert decoder.eval()(torch.zeros(1, 1, 32, 32), features).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_light_decoder_judges_each_patch_by_itself(kind):
    encoder = VisionTransformer(image_px=32, patch_px=8, width=24, depth=4, heads=3)
    decoder = build_decoder({"structures": NAMES, "decoder": kind}, encoder)
    features = [torch.zeros(1, 24, 4, 4) for _ in range(4)]
    before = decoder(torch.zeros(1, 1, 32, 32), features)
    features[1][:, :, 0, 0] = 1  # of the second depth alone
    moved = (decoder(torch.zeros(1, 1, 32, 32), features) != before).any(1)[0]
    assert moved[:8, :8].all()
    assert not moved[12:].any()  # bilinear: half a patch around it


def test_a_decoder_of_a_later_version_is_refused():
    encoder = VisionTransformer(image_px=32, patch_px=8, width=24, depth=4, heads=3)
    with pytest.raises(SpcxrError, match="'mask2former' is not known; use a newer"):
        build_decoder({"structures": NAMES, "decoder": "mask2former"}, encoder)


# --- whole runs -----------------------------------------------------------------------------

DEEP = {"deep_supervision": True, "loss": "dice-focal", "ema": 0.5, "epochs": 3}
KINDS = {
    "deep unet": DEEP,
    "deep unetr": DEEP | {"decoder": "unetr"},
    "frozen linear": {"decoder": "linear", "freeze": True, "epochs": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_structures_are_learned(kind, two_lungs, tiny_init, tmp_path):
    settings = {"base_lr": 1e-2} | KINDS[kind]
    folder = run(config(two_lungs, tiny_init, tmp_path / "run", **settings))
    losses = figures(folder, "loss")
    assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2])
    facts = json.loads((folder / "metrics.json").read_text())
    assert set(facts["test"]) == set(NAMES)
    assert facts["task"] == "masks of left lung, right lung"
    rows = two_lungs.manifest.rows("test")
    trained, masks = predicted(folder, two_lungs, rows)
    assert trained.names == NAMES
    truth = two_lungs.masks(rows)
    with (folder / "predictions.csv").open() as file:
        table = {row["path"]: row for row in csv.DictReader(file)}
    for k, name in enumerate(NAMES, start=1):
        for row, mask, true in zip(rows.tolist(), masks == k, truth == k, strict=True):
            dice = 2 * (mask & true).sum() / (mask.sum() + true.sum())
            assert float(table[f"{row}.png"][f"dice_{name}"]) == pytest.approx(dice, abs=1e-5)
        assert len(figures(folder, f"dice {name}")) == settings["epochs"]
    with Image.open(folder / "samples" / "overlays.png") as picture:
        legend = picture.getpixel((GAP_PX + 2, picture.height - CAPTION_PX // 2))
        assert legend == structure_colours(2)[0]
    encoder = torch.cat([p.flatten() for p in trained.model.encoder.parameters()])
    begun = torch.cat([p.flatten() for p in load_model_folder(tiny_init).encoder.parameters()])
    assert torch.equal(encoder, begun) == ("freeze" in settings)


def test_few_patients_are_nested_and_whole(two_lungs):
    chosen = [cohort(two_lungs, labels=n) for n in (1, 3, 8)]
    patients = two_lungs.manifest.patients
    for rows, count in zip(chosen, (1, 3, 8), strict=True):
        assert len(set(patients[rows])) == count
        assert len(rows) == 2 * count  # all the images of each
    assert set(chosen[0]) < set(chosen[1]) < set(chosen[2])
    assert set(cohort(two_lungs, labels=3, seed=1)) != set(chosen[1])
    assert set(cohort(two_lungs, label_fraction=0.375)) == set(chosen[1])
    with pytest.raises(SpcxrError, match="8 training patients have a mask, not 9; lower --labels"):
        cohort(two_lungs, labels=9)


def cohort(store, **settings):
    return choose_cohort(config(store, "i", "o", **settings), store).train


def test_several_seeds_are_runs_of_their_own_and_a_summary(two_lungs, tiny_init, tmp_path):
    light = {"decoder": "linear", "freeze": True, "labels": 2, "seeds": 2, "base_lr": 1e-2}
    folder = run(config(two_lungs, tiny_init, tmp_path / "runs", **light))
    summary = json.loads((folder / "summary.json").read_text())
    values = [
        json.loads((folder / f"seed-{k}" / "metrics.json").read_text())["test"]["left lung"]
        for k in (0, 1)
    ]
    found = summary["test"]["dice of left lung"]
    assert found["mean"] == pytest.approx(np.mean([v["dice"]["value"] for v in values]))
    assert (found["n"], summary["seeds"]) == (2, 2)
    before = (folder / "seed-0" / "metrics.json").stat().st_mtime_ns
    run(config(two_lungs, tiny_init, tmp_path / "runs", **light))
    assert (folder / "seed-0" / "metrics.json").stat().st_mtime_ns == before


def test_a_structure_that_no_mask_shows_is_named(two_lungs, tiny_init, tmp_path):
    facts = json.loads((two_lungs.path / "store.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(two_lungs.path, other)
    facts["structures"] = [*NAMES, "heart"]
    (other / "store.json").write_text(json.dumps(facts))
    store = type(two_lungs).open(other)
    with pytest.raises(SpcxrError, match="no heart in any mask of the training rows"):
        run(config(store, tiny_init, tmp_path / "run"))


def test_a_structure_that_no_test_mask_shows_is_left_out(
    two_lungs, tiny_init, tmp_path, monkeypatch
):
    """Nor is it found in any test row: there is nothing to measure, and the run is whole."""
    real, test = Segmentation.measure, two_lungs.manifest.rows("test")

    def without(task, model, rows, sizes=None):
        found = real(task, model, rows, sizes)
        found[np.isin(rows, test), 1] = np.nan
        return found

    monkeypatch.setattr(Segmentation, "measure", without)
    folder = run(config(two_lungs, tiny_init, tmp_path / "run"))
    facts = json.loads((folder / "metrics.json").read_text())
    assert list(facts["validation"]) == list(NAMES)
    assert list(facts["test"]) == ["left lung"]


def test_settings_that_contradict_each_other(two_lungs, tiny_init, tmp_path):
    with pytest.raises(ConfigError, match="deep_supervision is of unet and unetr; leave"):
        config(two_lungs, tiny_init, tmp_path, decoder="mlp", deep_supervision=True)
    with pytest.raises(ConfigError, match="labels or label_fraction, not both"):
        config(two_lungs, tiny_init, tmp_path, labels=2, label_fraction=0.5)
