"""DeLong's variance equals the formula written out, covers as it should, and pairs as it should."""

import itertools

import numpy as np
import pytest
import sklearn.metrics as sk

from spcxr.errors import SpcxrError
from spcxr.evaluate.delong import delong_interval, delong_paired
from spcxr.evaluate.intervals import bootstrap, paired_bootstrap
from spcxr.evaluate.metrics import auroc


def by_hand(labels, scores, patients):
    """AUROC, and (patient, placement) of positives and negatives: every pair is compared."""
    positive = [(s, p) for y, s, p in zip(labels, scores, patients, strict=True) if y == 1]
    negative = [(s, p) for y, s, p in zip(labels, scores, patients, strict=True) if y == 0]
    wins = np.array(
        [[1.0 if x > z else 0.5 if x == z else 0.0 for z, _ in negative] for x, _ in positive]
    )
    ours = [(p, v) for (_, p), v in zip(positive, wins.mean(1), strict=True)]
    theirs = [(p, v) for (_, p), v in zip(negative, wins.mean(0), strict=True)]
    return wins.mean(), ours, theirs


def variance_by_hand(value, ours, theirs):
    """Obuchowski 1997, patient by patient."""
    m, n = len(ours), len(theirs)
    with_positive, with_negative = {p for p, _ in ours}, {p for p, _ in theirs}
    s10 = s01 = s11 = 0.0
    for patient in with_positive | with_negative:
        a = sum(v - value for p, v in ours if p == patient)
        b = sum(v - value for p, v in theirs if p == patient)
        s10, s01, s11 = s10 + a * a, s01 + b * b, s11 + a * b
    i10, i01, i = len(with_positive), len(with_negative), len(with_positive | with_negative)
    s10 *= i10 / ((i10 - 1) * m)
    s01 *= i01 / ((i01 - 1) * n)
    s11 *= i / (i - 1)
    return s10 / m + s01 / n + 2 * s11 / (m * n)


def delong_by_hand(value, ours, theirs):
    """DeLong 1988: the sample variances of the placements."""
    return np.var([v for _, v in ours], ddof=1) / len(ours) + np.var(
        [v for _, v in theirs], ddof=1
    ) / len(theirs)


def spread(interval):
    """The standard error that an interval on the logit scale was made of."""
    width = np.log(interval.high / (1 - interval.high)) - np.log(interval.low / (1 - interval.low))
    return width / 2 / 1.959963984540054 * interval.value * (1 - interval.value)


@pytest.fixture
def rows():
    """90 rows of 40 patients, with ties; a second model's scores that are like the first's."""
    rng = np.random.default_rng(11)
    patients = rng.integers(0, 40, 90)
    labels = (rng.random(90) < 0.4).astype(float)
    shared = rng.normal(size=90) + rng.normal(size=40)[patients] + labels
    return labels, np.round(shared, 1), np.round(shared + rng.normal(size=90), 1), patients


def test_one_row_a_patient_is_delong(rows):
    labels, scores, _, _ = rows
    made = by_hand(labels, scores, range(90))
    found = delong_interval(labels, scores)
    assert found.value == pytest.approx(sk.roc_auc_score(labels, scores))
    assert spread(found) ** 2 == pytest.approx(delong_by_hand(*made))
    assert spread(found) ** 2 == pytest.approx(variance_by_hand(*made))
    assert (found.n_rows, found.n_patients) == (90, 90)


def test_rows_of_a_patient_are_summed_first(rows):
    labels, scores, _, patients = rows
    found = delong_interval(labels, scores, patients)
    expected = variance_by_hand(*by_hand(labels, scores, patients))
    assert spread(found) ** 2 == pytest.approx(expected)
    assert expected > 1.2 * delong_by_hand(*by_hand(labels, scores, patients))
    assert found.n_patients == len(np.unique(patients))


def test_the_difference_has_the_covariance_in_it(rows):
    labels, first, second, patients = rows
    found = delong_paired(labels, first, second, patients)
    one, two = by_hand(labels, first, patients), by_hand(labels, second, patients)
    apart = [[(p, a - b) for (p, a), (_, b) in zip(one[k], two[k], strict=True)] for k in (1, 2)]
    assert found.difference == pytest.approx(one[0] - two[0])
    error = np.sqrt(variance_by_hand(one[0] - two[0], *apart))
    assert (found.high - found.low) / 2 == pytest.approx(1.959963984540054 * error)
    turned = delong_paired(labels, second, first, patients)
    assert (turned.difference, turned.p) == (pytest.approx(-found.difference), found.p)


