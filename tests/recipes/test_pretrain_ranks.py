"""Pretraining on two processes: the losses of one, resumed on another number, one that dies."""

import json
import re
import signal
import sys
import time

import numpy as np
import pytest
from ranks import end, launch

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.models.weights import load_model_folder
from spcxr.train.journal import read_records

CODE = (
    "import spcxr.models.vit as v; v.VIT_SIZES['vit_tiny'] = v.ViTSize(24, 4, 3);"
    "from spcxr.cli import train; train()"
)
FLAGS = {
    "model": "vit_tiny",
    "image-px": 32,
    "patch-px": 8,
    "epochs": 2,
    "batch-size": 8,
    "base-lr": 0.5,
    "drop-path": 0.3,
    "fill": "noise,other,shuffle",
    "sample-every": 1,
    "device": "cpu",
    "precision": "fp32",
}


BROKEN = (
    "import os, spcxr.recipes.pretrain as p; step = p.learn_step\n"
    "def broken(loop, parts, n):\n"
    "    if n == 3 and os.environ['RANK'] == '1': raise RuntimeError('a bug of its own')\n"
    "    return step(loop, parts, n)\n"
    "p.learn_step = broken\n"
)


def start(store, out, *, ranks=1, slurm=False, first="", **flags):
    """The processes of a run, as torchrun or srun would start them."""
    given = FLAGS | {name.replace("_", "-"): value for name, value in flags.items()}
    words = [f"--{name}={value}" for name, value in given.items()]
    command = [
        sys.executable,
        "-c",
        first + CODE,
        "pretrain",
        f"--data={store}",
        f"--out={out}",
        *words,
    ]
    return launch(command, ranks=ranks, slurm=slurm)


def figures(folder, kind="train"):
    return [r["loss"] for r in read_records(folder) if r["kind"] == kind]


def wait_for(path, processes, limit_s=180, written=False):
    until = time.monotonic() + limit_s
    while not path.exists() or (written and not path.stat().st_size):
        assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """40 bright spots to learn from (5 steps of 8), 8 held out."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    names = [f"{i}.png" for i in range(48)]
    columns = {"path": names, "patient_id": names, "split": (["train"] * 5 + ["val"]) * 8}
    y, x = np.mgrid[:40, :40]
    with StoreWriter(folder / "store", Preprocess(size_px=40)) as writer:
        for _ in names:
            cy, cx, size = rng.uniform(8, 24, 3)
            spot = 220 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / size**2)
            writer.add(spot.astype(np.uint8))
        return writer.finish(Manifest.from_columns(columns, root=".")).path


@pytest.fixture(scope="module")
def one(store, tmp_path_factory):
    """The run of one process that nothing disturbs: 2 epochs of 5 steps."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    end(start(store, folder))
    return folder


@pytest.mark.parametrize(("parallel", "slurm"), [("ddp", False), ("fsdp", True)])
def test_two_processes_give_the_losses_of_one(store, one, tmp_path, parallel, slurm):
    """Float sums differ in order: 1e-4 of a loss after ten large steps."""
    end(start(store, tmp_path / "two", ranks=2, slurm=slurm, parallel=parallel))
    for kind, count in (("train", 10), ("val", 2)):
        alone, both = figures(one, kind), figures(tmp_path / "two", kind)
        assert len(alone) == count
        assert max(alone) > 1.02 * min(alone)
        assert both == pytest.approx(alone, rel=1e-4)
    norms = [[r["grad_norm"] for r in read_records(f) if r["kind"] == "train"]
             for f in (one, tmp_path / "two")]  # fmt: skip
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    made = [{p.name for p in f.iterdir()} for f in (one, tmp_path / "two")]
    assert made[0] == made[1]
    assert "2 processes" in (tmp_path / "two" / "train.log").read_text()
    load_model_folder(tmp_path / "two")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "ddp"), (1, "ddp")),
        pytest.param((1, "ddp"), (2, "fsdp"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp"), (2, "ddp"), marks=pytest.mark.slow),
    ],
)
def test_going_on_with_another_number_of_processes(store, one, tmp_path, before, after):
    """In mid-epoch, with the same images a step: the losses of a run that nothing stopped."""
    out = tmp_path / "a"
    first = start(store, out, ranks=before[0], parallel=before[1])
    wait_for(out / "metrics.jsonl", first, written=True)
    first[-1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=240)[1] for process in first]
    assert {process.returncode for process in first} == {130}, said
    block = json.loads((out / "checkpoints" / "last" / "checkpoint.json").read_text())
    assert 0 < block["position"]["step"] < 10
    end(start(store, out, ranks=after[0], parallel=after[1]))
    for kind in ("train", "val"):
        assert figures(out, kind) == pytest.approx(figures(one, kind), rel=1e-4)


