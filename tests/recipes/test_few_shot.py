"""A few patients of each class, soft labels, several seeds, a moving average, recipes by name."""

import json
import signal

import numpy as np
import pytest
import torch
import yaml
from labelled_runs import config, findings, one_label, three_classes, train_losses, write_table
from safetensors.torch import load_file

from spcxr.config import ConfigError, resolve
from spcxr.errors import Interrupted, SpcxrError
from spcxr.recipes import fitting, seeds
from spcxr.recipes.classify import ClassifyConfig, choose_cohort, run
from spcxr.recipes.few_shot import take_per_class
from spcxr.recipes.presets import PRESETS
from spcxr.recipes.targets import Targets


def cohort_of(store, **settings):
    given = {"data": str(store.path), "init": "i", "out": "o"} | settings
    return choose_cohort(ClassifyConfig(**given), store)


# --- a few of each class --------------------------------------------------------------------


def test_so_many_patients_of_each_class_nested_and_whole():
    rng = np.random.default_rng(0)
    patients = np.array([f"p{i:02d}" for i in rng.integers(0, 60, 200)])
    classes = np.array([int(p[1:]) % 3 for p in patients])
    values = np.eye(3, dtype=np.float32)[classes]
    targets = Targets(("a", "b", "c"), False, values)
    kept = [take_per_class(patients, targets, values, n, seed=3) for n in (1, 5, 10)]
    for rows, count in zip(kept, (1, 5, 10), strict=True):
        assert [len(set(patients[rows & (classes == c)])) for c in range(3)] == [count] * 3
        assert not set(patients[rows]) & set(patients[~rows])
    assert (kept[0] <= kept[1]).all()
    assert (kept[1] <= kept[2]).all()
    assert (take_per_class(patients, targets, values, 5, seed=4) != kept[1]).any()


def test_of_several_labels_as_many_as_there_are_and_some_of_none():
    values = np.zeros((40, 2), np.float32)
    values[:2, 0] = values[10:30, 1] = 1  # two of the first, twenty of the second
    values[5, 0] = np.nan
    patients = np.array([f"p{i:02d}" for i in range(40)])
    targets = Targets(("rare", "common"), True, values)
    rows = take_per_class(patients, targets, values, 4, seed=0)
    assert (values[rows] == 1).sum(0).tolist() == [2, 4]
    assert (~(values[rows] == 1).any(1)).sum() == 4
    values[:2, 0] = 0
    with pytest.raises(SpcxrError, match="class rare has 0 training patients, not 4"):
        take_per_class(patients, targets, values, 4, seed=0)


def test_labels_per_class_settles_the_training_rows_alone(make_store):
    store = make_store(three_classes)
    whole, some = cohort_of(store), cohort_of(store, labels_per_class=2)
    assert len(some.train) == 6
    assert set(some.train) <= set(whole.train)
    assert (some.val.tolist(), some.test.tolist()) == (whole.val.tolist(), whole.test.tolist())
    with pytest.raises(SpcxrError, match=r"store: class other has \d training patients, not 9; lo"):
        cohort_of(store, labels_per_class=9)


# --- uncertain labels that are soft ---------------------------------------------------------


@pytest.mark.parametrize(("policy", "low", "high"), [("lsr-ones", 0.55, 0.85),
                                                     ("lsr-zeros", 0.0, 0.3)])  # fmt: skip
def test_soft_labels_are_drawn_by_seed_epoch_and_image(policy, low, high, make_store):
    def columns(there):
        shown = [str(int(t)) for t in there]
        uncertain = ["-1" if i % 3 == 2 else t for i, t in enumerate(shown)]
        return {"tb": uncertain, "b": ["" if i == 5 else t for i, t in enumerate(shown)]}

    store = make_store(columns)
    cohort = cohort_of(store, uncertain=policy)
    rows = cohort.train
    first = cohort.drawn(rows, seed=1, epoch=0)
    raw = store.manifest.label_matrix(("tb", "b"))[rows]
    soft = raw == -1
    assert soft.sum() > 5
    assert 5 in rows  # nothing else is known of it
    assert 5 not in cohort_of(store).train
    assert ((first[soft] >= low) & (first[soft] < high)).all()
    assert len(set(first[soft].tolist())) == soft.sum()
    np.testing.assert_array_equal(first[~soft], raw[~soft])  # NaN equals NaN here
    np.testing.assert_array_equal(cohort.drawn(rows[::-1].copy(), seed=1, epoch=0), first[::-1])
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        assert (cohort.drawn(rows, **other)[soft] != first[soft]).all()
    # judged as unknown
    assert np.isnan(cohort.targets.values[rows][soft]).all()
    assert cohort.known(rows) == raw.size - 1


