"""Linear probe and k-NN of `classify`: chosen on validation rows, exported like any model."""

import csv
import json

import numpy as np
import pytest
import torch
from labelled_runs import Stop, config, findings, one_label, three_classes
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from spcxr.infer.predict import load_trained, predict_classes, probabilities
from spcxr.models.heads import Features
from spcxr.models.neighbours import TEMPERATURE, neighbour_shares
from spcxr.models.weights import load_model_folder
from spcxr.recipes import frozen, prepare
from spcxr.recipes.classify import ClassifyConfig, run
from spcxr.recipes.linear import LinearProblem
from spcxr.recipes.prepare import PrepareConfig
from spcxr.recipes.targets import class_weights
from spcxr.train.device import Compute
from spcxr.train.interrupt import Interrupted
from spcxr.train.journal import read_records

COMPUTE = Compute(16, torch.device("cpu"), "fp32")


def written(folder, names):
    with (folder / "predictions.csv").open() as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    return {path: [float(row[f"p_{n}"]) for n in names] for path, row in rows.items()}


@pytest.mark.parametrize("method", ["linear", "knn"])
@pytest.mark.parametrize("columns", [one_label, findings, three_classes])
def test_the_exported_model_predicts_what_the_probe_did(
    method, columns, make_store, tiny_init, tmp_path
):
    store = make_store(columns)
    folder = run(config(store, tiny_init, tmp_path / "run", method=method))
    trained = load_trained(folder)
    assert trained.config["task"]["method"] == method
    rows = store.manifest.rows(("val", "test"))
    logits = predict_classes(trained.model, store, rows, trained.normalisation, COMPUTE)
    expected = probabilities(logits, multilabel=trained.multilabel)
    found = written(folder, trained.names)
    paths = store.manifest.column("path")
    assert len(found) == len(rows)
    for row, shares in zip(rows.tolist(), expected, strict=True):
        assert found[paths[row]] == pytest.approx(shares.tolist(), abs=2e-4)
    facts = json.loads((folder / "metrics.json").read_text())
    setting = {"linear": "penalty", "knn": "neighbours"}[method]
    assert facts["method"] == method
    tried = [r for r in read_records(folder) if r["kind"] == "choice"]
    best = max(r["macro_auroc"] for r in tried)
    assert facts[setting] == next(r[setting] for r in tried if r["macro_auroc"] == best)
    assert trained.config["provenance"][setting] == facts[setting]
    before, after = (load_model_folder(f).encoder.state_dict() for f in (tiny_init, folder))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_linear_probe_tells_what_the_images_show(make_store, tiny_init, tmp_path):
    folder = run(config(make_store(one_label), tiny_init, tmp_path / "run", method="linear"))
    facts = json.loads((folder / "metrics.json").read_text())
    assert facts["test"]["overall"]["macro_auroc"]["value"] > 0.95


@pytest.mark.parametrize("columns", [one_label, findings, three_classes])
def test_fine_tuning_can_begin_with_the_probes_head(columns, make_store, tiny_init, tmp_path):
    store = make_store(columns)
    probe = run(config(store, tiny_init, tmp_path / "probe", method="linear"))
    # Steps of no size: what it begins as is what it ends as.
    still = {"head_init": "linear", "epochs": 1, "base_lr": 0.0, "min_lr": 0.0}
    folder = run(config(store, tiny_init, tmp_path / "run", **still))
    names = load_trained(folder).names
    expected, found = (written(place, names) for place in (probe, folder))
    for path, shares in expected.items():
        assert found[path] == pytest.approx(shares, abs=2e-4)
    log = (folder / "train.log").read_text()
    assert "head from a linear probe, penalty" in log
    facts = json.loads((probe / "metrics.json").read_text())
    assert f"penalty {facts['penalty']:g}," in log


def test_a_stopped_run_that_began_with_a_probe_ends_as_it_would_have(
    make_store, tiny_init, tmp_path, monkeypatch
):
    store, settings = make_store(one_label), {"head_init": "linear", "epochs": 2}
    whole = run(config(store, tiny_init, tmp_path / "whole", **settings))
    with monkeypatch.context() as patch:
        Stop(3, patch)
        with pytest.raises(Interrupted):
            run(config(store, tiny_init, tmp_path / "stopped", **settings))
    stopped = run(config(store, tiny_init, tmp_path / "stopped", **settings))
    assert written(stopped, load_trained(stopped).names) == written(
        whole, load_trained(whole).names
    )
    steps = [r["step"] for r in read_records(stopped) if r["kind"] == "train"]
    assert steps == [r["step"] for r in read_records(whole) if r["kind"] == "train"]


def test_each_image_is_encoded_once(make_store, tiny_init, tmp_path, monkeypatch):
    seen, real = [], Features.forward

    def counted(self, images):
        seen.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Features, "forward", counted)
    run(config(make_store(one_label), tiny_init, tmp_path / "run", method="linear"))
    assert sum(seen) == 64


