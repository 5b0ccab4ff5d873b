"""Whom a model was trained on: found in stores prepared apart, told apart by more than a number."""

import csv
import json

import numpy as np
import pytest

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import Store, StoreWriter
from spcxr.errors import SpcxrError
from spcxr.recipes.leaks import (
    copies_among,
    find_leaks,
    identities,
    pictures,
    write_trained_on,
)
from spcxr.recipes.prepare import PrepareConfig
from spcxr.recipes.prepare import run as prepare

COUNT = 12


def make(out, ids, *, root="/one", seed=0, size=16, images=None):
    """Noise images of these patients, their files below ``root``."""
    rng = np.random.default_rng(seed)
    with StoreWriter(out, Preprocess(size_px=size)) as writer:
        for i in range(len(ids)):
            drawn = rng.integers(0, 255, (size, size)).astype(np.uint8)
            writer.add(drawn if images is None else images[i])
        columns = {"path": [f"{i}.png" for i in range(len(ids))], "patient_id": list(ids)}
        return writer.finish(Manifest.from_columns(columns, root=root))


def every(store):
    return np.arange(len(store), dtype=np.int64)


def learned(tmp_path, ids, **given):
    store = make(tmp_path / "train", ids, **given)
    write_trained_on(tmp_path, store, every(store)[:8], every(store)[8:])
    return store


def test_a_patient_is_found_in_another_store_by_an_id_that_tells(tmp_path):
    learned(tmp_path, [f"nih-{i}" for i in range(COUNT)])
    other = make(tmp_path / "b", ["nih-99", "nih-3", "nih-3", "nih-11"], root="/two", seed=1)
    found = find_leaks(tmp_path, other, every(other))
    assert (found.patients, found.rows, found.copies, found.first) == (2, 3, 0, "1.png")
    assert found.pixels_compared
    assert find_leaks(tmp_path, other, np.array([0])).rows == 0


@pytest.mark.parametrize("init", ["first", "first/model", "first/model/model.safetensors"])
def test_the_patients_of_the_init_are_the_models_too(tmp_path, init):
    """Learned from one set, then from another, then from a third: all of them are known."""
    sets = [make(tmp_path / n, [f"{n}-{i}" for i in range(4)], seed=k) for k, n in enumerate("abc")]
    first, second, third = (tmp_path / name / "model" for name in ("first", "second", "third"))
    for folder in (first, second, third):
        folder.mkdir(parents=True)
    (first / "model.safetensors").touch()
    rows, none = every(sets[0]), np.zeros(0, np.int64)
    write_trained_on(first, sets[0], rows, none)
    write_trained_on(second, sets[1], rows, none, str(tmp_path / init))
    write_trained_on(third, sets[2], rows, none, str(tmp_path / "second"))
    for store in sets:
        found = find_leaks(third, store, rows)
        assert (found.patients, found.copies, found.pixels_compared) == (4, 4, True)
    assert find_leaks(second, sets[2], rows).rows == 0
    assert find_leaks(first, sets[1], rows).rows == 0


@pytest.mark.parametrize("place", ["finder", "lungs"])
def test_the_patients_of_a_model_within_are_the_models_too(tmp_path, place):
    """The one that finds the lungs knows the patients it learned to find them in."""
    sets = [make(tmp_path / n, [f"{n}-{i}" for i in range(4)], seed=k) for k, n in enumerate("abc")]
    rows, none, model = every(sets[0]), np.zeros(0, np.int64), tmp_path / "model"
    (model / place).mkdir(parents=True)
    write_trained_on(model, sets[0], rows, none)
    write_trained_on(model / place, sets[1], rows, none)
    assert [find_leaks(model, store, rows).patients for store in sets] == [4, 4, 0]


@pytest.mark.parametrize("ids", [range(1, 13), [f"patient{i:05d}" for i in range(1, 13)]])
def test_mere_numbers_tell_within_one_folder_only(tmp_path, ids):
    ids = [str(i) for i in ids]
    learned(tmp_path, ids)
    same = make(tmp_path / "same", ids[:3], seed=1)
    assert find_leaks(tmp_path, same, every(same)).patients == 3
    other = make(tmp_path / "other", ids[:3], root="/two", seed=1)
    found = find_leaks(tmp_path, other, every(other))
    assert (found.patients, found.rows, found.doubtful) == (0, 0, 3)