def test_soft_labels_are_in_the_loss_alone(make_store, tiny_init, tmp_path):
    store = make_store(findings)
    runs = [
        run(config(store, tiny_init, tmp_path / p, epochs=2, uncertain=p))
        for p in ("ignore", "lsr-ones")
    ]
    losses, metrics = zip(
        *((train_losses(r), json.loads((r / "metrics.json").read_text())) for r in runs),
        strict=True,
    )
    assert losses[0] != losses[1]
    assert metrics[0]["test"]["positives"] == metrics[1]["test"]["positives"]


def test_soft_labels_of_one_class_of_many_are_refused(make_store):
    with pytest.raises(SpcxrError, match="one of many classes, for which --uncertain lsr-ones"):
        cohort_of(make_store(one_label), uncertain="lsr-ones")


# --- a moving average -----------------------------------------------------------------------


def test_the_moving_average_is_judged_and_exported(make_store, tiny_init, tmp_path, monkeypatch):
    seen, real = [], fitting.follow

    def noted(kept, model, momentum):
        before = {k: v.clone() for k, v in kept.state_dict().items()}
        real(kept, model, momentum)
        seen.append((before, {k: v.clone() for k, v in model.state_dict().items()}, momentum))

    monkeypatch.setattr(fitting, "follow", noted)
    settings = {"epochs": 2, "ema": 0.5, "base_lr": 2e-3}
    folder = run(config(make_store(one_label), tiny_init, tmp_path / "run", **settings))
    assert [m for *_, m in seen] == [min(0.5, (1 + t) / (10 + t)) for t in range(8)]
    best = json.loads((folder / "metrics.json").read_text())["epoch"]
    before, model, momentum = seen[4 * best - 1]
    exported = load_file(folder / "model" / "model.safetensors")
    for name, value in exported.items():
        kept, moved = before[f"encoder.{name}"], model[f"encoder.{name}"]
        assert torch.allclose(value, momentum * kept + (1 - momentum) * moved, atol=1e-6)
    assert any((model[f"encoder.{k}"] != v).any() for k, v in exported.items())


def test_a_stopped_run_with_an_average_ends_as_it_would_have(
    make_store, tiny_init, tmp_path, monkeypatch
):
    store, settings = make_store(one_label), {"ema": 0.9, "drop_path": 0.3}
    whole = run(config(store, tiny_init, tmp_path / "whole", **settings))
    stopped = config(store, tiny_init, tmp_path / "stopped", **settings)
    stop_at(6, stopped, monkeypatch)
    run(stopped)
    for name in ("model", "head"):
        one, other = (
            load_file(f / "model" / f"{name}.safetensors") for f in (whole, tmp_path / "stopped")
        )
        assert all(torch.equal(one[k], other[k]) for k in one)


def stop_at(step, settings, monkeypatch):
    """Run until SIGTERM comes in this step, counted over all runs."""
    count, real = [0], fitting.take_step

    def counted(*arguments, **named):
        count[0] += 1
        if count[0] == step:
            signal.raise_signal(signal.SIGTERM)
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "take_step", counted)
        with pytest.raises(Interrupted) as stopped:
            run(settings)
    return str(stopped.value)


# --- several seeds --------------------------------------------------------------------------


