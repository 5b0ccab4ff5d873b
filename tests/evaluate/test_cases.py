"""The picked cases are the extremes, one a patient; heat is where it was and nowhere else."""

import io

import numpy as np
import pytest
from PIL import Image

from spcxr.errors import SpcxrError
from spcxr.evaluate.cases import (
    HEAT,
    STRONGEST,
    Case,
    case_pictures,
    heat_overlay,
    pick_cases,
    times_even,
)
from spcxr.evaluate.report import Report, Section, render


def test_cases_are_the_extremes_of_each_kind():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (60, 2)).astype(float)
    labels[::7] = np.nan
    scores = rng.random((60, 2))
    patients = np.arange(60)
    cases = pick_cases(labels, scores, patients, n=2)
    for k in range(2):
        found = {kind: [c.row for c in cases if c.label == k and c.kind == kind]
                 for kind in ("best", "missed", "alarm")}  # fmt: skip
        yes, no = (np.flatnonzero(labels[:, k] == value) for value in (1, 0))
        ranked = yes[np.argsort(scores[yes, k])]
        assert found["best"] == ranked[::-1][:2].tolist()
        assert found["missed"] == ranked[:2].tolist()
        assert found["alarm"] == no[np.argsort(-scores[no, k])][:2].tolist()
    assert all(case.score == scores[case.row, case.label] for case in cases)
    assert all(case.truth == labels[case.row, case.label] for case in cases)


def test_a_patient_stands_once_in_a_label():
    labels = np.array([[1.0], [1], [1], [1], [0], [0]])
    scores = np.array([[0.9], [0.8], [0.2], [0.1], [0.7], [0.6]])
    patients = np.array(["a", "a", "b", "a", "a", "c"])
    assert [(c.kind, c.row) for c in pick_cases(labels, scores, patients, n=2)] == [
        ("best", 0),
        ("best", 2),
        ("alarm", 5),
    ]


def test_a_label_without_rows_has_no_case_and_nan_scores_are_refused():
    labels = np.array([[np.nan, 1.0], [np.nan, np.nan]])
    scores = np.full((2, 2), 0.5)
    assert [(c.label, c.kind, c.row) for c in pick_cases(labels, scores, np.arange(2))] == [
        (1, "best", 0)
    ]
    scores[1, 0] = np.nan
    with pytest.raises(SpcxrError, match="row 1: a score is not finite"):
        pick_cases(labels, scores, np.arange(2))
    with pytest.raises(SpcxrError, match="one row an image each"):
        pick_cases(labels, scores[:1], np.arange(2))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_heat_is_where_attention_is(dtype):
    image = np.full((256, 256), np.iinfo(dtype).max // 2, dtype)
    heat = np.full((8, 8), 0.01)
    heat[2, 5] = 0.03
    drawn = heat_overlay(image, heat)
    assert drawn.shape == (256, 256, 3)
    assert (drawn[:40] == drawn[0, 0]).all()  # rows above the patch and its neighbours: plain
    assert (drawn[0, 0] == 127).all()
    # at the patch's middle, between four pixels: all but the strongest
    expected = (1 - STRONGEST) * 127 + STRONGEST * 255 * np.array(HEAT(1.0)[:3])
    np.testing.assert_allclose(drawn[80, 176], expected, atol=8)
    for even in (np.full((8, 8), np.nan), np.zeros((8, 8)), np.full((8, 8), 0.015)):
        assert (heat_overlay(image, even) == 127).all()


def test_what_is_not_read_does_not_count_as_an_even_share():
    heat = np.full((4, 4), np.nan)
    heat[0, :2] = 0.1, 0.3
    assert times_even(heat) == times_even(np.nan_to_num(heat)) == pytest.approx(1.5)
    assert times_even(np.zeros((2, 2))) == 0


def test_pictures_are_small_jpegs_with_their_words():
    rng = np.random.default_rng(0)
    cases = [
        Case(1, "best", 4, 1, 0.91),
        Case(1, "alarm", 2, 0, 0.77),
        Case(2, "missed", 0, 1, 0.1),
    ]
    images = rng.integers(0, 255, (3, 224, 224)).astype(np.uint8)
    made = case_pictures(cases, ["none", "covid <19>", "flu"], images, rng.random((3, 14, 14)))
    assert [p.alt.split(",")[0] for p in made] == [
        "Radiographs of covid <19>",
        "Radiographs of flu",
    ]
    assert "with it, scored highest, 0.910; without it, scored highest, 0.770" in made[0].caption
    sheet = Image.open(io.BytesIO(made[0].png))
    assert sheet.format == "JPEG"
    assert sheet.size[0] == 2 * 224 + 6
    assert len(made[0].png) < 200_000
    page = render(Report("t", "s", sections=[Section("Cases", pictures=made)]))
    assert page.count("data:image/jpeg;base64,") == 2
    assert "covid &lt;19&gt;" in page
