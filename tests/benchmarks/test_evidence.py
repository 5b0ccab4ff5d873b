"""The study's driver: planning, checks, restart, figures and the document, without training."""

import csv
import dataclasses
import doctest
import json

import numpy as np
import pytest
from evidence import agreement, duplicates, measure, plan, run, stores, write
from PIL import Image

from spcxr.errors import SpcxrError
from spcxr.recipes.classify import ClassifyConfig
from spcxr.recipes.pretrain_config import PretrainConfig
from spcxr.recipes.segment import SegmentConfig

ROWS = run.HERE / "rows"
CONFIGS = {"pretrain": PretrainConfig, "classify": ClassifyConfig, "segment": SegmentConfig}
# Of lungs, as docs/EVIDENCE.md says.
OF_THREE_SEEDS = (
    "lungs-children",
    "lungs-children-unet",
    "lungs-adults",
    "lungs-radiologist",
    "lungs-shenzhen",
)
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
    "equalise",
    "freeze",
}
# Of two decoders each has the size it is best at; steps and images seen are the same.
OF_DECODER = {"decoder", "base_channels", "image_px"}


@pytest.mark.parametrize("module", [duplicates, measure, plan, run, stores, write])
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
            there = [
                job
                for job in made
                if job.level == level and "times_epochs" not in row.arms[job.arm]
            ]
            for job in there:
                assert budget(job, there[0]) == budget(job, job), job.folder


def budget(job, other):
    """The settings of another that must be this job's too."""
    return {k: v for k, v in other.settings.items() if k not in differing(job)}


def differing(job):
    """What the budget of a job is not made of."""
    return OF_ARM | OF_DECODER if "U-Net" in job.arm else OF_ARM


def test_there_is_a_colour_for_every_arm():
    for row in plan.read_rows(ROWS):
        assert len(row.arms) + row.baseline <= len(set(write.COLOURS)), row.name


def test_names_that_there_are_not_are_refused():
    for part, said in (
        (run.Part(rows=["lung"]), "no row 'lung'; there are pretrain"),
        (run.Part(rows=["children"], arms=["scrach"]), "no arm 'scrach'; there are scratch"),
        (run.Part(rows=["children"], arms=["knn"], levels=["5"]), "no level '5'; there are 10, 30"),
    ):
        with pytest.raises(SpcxrError, match=said):
            run.chosen_rows(part)


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


def test_masks_of_two_sources_are_compared_image_by_image(tmp_path):
    rows = []
    for k, (source, columns) in enumerate((("one", 64), ("two", 48), ("one", 64))):
        mask = np.zeros((128, 128), np.uint8)
        mask[:, :columns] = 255
        Image.fromarray(mask).save(tmp_path / f"{k}.png")
        image = "a.png" if k < 2 else "b.png"
        rows.append({"path": image, "patient_id": "p", "split": "train", "mask_source": source,
                     "mask_path": f"{k}.png"})  # fmt: skip
    _manifest(tmp_path / "seg_manifest.csv", rows)
    found, patients, sources = agreement.agreement(tmp_path)
    assert found.tolist() == [pytest.approx(2 * 48 / (64 + 48))]
    assert (patients.tolist(), sources) == (["p"], {("one", "two")})
    _manifest(tmp_path / "seg_manifest.csv", rows[2:])
    with pytest.raises(SpcxrError, match="no image has masks of two sources"):
        agreement.agreement(tmp_path)


UNUSABLE = {
    "no such file; give the folder": {"manifest": "seg"},
    "no column mask_source, which": {"manifest": "all", "keep": {"mask_source": ["v7"]}},
    "one: stores.yaml keeps no row": {"manifest": "all", "keep": {"label": ["no such"]}},
}


@pytest.mark.parametrize("said", UNUSABLE)
def test_manifests_that_cannot_be_used_are_named(said, data, tmp_path):
    with pytest.raises(SpcxrError, match=said):
        stores.write_manifests(data, tmp_path, {"one": UNUSABLE[said]})


def test_a_manifest_that_lacks_a_column_is_named(data):
    _manifest(data / "all_manifest.csv", [{"path": "0.png", "split": "test"}])
    with pytest.raises(SpcxrError, match=r"all_manifest\.csv: no column patient_id"):
        stores.read_manifest(data, "all")


def test_a_folder_made_from_other_rows_is_refused(data, tmp_path):
    def prepare(_, store):
        store.mkdir(parents=True)
        (store / "store.json").write_text("{}")

    specs = {"one": {"manifest": "all"}}
    first = stores.make_stores(data, tmp_path / "out", specs, prepare)
    assert stores.make_stores(data, tmp_path / "out", specs, prepare) == first
    at_most = {"one": {"manifest": "all", "at_most": {"test": 2}}}
    with pytest.raises(SpcxrError, match=r"made from other manifests or stores\.yaml"):
        stores.make_stores(data, tmp_path / "out", at_most, prepare)
    rows = stores.read_manifest(data, "all")
    _manifest(data / "all_manifest.csv", rows[1:])
    with pytest.raises(SpcxrError, match="made from other manifests"):
        stores.make_stores(data, tmp_path / "out", specs, prepare)


# --- figures --------------------------------------------------------------------------------


def test_a_row_of_which_nothing_is_finished_keeps_its_results(data, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "stores.yaml").write_text("pool: {manifest: all}\n")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "pretrain.yaml").write_text(PRETRAIN)
    monkeypatch.setattr(stores, "make_stores", lambda *_: {"stores": {}})
    monkeypatch.setattr(run.Store, "open", lambda *_: None)
    monkeypatch.setattr(run, "draw_encoder", lambda *_: None)
    (tmp_path / "results").mkdir()
    kept = tmp_path / "results" / "pretrain.json"
    kept.write_text("as it was")
    run.study(data, tmp_path / "out", tmp_path / "results", run.Part(finished=True))
    assert kept.read_text() == "as it was"


def test_a_finished_command_is_not_run_again_and_keeps_its_models_alone(tmp_path, monkeypatch):
    ran, folder = [], tmp_path / "row" / "all" / "scratch"
    places = [folder / f"seed-{k}" / name for k in (0, 1) for name in ("model", "checkpoints")]

    def made(words):
        ran.append(words)
        for place in places:
            place.mkdir(parents=True)

    monkeypatch.setattr(run, "spcxr_train", made)
    job = plan.Job("row", "all", "scratch", "classify", {"out": str(folder), "seeds": 2}, folder)
    first = run.run_job(job)
    assert [place.name for place in places if place.is_dir()] == ["model", "model"]
    assert run.run_job(job) == first
    assert len(ran) == 1
    assert first["command"] == "spcxr-train classify"
    other = dataclasses.replace(job, settings=job.settings | {"epochs": 2})
    with pytest.raises(SpcxrError, match="was run with other settings"):
        run.run_job(other)


def test_a_command_that_began_from_other_weights_is_not_taken_for_done(tmp_path, monkeypatch):
    folder, encoder = tmp_path / "row", tmp_path / "encoder"
    monkeypatch.setattr(run, "spcxr_train", lambda words: folder.mkdir())
    job = plan.Job("row", "all", "linear", "classify", {"init": str(encoder)}, folder)
    with pytest.raises(SpcxrError, match="encoder: no encoder there; run the row that makes it"):
        run.run_job(job)
    encoder.mkdir()
    (encoder / "model.safetensors").write_bytes(b"one")
    assert run.run_job(job) == run.run_job(job)
    (encoder / "model.safetensors").write_bytes(b"two")
    with pytest.raises(SpcxrError, match="was run with other weights to begin from; remove it"):
        run.run_job(job)


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
