"""Which rows a step sees, fetched ahead of it: functions of (seed, epoch, step) alone."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

Rows = NDArray[np.int64]
K = TypeVar("K")
T = TypeVar("T")


def epoch_batches(
    rows: Rows, batch_size: int, *, seed: int, epoch: int, drop_last: bool = True
) -> list[Rows]:
    """One epoch's batches: ``rows`` in an order that depends on (seed, epoch) alone.

    Going on in mid-epoch is slicing this list. Its length does not depend on the epoch.

    Parameters
    ----------
    rows
        ``(n,)`` int64.
    drop_last
        leave out an incomplete last batch, unless it is the only one.

    >>> rows = np.arange(5)
    >>> [len(b) for b in epoch_batches(rows, 2, seed=0, epoch=0, drop_last=False)]
    [2, 2, 1]
    >>> len(epoch_batches(rows, 8, seed=0, epoch=0))
    1
    """
    # Sorting uniform numbers, not `permutation`: numpy keeps the stream of `random` as it is.
    keys = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch))))
    order = np.argsort(keys.random(len(rows)), kind="stable")
    batches = [rows[order[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


def prefetch(
    fetch: Callable[[K], T], keys: Iterable[K], *, threads: int = 1, ahead: int = 2
) -> Generator[tuple[K, T], None, None]:
    """``(key, fetch(key))`` for each batch's key in order, fetched by threads ahead of their use.

    At most ``threads + ahead`` results wait. An error of ``fetch`` is raised when its batch
    is due. Leaving the loop early waits for the fetches under way and drops the rest.

    >>> [int(x) for _, x in prefetch(np.sum, [np.array([1, 2]), np.array([3])])]
    [3, 3]
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        coming = iter(keys)
        waiting: deque[tuple[K, Future[T]]] = deque(
            (key, pool.submit(fetch, key)) for key in islice(coming, threads + ahead)
        )
        while waiting:
            key, future = waiting.popleft()
            result = future.result()
            for following in islice(coming, 1):
                waiting.append((following, pool.submit(fetch, following)))
            yield key, result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def seed_step(seed: int, step: int) -> None:
    """Seed torch's global generators (drop path, dropout) for one step.

    With it the step's number is all the random state there is: a resumed run draws what the
    uninterrupted one would have drawn, and no generator state need be saved.

    >>> seed_step(0, 7); a = torch.rand(1); seed_step(0, 7); bool(torch.rand(1) == a)
    True
    """
    digest = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
