"""A summary's figures are those of scikit-learn and torchmetrics, by label and over all."""

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from scipy.special import softmax
from torchmetrics.classification import (
    MultilabelAccuracy,
    MultilabelAUROC,
    MultilabelF1Score,
    MultilabelSpecificity,
)

from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics, pages
from spcxr.evaluate.calibration import brier, calibration_error
from spcxr.evaluate.delong import delong_interval
from spcxr.evaluate.intervals import bootstrap_all, paired_bootstrap
from spcxr.evaluate.label_metrics import METRICS, LabelMetrics
from spcxr.evaluate.summary import summarise_classes

NAMES = ("a", "b", "c")
CUTS = np.array([0.4, 0.5, 0.6])


@pytest.fixture(scope="module")
def several():
    """150 rows of 60 patients, three labels of which some are unknown; scores with ties."""
    rng = np.random.default_rng(2)
    labels = (rng.random((150, 3)) < [0.3, 0.5, 0.2]).astype(float)
    scores = np.round(0.2 + 0.5 * rng.random((150, 3)) + 0.2 * labels, 2)
    labels[rng.random((150, 3)) < 0.2] = np.nan
    return labels, scores, rng.integers(0, 60, 150)


@pytest.fixture(scope="module")
def summary(several):
    return summarise_classes(*several, NAMES, multilabel=True, n=300, seed=1, threshold=CUTS)


@pytest.fixture(scope="module")
def one_of_four():
    rng = np.random.default_rng(3)
    answer = rng.integers(0, 4, 200)
    scores = softmax(rng.normal(size=(200, 4)) + 1.5 * np.eye(4)[answer], axis=1)
    return answer, scores, rng.integers(0, 90, 200)


def of_scikit_learn(labels, scores, cut):
    """The metrics of one label, NaN left out."""
    known = ~np.isnan(labels)
    y, s = labels[known], scores[known]
    called = s >= cut
    fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
    return {
        "auroc": sk.roc_auc_score(y, s),
        "average_precision": sk.average_precision_score(y, s),
        "sensitivity_at_specificity_90": tpr[fpr <= 0.1 + 1e-12].max(),
        "specificity_at_sensitivity_90": 1 - fpr[tpr >= 0.9 - 1e-12].min(),
        "sensitivity": sk.recall_score(y, called),
        "specificity": sk.recall_score(y, called, pos_label=0),
        "accuracy": sk.accuracy_score(y, called),
        "balanced_accuracy": sk.balanced_accuracy_score(y, called),
        "f1": sk.f1_score(y, called),
        "brier": sk.brier_score_loss(y, s),
        "ece": float(calibration_error(y, s)),
    }


def test_every_label_is_that_of_scikit_learn(several, summary):
    labels, scores, _ = several
    every = []
    for k, name in enumerate(NAMES):
        expected = of_scikit_learn(labels[:, k], scores[:, k], CUTS[k])
        assert {key: i.value for key, i in summary.by_class[name].items()} == pytest.approx(
            expected
        )
        every.append(expected)
    for key in METRICS:
        mean = np.mean([found[key] for found in every])
        assert summary.overall[f"macro_{key}"].value == pytest.approx(mean)
    assert summary.threshold == tuple(CUTS.tolist())


def test_means_are_those_of_torchmetrics(several, summary):
    labels, scores, _ = several
    given = torch.tensor(scores), torch.tensor(np.nan_to_num(labels, nan=-1)).long()
    same = {"num_labels": 3, "ignore_index": -1}
    judged = MultilabelAUROC(**same)(*given)
    assert summary.overall["macro_auroc"].value == pytest.approx(float(judged), abs=1e-6)
    # they cut all labels at 0.5
    moved = torch.tensor(np.minimum(scores - CUTS + 0.5 + 1e-9, 1.0)), given[1]
    for judge, key in (
        (MultilabelF1Score, "f1"),
        (MultilabelSpecificity, "specificity"),
        (MultilabelAccuracy, "accuracy"),
    ):
        judged = judge(**same)(*moved)
        assert summary.overall[f"macro_{key}"].value == pytest.approx(float(judged), abs=1e-6)


def test_resamples_are_rows_repeated(several):
    """Every metric of every label, for weights, is that of the rows written out."""
    labels, scores, _ = several
    weights = np.random.default_rng(0).integers(0, 4, (4, 150))
    found = LabelMetrics(labels, scores, (scores >= CUTS) * 1.0)(weights)
    for r, row in enumerate(weights):
        drawn = np.repeat(np.arange(150), row)
        for k in range(3):
            expected = of_scikit_learn(labels[drawn, k], scores[drawn, k], CUTS[k])
            assert {key: found[key][r, k] for key in METRICS} == pytest.approx(expected)


