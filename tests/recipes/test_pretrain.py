"""Pretraining: repeats itself, goes on exactly where it stopped, learns, refuses, explains."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import Store, StoreWriter
from spcxr.errors import Interrupted, SpcxrError
from spcxr.models import vit
from spcxr.models.weights import load_model_folder
from spcxr.objectives import gmml
from spcxr.objectives.corruption import FILLS
from spcxr.recipes import pretrain
from spcxr.recipes.pretrain import PretrainConfig, run
from spcxr.recipes.pretrain_replay import replay
from spcxr.train import device
from spcxr.train.checkpoint import Checkpoints
from spcxr.train.journal import read_records
from spcxr.train.order import Order

TRAINED, VALIDATED, PX = 18, 6, 40


def draw_blob(rng):
    """A bright spot of random place and size: what hides it can be told from around it."""
    y, x = np.mgrid[:PX, :PX]
    cy, cx, size = rng.uniform(0.3, 0.7, 3) * PX
    image = 40 + 180 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * (0.4 * size) ** 2))
    return (image + rng.normal(0, 3, image.shape)).clip(0, 255).astype(np.uint8)


def write_store(folder, *, seed=0, prefix="", splits=("val",) * VALIDATED + ("train",) * TRAINED):
    rng = np.random.default_rng(seed)
    names = [f"{i}.png" for i in range(len(splits))]
    columns = {"path": names, "patient_id": [prefix + n for n in names], "split": list(splits)}
    with StoreWriter(folder, Preprocess(size_px=PX)) as writer:
        for _ in splits:
            writer.add(draw_blob(rng))
        writer.finish(Manifest.from_columns(columns, root="."))
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("data") / "store")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Operations this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def small_encoder(monkeypatch):
    monkeypatch.setitem(vit.VIT_SIZES, "vit_tiny", vit.ViTSize(24, 4, 3))


def settings(store, out, **changes):
    base = {
        "data": str(store),
        "out": str(out),
        "model": "vit_tiny",
        "image_px": (32,),
        "patch_px": 8,
        "epochs": 3,
        "batch_size": 4,
        "base_lr": 0.05,
        "sample_every": 2,
        "device": "cpu",
        "precision": "fp32",
    }
    return PretrainConfig(**{**base, **changes})


TIMES = ("data_s", "step_s", "images_s", "memory_mib")


def books(folder):
    """All records without what the clock decides."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_records(folder)]


def losses(folder, kind="train"):
    return [r["loss"] for r in read_records(folder) if r["kind"] == kind]


