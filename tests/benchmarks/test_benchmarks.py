"""The benchmarks collect, judge their own numbers, and leave a result that can be read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import record
import timing
import torch

FOLDER = Path(record.__file__).parent
TINY = """
    import pytest
    import torch

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
"""


@pytest.fixture
def bench(tmp_path):
    """Run a benchmark file's text as the repository's are run; returns its output and results."""

    def run(text: str, *words: str) -> tuple[str, dict | None]:
        (tmp_path / "bench_tiny.py").write_text("\n".join(l[4:] for l in text.splitlines()))
        command = [sys.executable, "-m", "pytest", "-c", FOLDER / "pytest.ini", "-p", "conftest"]
        options = [f"--rootdir={tmp_path}", "--results", tmp_path / "results"]
        paths = os.pathsep.join([str(FOLDER), str(record.ROOT)])
        done = subprocess.run(
            [*command, *options, "--benchmark-max-time=0.01", "-p", "no:cacheprovider", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
        )
        found = list((tmp_path / "results").rglob("tiny.json"))
        return done.stdout + done.stderr, json.loads(found[0].read_text()) if found else None

    return run


def test_a_run_leaves_its_result(bench):
    said, result = bench(TINY, "bench_tiny.py")
    assert {"device", "commit", "torch", "triton", "date", "cores", "cpu_capability"} <= set(result)
    ours, theirs = result["rows"]
    assert (ours["what"], theirs["what"], ours["threads"], ours["images"]) == (
        "ours",
        "theirs",
        1,
        2,
    )
    assert 0 < ours["min_us"] <= ours["q20_us"] <= ours["median_us"] <= ours["q80_us"]
    assert ours["median_us_an_image"] == pytest.approx(ours["median_us"] / 2, rel=1e-3)
    assert theirs["bytes"] == 4096 * 4
    assert theirs["gb_s"] == pytest.approx(4096 * 4 / theirs["median_us"] / 1e3, rel=1e-3)
    assert theirs["share_of_copy"] > 0
    assert [t["verdict"] for t in result["targets"]] == ["held", "MISSED", "NOT MEASURED"]
    assert "MISSED sum: ours: min_us = " in said
    assert "2 passed" in said  # a missed target does not fail the run


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-k", "ours", "bench_tiny.py"], "only a part of it was run"),
        (["bench_tiny.py::test_sum"], "only a part of it was run"),
    ],
    ids=["deselected", "one test"],
)
def test_a_part_overwrites_nothing(bench, words, why):
    said, result = bench(TINY, *words)
    assert result is None
    assert f"result not written: {why}" in said


def test_a_wrong_answer_overwrites_nothing(bench):
    said, result = bench(TINY.replace("made == n", "made == 4"), "bench_tiny.py")
    assert result is None
    assert "result not written: test_sum[" in said


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
