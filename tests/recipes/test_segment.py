"""Fine-tuning for masks: the loss as a formula, then whole runs on tiny stores."""

import csv
import json

import numpy as np
import pytest
import torch
from labelled_runs import Stop
from PIL import Image

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.errors import Interrupted, SpcxrError
from spcxr.evaluate.metrics import dice
from spcxr.evaluate.surface import surface_distances
from spcxr.infer.predict import load_trained, predict_masks
from spcxr.recipes.finetune import begin
from spcxr.recipes.fitting import Drawn, augmented
from spcxr.recipes.mask_losses import dice_and_ce
from spcxr.recipes.segment import SegmentConfig, build, choose_cohort, run
from spcxr.train import device
from spcxr.train.augment import rest
from spcxr.train.device import Compute
from spcxr.train.distributed import World
from spcxr.train.journal import read_records


def config(store, init, out, **settings):
    made = {"epochs": 2, "batch_size": 8, "device": "cpu", "precision": "fp32", "base_channels": 4}
    made |= settings
    return SegmentConfig(data=str(store.path), init=str(init), out=str(out), **made)


def records(folder, kind, name):
    return [r[name] for r in read_records(folder) if r["kind"] == kind]


# --- the loss -------------------------------------------------------------------------------


def test_loss_by_hand():
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1))
    shares = torch.softmax(logits, 1)
    overlap = torch.stack([(shares[:, k] * (masks == k)).sum() for k in (1, 2)])
    areas = torch.stack([shares[:, k].sum() + (masks == k).sum() for k in (1, 2)])
    by_hand = 1 - ((2 * overlap + 1e-5) / (areas + 1e-5)).mean()
    picked = torch.log_softmax(logits, 1).gather(1, masks[:, None])
    by_hand = by_hand - picked.mean()
    assert dice_and_ce(logits, masks.to(torch.uint8)).item() == pytest.approx(by_hand.item(), 1e-5)


def test_unknown_pixels_add_neither_loss_nor_gradient():
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    masks = torch.ones(1, 4, 4, dtype=torch.uint8)
    masks[:, :, 2:] = 255
    dice_and_ce(logits, masks).backward()
    assert (logits.grad[..., 2:] == 0).all()
    assert (logits.grad[..., :2] != 0).all()
    half = logits.detach()[..., :2]
    assert dice_and_ce(logits, masks).item() == pytest.approx(
        dice_and_ce(half, masks[..., :2]).item(), 1e-5
    )


class Brightness(torch.nn.Module):
    """Finds the squares without learning: where the warped image is bright."""

    def forward(self, images):
        inside = images[:, 0] > (150 / 255 - 0.25) / 0.25
        return 20 * torch.stack([~inside, inside], 1).float()


def test_masks_go_through_the_warps_of_their_images(make_store, tiny_init, tmp_path):
    strong = {"crop_scale": (0.4, 1.0), "rotation_deg": 40.0, "flip_p": 0.5, "brightness": 0.0}
    settings = config(make_store(masked=True), tiny_init, tmp_path / "run", contrast=0.0, **strong)
    start = begin(settings, tmp_path)
    course, task = build(
        settings, tmp_path, start, choose_cohort(settings, start.store), World(torch.device("cpu"))
    )
    images, warps = augmented(course, course.rows, start.store.images(course.rows), epoch=0)
    together = task.loss(Brightness(), images, Drawn(course.rows, 0, warps))
    apart = task.loss(Brightness(), images, Drawn(course.rows, 0, rest(len(course.rows))))
    assert together < 0.2 * apart


def test_nothing_known_is_no_loss_at_all():
    logits = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = dice_and_ce(logits, torch.full((1, 4, 4), 255, dtype=torch.uint8))
    loss.backward()
    assert torch.isfinite(loss)
    assert (logits.grad == 0).all()


# --- whole runs -----------------------------------------------------------------------------


def test_a_run_learns_and_its_export_predicts_the_same(make_store, tiny_init, tmp_path):
    store = make_store(masked=True, prefix="PHANTOM-0-")
    folder = run(config(store, tiny_init, tmp_path / "run", epochs=12, base_lr=3e-2))
    assert "**Drawn phantoms, not patients" in (folder / "model_card.md").read_text()
    losses = records(folder, "train", "loss")
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["test"]["lung"]["dice"]["value"] > 0.8
    assert (facts["task"], facts["phantoms"]) == ("masks of lung", True)
    assert facts["test"]["lung"]["dice"]["n_patients"] <= 16
    assert facts["epoch"] == 1 + max(
        range(12), key=lambda e: (records(folder, "val", "dice")[e], e)
    )

    trained = load_trained(folder)
    assert (trained.kind, trained.names) == ("segment", ("lung",))
    rows = store.manifest.rows("test")
    batches = predict_masks(
        trained.model,
        store,
        rows,
        trained.normalisation,
        Compute(8, torch.device("cpu"), "fp32"),
    )
    predicted = np.concatenate([masks for _, masks in batches])
    with (folder / "predictions.csv").open() as file:
        written = {row["path"]: row for row in csv.DictReader(file)}
    truth = store.masks(rows) == 1
    distances, _ = surface_distances(predicted == 1, truth)
    expected = {"dice_lung": dice(predicted == 1, truth), "hd95_px_lung": distances[:, 0]}
    for name, values in expected.items():
        for row, value in zip(rows, values, strict=True):
            cell = written[store.manifest.column("path")[row]][name]
            same = cell == "" if np.isnan(value) else float(cell) == pytest.approx(value, rel=1e-5)
            assert same, (name, row)
    hd95 = facts["test"]["lung"]["hd95_px"]
    assert hd95["value"] == pytest.approx(np.nanmean(distances[:, 0]))
    with Image.open(folder / "samples" / "overlays.png") as picture:
        assert picture.size[0] > picture.size[1] > 224


