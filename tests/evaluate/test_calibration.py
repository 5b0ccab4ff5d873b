"""Calibration error and Brier score equal others'; temperatures are where the loss is least."""

import json

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from scipy.optimize import minimize_scalar
from scipy.special import expit, softmax
from torchmetrics.classification import BinaryCalibrationError, MulticlassCalibrationError

from spcxr.errors import SpcxrError
from spcxr.evaluate.calibration import (
    _loss,
    apply_temperature,
    brier,
    calibration_error,
    fit_temperature,
    read_calibration,
    reliability_curve,
    settle_operating_point,
    top_label,
    write_calibration,
)
from spcxr.evaluate.thresholds import read_thresholds

NAMES = ("a", "b", "c")


@pytest.fixture
def binary():
    rng = np.random.default_rng(7)
    labels = (rng.random(300) < 0.3).astype(float)
    return labels, rng.random(300) * 0.6 + 0.3 * labels


@pytest.fixture
def logits():
    """400 rows of three labels whose logits are twice, half, and once what they should be."""
    rng = np.random.default_rng(3)
    true = rng.normal(size=(4000, 3)) * 2
    values = (rng.random((4000, 3)) < expit(true)).astype(float)
    return true * [2.0, 0.5, 1.0], values


# --- measures -------------------------------------------------------------------------------


def test_brier_is_that_of_scikit_learn(binary):
    labels, scores = binary
    weights = np.random.default_rng(0).integers(0, 4, (4, 300))
    for row, found in zip(weights, brier(labels, scores, weights), strict=True):
        assert found == pytest.approx(sk.brier_score_loss(labels, scores, sample_weight=row))
    assert brier(labels, scores) == pytest.approx(sk.brier_score_loss(labels, scores))


def test_the_calibration_error_is_that_of_torchmetrics(binary):
    labels, scores = binary
    judge = BinaryCalibrationError(n_bins=15, norm="l1")
    expected = judge(torch.tensor(scores), torch.tensor(labels).long())
    assert calibration_error(labels, scores) == pytest.approx(float(expected), abs=1e-6)


def test_of_one_class_of_many_the_highest_probability_counts():
    rng = np.random.default_rng(1)
    scores = softmax(rng.normal(size=(500, 4)) * 2, axis=1)
    answer = rng.integers(0, 4, 500)
    judge = MulticlassCalibrationError(num_classes=4, n_bins=15, norm="l1")
    expected = judge(torch.tensor(scores), torch.tensor(answer))
    found = calibration_error(*top_label(np.eye(4)[answer], scores))
    assert found == pytest.approx(float(expected), abs=1e-6)


def test_a_weight_is_a_repeated_row(binary):
    labels, scores = binary
    weights = np.random.default_rng(0).integers(0, 4, (5, 300))
    for metric in (brier, calibration_error):
        for row, found in zip(weights, metric(labels, scores, weights), strict=True):
            drawn = np.repeat(np.arange(300), row)
            assert found == pytest.approx(metric(labels[drawn], scores[drawn]))


def test_ends_of_bins_and_rows_without_a_label():
    labels, scores = [0, 1, np.nan, 1], [0.0, 1.0, 0.4, 2 / 15]
    means, shares, counts = reliability_curve(labels, scores)
    np.testing.assert_allclose(means, [0, 2 / 15, 1])  # a bin holds its upper end
    np.testing.assert_allclose(shares, [0, 1, 1])
    assert counts.tolist() == [1, 1, 1]
    assert calibration_error(labels, scores) == pytest.approx((13 / 15) / 3)
    assert brier(labels, scores) == pytest.approx((13 / 15) ** 2 / 3)
    assert np.isnan([brier([np.nan], [0.5]), calibration_error([np.nan], [0.5])]).all()
    assert np.isnan(brier([0, 1], [0.5, 0.5], [[0, 0], [1, 0]])).tolist() == [True, False]


@pytest.mark.parametrize(("score", "said"), [(1.5, "no probabilities"), (np.nan, "NaN")])
def test_what_is_no_probability_is_refused(score, said):
    for metric in (brier, calibration_error, reliability_curve):
        with pytest.raises(SpcxrError, match=said):
            metric([0, 1], [0.1, score])


# --- temperature ----------------------------------------------------------------------------


def test_the_temperature_of_each_label_is_found(logits):
    given, values = logits
    found = fit_temperature(given, values, multilabel=True)
    np.testing.assert_allclose(found, [2.0, 0.5, 1.0], rtol=0.1)
    for k, temperature in enumerate(found):
        around = temperature * np.array([0.9, 0.99, 1.0, 1.01, 1.1])
        losses = [_loss(given[:, [k]] / t, values[:, [k]], True) for t in around]
        assert np.argmin(losses) == 2
    tempered = expit(apply_temperature(given, found))
    for k in range(2):
        before, after = (calibration_error(values[:, k], p[:, k]) for p in (expit(given), tempered))
        assert after < 0.5 * before


def test_one_temperature_for_one_class_of_many():
    rng = np.random.default_rng(4)
    true = rng.normal(size=(3000, 4)) * 2
    answer = (softmax(true, axis=1).cumsum(1) > rng.random((3000, 1))).argmax(1)
    values = np.eye(4)[answer]
    values[:50] = np.nan
    found = fit_temperature(true * 3, values, multilabel=False)
    assert found == pytest.approx([3.0], rel=0.1)
    losses = [_loss(true * 3 / t, values, False) for t in found[0] * np.array([0.98, 1, 1.02])]
    assert np.argmin(losses) == 1
    judge = minimize_scalar(
        lambda beta: sk.log_loss(answer[50:], softmax(beta * 3 * true[50:], axis=1)),
        bounds=(0.1, 10),
        options={"xatol": 1e-8},
    )
    assert found[0] == pytest.approx(1 / judge.x, rel=1e-5)


