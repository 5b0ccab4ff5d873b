"""The device's clock without a device: a played CUDA whose calls take a known time."""

from types import SimpleNamespace

import device_clock
import pytest
import torch


class Device:
    """A host that launches and a stream that runs, each with a time of its own."""

    def __init__(self) -> None:
        self.host_s = self.stream_s = 0.0
        self.captured, self.replaying = 0, False

    def launch(self, device_s: float, host_s: float = 0.0) -> None:
        self.host_s += 0.0 if self.replaying else host_s
        self.stream_s = max(self.stream_s, self.host_s) + device_s

    def wait(self) -> None:
        self.host_s = max(self.host_s, self.stream_s)

    def capture(self, call, calls):
        self.captured += calls

        def replay():
            self.replaying = True
            for _ in range(calls):
                call()
            self.replaying = False

        return replay


def play(monkeypatch) -> Device:
    """Let ``torch.cuda`` be a played device for the clock, with an L2 cache of 1 MiB."""
    made = Device()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at_s = max(made.stream_s, made.host_s)

        def synchronize(self) -> None:
            made.host_s = max(made.host_s, self.at_s)

        def elapsed_time(self, end: "Event") -> float:
            return (end.at_s - self.at_s) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: made.launch(cycles / 2e9))
    properties = SimpleNamespace(L2_cache_size=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(device_clock, "_captured", made.capture)
    monkeypatch.setattr(device_clock, "time", SimpleNamespace(perf_counter=lambda: made.host_s))
    return made


@pytest.fixture
def device(monkeypatch):
    return play(monkeypatch)


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
    ("call_s", "host_s", "graph", "least_calls", "calls", "captured"),
    [
        (5e-6, 0, None, 1, 200, True),  # below 20 us: a graph
        (5e-6, 90e-6, None, 1, 200, True),  # even where the launch takes far longer
        (5e-6, 90e-6, False, 1, 200, False),
        (50e-6, 90e-6, None, 1, 20, False),
        (50e-6, 0, True, 1, 20, True),
        (50e-6, 0, None, 64, 64, False),  # the rotation of inputs is gone through
        (0.1, 0, None, 1, 1, False),
    ],
)
def test_the_plan(device, call_s, host_s, graph, least_calls, calls, captured):
    made = device_clock.plan(lambda: device.launch(call_s, host_s), graph, least_calls)
    assert made.calls == pytest.approx(calls, abs=1)
    assert made.host_s == pytest.approx(host_s)
    assert (device.captured == made.calls) is captured
    assert made.method.startswith("CUDA graph" if captured else "CUDA events")
    device.wait()
    before = device.stream_s
    made.round()
    slowest = call_s if captured else max(call_s, host_s)
    assert device.stream_s - before == pytest.approx(made.calls * slowest, rel=0.1)
    assert 10 <= made.rounds <= 200


def test_a_probe_does_not_take_long(device):
    device_clock.plan(lambda: device.launch(1.0), None)
    assert device.stream_s < 10
