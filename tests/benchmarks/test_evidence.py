"""The study's driver: planning, checks, restart, figures and the document, without training."""

import csv
import dataclasses
import doctest
import json

import numpy as np
import pytest
from evidence import duplicates, measure, plan, run, stores, write
from PIL import Image

from spcxr.data.manifest import Manifest
from spcxr.errors import SpcxrError
from spcxr.evaluate.metrics import mean
from spcxr.recipes.classify import ClassifyConfig
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.recipes.segment import SegmentConfig

ROWS = run.HERE / "rows"
CONFIGS = {"pretrain": PretrainConfig, "classify": ClassifyConfig, "segment": SegmentConfig}
# Of lungs, as docs/EVIDENCE.md says.
OF_THREE_SEEDS = ("lungs-children", "lungs-adults", "lungs-radiologist", "lungs-shenzhen")
# What an arm may differ by from another of its level; all else is the budget.
OF_ARM = {
    "init",
    "model",
    "layer_decay",
    "out",
    "method",
    "head_init",
    "seeds",
    "base_lr",
    "attend",
    "lungs_from",
    "decoder",
    "freeze",
    "base_channels",
    "image_px",
}


@pytest.mark.parametrize("module", [duplicates, measure, plan, stores, write])
def test_examples(module):
    found = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


@pytest.mark.parametrize("small", [False, True])
def test_every_command_is_accepted_and_budgets_are_equal(tmp_path, small):
    rows = plan.read_rows(ROWS, small=small)
    assert rows
    for row in rows:
        made = list(plan.jobs(row, tmp_path))
        assert len({job.folder for job in made}) == len(made)
        for job in [*made, *(job for _, job in plan.trials(row, tmp_path))]:
            CONFIGS[job.command](**_typed(job.settings))
        if row.command == "pretrain":
            continue
        assert row.settings["seeds"] >= (3 if small or row.name in OF_THREE_SEEDS else 5)
        for level in row.levels:
            budgets = [
                {k: v for k, v in job.settings.items() if k not in OF_ARM}
                for job in made
                if job.level == level and "x3" not in job.arm
            ]
            assert all(budget == budgets[0] for budget in budgets)


def _typed(settings):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def test_rates_are_tried_alike_and_on_a_seed_that_is_not_reported(tmp_path):
    row = next(row for row in plan.read_rows(ROWS) if row.name == "children")
    tried = list(plan.trials(row, tmp_path))
    each = {arm: [rate for rate, job in tried if job.arm == arm] for arm in row.arms}
    assert each["pretrained"] == each["scratch"] == row.rates["base_lr"]
    assert each["linear"] == []
    assert all(job.settings["seed"] == plan.TRIAL_SEED >= row.settings["seeds"] for _, job in tried)


def test_scratch_x3_has_three_times_the_epochs(tmp_path):
    row = next(row for row in plan.read_rows(ROWS) if row.name == "children")
    made = list(plan.jobs(row, tmp_path))
    for level in (levels := row.arms["scratch x3"]["levels"]):
        epochs = {job.arm: job.settings["epochs"] for job in made if job.level == level}
        assert epochs["scratch x3"] == 3 * epochs["scratch"]
    assert [job.level for job in made if job.arm == "scratch x3"] == levels


def test_a_field_that_no_row_has_is_refused(tmp_path):
    file = tmp_path / "one.yaml"
    file.write_text("title: a\ncommand: classify\nstore: s\narms: {}\nlevel: {}\n")
    with pytest.raises(SpcxrError, match="no row has 'level'"):
        plan.read_row(file)


# --- images ---------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    """A data folder: twelve drawn pictures, of which the last is a cut and darker copy of the
    first, of another patient and in training."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    rows = []
    for k in range(12):
        coarse = Image.fromarray(rng.integers(0, 255, (14, 14)).astype(np.uint8))
        picture = coarse.resize((240, 240), Image.Resampling.BICUBIC)
        if k == 0:
            first = picture
        if k == 11:
            picture = first.crop((10, 10, 230, 230)).point(lambda v: 0.8 * v + 9)
        picture.save(folder / f"{k}.png")
        split = "test" if k < 3 else "train"
        rows.append({"path": f"{k}.png", "patient_id": f"p-{k}", "split": split, "label": "a"})
    _manifest(folder / "all_manifest.csv", rows)
    return folder


