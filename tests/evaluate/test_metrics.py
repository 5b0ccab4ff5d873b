"""Metrics equal those of scikit-learn, torchmetrics and MONAI, also under bootstrap weights."""

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from monai.metrics import DiceMetric, MeanIoU
from torchmetrics.classification import MultilabelAUROC, MultilabelAveragePrecision

from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics


@pytest.fixture
def binary():
    """60 labels with scores on a coarse grid: many ties, within and between the classes."""
    rng = np.random.default_rng(7)
    labels = (rng.random(60) < 0.3).astype(float)
    return labels, np.round(rng.random(60) * 0.6 + 0.3 * labels, 1)


def test_rank_metrics_equal_scikit_learn_with_ties(binary):
    labels, scores = binary
    assert metrics.auroc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores))
    expected = sk.average_precision_score(labels, scores)
    assert metrics.average_precision(labels, scores) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (metrics.auroc, sk.roc_auc_score),
        (metrics.average_precision, sk.average_precision_score),
    ],
)
def test_a_weight_is_a_repeated_row(binary, ours, theirs):
    labels, scores = binary
    counts = np.random.default_rng(0).integers(0, 4, (5, 60))
    found = ours(labels, scores, counts)
    for row, value in zip(counts, found, strict=True):
        drawn = np.repeat(np.arange(60), row)
        assert value == pytest.approx(theirs(labels[drawn], scores[drawn]))
        assert ours(labels, scores, row) == pytest.approx(value)


def test_undefined_is_nan_for_that_resample_only():
    weights = [[1, 1, 1], [0, 1, 1], [1, 0, 0]]
    found = metrics.auroc([1, 0, 0], [0.9, 0.1, 0.2], weights)
    np.testing.assert_array_equal(found, [1, np.nan, np.nan])
    precision = metrics.average_precision([1, 0, 0], [0.9, 0.1, 0.2], weights)
    np.testing.assert_array_equal(precision, [1, np.nan, 1])
    assert np.isnan(metrics.auroc([], []))


def test_unknown_labels_are_left_out_by_column():
    rng = np.random.default_rng(1)
    labels = (rng.random((80, 3)) < 0.4).astype(float)
    labels[rng.random((80, 3)) < 0.3] = np.nan
    scores = rng.random((80, 3))
    marked = torch.tensor(np.nan_to_num(labels, nan=-1)).long()
    for ours, theirs in (
        (metrics.auroc, MultilabelAUROC),
        (metrics.average_precision, MultilabelAveragePrecision),
    ):
        judge = theirs(num_labels=3, average=None, ignore_index=-1)
        expected = judge(torch.tensor(scores), marked)
        np.testing.assert_allclose(metrics.by_class(ours, labels, scores), expected, atol=1e-6)


def test_curves_are_those_of_scikit_learn(binary):
    labels, scores = binary
    fpr, tpr, _ = sk.roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_allclose(metrics.roc_curve(labels, scores), (fpr, tpr))
    precision, recall, _ = sk.precision_recall_curve(labels, scores)
    found_recall, found_precision = metrics.precision_recall_curve(labels, scores)
    np.testing.assert_allclose(found_precision[::-1], precision[:-1])
    np.testing.assert_allclose(found_recall[::-1], recall[:-1])


def test_the_area_under_the_curve_read_off_is_the_auroc(binary):
    labels, scores = binary
    weights = np.random.default_rng(2).integers(0, 3, (4, 60))
    grid = np.linspace(0, 1, 20001)
    curves = metrics.sensitivity_at(labels, scores, grid, weights)
    areas = np.trapezoid(curves, grid, axis=1)
    np.testing.assert_allclose(areas, metrics.auroc(labels, scores, weights), atol=1e-3)


def test_precision_read_off_is_that_of_scikit_learn(binary):
    labels, scores = binary
    weights = np.random.default_rng(2).integers(0, 3, (4, 60))
    grid = np.linspace(0, 1, 101)
    for row, found in zip(
        weights, metrics.precision_at(labels, scores, grid, weights), strict=True
    ):
        drawn = np.repeat(np.arange(60), row)
        precision, recall, _ = sk.precision_recall_curve(labels[drawn], scores[drawn])
        for rate, read in zip(grid, found, strict=True):
            # thresholds fall from the end; recall 0 is the first one found
            first = np.flatnonzero(recall >= max(rate - 1e-12, 1e-9))[-1]
            assert read == pytest.approx(precision[first])
    assert np.isnan(metrics.precision_at([0, 0], [0.1, 0.2], grid)).all()


