"""Fine-tuning for labels: whole runs on tiny stores, and what is refused."""

import csv
import json
import re
import shlex

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from labelled_runs import (
    Stop,
    config,
    findings,
    one_label,
    three_classes,
    train_losses,
    write_table,
)
from safetensors.numpy import load_file

from spcxr.cli import train
from spcxr.config import ConfigError
from spcxr.data.store import Store
from spcxr.errors import Interrupted, SpcxrError
from spcxr.infer.predict import load_trained, predict_classes, probabilities
from spcxr.models.weights import load_model_folder
from spcxr.recipes.classify import ClassifyConfig, run
from spcxr.train import device
from spcxr.train.device import Compute

# --- whole runs -----------------------------------------------------------------------------


def test_a_run_learns_and_its_export_predicts_the_same(make_store, tiny_init, tmp_path):
    store = make_store(one_label)
    folder = run(config(store, tiny_init, tmp_path / "run", epochs=12, base_lr=2e-3))
    losses = train_losses(folder)
    assert len(losses) == 12 * 4
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["rows"] == {"train": 32, "val": 16, "test": 16}
    assert facts["test"]["overall"]["macro_auroc"]["value"] > 0.95
    assert facts["test"]["overall"]["macro_auroc"]["n_patients"] == 16
    assert facts["test"]["multilabel"] is False

    trained = load_trained(folder)
    assert trained.names == ("empty", "square")
    assert trained.config["preprocess"] == store.preprocess.to_dict()
    assert (trained.normalisation.mean, trained.normalisation.std) == (0.25, 0.25)
    test_rows = store.manifest.rows("test")
    logits = predict_classes(
        trained.model,
        store,
        test_rows,
        trained.normalisation,
        Compute(8, torch.device("cpu"), "fp32"),
    )
    with (folder / "predictions.csv").open() as file:
        written = {row["path"]: row for row in csv.DictReader(file)}
    assert len(written) == 32
    expected = probabilities(logits, multilabel=False)
    for row, (empty, square) in zip(test_rows, expected, strict=True):
        found = written[store.manifest.column("path")[row]]
        assert float(found["p_empty"]) == pytest.approx(empty, abs=1e-5)
        assert float(found["p_square"]) == pytest.approx(square, abs=1e-5)
    # the exported weights are those of the best epoch, not of the last
    best = load_file(folder / "checkpoints" / "best" / "model.safetensors")
    kept = load_file(folder / "model" / "model.safetensors")
    assert all((best[f"encoder.{k}"] == v).all() for k, v in kept.items())
    assert "not a medical device" in (folder / "model_card.md").read_text()


def test_several_findings_with_unknown_and_uncertain_ones(make_store, tiny_init, tmp_path):
    store = make_store(findings)
    settings = {"epochs": 6, "base_lr": 2e-3, "class_weights": "auto"}
    folder = run(config(store, tiny_init, tmp_path / "run", **settings))
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["test"]["multilabel"] is True
    assert facts["test"]["confusion"] is None
    losses = train_losses(folder)
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
    ones = run(config(store, tiny_init, tmp_path / "ones", uncertain="ones", **settings))
    assert train_losses(ones) != losses


@pytest.mark.parametrize(
    ("columns", "settings", "said", "train_rows"),
    [
        (three_classes, {}, "one of 3 classes: a, b, other", 32),
        (three_classes, {"labels": ("a", "b")}, "one of 2 classes: a, b", 26),
        (three_classes, {"labels": ("b",)}, "1 finding: b", 32),
        (three_classes, {"labels": ("a", "b"), "task": "multilabel"}, "2 findings: a, b", 32),
        (findings, {}, "2 findings: nodule, mass", 32),
    ],
)
def test_the_task_is_settled_by_all_labels_and_said(
    columns, settings, said, train_rows, make_store, tiny_init, tmp_path
):
    """Of one label's classes, some may be chosen: rows of the others are left out."""
    folder = run(config(make_store(columns), tiny_init, tmp_path / "run", epochs=1, **settings))
    facts = json.loads((folder / "metrics.json").read_text())
    assert (facts["task"], facts["rows"]["train"]) == (said, train_rows)
    assert f" {said}\n" in (folder / "train.log").read_text()
    assert load_trained(folder).multilabel is ("finding" in said)


