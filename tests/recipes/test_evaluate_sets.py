"""`evaluate` on several sets, and on sets that should not be measured: leaks, copies, no answer."""

import json

import numpy as np
import pytest
import torch

from spcxr.errors import SpcxrError
from spcxr.evaluate import metrics
from spcxr.infer.predict import load_trained
from spcxr.recipes.drift import drift, sample_features
from spcxr.recipes.evaluate import EvaluateConfig, run
from spcxr.recipes.leaks import write_trained_on
from spcxr.recipes.measure import Settings, TestSet, measure

CPU = torch.device("cpu")
NAMES = ("square", "old")


def labels(there, old=True):
    """Whether a square is there, every fifth wrong, and whether the patient is old."""
    return {
        "square": [str(int(t) ^ (i % 5 == 0)) for i, t in enumerate(there)],
        "old": [str(int(i % 3 == 0)) if old else "1" for i in range(len(there))],
    }


def config(model, out, *data, **given):
    given = {"n_bootstrap": 100, "device": "cpu", "precision": "fp32", "splits": ("all",), **given}
    return EvaluateConfig(
        run=str(model), data=tuple(str(d.path) for d in data), out=str(out), **given
    )


def metrics_of(out):
    return json.loads((out / "metrics.json").read_text())


# --- whom the model was trained on ----------------------------------------------------------


def test_a_patient_of_the_training_is_refused_and_said_where_forced(
    make_store, task_model, tmp_path
):
    store, model = make_store(labels, prefix="hospital-"), task_model("run", NAMES)
    train, val, test = (store.manifest.rows(s) for s in ("train", "val", "test"))
    write_trained_on(model / "model", store, train, val)
    again = make_store(labels, prefix="hospital-", name="again")
    run(config(model, tmp_path / "clean", again, splits=("test",)))
    found = metrics_of(tmp_path / "clean")["sets"]["again: test"]["leaks"][str(model)]
    assert (found["rows"], found["pixels_compared"]) == (0, True)
    page = (tmp_path / "clean" / "report.html").read_text()
    assert "none found" in page
    assert "Not a test" not in page

    with pytest.raises(
        SpcxrError, match=r"again: 48 patients \(48 rows, the first 000.png.*allow-"
    ):
        run(config(model, tmp_path / "out", again))
    assert not (tmp_path / "out").exists()
    run(config(model, tmp_path / "out", again, allow_leak=True))
    found = metrics_of(tmp_path / "out")["sets"]["again"]["leaks"][str(model)]
    assert found["rows"] == found["copies"] == len(train) + len(val) == 64 - len(test)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not a test: 48 of the 64 rows of again are of patients the model was trained on" in page
    for file in ("predictions.csv", "metrics.json", "report.html"):
        assert "hospital-" not in (tmp_path / "out" / file).read_text()


def test_a_model_that_does_not_say_and_copies_in_a_set(make_store, task_model, tmp_path):
    store = make_store(labels)
    pixels = np.load(store.path / "images-00000.npy")
    pixels[5] = pixels[3]
    np.save(store.path / "images-00000.npy", pixels)
    run(config(task_model("run", NAMES), tmp_path / "out", store))
    found = metrics_of(tmp_path / "out")["sets"]["store"]
    assert list(found["leaks"].values()) == [None]
    assert found["copies"] == 1
    assert "not known: the model does not say" in (tmp_path / "out" / "report.html").read_text()


# --- no answer, or none that is finite ------------------------------------------------------


def test_a_label_that_is_constant_or_blank_has_no_figure_and_a_reason(
    make_store, task_model, tmp_path
):
    names = ("square", "old", "tb", "mass")

    def columns(there):
        return {**labels(there, old=False), "tb": [""] * len(there)}

    run(config(task_model("run", names), tmp_path / "out", make_store(columns)))
    found = metrics_of(tmp_path / "out")["sets"]["store"]
    assert found["undefined"] == {
        "old": "all 64 known values are 1",
        "tb": "the data have no such label column",  # prepare drops a column that is all blank
        "mass": "the data have no such label column",
    }
    assert found["by_class"]["old"]["auroc"]["value"] is None
    assert found["overall"]["macro_auroc"]["value"] == found["by_class"]["square"]["auroc"]["value"]
    assert "old: all 64 known values are 1" in (tmp_path / "out" / "report.html").read_text()


def test_a_set_of_one_class_alone_has_dashes_not_a_crash(make_store, task_model, tmp_path):
    def ones(there):
        return {"square": ["1"] * len(there), "old": ["1"] * len(there)}

    run(config(task_model("run", NAMES), tmp_path / "out", make_store(ones), make_store(
        labels, name="other")))  # fmt: skip
    found = metrics_of(tmp_path / "out")["sets"]
    assert found["store"]["overall"]["macro_auroc"]["value"] is None
    assert found["other"]["drift"]["classes"] == []


