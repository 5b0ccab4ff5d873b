"""Linear probe and k-NN on cached features, against scikit-learn's, which a user would take.

    pytest benchmarks/bench_probe.py

100,000 training rows of 384 or 768 features (ViT-S's or ViT-B's cls, say; few directions carry most
of the variance, as in features of images), 14 labels of 2 to 40 % positives, each unknown in a
tenth of the rows; 5,000 rows to answer for. `linear`: our six penalties, one after the other, and
scikit-learn's `LogisticRegression` (L-BFGS, float32) of a single penalty, label by label. `k-NN`:
our six numbers of neighbours, and `NearestNeighbors` (cosine) of a single one, label by label.
AUROCs at that setting are asserted equal within .002 first. Two threads. scikit-learn's linear
probe is timed on two labels of the fourteen, and its k-NN on 500 of the 5,000 rows: its row's
microseconds are of those, and an image counts a label and row, so that the speeds compare.

Target: ours, all settings, below a minute.
"""

from functools import cache

import numpy as np
import pytest
import torch
from record import CORES
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from spcxr.models.neighbours import TEMPERATURE, neighbour_shares
from spcxr.recipes.frozen import NEIGHBOURS, PENALTIES
from spcxr.recipes.linear import LinearProblem

TRAIN, TEST, LABELS = 100_000, 5_000, 14
PENALTY, K, SOME_LABELS, SOME_ROWS = 1e-3, 50, 2, 500
MINUTE_US = 60e6

pytestmark = [
    pytest.mark.parametrize("device", ["cpu"]),
    pytest.mark.parametrize("threads", [CORES], indirect=True),
]


@cache
def data(features):
    """Standardised features, and labels that depend on them: training and test halves."""
    rng = np.random.default_rng(0)
    rows = TRAIN + TEST
    turn = np.linalg.qr(rng.normal(size=(features, features)))[0]
    x = rng.standard_normal((rows, features), np.float32) * np.geomspace(1, 0.02, features)
    values = np.empty((rows, LABELS), np.float32)
    for k, rate in enumerate(np.geomspace(0.02, 0.4, LABELS)):
        drawn = x @ rng.normal(size=features) + 4 * rng.normal(size=rows)
        values[:, k] = drawn > np.quantile(drawn, 1 - rate)
    x = x @ turn
    x = ((x - x.mean(0)) / x.std(0)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = np.nan
    return (x[:TRAIN], values[:TRAIN]), (x[TRAIN:], values[TRAIN:])


def our_linear(x, values, penalties):
    problem, start, found = LinearProblem(torch.from_numpy(x), values, multilabel=True), None, {}
    for penalty in penalties:
        found[penalty] = problem.fit(penalty, start)
        start = problem.solution
    return found


def their_linear(x, values, label):
    known = ~np.isnan(values[:, label])
    model = LogisticRegression(C=1 / (known.sum() * PENALTY), max_iter=1000)
    return model.fit(x[known], values[known, label])


def their_neighbours(x, values, asked, label):
    known = ~np.isnan(values[:, label])
    search = NearestNeighbors(n_neighbors=K, metric="cosine", algorithm="brute").fit(x[known])
    distance, place = search.kneighbors(asked)
    weight = np.exp(-distance / TEMPERATURE)
    return (weight * values[known, label][place]).sum(1) / weight.sum(1)


def auroc(values, scores):
    known = ~np.isnan(values)
    return roc_auc_score(values[known], scores[known])


@pytest.mark.parametrize("what", ["spcxr, 6 penalties", "scikit-learn, 1 penalty"])
@pytest.mark.parametrize("features", [384, 768])
def test_linear(timed, features, what, threads, device):
    (x, values), (asked, truth) = data(features)
    ours, group = what.startswith("spcxr"), f"linear, {features} features"
    if ours:
        found = timed(
            lambda: our_linear(x, values, PENALTIES),
            what=what, group=group, images=TRAIN * LABELS * len(PENALTIES), rounds=1,
        )  # fmt: skip
        weight, bias = found[PENALTY]
        scores = asked @ weight.numpy() + bias.numpy()
        for label in range(SOME_LABELS):
            theirs = their_linear(x, values, label).decision_function(asked)
            mine = auroc(truth[:, label], scores[:, label])
            assert mine == pytest.approx(auroc(truth[:, label], theirs), abs=0.002)
        timed.target("median_us", at_most=MINUTE_US)
    else:
        timed(
            lambda: [their_linear(x, values, label) for label in range(SOME_LABELS)],
            what=what, group=group, images=TRAIN * SOME_LABELS, rounds=1,
        )  # fmt: skip


@pytest.mark.parametrize("what", ["spcxr, 6 k", "scikit-learn, 1 k"])
@pytest.mark.parametrize("features", [384, 768])
def test_knn(timed, features, what, threads, device):
    (x, values), (asked, truth) = data(features)
    ours, group = what.startswith("spcxr"), f"k-NN, {features} features"
    arrays = [torch.from_numpy(a) for a in (asked, x, values)]
    if ours:
        found = timed(
            lambda: neighbour_shares(*arrays, NEIGHBOURS),
            what=what, group=group, images=TEST * LABELS * len(NEIGHBOURS), rounds=1,
        )[NEIGHBOURS.index(K)].numpy()  # fmt: skip
        theirs = their_neighbours(x, values, asked[:SOME_ROWS], LABELS - 1)
        mine = found[:SOME_ROWS, -1]
        scores = [auroc(truth[:SOME_ROWS, -1], s) for s in (mine, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=0.002)
        timed.target("median_us", at_most=MINUTE_US)
    else:
        timed(
            lambda: [their_neighbours(x, values, asked[:SOME_ROWS], n) for n in range(LABELS)],
            what=what, group=group, images=SOME_ROWS * LABELS, rounds=1,
        )  # fmt: skip