@pytest.mark.parametrize("drawn", [True, False])
def test_phantoms_are_marked_and_the_card_has_its_limits(drawn, make_store, tiny_init, tmp_path):
    store = make_store(one_label, prefix="PHANTOM-0-" if drawn else "p")
    folder = run(config(store, tiny_init, tmp_path / "run", epochs=1))
    card = (folder / "model_card.md").read_text()
    assert ("**Drawn phantoms, not patients" in card) is drawn
    assert "## Limits" in card
    assert load_trained(folder).config["provenance"]["phantoms"] is drawn
    assert json.loads((folder / "metrics.json").read_text())["phantoms"] is drawn


@pytest.mark.parametrize("at", [2, 4, 6], ids=["mid-epoch", "end of epoch", "later"])
def test_a_stopped_run_ends_as_it_would_have(at, make_store, tiny_init, tmp_path, monkeypatch):
    store = make_store(one_label)
    whole = run(config(store, tiny_init, tmp_path / "whole", drop_path=0.3))
    settings = config(store, tiny_init, tmp_path / "stopped", drop_path=0.3)
    with monkeypatch.context() as patch:
        Stop(at, patch)
        with pytest.raises(Interrupted, match=r"--resume auto"):
            run(settings)
    assert len(train_losses(tmp_path / "stopped")) == at
    stopped = run(settings)
    assert train_losses(stopped) == train_losses(whole)
    one, other = (load_file(f / "model" / "model.safetensors") for f in (whole, stopped))
    assert all((one[k] == other[k]).all() for k in one)
    same = [(f / "metrics.json").read_text() for f in (whole, stopped)]
    assert same[0] == same[1]


