"""What a pretraining begins with: schedules, rows, parts of a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.errors import SpcxrError
from spcxr.models import vit
from spcxr.recipes import pretrain_start
from spcxr.recipes.pretrain import run
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.train.distributed import World
from spcxr.train.journal import read_records


def settings(store, out, **changes):
    base = {"model": "vit_tiny", "image_px": (32,), "patch_px": 8, "epochs": 3, "device": "cpu"}
    return PretrainConfig(**{"data": str(store), "out": str(out), **base, **changes})


def listed(rows):
    return rows[np.arange(len(rows))].tolist()


def test_schedules_reach_their_ends(make_store, tmp_path):
    store = make_store(splits=["train"] * 18 + ["val"] * 6, count=24)
    training = pretrain_start.build(
        settings(store.path, tmp_path, epochs=20, batch_size=18, base_lr=0.0256, accumulate=3),
        tmp_path,
        store,
        World(torch.device("cpu")),
    )
    assert (training.epoch_steps, training.total_steps, training.epoch_images) == (1, 20, 18)
    peak = 0.0256 * 18 / 256
    assert training.lr(2) == pytest.approx(peak)  # warm-up: a tenth of 20 epochs
    assert max(training.lr(s) for s in range(20)) == pytest.approx(peak)
    assert training.lr(20) == pytest.approx(1e-6)
    assert training.weight_decay(0) == pytest.approx(0.04)
    assert training.weight_decay(20) == pytest.approx(0.4)


def test_rows_to_learn_from(make_store, tmp_path):
    held_out = ("external-b", "holdout")
    splits = ("train", "pretrain", "val-a", "val-b", "test", "drift-site", "train", *held_out)
    store = make_store(splits=list(splits), count=len(splits))
    order, rows, held_out = pretrain_start.choose_rows(settings(store.path, tmp_path), store)
    assert (listed(rows), held_out.tolist()) == ([0, 1, 6], [2, 3])
    assert sorted(order.take(0, 0, 3).tolist()) == [0, 1, 6]
    chosen = settings(store.path, tmp_path, splits=("pretrain", "val-a"))
    _, rows, held_out = pretrain_start.choose_rows(chosen, store)
    assert (listed(rows), held_out.tolist()) == ([1, 2], [3])


def test_rows_that_are_not_there(make_store, tmp_path):
    store = make_store(splits=["val", "test"], count=2)
    with pytest.raises(SpcxrError, match=r"no rows to learn from outside val, test; .*--splits"):
        pretrain_start.choose_rows(settings(store.path, tmp_path), store)
    with pytest.raises(SpcxrError, match="no split 'trian'; it has: val, test"):
        pretrain_start.choose_rows(settings(store.path, tmp_path, splits=("trian",)), store)


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "processes", "part"),
    [(64, 1, 1, 64), (7, 1, 1, 7), (64, 2, 4, 8), (6, 3, 1, 2), (8, 1, 3, None), (6, 1, 2, None)],
)
def test_a_step_divides_into_even_parts(batch_size, accumulate, processes, part):
    config = settings("s", "a", batch_size=batch_size, accumulate=accumulate)
    if part is not None:
        assert config.part(processes) == part
        return
    with pytest.raises(SpcxrError, match=r"processes x 1 parts .*--batch-size \d+") as caught:
        config.part(processes)
    better = int(str(caught.value).rsplit(" ", 1)[1])
    assert settings("s", "a", batch_size=better).part(processes) % 2 == 0


def test_ranks_take_the_parts_of_a_step_that_one_process_would(make_store, tmp_path):
    store = make_store()  # 32 rows to learn from
    config = settings(store.path, tmp_path, batch_size=16, accumulate=2)
    one = pretrain_start.build(config, tmp_path, store, World(torch.device("cpu")))
    found = []
    for rank in range(4):
        there = replace(one, world=World(torch.device("cpu"), rank, 4))
        rows, parts = there.rows_of(3)
        assert rows.tolist() == one.rows_of(3)[0].tolist()
        assert [len(part) for part in parts] == [2, 2]
        found += parts
    assert np.concatenate(found).tolist() == np.concatenate(one.rows_of(3)[1]).tolist()
    assert len(set(np.concatenate([one.rows_of(s)[0] for s in (2, 3)]).tolist())) == 32


def test_too_few_images_for_several_processes(make_store, tmp_path):
    store = make_store()
    config = settings(store.path, tmp_path, batch_size=64)
    with pytest.raises(SpcxrError, match=r"32 images to learn from, fewer than a step of 64 on 2"):
        pretrain_start.build(config, tmp_path, store, World(torch.device("cpu"), 0, 2))


# --- weights of sites -----------------------------------------------------------------------


def test_sites_are_seen_as_often_as_their_weights_say(make_store, tmp_path):
    store = make_store({"site": ["a"] * 16 + ["b"] * 48}, splits=["train"] * 64)
    config = settings(store.path, tmp_path, site_weights=("a=3",))
    order = pretrain_start.choose_rows(config, store)[0]
    for epoch in range(3):
        seen = np.bincount(order.take(epoch, 0, 64), minlength=64)
        assert (seen[:16].sum(), seen[16:].sum()) == (32, 32)
        assert set(seen[:16]) == {2}  # 16 images, each twice


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (("c=2",), r"--site-weights: no group 'c'; choose from: a, b"),
        (("a",), r"--site-weights 'a'; give site=number, as in a=2"),
        (("2",), r"--site-weights '2'; give site=number, as in a=2"),
        (("a=1", "a=3"), r"--site-weights names site 'a' twice"),
        (("a=-1",), r"--site-weights: a has -1"),
        (("a=0", "b=0"), r"no group is left"),
    ],
)
def test_weights_of_sites_that_cannot_be(make_store, tmp_path, weights, said):
    store = make_store({"site": ["a", "b"] * 32})
    config = settings(store.path, tmp_path, site_weights=weights)
    with pytest.raises(SpcxrError, match=said):
        pretrain_start.choose_rows(config, store)[0]


# --- probe, weights to start from -----------------------------------------------------------


@pytest.fixture
def small_encoder(monkeypatch):
    monkeypatch.setitem(vit.VIT_SIZES, "vit_tiny", vit.ViTSize(24, 4, 3))


def test_a_probe_is_noted_and_changes_nothing(make_store, tmp_path, small_encoder):
    store = make_store(lambda there: {"square": ["1" if t else "0" for t in there]})
    plain = {"batch_size": 8, "epochs": 4, "precision": "fp32", "sample_every": 0}
    quiet = run(settings(store.path, tmp_path / "quiet", **plain))
    probed = run(
        settings(store.path, tmp_path / "a", **plain, probe=str(store.path), probe_every=3)
    )
    found = [r for r in read_records(probed) if r["kind"] == "probe"]
    assert [r["epoch"] for r in found] == [3, 4]
    assert all(0.0 <= r["knn_auroc"] <= 1.0 and r["linear_auroc"] > 0.5 for r in found)
    states = [load_file(f / "model/model.safetensors") for f in (quiet, probed)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert "AUROC of frozen features over 1 labels" in (probed / "train.log").read_text()


def test_a_probe_that_cannot_be_is_refused_before_training(make_store, tmp_path, small_encoder):
    store = make_store()
    with pytest.raises(SpcxrError, match="no label columns to probe with"):
        run(settings(store.path, tmp_path / "a", probe=str(store.path)))
    assert not (tmp_path / "a").exists()


def test_what_became_of_foreign_weights_is_said(make_store, tmp_path, small_encoder):
    store = make_store()
    torch.manual_seed(5)
    state = vit.build_vit("vit_tiny", image_px=48, patch_px=8).state_dict()
    torch.save({"model": {**state, "mask_token": torch.zeros(1, 1, 24)}}, tmp_path / "mae.pth")
    config = settings(store.path, tmp_path / "a", init=str(tmp_path / "mae.pth"), epochs=1)
    folder = run(replace(config, base_lr=0.0, min_lr=0.0, precision="fp32"))
    said = (folder / "train.log").read_text()
    assert f"encoder from {tmp_path / 'mae.pth'}: matched {len(state)}, missing none" in said
    assert "6x6 -> 4x4 patches" in said
    kept = load_file(folder / "model/model.safetensors")
    assert torch.equal(kept["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


def test_weights_of_ours_ask_for_images_prepared_as_theirs(make_store, tmp_path, small_encoder):
    first = run(settings(make_store().path, tmp_path / "a", epochs=1))
    images = np.zeros((4, 32, 32), np.uint8)
    names = [f"{i}.png" for i in range(4)]
    with StoreWriter(tmp_path / "other", Preprocess(size_px=32, preset="voi")) as writer:
        for image in images:
            writer.add(image)
        columns = {"path": names, "split": ["train"] * 4}
        other = writer.finish(Manifest.from_columns(columns, root=tmp_path)).path
    with pytest.raises(SpcxrError, match=r"prepared otherwise than .* \(preset voi, not minmax\)"):
        run(settings(other, tmp_path / "b", init=str(first)))
