"""Any position of any epoch at once; without replacement; in the shares that weights ask for."""

import itertools
import math
import time

import numpy as np
import pytest

from spcxr.data.rows import RowSet
from spcxr.errors import SpcxrError
from spcxr.train.order import Order, permute

SIZES = [*range(1, 40), 97, 1009, 1024, 2**16, 65537, 999983, 10**6]


@pytest.mark.parametrize("n", SIZES)
def test_it_is_a_permutation_and_each_index_stands_alone(n):
    whole = permute(np.arange(n), n, key=(3, n))
    assert whole.dtype == np.int64
    np.testing.assert_array_equal(np.sort(whole), np.arange(n))
    some = np.random.default_rng(n).integers(0, n, 20)
    np.testing.assert_array_equal(permute(some, n, key=(3, n)), whole[some])


def test_it_is_pinned():
    """Another machine, numpy or version must not change what a resumed run sees."""
    assert permute(np.arange(8), 8, key=(0, 1)).tolist() == PINNED
    assert permute(np.array([5, 10**9]), 10**10, key=(2**64 - 1,)).tolist() == FAR


PINNED = [7, 4, 2, 5, 1, 6, 0, 3]
FAR = [2977870806, 1584647485]


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_are_equally_likely(n):
    """Chi-square over the n! orders, within four standard deviations."""
    count = 2000 * math.factorial(n)
    keys = np.arange(count, dtype=np.uint64)[:, None]
    drawn = permute(np.broadcast_to(np.arange(n), (count, n)), n, key=(7, keys))
    orders = {order: i for i, order in enumerate(itertools.permutations(range(n)))}
    found = np.bincount([orders[tuple(row)] for row in drawn.tolist()], minlength=len(orders))
    freedom = len(orders) - 1
    assert abs(((found - 2000) ** 2 / 2000).sum() - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [100, 12345, 10**6])
def test_positions_say_nothing_of_values_nor_one_epoch_of_the_next(n):
    index = np.arange(n)
    one, two = (permute(index, n, key=(0, epoch)) for epoch in (0, 1))
    for a, b in ((index, one), (one, two), (one[:-1], one[1:]), (one % 2, index % 2)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(n)
    assert (one == two).sum() < 12  # one on average, whatever n


def test_an_array_of_keys_is_each_key_alone():
    keys = np.array([5, 9, 5], np.uint64)
    got = permute(np.array([1, 2, 6]), 7, key=(4, keys))
    expected = [permute(np.array([i]), 7, key=(4, k)) for i, k in ((1, 5), (2, 9), (6, 5))]
    assert got.tolist() == [int(value[0]) for value in expected]
    assert len({tuple(permute(np.arange(9), 9, key=k).tolist()) for k in KEYS}) == len(KEYS)


KEYS = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**63,)]


def test_an_index_outside_is_refused():
    for bad in (-1, 7):
        with pytest.raises(IndexError, match="out of range of 7"):
            permute(np.array([bad]), 7, key=(0,))
    assert permute(np.zeros(0, np.int64), 0, key=(0,)).shape == (0,)


def test_a_batch_of_a_hundred_million_is_quick():
    """10^4 of 10^8: 2 ms measured; a shuffled list would be 800 MB and seconds."""
    index = np.arange(10**4) * 9999
    before = time.process_time()
    permute(index, 10**8, key=(0, 1))
    assert time.process_time() - before < 0.1


ROWS = np.array([3, 5, 8, 13, 21, 34, 55], np.int64)


@pytest.mark.parametrize("rows", [ROWS, RowSet.from_rows(ROWS)], ids=["array", "RowSet"])
def test_an_epoch_holds_each_row_once_and_any_part_of_it_is_the_same(rows):
    order = Order(rows, seed=1)
    assert len(order) == 7
    whole = order.take(4, 0, 7)
    assert sorted(whole.tolist()) == ROWS.tolist()
    for start, stop in ((0, 3), (3, 5), (5, 7), (2, 2)):
        np.testing.assert_array_equal(order.take(4, start, stop), whole[start:stop])
    again = Order(rows, seed=1)
    np.testing.assert_array_equal(again.take(4, 0, 7), whole)
    for other in (order.take(5, 0, 7), Order(rows, seed=2).take(4, 0, 7)):
        assert other.tolist() != whole.tolist()
    with pytest.raises(IndexError, match="an epoch has 7 images"):
        order.take(0, 3, 8)
    assert len(Order(ROWS[:0], seed=0)) == 0


def sites(**sizes):
    ends = np.cumsum(list(sizes.values()))
    return {
        name: np.arange(end - size, end)
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


def weighted(groups, weights):
    return Order(np.concatenate(list(groups.values())), seed=0, weights=weights, groups=groups)


def test_groups_have_the_shares_their_weights_ask_for():
    """100 + 50 * 4 + 30 * 0: of an epoch of 150, a third from a and two thirds from b."""
    groups = sites(a=100, b=50, c=30)
    order = weighted(groups, {"b": 4, "c": 0})
    assert len(order) == 150
    epochs = [order.take(epoch, 0, 150) for epoch in range(6)]
    for drawn in epochs:
        assert np.isin(drawn, groups["a"]).sum() == 50
        assert np.isin(drawn, groups["b"]).sum() == 100
        # Mixed, not one site after the other.
        assert 30 < np.isin(drawn[:75], groups["b"]).sum() < 70
    for name, times in (("a", 3), ("b", 12)):  # round after round, over six epochs
        counts = np.bincount(np.concatenate(epochs), minlength=180)[groups[name]]
        assert counts.tolist() == [times] * len(counts)
    np.testing.assert_array_equal(order.take(3, 40, 60), epochs[3][40:60])


def test_a_rare_group_goes_on_where_it_stopped():
    """Of b, 3 or so of 30 an epoch: none twice before all were seen."""
    groups = sites(a=270, b=30)
    order = weighted(groups, {"a": 1, "b": 0.1})
    seen = [row for epoch in range(12) for row in order.take(epoch, 0, 300) if row >= 270]
    assert len(set(seen[:30])) == 30
    assert len(seen) == 12 * round(300 * 3 / 273)


def test_a_tiny_group_drawn_over_and_over_is_no_slower():
    groups = sites(a=10**5, b=3)
    order = weighted(groups, {"b": 10**5})
    before = time.process_time()
    drawn = order.take(0, 0, 5000)
    assert time.process_time() - before < 0.2
    counts = np.bincount(drawn)[-3:]
    assert counts.sum() > 3000
    assert counts.max() - counts.min() < 200


def test_shares_are_rounded_to_the_whole():
    order = weighted(sites(a=1, b=1, c=1), {"a": 1, "b": 1, "c": 1})
    assert sorted(order.take(9, 0, 3).tolist()) == [0, 1, 2]
    groups = sites(a=5, b=3, c=2)
    assert len(weighted(groups, {"a": 0.3, "b": 0.7, "c": 1.1})) == 10


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"z": 1}, "weights: no group 'z'; choose from: a, b"),
        ({"a": -1}, "weights: a has -1; give 0 or a positive number"),
        ({"a": math.nan}, "weights: a has nan"),
        ({"a": 0, "b": 0}, "no group is left; give one of these more than 0: a, b"),
    ],
)
def test_weights_that_make_no_sense_are_refused(weights, said):
    with pytest.raises(SpcxrError, match=said):
        weighted(sites(a=2, b=2), weights)


def test_groups_must_be_the_rows():
    with pytest.raises(ValueError, match="groups hold 4 of 3 rows"):
        Order(np.arange(3), seed=0, groups=sites(a=2, b=2))
