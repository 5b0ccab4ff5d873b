"""The device's clock without a device: a played CUDA whose calls take a known time."""

import device_clock
import pytest
import torch


class Device:
    """Time passes when something is launched; events read it."""

    def __init__(self) -> None:
        self.now_s, self.captured = 0.0, 0

    def launch(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def device(monkeypatch):
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_s = made.now_s

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return (end.at_s - self.at_s) * 1e3

    def captured(call, calls):
        made.captured += calls
        return lambda: [call() for _ in range(calls)]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(device_clock, "_captured", captured)
    return made


def test_it_counts_what_passes_within_rounds_a_call(device):
    clock = device_clock.DeviceClock()
    clock.calls = 10
    began = clock()
    device.launch(0.5)
    ended = clock()
    device.launch(7.0)  # between two rounds
    assert ended - began == pytest.approx(0.05)
    assert clock() == ended


@pytest.mark.parametrize(
    ("call_s", "graph", "least_calls", "calls", "captured"),
    [
        (5e-6, None, 1, 200, True),  # below 20 us: a graph
        (5e-6, False, 1, 200, False),
        (50e-6, None, 1, 20, False),
        (50e-6, True, 1, 20, True),
        (50e-6, None, 64, 64, False),  # the rotation of inputs is gone through
        (0.1, None, 1, 1, False),
    ],
)
def test_the_plan(device, call_s, graph, least_calls, calls, captured):
    made = device_clock.plan(lambda: device.launch(call_s), graph, least_calls)
    assert made.calls == pytest.approx(calls, abs=1)
    assert (device.captured == made.calls) is captured
    assert made.method.startswith("CUDA graph" if captured else "CUDA events")
    before = device.now_s
    made.round()
    assert device.now_s - before == pytest.approx(made.calls * call_s)
    assert 10 <= made.rounds <= 200
