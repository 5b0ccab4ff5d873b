"""A model's own calibration and thresholds in `evaluate`: used, said, and refused where torn."""

import json

import numpy as np
import pytest
from scipy.special import expit

from spcxr.errors import SpcxrError
from spcxr.evaluate.calibration import calibration_error, write_calibration
from spcxr.evaluate.thresholds import write_thresholds
from spcxr.infer.operating import operating_point
from spcxr.infer.predict import load_trained, predict_classes
from spcxr.recipes.evaluate import EvaluateConfig, run
from spcxr.train.device import Compute

NAMES = ("square", "odd")


def labels(there):
    return {
        "square": [str(int(t) ^ (i % 5 == 0)) for i, t in enumerate(there)],
        "odd": [str(i % 2) for i in range(len(there))],
    }


def evaluated(model, out, store, **given):
    given = {"n_bootstrap": 100, "device": "cpu", "precision": "fp32", "splits": ("all",), **given}
    run(EvaluateConfig(run=str(model), data=(str(store.path),), out=str(out), **given))
    return json.loads((out / "metrics.json").read_text())["sets"]["store"]


def test_probabilities_are_tempered_and_labels_called_from_the_models_thresholds(
    make_store, task_model, tmp_path
):
    store, model = make_store(labels), task_model("run", NAMES)
    trained = load_trained(model)
    logits = predict_classes(
        trained.model, store, np.arange(64), trained.normalisation,
        Compute(64, next(trained.model.parameters()).device, "fp32"),
    )  # fmt: skip
    truth = store.manifest.label_matrix(NAMES)
    plain = evaluated(model, tmp_path / "plain", store)
    assert plain["temperatures"] is None
    assert (plain["threshold"], plain["threshold_from"]) == (0.5, "a probability of a half")
    assert plain["calibration_error_before_tempering"] == {}

    heat = np.array([3.0, np.nan])
    tempered = expit(logits / [3.0, 1.0])
    cut = float(np.median(tempered[:, 0]))
    write_calibration(model / "model", NAMES, heat, {})
    write_thresholds(model / "model", NAMES, {"youden": np.array([cut, 0.7])})
    found = evaluated(model, tmp_path / "own", store)
    assert found["temperatures"] == [3.0, None]
    assert found["threshold"] == pytest.approx([cut, 0.7])
    assert found["threshold_from"] == "the model's thresholds.json, rule youden"
    for name in NAMES:  # what it was, before
        error = found["calibration_error_before_tempering"][name]["value"]
        assert error == pytest.approx(plain["by_class"][name]["ece"]["value"])
        auroc = found["by_class"][name]["auroc"]
        assert auroc == pytest.approx(plain["by_class"][name]["auroc"])
    after = float(calibration_error(truth[:, 0], tempered[:, 0]))
    assert found["by_class"]["square"]["ece"]["value"] == pytest.approx(after, abs=1e-6)
    called = tempered[:, 0] >= cut
    share = (called & (truth[:, 0] == 1)).sum() / (truth[:, 0] == 1).sum()
    assert found["by_class"]["square"]["sensitivity"]["value"] == pytest.approx(share)
    page = (tmp_path / "own" / "report.html").read_text()
    assert "Probabilities are tempered as the validation rows asked for (By class)" in page
    assert "calibration error, untempered" in page
    assert "Reliability" in page
    write_thresholds(model / "model", NAMES, {"youden": np.array([0.1, 0.7])})
    with pytest.raises(SpcxrError, match="finished evaluation with other calibration; choose"):
        evaluated(model, tmp_path / "own", store)


def test_a_threshold_that_is_given_goes_before_the_models(task_model):
    model = task_model("run", NAMES)
    write_thresholds(model / "model", NAMES, {"youden": np.array([0.2, 0.7])})
    trained = load_trained(model)
    assert operating_point(trained, 0.4).threshold == 0.4
    assert operating_point(trained, None).threshold.tolist() == [0.2, 0.7]


def test_a_rule_that_cannot_be_kept_is_refused(task_model):
    several = load_trained(task_model("several", NAMES))
    with pytest.raises(SpcxrError, match=r"no thresholds.json, by no rule; leave 'sens.* out"):
        operating_point(several, None, "sensitivity_90")
    one = load_trained(task_model("one", ["a", "b"], multilabel=False))
    with pytest.raises(SpcxrError, match="calls the likeliest class, by no rule; leave 'sens"):
        operating_point(one, None, "sensitivity_90")
    assert operating_point(several, None).threshold == 0.5


def test_one_of_many_has_one_temperature_and_no_threshold(make_store, task_model, tmp_path):
    model = task_model("run", ["a", "b"], multilabel=False)
    store = make_store(lambda there: {"label": ["ab"[int(t)] for t in there]})
    write_calibration(model / "model", ("a", "b"), np.array([2.0]), {})
    write_thresholds(model / "model", ("a", "b"), {"youden": np.array([0.2, 0.7])})
    found = evaluated(model, tmp_path / "out", store, corruptions=("inversion",))
    assert found["temperatures"] == [2.0]
    assert found["threshold"] is None
    assert list(found["calibration_error_before_tempering"]) == ["the highest probability"]
    clean = found["overall"]["macro_auroc"]["value"]
    turned = found["corruptions"]["inversion"]["full"]
    assert turned["fall"]["value"] == pytest.approx(clean - turned["value"]["value"])


@pytest.mark.parametrize("file", ["calibration.json", "thresholds.json"])
def test_a_torn_file_is_refused_by_name(task_model, file):
    model = task_model("run", NAMES)
    (model / "model" / file).write_text("{")
    with pytest.raises(SpcxrError, match=file):
        operating_point(load_trained(model), None)
