"""`classify` on two processes: the weights of one, resumed, stopped together."""

import json
import signal
import sys
import time

import pytest
from labelled_runs import findings, one_label
from ranks import end, launch, same_weights

from spcxr.train.journal import read_records

pytestmark = pytest.mark.slow
CODE = "from spcxr.cli import train; train()"
# 17 rows to learn from in batches of 8: the last step has one, and so none for the second rank.
SPLITS = (["train"] + ["val", "test"] * 3 + ["train"]) * 8 + ["train"]


def start(store, init, out, *, ranks=2, **flags):
    given = {"epochs": 3, "batch-size": 8, "base-lr": 2e-3, "drop-path": 0.0, "device": "cpu"}
    given |= {"precision": "fp32", "data": store.path, "init": init, "out": out}
    given |= {name.replace("_", "-"): value for name, value in flags.items()}
    words = [f"--{name}={value}" for name, value in given.items()]
    return launch([sys.executable, "-c", CODE, "classify", *words], ranks=ranks)


def figures(folder, kind="train", name="loss"):
    return [r[name] for r in read_records(folder) if r["kind"] == kind]


@pytest.mark.parametrize(
    ("columns", "flags"),
    [
        (findings, {"class_weights": "auto", "uncertain": "lsr-ones", "ema": 0.5}),
        (one_label, {"class_weights": "auto"}),
        (findings, {"method": "linear"}),
    ],
)
def test_two_processes_give_the_weights_of_one(columns, flags, make_store, tiny_init, tmp_path):
    """Unknown labels lie in other numbers on the two sides: each counts alike all the same."""
    store = make_store(columns, count=65, splits=SPLITS)
    end(start(store, tiny_init, tmp_path / "one", ranks=1, **flags))
    end(start(store, tiny_init, tmp_path / "two", **flags))
    folders = [tmp_path / "one", tmp_path / "two"]
    same_weights(*folders)
    metrics = [json.loads((f / "metrics.json").read_text()) for f in folders]
    assert metrics[0]["rows"] == metrics[1]["rows"] == {"train": 17, "val": 24, "test": 24}
    values = [m["test"]["overall"]["macro_auroc"]["value"] for m in metrics]
    assert values[1] == pytest.approx(values[0], abs=0.02)
    if "method" not in flags:
        losses = [figures(f) for f in folders]
        assert len(losses[0]) == 9
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert "; 2 processes" in (folders[1] / "train.log").read_text()
    made = [{p.name for p in f.iterdir()} for f in folders]
    assert made[0] == made[1]


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(make_store, tiny_init, tmp_path):
    store = make_store(one_label, count=65, splits=SPLITS)
    end(start(store, tiny_init, tmp_path / "whole", ranks=1, epochs=40))
    processes = start(store, tiny_init, tmp_path / "run", epochs=40)
    until = time.monotonic() + 180
    while not (tmp_path / "run" / "checkpoints" / "last").exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGUSR1)
    said = end(processes, code=130)
    assert "stopped by SIGUSR1" in said[1]
    assert "stopped by a signal to another process" in said[0]
    block = json.loads((tmp_path / "run" / "checkpoints" / "last" / "checkpoint.json").read_text())
    assert 0 < block["position"]["step"] < 120
    end(start(store, tiny_init, tmp_path / "run", ranks=1, epochs=40))
    losses = [figures(tmp_path / f) for f in ("whole", "run")]
    assert len(losses[1]) == 120
    assert losses[1] == pytest.approx(losses[0], rel=2e-2, abs=2e-3)


def test_what_rank_0_refuses_all_refuse(make_store, tiny_init, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("")
    said = end(start(make_store(one_label), tiny_init, tmp_path / "run"), code=2, limit_s=60)
    assert all("holds 'thesis.tex' and no run" in text for text in said)
