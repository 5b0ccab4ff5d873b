"""The order in which images are seen: any position of any epoch at once, and no list of them.

Sampling is without replacement: an epoch is a keyed permutation of the rows, worked out for the
positions that are asked for. So a run that goes on, or one of many ranks, starts anywhere for
nothing, and 10^8 images cost no more memory than ten.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from spcxr.errors import SpcxrError
from spcxr.train.batches import Rows

Words = NDArray[np.uint64]
ROUNDS = 16  # with fewer, the orders of five rows are not equally likely (measured)
_GOLDEN = 0x9E3779B97F4A7C15
_TURNS = np.array([[turn * _GOLDEN % 2**64] for turn in range(ROUNDS)], np.uint64)


class RowsAt(Protocol):
    """Rows by position: an int64 array is one, and so is `data.rows.RowSet`."""

    def __len__(self) -> int: ...
    def __getitem__(self, positions: Rows, /) -> Rows: ...


def permute(index: Rows, n: int, *, key: tuple[int | Words, ...]) -> Rows:
    """Where a permutation of ``range(n)`` that ``key`` chooses takes each index.

    A Feistel network (Luby & Rackoff, 1988) on pairs of digits to the bases a and b, a * b >= n
    hardly larger than n; what falls outside is sent through again (Black & Rogaway, 2002) until it
    is inside. Integers alone, so it is the same on every machine.

    Parameters
    ----------
    index
        int64, one dimension or more, in ``[0, n)``.
    n
        below 2**62.
    key
        ints in ``[0, 2**64)``, or uint64 arrays that broadcast with ``index``: one key an index.

    Raises
    ------
    IndexError
        an index that is not in ``[0, n)``.

    >>> permute(np.arange(6), 6, key=(0, 1)), permute(np.array([4]), 6, key=(0, 1))
    (array([2, 0, 3, 1, 4, 5]), array([4]))
    """
    index = np.asarray(index, np.int64)
    if index.size and not 0 <= index.min() <= index.max() < n:
        raise IndexError(f"index out of range of {n}")
    keys = _folded(key)
    if keys.size > 1:
        keys = np.broadcast_to(keys, index.shape).reshape(-1)
    words = _mixed(keys + _TURNS)  # a row a round
    place = index.reshape(-1).astype(np.uint64)
    high = np.uint64(max(int(np.ceil(np.sqrt(n))), 1))
    low = np.uint64(-(-n // int(high)) or 1)
    outside = np.arange(len(place))
    while outside.size:
        own = words if keys.size == 1 else words[:, outside]
        place[outside] = _feistel(place[outside], high, low, own)
        outside = outside[place[outside] >= np.uint64(n)]
    return place.astype(np.int64).reshape(index.shape)


def _feistel(place: Words, high: np.uint64, low: np.uint64, words: Words) -> Words:
    """A bijection of ``range(high * low)`` for each column of ``words [ROUNDS, 1 or n]``."""
    left, right = place // low, place % low
    for even, odd in zip(words[::2], words[1::2], strict=True):
        left = (left + _mixed(right + even)) % high
        right = (right + _mixed(left + odd)) % low
    return left * low + right


def _mixed(words: Words) -> Words:
    """SplitMix64's finaliser (Steele, Lea & Flood, 2014): each bit depends on every bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    # 63 bits: what is added to one digit then cannot wrap.
    return (words ^ (words >> np.uint64(31))) >> np.uint64(1)


def _folded(key: tuple[int | Words, ...]) -> Words:
    """One word of several; arrays throughout, whose products wrap without a warning."""
    made, odd = np.ones(1, np.uint64), np.uint64(_GOLDEN)
    for part in key:
        made = _mixed((made * odd) ^ np.atleast_1d(np.asarray(part, np.uint64)))
    return made


