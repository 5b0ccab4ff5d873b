"""From training to use: a run of `segment`, and `spcxr segment` with it on files."""

import csv

import numpy as np
from click.testing import CliRunner
from PIL import Image

from spcxr.cli import use
from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.recipes.segment import SegmentConfig, run

SIDE, TIMES = 32, 3


def squares(count, seed):
    """Noise with a bright square each, from black to white: ``images, masks (n, S, S)``."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 90, (count, SIDE, SIDE)).astype(np.uint8)
    masks = np.zeros_like(images)
    for image, mask in zip(images, masks, strict=True):
        top, left = rng.integers(2, SIDE - 14, 2)
        image[top : top + 12, left : left + 12] = rng.integers(200, 255, (12, 12))
        mask[top : top + 12, left : left + 12] = 1
        image[0, :2] = 0, 255
    return images, masks


def test_a_trained_run_segments_files(tiny_init, tmp_path):
    images, masks = squares(48, seed=0)
    with StoreWriter(tmp_path / "store", Preprocess(size_px=SIDE)) as writer:
        for image, mask in zip(images, masks, strict=True):
            writer.add(image, mask)
        names = [f"{i}.png" for i in range(48)]
        columns = {"path": names, "patient_id": names, "mask_path": [f"m{n}" for n in names]}
        columns["split"] = [("train", "train", "val")[i % 3] for i in range(48)]
        writer.finish(Manifest.from_columns(columns, root=tmp_path))
    settings = {"epochs": 12, "batch_size": 8, "base_lr": 3e-2, "base_channels": 4}
    settings |= {"device": "cpu", "precision": "fp32", "test_splits": ()}
    out = str(tmp_path / "run")
    run(SegmentConfig(data=str(tmp_path / "store"), init=str(tiny_init), out=out, **settings))

    new, truth = (a.repeat(TIMES, 1).repeat(TIMES, 2) for a in squares(6, seed=1))
    (tmp_path / "in").mkdir()
    for k, image in enumerate(new):
        Image.fromarray(image[:, : SIDE * TIMES]).save(tmp_path / "in" / f"{k}.png")
    command = ["segment", out, str(tmp_path / "in"), "--out", str(tmp_path / "masks")]
    said = CliRunner().invoke(use, [*command, "--precision", "fp32", "--device", "cpu"])
    assert said.exit_code == 0, said.output
    assert "done: " in said.output
    assert "(6 segmented, " in said.output
    with (tmp_path / "masks" / "segment.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = np.stack([np.asarray(Image.open(tmp_path / "masks" / r["mask"])) for r in rows])
    assert found.shape == truth.shape
    dice = 2 * (found & truth).sum((1, 2)) / (found.sum((1, 2)) + truth.sum((1, 2)))
    assert dice.mean() > 0.8, dice
