"""Labels and their losses as formulas: policies, weights, what excludes what, nested fractions."""

import math

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight

from spcxr.recipes.finetune import take_fraction
from spcxr.recipes.losses import masked_bce, one_of_many
from spcxr.recipes.targets import class_weights, is_one_of_many, settle_uncertain

NAN = float("nan")


def test_uncertain_labels_follow_the_policy():
    matrix = np.array([[1, 0, -1, NAN]], np.float32)
    for policy, expected in (
        ("ignore", [1, 0, NAN, NAN]),
        ("ones", [1, 0, 1, NAN]),
        ("zeros", [1, 0, 0, NAN]),
        ("lsr-ones", [1, 0, NAN, NAN]),
        ("lsr-zeros", [1, 0, NAN, NAN]),
    ):
        np.testing.assert_array_equal(settle_uncertain(matrix, policy), [expected])


def test_masked_bce_is_the_mean_over_known_labels():
    logits = torch.tensor([[0.3, -2.0, 5.0], [1.0, 0.0, -1.0]], requires_grad=True)
    values = torch.tensor([[1.0, 0.0, NAN], [NAN, 1.0, 0.0]])
    terms = [
        -math.log(1 / (1 + math.exp(-0.3))),
        -math.log(1 - 1 / (1 + math.exp(2.0))),
        -math.log(0.5),
        -math.log(1 - 1 / (1 + math.exp(1.0))),
    ]
    loss = masked_bce(logits, values)
    assert loss.item() == pytest.approx(sum(terms) / 4, rel=1e-6)
    loss.backward()
    assert logits.grad[0, 2] == 0
    assert logits.grad[1, 0] == 0
    assert (logits.grad[~torch.isnan(values)] != 0).all()


def test_positive_weights_multiply_positives_only():
    logits, values = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    loss = masked_bce(logits, values, torch.tensor([3.0, 100.0]))
    assert loss.item() == pytest.approx((3 + 1) / 2 * math.log(2), rel=1e-6)


def test_smoothed_targets_are_shared_out():
    logits = torch.tensor([[1.0, -0.5, 2.0]])
    one = torch.tensor([[0.0, 0.0, 1.0]])
    shares = logits.log_softmax(1)
    wanted = -(shares * (0.9 * one + 0.1 / 3)).sum()
    assert one_of_many(logits, one, smoothing=0.1).item() == pytest.approx(wanted.item(), rel=1e-6)
    several = torch.tensor([[1.0, NAN, 0.0]])
    known = logits[:, [0, 2]]
    target = torch.tensor([[0.95, 0.05]])
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(known, target)
    found = masked_bce(logits, several, smoothing=0.1)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_class_weights_are_scikit_learns_balanced():
    classes = np.array([0] * 7 + [1] * 2 + [2])
    ours = class_weights(np.eye(3, dtype=np.float32)[classes], multilabel=False)
    theirs = compute_class_weight("balanced", classes=np.arange(3), y=classes)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    several = np.array([[1, 0], [0, 0], [0, NAN], [0, 1]], np.float32)
    np.testing.assert_allclose(class_weights(several, multilabel=True), [3, 2])


def test_cross_entropy_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    values = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    first = -3 + math.log(math.e + math.e**2 + math.e**3)
    plain, second = one_of_many(logits, values).item(), math.log(3)
    assert plain == pytest.approx((first + second) / 2, rel=1e-6)
    weighted = one_of_many(logits, values, torch.tensor([3.0, 1.0, 1.0])).item()
    assert weighted == pytest.approx((first + 3 * second) / 4, rel=1e-6)


def test_one_of_many_is_told_from_several_at_once():
    assert is_one_of_many(np.array([[1, 0], [0, 1], [NAN, NAN]], np.float32))
    for not_one in ([[1, 1], [0, 1]], [[0, 0], [0, 1]], [[1, NAN], [0, 1]], [[1], [0]]):
        assert not is_one_of_many(np.array(not_one, np.float32))


def test_fractions_are_nested_keep_patients_whole_and_every_class():
    rng = np.random.default_rng(0)
    patients = np.array([f"p{i}" for i in rng.integers(0, 60, 200)])
    classes = (np.array([int(p[1:]) for p in patients]) % 20 == 0).astype(np.int64)
    kept = [take_fraction(patients, classes, f, seed=3) for f in (0.1, 0.5, 1.0)]
    assert (kept[0] <= kept[1]).all()
    assert kept[2].all()
    for chosen in kept:
        assert not set(patients[chosen]) & set(patients[~chosen])
        assert set(classes[chosen]) == {0, 1}
    assert len(set(patients[kept[1]])) == pytest.approx(30, abs=2)
    assert (take_fraction(patients, classes, 0.5, seed=4) != kept[1]).any()