def test_validation_can_be_rarer_than_epochs_and_is_never_missing_at_the_end(
    make_store, tiny_init, tmp_path
):
    store, rarely = make_store(masked=True), {"epochs": 7, "validate_every_epochs": 3}
    folder = run(config(store, tiny_init, tmp_path / "run", **rarely))
    per_epoch = max(records(folder, "train", "step")) // 7
    assert records(folder, "val", "step") == [3 * per_epoch, 6 * per_epoch, 7 * per_epoch]
    chosen = json.loads((folder / "metrics.json").read_text())
    assert chosen["epoch"] in (3, 6, 7)


def test_a_stopped_run_ends_as_it_would_have(make_store, tiny_init, tmp_path, monkeypatch):
    store = make_store(masked=True)
    whole = run(config(store, tiny_init, tmp_path / "whole"))
    settings = config(store, tiny_init, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        Stop(3, patch)
        with pytest.raises(Interrupted, match="spcxr-train segment"):
            run(settings)
    stopped = run(settings)
    assert records(stopped, "train", "loss") == records(whole, "train", "loss")
    assert records(stopped, "val", "dice") == records(whole, "val", "dice")
    assert (stopped / "predictions.csv").read_text() == (whole / "predictions.csv").read_text()


def test_rows_without_a_mask_are_left_out(make_store, tiny_init, tmp_path):
    count = 16
    partly = [f"m{i}.png" if i % 8 != 4 else "" for i in range(count)]
    store = make_store({"mask_path": partly}, masked=False, count=count)
    assert not store.has_masks  # the column alone makes no mask
    store = write_masked(tmp_path / "partly", partly)
    folder = run(config(store, tiny_init, tmp_path / "run", epochs=1))
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["rows"] == {"train": 6, "val": 4, "test": 4}


def write_masked(path, mask_paths, value=1):
    """A store of squares whose rows have a mask where there is a path; classes of ``value``."""
    rng = np.random.default_rng(0)
    with StoreWriter(path, Preprocess(size_px=32)) as writer:
        for file in mask_paths:
            image, mask = rng.integers(0, 90, (32, 32)).astype(np.uint8), np.zeros((32, 32))
            image[8:20, 8:20], mask[8:20, 8:20] = 240, value
            writer.add(image, mask.astype(np.uint8) if file else None)
        splits = [("train", "train", "val", "test")[i % 4] for i in range(len(mask_paths))]
        text = {
            "path": [f"{i}.png" for i in range(len(mask_paths))],
            "split": splits,
            "mask_path": mask_paths,
        }
        return writer.finish(Manifest.from_columns(text, root=path.parent))


def test_why_fp32_was_chosen_stands_in_the_log(make_store, tiny_init, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "cpu_flags", frozenset)
    store = make_store(masked=True, count=16)
    settings = {"epochs": 1, "precision": "auto"}
    folder = run(config(store, tiny_init, tmp_path / "run", **settings))
    assert "only emulates bf16" in (folder / "train.log").read_text()


# --- what is refused ------------------------------------------------------------------------


def test_a_store_without_masks_is_refused(make_store, tiny_init, tmp_path):
    with pytest.raises(SpcxrError, match="mask_path"):
        run(config(make_store(), tiny_init, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("paths", "value", "said"),
    [
        (["m.png", "", "", ""], 1, r"no row of val has a mask; choose with --val-splits"),
        (["a.png", "b.png", "c.png", "d.png"], 0, "no lung in any mask of the training rows"),
        (["a.png", "b.png", "c.png", "d.png"], 255, "no lung in any mask of the training rows"),
        (
            ["a.png", "b.png", "c.png", "d.png"],
            7,
            r"hold class 7, and the store names 1 \(lung\); .*--structures",
        ),
    ],
)
def test_masks_that_cannot_be_used(paths, value, said, tiny_init, tmp_path):
    store = write_masked(tmp_path / "store", paths, value)
    with pytest.raises(SpcxrError, match=said) as error:
        run(config(store, tiny_init, tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_an_encoder_whose_patches_the_decoder_cannot_take(make_store, tmp_path):
    store = make_store(masked=True, count=8)
    with pytest.raises(SpcxrError, match="16 or 8"):
        run(config(store, "scratch", tmp_path / "run", model="vit_tiny", patch_px=4))