def test_decision_metrics_equal_scikit_learn():
    rng = np.random.default_rng(3)
    labels, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    weights = rng.integers(0, 3, (3, 200))
    matrices = metrics.confusion_matrix(labels, predicted, 4, weights)
    for row, found in zip(weights, matrices, strict=True):
        given = {"sample_weight": row}
        np.testing.assert_allclose(found, sk.confusion_matrix(labels, predicted, **given))
        assert metrics.accuracy(found) == pytest.approx(
            sk.accuracy_score(labels, predicted, **given)
        )
        balanced = sk.balanced_accuracy_score(labels, predicted, **given)
        assert metrics.balanced_accuracy(found) == pytest.approx(balanced)
        for ours, theirs in (
            (metrics.f1, sk.f1_score),
            (metrics.recall, sk.recall_score),
            (metrics.precision, sk.precision_score),
        ):
            np.testing.assert_allclose(
                ours(found), theirs(labels, predicted, average=None, **given)
            )


def test_decision_metrics_without_cases_are_nan():
    nobody = np.zeros((2, 2))
    assert np.isnan(metrics.accuracy(nobody))
    assert np.isnan(metrics.balanced_accuracy(nobody))
    healthy = metrics.confusion_matrix([0, 0, np.nan], [0, 1, 1], 2)
    assert healthy.sum() == 2
    assert np.isnan(metrics.sensitivity(healthy))
    assert metrics.specificity(healthy) == 0.5
    assert metrics.f1(healthy)[1] == 0.0


def test_overlap_equals_monai_where_the_true_mask_is_not_empty():
    rng = np.random.default_rng(4)
    predicted, truth = rng.random((2, 6, 16, 16)) < [[[[0.3]]], [[[0.5]]]]
    given = [torch.tensor(m[:, None]).float() for m in (predicted, truth)]
    np.testing.assert_allclose(metrics.dice(predicted, truth), DiceMetric()(*given)[:, 0])
    np.testing.assert_allclose(metrics.iou(predicted, truth), MeanIoU()(*given)[:, 0])


def test_overlap_of_empty_masks_and_unknown_pixels():
    empty, full = np.zeros((1, 2, 2)), np.ones((1, 2, 2))
    assert np.isnan(metrics.dice(empty, empty)).all()
    assert metrics.dice(full, empty).tolist() == metrics.iou(empty, full).tolist() == [0.0]
    left = np.array([[[True, False], [True, False]]])
    assert metrics.dice(full, left).tolist() == [pytest.approx(2 / 3)]
    assert metrics.dice(full, left, known=left).tolist() == [1.0]


@pytest.mark.parametrize(
    ("labels", "scores", "weights", "said"),
    [
        ([0, -1], [0.1, 0.2], None, "uncertain"),
        ([0, 1], [0.1, np.nan], None, "NaN"),
        ([0, 1], [0.1], None, "two \\(n,\\) arrays"),
        ([0, 1], [0.1, 0.2], [1, 1, 1], "one weight a row"),
    ],
)
def test_what_cannot_be_is_refused(labels, scores, weights, said):
    with pytest.raises(SpcxrError, match=said):
        metrics.auroc(labels, scores, weights)


def test_masks_and_classes_that_cannot_be_are_refused():
    with pytest.raises(SpcxrError, match="one size"):
        metrics.dice(np.zeros((1, 2, 2)), np.zeros((1, 3, 2)))
    with pytest.raises(SpcxrError, match="a class number outside"):
        metrics.confusion_matrix([0, 2], [0, 1], 2)


def test_weights_that_may_not_be_written_to_are_read(binary):
    labels, scores = binary
    for kind in (np.float32, np.float64):
        weights = np.broadcast_to(np.ones(60, kind), (3, 60))
        np.testing.assert_allclose(
            metrics.auroc(labels, scores, weights), sk.roc_auc_score(labels, scores)
        )
