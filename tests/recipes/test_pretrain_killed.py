"""Pretraining in processes of its own: stopped by SIGTERM, killed by SIGKILL, gone on with."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from spcxr import cli
from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.models import vit
from spcxr.objectives.gmml import build_gmml
from spcxr.recipes import pretrain
from spcxr.train.checkpoint import load_checkpoint
from spcxr.train.journal import read_records

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """18 images of noise to learn from (4 steps an epoch), 6 held out."""
    folder = tmp_path_factory.mktemp("data") / "store"
    names = [f"{i}.png" for i in range(24)]
    splits = ["val"] * 6 + ["train"] * 18
    columns = {"path": names, "patient_id": names, "split": splits}
    rng = np.random.default_rng(0)
    with StoreWriter(folder, Preprocess(size_px=40)) as writer:
        for _ in names:
            writer.add(rng.integers(0, 256, (40, 40), np.uint8))
        writer.finish(Manifest.from_columns(columns, root="."))
    return folder


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    monkeypatch.setitem(vit.VIT_SIZES, "vit_tiny", vit.ViTSize(24, 4, 3))


def steps(folder):
    return [r["step"] for r in read_records(folder) if r["kind"] == "train"]


def spawn(store, out, **flags):
    flags |= {"image_px": flags["image_px"][0]}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in flags.items()]
    code = (
        "import spcxr.models.vit as v; v.VIT_SIZES['vit_tiny'] = v.ViTSize(24, 4, 3);"
        "from spcxr.cli import train; train()"
    )
    command = [sys.executable, "-c", code, "pretrain", f"--data={store}", f"--out={out}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


LONG = {
    "model": "vit_tiny",
    "image_px": (32,),
    "patch_px": 8,
    "epochs": 2000,
    "batch_size": 4,
    "device": "cpu",
    "precision": "fp32",
}


def bare_objective():
    return build_gmml(vit.build_vit("vit_tiny", image_px=32, patch_px=8))


def wait_for(path, process, limit_s=180):
    end = time.monotonic() + limit_s
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_sigterm_saves_and_says_how_to_go_on(store, tmp_path, monkeypatch):
    out = tmp_path / "a"
    process = spawn(store, out, **LONG)
    wait_for(out / "checkpoints" / "last", process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 130
    line = said.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "stopped by SIGTERM" in line
    block = json.loads((out / "checkpoints" / "last" / "checkpoint.json").read_text())
    done = block["position"]["step"]
    assert steps(out) == [*range(1, done + 1)]
    # The very command it names: stop it again two steps on.
    words = shlex.split(line.split("go on with: ")[1])
    assert words[:2] == ["spcxr-train", "pretrain"]
    learn_step = pretrain.learn_step

    def stopped(loop, parts, step):
        if step == done + 1:
            signal.raise_signal(signal.SIGINT)
        return learn_step(loop, parts, step)

    monkeypatch.setattr(pretrain, "learn_step", stopped)
    answer = CliRunner().invoke(cli.train, words[1:])
    assert answer.exit_code == 130, answer.output
    assert f"going on after step {done} of 8000" in (out / "train.log").read_text()
    assert steps(out) == [*range(1, done + 3)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_killed_again_and_again_it_ends_as_if_nothing_had_happened(store, tmp_path, seed):
    """SIGKILL at random moments, mostly amid steps and the saves between them."""
    rng = np.random.default_rng(seed)
    flags = {**LONG, "epochs": 24, "sample_every": 12}
    whole = spawn(store, tmp_path / "whole", **flags)
    for kills in range(3):
        process = spawn(store, tmp_path / "a", **flags)
        begun = tmp_path / "a" / "metrics.jsonl"
        wait_for(begun, process)
        size = begun.stat().st_size
        while process.poll() is None and begun.stat().st_size == size:
            time.sleep(0.005)  # until it steps
        if kills == 2:
            break
        time.sleep(rng.uniform(0.0, 0.6))
        process.kill()
        process.communicate(timeout=180)
        last = tmp_path / "a" / "checkpoints" / "last"
        if last.exists():
            position = load_checkpoint(last, model=bare_objective())
            assert steps(tmp_path / "a")[-1] - position.step <= 8  # two epochs at the most
    for ended in (process, whole):
        _, said = ended.communicate(timeout=120)
        assert ended.returncode == 0, said
    books = [[{k: v for k, v in r.items() if k in ("step", "kind", "loss", "grad_norm")}
              for r in read_records(tmp_path / f)] for f in ("a", "whole")]  # fmt: skip
    assert len(books[1]) == 120  # 96 steps, 24 validations
    assert books[0] == books[1]
