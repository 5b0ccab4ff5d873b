"""`evaluate` on two processes: the files of one, byte for byte, and one refusal for both."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from spcxr.recipes.evaluate import EvaluateConfig, run
from spcxr.recipes.leaks import write_trained_on
from spcxr.recipes.testset import Settings, in_batches
from spcxr.train.distributed import World

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


class Half(World):
    """One of two processes that never meet: what it would add stays what it made."""

    def __init__(self, rank):
        super().__init__(CPU, rank, 2)

    def add_up(self, values):
        return values


@pytest.mark.parametrize("count", [1, 10, 11])
def test_batches_are_taken_in_turn_and_add_up_to_all(count):
    rows, asked = np.arange(count) + 100, []

    def work(batch):
        asked.append(batch.tolist())
        return np.stack([batch / 7, np.full(len(batch), np.nan)], 1)

    alone = in_batches(rows, Settings(4, CPU, "fp32"), "alone", work, 2)
    whole, asked = asked, []
    halves = [
        in_batches(rows, Settings(4, CPU, "fp32", world=Half(rank)), "half", work, 2)
        for rank in (0, 1)
    ]
    assert sorted(asked) == sorted(whole)
    assert {tuple(batch) for batch in asked} == {tuple(batch) for batch in whole}
    np.testing.assert_array_equal(halves[0] + halves[1], alone)


def on_two(model, out, *words):
    """Two processes as torchrun starts them: their exit codes, and what each said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    code = "from spcxr.cli import train; train()"
    command = [sys.executable, "-c", code, "evaluate", str(model), f"--out={out}", *words]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    clean |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**clean, "RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=180)[1] for process in processes]
    return [process.returncode for process in processes], said


@pytest.mark.slow
def test_two_processes_write_what_one_writes(make_store, task_model, tmp_path):
    torch.set_num_threads(1)

    def columns(there):
        return {"square": [str(int(t) ^ (i % 5 == 0)) for i, t in enumerate(there)]}

    one = make_store(columns, prefix="a-")
    other = make_store(columns, prefix="b-", name="other", count=40)
    model, rival = task_model("run", ["square"]), task_model("rival", ["square"], seed=1)
    given = {
        "splits": "all",
        "n_bootstrap": 100,
        "batch_size": 16,
        "corruptions": "noise,inversion",
        "against": str(rival),
        "device": "cpu",
        "precision": "fp32",
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    codes, said = on_two(model, tmp_path / "two", f"--data={one.path},{other.path}", *words)
    assert codes == [0, 0], said
    config = EvaluateConfig(
        run=str(model),
        data=(str(one.path), str(other.path)),
        out=str(tmp_path / "one"),
        **(given | {"splits": ("all",), "corruptions": ("noise", "inversion")}),
    )
    run(config)
    tables = [(tmp_path / name / "predictions.csv").read_bytes() for name in ("one", "two")]
    assert tables[0] == tables[1]
    found = [json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two")]
    assert found[0]["sets"] == found[1]["sets"]


@pytest.mark.slow
def test_a_refusal_ends_both_processes_in_the_same_words(make_store, task_model, tmp_path):
    store = make_store(lambda there: {"square": [str(int(t)) for t in there]}, prefix="site-")
    model = task_model("run", ["square"])
    write_trained_on(model / "model", store, store.manifest.rows("train"), np.zeros(0, np.int64))
    words = (f"--data={store.path}", "--splits=all", "--device=cpu")
    codes, said = on_two(model, tmp_path / "out", *words)
    assert codes == [2, 2], said
    for words in said:
        assert "32 patients (32 rows, the first 000.png) were in training" in words
    assert not (tmp_path / "out").exists()
