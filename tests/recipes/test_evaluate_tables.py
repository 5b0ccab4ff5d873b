"""What the tables of a set say beside the figures: counts, who is in no group, what is doubtful."""

import numpy as np
import pytest
import torch

from spcxr.evaluate import pages
from spcxr.evaluate.calibration import write_calibration
from spcxr.evaluate.summary import summarise_classes
from spcxr.infer.predict import load_trained
from spcxr.recipes.measure import Settings, TestSet, measure

SETTINGS = Settings(64, torch.device("cpu"), "fp32", n_bootstrap=100)
NAMES = ("square", "old")


@pytest.fixture
def measured(make_store, task_model):
    """``measured(columns, temperatures)``: a set of 64 images and what was found on it."""

    def make(columns, temperatures=None, **given):
        def all_columns(there):
            return {
                "square": [str(int(t)) for t in there],
                "old": [str(int(i % 3 == 0)) for i in range(len(there))],
                **columns,
            }

        store, model = make_store(all_columns, **given), task_model("run", NAMES)
        if temperatures is not None:
            write_calibration(model / "model", NAMES, np.array(temperatures), {})
        test_set = TestSet("all", "here", store, np.arange(64))
        return test_set, measure(load_trained(model), test_set, SETTINGS)

    return make


def tables(result):
    return {table.caption: table for table in result.section.tables}


def test_a_group_stands_with_its_images_and_patients_and_the_others_are_named(measured):
    site = ["a"] * 30 + ["b"] * 24 + ["c"] * 7 + [""] * 3
    patients = [f"p{i // 2}" for i in range(64)]
    _, result = measured({"site": site, "patient_id": patients, "split": ["test"] * 64})
    table = tables(result)["By site"]
    assert table.columns[:3] == ["site", "images (patients)", "mean AUROC"]
    assert [row[:2] for row in table.rows] == [["a", "30 (15)"], ["b", "24 (12)"]]
    assert "too few images: unknown 3, c 7." in table.note
    assert "Means are over the classes with both kinds of images in a group" in table.note


def test_groups_of_which_only_one_is_large_are_counted_without_figures(measured):
    _, result = measured({"site": ["a"] * 60 + ["b"] * 4, "sex": ["F"] * 64})
    made = tables(result)
    assert made["By site"].rows == []
    assert "a 60, b 4" in made["By site"].note
    assert "By sex" not in made


def test_temperatures_and_the_error_before_stand_by_their_labels(measured):
    """Of fourteen labels they were a paragraph that nobody reads."""
    _, result = measured({}, temperatures=[2.0, np.nan])
    table = tables(result)["By class: probabilities"]
    assert table.columns[-2:] == ["calibration error, untempered", "temperature"]
    before = result.details["calibration_error_before_tempering"]
    assert [row[-2] for row in table.rows] == [before[name] for name in NAMES]
    assert table.rows[0][-1] == 2.0
    assert np.isnan(table.rows[1][-1])
    assert "(By class)" in result.section.text
    assert "Calibration error before" not in result.section.text


@pytest.mark.parametrize(("shift", "said"), [(1.0, True), (0.0, False)])
def test_an_interval_without_width_is_explained_and_a_wide_one_is_not(shift, said):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, (60, 1)).astype(float)
    score = (rng.random((60, 1)) + shift * truth) / (1 + shift)
    found = summarise_classes(truth, score, np.arange(60), ("x",), multilabel=True, n=100)
    _, calls, probable = pages.class_tables(found)
    assert ("up to 3 in n may yet" in calls.note) is said
    assert "may lie above the value" in probable.note


def test_one_patient_has_no_intervals_and_is_told_so(measured):
    _, result = measured({"patient_id": ["p"] * 64, "split": ["test"] * 64})
    assert "All are of one patient, so there are no intervals." in result.section.text
