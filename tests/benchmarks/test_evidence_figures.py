"""The study's figures and document: seeds, intervals, thresholds, tables; nothing is trained."""

import json

import numpy as np
import pytest
from evidence import measure, write

from spcxr.data.manifest import Manifest
from spcxr.errors import SpcxrError
from spcxr.evaluate.metrics import mean


class StubStore:
    """Two test images each of three patients."""

    manifest = Manifest.from_columns(
        {"path": list("abcdef"), "patient_id": ["x", "x", "y", "y", "z", "z"]}, root="/data"
    )


def test_seeds_are_averaged_and_compared_on_the_same_patients(tmp_path):
    values = {"one": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], "two": [0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}
    for name, column in values.items():
        (tmp_path / name).mkdir()
        rows = [f"{path},test,{value}" for path, value in zip("abcdef", column, strict=True)]
        text = "\n".join(["path,split,dice_lung", *rows, "g,val,0"])
        (tmp_path / name / "predictions.csv").write_text(text)
    one, two = (measure.measure_run(tmp_path / name, StubStore) for name in values)
    found = measure.compare_arms({"a": [one, two], "b": [two]}, [("a", "b")], ["dice"])["dice"]
    assert found["a"]["value"] == pytest.approx(0.7)
    assert found["a"]["n_images"] == 6
    assert found["a"]["n_patients"] == 3
    assert found["a - b"]["low"] == pytest.approx(0.05)
    assert found["a - b"]["high"] == pytest.approx(0.05)
    assert found["a - b"]["p"] < 0.01


class Doubted:
    """Five patients, the last with a label that is doubted."""

    manifest = Manifest.from_columns(
        {"path": list("abcde"), "patient_id": list("vwxyz"), "check": ["", "", "", "", "wrong"]},
        root="/data",
    )


def test_a_threshold_is_that_of_validation_rows_and_doubtful_labels_are_left_out(tmp_path):
    scores = {"a": (1, 0.3), "b": (1, 0.25), "c": (0, 0.1), "d": (0, 0.4), "e": (0, 0.45)}
    lines = ["path,split,ill,p_ill"]
    lines += [f"{path},test,{truth},{score}" for path, (truth, score) in scores.items()]
    lines += ["f,val,1,0.3", "g,val,0,0.1"]
    head, *body = (line.split(",") for line in lines)
    both = [",".join([*head, "well", "p_well"])]
    both += [",".join([*row, str(1 - int(row[2])), str(1 - float(row[3]))]) for row in body]
    # the second class is the one that is called
    both = [",".join(row.split(",")[:2] + row.split(",")[4:] + row.split(",")[2:4]) for row in both]
    (tmp_path / "predictions.csv").write_text("\n".join(both))
    found = measure.measure_run(tmp_path, Doubted)
    ones = np.ones(5)
    assert found.statistics["balanced_accuracy"](ones) == 0.5  # nothing reaches a half
    # called from 0.2: both ill, and of the well c alone is spared
    assert found.statistics[measure.SETTLED](ones) == pytest.approx((1 + 1 / 3) / 2)
    sure = measure.measure_run(tmp_path, Doubted, without={"check": "wrong"})
    assert sure.paths == tuple("abcd")
    assert sure.statistics[measure.SETTLED](np.ones(4)) == pytest.approx((1 + 1 / 2) / 2)


def test_an_arm_without_a_metric_is_left_out_of_it_alone():
    who, values = np.array(["x", "y"]), np.array([0.1, 0.3])
    own = {"dice": lambda w: mean(values, w)}
    both = measure.Measured(own | {"fall": own["dice"]}, who, ("1", "2"))
    arms = {"a": [both], "b": [measure.Measured(own, who, ("1", "2"))]}
    found = measure.compare_arms(arms, [("a", "b")], ["fall", "dice", "iou"])
    assert set(found) == {"fall", "dice"}
    assert set(found["fall"]) == {"a"}
    assert found["dice"]["a - b"]["value"] == 0


def test_runs_on_other_rows_are_not_compared():
    who = np.array(["x", "y"])
    values = np.array([0.1, 0.2])
    own = {"dice": lambda w: mean(values, w)}
    runs = {"a": [measure.Measured(own, who, ("1", "2"))],
            "b": [measure.Measured(own, who, ("1", "3"))]}  # fmt: skip
    with pytest.raises(SpcxrError, match="measured on other rows"):
        measure.compare_arms(runs, [("a", "b")], ["dice"])


# --- the document ---------------------------------------------------------------------------


def test_few_patients_bear_no_interval():
    arm = {"value": 0.9, "low": 0.8, "high": 0.95, "seeds": [0.9], "n_images": 9, "n_patients": 9}
    gap = {"value": 0.1, "low": 0.05, "high": 0.15, "p": 0.001}
    row = {"metrics": ["dice"], "levels": {"all": {"dice": {"a": arm, "b": arm, "a - b": gap}}}}
    text = "\n".join(write.table(row))
    assert "| **a - b** | **0.100** |" in text
    assert "(0.8" not in text
    assert "Under 10 patients: no interval." in text
    arm["n_patients"] = 10
    assert "**0.100 (0.050 to 0.150)**, p 0.001" in "\n".join(write.table(row))


def test_the_document_keeps_what_a_person_wrote(tmp_path):
    figure = {"value": 0.9, "low": 0.8, "high": 0.95, "seeds": [0.88, 0.92], "n_images": 16,
              "n_patients": 13}  # fmt: skip
    gap = {"value": 0.1, "low": 0.05, "high": 0.15, "p": 0.001}
    level = {"dice": {"a": figure, "b": figure, "a - b": gap}}
    row = {"title": "Lungs", "order": 1, "name": "lungs", "metrics": ["dice"],
           "runs": {"5/a": {"command": "spcxr-train segment", "commit": "abc", "device": "a CPU",
                            "seconds": 60}},
           "levels": {"all": level, "5": level}}  # fmt: skip
    results, document = tmp_path / "results", tmp_path / "docs" / "EVIDENCE.md"
    results.mkdir()
    (results / "lungs.json").write_text(json.dumps(row))
    document.parent.mkdir()
    document.write_text(
        "# Evidence\n\nBefore.\n\n<!-- row lungs -->\n<!-- end lungs -->\n\nFound.\n"
    )
    write.write_document(results, document)
    once = document.read_text()
    assert once.startswith("# Evidence\n\nBefore.\n")
    assert once.endswith("\nFound.\n")
    assert "**0.100 (0.050 to 0.150)**, p 0.001" in once
    assert "16 images, 13 patients" in once
    assert once.index("| 5 | a |") < once.index("| all | a |")
    assert (document.parent / "images" / "evidence-lungs.png").stat().st_size > 1000
    write.write_document(results, document)
    assert document.read_text() == once
