"""Stores and settings that pretraining cannot do much with: few images, none, a full disk."""

import errno
import json

import numpy as np
import pytest
from safetensors.torch import load_file

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.errors import SpcxrError
from spcxr.models import vit
from spcxr.recipes.pretrain import PretrainConfig, run
from spcxr.train import checkpoint
from spcxr.train.journal import read_records


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    monkeypatch.setitem(vit.VIT_SIZES, "vit_tiny", vit.ViTSize(24, 4, 3))


def store_of(folder, count):
    names = [f"{i}.png" for i in range(count)]
    columns = {"path": names, "patient_id": names, "split": ["train"] * count}
    rng = np.random.default_rng(0)
    with StoreWriter(folder, Preprocess(size_px=40)) as writer:
        for _ in names:
            writer.add(rng.integers(0, 256, (40, 40), np.uint8))
        writer.finish(Manifest.from_columns(columns, root="."))
    return folder


def settings(store, out, **changes):
    base = {"model": "vit_tiny", "image_px": (32,), "patch_px": 8, "epochs": 2, "batch_size": 4}
    base |= {"device": "cpu", "precision": "fp32", "sample_every": 0}
    return PretrainConfig(**{"data": str(store), "out": str(out), **base, **changes})


@pytest.mark.parametrize("objective", ["gmml", "mae"])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_images_are_learned_from(tmp_path, count, objective):
    """One image, fewer than a batch, one more than a batch: an epoch is one step."""
    store = store_of(tmp_path / "s", count)
    folder = run(settings(store, tmp_path / "a", objective=objective, sample_every=1))
    losses = [r["loss"] for r in read_records(folder) if r["kind"] == "train"]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    state = load_file(folder / "model" / "model.safetensors")
    assert all(bool(v.isfinite().all()) for v in state.values())


def test_an_empty_store_is_one_line(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(SpcxrError, match="images") as caught:
        run(settings(tmp_path / "images", tmp_path / "a"))
    assert "\n" not in str(caught.value)


def test_a_store_without_rows_to_learn_from_is_one_line(tmp_path):
    store = store_of(tmp_path / "s", 4)
    with pytest.raises(SpcxrError, match=r"no split 'pretrain'; it has: train"):
        run(settings(store, tmp_path / "a", splits=("pretrain",)))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """The third save fails; the second is whole, and the same command goes on from it."""
    store, saves = store_of(tmp_path / "s", 8), iter(range(99))
    save = checkpoint.save_file

    def full(*words, **options):
        if next(saves) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*words, **options)

    config = settings(store, tmp_path / "a", epochs=5)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(SpcxrError, match=r"cannot be written .*free some space"):
            run(config)
    block = json.loads((tmp_path / "a/checkpoints/last/checkpoint.json").read_text())
    assert block["position"]["step"] == 4
    folder = run(config)
    assert len([r for r in read_records(folder) if r["kind"] == "train"]) == 10


def test_a_checkpoint_of_a_newer_version_is_one_line(tmp_path):
    store = store_of(tmp_path / "s", 8)
    config = settings(store, tmp_path / "a")
    run(config)
    file = tmp_path / "a/checkpoints/last/checkpoint.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(SpcxrError, match=r"format 99, this spcxr reads up to 1; update spcxr"):
        run(config)


def test_stopping_for_good_keeps_the_weights_that_met_it(tmp_path):
    store = store_of(tmp_path / "s", 8)
    with pytest.raises(SpcxrError, match="not finite in 5 steps in a row"):
        run(settings(store, tmp_path / "a", base_lr=1e30, warmup_epochs=0.0, epochs=9))
    assert (tmp_path / "a/checkpoints/bad/model.safetensors").is_file()