def test_several_seeds_and_what_they_differ_by(
    make_store, tiny_init, tmp_path, monkeypatch, capsys
):
    store = make_store(one_label)
    settings = config(store, tiny_init, tmp_path / "runs", seeds=3, epochs=1, seed=4)
    said = stop_at(6, settings, monkeypatch)  # in the second of 4 steps of the second seed
    assert "seed-5: stopped by SIGTERM at step 2 of 4" in said
    assert f"--config {tmp_path / 'runs' / 'config.yaml'} --resume" in said  # with all of them
    kept = tmp_path / "runs" / "seed-4" / "metrics.json"
    made = kept.stat().st_mtime_ns
    assert not (tmp_path / "runs" / "summary.json").exists()
    folder = run(settings)
    assert kept.stat().st_mtime_ns == made
    alone = run(config(store, tiny_init, tmp_path / "alone", epochs=1, seed=5))
    found = [json.loads((f / "metrics.json").read_text())
             for f in (*(folder / f"seed-{k}" for k in (4, 5, 6)), alone)]  # fmt: skip
    assert found[1] == found[3]
    summary = json.loads((folder / "summary.json").read_text())
    values = [f["test"]["overall"]["macro_auroc"]["value"] for f in found[:3]]
    spread = summary["test"]["macro_auroc"]
    assert (summary["seeds"], spread["n"]) == (3, 3)
    assert spread["mean"] == pytest.approx(np.mean(values))
    assert spread["sd"] == pytest.approx(np.std(values, ddof=1))
    assert (spread["low"], spread["high"]) == (min(values), max(values))
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("test macro_auroc ")]
    assert line.split()[2:4] == [f"{spread[k]:.3f}" for k in ("mean", "sd")]


def test_images_are_prepared_once_for_all_seeds(tiny_init, tmp_path):
    table = write_table(tmp_path)
    settings = {"data": str(table), "init": str(tiny_init), "out": str(tmp_path / "runs")}
    folder = run(
        ClassifyConfig(**settings, seeds=2, method="knn", device="cpu", labels_per_class=1)
    )
    assert (folder / "store" / "store.json").is_file()
    assert not (folder / "seed-0" / "store").exists()
    assert (folder / "summary.json").is_file()


def test_what_is_not_defined_in_a_run_is_left_out_and_counted():
    assert seeds.spread([None, None])["n"] == 0
    assert np.isnan(seeds.spread([0.5])["sd"])
    assert "(n = 1)" in seeds.table({"test": {"macro_auroc": seeds.spread([0.5, None])}}, 2)


# --- recipes by name ------------------------------------------------------------------------


def test_a_recipe_lies_below_file_and_flags(tmp_path):
    given = {"data": "d", "init": "i", "out": "o"}
    plain = resolve(ClassifyConfig, None, given)
    assert (plain.recipe, plain.epochs, plain.drop_path) == ("none", 30, 0.1)
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"recipe": "medical-mae", "epochs": 9}))
    made = resolve(ClassifyConfig, file, given | {"drop_path": 0.05})
    assert (made.epochs, made.drop_path) == (9, 0.05)
    assert (made.layer_decay, made.batch_size, made.warmup) == (0.55, 256, 5.0)
    assert made.peak_lr == 2.5e-4
    deit = resolve(ClassifyConfig, None, given | {"recipe": "deit"})
    assert deit.peak_lr == pytest.approx(5e-4 * 1024 / 512)
    with pytest.raises(ConfigError, match="recipe is 'dino'; choose one of: none, medical-mae"):
        resolve(ClassifyConfig, None, given | {"recipe": "dino"})


@pytest.mark.parametrize("name", PRESETS)
def test_the_run_keeps_what_a_recipe_was_resolved_to(name, make_store, tiny_init, tmp_path):
    flags = {"data": str(make_store(one_label).path), "init": str(tiny_init), "recipe": name}
    flags |= {"out": str(tmp_path / "run"), "epochs": 1, "warmup_epochs": 0.0, "device": "cpu"}
    folder = run(resolve(ClassifyConfig, None, flags))
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["recipe"] == name
    assert {k: written[k] for k in PRESETS[name]} == PRESETS[name] | {
        "epochs": 1,
        "warmup_epochs": 0.0,
    }


# --- settings that cannot be ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"labels_per_class": 5, "label_fraction": 0.5}, "not both"),
        ({"method": "linear", "init": "scratch"}, "random features"),
        ({"method": "knn", "class_weights": "auto"}, "class_weights"),
        ({"method": "linear", "uncertain": "lsr-ones"}, "leave them out with method linear"),
        ({"method": "knn", "ema": 0.9}, "leave them out with method knn"),
        ({"ema": 1.0}, "ema is 1"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": 2, "method": "linear"}, "seeds with method linear: on all labels nothing"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(ConfigError, match=said):
        ClassifyConfig(**({"data": "d", "init": "i", "out": "o"} | settings))
