"""Distances between sets of features: against the formulas written out, and what they promise."""

import time

import numpy as np
import pytest
from scipy.linalg import sqrtm
from sklearn.covariance import LedoitWolf

from spcxr.errors import SpcxrError
from spcxr.evaluate.distance import frechet, mmd


def by_hand(a, b, who_a, who_b, width):
    """Gretton's equation 3, pair by pair, without pairs of one patient."""

    def k(x, y):
        return np.exp(-((x - y) ** 2).sum() / (2 * width**2))

    def within(x, who):
        pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if who[i] != who[j]]
        return np.mean([k(x[i], x[j]) for i, j in pairs])

    cross = np.mean([k(x, y) for x in a for y in b])
    return within(a, who_a) + within(b, who_b) - 2 * cross


@pytest.mark.parametrize("rows_a_patient", [1, 3])
def test_mmd_equals_the_formula(rows_a_patient):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(12, 5)), rng.normal(size=(9, 5)) + 0.5
    who_a, who_b = np.arange(12) // rows_a_patient, np.arange(9) // rows_a_patient
    shuffled = rng.permutation(12)  # rows of a patient need not stand together
    found = mmd(a[shuffled], b, (who_a[shuffled], who_b))
    assert found.mmd2 == pytest.approx(by_hand(a, b, who_a, who_b, found.width), abs=1e-5)


def test_rows_alone_are_patients_of_their_own():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(12, 5)), rng.normal(size=(9, 5))
    assert mmd(a, b) == mmd(a, b, (np.arange(12), np.arange(9)))


def test_blocks_do_not_show(monkeypatch):
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(50, 5)), rng.normal(size=(60, 5)) + 0.3
    whole = mmd(a, b)
    monkeypatch.setattr("spcxr.evaluate.distance.ROWS_AT_ONCE", 7)
    parts = mmd(a, b)
    assert parts.mmd2 == pytest.approx(whole.mmd2, abs=1e-6)
    assert parts.p == whole.p


def test_p_is_uniform_where_there_is_no_difference_and_small_where_there_is():
    """Patients of three alike images: the level holds only if patients are what is permuted."""
    rng = np.random.default_rng(3)
    low = []
    for seed in range(60):
        base = np.repeat(rng.normal(size=(40, 4)), 3, axis=0)
        rows = base + 0.1 * rng.normal(size=base.shape)
        who = np.repeat(np.arange(20), 3)
        low.append(mmd(rows[:60], rows[60:], (who, who), n_permutations=39, seed=seed).p <= 0.1)
    assert 0.0 < np.mean(low) < 0.22  # 0.1 expected; 60 draws: sd .039
    moved = mmd(rng.normal(size=(100, 4)), rng.normal(size=(100, 4)) + 0.7)
    assert moved.p == pytest.approx(1 / 200)


def test_frechet_equals_the_matrix_root():
    rng = np.random.default_rng(4)
    a = rng.normal(size=(300, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(size=(200, 6)) + 1
    one, other = np.cov(a.T), np.cov(b.T)
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = gap + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-8)


def test_frechet_of_few_rows_shrinks_as_ledoit_and_wolf():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(8, 20)) * np.arange(1, 21), rng.normal(size=(12, 20))
    one, other = (LedoitWolf().fit(x).covariance_ for x in (a, b))
    gap = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = gap + np.trace(one + other - 2 * sqrtm(one @ other).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("measure", [mmd, frechet])
def test_what_cannot_be_compared_is_refused(measure):
    good = np.random.default_rng(0).normal(size=(5, 3))
    with pytest.raises(SpcxrError, match=r"give \(n, D\) and \(m, D\)"):
        measure(good, good[:, :2])
    with pytest.raises(SpcxrError, match="not finite"):
        measure(good, np.full((5, 3), np.nan))
    with pytest.raises(SpcxrError, match="fewer than two"):
        measure(good, good[:1])


def test_features_that_are_all_the_same_have_no_distance():
    same = np.ones((5, 3))
    assert mmd(same, same).mmd2 == pytest.approx(0, abs=1e-6)
    assert mmd(same, same).p == 1
    assert frechet(same, same) == 0


@pytest.mark.slow
def test_ten_thousand_rows_take_seconds():
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(10_000, 768)), rng.normal(size=(10_000, 768)) + 0.02
    before = time.perf_counter()
    mmd(a, b)
    frechet(a, b)
    assert time.perf_counter() - before < 120  # about 30 s on one core