def test_near_the_bootstrap():
    rng = np.random.default_rng(2)
    patients = rng.integers(0, 300, 600)
    labels = rng.integers(0, 2, 600)
    first = rng.normal(size=600) + labels + 0.5 * rng.normal(size=300)[patients]
    second = first + 0.5 * rng.normal(size=600)
    close = delong_interval(labels, first, patients)
    drawn = bootstrap(patients, lambda w: auroc(labels, first, w), seed=0)
    assert (close.low, close.high) == pytest.approx((drawn.low, drawn.high), abs=0.006)
    tested = delong_paired(labels, first, second, patients)
    paired = paired_bootstrap(
        patients, lambda w: auroc(labels, first, w), lambda w: auroc(labels, second, w), seed=0
    )
    assert (tested.low, tested.high) == pytest.approx((paired.low, paired.high), abs=0.006)


def test_coverage_and_the_size_of_the_test():
    """Binormal scores, two rows a patient that share a part; 400 studies of each kind."""
    rng = np.random.default_rng(8)
    truth = 0.8413447  # P(N(sqrt 2, 1) > N(0, 1)), the difference of which has variance 2
    held = wrong = 0
    patients, labels = np.repeat(np.arange(60), 2), np.repeat(rng.integers(0, 2, 60), 2)
    for _ in range(400):
        models = []
        for _ in range(2):
            own = np.repeat(rng.normal(size=60), 2) * np.sqrt(0.7)
            models.append(own + np.sqrt(0.3) * rng.normal(size=120) + np.sqrt(2) * labels)
        found = delong_interval(labels, models[0], patients)
        held += found.low <= truth <= found.high
        wrong += delong_paired(labels, *models, patients).p < 0.05
    assert 0.92 <= held / 400 <= 0.98
    assert 0.025 <= wrong / 400 <= 0.085


def test_unknown_labels_are_left_out(rows):
    labels, first, second, patients = rows
    more = np.append(labels, [np.nan, np.nan])
    longer = [np.append(s, [0.1, np.nan]) for s in (first, second)]
    who = np.append(patients, [77, 78])
    assert delong_interval(more, longer[0], who) == delong_interval(labels, first, patients)
    assert delong_paired(more, *longer, who) == delong_paired(labels, first, second, patients)


@pytest.mark.parametrize(
    ("labels", "scores", "value"),
    [
        ([], [], np.nan),
        ([1, 1], [0.1, 0.2], np.nan),  # no negative
        ([1, 0, 0], [0.15, 0.1, 0.2], 0.5),  # one positive: no variance
        ([1, 1, 0, 0], [0.8, 0.9, 0.1, 0.2], 1.0),  # a variance of 0 is no certainty
    ],
)
def test_where_it_is_not_defined_it_is_nan(labels, scores, value):
    found = delong_interval(labels, scores)
    assert found.value == pytest.approx(value, nan_ok=True)
    assert np.isnan([found.low, found.high]).all()
    tested = delong_paired(labels, scores, scores)
    assert np.isnan([tested.low, tested.high, tested.p]).all()
    assert tested.difference == pytest.approx(0.0 * value, nan_ok=True)


def test_two_rows_of_one_patient_are_not_two_patients():
    labels, scores = [1, 1, 0, 0, 0], [0.3, 0.8, 0.1, 0.2, 0.5]
    assert np.isnan(delong_interval(labels, scores, list("aabcd")).low)
    assert not np.isnan(delong_interval(labels, scores, list("abcde")).low)


def test_one_score_for_all_is_a_coin_for_certain():
    found = delong_interval([1, 0, 1, 0], [0.3] * 4)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_the_interval_stays_within_its_bounds():
    labels = np.array([1, 1, 1, 0, 0, 0])
    for order in itertools.permutations(range(6)):
        found = delong_interval(labels, np.array(order))
        if not np.isnan(found.low):
            assert 0 < found.low < found.value < found.high < 1
        tested = delong_paired(labels, np.array(order), np.arange(6))
        if not np.isnan(tested.p):
            assert -1 <= tested.low <= tested.difference <= tested.high <= 1
            assert 0 <= tested.p <= 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (([0, 1], [0.1, np.nan]), "NaN"),
        (([0, 2], [0.1, 0.2]), "0, 1 or NaN"),
        (([0, 1], [0.1, 0.2], ["a"]), "one a row"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(SpcxrError, match=said):
        delong_interval(*given)
    with pytest.raises(SpcxrError, match="level"):
        delong_interval([0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4], level=95)
