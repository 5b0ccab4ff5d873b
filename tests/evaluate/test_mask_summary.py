"""Figures of masks: over images, structures and patients; empty and unknown masks."""

import re

import numpy as np
import pytest

from spcxr.errors import SpcxrError
from spcxr.evaluate import mask_pages
from spcxr.evaluate.intervals import bootstrap
from spcxr.evaluate.mask_summary import (
    FIGURES,
    Empties,
    MaskMeans,
    mask_figures,
    summarise_structures,
)
from spcxr.evaluate.metrics import mean

NAMES = ("left lung", "heart")


def square(top, left, side, n=1):
    mask = np.zeros((n, 24, 24), bool)
    mask[:, top : top + side, left : left + side] = True
    return mask


@pytest.fixture(scope="module")
def found():
    """Random figures ``(40, 2, F)``: the heart is undefined in ten images, unknown in five."""
    made = np.random.default_rng(0).random((40, 2, len(FIGURES)))
    made[:, :, -2:] = 9
    made[:10, 1, :-2] = np.nan
    made[:10, 1, -2:] = 0
    made[10:15, 1] = np.nan
    return made


def test_figures_by_hand():
    nothing, whole = np.zeros((1, 24, 24), bool), np.ones((1, 24, 24), bool)
    pairs = {
        "shifted": (square(4, 4, 8), square(4, 6, 8), whole),
        "missed": (nothing, square(4, 4, 8), whole),
        "false alarm": (square(4, 4, 8), nothing, whole),
        "both empty": (nothing, nothing, whole),
        "unknown": (square(4, 4, 8), nothing, nothing),
    }
    size = np.array([[0.5, 2.0]])
    got = {k: dict(zip(FIGURES, mask_figures(*v, size)[0], strict=True)) for k, v in pairs.items()}
    assert got["shifted"]["dice"] == 0.75
    assert got["shifted"]["iou"] == 0.6
    assert (got["shifted"]["hd_px"], got["shifted"]["hd_mm"]) == (2, 4)
    for name in ("missed", "false alarm"):
        assert (got[name]["dice"], got[name]["iou"]) == (0, 0)
        assert np.isnan([v for k, v in got[name].items() if k.startswith(("hd", "asd"))]).all()
    assert (got["missed"]["true_px"], got["missed"]["predicted_px"]) == (64, 0)
    assert (got["false alarm"]["true_px"], got["false alarm"]["predicted_px"]) == (0, 64)
    assert np.isnan(list(got["both empty"].values())[:-2]).all()
    assert list(got["both empty"].values())[-2:] == [0, 0]
    assert np.isnan(list(got["unknown"].values())).all()


def test_unknown_pixels_count_for_nothing():
    rng = np.random.default_rng(1)
    known = rng.random((6, 24, 24)) < 0.7
    predicted, truth = square(4, 4, 12, 6), square(6, 4, 12, 6)
    size = np.ones((6, 2))
    expected = mask_figures(predicted, truth, known, size)
    for other in (predicted | ~known, predicted & known):
        np.testing.assert_array_equal(mask_figures(other, truth, known, size), expected)
        np.testing.assert_array_equal(
            mask_figures(predicted, np.where(known, truth, other), known, size), expected
        )


def test_means_are_those_of_each_figure_alone(found):
    weights = np.random.default_rng(2).integers(0, 3, (7, 40))
    means = MaskMeans(found)
    for k in range(2):
        for f in range(len(FIGURES)):
            np.testing.assert_allclose(means.of(k, f)(weights), mean(found[:, k, f], weights))
    np.testing.assert_allclose(
        means.over_structures(0)(weights),
        (mean(found[:, 0, 0], weights) + mean(found[:, 1, 0], weights)) / 2,
    )


def test_a_summary_by_structure_and_over_all(found):
    patients, size = np.arange(40) // 2, np.ones((40, 2))
    size[:4] = np.nan
    made = summarise_structures(found, patients, NAMES, size, n=200, seed=3)
    alone = bootstrap(patients, lambda w: mean(found[:, 1, 0], w), n=200, seed=3)
    heart = made.by_structure["heart"]["dice"]
    assert (heart.value, heart.low, heart.high) == pytest.approx(
        (alone.value, alone.low, alone.high)
    )
    assert (heart.n_rows, heart.n_patients) == (25, 13)
    assert made.overall["Dice of heart"] == heart
    values = [made.by_structure[name]["hd95_px"].value for name in NAMES]
    assert made.overall["hd95_px"].value == pytest.approx(np.mean(values))
    assert set(made.overall) == set(made.statistics)
    assert made.empties["heart"] == Empties(both=10, missed=0, false_alarm=0, unknown=5)
    assert made.without_spacing == 4
    said = " ".join(mask_pages.sentences(made, 40))
    assert "In 10 of them mask and prediction are both empty: not in the mean (heart)." in said
    assert "The size of the pixels of 4 is not known" in said


def test_a_structure_that_is_never_there_leaves_the_mean_to_the_others(found):
    absent = found.copy()
    absent[:, 1] = np.nan
    made = summarise_structures(absent, np.arange(40), NAMES, np.ones((40, 2)), n=100)
    assert made.overall["dice"] == made.by_structure["left lung"]["dice"]
    assert np.isnan(made.by_structure["heart"]["dice"].value)
    tables = mask_pages.structure_tables(made)
    assert [row[0] for row in tables[0].rows] == ["left lung", "heart", "mean"]
    (picture,) = mask_pages.dice_histograms(absent[:, :, 0], NAMES)
    assert "heart" not in picture.alt


def test_without_spacing_there_is_no_millimetre_anywhere(found):
    unknown = np.full((40, 2), np.nan)
    made = summarise_structures(found, np.arange(40), NAMES, unknown, n=100)
    assert not any("mm" in name for name in made.overall)
    assert [t.caption for t in mask_pages.structure_tables(made)] == ["By structure"]
    assert "not known: no distance in millimetres" in " ".join(mask_pages.sentences(made, 40))


def test_nothing_to_measure_is_refused(found):
    with pytest.raises(SpcxrError, match="no image with a mask"):
        summarise_structures(found * np.nan, np.arange(40), NAMES, np.ones((40, 2)), n=100)


def test_a_histogram_of_perfect_masks_is_drawn():
    (picture,) = mask_pages.dice_histograms(np.ones((3, 1)), ("lung",))
    assert picture.svg.startswith("<svg")
    assert "median 1.000" in picture.alt


def test_images_are_counted_in_whole_numbers():
    (picture,) = mask_pages.dice_histograms(np.array([[0.91], [0.99]]), ("lung",))
    ticks = re.findall(r">([0-9.]+)</text>", picture.svg)
    assert [tick for tick in ticks if not tick.startswith(("0.9", "1.0"))] == ["0", "1"]
