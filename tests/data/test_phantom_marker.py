"""The planted shortcut: text outside the lungs that goes with the label as often as asked for."""

import csv

import numpy as np
import pydicom
import pytest

from spcxr.data.phantom import Series, draw, write
from spcxr.data.phantom_marker import MARKERS, choose_marker
from spcxr.errors import SpcxrError


@pytest.mark.parametrize("site", ["site-a", "site-b"])
@pytest.mark.parametrize("child", [False, True])
@pytest.mark.parametrize("marker", MARKERS)
def test_text_is_burned_in_outside_the_lungs(site, child, marker):
    for index in range(2):
        plain = draw(index, site=site, child=child, size_px=160)
        marked = draw(index, site=site, child=child, size_px=160, marker=marker)
        changed = plain.pixels != marked.pixels
        assert 0.001 < changed.mean() < 0.04
        assert (changed & plain.lung_mask).sum() < 0.02 * changed.sum()
        assert np.argwhere(changed)[:, 0].max() < 0.15 * 160
        assert marked.pixels[changed].max() > 0.8 * 4095
        assert np.array_equal(plain.lung_mask, marked.lung_mask)


def test_texts_differ():
    drawn = [draw(0, size_px=160, marker=marker).pixels for marker in MARKERS]
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[1], drawn[2])


def test_the_share_of_marked_images_is_what_was_asked_for():
    marked = [bool(choose_marker(0, index, 0.95)) for index in range(2000)]
    assert 0.93 < np.mean(marked) < 0.97
    assert not any(choose_marker(0, index, 0.0) for index in range(50))
    assert {choose_marker(1, index, 1.0) for index in range(50)} == set(MARKERS)


def is_marked(folder, row, size_px):
    """Whether a written image differs from the drawing without text."""
    index = int(row["path"].split("-")[-1].removesuffix(".dcm"))
    child = float(row["age"]) < 12
    plain = draw(index, site=row["site"], label=row["label"], child=child, size_px=size_px)
    data = pydicom.dcmread(folder / row["path"])
    stored = data.pixel_array
    shown = 4095 - stored if data.PhotometricInterpretation == "MONOCHROME1" else stored
    return not np.array_equal(shown, plain.pixels)


def test_a_series_plants_it_by_site_and_label(tmp_path):
    write(tmp_path / "drawn", Series(count=16, size_px=64, shortcut=(1.0, 0.0), drift_ratio=0.5))
    with open(tmp_path / "drawn" / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["site"] for row in rows} == {"site-a", "site-b"}
    for row in rows:
        wanted = (row["label"] != "normal") == (row["site"] == "site-a")
        assert is_marked(tmp_path / "drawn", row, 64) == wanted


def test_a_probability_out_of_range_is_refused():
    with pytest.raises(SpcxrError, match="choose probabilities from 0 to 1"):
        Series(shortcut=(0.95, 1.5))
