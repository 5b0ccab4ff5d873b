"""Schedules as pure functions of the step."""

from __future__ import annotations

import math


def cosine(
    step: int,
    total: int,
    *,
    start: float,
    end: float,
    warmup: int = 0,
    warmup_start: float = 0.0,
) -> float:
    """Linear warm-up to ``start``, then half a cosine to ``end`` (SGDR, arXiv 1608.03983).

    Parameters
    ----------
    step
        updates made so far: 0 for the first. From ``total`` on the value is ``end``.
    total
        updates of the whole run, warm-up included.
    warmup
        updates of warm-up. They end just below ``start``, which step ``warmup`` takes; the first
        one lies one part above ``warmup_start``, so that no update is spent at a rate of zero.

    >>> [round(cosine(s, 8, start=1.0, end=0.0, warmup=3), 3) for s in range(9)]
    [0.25, 0.5, 0.75, 1.0, 0.905, 0.655, 0.345, 0.095, 0.0]
    """
    if step < warmup:
        return warmup_start + (start - warmup_start) * (step + 1) / (warmup + 1)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
