import threading
import time

import numpy as np
import pytest
import torch

from spcxr.train.batches import epoch_batches, prefetch, seed_step

ROWS = np.array([3, 5, 8, 13, 21, 34, 55], np.int64)


def test_an_epoch_is_a_permutation_of_the_rows():
    batches = epoch_batches(ROWS, 3, seed=1, epoch=2, drop_last=False)
    assert [len(b) for b in batches] == [3, 3, 1]
    assert sorted(np.concatenate(batches)) == ROWS.tolist()


def test_the_order_follows_seed_and_epoch_alone():
    def order(seed, epoch):
        return np.concatenate(epoch_batches(np.arange(50), 5, seed=seed, epoch=epoch)).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(1, 2) != order(2, 1)


def test_the_order_is_pinned():
    """A new numpy must not change what a resumed run sees."""
    assert np.concatenate(epoch_batches(np.arange(8), 8, seed=0, epoch=0)).tolist() == PINNED


PINNED = [3, 2, 1, 6, 0, 7, 4, 5]


def test_the_incomplete_batch():
    assert [len(b) for b in epoch_batches(ROWS, 3, seed=0, epoch=0)] == [3, 3]
    assert [len(b) for b in epoch_batches(ROWS, 50, seed=0, epoch=0)] == [7]
    assert epoch_batches(ROWS[:0], 3, seed=0, epoch=0) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_prefetch_keeps_the_order(threads):
    rng = np.random.default_rng(0)
    waits = dict(enumerate(rng.uniform(0, 0.01, 20)))

    def fetch(rows):
        time.sleep(waits[int(rows[0])])
        return int(rows[0]) ** 2

    batches = [np.array([i]) for i in range(20)]
    found = [(int(rows[0]), value) for rows, value in prefetch(fetch, batches, threads=threads)]
    assert found == [(i, i * i) for i in range(20)]


def test_prefetch_runs_ahead_but_not_away():
    started = []
    batches = [np.array([i]) for i in range(50)]
    stream = prefetch(lambda rows: started.append(int(rows[0])), batches, threads=1, ahead=2)
    next(stream)
    time.sleep(0.05)
    assert 2 <= len(started) <= 4
    stream.close()
    assert len(started) <= 5


def test_an_error_comes_with_its_batch_and_ends_the_threads():
    def fetch(rows):
        if rows[0] == 2:
            raise OSError("the disk is gone")
        return int(rows[0])

    stream = prefetch(fetch, [np.array([i]) for i in range(9)])
    assert [next(stream)[1], next(stream)[1]] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_seed_step_settles_torchs_draws():
    def draws(seed, step):
        seed_step(seed, step)
        return torch.rand(4)

    assert torch.equal(draws(0, 5), draws(0, 5))
    assert not torch.equal(draws(0, 5), draws(0, 6))
    assert not torch.equal(draws(0, 5), draws(1, 5))
