"""The store: numpy alone reads it, statistics are exact, and a torn or foreign one is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.shards import GrowingArray
from spcxr.data.store import OPEN_SHARDS, Store, StoreWriter
from spcxr.errors import SpcxrError

SIZE = 8


def manifest_of(count, splits=("train", "val")):
    columns = {
        "path": [f"{i}.png" for i in range(count)],
        "patient_id": [f"p{i}" for i in range(count)],
        "split": [splits[i % len(splits)] for i in range(count)],
    }
    return Manifest.from_columns(columns, root="/nowhere")


def make(folder, count=7, dtype="uint8", masked=(), per_shard=3, splits=("train", "val")):
    """A store of random images; shards of three rows, so that joints between shards are met."""
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(5)
    images = rng.integers(0, top, (count, SIZE, SIZE), dtype, endpoint=True)
    masks = rng.integers(0, 1, (count, SIZE, SIZE), np.uint8, endpoint=True)
    preprocess = Preprocess(size_px=SIZE, dtype=dtype)
    shard_bytes = per_shard * images[0].nbytes
    with StoreWriter(folder / "store", preprocess, shard_bytes=shard_bytes) as writer:
        for i in range(count):
            writer.add(images[i], masks[i] if i in masked else None)
        store = writer.finish(manifest_of(count, splits))
    return store, images, masks


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_what_was_written_is_read_in_any_order(tmp_path, dtype):
    store, images, _ = make(tmp_path, dtype=dtype)
    order = [6, 0, 3, 3, 2]
    got = store.images(order)
    assert got.dtype == np.dtype(dtype) == store.dtype
    np.testing.assert_array_equal(got, images[order])
    assert store.images([]).shape == (0, SIZE, SIZE)
    for bad in ([7], [-1]):
        with pytest.raises(IndexError, match="has 7 rows"):
            store.images(bad)


def test_numpy_alone_reads_it(tmp_path):
    store, images, _ = make(tmp_path)
    files = sorted((tmp_path / "store").glob("images-*.npy"))
    assert [f.name for f in files] == [f"images-0000{i}.npy" for i in range(3)]
    np.testing.assert_array_equal(np.concatenate([np.load(f) for f in files]), images)
    assert not (tmp_path / "store.partial").exists()
    assert len(store) == 7


def test_masks_are_there_where_they_are_and_255_elsewhere(tmp_path):
    """Row 1 and 4 have one: the last shard has no mask file, rows 0 and 3 came before a first."""
    store, _, masks = make(tmp_path, masked=(1, 4))
    assert store.has_masks
    assert len(list((tmp_path / "store").glob("masks-*.npy"))) == 2
    got = store.masks(range(7))
    for i in range(7):
        np.testing.assert_array_equal(got[i], masks[i] if i in (1, 4) else 255)


def test_no_masks_at_all_is_said(tmp_path):
    store, _, _ = make(tmp_path)
    assert not store.has_masks
    with pytest.raises(SpcxrError, match="no row has a mask; prepare a manifest with mask_path"):
        store.masks([0])


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_mean_and_std_are_those_of_the_training_rows_content(tmp_path, dtype):
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max
    images = rng.integers(0, top, (6, SIZE, SIZE), dtype, endpoint=True)
    boxes = [(1, 2, 4, 3)] * 6
    with StoreWriter(tmp_path / "s", Preprocess(size_px=SIZE, dtype=dtype)) as writer:
        for image, box in zip(images, boxes, strict=True):
            writer.add(image, box=box)
        store = writer.finish(manifest_of(6))
    content = images[::2, 1:5, 2:5].astype(np.float64) / top
    np.testing.assert_allclose((store.mean, store.std), (content.mean(), content.std()), rtol=1e-12)
    assert store.facts["statistics_over"] == "training rows"


def test_the_statistics_leave_out_what_pretraining_leaves_out(tmp_path):
    store, images, _ = make(tmp_path, splits=("dev", "external_train"))
    np.testing.assert_allclose(store.mean, images[::2].mean() / 255)


def test_without_a_training_split_the_statistics_say_so(tmp_path):
    store, images, _ = make(tmp_path, splits=("drift",))
    assert store.facts["statistics_over"] == "all rows (there is no training split)"
    np.testing.assert_allclose(store.mean, images.mean() / 255)


def test_a_store_travels_to_a_worker_process(tmp_path):
    store, images, _ = make(tmp_path)
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.images([4]), images[[4]])


def test_open_handles_are_bounded(tmp_path):
    count = OPEN_SHARDS * 2
    store, images, _ = make(tmp_path, count=count, per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    np.testing.assert_array_equal(store.images(range(count)), images)
    assert len(os.listdir("/proc/self/fd")) - before <= OPEN_SHARDS


def test_verify_sees_one_changed_byte_that_open_cannot(tmp_path):
    store, _, _ = make(tmp_path, masked=(0,))
    store.verify()
    file = tmp_path / "store" / "masks-00000.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    opened = Store.open(tmp_path / "store")
    with pytest.raises(SpcxrError, match=r"masks-00000.npy: its content has changed"):
        opened.verify()


def torn(folder):
    file = folder / "images-00001.npy"
    file.write_bytes(file.read_bytes()[:-1])


def edited(**changes):
    def edit(folder):
        file = folder / "store.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


BROKEN = {
    "torn": (torn, r"images-00001.npy: \d+ bytes instead of \d+; the store is torn"),
    "file gone": (lambda f: (f / "images-00002.npy").unlink(), "missing; the store is torn"),
    "manifest gone": (lambda f: (f / "manifest.parquet").unlink(), "manifest.parquet: missing"),
    "newer": (edited(version=99), "format 99, this spcxr reads up to 1; update spcxr"),
    "foreign": (edited(format="other"), "not a store of spcxr's"),
    "half json": (lambda f: (f / "store.json").write_text('{"format"'), "cannot be read"),
    "no json": (lambda f: (f / "store.json").unlink(), "not a store; make one with"),
    "gone": (shutil.rmtree, "no such store; make one with: spcxr-train prepare"),
    "newer preset": (
        edited(preprocess={**Preprocess(size_px=SIZE).to_dict(), "version": 99}),
        "version 99",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_store_is_refused_in_one_line(tmp_path, name):
    make(tmp_path)
    break_it, message = BROKEN[name]
    break_it(tmp_path / "store")
    with pytest.raises(SpcxrError, match=message) as caught:
        Store.open(tmp_path / "store")
    assert "\n" not in str(caught.value)


def interrupted(folder):
    with StoreWriter(folder / "s", Preprocess(size_px=SIZE)) as writer:
        writer.add(np.zeros((SIZE, SIZE), np.uint8))
        raise RuntimeError("power cut")


def test_nothing_half_written_looks_whole(tmp_path):
    with pytest.raises(RuntimeError, match="power cut"):
        interrupted(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    _, images, _ = make(tmp_path)
    preprocess = Preprocess(size_px=SIZE)
    with pytest.raises(SpcxrError, match="holds a finished store; choose another out"):
        StoreWriter(tmp_path / "store", preprocess)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for overwrite in (False, True):
        with pytest.raises(SpcxrError, match="holds something that is no store"):
            StoreWriter(tmp_path / "run", preprocess, overwrite=overwrite)
    with StoreWriter(tmp_path / "store", preprocess, overwrite=True) as writer:
        writer.add(np.zeros((SIZE, SIZE), np.uint8))
        np.testing.assert_array_equal(Store.open(tmp_path / "store").images([0]), images[:1])
        assert len(writer.finish(manifest_of(1))) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "store"]


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    with StoreWriter(tmp_path / "s", Preprocess(size_px=SIZE)) as writer:
        for wrong in (np.zeros((SIZE, SIZE), np.uint16), np.zeros((SIZE, 4), np.uint8)):
            with pytest.raises(ValueError, match="pixels"):
                writer.add(wrong)
        writer.add(np.zeros((SIZE, SIZE), np.uint8))
        with pytest.raises(ValueError, match="2 manifest rows for 1 images"):
            writer.finish(manifest_of(2))
        writer.finish(manifest_of(1))


def test_a_full_disk_is_an_oserror_that_names_the_file_even_on_leaving(tmp_path, monkeypatch):
    """``/dev/full`` refuses every byte, as a full disk does; no second fault hides that."""
    monkeypatch.setattr(StoreWriter, "_file", lambda self, kind: Path("/dev/full"))
    writer = StoreWriter(tmp_path / "s", Preprocess(size_px=256))
    with pytest.raises(OSError, match=r"No space left.*'/dev/full'"), writer:
        writer.add(np.zeros((256, 256), np.uint8))
    assert not list(tmp_path.iterdir())


def test_a_short_write_is_refused_without_an_assert(tmp_path):
    growing = GrowingArray(tmp_path / "a.npy", (4, 4), np.dtype(np.uint8))
    growing.append(np.zeros((4, 4), np.uint8))
    growing.rows += 1
    with pytest.raises(SpcxrError, match=r"a.npy: 144 bytes written instead of 160; free some"):
        growing.close()