def test_the_seed_settles_everything(make_store, tiny_init, tmp_path):
    store = make_store(one_label)
    first, again, other = (
        train_losses(run(config(store, tiny_init, tmp_path / name, epochs=1, seed=seed)))
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first == again != other


def test_a_frozen_encoder_stays_as_it_was(make_store, tiny_init, tmp_path):
    store = make_store(one_label)
    folder = run(config(store, tiny_init, tmp_path / "run", freeze=True))
    before, after = (load_model_folder(f).encoder.state_dict() for f in (tiny_init, folder))
    assert all(torch.equal(before[k], after[k]) for k in before)
    losses = train_losses(folder)
    assert losses[-1] < losses[0]


def test_from_scratch_and_from_a_bare_file(make_store, tmp_path):
    store = make_store(one_label, count=16)
    settings = {"model": "vit_tiny", "patch_px": 16, "epochs": 1}
    folder = run(config(store, "scratch", tmp_path / "scratch", **settings))
    trained = load_trained(folder)
    assert trained.normalisation.mean == pytest.approx(store.mean)
    bare = folder / "model" / "model.safetensors"
    again = run(config(store, bare, tmp_path / "bare", image_px=64, **settings))
    assert load_model_folder(again).encoder.image_px == (64, 64)
    mae = {"model": trained.model.encoder.state_dict(), "epoch": 800}
    torch.save(mae, tmp_path / "mae.pth")
    third = run(config(store, tmp_path / "mae.pth", tmp_path / "third", **settings))
    assert "mae.pth, normalised by the store's mean and std: matched 150, missing none" in (
        (third / "train.log").read_text()
    )


def test_a_mistyped_label_can_be_put_right_and_the_images_are_kept(tiny_init, tmp_path):
    settings = {"data": str(write_table(tmp_path)), "init": str(tiny_init), "epochs": 1}
    settings |= {"out": str(tmp_path / "run"), "device": "cpu"}
    with pytest.raises(SpcxrError, match="no label 'fog'"):
        run(ClassifyConfig(**settings, labels=("a", "fog")))
    made = (tmp_path / "run" / "store" / "store.json").stat().st_mtime_ns
    folder = run(ClassifyConfig(**settings, labels=("a", "b")))
    assert (folder / "store" / "store.json").stat().st_mtime_ns == made
    assert "fog" not in (folder / "config.yaml").read_text()


def test_a_manifest_is_prepared_as_the_init_wants_it(tiny_init, tmp_path):
    table = write_table(tmp_path)
    folder = run(
        ClassifyConfig(
            data=str(table), init=str(tiny_init), out=str(tmp_path / "run"), epochs=1, device="cpu"
        )
    )
    store = Store.open(folder / "store")
    assert store.preprocess.to_dict() == load_model_folder(tiny_init).config["preprocess"]


def test_why_fp32_was_chosen_stands_in_the_log(make_store, tiny_init, tmp_path, monkeypatch):
    monkeypatch.setattr(device, "cpu_flags", frozenset)
    store = make_store(one_label, count=16)
    settings = {"epochs": 1, "precision": "auto"}
    folder = run(config(store, tiny_init, tmp_path / "run", **settings))
    assert "only emulates bf16" in (folder / "train.log").read_text()


def test_a_class_absent_in_the_test_rows_is_left_out_by_name(make_store, tiny_init, tmp_path):
    def columns(there):
        rare = {0, 2, 8, 10, 16, 18}  # rows to learn from, and to choose by
        return {"label": ["c" if i in rare else "ab"[int(t)] for i, t in enumerate(there)]}

    folder = run(config(make_store(columns), tiny_init, tmp_path / "run", epochs=1))
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["test"]["left_out"] == ["c"]
    assert facts["test"]["by_class"]["c"]["auroc"]["value"] is None
    assert facts["validation"]["left_out"] == []
    assert facts["test"]["overall"]["macro_auroc"]["value"] is not None


def test_labels_with_commas_can_be_chosen_as_the_message_says(make_store, tiny_init, tmp_path):
    store = make_store(
        lambda there: {
            "square, bright": ["01"[int(t)] for t in there],
            "No Finding": ["10"[int(t)] for t in there],
            "fog": ["1"] * len(there),
        }
    )
    flags = ["--data", str(store.path), "--init", str(tiny_init), "--out", str(tmp_path / "run")]
    flags += ["--epochs", "1", "--device", "cpu"]
    refused = CliRunner().invoke(train, ["classify", *flags]).output
    (remedy,) = re.findall(r"choose (--labels .*), or widen", refused)
    done = CliRunner().invoke(train, ["classify", *flags, *shlex.split(remedy)])
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert facts["test"]["names"] == ["square, bright", "No Finding"]


def test_what_the_init_learned_from_is_handed_on(make_store, tiny_init, tmp_path):
    first = run(config(make_store(one_label), tiny_init, tmp_path / "first", epochs=1))
    other = make_store(one_label, name="other", prefix="q")
    second = run(config(other, first, tmp_path / "second", epochs=1))
    told = [json.loads((f / "model" / "trained_on.json").read_text()) for f in (first, second)]
    assert told[0].pop("before") == []
    assert told[1]["before"] == [told[0]]


# --- what is refused ------------------------------------------------------------------------


def squares_but(column):
    return lambda there: {"square": [str(int(t)) for t in there], "other": column}


BAD = {
    "no labels": ({}, {}, "no label columns"),
    "unknown label": (one_label, {"labels": ("fog",)}, "no label 'fog'"),
    "unknown value": (
        squares_but(["1", "maybe"] * 32),
        {"labels": ("other",)},
        "column 'other' holds 'maybe' for 001.png: a label is 1, 0, -1",
    ),
    "blank throughout": (
        squares_but([""] * 64),
        {"labels": ("other",)},
        "no label 'other'; .* column 'other' is blank in all rows",
    ),
    "uncertain throughout": (
        squares_but(["-1"] * 64),
        {"labels": ("other",)},
        "other blank or -1 in all rows of train; choose another --uncertain, other --labels or",
    ),
    "all blank": (squares_but([*[""] * 63, "1"]), {}, "other blank in all rows; choose"),
    "one class only": (squares_but(["0"] * 64), {}, r"other the same .*--labels square"),
    "class absent in training": (
        lambda there: {
            "label": ["c" if i % 4 == 2 and t else "ab"[int(t)] for i, t in enumerate(there)]
        },
        {},
        r"c the same in all known rows; choose --labels a,b",
    ),
    "a share too small": (
        lambda there: {"label": ["c" if i == 9 else "ab"[int(t)] for i, t in enumerate(there)]},
        {"label_fraction": 0.05, "task": "multilabel"},
        "the same in all known rows; .* or raise --label-fraction",
    ),
    "a label twice": (findings, {"labels": ("nodule", "mass", "nodule")}, "name each label once"),
    "two columns of one name": (
        lambda there: {"a": ["01"[int(t)] for t in there], "p_a": ["10"[int(t)] for t in there]},
        {"task": "multilabel"},
        "would be called 'p_a'; .* rename",
    ),
    "blank split": (
        lambda there: {"square": ["01"[i // 4 % 2] if i % 4 < 2 else "" for i in range(64)]},
        {},
        "blank in all rows of val",
    ),
    "val of one class": (
        lambda there: {"square": ["01"[i // 4 % 2] if i % 4 != 2 else "1" for i in range(64)]},
        {},
        "--val-splits",
    ),
    "no such split": (one_label, {"train_splits": ("fold1",)}, "no row in split 'fold1'"),
    "not one of many": (findings, {"task": "multiclass"}, "--task multilabel"),
    "another patch": (one_label, {"patch_px": 16}, "leave --patch-px out"),
    "another model": (one_label, {"model": "vit_small"}, "leave --model out"),
    "no init": (one_label, {"init": "nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_the_folder_free(case, make_store, tiny_init, tmp_path):
    columns, settings, said = BAD[case]
    store = make_store(columns)
    wanted = {"init": tiny_init, "out": tmp_path / "run"} | settings
    with pytest.raises(SpcxrError, match=said) as error:
        run(config(store, **wanted))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_images_prepared_otherwise_are_refused(make_store, tiny_init, tmp_path):
    settings = json.loads((tiny_init / "config.json").read_text())
    settings["preprocess"]["fit"] = "crop"
    (tiny_init / "config.json").write_text(json.dumps(settings))
    with pytest.raises(SpcxrError, match=r"fit pad, not crop.*--fit crop"):
        run(config(make_store(one_label), tiny_init, tmp_path / "run"))


def test_losses_that_stay_not_finite_end_the_run(make_store, tiny_init, tmp_path):
    settings = config(make_store(one_label), tiny_init, tmp_path / "run", base_lr=1e30, clip=0.0)
    with pytest.raises(SpcxrError, match=r"not finite"):
        run(settings)
    notes = (tmp_path / "run" / "bad_steps.jsonl").read_text().splitlines()
    assert len(json.loads(notes[0])["image_ids"]) == 8


def test_another_runs_folder_is_left_alone(make_store, tiny_init, tmp_path):
    store = make_store(one_label)
    folder = run(config(store, tiny_init, tmp_path / "run", epochs=1))
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(SpcxrError, match=r"other settings \(epochs 1, now 2\)"):
        run(config(store, tiny_init, folder, epochs=2))
    with pytest.raises(SpcxrError, match="choose another --out"):
        run(config(store, tiny_init, folder, epochs=1, resume="never"))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_changed_images_are_noticed_on_resume(make_store, tiny_init, tmp_path, monkeypatch):
    store = make_store(one_label, name="first")
    settings = config(store, tiny_init, tmp_path / "run")
    with monkeypatch.context() as patch:
        Stop(2, patch)
        with pytest.raises(Interrupted):
            run(settings)
    store.path.rename(tmp_path / "moved")
    make_store(one_label, name="first", count=32)
    with pytest.raises(SpcxrError, match="content differs"):
        run(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"label_fraction": 0.0}, "label_fraction"),
        ({"init": "scratch", "freeze": True}, "--init"),
        ({"val_splits": ()}, "val_splits"),
        ({"test_splits": ("test", "Train")}, "'train' is given to --train-splits and --test-spl"),
        ({"test_splits": ("val",)}, "'val' is given to --val-splits and --test-splits"),
        ({"train_splits": ("train", "val")}, "'val' is given to --train-splits and --val-splits"),
        ({"epochs": 3, "warmup_epochs": 3.0}, "warmup_epochs"),
        ({"uncertain": "maybe"}, "choose one of"),
        ({"head_init": "linear", "method": "knn"}, "leave it out with method knn"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ConfigError, match=said):
        ClassifyConfig(**({"data": "d", "init": "i", "out": "o"} | settings))


def test_fresh_weights_are_not_slowed_layer_by_layer():
    made = [ClassifyConfig(data="d", init=i, out="o") for i in ("scratch", "runs/a")]
    assert [c.decay_per_layer for c in made] == [1.0, 0.55]
    assert made[0].peak_lr == 2.5e-4
    large = ClassifyConfig(data="d", init="runs/a", out="o", batch_size=512)
    assert large.peak_lr == 5e-4