def _manifest(file, rows):
    with file.open("w", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_copy_in_training_is_found_and_left_out(data, tmp_path):
    found = stores.write_manifests(data, tmp_path, {"one": {"manifest": "all"}})
    assert [(p["held"], p["train"]) for p in found["near_duplicates"]] == [("0.png", "11.png")]
    assert found["stores"]["one"]["left_out"] == 1
    with (tmp_path / "one.csv").open() as file:
        assert "p-11" not in {row["patient_id"] for row in csv.DictReader(file)}


def test_a_patient_on_both_sides_is_refused(data, tmp_path):
    rows = stores.read_manifest(data, "all")
    rows[5]["patient_id"] = "p-1"
    _manifest(data / "all_manifest.csv", rows)
    with pytest.raises(SpcxrError, match="patient p-1 is in training and in a held split"):
        stores.write_manifests(data, tmp_path, {"one": {"manifest": "all"}})


# --- figures --------------------------------------------------------------------------------


def test_a_finished_command_is_not_run_again(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(run, "spcxr_train", lambda words: (ran.append(words), folder.mkdir()))
    folder = tmp_path / "row" / "all" / "scratch"
    job = plan.Job("row", "all", "scratch", "classify", {"out": str(folder)}, folder)
    first = run.run_job(job)
    assert run.run_job(job) == first
    assert len(ran) == 1
    assert first["command"] == "spcxr-train classify"
    other = dataclasses.replace(job, settings=job.settings | {"epochs": 2})
    with pytest.raises(SpcxrError, match="was run with other settings"):
        run.run_job(other)


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


PRETRAIN = """
title: Pretraining
order: 1
command: pretrain
store: pool
settings: {model: vit_tiny, image_px: [32], batch_size: 4, epochs: 1}
arms: {gmml: {objective: gmml}}
"""
BARS = """
title: Bars
order: 2
command: classify
store: bars
settings: {image_px: 32, batch_size: 4, epochs: 1, seeds: 2}
levels: {"4": {labels_per_class: 4}}
arms:
  scratch: {init: scratch, model: vit_tiny}
  pretrained: {init: pretrain/all/gmml}
  linear: {init: pretrain/all/gmml, method: linear}
elsewhere: [away]
corruptions: [blur, inversion]
baseline: true
rates: {level: "4", base_lr: [1.0e-4, 1.0e-3]}
differences: [[pretrained, scratch]]
metrics: [macro_auroc, fall]
"""
STORES = """
pool: {manifest: bars, keep: {split: [train]}}
bars: {manifest: bars}
away: {manifest: bars, keep: {split: [test]}, at_most: {test: 8}}
"""


@pytest.mark.slow
def test_a_study_from_images_to_the_document(tmp_path, monkeypatch):
    data, study = tmp_path / "data", tmp_path / "study"
    for folder in (data, study / "rows"):
        folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for k in range(40):
        grey = rng.integers(0, 90, (48, 48))
        grey[(slice(20, 28), slice(None)) if k % 2 else (slice(None), slice(20, 28))] += 120
        Image.fromarray(grey.astype(np.uint8)).save(data / f"{k}.png")
        split = "train" if k < 20 else "val" if k < 30 else "test"
        rows.append({"path": f"{k}.png", "patient_id": f"who-{k}", "split": split,
                     "label": "ab"[k % 2]})  # fmt: skip
    _manifest(data / "bars_manifest.csv", rows)
    (study / "stores.yaml").write_text(STORES)
    (study / "rows" / "pretrain.yaml").write_text(PRETRAIN)
    (study / "rows" / "bars.yaml").write_text(BARS)
    monkeypatch.setattr(run, "HERE", study)
    monkeypatch.setattr(run, "SIZE_PX", 48)
    # A bar is a copy of a bar.
    monkeypatch.setattr(stores, "near_duplicates", lambda *_: [])
    out, results = tmp_path / "out", tmp_path / "results"
    run.study(data, out, results, run.Part())
    found = json.loads((results / "bars.json").read_text())
    assert set(found["levels"]) == {"4", "4, on away"}
    home = found["levels"]["4"]["macro_auroc"]
    assert home["thumbnails"]["value"] > 0.9  # the task is as easy as that
    assert {"pretrained - scratch", "pretrained - thumbnails", "linear"} < set(home)
    assert home["scratch"]["n_patients"] == 10
    assert found["levels"]["4, on away"]["macro_auroc"]["scratch"]["n_images"] == 8
    assert "fall" in found["levels"]["4"]
    assert "fall" not in found["levels"]["4, on away"]
    # Nothing is trained twice, and the same figures come of it.
    before = (results / "bars.json").read_text()
    monkeypatch.setattr(run, "spcxr_train", lambda words: pytest.fail(f"ran {words}"))
    run.study(data, out, results, run.Part())
    assert (results / "bars.json").read_text() == before
    text = write.write_document(results, tmp_path / "EVIDENCE.md").read_text()
    assert text.index("## Pretraining") < text.index("## Bars")


# --- the document ---------------------------------------------------------------------------


def test_the_document_keeps_what_a_person_wrote(tmp_path):
    figure = {"value": 0.9, "low": 0.8, "high": 0.95, "seeds": [0.88, 0.92], "n_images": 6,
              "n_patients": 3}  # fmt: skip
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
    assert "6 images, 3 patients" in once
    assert once.index("| 5 | a |") < once.index("| all | a |")
    assert (document.parent / "images" / "evidence-lungs.png").stat().st_size > 1000
    write.write_document(results, document)
    assert document.read_text() == once
