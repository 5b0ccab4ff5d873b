"""Mending, measures and flags, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from spcxr.data.study import Study
from spcxr.errors import SpcxrError
from spcxr.infer.measures import measure, square_mm
from spcxr.infer.postprocess import tidy
from spcxr.infer.quality import flags

LUNG, SIDES = ("lung",), ("left lung", "right lung", "heart")


def study_of(mask, **facts):
    return Study(np.zeros(mask.shape, np.uint8), bits=8, **facts)


def flagged(mask, names=LUNG, **facts):
    study = study_of(mask, **facts)
    return flags(mask, names, study, measure(mask, names, study))


@pytest.fixture
def chest(lungs):
    return lungs().astype(np.uint8)


# --- mending --------------------------------------------------------------------------------


def test_stray_pieces_go_and_holes_close(chest):
    spoilt = chest.copy()
    spoilt[2:5, 2:5] = 1  # a speck
    spoilt[40:44, 30:34] = 0  # a hole
    np.testing.assert_array_equal(tidy(spoilt, LUNG), chest)
    assert tidy(spoilt, LUNG, "holes")[3, 3] == 1
    assert tidy(spoilt, LUNG, "holes")[41, 31] == 1
    assert tidy(spoilt, LUNG, "largest")[3, 3] == 0
    assert tidy(spoilt, LUNG, "largest")[41, 31] == 0
    np.testing.assert_array_equal(tidy(spoilt, LUNG, "none"), spoilt)


def test_a_third_large_piece_goes_and_one_of_a_single_organ_stays(chest):
    three = chest.copy()
    three[20:75, 125:135] = 1
    np.testing.assert_array_equal(tidy(three, LUNG), chest)
    assert not tidy(chest, ("heart",))[:, 70:].any()


def test_a_structure_inside_another_is_no_hole(chest):
    both = chest.copy()
    both[40:44, 30:34] = 2
    np.testing.assert_array_equal(tidy(both, ("lung", "heart")), both)


def test_what_anatomy_does_not_bound_is_left(chest):
    spoilt = chest.copy()
    spoilt[2, 2] = 1
    spoilt[40, 30] = 0
    np.testing.assert_array_equal(tidy(spoilt, ("opacity",)), spoilt)


def test_a_mask_of_nothing_and_an_unknown_way():
    empty = np.zeros((5, 5), np.uint8)
    assert not tidy(empty, LUNG).any()
    with pytest.raises(SpcxrError, match=r"post is 'smooth'; choose one of: default, none"):
        tidy(empty, LUNG, "smooth")


# --- measures -------------------------------------------------------------------------------


def test_sides_are_the_patients(chest):
    usual = measure(chest, LUNG, study_of(chest)).areas_px
    assert usual == {"lung": 55 * 68, "right lung": 55 * 40, "left lung": 55 * 28}
    note = "stored mirrored left-right (PatientOrientation), kept so"
    turned = measure(chest, LUNG, study_of(chest, notes=(note,))).areas_px
    assert (turned["left lung"], turned["right lung"]) == (55 * 40, 55 * 28)
    note = "stored turned on its side (PatientOrientation), kept so"
    assert "left lung" not in measure(chest, LUNG, study_of(chest, notes=(note,))).areas_px


def test_a_small_piece_counts_to_its_side(chest):
    chest[80:83, 100:103] = 1
    found = measure(chest, LUNG, study_of(chest))
    assert found.lung_pieces == 2
    assert found.areas_px["left lung"] == 55 * 28 + 9


def test_lungs_that_touch_are_not_divided(chest):
    chest[50, 20:118] = 1
    found = measure(chest, LUNG, study_of(chest))
    assert (found.lung_pieces, "left lung" in found.areas_px) == (1, False)


def test_the_heart_over_the_chest(chest):
    mask = np.where(chest, np.where(np.arange(140) < 75, 2, 1), 0).astype(np.uint8)
    assert math.isnan(measure(mask, SIDES, study_of(mask)).cardiothoracic)  # no heart
    mask[60:70, 61:89] = 3
    found = measure(mask, SIDES, study_of(mask))
    assert found.cardiothoracic == pytest.approx(28 / 98)
    assert found.lungs_px == 55 * 68
    mask[mask == 1] = 0  # one lung is no width of a chest
    assert math.isnan(measure(mask, SIDES, study_of(mask)).cardiothoracic)


def test_pixels_that_are_not_square():
    assert square_mm(1000, (0.2, 0.1)) == pytest.approx(20)
    assert math.isnan(square_mm(1000, None))


# --- flags ----------------------------------------------------------------------------------


def test_what_looks_right_has_no_flag(chest):
    assert flagged(chest) == ()
    assert flagged(chest, spacing_mm=(3.0, 3.0)) == ()


def test_each_oddity_has_its_flag(chest):
    assert flagged(np.zeros_like(chest)) == ("no lung",)
    one = chest.copy()
    one[:, 75:] = 0
    assert flagged(one) == ("one lung, or two that touch",)
    edge = chest.copy()
    edge[70:, 30:40] = 1
    assert flagged(edge) == ("lung touches the border of the image",)
    assert flagged(chest, spacing_mm=(0.1, 0.1)) == ("lungs of 0.374 cm2",)
    assert flagged(chest, spacing_mm=(9.0, 9.0)) == ("lungs of 3.03e+03 cm2",)
    unequal = chest.copy()
    unequal[:65, 75:] = 0
    assert flagged(unequal) == ("lungs of unequal size",)
    assert flagged(np.pad(chest, 300)) == ("lungs are 0.732 % of the image",)
    three = chest.copy()
    three[20:75, 125:135] = 1
    assert flagged(three) == ("lungs in 3 pieces",)


def test_flags_of_named_sides(chest):
    mask = np.where(chest, np.where(np.arange(140) < 75, 2, 1), 0).astype(np.uint8)
    assert flagged(mask, SIDES) == ("no heart",)
    mask[mask == 1] = 3
    assert flagged(mask, SIDES) == ("one lung",)


def test_sides_of_a_turned_image_are_not_told(chest):
    note = "stored turned on its side (PatientOrientation), kept so"
    assert flagged(chest, notes=(note,)) == ("sides are not known: turned, by its header",)


def test_a_study_is_left_as_it_is(chest):
    study = replace(study_of(chest), view="AP")
    flags(chest, LUNG, study, measure(chest, LUNG, study))
    assert (study.pixels == 0).all()