def test_intervals_are_those_of_each_metric_by_itself(several, summary):
    labels, scores, patients = several
    y, s = labels[:, 0], scores[:, 0]
    alone = bootstrap_all(
        patients,
        {
            "auroc": lambda w: metrics.auroc(y, s, w),
            "brier": lambda w: brier(y, s, w),
            "ece": lambda w: calibration_error(y, s, w),
        },
        n=300,
        seed=1,
    )
    for key, expected in alone.items():
        found = summary.by_class["a"][key]
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert summary.by_class["a"]["auroc"].n_rows == np.count_nonzero(~np.isnan(y))
    who = patients[~np.isnan(y)]
    assert summary.by_class["a"]["auroc"].n_patients == len(np.unique(who))
    assert summary.delong["a"] == delong_interval(y, s, patients)


def test_one_class_of_many_is_that_of_scikit_learn(one_of_four):
    answer, scores, patients = one_of_four
    made = summarise_classes(
        np.eye(4)[answer], scores, patients, tuple("wxyz"), multilabel=False, n=100
    )
    guess = scores.argmax(1)
    expected = {
        "macro_auroc": sk.roc_auc_score(answer, scores, multi_class="ovr"),
        "accuracy": sk.accuracy_score(answer, guess),
        "balanced_accuracy": sk.balanced_accuracy_score(answer, guess),
        "macro_f1": sk.f1_score(answer, guess, average="macro"),
        "brier": sk.brier_score_loss(answer, scores, scale_by_half=False),
        "ece": float(calibration_error(answer == guess, scores.max(1))),
    }
    assert {key: made.overall[key].value for key in expected} == pytest.approx(expected)
    np.testing.assert_array_equal(made.confusion, sk.confusion_matrix(answer, guess))
    one = of_scikit_learn((answer == 2) * 1.0, scores[:, 2], 0.5)
    for key in ("auroc", "average_precision", "brier", "ece", "specificity_at_sensitivity_90"):
        assert made.by_class["y"][key].value == pytest.approx(one[key])
    assert made.threshold is None


def test_two_models_compare_by_their_statistics(several, summary):
    labels, scores, patients = several
    other = summarise_classes(
        labels, 1 - scores, patients, NAMES, multilabel=True, n=300, seed=1, threshold=CUTS
    )
    key = "macro_auroc"
    apart = paired_bootstrap(
        summary.patients, summary.statistics[key], other.statistics[key], n=100, seed=0
    )
    expected = summary.overall[key].value - other.overall[key].value
    assert apart.value == pytest.approx(expected)


def test_a_label_without_a_threshold_is_not_called(several):
    labels, scores, patients = several
    made = summarise_classes(
        labels, scores, patients, NAMES, multilabel=True, n=50,
        threshold=np.array([np.nan, 0.5, 0.6]),
    )  # fmt: skip
    for key in ("sensitivity", "specificity", "accuracy", "balanced_accuracy", "f1"):
        assert np.isnan(made.by_class["a"][key].value)
        others = [made.by_class[name][key].value for name in "bc"]
        assert made.overall[f"macro_{key}"].value == pytest.approx(np.mean(others))
    assert made.by_class["a"]["auroc"].value > 0.5
    assert "a none, b 0.5, c 0.6" in pages.class_tables(made)[1].note


def test_a_label_without_rows_of_a_kind_is_named_and_counted():
    labels = np.zeros((40, 3))
    labels[:20, 0] = 1
    labels[0, 1] = 1
    labels[:, 2] = np.nan
    scores = np.random.default_rng(0).random((40, 3))
    made = summarise_classes(labels, scores, np.arange(40), NAMES, multilabel=True, n=200)
    assert made.left_out == ("c",)
    assert np.isnan([i.value for i in made.by_class["c"].values()]).all()
    assert made.by_class["c"]["auroc"].n_rows == 0
    assert made.positives == {"a": (20, 40), "b": (1, 40), "c": (0, 0)}
    missed = made.by_class["b"]["auroc"].n_undefined
    assert 40 < missed < 110  # of 200, a resample misses the one positive with (39/40)^40 = 0.36
    note = pages.class_table("", made).note
    assert f"Resamples without a case, left out of an interval: b {missed}." in note
    assert "for want of positive or negative rows: c." in note


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1.2, -0.1])
def test_probabilities_that_are_none_are_refused(several, broken):
    labels, scores, patients = several
    row = int(np.flatnonzero(~np.isnan(labels[:, 1]))[3])
    scores = scores.copy()
    scores[row, 1] = broken
    with pytest.raises(SpcxrError, match=r"1 of 150 rows \(the first is row \d+\) have a probab"):
        summarise_classes(labels, scores, patients, NAMES, multilabel=True, n=10)
