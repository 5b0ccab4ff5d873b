"""What the ``timed`` fixture is: one call timed, its row of the result, its targets."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from device_clock import DeviceClock, plan
from record import Target

L2_TIMES = 3  # inputs rotate through this many times the L2 cache of a GPU
MOST_COPIES = 256


class Timed:
    """Times the one call of a benchmark test and keeps its row.

    ``row`` is pytest-benchmark's ``extra_info``: a test may add to it. ``targets`` are judged when
    the run is over, since most compare with another row.
    """

    def __init__(self, benchmark, device: str, clock: DeviceClock | None, threads: int) -> None:
        self.benchmark, self.device = benchmark, device
        self.row: dict[str, Any] = benchmark.extra_info
        self.targets: list[Target] = []
        self._clock, self._threads = clock, threads

    def __call__(
        self,
        call: Callable[..., Any],
        *,
        what: str,
        group: str,
        images: int = 1,
        nbytes: int = 0,
        inputs: Callable[[int], tuple] | None = None,
        memory: bool = False,
        graph: bool | None = None,
        rounds: int = 0,
    ) -> Any:
        """Time ``call`` and return what it returned.

        ``what`` is the contender, ``group`` what it is compared in; the first of a group is ours.
        ``images``: how many a call works on. ``nbytes``: least traffic of a call, read and written
        (gives GB/s and the share of a copy's). ``inputs(i)`` makes the i-th set of arguments; on
        CUDA there are enough of them to overflow L2. ``memory``: the peak a call allocates.
        ``graph``: see ``device_clock.plan``. ``rounds``: exactly so many calls, with no
        warm-up nor calibration; for what takes seconds.
        """
        sets = self._rotation(inputs)
        turns = itertools.cycle(sets)

        def once() -> Any:
            return call(*next(turns))

        self.benchmark.group = group
        self.row |= {"what": what, "group": group, "device": self.device, "images": images}
        self.row["threads"] = self._threads
        if not rounds:
            for _ in sets + sets[:1]:  # the warm-up: compiles, allocates, touches pages
                once()
        if memory:
            self.row["peak_mib"] = peak_bytes(once, self.device) / 2**20
        result = self._measure(once, rounds, graph, len(sets))
        if self.benchmark.stats is not None:  # None under --benchmark-disable
            self._account(images, nbytes)
        return result

    def target(
        self,
        metric: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        of: str | None = None,
    ) -> None:
        """This row's ``metric`` shall be at least / at most so much, or so much times that of the
        contender ``of`` in the same group. ``"speed"`` is images a second at the median.

        A missed target does not fail the run: it is printed, and written into the result.
        """
        assert (at_least is None) != (at_most is None), "a target has one limit"
        self.targets.append(Target(metric, at_least, at_most, of))

    def check_targets(self) -> None:
        """Every target names what its row holds: a misspelt one fails its test, not the run."""
        for target in self.targets:
            assert target.metric == "speed" or target.metric in self.row, (target, self.row)

    def _rotation(self, inputs: Callable[[int], tuple] | None) -> list[tuple]:
        if inputs is None:
            return [()]
        first = inputs(0)
        if self.device == "cpu":
            return [first]
        size = sum(a.nbytes for a in first if isinstance(a, torch.Tensor))
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        copies = min(max(2, math.ceil(L2_TIMES * cache / max(size, 1)) + 1), MOST_COPIES)
        self.row["rotated_mib"] = copies * size / 2**20
        return [first, *(inputs(i) for i in range(1, copies))]

    def _measure(self, once, rounds: int, graph: bool | None, sets: int) -> Any:
        if rounds:
            return self.benchmark.pedantic(once, rounds=rounds)
        if self._clock is None:
            return self.benchmark(once)
        planned = plan(once, graph, least_calls=sets)
        self._clock.calls = planned.calls
        self.row |= {"method": planned.method, "host_us": planned.host_s * 1e6}
        self.benchmark.pedantic(planned.round, rounds=planned.rounds, warmup_rounds=2)
        return once()

    def _account(self, images: int, nbytes: int) -> None:
        seconds = np.asarray(self.benchmark.stats.stats.data)
        q20, median, q80 = np.quantile(seconds, [0.2, 0.5, 0.8])
        least = float(seconds.min())
        self.row |= {
            "rounds": len(seconds),
            "min_us": least * 1e6,
            "median_us": float(median) * 1e6,
            "q20_us": float(q20) * 1e6,
            "q80_us": float(q80) * 1e6,
            "min_us_an_image": least * 1e6 / images,
            "median_us_an_image": float(median) * 1e6 / images,
        }
        if nbytes:
            rate = nbytes / float(median)
            share = rate / copy_rate(self.device, torch.get_num_threads())
            self.row |= {"bytes": nbytes, "gb_s": rate / 1e9, "share_of_copy": share}


_copy_rates: dict[tuple[str, int], float] = {}


def copy_rate(device: str, threads: int) -> float:
    """Bytes a second, read and written, of ``Tensor.copy_`` with so many threads: the ceiling of
    what only moves memory. Measured once a run, the best of 10."""
    if (device, threads) not in _copy_rates:
        size = 2**30 if device == "cuda" else 2**27
        source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        clock = DeviceClock() if device == "cuda" else time.perf_counter
        best = math.inf
        for _ in range(10):
            began = clock()
            target.copy_(source)
            best = min(best, clock() - began)
        _copy_rates[device, threads] = 2 * size / best
    return _copy_rates[device, threads]


def peak_bytes(call: Callable[[], Any], device: str) -> int:
    """The most that torch's allocator held during a call, above what it held before.

    On the CPU torch's profiler reports every allocation, those inside an op too, but nothing that
    a library allocates past torch.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as made:
        kept = call()
    del kept
    # events() folds allocations into the ops that made them; the raw ones are in order of time
    raw = [e for e in made.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(raw, key=lambda e: e.start_ns())]
    return max(0, *itertools.accumulate(changes, initial=0))
