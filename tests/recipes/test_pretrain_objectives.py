"""Pretraining with each objective: whole runs, exact resume, other shapes, the command."""

from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from spcxr import cli
from spcxr.config import ConfigError
from spcxr.data.store import Store
from spcxr.models import vit
from spcxr.models.weights import load_model_folder
from spcxr.objectives.mcssl import build_mcssl
from spcxr.objectives.table import OBJECTIVES
from spcxr.recipes import pretrain, views
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.train.journal import read_records

TIMES = ("data_s", "step_s", "images_s", "memory_mib")
PARTS = {
    "gmml": {"l1"},
    "mae": {"mse"},
    "sit": {"l1", "contrast"},
    "mcssl": {"mse", "cls", "patch"},
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A tiny encoder, narrow heads, one thread."""
    monkeypatch.setitem(vit.VIT_SIZES, "vit_tiny", vit.ViTSize(24, 4, 3))
    narrow = OBJECTIVES["mcssl"]._replace(build=partial(build_mcssl, hidden=16))
    monkeypatch.setitem(OBJECTIVES, "mcssl", narrow)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def store(make_store):
    return make_store(splits=["train"] * 8 + ["val"] * 4, count=12).path


def settings(store, out, **changes):
    base = {
        "data": str(store),
        "out": str(out),
        "model": "vit_tiny",
        "image_px": (32,),
        "patch_px": 8,
        "epochs": 2,
        "batch_size": 4,
        "base_lr": 0.05,
        "sample_every": 2,
        "device": "cpu",
        "precision": "fp32",
        "prototypes": 12,
        "local_views": 2,
        "compile": "off",
    }
    return PretrainConfig(**{**base, **changes})


def books(folder):
    """All records without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_records(folder)]


def losses(folder, kind="train"):
    return [r["loss"] for r in read_records(folder) if r["kind"] == kind]


def test_every_objective_has_its_tests():
    assert set(PARTS) == set(OBJECTIVES)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_that_crashed_goes_on_exactly(objective, store, tmp_path, monkeypatch):
    """Four steps, the third lost to a crash after the checkpoint of the second."""
    config = settings(store, tmp_path / "whole", objective=objective)
    whole = pretrain.run(config)
    assert len(losses(whole)) == 4
    assert len(losses(whole, "val")) == 2
    assert PARTS[objective] <= set(read_records(whole)[0])
    page = np.asarray(Image.open(whole / "samples" / "epoch-0002.png"))
    assert page.shape == (16 + 4 * 132, 4 * 132 - 4)  # four held-out images, four columns
    learn_step = pretrain.learn_step

    def crash(loop, parts, step):
        if step == 3:
            raise MemoryError
        return learn_step(loop, parts, step)

    config = settings(store, tmp_path / "a", objective=objective)
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learn_step", crash)
        with pytest.raises(MemoryError):
            pretrain.run(config)
    pretrain.run(config)
    assert books(tmp_path / "a") == books(whole)
    ends = [load_file(f / "checkpoints/last/model.safetensors") for f in (tmp_path / "a", whole)]
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())
    taught = {k.split(".")[0] for k in ends[0]}
    assert ("teacher" in taught) == (objective in ("sit", "mcssl"))
    assert load_model_folder(whole).config["provenance"]["objective"] == objective


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_oblong_views_three_channels_and_blocks_computed_twice(objective, store, tmp_path):
    shape = {"image_px": (28, 42), "patch_px": 14, "channels": 3, "epochs": 1}
    runs = [
        pretrain.run(
            settings(store, tmp_path / str(again), objective=objective, recompute=again, **shape)
        )
        for again in (False, True)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    assert load_model_folder(runs[0]).config["pretrained_cfg"]["input_size"] == [3, 28, 42]


@pytest.mark.parametrize("objective", ["gmml", "mcssl"])
def test_parts_of_a_step_make_the_same_step(objective, store, tmp_path):
    """Losses and centres of two parts of 4 are those of one batch of 8."""
    folders = [
        pretrain.run(
            settings(
                store, tmp_path / str(n), objective=objective, batch_size=8, accumulate=n, epochs=3
            )
        )
        for n in (1, 2)
    ]
    assert losses(folders[1]) == pytest.approx(losses(folders[0]), rel=1e-4)
    if objective == "mcssl":
        centres = [load_file(f / "checkpoints/last/model.safetensors")["centres"] for f in folders]
        assert centres[0].abs().max() > 0.01
        torch.testing.assert_close(centres[1], centres[0], rtol=1e-3, atol=1e-4)


def test_views_of_each_objective(store, tmp_path):
    counts = {
        name: settings(store, tmp_path, objective=name, local_views=5).law((0.0,))
        for name in OBJECTIVES
    }
    assert {n: (law.corrupted, law.local) for n, law in counts.items()} == {
        "gmml": (1, 0),
        "mae": (1, 0),
        "sit": (2, 0),
        "mcssl": (2, 5),
    }


@pytest.mark.parametrize(
    ("image_px", "patch_px", "local"),
    [
        ((224,), 16, (96, 96)),
        ((224,), 14, (98, 98)),
        ((224, 336), 16, (96, 144)),
        ((32,), 16, (16, 16)),
        ((16,), 16, (16, 16)),
    ],
)
def test_local_views_are_three_sevenths_of_the_input(store, tmp_path, image_px, patch_px, local):
    config = settings(store, tmp_path, objective="mcssl", image_px=image_px, patch_px=patch_px)
    law = config.law((0.0,))
    assert law.local_size == local
    drawn = views.draw(Store.open(store), np.arange(3), law, epoch=0)
    assert [v.views.size for v in drawn] == [config.size] * 2 + [local] * 2
    assert [v.fill is None for v in drawn] == [False, False, True, True]


@pytest.mark.parametrize(
    "bad",
    [
        {"reconstruction_weight": -1.0},
        {"teacher_momentum": 1.5},
        {"teacher_temperature": 0.0},
        {"prototypes": 1},
        {"local_views": -1},
    ],
)
def test_settings_that_cannot_be(bad, store, tmp_path):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))} is .*; it must"):
        settings(store, tmp_path, objective="mcssl", **bad)


@pytest.mark.parametrize("objective", ["sit", "mcssl"])
def test_the_command(objective, store, tmp_path):
    words = (
        f"pretrain --data {store} --out {tmp_path / 'run'} --objective {objective} "
        "--model vit_tiny --image-px 32 --patch-px 8 --epochs 1 --batch-size 4 --device cpu "
        "--precision bf16 --prototypes 12 --local-views 1 --teacher-momentum 0.99 "
        "--reconstruction-weight 5"
    )
    done = CliRunner().invoke(cli.train, words.split())
    assert done.exit_code == 0, done.output
    first, *_ = read_records(tmp_path / "run")
    parts = sum(first[name] * (5 if name in ("l1", "mse") else 1) for name in PARTS[objective])
    assert first["loss"] == pytest.approx(parts, rel=1e-5)
