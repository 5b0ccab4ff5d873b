"""Memory of a loader: batches are freed and asked for again, and need not be cleared each time."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of <malloc.h>
KEPT_BYTES = 2**28
MOST_MMAP_BYTES = 2**25  # glibc takes no more


def keep_freed_memory() -> bool:
    """Have glibc keep up to `KEPT_BYTES` that were freed, in each thread, for what comes next.

    By default blocks of megabytes go back to the system, and the pages of each new one are cleared
    by it: a tenth of a loader's time, a quarter in a thread (``benchmarks/bench_loader.py``).
    Holds for blocks of up to 32 MiB. Returns whether the C library could be told.

    >>> keep_freed_memory() in (True, False)
    True
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is None:
        return False
    told = (
        (_M_MMAP_THRESHOLD, MOST_MMAP_BYTES),
        (_M_TRIM_THRESHOLD, KEPT_BYTES),
        (_M_TOP_PAD, KEPT_BYTES // 4),
    )
    return all(mallopt(option, value) == 1 for option, value in told)