def test_unknown_labels_change_no_temperature(logits):
    given, values = logits[0][:500], logits[1][:500].copy()
    values[::3, 0] = np.nan
    found = fit_temperature(given, values, multilabel=True)
    known = ~np.isnan(values[:, 0])
    alone = fit_temperature(given[known][:, :1], values[known][:, :1], multilabel=True)
    assert found[0] == alone[0]


def test_where_it_cannot_be_fitted_it_is_nan_and_changes_nothing():
    logits = np.array([[3.0, 3.0, 3.0, 2.0], [-3.0, -3.0, 3.0, 1.0]])
    values = np.array([[1.0, 0.0, 1.0, np.nan], [0.0, 1.0, 1.0, np.nan]])
    # told apart without an error; wrong both times; one kind of row; unknown
    found = fit_temperature(logits, values, multilabel=True)
    assert np.isnan(found).all()
    np.testing.assert_array_equal(apply_temperature(logits, found), logits)
    assert np.isnan(fit_temperature(logits[:, :2], np.eye(2), multilabel=False)).all()
    assert fit_temperature(logits[:0], values[:0], multilabel=False).shape == (1,)


def test_broken_logits_and_shapes_are_refused():
    with pytest.raises(SpcxrError, match="NaN or infinity"):
        fit_temperature(np.array([[np.inf]]), np.array([[1.0]]), multilabel=True)
    with pytest.raises(SpcxrError, match="two \\(n, K\\) arrays"):
        fit_temperature(np.zeros((2, 3)), np.zeros((2, 2)), multilabel=True)
    with pytest.raises(SpcxrError, match="one a label"):
        apply_temperature(np.zeros((2, 3)), np.ones(2))


# --- beside the model -----------------------------------------------------------------------


def test_temperatures_are_read_as_they_were_written(tmp_path):
    assert read_calibration(tmp_path, NAMES) is None
    given = np.array([1.2345678901234567, np.nan, 0.7])
    path = write_calibration(tmp_path, NAMES, given, {"rows": 70})
    np.testing.assert_array_equal(read_calibration(tmp_path, NAMES), given)
    said = json.loads(path.read_text())
    assert said["temperature"] == {"a": 1.2345678901234567, "b": None, "c": 0.7}
    assert said["rows"] == 70
    write_calibration(tmp_path, NAMES, np.array([2.5]), {})
    assert read_calibration(tmp_path, NAMES).tolist() == [2.5]
    write_calibration(tmp_path, ("a",), np.array([2.5]), {})
    assert read_calibration(tmp_path, ("a",)).tolist() == [2.5]
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"labels": ["a", "b", "c"]}',
        '{"labels": ["a", "b", "c"], "temperature": {"a": 1, "b": 1}}',
        '{"labels": ["a", "b", "c"], "temperature": "hot"}',
        '{"labels": ["a", "b", "c"], "temperature": 0}',
        '{"labels": ["a", "b", "c"], "temperature": [1, 1, 1]}',
    ],
)
def test_a_torn_file_is_refused(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(SpcxrError, match=r"calibration.json: cannot be read; delete it"):
        read_calibration(tmp_path, NAMES)


def test_a_file_of_other_labels_is_refused(tmp_path):
    write_calibration(tmp_path, ("b", "a"), np.array([1.0, 2.0]), {})
    with pytest.raises(SpcxrError, match="is of the labels b, a, the model of a, b"):
        read_calibration(tmp_path, ("a", "b"))


@pytest.mark.parametrize("multilabel", [True, False])
def test_the_operating_point_of_a_model(tmp_path, logits, multilabel):
    given, values = logits[0][:600].astype(np.float32), logits[1][:600].copy()
    if not multilabel:
        values = np.eye(3)[values.argmax(1)]
    values[:40] = np.nan
    settle_operating_point(tmp_path, NAMES, given, values, multilabel=multilabel)
    temperatures = read_calibration(tmp_path, NAMES)
    np.testing.assert_array_equal(
        temperatures, fit_temperature(given, values, multilabel=multilabel)
    )
    said = json.loads((tmp_path / "calibration.json").read_text())
    assert said["rows"] == dict.fromkeys(NAMES, 560)
    assert said["loss before and after"][1] < said["loss before and after"][0]
    # the thresholds are those of the tempered probabilities
    tempered = apply_temperature(given, temperatures)
    scores = expit(tempered) if multilabel else softmax(tempered, axis=1)
    cuts = read_thresholds(tmp_path, NAMES)["sensitivity_90"]
    for k in range(3):
        positive = values[:, k] == 1
        assert 0.9 <= (scores[positive, k] >= cuts[k]).mean() < 0.92


@pytest.mark.parametrize("multilabel", [True, False])
@pytest.mark.parametrize("rows", [0, 5])
def test_validation_rows_without_a_label_settle_nothing(tmp_path, rows, multilabel):
    given, values = np.zeros((rows, 3), np.float32), np.full((rows, 3), np.nan)
    settle_operating_point(tmp_path, NAMES, given, values, multilabel=multilabel)
    assert np.isnan(read_calibration(tmp_path, NAMES)).all()
    for cuts in read_thresholds(tmp_path, NAMES).values():
        assert np.isnan(cuts).all()
    said = json.loads((tmp_path / "calibration.json").read_text())
    assert said["loss before and after"] == [None, None]
