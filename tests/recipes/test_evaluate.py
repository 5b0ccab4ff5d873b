"""`evaluate` on small stores: numbers equal scikit-learn's, and bad input is one clear line."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from PIL import Image

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import Store, StoreWriter
from spcxr.errors import SpcxrError
from spcxr.evaluate.intervals import paired_bootstrap
from spcxr.infer.predict import (
    Normalisation,
    load_trained,
    network_input,
    predict_classes,
    predict_masks,
    probabilities,
)
from spcxr.models.decoder import UNETRDecoder
from spcxr.models.heads import ClassificationHead
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import save_model_folder
from spcxr.recipes.evaluate import EvaluateConfig, run
from spcxr.recipes.measure import Settings, TestSet, measure
from spcxr.train.device import Compute

CPU = torch.device("cpu")
SIZE = 32
NAMES = ("covid", "normal", "pneumonia")


def make_store(out, *, count=60, prefix="p", size=SIZE, preset="minmax", empty=(), **columns):
    """Noise images with a square in a quadrant; its mask; two images a patient; test and val."""
    rng = np.random.default_rng(0)
    preprocess = Preprocess(preset=preset, size_px=size)
    with StoreWriter(out, preprocess) as writer:
        for i in range(count):
            image = rng.integers(0, 120, (size, size)).astype(np.uint8)
            mask = np.zeros((size, size), np.uint8)
            row, column = divmod(i % 3, 2)
            half = size // 2
            mask[row * half : (row + 1) * half, column * half : (column + 1) * half] = 1
            image[mask == 1] += 120
            mask[:] = 0 if i in empty else mask
            writer.add(image, mask)
        table = {
            "path": [f"{i}.png" for i in range(count)],
            "patient_id": [f"{prefix}{i // 2}" for i in range(count)],
            "split": ["test" if i < count * 2 // 3 else "val" for i in range(count)],
            "mask_path": [f"m{i}.png" for i in range(count)],
            "site": ["a" if i % 4 < 2 else "b" for i in range(count)],
            "label": [NAMES[i % 3] for i in range(count)],
        }
        return writer.finish(Manifest.from_columns({**table, **columns}, root="."))


def tiny_encoder():
    torch.manual_seed(0)
    return VisionTransformer(image_px=16, patch_px=8, width=24, depth=4, heads=3)


def save(folder, task, head):
    return save_model_folder(
        folder,
        tiny_encoder(),
        preprocess=Preprocess(size_px=SIZE).to_dict(),
        mean=0.3,
        std=0.25,
        task=task,
        head=head,
        provenance={},
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    make_store(folder / "store")
    for name, multilabel in (("classes", False), ("findings", True)):
        head = ClassificationHead(width=24, classes=3)
        torch.nn.init.normal_(head.fc.weight, std=0.5)
        task = {"kind": "classify", "labels": list(NAMES), "multilabel": multilabel}
        save(folder / name / "model", task, head)
    decoder = UNETRDecoder(width=24, patch_px=8, out_channels=2, base_channels=4)
    task = {"kind": "segment", "structures": ["square"], "base_channels": 4}
    save(folder / "masks" / "model", task, decoder)
    save(folder / "encoder" / "model", None, None)
    return folder


def settings(work, out, run="classes", data=None, **given):
    given = {"n_bootstrap": 100, "device": "cpu", "precision": "fp32", **given}
    data = (str(data or work / "store"),)
    return EvaluateConfig(run=str(work / run), data=data, out=str(out), **given)


def read(out):
    with (out / "predictions.csv").open(newline="") as stream:
        return list(csv.DictReader(stream)), json.loads((out / "metrics.json").read_text())


def test_classes_equal_scikit_learn_on_the_written_predictions(work, tmp_path):
    assert run(settings(work, tmp_path / "out")) == tmp_path / "out" / "report.html"
    rows, metrics = read(tmp_path / "out")
    assert len(rows) == 40
    truth = np.array([[float(r[f"true {n}"]) for n in NAMES] for r in rows])
    score = np.array([[float(r[f"p {n}"]) for n in NAMES] for r in rows])
    np.testing.assert_allclose(score.sum(1), 1, atol=1e-5)
    found = metrics["sets"]["store: test"]
    assert (found["rows"], found["patients"]) == (40, 20)
    expected = {
        "macro_auroc": sk.roc_auc_score(truth, score),
        "macro_average_precision": sk.average_precision_score(truth, score),
        "accuracy": sk.accuracy_score(truth.argmax(1), score.argmax(1)),
    }
    for name, value in expected.items():
        assert found["overall"][name]["value"] == pytest.approx(value, abs=1e-4), name
        assert found["overall"][name]["low"] <= value <= found["overall"][name]["high"]
    assert set(found["subgroups"]["site"]) == {"a", "b"}


def test_no_patient_is_written(work, tmp_path):
    make_store(tmp_path / "named", prefix="SECRET-")
    out = tmp_path / "out"
    run(settings(work, out, data=tmp_path / "named"))
    for file in ("predictions.csv", "metrics.json", "report.html"):
        assert "SECRET" not in (out / file).read_text()


def test_phantoms_are_marked(work, tmp_path):
    make_store(tmp_path / "drawn", prefix="PHANTOM-")
    run(settings(work, tmp_path / "out", data=tmp_path / "drawn"))
    assert "Drawn phantoms, not patients" in (tmp_path / "out" / "report.html").read_text()
    assert read(tmp_path / "out")[1]["sets"]["drawn: test"]["phantoms"] is True


def test_each_split_is_a_set_and_all_is_one(work, tmp_path):
    run(settings(work, tmp_path / "two", splits=("test", "val")))
    assert list(read(tmp_path / "two")[1]["sets"]) == ["store: test", "store: val"]
    run(settings(work, tmp_path / "one", splits=("all",)))
    rows, metrics = read(tmp_path / "one")
    assert list(metrics["sets"]) == ["store"]
    assert len(rows) == 60


def test_findings_with_unknown_labels_and_a_column_missing(work, tmp_path):
    blank = {"covid": ["1", "0", "-1", ""] * 15, "normal": ["0", "1"] * 30}
    make_store(tmp_path / "store", label=[""] * 60, **blank)
    run(settings(work, tmp_path / "out", data=tmp_path / "store", run="findings"))
    rows, metrics = read(tmp_path / "out")
    found = metrics["sets"]["store: test"]
    assert found["positive_and_known_rows"] == {
        "covid": [10, 20], "normal": [20, 40], "pneumonia": [0, 0],
    }  # fmt: skip
    assert found["left_out_of_the_means"] == ["pneumonia"]
    assert [r["true covid"] for r in rows[:4]] == ["1", "0", "", ""]


def test_masks_equal_a_hand_count(work, tmp_path):
    run(settings(work, tmp_path / "out", run="masks"))
    rows, metrics = read(tmp_path / "out")
    trained, store = load_trained(work / "masks"), Store.open(work / "store")
    chosen = np.arange(40)
    compute = Compute(64, CPU, "fp32")
    found = predict_masks(trained.model, store, chosen, trained.normalisation, compute)
    ((_, predicted),) = found
    assert predicted.shape == (40, SIZE, SIZE)
    truth = store.masks(chosen) == 1
    by_hand = [
        2 * (p & t).sum() / (p.sum() + t.sum()) for p, t in zip(predicted == 1, truth, strict=True)
    ]
    np.testing.assert_allclose([float(r["dice square"]) for r in rows], by_hand, rtol=1e-4)
    found = metrics["sets"]["store: test"]["overall"]
    assert found["dice"]["value"] == pytest.approx(np.mean(by_hand), abs=1e-6)
    assert found["iou"]["value"] < found["dice"]["value"]
    assert "Outlines of square over radiographs: best" in (tmp_path / "out/report.html").read_text()


def test_images_are_prepared_as_the_weights_know_them(work, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["path,label,split"]
    rng = np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 255, (40, 50)).astype(np.uint8)).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{NAMES[i % 3]},test")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    run(settings(work, tmp_path / "out", data=folder / "manifest.csv"))
    assert Store.open(tmp_path / "out" / "store-0").preprocess == Preprocess(size_px=SIZE)
    assert read(tmp_path / "out")[1]["sets"]["manifest: test"]["rows"] == 9


def test_an_interrupted_evaluation_goes_on_and_a_finished_one_is_kept(work, tmp_path, capsys):
    config = settings(work, tmp_path / "out")
    first = run(config).read_text()
    report = tmp_path / "out" / "report.html"
    before = report.stat()
    assert run(config) == report
    assert report.stat() == before
    assert capsys.readouterr().err.endswith("out: already complete\n")
    metrics = tmp_path / "out" / "metrics.json"
    text, weights = metrics.read_text(), read(tmp_path / "out")[1]["provenance"]["weights"]
    metrics.write_text(text.replace(weights, "f" * 16))
    with pytest.raises(SpcxrError, match="finished evaluation with other weights; choose another"):
        run(config)
    metrics.write_text(text)
    (tmp_path / "out" / "report.html").unlink()
    assert run(config).read_text() == first
    with pytest.raises(SpcxrError, match="other settings"):
        run(settings(work, tmp_path / "out", seed=3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"run": "encoder"}, "encoder without a task; fine-tune"),
        ({"run": "nowhere"}, "neither a run"),
        ({"splits": ("drift",)}, "no row in split drift; it has test, val"),
    ],
)
def test_bad_input_is_one_line(work, tmp_path, given, said):
    with pytest.raises(SpcxrError, match=said) as caught:
        run(settings(work, tmp_path / "out", **given))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize(
    ("model", "columns", "said"),
    [
        ("classes", {"label": ["tb"] * 60}, "none of the model's labels"),
        ("classes", {"label": [""] * 40 + ["covid"] * 20}, "no row of store: test has a known"),
        ("masks", {"mask_path": [""] * 60}, "no row of store: test has a mask"),
    ],
)
def test_data_without_an_answer_are_refused(work, tmp_path, model, columns, said):
    make_store(tmp_path / "store", **columns)
    with pytest.raises(SpcxrError, match=said):
        run(settings(work, tmp_path / "out", data=tmp_path / "store", run=model))


def test_a_store_prepared_otherwise_is_refused(work, tmp_path):
    make_store(tmp_path / "store", preset="rad-dino")
    with pytest.raises(SpcxrError, match="--preset minmax"):
        run(settings(work, tmp_path / "out", data=tmp_path / "store"))


def test_a_broken_model_is_refused(work):
    trained, store = load_trained(work / "classes"), Store.open(work / "store")
    trained.model.head.fc.bias.data[0] = float("nan")
    with pytest.raises(SpcxrError, match=r"row 0 \(0.png\): .* not finite; try --pre"):
        predict_classes(
            trained.model, store, np.arange(4), trained.normalisation, Compute(2, CPU, "fp32")
        )


def test_prediction_does_not_depend_on_the_batch_and_leaves_the_mode(work):
    trained, store = load_trained(work / "classes"), Store.open(work / "store")
    trained.model.train()
    rows = np.array([7, 3, 7, 59])
    sizes = [Compute(size, CPU, "fp32") for size in (1, 3)]
    found = [
        predict_classes(trained.model, store, rows, trained.normalisation, compute)
        for compute in sizes
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_allclose(found[0][0], found[0][2], atol=1e-5)
    assert trained.model.training


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_network_input_spans_the_range_of_the_type(dtype):
    pixels = np.zeros((1, 8, 8), dtype)
    pixels[0, 4:] = np.iinfo(dtype).max
    made = network_input(pixels, (8, 8), Normalisation(0.5, 0.5))
    assert (float(made.min()), float(made.max())) == (-1.0, 1.0)


def test_probabilities_do_not_overflow():
    logits = np.array([[1000.0, -1000.0]], np.float32)
    for multilabel in (False, True):
        np.testing.assert_allclose(probabilities(logits, multilabel=multilabel), [[1, 0]])


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(SpcxrError, match="give either"):
        EvaluateConfig(run="a", data=("b",), out="c", splits=("all", "test"))
    with pytest.raises(SpcxrError, match="must name one"):
        EvaluateConfig(run="a", data=(), out="c")


def test_on_real_radiographs(work, tmp_path, shared_data: Path):
    run(settings(work, tmp_path / "out", data=shared_data / "drift_manifest.csv", splits=("all",)))
    found = read(tmp_path / "out")[1]["sets"]["drift_manifest"]
    assert found["rows"] > 20


@pytest.mark.parametrize("winner", [0, 1])
def test_the_class_of_the_largest_logit_is_drawn(work, winner):
    trained, store = load_trained(work / "masks"), Store.open(work / "store")
    trained.model.decoder.out.bias.data = torch.eye(2)[winner] * 1000
    compute = Compute(4, CPU, "fp32")
    found = predict_masks(trained.model, store, np.arange(3), trained.normalisation, compute)
    ((_, masks),) = found
    assert (masks == winner).all()


def test_a_group_whose_classes_are_all_uncertain_is_no_group(work, tmp_path):
    """One class known and another uncertain (-1) is not one of many: the row is not measured."""
    count = 90
    site = ["xyz"[i // 30] for i in range(count)]
    given = {name: [str(int(i % 3 == k)) for i in range(count)] for k, name in enumerate(NAMES)}
    given["normal"] = ["-1" if s == "x" else v for s, v in zip(site, given["normal"], strict=True)]
    store = make_store(tmp_path / "store", count=count, label=[""] * count, site=site, **given)
    test_set = TestSet("all", "here", store, np.arange(count))
    trained = load_trained(work / "classes")
    found = measure(trained, test_set, Settings(64, CPU, "fp32", n_bootstrap=100))
    assert found.n_rows == 60
    assert list(found.details["subgroups"]["site"]) == ["y", "z"]


def test_two_models_are_paired_though_one_finds_nothing_where_there_is_nothing(work, tmp_path):
    """Empty mask and empty prediction have no Dice; the rows are the same ones all the same."""
    store = make_store(tmp_path / "store", empty=(0, 7))
    test_set = TestSet("test", "here", store, store.manifest.rows("test"))
    found = []
    for winner in (0, 1):
        trained = load_trained(work / "masks")
        trained.model.decoder.out.bias.data = torch.eye(2)[winner] * 1000
        found.append(measure(trained, test_set, Settings(64, CPU, "fp32", n_bootstrap=100)))
    nothing, everything = found
    assert (nothing.patients == everything.patients).all()
    assert len(nothing.patients) == 40
    gap = paired_bootstrap(
        nothing.patients, everything.statistics["dice"], nothing.statistics["dice"], n=100, seed=0
    )
    # A quadrant of four is found by drawing all: Dice 2 * 1 / (1 + 4); 0 where there is nothing.
    assert gap.value == pytest.approx(0.4 * 38 / 40)
    ones = np.ones(40)
    for result in found:
        for name in ("dice", "iou"):
            assert result.statistics[name](ones) == pytest.approx(result.overall[name].value)
