"""The benchmarks collect, judge their own numbers, and leave a result that can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import record
import timing
import torch

FOLDER = Path(record.__file__).parent
TINY = dedent("""
    import pytest
    import torch

    @pytest.mark.parametrize("device", ["cpu"])
    @pytest.mark.parametrize("what, n", [("ours", 4), ("theirs", 4096)])
    def test_sum(timed, what, n):
        assert torch.get_num_threads() == 1
        x = torch.ones(n)
        made = timed(x.sum, what=what, group="sum", images=2, nbytes=x.nbytes, memory=True)
        assert made == n
        if what == "ours":
            timed.target("speed", at_least=1e-6, of="theirs")
            timed.target("min_us", at_most=0)
            timed.target("speed", at_least=1, of="nobody")

    @pytest.mark.parametrize("device", ["cpu"])
    def test_extra(timed):
        timed(lambda: None, what="nothing", group="extra", rounds=1)
""")
PLAYED = dedent("""
    import pytest
    import timing
    import torch
    from test_device_clock import play

    @pytest.fixture
    def played(monkeypatch):
        monkeypatch.setitem(timing._copy_rates, ("cuda", 1), 1e12)
        return play(monkeypatch)

    @pytest.fixture
    def device(played):
        return "cuda"

    @pytest.mark.parametrize("call_s", [5e-6, 50e-6])
    def test_verb(timed, played, call_s):
        seen = []

        def call(x):
            played.launch(call_s, host_s=90e-6)
            seen.append(int(x[0]))

        timed(
            call,
            what=f"{call_s * 1e6:g} us",
            group="played",
            nbytes=1_000_000,
            inputs=lambda i: (torch.full((2**18,), float(i)),),
        )
        assert set(seen) == {0, 1, 2, 3}
""")
FILES = {
    "played": PLAYED,
    "whole": TINY,
    "narrowed": TINY.replace("test_extra", "test_left_out"),
    "one": TINY,
    "wrong": TINY.replace("made == n", "made == 4"),
    "misspelt": TINY.replace('"min_us"', '"min_ms"'),
}


def alone():
    """The environment without the signs of the processes that tests are divided among."""
    return {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_XDIST")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run over the files above, as benchmarks are run: what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("benches")
    for name, text in FILES.items():
        (folder / f"bench_{name}.py").write_text(text)
    named = [f"bench_{name}.py" + ("::test_sum" if name == "one" else "") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-c", FOLDER / "pytest.ini", "-p", "conftest"]
    options = ["--benchmark-max-time=0.01", "-k", "not left_out", "-p", "no:cacheprovider"]
    path = [FOLDER, record.ROOT, Path(__file__).parent]
    done = subprocess.run(
        [*command, *options, f"--rootdir={folder}", "--results", folder / "results", *named],
        cwd=folder,
        env=alone() | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr, folder / "results"


def test_a_run_leaves_its_result(ran):
    said, folder = ran
    result = json.loads(next(folder.rglob("whole.json")).read_text())
    assert {"device", "commit", "torch", "triton", "date", "cores", "cpu_capability"} <= set(result)
    ours, theirs, _ = result["rows"]
    assert (ours["what"], theirs["what"], ours["threads"], ours["images"]) == (
        *("ours", "theirs"),
        *(1, 2),
    )
    assert 0 < ours["min_us"] <= ours["q20_us"] <= ours["median_us"] <= ours["q80_us"]
    assert ours["median_us_an_image"] == pytest.approx(ours["median_us"] / 2, rel=1e-3)
    assert theirs["bytes"] == 4096 * 4
    assert theirs["gb_s"] == pytest.approx(4096 * 4 / theirs["median_us"] / 1e3, rel=1e-3)
    assert theirs["share_of_copy"] > 0
    assert [t["verdict"] for t in result["targets"]] == ["held", "MISSED", "NOT MEASURED"]
    assert "MISSED sum: ours: min_us = " in said


def test_a_device_keeps_the_time_on_cuda(ran):
    """With a played device: pytest-benchmark reads its clock, inputs rotate past three times L2."""
    short, long = json.loads(next(ran[1].rglob("played.json")).read_text())["rows"]
    assert short["method"].startswith("CUDA graph")
    assert long["method"].startswith("CUDA events")
    assert (short["median_us"], long["median_us"]) == pytest.approx((5, 90), rel=0.05)
    assert short["host_us"] == pytest.approx(90)
    assert (short["rotated_mib"], short["share_of_copy"]) == pytest.approx((4, 0.2), rel=0.01)


def test_a_missed_target_fails_nothing(ran):
    # ten sums, three extras, two played; the wrong answer fails one, the misspelt target is an
    # error of its own
    assert "1 failed, 14 passed, 1 deselected, 1 error" in ran[0]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("narrowed", "only a part of it was run"),
        ("one", "only a part of it was run"),
        ("wrong", "test_sum[theirs-4096-cpu] failed"),
        ("misspelt", "test_sum[ours-4-cpu] failed"),
    ],
)
def test_half_a_result_overwrites_nothing(ran, name, why):
    said, folder = ran
    assert not list(folder.rglob(f"{name}.json"))
    section = said.split(f" {name} on cpu: ")[1]
    assert f"result not written: {why}" in section.split(" on cpu: ")[0]


def test_every_bench_collects():
    """And `make test` does not: it is the benchmarks' own pytest.ini that names bench_*.py."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, "benchmarks"], cwd=record.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in FOLDER.glob("bench_*.py"):
        assert f"{file.name}::" in done.stdout


def test_peak_memory_counts_what_is_held_at_once():
    x = torch.rand(256, 1024)  # 1 MiB
    assert timing.peak_bytes(lambda: (x + 1).mul_(2), "cpu") == pytest.approx(2**20, rel=0.01)
    assert timing.peak_bytes(lambda: (x + 1) * 2, "cpu") == pytest.approx(2 * 2**20, rel=0.01)


def test_ratios_compare_images_not_calls():
    """A slow contender may be timed on fewer images; and never across threads."""
    row = {"group": "g", "device": "cpu", "threads": 1, "what": "ours", "median_us_an_image": 1.0}
    rows = [row, row | {"what": "slow", "median_us_an_image": 30.0}]
    rows.append(row | {"what": "slow", "threads": 2, "median_us_an_image": 1.0})
    said = record.verdict(row, record.Target("speed", 20, None, "slow"), rows)
    assert (said["value"], said["verdict"]) == (pytest.approx(30), "held")
    said = record.verdict(row, record.Target("median_us_an_image", None, 0.01, "slow"), rows)
    assert said["verdict"] == "MISSED"
