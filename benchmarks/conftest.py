"""Fixtures of the benchmarks, and what happens when a run is over. How to use them: README.md."""

from collections import defaultdict
from pathlib import Path

import pytest
import record
import torch
from device_clock import DeviceClock
from timing import Timed

from spcxr.ops import dispatch

Key = tuple[str, str]  # of a benchmark (its file without bench_) and a device
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Run:
    """What a session measured, by benchmark file and device: rows with their targets, and why
    they are no whole result."""

    def __init__(self) -> None:
        self.measured: dict[Key, list[tuple[record.Row, list[record.Target]]]] = defaultdict(list)
        self.partial: dict[Key, str] = {}


RUN = pytest.StashKey[Run]()


def pytest_addoption(parser):
    group = parser.getgroup("spcxr benchmarks")
    group.addoption(
        "--results",
        type=Path,
        default=record.RESULTS,
        help="folder of the results, one below it a device (default: benchmarks/results)",
    )
    group.addoption("--prepare-seconds", type=float, default=15, help="prepare: of each timing")
    group.addoption("--prepare-files", type=int, default=20000, help="prepare: of the memory check")


def pytest_configure(config):
    config.stash[RUN] = Run()


def pytest_benchmark_update_machine_info(config, machine_info):
    """pytest-benchmark's own JSON says the same as ours, and names no host."""
    machine_info.pop("node", None)
    machine_info.update(record.circumstances(DEVICES[-1]))


def pytest_benchmark_update_commit_info(config, commit_info):
    commit_info["id"] = record.commit()


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """``cpu``, and ``cuda`` where there is one; ``parametrize("device", ["cpu"])`` narrows it."""
    return request.param


@pytest.fixture
def threads(request):
    """CPU threads of torch: 1, or ``parametrize("threads", [1, CORES], indirect=True)``."""
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


@pytest.fixture
def clock(request, device) -> DeviceClock | None:
    """The timer pytest-benchmark shall use, told before its own fixture is made."""
    if device == "cpu":
        return None
    made = DeviceClock()
    request.node.add_marker(pytest.mark.benchmark(timer=made), append=False)
    return made


@pytest.fixture
def timed(request, device, threads, clock, benchmark):
    """``timed(call, what=..., group=...)``: see ``timing.Timed``."""
    made = Timed(benchmark, device, clock, threads)
    yield made
    if benchmark.stats is not None:
        made.check_targets()
        request.config.stash[RUN].measured[key(request.node)].append((made.row, made.targets))


@pytest.fixture
def require_backend(device):
    """Skip, with the dispatcher's reason, where a backend of a verb cannot serve here."""

    def require(verb: str, backend: str) -> None:
        reason = dispatch.unavailable(verb, backend, device)
        if reason is not None:
            pytest.skip(f"{verb}: {backend} on {device}: {reason}")

    return require


def key(item) -> Key:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return item.path.stem.removeprefix("bench_"), parameters.get("device", "cpu")


def pytest_deselected(items):
    for item in items:
        item.config.stash[RUN].partial[key(item)] = "only a part of it was run"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.config.stash[RUN].partial[key(item)] = f"{item.name} failed"
    return report


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    for (name, device), measured in config.stash[RUN].measured.items():
        terminalreporter.section(f"{name} on {device}: multiples of the first of each group")
        verdicts = _print(terminalreporter, measured)
        terminalreporter.line(_write(config, exitstatus, (name, device), measured, verdicts))


def _print(terminalreporter, measured):
    """The tables of one benchmark on one device, and its targets; returns the verdicts."""
    rows = [row for row, _ in measured]
    printed = []
    for row in rows:
        if row not in printed:
            printed += record.peers(row, rows)
            for line in record.table(record.peers(row, rows)):
                terminalreporter.line(line)
    verdicts = [
        record.verdict(row, target, rows) for row, targets in measured for target in targets
    ]
    for said in verdicts:
        held = said["verdict"] == "held"
        sense = "at_most" if "at_most" in said else "at_least"
        terminalreporter.line(
            f"{said['verdict']:<6} {said['target']} = {record.short(said['value'])}, "
            f"target {sense.replace('_', ' ')} {said[sense]:g}",
            green=held,
            red=not held,
            bold=not held,
        )
    return verdicts


def _write(config, exitstatus, key, measured, verdicts) -> str:
    """Write the result where it is a whole one; returns the line to say."""
    name, device = key
    why = config.stash[RUN].partial.get(key)
    if any(f"bench_{name}.py::" in argument for argument in config.args):
        why = "only a part of it was run"
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        why = "the run was cut short"
    if why is not None:
        return f"result not written: {why}"
    said = record.circumstances(device)
    rows = [row for row, _ in measured]
    return str(
        record.write(config.getoption("results") / record.slug(device), name, said, rows, verdicts)
    )
