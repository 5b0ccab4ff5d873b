"""Two processes learn what one learns: keys gathered, BatchNorm and centres over all ranks."""

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from two_ranks import on_two_ranks

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.models import vit
from spcxr.objectives.mcssl import build_mcssl
from spcxr.objectives.table import OBJECTIVES
from spcxr.recipes.pretrain import PretrainConfig, run
from spcxr.train.journal import read_records

LEARN = """
import ast, sys, torch
from test_over_ranks import small
from spcxr.recipes.pretrain import PretrainConfig, run
torch.set_num_threads(1)
small()
run(PretrainConfig(**ast.literal_eval(sys.argv[1])))
"""


def small(setitem=dict.__setitem__):
    """A tiny encoder and narrow heads."""
    setitem(vit.VIT_SIZES, "vit_tiny", vit.ViTSize(24, 4, 3))
    narrow = OBJECTIVES["mcssl"]._replace(build=partial(build_mcssl, hidden=16))
    setitem(OBJECTIVES, "mcssl", narrow)


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(20)]
    columns = {"path": names, "patient_id": names, "split": ["train"] * 16 + ["val"] * 4}
    with StoreWriter(tmp_path / "store", Preprocess(size_px=32)) as writer:
        for size in rng.uniform(4, 30, 20):
            y, x = np.mgrid[:32, :32]
            writer.add((90 + 80 * np.sin(y / size) * np.cos(x / size)).astype(np.uint8))
        writer.finish(Manifest.from_columns(columns, root="."))
    return tmp_path / "store"


def settings(store, out, objective, **changes):
    base = {
        **{"data": str(store), "out": str(out), "objective": objective, "device": "cpu"},
        **{"model": "vit_tiny", "image_px": (32,), "patch_px": 8, "precision": "fp32"},
        **{"epochs": 2, "batch_size": 8, "base_lr": 0.05, "sample_every": 2},
        **{"prototypes": 12, "local_views": 2},
    }
    return {**base, **changes}


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("objective", ["sit", "mcssl"])
def test_two_processes_learn_what_one_does(objective, parallel, store, tmp_path, monkeypatch):
    """Losses of training and of held-out images, and all state, at the same global batch."""
    small(monkeypatch.setitem)
    one = run(PretrainConfig(**settings(store, tmp_path / "one", objective)))
    both = settings(store, tmp_path / "both", objective, parallel=parallel)
    on_two_ranks(LEARN, both)
    for kind, count in (("train", 4), ("val", 2)):
        found = [
            [{k: r[k] for k in r if k in ("loss", "l1", "contrast", "mse", "cls", "patch")}
             for r in read_records(folder) if r["kind"] == kind]
            for folder in (one, tmp_path / "both")
        ]  # fmt: skip
        assert len(found[0]) == count
        for alone, together in zip(*found, strict=True):
            assert together == pytest.approx(alone, rel=1e-4)
    last = "checkpoints/last/model.safetensors"
    mine, theirs = (load_file(f / last) for f in (one, tmp_path / "both"))
    for name, value in mine.items():
        if name.startswith(("teacher", "centres")) or "running" in name:
            torch.testing.assert_close(theirs[name], value, rtol=1e-2, atol=1e-4)
