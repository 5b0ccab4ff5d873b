"""`spcxr predict` on files: its numbers are those of `spcxr-train evaluate`."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from spcxr.cli import use
from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.data.study import read_study
from spcxr.evaluate.calibration import write_calibration
from spcxr.evaluate.thresholds import write_thresholds
from spcxr.infer.operating import operating_point
from spcxr.infer.predict import load_trained
from spcxr.infer.predict_files import predict_files
from spcxr.models.decoder import UNETRDecoder
from spcxr.models.heads import ClassificationHead
from spcxr.models.neighbours import NeighbourHead
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import save_model_folder
from spcxr.recipes.evaluate import EvaluateConfig, run
from spcxr.recipes.measure import predict
from spcxr.recipes.testset import Settings, TestSet
from spcxr.train.device import Compute

NAMES, COUNT, SIDE = ("covid", "tb", "lung opacity"), 20, 32
COMPUTE = Compute(7, torch.device("cpu"), "fp32")


@pytest.fixture
def store(tmp_path):
    """Radiographs of many sizes, and a store of the same with labels."""
    rng, preprocess = np.random.default_rng(0), Preprocess(size_px=SIDE)
    names = [f"{i:02d}.png" for i in range(COUNT)]
    columns = {"path": names, "patient_id": names, "split": ["test"] * COUNT}
    for k, label in enumerate(NAMES):
        columns[label] = [str(int(i % 3 == k)) for i in range(COUNT)]
    with StoreWriter(tmp_path / "store", preprocess) as writer:
        for i, name in enumerate(names):
            dtype = (np.uint8, np.uint16)[i % 2]
            pixels = rng.random(rng.integers(30, 80, 2)) * np.iinfo(dtype).max
            Image.fromarray(pixels.astype(dtype)).save(tmp_path / name)
            writer.add(preprocess(read_study(tmp_path / name)).pixels, None)
        return writer.finish(Manifest.from_columns(columns, root=tmp_path))


def rows(file):
    with file.open() as opened:
        return list(csv.DictReader(opened))


def head(width, kind, multilabel):
    if kind != "knn":
        made = ClassificationHead(width=width, classes=3)
        torch.nn.init.normal_(made.fc.weight, std=0.5)
        return made, {"method": kind}
    made = NeighbourHead(width=width, rows=12, classes=3, k=5, multilabel=multilabel)
    values = torch.eye(3)[torch.arange(12) % 3]
    made.remember(torch.randn(12, 2 * width), values)
    return made, {"method": "knn", "neighbours": 5}


def model(folder, *, kind="full", multilabel=True, lungs=False):
    """A run whose model knows nothing; ``lungs``: which reads what its own finder takes for one."""
    torch.manual_seed(0)
    shared = {"preprocess": Preprocess(size_px=SIDE).to_dict(), "mean": 0.5, "std": 0.25}

    def encoder():
        return VisionTransformer(image_px=SIDE, patch_px=8, width=24, depth=4, heads=3)

    made, said = head(24, kind, multilabel)
    task = {"kind": "classify", "labels": list(NAMES), "multilabel": multilabel, **said}
    if lungs:
        task |= {"attend": "lungs", "lungs_from": "model"}
    save_model_folder(folder / "model", encoder(), task=task, head=made, provenance={}, **shared)
    if lungs:
        drawing = {"kind": "segment", "structures": ["lung"], "base_channels": 4}
        decoder = UNETRDecoder(width=24, patch_px=8, out_channels=2, base_channels=4)
        save_model_folder(
            folder / "model" / "lungs",
            encoder(),
            task=drawing,
            head=decoder,
            provenance={},
            **shared,
        )
    return folder


def predicted(trained, tmp_path):
    """Every file, and the rows by the files' names."""
    files = [tmp_path / f"{i:02d}.png" for i in range(COUNT)]
    counts = predict_files(trained, files, tmp_path / "p.csv", COMPUTE)
    assert (counts.done, counts.rejected) == (COUNT, 0)
    found = rows(tmp_path / "p.csv")
    assert [row["path"] for row in found] == [str(file) for file in files]
    return {row["path"].rpartition("/")[2]: row for row in found}


def test_numbers_are_those_of_evaluate(store, tmp_path):
    """Of several labels, tempered, by a model that reads the lungs."""
    trained = model(tmp_path / "run", lungs=True)
    write_calibration(trained / "model", NAMES, np.array([2.0, np.nan, 0.5]), {})
    settings = {"n_bootstrap": 100, "device": "cpu", "precision": "fp32"}
    run(EvaluateConfig(str(trained), (str(store.path),), str(tmp_path / "e"), **settings))
    wanted = {row["path"]: row for row in rows(tmp_path / "e" / "predictions.csv")}
    found = predicted(trained, tmp_path)
    assert found.keys() == wanted.keys()
    for path, row in found.items():
        for name in NAMES:
            score = float(wanted[path][f"p {name}"])
            assert float(row[f"p_{name}"]) == pytest.approx(score, abs=2e-6)
        share = float(wanted[path]["patches read"])
        assert float(row["patches_read"]) == pytest.approx(share, abs=1e-3)
        assert ("no lung found: read whole" in row["notes"]) == (share == 1)
    said = json.loads((tmp_path / "p.settings.json").read_text())
    assert (said["calibrated"], said["temperatures"]) == (True, [2.0, None, 0.5])