def test_a_finished_run_is_left_as_it_is(make_store, tiny_init, tmp_path, monkeypatch):
    settings = config(make_store(one_label), tiny_init, tmp_path / "run", method="knn")
    folder = run(settings)
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir() if f.is_file()}
    monkeypatch.delattr(frozen, "learn")
    assert run(settings) == folder
    assert {f.name: f.stat().st_mtime_ns for f in folder.iterdir() if f.is_file()} == before


# --- the two solvers ------------------------------------------------------------------------


def cloud(rows, classes, seed=0, features=10):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, features)).astype(np.float32) * np.geomspace(1, 0.05, features)
    x = (x @ np.linalg.qr(rng.normal(size=(features, features)))[0]).astype(np.float32)
    return x, (3 * x[:, :classes] + rng.normal(size=(rows, classes))).argmax(1)


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_one_of_many_is_scikit_learns_multinomial(penalty):
    x, answer = cloud(300, 3)
    values = np.eye(3, dtype=np.float32)[answer]
    for weights in (None, class_weights(values, multilabel=False)):
        problem = LinearProblem(torch.from_numpy(x), values, multilabel=False, weights=weights)
        weight, bias = problem.fit(penalty)
        total = len(x) if weights is None else float((values @ weights).sum())
        theirs = LogisticRegression(
            C=1 / (total * penalty),
            class_weight=None if weights is None else dict(enumerate(weights)),
            tol=1e-10,
            max_iter=10000,
        ).fit(x, answer)
        shares = (torch.from_numpy(x) @ weight + bias).softmax(1).numpy()
        assert np.abs(shares - theirs.predict_proba(x)).max() < 2e-3


@pytest.mark.parametrize("penalty", [1e-2, 1e-4])
def test_several_labels_are_scikit_learns_one_by_one(penalty):
    x, answer = cloud(300, 3)
    values = np.eye(3, dtype=np.float32)[answer]
    values[np.random.default_rng(1).random(values.shape) < 0.2] = np.nan
    weights = class_weights(values, multilabel=True)
    problem = LinearProblem(torch.from_numpy(x), values, multilabel=True, weights=weights)
    problem.fit(1.0)
    weight, bias = problem.fit(penalty, problem.solution)
    found = (torch.from_numpy(x) @ weight + bias).sigmoid().numpy()
    for k in range(3):
        known = ~np.isnan(values[:, k])
        theirs = LogisticRegression(
            C=1 / (known.sum() * penalty),
            class_weight={0: 1.0, 1: weights[k]},
            tol=1e-10,
            max_iter=10000,
        ).fit(x[known], values[known, k])
        assert np.abs(found[:, k] - theirs.predict_proba(x)[:, 1]).max() < 2e-3


@pytest.mark.parametrize("known_share", [1.0, 0.8, 0.05])
def test_neighbours_are_scikit_learns_however_few_know_a_label(known_share):
    (x, answer), (asked, _) = cloud(400, 3), cloud(50, 3, seed=1)
    values = np.eye(3, dtype=np.float32)[answer]
    values[np.random.default_rng(1).random(values.shape) > known_share] = np.nan
    counts = [3, 12]
    found = neighbour_shares(*map(torch.from_numpy, (asked, x, values)), counts).numpy()
    for k in range(3):
        known = ~np.isnan(values[:, k])
        for number, count in enumerate(counts):
            model = KNeighborsClassifier(
                min(count, known.sum()), metric="cosine", weights=lambda d: np.exp(-d / TEMPERATURE)
            ).fit(x[known], values[known, k] == 1)
            shares = dict(zip(model.classes_, model.predict_proba(asked).T, strict=True))
            assert np.allclose(found[number, :, k], shares[True], atol=1e-4)


# --- real radiographs -----------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.slow
def test_on_real_radiographs(shared_data, tiny_init, tmp_path):
    """Untrained features at 32 px tell where an image comes from: far above chance."""
    with (shared_data / "cls_manifest.csv").open(newline="", encoding="utf-8-sig") as stream:
        rows = [r for r in csv.DictReader(stream) if r["split"] != "extra_train"][::4]
    table = tmp_path / "cls.csv"
    with table.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["path", "patient_id", "split", "label"])
        for r in rows:
            writer.writerow([r["path"], r["patient_id"], r["split"], r["label"]])
    place, root = str(tmp_path / "store"), str(shared_data)
    store = prepare.run(PrepareConfig(sources=(str(table),), out=place, size_px=32, root=root))
    settings = {"data": str(store), "init": str(tiny_init), "device": "cpu", "method": "linear"}
    out = tmp_path / "runs"
    folder = run(ClassifyConfig(**settings, out=str(out), labels_per_class=20, seeds=2))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test"]["macro_auroc"]["low"] > 0.6
    trained = load_trained(folder / "seed-0")
    assert trained.names == ("covid", "normal", "pneumonia")
    assert trained.config["provenance"]["training_rows"] >= 60
