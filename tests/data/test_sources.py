"""What every public set keeps; four of them, and plain folders."""

import os

import numpy as np
import pytest
from public_sets import MAKERS, covid, montgomery, nih, shenzhen, touch

from spcxr.data import sources
from spcxr.data.sources.nih import FINDINGS
from spcxr.errors import SpcxrError


@pytest.mark.parametrize("name", sources.PUBLIC_SETS)
def test_contract(tmp_path, name):
    """What every public set keeps: found by its files, paths exist, ids cannot clash."""
    root = MAKERS[name](tmp_path)
    assert sources.detect(root) == name
    manifest = sources.index(root)
    assert manifest.labels
    assert manifest.table.equals(sources.index(root, name).table)
    for path, masks in zip(manifest.column("path"), manifest.column("mask_path"), strict=True):
        assert (root / path).is_file()
        assert all((root / mask).is_file() for mask in masks.split("|") if mask)
    # Blank: the DICOM headers tell. A set that took another's patients over names them as that one.
    known = tuple(f"{one}-" for one in sources.PUBLIC_SETS)
    assert all(p.startswith(known) for p in manifest.column("patient_id") if p)
    assert all(site.startswith(name) for site in manifest.column("site"))
    kept = sources.index(root, labels=manifest.labels[:1])
    assert kept.labels == manifest.labels[:1]
    with pytest.raises(SpcxrError, match="no label 'flu'"):
        sources.index(root, labels=("flu",))


@pytest.mark.parametrize("name", sources.PUBLIC_SETS)
def test_another_folder_is_refused_by_name(tmp_path, name):
    touch(tmp_path, "x.png")
    with pytest.raises(SpcxrError, match=str(tmp_path)):
        sources.index(tmp_path, name)


@pytest.mark.parametrize("year", [2017, 2020])
def test_nih(tmp_path, year):
    manifest = sources.index(nih(tmp_path, year))
    assert manifest.labels == FINDINGS
    found = [[FINDINGS[k] for k in np.flatnonzero(row)] for row in manifest.label_matrix()]
    assert found == [["Cardiomegaly", "Emphysema"], [], ["Hernia"]]
    assert manifest.column("age") == [57, 58, 81]
    assert manifest.column("view") == ["PA", "AP", "PA"]
    assert manifest.notes == ("nih: 1 images of the table are not on disk",)


def test_nih_keeps_the_official_test_list(tmp_path):
    root = nih(tmp_path)
    touch(root, "train_val_list.txt", text="00000001_000.png\n00000001_001.png\n")
    touch(root, "test_list.txt", text="00000002_000.png")
    splits = sources.index(root).column("split")
    assert splits[2] == "test"
    assert splits[0] == splits[1] in {"train", "val"}


def test_covid_chestxray_leaves_out_ct_and_lateral(tmp_path):
    manifest = sources.index(covid(tmp_path))
    assert manifest.column("path") == ["images/a.jpg", "images/b.png", "images/c.jpeg"]
    assert manifest.column("view") == ["PA", "AP SUPINE", "AP"]
    assert manifest.labels == ("COVID-19", "No Finding", "Pneumonia", "Viral")
    nan = np.nan
    expected = [[1, 0, 1, 1], [0, 1, 0, 0], [nan] * 4]
    np.testing.assert_array_equal(manifest.label_matrix(), expected)
    assert manifest.notes == (
        "covid-chestxray: 2 CT and lateral images left out",
        "covid-chestxray: 1 images of the table are not on disk",
    )


def test_montgomery_joins_the_lungs(tmp_path):
    manifest = sources.index(montgomery(tmp_path))
    stems = ("MCUCXR_0001_0", "MCUCXR_0104_1")
    sides = ("left", "right")
    expected = ["|".join(f"ManualMask/{s}Mask/{stem}.png" for s in sides) for stem in stems]
    assert manifest.column("mask_path") == expected
    assert manifest.label_matrix().tolist() == [[0], [1]]
    assert manifest.column("age") == [27, None]
    assert manifest.column("sex") == ["F", ""]


def test_montgomery_with_one_lung_is_refused(tmp_path):
    root = montgomery(tmp_path)
    (root / "ManualMask/leftMask/MCUCXR_0104_1.png").unlink()
    with pytest.raises(SpcxrError, match="MCUCXR_0104_1 has the mask of one lung only"):
        sources.index(root)


def test_shenzhen(tmp_path):
    manifest = sources.index(shenzhen(tmp_path))
    assert manifest.column("mask_path") == ["", "mask/CHNCXR_0327_1_mask.png"]
    assert manifest.label_matrix().tolist() == [[0], [1]]
    assert manifest.column("age") == [45, 30]
    assert manifest.column("sex") == ["M", "F"]


def test_folder_takes_everything_that_is_not_hidden(tmp_path):
    touch(tmp_path, "b.dcm", "a/IM0001", "a/deep/x.png", ".git/x.png", ".x.png", "DICOMDIR")
    manifest = sources.index(tmp_path)
    assert manifest.column("path") == ["a/IM0001", "a/deep/x.png", "b.dcm"]
    assert manifest.labels == ()
    assert set(manifest.column("split")) == {""}


def test_folder_names_are_labels_only_when_nothing_else_is_possible(tmp_path):
    """Kermany's layout: split / class / file."""
    touch(tmp_path, "train/NORMAL/a.jpeg", "train/PNEUMONIA/b.jpeg", "validation/NORMAL/c.jpeg")
    touch(tmp_path, "test/PNEUMONIA/d.jpeg")
    manifest = sources.index(tmp_path)
    assert manifest.labels == ("NORMAL", "PNEUMONIA")
    by_name = dict(zip(manifest.column("path"), manifest.column("split"), strict=True))
    assert by_name["validation/NORMAL/c.jpeg"] == "val"
    assert by_name["test/PNEUMONIA/d.jpeg"] == "test"
    assert "taken from the folders' names" in manifest.notes[0]
    touch(tmp_path, "readme.jpeg")
    assert sources.index(tmp_path).labels == ()


def test_class_folders_on_request(tmp_path):
    touch(tmp_path, "covid/a.png", "normal/b.png", "normal/c.png")
    assert sources.index(tmp_path).labels == ()
    manifest = sources.index(tmp_path, class_folders=True)
    assert manifest.label_matrix(["covid", "normal"]).tolist() == [[1, 0], [0, 1], [0, 1]]
    touch(tmp_path, "loose.png")
    with pytest.raises(SpcxrError, match=r"loose.png stands in no class folder"):
        sources.index(tmp_path, class_folders=True)


def test_links_that_lead_out_are_left_out_and_said(tmp_path):
    inside = tmp_path / "in"
    touch(tmp_path, "secret.png", "in/a.png")
    os.symlink(tmp_path / "secret.png", inside / "b.png")
    manifest = sources.index(inside)
    assert manifest.column("path") == ["a.png"]
    assert manifest.notes == ("in: 1 links that lead out of the folder were left out",)


def test_manifest_beside_the_images_is_found(tmp_path):
    touch(tmp_path, "manifest.csv", text="path,covid\na.png,1\n")
    assert sources.detect(tmp_path) == "csv"
    assert sources.index(tmp_path).labels == ("covid",)


def test_what_is_no_source(tmp_path):
    touch(tmp_path, "x.png")
    (tmp_path / "empty").mkdir()
    for path, message in {
        tmp_path / "absent": "no such file or folder",
        tmp_path / "x.png": "a single file; give a folder or a .csv / .parquet manifest",
        tmp_path / "empty": "no files in this folder",
    }.items():
        with pytest.raises(SpcxrError, match=message):
            sources.index(path)
