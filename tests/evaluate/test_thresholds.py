"""Operating points are the best of all cuts, and the files that keep them are read with care."""

import json

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from torchmetrics.classification import (
    BinarySensitivityAtSpecificity,
    BinarySpecificityAtSensitivity,
)

from spcxr.errors import SpcxrError
from spcxr.evaluate.ranking import Ranking
from spcxr.evaluate.thresholds import (
    RULES,
    choose_thresholds,
    read_thresholds,
    write_thresholds,
)


def rates(labels, scores, cut):
    """(sensitivity, specificity) of a call at this score or more, counted out."""
    called = scores >= cut
    return called[labels == 1].mean(), (~called[labels == 0]).mean()


def samples():
    """Labels and scores: many ties, none, no skill, and worse than none."""
    rng = np.random.default_rng(5)
    for gain, digits in ((0.3, 1), (0.3, 6), (0.0, 2), (-0.3, 2)):
        labels = (rng.random(120) < 0.4).astype(float)
        yield labels, np.round(0.3 + 0.4 * rng.random(120) + gain * labels, digits)


@pytest.mark.parametrize(("labels", "scores"), list(samples()))
def test_no_other_cut_is_better(labels, scores):
    found = {
        rule: cut.item()
        for rule, cut in choose_thresholds(labels[:, None], scores[:, None]).items()
    }
    every = [rates(labels, scores, cut) for cut in [*np.unique(scores), np.inf]]
    sensitivity, specificity = rates(labels, scores, found["youden"])
    assert sensitivity + specificity == pytest.approx(max(a + b for a, b in every))
    sensitivity, specificity = rates(labels, scores, found["specificity_90"])
    assert specificity >= 0.9
    assert sensitivity == max(a for a, b in every if b >= 0.9)
    assert specificity == max(b for a, b in every if a == sensitivity)
    sensitivity, specificity = rates(labels, scores, found["sensitivity_90"])
    assert sensitivity >= 0.9
    assert specificity == max(b for a, b in every if a >= 0.9)


@pytest.mark.parametrize(("labels", "scores"), list(samples()))
def test_what_a_fixed_rate_allows_is_that_of_torchmetrics(labels, scores):
    steps = Ranking(labels, scores).steps()
    given = torch.tensor(scores), torch.tensor(labels).long()
    # its own sum in float32 misses a specificity of exactly 0.9 now and then: just below it
    theirs = BinarySensitivityAtSpecificity(0.9 - 1e-6)(*given)[0]
    assert steps.sensitivity_at(0.9) == pytest.approx([float(theirs)], abs=1e-6)
    theirs = BinarySpecificityAtSensitivity(0.9 - 1e-6)(*given)[0]
    assert steps.specificity_at(0.9) == pytest.approx([float(theirs)], abs=1e-6)


def test_a_fixed_rate_under_weights_is_that_of_repeated_rows():
    labels, scores = next(iter(samples()))
    weights = np.random.default_rng(0).integers(0, 4, (6, 120))
    steps = Ranking(labels, scores).steps(weights)
    for row, found, spared in zip(
        weights, steps.sensitivity_at(0.9), steps.specificity_at(0.9), strict=True
    ):
        drawn = np.repeat(np.arange(120), row)
        once = Ranking(labels[drawn], scores[drawn]).steps()
        assert (found, spared) == (once.sensitivity_at(0.9)[0], once.specificity_at(0.9)[0])
        fpr, tpr, _ = sk.roc_curve(labels[drawn], scores[drawn], drop_intermediate=False)
        assert found == pytest.approx(tpr[fpr <= 0.1 + 1e-12].max())
        assert spared == pytest.approx(1 - fpr[tpr >= 0.9 - 1e-12].min())


def test_exactly_nine_of_ten_is_enough():
    """0.9 has no exact float: 9 of 10 must still count as 0.9."""
    for size in (10, 20, 30, 70, 110, 1000):
        labels = np.repeat([0.0, 1.0], size)
        spared = np.concatenate([np.arange(size), np.full(size, 0.9 * size - 0.5)])
        assert Ranking(labels, spared).steps().sensitivity_at(0.9).tolist() == [1.0]
        found = np.concatenate([np.full(size, 0.1 * size - 0.5), np.arange(size)])
        assert Ranking(labels, found).steps().specificity_at(0.9).tolist() == [1.0]
        cuts = choose_thresholds(labels[:, None], spared[:, None])
        assert rates(labels, spared, cuts["specificity_90"][0]) == (1.0, pytest.approx(0.9))
        cuts = choose_thresholds(labels[:, None], found[:, None])
        assert rates(labels, found, cuts["sensitivity_90"][0]) == (pytest.approx(0.9), 1.0)


def test_a_cut_lies_between_two_scores():
    found = choose_thresholds(np.array([[0.0], [1.0]]), np.array([[0.2], [0.6]]))
    assert {rule: cut.tolist() for rule, cut in found.items()} == {rule: [0.4] for rule in RULES}


def test_a_cut_parts_scores_that_are_neighbours():
    """Sigmoids run full: 1 and the number before it."""
    for start in (1.0, 0.5, np.nextafter(0.5, 0), np.nextafter(1.0, 0)):
        pair = np.array([[start], [np.nextafter(start, 0)]])
        for cut in choose_thresholds(np.array([[1.0], [0.0]]), pair).values():
            assert rates(np.array([1.0, 0.0]), pair[:, 0], cut[0]) == (1.0, 1.0)


def test_unknown_rows_are_left_out_and_one_kind_is_nan():
    values = np.array([[0.0, 1, np.nan], [1.0, 1, np.nan], [np.nan, np.nan, np.nan]])
    scores = np.array([[0.2, 0.1, 0.3], [0.6, 0.2, 0.3], [0.5, 0.3, 0.3]])
    for cuts in choose_thresholds(values, scores).values():
        np.testing.assert_allclose(cuts, [0.4, np.nan, np.nan])
    with pytest.raises(SpcxrError, match="NaN"):
        choose_thresholds(values[:, :1], scores[:, :1] * np.nan)
    with pytest.raises(SpcxrError, match="two \\(n, K\\) arrays"):
        choose_thresholds(values, scores[:, :1])


def test_thresholds_are_read_as_they_were_written(tmp_path):
    assert read_thresholds(tmp_path, ("a", "b")) is None
    given = {rule: np.array([0.1234567890123456, np.nan]) for rule in RULES}
    path = write_thresholds(tmp_path, ("a", "b"), given)
    found = read_thresholds(tmp_path, ("a", "b"))
    assert list(found) == list(RULES)
    for rule in RULES:
        np.testing.assert_array_equal(found[rule], given[rule])
    said = json.loads(path.read_text())
    assert said["thresholds"]["youden"] == {"a": 0.1234567890123456, "b": None}
    with pytest.raises(SpcxrError, match="is of the labels a, b, the model of b, a"):
        read_thresholds(tmp_path, ("b", "a"))


@pytest.mark.parametrize(
    "text",
    [
        '{"labels": ["a"], "thres',
        '{"labels": 3}',
        '{"labels": ["a"]}',
        '{"labels": ["a"], "thresholds": {"youden": 0.4}}',
        '{"labels": ["a"], "thresholds": {"youden": {"b": 0.4}}}',
        '{"labels": ["a"], "thresholds": {"youden": {"a": "high"}}}',
    ],
)
def test_a_torn_file_is_refused(tmp_path, text):
    (tmp_path / "thresholds.json").write_text(text)
    with pytest.raises(SpcxrError, match=r"thresholds.json: cannot be read; delete it"):
        read_thresholds(tmp_path, ("a",))
