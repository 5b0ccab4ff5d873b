"""What a bootstrap interval of the AUROC costs, against a loop over scikit-learn.

    pytest benchmarks/bench_bootstrap.py

2,000 resamples of the patients of a test set: 10^5 rows, each its own patient, or two thirds as
many patients; one label (one row in ten positive), or 14 labels and the mean of them from one pass.
Scikit-learn is called once a resample, on the rows drawn; of its 2,000 resamples `SAMPLE` are
timed and the rest extrapolated (`cpu_s_of_2000`): they cost the same. An "image" of the tables is
a resample. Two resamples' values are asserted equal before anything is timed. Real scores tie now
and then: these are float32.

Targets: 10 times the speed of the loop; 2,000 resamples of one label in 5 s, of 14 in 30 s.
"""

import time

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy.special import expit

from spcxr.evaluate.intervals import bootstrap, resample_counts
from spcxr.evaluate.ranking import Ranking

ROWS, LABELS, RESAMPLES, SAMPLE = 100_000, 14, 2000, 10

pytestmark = pytest.mark.parametrize("device", ["cpu"])


def rows(labels):
    """Labels and scores ``(n, K)``: one row in ten is positive, an AUROC of 0.76."""
    draw = np.random.default_rng(0)
    truth = (draw.random((ROWS, labels)) < 0.1).astype(float)
    return truth, expit(draw.normal(size=truth.shape) + truth).astype(np.float32)


def patients(kind):
    return np.arange(ROWS) if kind == "rows" else np.random.default_rng(1).integers(0, 66_000, ROWS)


def mean_auroc(rankings):
    return lambda weights: np.mean([ranking.auroc(weights) for ranking in rankings], axis=0)


def by_loop(truth, scores, counts):
    """Scikit-learn's mean AUROC of each resample ``(R, n)``."""
    found = []
    for row in counts:
        drawn = np.repeat(np.arange(ROWS), row.astype(int))
        labels = zip(truth[drawn].T, scores[drawn].T, strict=True)
        found.append(np.mean([sk.roc_auc_score(t, s) for t, s in labels]))
    return np.array(found)


@pytest.mark.parametrize("kind", ["rows", "patients"])
@pytest.mark.parametrize("labels", [1, LABELS])
@pytest.mark.parametrize("way", ["spcxr", "scikit-learn"])
def test_bootstrap(timed, way, labels, kind):
    truth, scores = rows(labels)
    who, spent = patients(kind), []
    few = np.concatenate(list(resample_counts(who, n=SAMPLE, seed=0)))

    def ours():
        rankings = [Ranking(t, s) for t, s in zip(truth.T, scores.T, strict=True)]
        return bootstrap(who, mean_auroc(rankings), n=RESAMPLES, seed=0)

    def call():
        began = time.process_time()
        found = ours() if way == "spcxr" else by_loop(truth, scores, few)
        spent.append(time.process_time() - began)
        return found

    rankings = [Ranking(t, s) for t, s in zip(truth.T, scores.T, strict=True)]
    np.testing.assert_allclose(mean_auroc(rankings)(few[:2]), by_loop(truth, scores, few[:2]))
    count = RESAMPLES if way == "spcxr" else SAMPLE
    timed(call, what=way, group=f"{labels} of {kind}", images=count, rounds=1)
    timed.row["cpu_s_of_2000"] = spent[-1] / count * RESAMPLES
    timed.row["resamples_timed"] = count
    if way == "spcxr":
        timed.target("cpu_s_of_2000", at_most=5 if labels == 1 else 30)
        timed.target("speed", at_least=10, of="scikit-learn")