class Order:
    """The images of each epoch, in order; with weights, groups in other shares than their sizes.

    Of a group with ``n`` images and weight ``w`` an epoch holds ``n * w / sum(n * w)`` of its
    images, to the nearest whole ones. Within a group nothing is drawn twice before all of it is
    drawn once: a group that is drawn less often goes on next epoch where it stopped, one that is
    drawn more often begins its next permutation. Weight 0 leaves a group out; an epoch is as long
    as the groups that are left.

    Parameters
    ----------
    rows
        int64 ``(n,)``, or a `RowSet`.
    seed
        in ``[0, 2**64)``; the order depends on (seed, epoch, position) alone.
    weights
        of groups by name; 1 for those not named.
    groups
        the rows of each group, which together are ``rows``.

    Raises
    ------
    SpcxrError
        a weight of no group or below 0, weights that leave nothing.

    >>> order = Order(np.arange(4), seed=0)
    >>> order.take(0, 0, 4), order.take(0, 2, 3), order.take(1, 0, 4)
    (array([0, 2, 3, 1]), array([3]), array([3, 2, 1, 0]))
    >>> sites = {"a": np.arange(3), "b": np.array([3])}
    >>> sorted(Order(np.arange(4), seed=0, weights={"b": 3}, groups=sites).take(0, 0, 4).tolist())
    [0, 2, 3, 3]
    """

    def __init__(
        self,
        rows: RowsAt,
        *,
        seed: int,
        weights: Mapping[str, float] | None = None,
        groups: Mapping[str, RowsAt] | None = None,
    ) -> None:
        groups = {"": rows} if groups is None else groups
        if sum(map(len, groups.values())) != len(rows):
            raise ValueError(f"groups hold {sum(map(len, groups.values()))} of {len(rows)} rows")
        self.seed = seed
        weight = _weights(weights or {}, groups)
        # By name, so that the order does not hang on the order of a mapping.
        drawn = [name for name in sorted(groups) if weight[name] and len(groups[name])]
        self._groups = [groups[name] for name in drawn]
        sizes = np.array([len(group) for group in self._groups], np.int64)
        shares = sizes * np.array([weight[name] for name in drawn])
        self._ends = np.cumsum(_apportioned(shares, int(sizes.sum())))

    def __len__(self) -> int:
        """Images an epoch."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def take(self, epoch: int, start: int, stop: int) -> Rows:
        """``(stop - start,)`` int64: the rows at these positions of an epoch, counted from 0.

        Raises
        ------
        IndexError
            unless ``0 <= start <= stop <= len(order)``.
        """
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"positions {start} to {stop}; an epoch has {len(self)} images")
        spots = np.arange(start, stop)
        if len(self._groups) > 1:  # a single group is in random order by itself
            spots = permute(spots, len(self), key=(self.seed, 0, epoch))
        which = np.searchsorted(self._ends, spots, side="right")
        taken = np.empty(stop - start, np.int64)
        for number in np.unique(which).tolist():
            group, mine = self._groups[number], which == number
            begin = int(self._ends[number - 1]) if number else 0
            share = int(self._ends[number]) - begin
            # All draws of the group since the first epoch, counted: round after round through it.
            rounds, places = np.divmod(epoch * share + spots[mine] - begin, len(group))
            key = (self.seed, 1 + number, rounds.astype(np.uint64))
            taken[mine] = group[permute(places, len(group), key=key)]
        return taken


def _weights(given: Mapping[str, float], groups: Mapping[str, RowsAt]) -> dict[str, float]:
    """The weight of every group."""
    known = ", ".join(sorted(groups))
    for name, weight in given.items():
        if name not in groups:
            raise SpcxrError(f"weights: no group {name!r}; choose from: {known}")
        if not 0 <= weight < np.inf:
            raise SpcxrError(f"weights: {name} has {weight}; give 0 or a positive number")
    made = {name: float(given.get(name, 1.0)) for name in groups}
    if given and not any(made[name] and len(groups[name]) for name in groups):
        raise SpcxrError(f"weights: no group is left; give one of these more than 0: {known}")
    return made


def _apportioned(shares: NDArray[np.float64], total: int) -> Rows:
    """Whole numbers that sum to ``total``, in proportion to ``shares``: largest remainders.

    >>> _apportioned(np.array([1.0, 1.0, 1.0]), 10).tolist()
    [4, 3, 3]
    """
    exact = shares / shares.sum() * total if len(shares) else shares
    whole = np.floor(exact).astype(np.int64)
    first = np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]
    whole[first] += 1
    return whole