def test_a_model_of_broken_weights_is_refused_before_anything_is_written(
    make_store, task_model, tmp_path, monkeypatch
):
    model = task_model("run", NAMES)

    def broken(path, device="cpu"):
        trained = load_trained(path, device)
        trained.model.head.fc.bias.data[0] = float("inf")
        return trained

    monkeypatch.setattr("spcxr.recipes.evaluate.load_trained", broken)
    with pytest.raises(
        SpcxrError, match=r"store: row 0 \(000.png\): the model's output is not finite"
    ):
        run(config(model, tmp_path / "out", make_store(labels)))
    assert not (tmp_path / "out").exists()


# --- the fall from one set to another -------------------------------------------------------


def results_of(model, stores, **given):
    trained, settings = load_trained(model), Settings(64, CPU, "fp32", n_bootstrap=200, **given)
    sets = [TestSet(s.path.name, str(s.path), s, np.arange(len(s))) for s in stores]
    return trained, settings, sets, [measure(trained, one, settings) for one in sets]


def test_the_fall_is_the_difference_over_the_classes_both_sets_have(make_store, task_model):
    one = make_store(labels, prefix="a-")
    other = make_store(lambda there: labels(there, old=False), prefix="b-", name="other", count=48)
    _, settings, _, (first, second) = results_of(task_model("run", NAMES), (one, other))
    found = drift(first, second, None, settings)
    assert found.classes == ("square",)
    assert found.shared_patients == 0
    assert set(found.falls) == {"macro_auroc", "macro_average_precision", "AUROC of square"}
    aurocs = [
        float(metrics.auroc(r.answers.truth[:, 0], r.answers.scores[:, 0])) for r in (first, second)
    ]
    fall = found.falls["macro_auroc"]
    assert fall.value == pytest.approx(aurocs[0] - aurocs[1])
    assert fall.low < fall.value < fall.high
    assert (fall.n_rows, fall.n_patients) == (112, 112)
    assert found.falls["AUROC of square"].value == pytest.approx(fall.value)


def test_a_set_against_itself_falls_by_nothing_at_all(make_store, task_model):
    """All patients are in both, so that every resample is drawn in both: no spread is left."""
    store = make_store(labels, prefix="a-")
    trained, settings, sets, (first, second) = results_of(task_model("run", NAMES), (store, store))
    sample = sample_features(trained, sets[0], settings, 40)
    found = drift(first, second, (sample, sample), settings)
    assert found.shared_patients == 64
    for fall in found.falls.values():
        assert (fall.value, fall.low, fall.high) == (0, 0, 0)
    assert sample.features.shape == (40, 48)
    assert found.distance.images == (40, 40)
    assert found.distance.frechet == pytest.approx(0, abs=1e-6)
    assert found.distance.mmd.p > 0.5
    assert found.distance.shrunk


def test_one_of_many_keeps_its_accuracies_only_where_the_classes_are_the_same(
    make_store, task_model
):
    def three(there):
        return {"label": ["abc"[i % 3] for i in range(len(there))]}

    def two(there):
        return {"label": ["ab"[i % 2] for i in range(len(there))]}

    stores = [make_store(three, name="one"), make_store(three, name="same"), make_store(two)]
    model = task_model("run", "abc", multilabel=False)
    _, settings, _, results = results_of(model, stores)
    same, fewer = (drift(results[0], other, None, settings) for other in results[1:])
    assert {"accuracy", "balanced_accuracy", "macro_f1"} < set(same.falls)
    assert same.falls["accuracy"].value == pytest.approx(
        results[0].overall["accuracy"].value - results[1].overall["accuracy"].value
    )
    assert fewer.classes == ("a", "b")
    assert "accuracy" not in fewer.falls


def test_masks_fall_as_well_and_the_page_says_all_of_it(make_store, task_model, tmp_path):
    one = make_store(masked=True, prefix="a-")
    other = make_store(masked=True, prefix="b-", name="other", count=40)
    run(config(task_model("run"), tmp_path / "out", one, other))
    found = metrics_of(tmp_path / "out")["sets"]
    assert found["store"]["drift"] is None
    fall = found["other"]["drift"]["falls"]["dice"]
    dice = [found[name]["overall"]["dice"]["value"] for name in ("store", "other")]
    assert fall["value"] == pytest.approx(dice[0] - dice[1])
    assert found["other"]["drift"]["distance"]["images"] == [64, 40]
    page = (tmp_path / "out" / "report.html").read_text()
    for words in ("Fall from store", "Distance from store", "fall of Dice", "MMD²"):
        assert words in page
