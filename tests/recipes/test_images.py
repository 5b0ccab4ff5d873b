"""The images a recipe prepares for itself: made once, and refused with a remedy that it has."""

import json

import numpy as np
import pytest
from PIL import Image

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.rows import RowSet
from spcxr.data.store import Store, StoreWriter
from spcxr.errors import SpcxrError
from spcxr.recipes.images import open_images, phantoms_among


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for seed, name in enumerate("ab"):
        save_noise(tmp_path / "images" / f"{name}.png", seed)
    return tmp_path / "images"


def save_noise(file, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64)).astype(np.uint8)
    Image.fromarray(pixels).save(file)


def change_a_file(folder, made):
    save_noise(folder / "a.png", seed=5)


def leave_another_beginning(folder, made):
    made.rename(made.with_name("elsewhere"))
    work = made.with_name(made.name + ".partial")
    work.mkdir()
    (work / "work.json").write_text(json.dumps({"size_px": 99}))


@pytest.mark.parametrize(
    ("meddle", "said"),
    [
        (change_a_file, "store: holds a store made from files that have changed since"),
        (leave_another_beginning, r"store\.partial: begun with other settings \(.*size_px"),
    ],
)
def test_a_store_in_the_way_is_named_with_a_remedy_that_works(folder, tmp_path, meddle, said):
    """The commands that prepare by the way have no --overwrite."""
    made = tmp_path / "run" / "store"
    made.parent.mkdir()
    before = open_images(str(folder), made, size_px=16)
    assert open_images(str(folder), made, size_px=16).facts == before.facts
    meddle(folder, made)
    with pytest.raises(SpcxrError, match=f"{said}.*; remove that folder") as caught:
        open_images(str(folder), made, size_px=16)
    assert str(caught.value).endswith("or choose another --out")
    assert "--overwrite" not in str(caught.value)


@pytest.mark.parametrize("url", [False, True], ids=["path", "url"])
def test_a_store_is_used_as_it_is_where_ever_it_stands(folder, tmp_path, url):
    made = open_images(str(folder), tmp_path / "made", size_px=16)
    data = f"file://{made.path}" if url else str(made.path)
    again = open_images(data, tmp_path / "elsewhere", size_px=16)
    np.testing.assert_array_equal(again.images([1, 0]), made.images([1, 0]))
    assert not (tmp_path / "elsewhere").exists()


def test_phantoms_are_found_among_the_rows_that_count(tmp_path):
    patients = ["p1", "PHANTOM-0-00003", "p2"]
    with StoreWriter(tmp_path / "s", Preprocess(size_px=4)) as writer:
        for _ in patients:
            writer.add(np.zeros((4, 4), np.uint8))
        columns = {"path": list("abc"), "patient_id": patients}
        writer.finish(Manifest.from_columns(columns, root="."))
    store = Store.open(tmp_path / "s")
    for rows, found in (([0, 1], True), ([0, 2], False), ([], False)):
        chosen = np.array(rows, np.int64)
        assert phantoms_among(store, chosen) is found
        assert phantoms_among(store, RowSet.from_rows(chosen)) is found


def test_images_smaller_than_those_trained_on_are_told(folder, tmp_path, capsys):
    open_images(str(folder), tmp_path / "made", size_px=32)
    wanted = Preprocess(size_px=48).to_dict()
    store = open_images(str(tmp_path / "made"), tmp_path, size_px=48, wanted=wanted, init="runs/a")
    assert store.preprocess.size_px == 32
    assert (
        "images of 32 px, enlarged for runs/a, which was trained on 48" in capsys.readouterr().err
    )
    open_images(str(tmp_path / "made"), tmp_path, size_px=32, wanted=store.preprocess.to_dict())
    assert "enlarged" not in capsys.readouterr().err
