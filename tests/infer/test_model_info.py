"""`spcxr info MODEL`: what a model is, without a word of any patient."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from spcxr.cli import use
from spcxr.evaluate.calibration import write_calibration
from spcxr.evaluate.thresholds import write_thresholds


def info(*arguments):
    return CliRunner().invoke(use, ["info", *map(str, arguments)])


def test_a_classifier_says_what_it_answers_and_how_it_is_prepared(untrained):
    run = untrained()
    write_calibration(run / "model", ["covid"], np.array([1.5]), {})
    write_thresholds(run / "model", ["covid"], {"youden": np.array([0.25])})
    (run / "model" / "trained_on.json").write_text('{"patients": ["Smith-0042"]}')
    facts = json.loads(info(run, "--json").stdout)
    assert facts["answers"] == {
        "kind": "classify",
        "labels": ["covid"],
        "multilabel": True,
        "temperatures": [1.5],
        "thresholds": {"youden": {"covid": 0.25}},
    }
    assert facts["preprocess"]["size_px"] == 32
    assert (facts["mean"], facts["std"]) == (0.25, 0.25)
    assert facts["encoder"]["width"] == 24
    assert facts["encoder"]["image_px"] == [32, 32]
    assert "trained_on.json" in facts["files"]
    page = info(run)
    assert page.exit_code == 0
    for word in ("classify", "covid", "minmax", "model.safetensors", "0.25"):
        assert word in page.stdout
    assert "Smith" not in page.stdout
    assert "Smith" not in json.dumps(facts)


def test_a_segmenter_and_what_is_no_model(untrained, tmp_path):
    facts = json.loads(info(untrained("lung"), "--json").stdout)
    assert facts["answers"]["structures"] == ["lung"]
    said = info(tmp_path / "no")
    assert (said.exit_code, said.output.count("\n")) == (2, 1)
    assert "neither a run with an exported model/ nor a model folder" in said.output


@pytest.mark.parametrize("name", ["calibration.json", "thresholds.json"])
def test_a_torn_file_beside_the_weights_is_said(name, untrained):
    run = untrained()
    (run / "model" / name).write_text("{")
    said = info(run)
    assert (said.exit_code, said.output.count("\n")) == (2, 1)
    assert f"{name}: cannot be read" in said.output


def test_without_a_model_the_machine_is_described():
    facts = json.loads(info("--json").stdout)
    assert {"onnx", "onnxruntime", "timm"} <= set(facts["libraries"])
    assert facts["backends"]