@pytest.mark.parametrize("multilabel", [True, False])
@pytest.mark.parametrize("kind", ["full", "linear", "knn"])
def test_every_kind_of_head_answers_as_in_evaluate(store, tmp_path, kind, multilabel):
    """By the functions that `evaluate` predicts and tempers with, on a store of the same files."""
    folder = model(tmp_path / "run", kind=kind, multilabel=multilabel)
    write_calibration(folder / "model", NAMES, np.full(3 if multilabel else 1, 1.7), {})
    trained = load_trained(folder)
    test_set = TestSet("all", str(store.path), store, np.arange(COUNT))
    settings = Settings(7, torch.device("cpu"), "fp32")
    logits = predict(trained, test_set, settings, name="")
    scores = operating_point(trained, None).scores(logits, multilabel=multilabel)
    found = predicted(folder, tmp_path)
    for path, score in zip(store.manifest.column("path"), scores, strict=True):
        said = [float(found[path][f"p_{name}"]) for name in NAMES]
        np.testing.assert_allclose(said, score, atol=2e-6)
    assert scores.std(0).min() > 1e-4  # or nothing would be compared


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_labels_are_called_from_the_models_thresholds_on(store, tmp_path, suffix):
    trained = model(tmp_path / "run")
    cuts = {"youden": np.array([0.5, 0.45, np.nan]), "sensitivity_90": np.array([0.1, 0.2, 0.3])}
    write_thresholds(trained / "model", NAMES, cuts)
    for rule, chosen in cuts.items():
        out = tmp_path / f"{rule}.{suffix}"
        command = ["predict", str(trained), str(tmp_path), "--out", str(out), "--threshold-rule",
                   rule, "--precision", "fp32", "--device", "cpu"]  # fmt: skip
        said = CliRunner().invoke(use, command)
        assert said.exit_code == 0, said.output
        assert f"({COUNT} predicted, " in said.stdout  # nothing else there is one
        if suffix == "csv":
            found, settings = rows(out), json.loads(out.with_suffix(".settings.json").read_text())
        elif suffix == "json":
            whole = json.loads(out.read_text())
            found, settings = whole["rows"], whole["settings"]
        else:
            read = pq.read_table(out)
            found, settings = read.to_pylist(), json.loads(read.schema.metadata[b"spcxr"])
        assert settings["called_at"] == f"the model's thresholds.json, rule {rule}"
        done = [row for row in found if row["status"] == "done"]
        assert len(done) == COUNT
        for row in done:
            for name, cut in zip(NAMES, chosen, strict=True):
                called = row.get(f"call_{name}")
                if np.isnan(cut):
                    assert called in (None, "")
                else:
                    assert int(called) == (float(row[f"p_{name}"]) >= cut)
    refused = CliRunner().invoke(use, [*command[:4], "o.csv", "--threshold-rule", "specificity_90"])
    assert refused.exit_code == 2
    assert "thresholds.json has no rule 'specificity_90'" in refused.output


def test_one_class_of_many_is_the_likeliest(store, tmp_path):
    trained = model(tmp_path / "run", multilabel=False)
    predict_files(trained, [tmp_path / "00.png", tmp_path / "01.png"], tmp_path / "o.csv", COMPUTE)
    for row in rows(tmp_path / "o.csv"):
        scores = {name: float(row[f"p_{name}"]) for name in NAMES}
        assert sum(scores.values()) == pytest.approx(1.0, abs=1e-6)
        assert row["class"] == max(scores, key=scores.get)
        assert not any(column.startswith("call_") for column in row)


def test_an_image_unlike_those_of_training_is_noted(tmp_path, capsys):
    """White all over with one dark pixel; min and max stretch it no further."""
    trained = model(tmp_path / "run")
    pixels = np.full((64, 64), 250, np.uint8)
    pixels += np.arange(64, dtype=np.uint8) % 5
    pixels[0, 0] = 0
    Image.fromarray(pixels).save(tmp_path / "white.png")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "grey.png")
    files = [tmp_path / "white.png", tmp_path / "grey.png"]
    predict_files(trained, files, tmp_path / "o.csv", COMPUTE)
    white, grey = (row["notes"] for row in rows(tmp_path / "o.csv"))
    assert "grey levels unlike those of the training images (mean 0.99" in white
    assert "unlike" not in grey
    assert "warning: 1 of 2 images have grey levels unlike" in capsys.readouterr().err


def test_a_model_that_reads_by_masks_of_the_data_is_refused(tmp_path):
    trained = model(tmp_path / "run", lungs=True)
    config = trained / "model" / "config.json"
    config.write_text(config.read_text().replace('"lungs_from": "model"', '"lungs_from": "masks"'))
    said = CliRunner().invoke(use, ["predict", str(trained), str(tmp_path), "--out", "o.csv"])
    assert (said.exit_code, said.output.count("\n")) == (2, 1)
    assert "reads the lungs by masks, which files have not" in said.output