def test_a_picture_is_found_whoever_it_is_said_to_be(tmp_path):
    store = learned(tmp_path, [f"nih-{i}" for i in range(COUNT)])
    images = [*store.images([4]), np.full((16, 16), 7, np.uint8)]
    other = make(tmp_path / "b", ["x-1", "x-2"], root="/two", images=images)
    found = find_leaks(tmp_path, other, every(other))
    assert (found.rows, found.copies, found.first) == (1, 1, "0.png")
    small = make(tmp_path / "small", ["x-1"], root="/two", size=8)
    assert not find_leaks(tmp_path, small, every(small)).pixels_compared


def test_images_of_one_grey_level_are_nobodys(tmp_path):
    images = [np.zeros((16, 16), np.uint8)] * COUNT
    store = learned(tmp_path, [f"nih-{i}" for i in range(COUNT)], images=images)
    other = make(tmp_path / "b", ["x-1"], root="/two", images=images)
    assert find_leaks(tmp_path, other, every(other)).rows == 0
    assert copies_among(pictures(store, every(store))) == 0


def test_rows_without_a_patient_are_their_files(tmp_path):
    learned(tmp_path, [""] * COUNT)
    again = make(tmp_path / "again", [""] * 3, seed=1)
    assert find_leaks(tmp_path, again, every(again)).rows == 3
    other = make(tmp_path / "other", [""] * 3, root="/two", seed=1)
    assert find_leaks(tmp_path, other, every(other)).rows == 0


def test_no_patient_can_be_read_and_equal_runs_write_equal_files(tmp_path):
    store = learned(tmp_path, [f"SECRET-{i}" for i in range(COUNT)])
    text = (tmp_path / "trained_on.json").read_text()
    assert "SECRET" not in text
    assert ".png" not in text
    assert "/one" not in text
    facts = json.loads(text)
    assert facts["rows"] == {"train": 8, "val": 4}
    assert len(facts["patients"]) == len(facts["pictures"]) == COUNT
    write_trained_on(tmp_path, store, every(store)[:8], every(store)[8:])
    assert (tmp_path / "trained_on.json").read_text() == text


def test_without_a_list_it_is_not_known_and_a_torn_one_is_refused(tmp_path):
    store = make(tmp_path / "store", ["a"] * 2)
    assert find_leaks(tmp_path, store, every(store)) is None
    for text in ("{", "[]", '{"format": 1}', '{"format": 2}'):
        (tmp_path / "trained_on.json").write_text(text)
        with pytest.raises(SpcxrError, match="not readable as the list of whom"):
            find_leaks(tmp_path, store, every(store))


def test_copies_within_a_set_are_counted(tmp_path):
    image = np.arange(256, dtype=np.uint8).reshape(16, 16)
    store = make(tmp_path / "store", ["a", "b", "c"], images=[image, image.T, image])
    assert copies_among(pictures(store, every(store))) == 1


def test_identities_of_two_sources_differ_by_the_folder():
    columns = {"path": ["1.png"], "patient_id": ["0007"]}
    one, two = (Manifest.from_columns(columns, root=root) for root in ("/a", "/b"))
    rows = np.array([0])
    assert identities(one, rows) != identities(two, rows)


def test_real_radiographs_prepared_twice_are_known_by_their_patients(shared_data, tmp_path):
    """Every manifest has the same split by patient: training rows are met again, test rows never.

    One store is prepared from a table elsewhere and at another size, so that only ids can tell.
    """
    with (shared_data / "cls_manifest.csv").open(newline="", encoding="utf-8-sig") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] in ("train", "test")][::8]
    kept = ("path", "patient_id", "split", "label")
    made = []
    for name, size_px in (("one", 64), ("two", 48)):
        table = tmp_path / name / "table.csv"
        table.parent.mkdir()
        with table.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, kept, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        config = PrepareConfig(
            sources=(str(table),),
            out=str(tmp_path / name / "store"),
            root=str(shared_data),
            size_px=size_px,
            workers=0,
        )
        made.append(Store.open(prepare(config)))
    one, two = made
    write_trained_on(tmp_path, one, one.manifest.rows("train"), np.zeros(0, np.int64))
    train, test = (two.manifest.rows(split) for split in ("train", "test"))
    assert min(len(train), len(test)) > 10
    found = find_leaks(tmp_path, two, train)
    assert (found.rows, found.doubtful, found.pixels_compared) == (len(train), 0, False)
    assert find_leaks(tmp_path, two, test).rows == 0
    again = find_leaks(tmp_path, one, one.manifest.rows("train"))
    assert again.copies == len(one.manifest.rows("train"))
