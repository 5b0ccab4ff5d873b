"""Ten losses of each objective are those on record, on every backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_steps import GOLDEN, ten_steps

from spcxr.objectives.table import OBJECTIVES
from spcxr.ops import dispatch


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ten_losses_are_the_recorded_ones(name, backend, monkeypatch):
    if (reason := dispatch.unavailable("masked_patch_gather", backend, "cpu")) is not None:
        if backend in os.environ.get("SPCXR_REQUIRE_BACKENDS", "").split(","):
            pytest.fail(reason)
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "_first_that_can", lambda verb, device: backend)
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    losses = ten_steps(name)
    assert len(set(losses)) == 10
    assert losses == pytest.approx(golden["losses"], rel=golden["relative_tolerance"])


def test_tritons_losses_are_the_recorded_ones():
    """Two of the ten: Triton's interpreter takes 8 s a step, in a process of its own."""
    pytest.importorskip("triton", reason="triton is not installed")
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from golden_steps import ten_steps
from spcxr.ops import dispatch
dispatch._first_that_can = lambda verb, device: "triton"
print(*ten_steps("gmml", steps=2))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    losses = [float(number) for number in run.stdout.split()]
    golden = json.loads((GOLDEN / "gmml.json").read_text())["losses"]
    assert losses == pytest.approx(golden[:2], rel=1e-5)
