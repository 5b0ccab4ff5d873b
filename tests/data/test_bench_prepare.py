"""The benchmark of prepare judges its own numbers."""

import importlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_every_target_has_a_verdict(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    bench = importlib.import_module("bench_prepare")
    rows = [
        {
            "kind": "png",
            "of_cores_times_bare": 0.9,
            "of_cores_times_bare_literal": 0.8,
            "peak_parent_mib": [100.0, 104.0],
            "peak_worker_mib": [100.0, 140.0],
        },
        {"kind": "many small files", "peak_parent_mib": [100.0, 140.0]},
        {"kind": "store read", "us_per_image_batch_64": 7.0, "us_per_image_batch_1": 51.0},
    ]
    assert {row["target"]: row["verdict"] for row in bench.verdicts(rows)} == {
        "png: of_cores_times_bare": "held",
        "png: of_cores_times_bare_literal": "MISSED",
        "png: growth of peak_parent_mib": "held",
        "png: growth of peak_worker_mib": "MISSED",
        "store read: us_per_image_batch_64": "held",
        "store read: us_per_image_batch_1": "MISSED",
    }
