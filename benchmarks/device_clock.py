"""Device time on CUDA, as a timer of pytest-benchmark. **Not run on a GPU yet.**

A round is ``calls`` calls between two CUDA events, enough of them to hide the launch of the first.
Calls shorter than ``GRAPH_BELOW_S`` would measure the host that launches them, so they are captured
in a CUDA graph and a round is one replay. (Model: NVIDIA/Fuser, benchmarks/python/core.py.)
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

GRAPH_BELOW_S = 20e-6
ROUND_S = 1e-3  # device time of a round: events resolve about half a microsecond
MOST_S = 1.0  # device time of all rounds
CALLS, ROUNDS = (1, 1000), (10, 200)  # least and most
PROBE_S, PROBE_CALLS = 0.05, (3, 20)  # of the probe: seconds, and calls, least and most
CYCLES_A_S = 2e9  # a GPU's clock is hardly faster


class DeviceClock:
    """Reads seconds of device time a call; it stands still between rounds.

    pytest-benchmark reads its timer before and after a round. The first reading waits for the
    device and records an event; the second records another, waits for it, and moves the clock on
    by the time between the two, divided by the calls of a round.
    """

    def __init__(self) -> None:
        self.calls = 1
        self._now_s = 0.0
        self._began: torch.cuda.Event | None = None

    def __call__(self) -> float:
        event = torch.cuda.Event(enable_timing=True)
        if self._began is None:
            torch.cuda.synchronize()
            event.record()
            self._began = event
        else:
            event.record()
            event.synchronize()
            self._now_s += self._began.elapsed_time(event) / 1e3 / self.calls
            self._began = None
        return self._now_s


class Plan(NamedTuple):
    """How to time one call on the device."""

    round: Callable[[], Any]
    calls: int  # in a round
    rounds: int
    method: str
    host_s: float  # what a call costs the host: a median near it means a launch-bound contender


def plan(call: Callable[[], Any], graph: bool | None, least_calls: int = 1) -> Plan:
    """Probe a warm call and choose. ``graph``: True or False to insist, None for the rule above.

    ``least_calls``: calls a round must hold, so that a rotation of inputs is gone through.
    A call that waits for the device cannot be captured; torch raises, and the benchmark must say
    ``graph=False`` (the row names the method).
    """
    host_s, device_s = _probe(call)
    calls = max(_within(ROUND_S / device_s, CALLS), least_calls)
    rounds = _within(MOST_S / (calls * device_s), ROUNDS)
    if graph or (graph is None and device_s < GRAPH_BELOW_S):
        return Plan(_captured(call, calls), calls, rounds, f"CUDA graph of {calls} calls", host_s)

    def batch() -> None:
        for _ in range(calls):
            call()

    return Plan(batch, calls, rounds, f"CUDA events around {calls} calls", host_s)


def _within(value: float, limits: tuple[int, int]) -> int:
    return min(max(math.ceil(value), limits[0]), limits[1])


def _probe(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds a call: of the host that launches it, and of the device that runs it.

    The device's are read while the calls queue behind a wait: else a call that is launched more
    slowly than it runs would seem as long as its launch.
    """

    def launch(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start

    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    calls = _within(PROBE_S / max(time.perf_counter() - start, 1e-9), PROBE_CALLS)
    host_s = launch(calls)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(min(2 * host_s, PROBE_S) * CYCLES_A_S))
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    launch(calls)
    ended.record()
    ended.synchronize()
    return host_s / calls, max(began.elapsed_time(ended) / 1e3 / calls, 1e-7)


def _captured(call: Callable[[], Any], calls: int) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # capture wants a warm-up on another stream
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except RuntimeError as error:
        error.add_note("If the call waits for the device, time it with graph=False.")
        raise
    return graph.replay