def test_a_signal_to_one_rank_stops_all_at_the_same_step(store, tmp_path):
    processes = start(store, tmp_path / "a", ranks=2, epochs=2000)
    wait_for(tmp_path / "a" / "checkpoints" / "last", processes)
    processes[1].send_signal(signal.SIGUSR1)
    said = end(processes, code=130)
    assert "stopped by SIGUSR1" in said[1]
    assert "stopped by a signal to another process" in said[0]
    assert all("--resume auto" in text for text in said)


SLOW = (
    "import sys, time; import spcxr.train.checkpoint as c; write = c._publish;"
    "c._publish = lambda *a: (write(*a), time.sleep(3),"
    " print('written', time.time(), file=sys.stderr));"
)


@pytest.mark.slow
def test_a_rank_that_is_stopped_waits_for_the_checkpoint_that_rank_0_writes(
    store, tmp_path, monkeypatch
):
    """Else torchrun, which ends all ranks after the first that ends, kills the writer."""
    monkeypatch.setattr(sys.modules[__name__], "CODE", SLOW + CODE)
    processes = start(store, tmp_path / "a", ranks=2, epochs=2000)
    wait_for(tmp_path / "a" / "checkpoints" / "last", processes)
    processes[1].send_signal(signal.SIGUSR1)
    processes[1].wait(60)
    ended = time.time()
    said = end(processes, code=130)
    assert float(re.findall(r"written ([\d.]+)", said[0])[-1]) <= ended


@pytest.mark.slow
def test_ranks_that_find_different_checkpoints_are_refused(store, tmp_path):
    """Folders of their own, as on nodes without a shared file system."""
    apart = (
        "import os, pathlib; import spcxr.train.checkpoint as c; begin = c.Checkpoints.__init__;"
        "c.Checkpoints.__init__ = lambda self, folder, **k: begin(self,"
        " folder / 'none' if os.environ.get('RANK') == '1' else folder, **k);"
    )
    end(start(store, tmp_path / "a", ranks=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "CODE", apart + CODE)
        processes = start(store, tmp_path / "a", ranks=2)
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert all("rank 1 finds another checkpoint there than rank 0" in text for text in said)
    assert all(process.returncode for process in processes)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_ends_the_others_by_name(store, tmp_path, dead):
    processes = start(store, tmp_path / "a", ranks=2, epochs=2000)
    wait_for(tmp_path / "a" / "checkpoints" / "last", processes)
    processes[dead].kill()
    began = time.monotonic()
    _, said = processes[1 - dead].communicate(timeout=180)
    assert time.monotonic() - began < 35, said
    assert processes[1 - dead].returncode == 1
    line = said.strip().splitlines()[-1]
    assert line.startswith(f"error: rank {dead}"), said
    assert "goes on from the last checkpoint" in line
    processes[dead].communicate(timeout=180)


def test_an_error_of_one_rank_ends_the_others_with_its_words(store, tmp_path):
    processes = start(store, tmp_path / "a", ranks=2, first=BROKEN)
    _, own = processes[1].communicate(timeout=180)
    began = time.monotonic()
    _, other = processes[0].communicate(timeout=180)
    assert time.monotonic() - began < 15, other
    assert "RuntimeError: a bug of its own" in own
    assert "rank 1 failed: a bug of its own" in other.strip().splitlines()[-1]


def test_what_rank_0_refuses_all_refuse(store, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("")
    said = end(start(store, tmp_path / "a", ranks=2), code=2, limit_s=180)
    assert all("holds 'thesis.tex' and no run" in text for text in said)
