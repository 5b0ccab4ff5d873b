"""A planted shortcut: who reads whole images falls for it, who reads the lungs does not.

At the training hospital 95 of a hundred sick chests have a text burned into a corner, and 5 of a
hundred normal ones. Both classifiers learn there, with the same budget, and are measured on chests
they have not seen: with that habit, on the very same chests with the opposite habit, and at another
hospital, with another detector and the opposite habit. Minutes on one core.
docs/images/attend_lungs.png is what it draws.

    pytest -m slow tests/recipes/test_attend_lungs.py -s
"""

import json

import numpy as np
import pytest
import torch

from spcxr.data import phantom
from spcxr.data.store import Store
from spcxr.evaluate.intervals import paired_bootstrap
from spcxr.evaluate.overlays import grid
from spcxr.infer.predict import Normalisation, load_trained, network_input
from spcxr.models.regions import patches_touched
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import save_model_folder
from spcxr.recipes import classify, prepare, segment
from spcxr.recipes.measure import Settings, TestSet, measure

COUNT, DRAWN_PX, SIDE, PATCH = 480, 144, 96, 8
HABIT = {"trained": (0.95, 0.05), "turned": (0.05, 0.95)}  # of site-a, of site-b
SETS = {
    "same habit": ("trained", "test"),
    "opposite habit": ("turned", "test"),
    "another hospital": ("trained", "drift"),
}
SHARED = {
    "image_px": SIDE,
    "device": "cpu",
    "layer_decay": 1.0,
    "crop_scale": (0.9, 1.0),
    "rotation_deg": 3.0,
    "brightness": 0.05,
    "contrast": 0.05,
    "drop_path": 0.0,
}
LABELS = {"labels": ("normal",), "epochs": 30, "batch_size": 16, "base_lr": 1e-3}
MASKS = {"epochs": 5, "batch_size": 8, "base_lr": 1e-2, "base_channels": 8}


def draw(folder, habit):
    """The same chests whatever the habit: the text alone differs."""
    series = phantom.Series(
        count=COUNT, size_px=DRAWN_PX, severity=(0.7, 1.0), shortcut=HABIT[habit]
    )
    manifest = phantom.write(folder / f"phantoms-{habit}", series)
    settings = prepare.PrepareConfig(
        sources=(str(manifest),), out=str(folder / f"store-{habit}"), size_px=SIDE
    )
    return Store.open(prepare.run(settings))


def untrained(folder, store):
    """A small encoder that minutes can train: width 64, 4 blocks, patches of 8 in 96 px."""
    torch.manual_seed(0)
    return save_model_folder(
        folder / "init",
        VisionTransformer(image_px=SIDE, patch_px=PATCH, width=64, depth=4, heads=4),
        preprocess=store.preprocess.to_dict(),
        mean=store.mean,
        std=store.std,
        task=None,
        head=None,
        provenance={},
    )


def train(folder, store):
    """The segmenter, the classifier of whole images and that of the lungs: their run folders."""
    data = {"data": str(store.path), "init": str(untrained(folder, store))} | SHARED
    lungs = segment.SegmentConfig(out=str(folder / "segment"), **data, **MASKS)
    runs = {"segmenter": segment.run(lungs)}
    by_lungs = {"attend": "lungs", "lungs_from": str(runs["segmenter"])}
    for name, more in (("whole", {}), ("lungs", by_lungs)):
        out = str(folder / f"read-{name}")
        runs[name] = classify.run(classify.ClassifyConfig(out=out, **data, **LABELS, **more))
    return runs


def compare(stores, runs):
    """AUROC of each classifier on each set, and differences on the same chests, with intervals."""
    settings = Settings(64, torch.device("cpu"), "fp32", n_bootstrap=2000, seed=0)
    results = {}
    for name, (habit, split) in SETS.items():
        store = stores[habit]
        test_set = TestSet(name, str(store.path), store, store.manifest.rows(split))
        for reader in ("whole", "lungs"):
            results[reader, name] = measure(load_trained(runs[reader]), test_set, settings)
    found = {
        f"{reader}, {name}": str(result.overall["macro_auroc"])
        for (reader, name), result in results.items()
    }

    def difference(first, second):
        a, b = results[first], results[second]
        assert np.array_equal(a.patients, b.patients)
        pair = (r.statistics["macro_auroc"] for r in (a, b))
        return paired_bootstrap(a.patients, *pair, seed=0)

    gaps = {
        "fall of whole": difference(("whole", "same habit"), ("whole", "opposite habit")),
        "fall of lungs": difference(("lungs", "same habit"), ("lungs", "opposite habit")),
        "lungs over whole, opposite habit": difference(
            ("lungs", "opposite habit"), ("whole", "opposite habit")
        ),
        "lungs over whole, another hospital": difference(
            ("lungs", "another hospital"), ("whole", "another hospital")
        ),
    }
    read = [float(cells["patches read"]) for cells in results["lungs", "same habit"].predictions]
    told = found | {name: str(gap) for name, gap in gaps.items()}
    return told | {"share of an image read": round(float(np.mean(read)), 3)}, gaps


def picture(store, run):
    """Three images with text, and below them what the classifier is given."""
    trained = load_trained(run)
    rows = store.manifest.rows("test")[:40]
    grey = network_input(store.images(rows), (SIDE, SIDE), Normalisation(0, 1))
    visible = patches_touched(trained.model.lungs.masks(grey), PATCH)
    seen = visible.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    corner = grey[:, 0, :12, :40].flatten(1).amax(1)
    shown = corner.argsort(descending=True)[:3]
    plain = (255 * grey[shown, 0]).byte().numpy()
    given = (255 * torch.where(seen, grey[:, 0], 0.0)[shown]).byte().numpy()
    return grid([list(plain), list(given)])


@pytest.mark.slow
def test_the_lungs_alone_are_not_fooled_by_text(tmp_path):
    stores = {habit: draw(tmp_path, habit) for habit in HABIT}
    runs = train(tmp_path, stores["trained"])
    told, gaps = compare(stores, runs)
    (tmp_path / "attend_lungs.json").write_text(json.dumps(told, indent=1))
    (tmp_path / "attend_lungs.png").write_bytes(picture(stores["trained"], runs["lungs"]))
    print(json.dumps(told, indent=1), tmp_path)
    # Whole images: a large fall where the text says the opposite, of the same chests.
    assert gaps["fall of whole"].low > 0.1
    # The lungs: none to speak of.
    assert gaps["fall of lungs"].high < 0.02
    assert gaps["lungs over whole, opposite habit"].low > 0.1
    assert gaps["lungs over whole, another hospital"].low > 0
