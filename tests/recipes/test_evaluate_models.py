"""`evaluate` with images made worse, and with another model beside the first."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from spcxr.config import ConfigError
from spcxr.errors import SpcxrError
from spcxr.evaluate.corruptions import corrupt
from spcxr.infer.predict import load_trained, predict_classes
from spcxr.recipes.evaluate import EvaluateConfig, run
from spcxr.recipes.measure import Settings, TestSet, judge, predict
from spcxr.recipes.sweep import judge_corrupted, predict_corrupted
from spcxr.train.device import Compute

CPU = torch.device("cpu")
SETTINGS = Settings(64, CPU, "fp32", n_bootstrap=100)


def squares(there):
    return {"square": [str(int(t) ^ (i % 5 == 0)) for i, t in enumerate(there)]}


def config(model, out, store, **given):
    given = {"n_bootstrap": 100, "device": "cpu", "precision": "fp32", "splits": ("all",), **given}
    return EvaluateConfig(run=str(model), data=(str(store.path),), out=str(out), **given)


# --- images made worse ----------------------------------------------------------------------


def test_a_corrupted_figure_is_that_of_the_corrupted_images(make_store, task_model):
    store, trained = make_store(squares), load_trained(task_model("run", ["square"]))
    test_set = TestSet("all", "here", store, np.arange(64))
    predicted = predict(trained, test_set, SETTINGS)
    swept = predict_corrupted(trained, test_set, SETTINGS, ("noise", "inversion"))
    assert list(swept) == [("noise", 1), ("noise", 2), ("noise", 3), ("inversion", 1)]
    result = judge(trained, test_set, predicted, SETTINGS)
    found = judge_corrupted(trained, result, swept, SETTINGS)
    logits = predict_classes(
        trained.model, store, np.arange(64), trained.normalisation, Compute(5, CPU, "fp32"),
        lambda images, rows: corrupt(images, rows, "noise", 3),
    )  # fmt: skip
    truth = store.manifest.label_matrix(["square"])[:, 0]
    expected = roc_auc_score(truth, logits[:, 0])
    strong = found["noise"]["strong"]
    assert strong.value.value == pytest.approx(expected, abs=1e-6)
    clean = result.overall["macro_auroc"].value
    assert clean not in (0, 1, expected)
    assert strong.fall.value == pytest.approx(clean - expected, abs=1e-6)
    assert strong.fall.low <= strong.fall.value <= strong.fall.high
    assert list(found["inversion"]) == ["full"]


def test_masks_are_not_moved_and_the_page_shows_the_sweep(make_store, task_model, tmp_path):
    store = make_store(masked=True, count=24)
    run(config(task_model("run"), tmp_path / "out", store, corruptions=("all",)))
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["sets"]["store"]
    assert set(found["corruptions"]) == {"noise", "blur", "gamma", "text", "inversion"}
    strong = found["corruptions"]["blur"]["strong"]
    fall = found["overall"]["dice"]["value"] - strong["value"]["value"]
    assert strong["fall"]["value"] == pytest.approx(fall)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "store: corrupted images" in page
    assert "Crops and rotations are left out" in page


@pytest.mark.parametrize("given", [("fog",), ("none", "blur"), ("all", "blur")])
def test_corruptions_that_cannot_be_are_refused(given):
    with pytest.raises(ConfigError, match="corruptions names"):
        EvaluateConfig(run="a", data=("b",), out="c", corruptions=given)


# --- another model --------------------------------------------------------------------------


def test_two_models_are_compared_on_the_same_patients(make_store, task_model, tmp_path):
    store = make_store(lambda there: {**squares(there), "odd": ["0", "1"] * (len(there) // 2)})
    one = task_model("one", ["square", "odd"])
    other = task_model("other", ["odd", "square"], seed=1)  # the order of labels is free
    run(config(one, tmp_path / "out", store, against=str(other)))
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert str(other) in found["provenance"]["against"]
    compared = found["sets"]["store"]["against"]
    run(config(other, tmp_path / "alone", store))
    alone = json.loads((tmp_path / "alone" / "metrics.json").read_text())["sets"]["store"]
    own = found["sets"]["store"]["overall"]["macro_auroc"]["value"]
    gap = own - alone["overall"]["macro_auroc"]["value"]
    difference = compared["macro_auroc"]["difference"]
    assert difference["value"] == pytest.approx(gap, abs=1e-9)
    assert difference["low"] <= gap <= difference["high"]
    by_class = [s["by_class"]["square"]["auroc"]["value"] for s in (found["sets"]["store"], alone)]
    tested = compared["AUROC of square"]["test"]
    assert tested["difference"] == pytest.approx(by_class[0] - by_class[1], abs=1e-9)
    assert 0 <= tested["p"] <= 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "store: against other" in page
    assert "DeLong" in page


def test_a_model_of_another_question_is_refused(make_store, task_model, tmp_path):
    store, one = make_store(squares, masked=True), task_model("one", ["square"])
    others = {
        "has the labels odd": task_model("labels", ["odd"]),
        "answers for masks": task_model("masks"),
        "answers for one class of many": task_model("many", ["square", "x"], multilabel=False),
        "prepared otherwise than": task_model("preset", ["square"], preset="rad-dino"),
    }
    for said, other in others.items():
        with pytest.raises(SpcxrError, match=said):
            run(config(one, tmp_path / "out", store, against=str(other)))
    with pytest.raises(ConfigError, match="against names the run itself"):
        config(one, tmp_path / "out", store, against=str(one))