@pytest.fixture(scope="module")
def whole(store, one_thread, tmp_path_factory):
    """One run that nothing disturbs: 3 epochs of 4 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.VIT_SIZES, "vit_tiny", vit.ViTSize(24, 4, 3))
        return run(settings(store, tmp_path_factory.mktemp("runs") / "whole"))


# --- what a run is --------------------------------------------------------------------------


def test_a_run_folder_is_complete(whole, store):
    names = {p.name for p in whole.iterdir()}
    assert names == {
        *("config.yaml", "metrics.jsonl", "train.log", "tensorboard", "checkpoints", "model"),
        *("samples", "model_card.md", "run.lock"),
    }
    assert len(losses(whole)) == 12
    assert len(losses(whole, "val")) == 3
    first = read_records(whole)[0]
    assert {"loss", "l1", "grad_norm", "lr", "weight_decay", "epoch", *TIMES} <= set(first)
    loaded = load_model_folder(whole)
    assert loaded.config["preprocess"] == Store.open(store).preprocess.to_dict()
    assert loaded.config["pretrained_cfg"]["mean"] == [Store.open(store).mean]
    assert loaded.config["task"] is None
    assert loaded.config["provenance"]["data"] == Store.open(store).facts["content_hash"]
    assert "not a medical device" in (whole / "model_card.md").read_text()


@pytest.mark.parametrize("drawn", [True, False])
def test_phantoms_are_marked_on_the_card_and_in_the_model(tmp_path, drawn):
    store = write_store(tmp_path / "s", prefix="PHANTOM-0-" if drawn else "p")
    folder = run(settings(store, tmp_path / "a", epochs=1))
    assert load_model_folder(folder).config["provenance"]["phantoms"] is drawn
    card = (folder / "model_card.md").read_text()
    assert ("**Drawn phantoms, not patients" in card) is drawn


def test_the_model_is_the_last_checkpoints_encoder(whole):
    exported = load_file(whole / "model" / "model.safetensors")
    kept = load_file(whole / "checkpoints" / "last" / "model.safetensors")
    assert {f"encoder.{k}" for k in exported} == {k for k in kept if k.startswith("encoder.")}
    assert all(torch.equal(v, kept[f"encoder.{k}"]) for k, v in exported.items())


def test_the_loss_falls(store, tmp_path):
    """Held-out images are rebuilt better than by their mean, which is where training starts."""
    folder = run(settings(store, tmp_path / "a", epochs=40, batch_size=18, base_lr=0.04))
    found = losses(folder, "val")
    assert found[-1] < 0.7 * found[0]
    best = json.loads((folder / "checkpoints" / "best" / "checkpoint.json").read_text())
    assert best["position"]["best"] == min(found)


def test_the_picture(whole, store):
    files = sorted(p.name for p in (whole / "samples").iterdir())
    assert files == ["epoch-0002.png", "epoch-0003.png"]
    page = np.asarray(Image.open(whole / "samples" / "epoch-0003.png"))
    # Columns of 128 px, 4 apart, below the titles: each pixel of 32 px images stands 4 x 4 times.
    original, corrupted, rebuilt, mask = (
        page[16:, i * 132 : i * 132 + 128][:, ::4] for i in range(4)
    )
    rows = [slice(r * 132, r * 132 + 128, 4) for r in range(VALIDATED)]
    assert page.shape == (16 + VALIDATED * 132, 4 * 132 - 4)
    for r in rows:
        hidden = mask[r] == 255
        assert 0.1 < hidden.mean() < 0.95
        np.testing.assert_array_equal(rebuilt[r][~hidden], original[r][~hidden])
        np.testing.assert_array_equal(corrupted[r][~hidden], original[r][~hidden])
        assert (rebuilt[r][hidden] != original[r][hidden]).mean() > 0.5
    # Un-normalised: the store's own image, shrunk, and not stretched in its grey levels.
    first = Store.open(store).images([0])[0]
    shrunk = np.asarray(Image.fromarray(first).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(original[rows[0]].astype(int) - shrunk).max() <= 1


# --- the same run twice ---------------------------------------------------------------------


def test_a_run_repeats_itself_by_seed(whole, store, tmp_path):
    assert books(run(settings(store, tmp_path / "same"))) == books(whole)
    assert losses(run(settings(store, tmp_path / "other", seed=1))) != losses(whole)


@pytest.mark.parametrize("stop_at", [1, 6, 8, 11])
def test_going_on_after_a_signal_equals_not_stopping(whole, store, tmp_path, monkeypatch, stop_at):
    """Step 6 is in mid-epoch, 8 the end of one, 11 the last but one."""
    learn_step = pretrain.learn_step

    def stopped(loop, parts, step):
        if step == stop_at - 1:
            signal.raise_signal(signal.SIGTERM)
        return learn_step(loop, parts, step)

    config = settings(store, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learn_step", stopped)
        with pytest.raises(Interrupted, match=f"SIGTERM at step {stop_at} of 12, and saved"):
            run(config)
    assert len(losses(tmp_path / "a")) == stop_at
    assert not (tmp_path / "a" / "model").exists()
    run(config)
    assert books(tmp_path / "a") == books(whole)
    ends = [load_file(f / "checkpoints/last/model.safetensors") for f in (tmp_path / "a", whole)]
    assert all(torch.equal(v, ends[1][k]) for k, v in ends[0].items())


def test_going_on_after_a_crash_repeats_the_lost_steps(whole, store, tmp_path, monkeypatch):
    """The machine dies at step 7; the last checkpoint is that of step 4."""
    learn_step = pretrain.learn_step

    def crash(loop, parts, step):
        if step == 6:
            raise MemoryError
        return learn_step(loop, parts, step)

    config = settings(store, tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learn_step", crash)
        with pytest.raises(MemoryError):
            run(config)
    assert len(losses(tmp_path / "a")) == 6
    run(config)
    assert books(tmp_path / "a") == books(whole)


def test_a_finished_run_is_only_exported_again(whole, store):
    before = books(whole)
    run(settings(store, whole))
    assert books(whole) == before


def test_checkpoints_by_the_clock(store, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(Checkpoints, "age_s", property(lambda self: 1e9))
    save = Checkpoints.save

    def note(self, position, **states):
        saved.append(position.step)
        return save(self, position, **states)

    monkeypatch.setattr(Checkpoints, "save", note)
    run(settings(store, tmp_path / "a", epochs=2, save_every_epochs=9))
    assert saved == [1, 2, 3, 4, 5, 6, 7, 8]  # 4: the best of all epochs so far


def test_the_best_epoch_is_kept_however_seldom_checkpoints_are_due(store, tmp_path, monkeypatch):
    figures = iter([0.5, 0.2, 0.9, 0.8])
    validate = pretrain.validate

    def told(loop, position):
        validate(loop, position)
        loss = next(figures)
        better = position.best is None or loss < position.best
        return replace(position, best=loss, best_step=position.step) if better else position

    monkeypatch.setattr(pretrain, "validate", told)
    folder = run(settings(store, tmp_path / "a", epochs=4, save_every_epochs=4))
    best = json.loads((folder / "checkpoints" / "best" / "checkpoint.json").read_text())
    assert (best["position"]["step"], best["position"]["best"]) == (8, 0.2)


def test_accumulated_batches_make_one_step(store, tmp_path):
    """Three parts of 2 are one of 6: masks, partners, stochastic depth, losses, gradients."""
    same = {"batch_size": 6, "drop_path": 0.3, "epochs": 2, "base_lr": 0.01, "fill": FILLS}
    one = run(settings(store, tmp_path / "one", **same))
    two = run(settings(store, tmp_path / "two", accumulate=3, **same))
    assert len(losses(one)) == len(losses(two)) == 6
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    norms = [read_records(folder)[0]["grad_norm"] for folder in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


# --- losses that are not finite -------------------------------------------------------------


def test_a_held_out_loss_that_is_not_finite_is_no_best(store, tmp_path, monkeypatch):
    rebuild = gmml.rebuilding_loss
    seen = []

    def poisoned(rebuilt, views, **options):
        loss = rebuild(rebuilt, views, **options)
        seen.append(torch.is_grad_enabled())
        return loss if torch.is_grad_enabled() or False in seen[:-1] else loss * float("nan")

    monkeypatch.setattr(gmml, "rebuilding_loss", poisoned)
    # Six held-out images in batches of six: the first epoch's loss alone is poisoned.
    folder = run(settings(store, tmp_path / "a", epochs=2, batch_size=6, sample_every=0))
    first, second = losses(folder, "val")
    assert first is None
    position = json.loads((folder / "checkpoints/best/checkpoint.json").read_text())["position"]
    assert (position["best"], position["best_step"]) == (second, 6)


def test_one_bad_step_is_left_out_written_down_and_replayed(store, tmp_path, monkeypatch):
    gather = gmml.masked_patch_gather

    def poisoned(views, fill=None, **options):
        bad = fill is not None and fill.epoch == 0 and marked in fill.image_ids.tolist()
        return gather(views, fill, **options) * (float("nan") if bad else 1.0)

    marked = int(Order(np.arange(VALIDATED, VALIDATED + TRAINED), seed=0).take(0, 8, 9)[0])
    monkeypatch.setattr(gmml, "masked_patch_gather", poisoned)
    folder = run(settings(store, tmp_path / "a", epochs=1, sample_every=0))
    (line,) = (folder / "bad_steps.jsonl").read_text().splitlines()
    noted = json.loads(line)
    assert (noted["step"], noted["epoch"], len(noted["image_ids"])) == (3, 0, 4)
    assert marked in noted["image_ids"]
    assert losses(folder)[2] is None
    assert all(np.isfinite([loss for i, loss in enumerate(losses(folder)) if i != 2]))
    load_model_folder(folder)  # refuses weights that are not finite
    assert np.isnan(replay(folder, 3)["loss"])
    with monkeypatch.context() as patch:
        patch.setattr(gmml, "masked_patch_gather", gather)
        mended = replay(folder, 3)
    assert 0 < mended["loss"] < 2
    assert 0 < mended["grad_norm"] < 100
    with pytest.raises(SpcxrError, match=r"step 2 was not left out; those that were: 3"):
        replay(folder, 2)


def test_a_run_that_blew_up_stops_with_one_line(store, tmp_path):
    config = settings(store, tmp_path / "a", base_lr=1e30, warmup_epochs=0.0)
    with pytest.raises(SpcxrError, match=r"not finite in 5 steps in a row, up to \d+; .*--base-lr"):
        run(config)
    assert not (tmp_path / "a" / "model").exists()
    assert len((tmp_path / "a" / "bad_steps.jsonl").read_text().splitlines()) == 5


# --- where the images come from -------------------------------------------------------------


def test_a_manifest_is_prepared_into_the_run(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(draw_blob(rng)).save(tmp_path / "images" / f"{i}.png")
    rows = "".join(f"images/{i}.png,{'val' if i < 2 else 'train'}\n" for i in range(8))
    (tmp_path / "m.csv").write_text("path,split\n" + rows)
    config = settings(tmp_path / "m.csv", tmp_path / "a", epochs=1)
    folder = run(config)
    assert Store.open(folder / "store").preprocess.size_px == round(32 * 8 / 7)
    assert len(losses(folder)) == 1
    run(config)
    Image.fromarray(draw_blob(rng)[:-1]).save(tmp_path / "images" / "3.png")
    with pytest.raises(SpcxrError, match=r"store: .*have changed since"):
        run(config)


def test_init_is_where_weights_start(whole, store, tmp_path):
    folder = run(
        settings(store, tmp_path / "a", init=str(whole), base_lr=0.0, min_lr=0.0, epochs=1)
    )
    wanted, found = (load_file(f / "model" / "model.safetensors") for f in (whole, folder))
    assert all(torch.equal(v, found[k]) for k, v in wanted.items())


# --- refusals -------------------------------------------------------------------------------


def test_data_that_is_not_there_leaves_no_folder(tmp_path):
    with pytest.raises(SpcxrError, match="nowhere"):
        run(settings(tmp_path / "nowhere", tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_a_run_does_not_go_on_with_other_settings_or_images(store, tmp_path, monkeypatch):
    copy = write_store(tmp_path / "s")
    config = settings(copy, tmp_path / "a", epochs=1)
    run(config)
    with pytest.raises(SpcxrError, match=r"other settings \(seed 0, now 3\)"):
        run(settings(copy, tmp_path / "a", epochs=1, seed=3))
    copy.rename(tmp_path / "old")
    write_store(tmp_path / "s", seed=1)
    with pytest.raises(SpcxrError, match=r"not the images that .* began with"):
        run(config)


def test_a_torn_checkpoint_stops_the_run(store, tmp_path):
    config = settings(store, tmp_path / "a", epochs=1)
    run(config)
    file = tmp_path / "a" / "checkpoints" / "last" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SpcxrError, match=r"optimizer\.safetensors: .*the checkpoint is torn"):
        run(config)


def test_why_fp32_was_chosen_stands_in_the_log(store, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "cpu_flags", frozenset)
    folder = run(settings(store, tmp_path / "a", epochs=1, precision="auto"))
    assert "only emulates bf16" in (folder / "train.log").read_text()


def test_bf16_is_honoured_where_asked_for(store, tmp_path):
    folder = run(settings(store, tmp_path / "a", epochs=1, precision="bf16"))
    exact = run(settings(store, tmp_path / "b", epochs=1))
    assert losses(folder) != losses(exact)
    assert losses(folder) == pytest.approx(losses(exact), rel=0.05)
    assert load_file(folder / "model" / "model.safetensors")["cls_token"].dtype == torch.float32
