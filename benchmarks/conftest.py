"""Fixtures of the benchmarks, and what happens when a run is over. How to use them: README.md."""

from collections import defaultdict
from pathlib import Path

import pytest
import record
import torch
from device_clock import DeviceClock
from timing import Timed

from spcxr.ops import dispatch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class Run:
    """What a session measured, by benchmark file: rows with their targets, and why a file's rows
    are no full result."""

    def __init__(self) -> None:
        self.measured: dict[str, list[tuple[record.Row, list[record.Target]]]] = defaultdict(list)
        self.partial: dict[str, str] = {}


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
        request.config.stash[RUN].measured[bench_name(request.node)].append(
            (made.row, made.targets)
        )


@pytest.fixture
def require_backend(device):
    """Skip, with the dispatcher's reason, where a backend of a verb cannot serve here."""

    def require(verb: str, backend: str) -> None:
        reason = dispatch.unavailable(verb, backend, device)
        if reason is not None:
            pytest.skip(f"{verb}: {backend} on {device}: {reason}")

    return require


def bench_name(item) -> str:
    return item.path.stem.removeprefix("bench_")


def pytest_deselected(items):
    for item in items:
        item.config.stash[RUN].partial[bench_name(item)] = "only a part of it was run"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed:
        item.config.stash[RUN].partial[bench_name(item)] = f"{item.name} failed"
    return report


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    run = config.stash[RUN]
    for name, measured in run.measured.items():
        terminalreporter.section(f"{name}: multiples of the first of each group")
        for device in DEVICES:
            chosen = [(row, targets) for row, targets in measured if row["device"] == device]
            if chosen:
                verdicts = _print(terminalreporter, chosen)
                terminalreporter.line(_write(config, exitstatus, name, chosen, verdicts))


def _print(terminalreporter, chosen):
    """The tables of one benchmark on one device, and its targets; returns the verdicts."""
    rows = [row for row, _ in chosen]
    printed = []
    for row in rows:
        if row not in printed:
            printed += record.peers(row, rows)
            for line in record.table(record.peers(row, rows)):
                terminalreporter.line(line)
    verdicts = [record.verdict(row, target, rows) for row, targets in chosen for target in targets]
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


def _write(config, exitstatus, name, chosen, verdicts) -> str:
    """Write the result where it is a whole one; returns the line to say."""
    why = config.stash[RUN].partial.get(name)
    if any("::" in argument for argument in config.args):
        why = "only a part of it was run"
    if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        why = "the run was cut short"
    if why is not None:
        return f"result not written: {why}"
    rows = [row for row, _ in chosen]
    said = record.circumstances(rows[0]["device"])
    return str(record.write(config.getoption("results"), name, said, rows, verdicts))
