"""`evaluate` of masks of several structures: what is written equals a count by hand."""

import csv
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from monai.metrics import DiceMetric, HausdorffDistanceMetric

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import Store, StoreWriter
from spcxr.errors import SpcxrError
from spcxr.evaluate.mask_summary import FIGURES
from spcxr.evaluate.surface import surface_distances
from spcxr.infer.predict import load_trained, predict_masks
from spcxr.models.decoder import UNETRDecoder
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import save_model_folder
from spcxr.recipes import masks, prepare
from spcxr.recipes.evaluate import EvaluateConfig, run
from spcxr.recipes.measure import judge, predict
from spcxr.recipes.measure_masks import mean_dice
from spcxr.recipes.testset import Settings, TestSet

SIDE, COUNT = 32, 48
NAMES = ["left lung", "right lung", "heart"]
SETTINGS = Settings(16, torch.device("cpu"), "fp32", n_bootstrap=100)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@pytest.fixture(scope="module")
def store(work):
    """Three blocks an image; no heart in every fourth, nothing known of every eighth's top.

    Half of the images were 64 x 32 with pixels of 0.5 x 0.4 mm, the others without spacing."""
    rng = np.random.default_rng(0)
    with StoreWriter(work / "store", Preprocess(size_px=SIDE)) as writer:
        for i in range(COUNT):
            mask = np.zeros((SIDE, SIDE), np.uint8)
            for k, left in enumerate((2, 20, 12), start=1):
                top = rng.integers(2, 14)
                mask[top : top + 14, left : left + 8] = k
            mask[mask == (3 if i % 4 == 0 else 0)] = 0
            mask[:6] = 255 if i % 8 == 1 else mask[:6]
            grey = 60 * np.where(mask == 255, 0, mask) + rng.integers(0, 40, mask.shape)
            writer.add(grey.astype(np.uint8), mask)
        table = {
            "path": [f"{i}.png" for i in range(COUNT)],
            "patient_id": [f"p{i // 2}" for i in range(COUNT)],
            "split": ["test"] * COUNT,
            "mask_path": [f"m{i}.png" for i in range(COUNT)],
            "site": ["a" if i % 4 < 2 else "b" for i in range(COUNT)],
        }
        half = [i % 2 == 0 for i in range(COUNT)]
        facts = {
            "spacing_row_mm": pa.array([0.5 if h else None for h in half], pa.float32()),
            "spacing_column_mm": pa.array([0.4 if h else None for h in half], pa.float32()),
            "image_height_px": pa.array([64] * COUNT, pa.int32()),
            "image_width_px": pa.array([32] * COUNT, pa.int32()),
        }
        manifest = Manifest.from_columns(table, root=".").with_columns(facts)
        return writer.finish(manifest, {"structures": NAMES})


def segmenter(folder, structures, seed=0):
    torch.manual_seed(seed)
    encoder = VisionTransformer(image_px=16, patch_px=8, width=24, depth=4, heads=3)
    decoder = UNETRDecoder(width=24, patch_px=8, out_channels=1 + len(structures), base_channels=4)
    torch.nn.init.normal_(decoder.out.weight, std=3.0)  # so that every class is drawn somewhere
    return save_model_folder(
        folder / "model",
        encoder,
        preprocess=Preprocess(size_px=SIDE).to_dict(),
        mean=0.3,
        std=0.25,
        task={"kind": "segment", "structures": list(structures), "base_channels": 4},
        head=decoder,
        provenance={},
    ).parent


@pytest.fixture(scope="module")
def evaluated(work, store):
    """The files of an evaluation of a model that knows nothing, against another of its kind."""
    model, other = segmenter(work / "run", NAMES), segmenter(work / "other", NAMES, seed=1)
    out = work / "out"
    run(
        EvaluateConfig(
            run=str(model), data=(str(store.path),), out=str(out), against=str(other),
            corruptions=("inversion",), n_bootstrap=100, device="cpu", precision="fp32",
        )
    )  # fmt: skip
    with (out / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    metrics = json.loads((out / "metrics.json").read_text())["sets"]["store: test"]
    return rows, metrics, (out / "report.html").read_text()


def column(rows, name):
    return np.array([float(row[name]) if row[name] else np.nan for row in rows])


def predicted_by(folder, store):
    trained = load_trained(folder)
    rows = np.arange(COUNT)
    batches = predict_masks(trained.model, store, rows, trained.normalisation, SETTINGS)
    return np.concatenate([found for _, found in batches])


class Whole:
    """A framing that never finds a lung."""

    image_px, missed = (16, 16), 0

    def __call__(self, look, images):
        self.missed += len(images)
        return look(images)


def test_images_read_whole_are_one_line_of_an_evaluation(work, store, capsys):
    segmenter(work / "whole", NAMES)
    trained = load_trained(work / "whole")
    trained.model.framing = Whole()
    test_set = TestSet("films: test", "films", store, np.arange(COUNT))
    found = predict(trained, test_set, SETTINGS)  # in batches of 16
    judge(trained, test_set, found, SETTINGS)
    said = [line for line in capsys.readouterr().err.splitlines() if "no lung" in line]
    assert said == [f"films: test: no lung found in {COUNT} of {COUNT} images: read whole"]


@pytest.mark.filterwarnings("ignore")  # MONAI warns of empty masks and of its next version
def test_cells_equal_monai(work, store, evaluated):
    rows, _, _ = evaluated
    found, truth = predicted_by(work / "run", store), store.masks(np.arange(COUNT))
    whole = [i for i in range(COUNT) if i % 8 != 1]  # MONAI knows no unknown pixels
    for k, name in enumerate(NAMES, start=1):
        pair = [torch.tensor((m[whole] == k)[:, None]).float() for m in (found, truth)]
        dice = DiceMetric(reduction="none")(*pair)[:, 0].numpy()
        far = HausdorffDistanceMetric(include_background=True, reduction="none")(*pair)[:, 0]
        there = pair[1].sum((1, 2, 3)).numpy() > 0
        np.testing.assert_allclose(
            column(rows, f"dice {name}")[whole][there], dice[there], rtol=1e-4
        )
        both = there & (pair[0].sum((1, 2, 3)).numpy() > 0)
        ours = column(rows, f"hd_px {name}")[whole]
        np.testing.assert_allclose(ours[both], far.numpy()[both], rtol=1e-4)
        assert np.isnan(ours[~both]).all()
        assert both.any()


def test_millimetres_are_where_the_spacing_is(store, evaluated):
    rows, metrics, page = evaluated
    size = masks.pixel_mm(store)
    np.testing.assert_allclose(size[0], [1.0, 0.8])  # 64 rows became 32, 32 columns 16
    assert np.isnan(size[1]).all()
    mm, px = (column(rows, f"hd_{unit} left lung") for unit in ("mm", "px"))
    assert np.isnan(mm[1::2]).all()
    assert (mm[::2] <= px[::2])[~np.isnan(px[::2])].all()
    assert np.isfinite(mm).any()
    assert metrics["without_spacing"] == COUNT // 2
    assert f"The size of the pixels of {COUNT // 2} is not known" in page


def test_figures_of_the_set_are_means_of_the_cells(evaluated):
    rows, metrics, page = evaluated
    for name in NAMES:
        for figure in ("dice", "hd95_px", "asd_mm"):
            mean = np.nanmean(column(rows, f"{figure} {name}"))
            assert metrics["by_structure"][name][figure]["value"] == pytest.approx(mean, rel=1e-4)
    means = [metrics["by_structure"][name]["dice"]["value"] for name in NAMES]
    assert metrics["overall"]["dice"]["value"] == pytest.approx(np.mean(means))
    assert set(metrics["subgroups"]["site"]) == {"a", "b"}
    assert "Dice of heart" in metrics["subgroups"]["site"]["a"]
    hearts = column(rows, "true_px heart") == 0
    assert hearts.sum() == COUNT // 4
    empty = metrics["empty_masks"]["heart"]
    assert empty["both"] + empty["false_alarm"] == COUNT // 4
    for words in ("By structure: millimetres", "By site: structures", "Histogram of Dice"):
        assert words in page


def test_another_model_and_corruptions_are_said_of_masks(work, store, evaluated):
    _, metrics, page = evaluated
    gap = metrics["against"]["Dice of heart"]["difference"]["value"]
    pair = [
        judge(t, s, predict(t, s, SETTINGS), SETTINGS).overall["Dice of heart"].value
        for t, s in (
            (load_trained(work / name), TestSet("x", "y", store, np.arange(COUNT)))
            for name in ("run", "other")
        )
    ]
    assert gap == pytest.approx(pair[0] - pair[1], abs=1e-9)
    fall = metrics["corruptions"]["inversion"]["full"]
    clean = metrics["overall"]["dice"]["value"]
    assert fall["fall"]["value"] == pytest.approx(clean - fall["value"]["value"])
    assert "a line around the prediction, a shade over the true mask" in page


@pytest.mark.parametrize("fit", ["pad", "crop", "stretch"])
def test_millimetres_are_those_of_the_original(tmp_path, fit):
    """Two masks drawn on an image of 300 x 200 pixels of 0.7 x 1.3 mm, whatever becomes of it."""
    shape, spacing = (300, 200), np.array([[0.7, 1.3]])
    drawn = np.zeros((2, *shape), bool)
    drawn[0, 80:220, 60:100] = True
    drawn[1, 90:215, 66:130] = True
    preprocess = Preprocess(size_px=128, fit=fit)
    with StoreWriter(tmp_path / "store", preprocess) as writer:
        squares = [preprocess.mask(mask.astype(np.uint8)) for mask in drawn]
        for square in squares:
            writer.add(square, square)
        facts = dict(
            zip(
                ("image_height_px", "image_width_px", "spacing_row_mm", "spacing_column_mm"),
                ([v] * 2 for v in (*shape, *spacing[0])),
                strict=True,
            )
        )
        table = {"path": ["a.png", "b.png"], "mask_path": ["m.png", "n.png"]}
        columns = {name: pa.array(values) for name, values in facts.items()}
        manifest = Manifest.from_columns(table, root=".").with_columns(columns)
        size = masks.pixel_mm(writer.finish(manifest))[:1]
    _, true = surface_distances(drawn[:1], drawn[1:], pixel_mm=spacing)
    _, found = surface_distances(squares[0][None], squares[1][None], pixel_mm=size)
    np.testing.assert_allclose(found, true, atol=size.max())
    assert true[0, 1] == pytest.approx(30 * 1.3)


def test_structures_are_matched_by_name(work, store):
    assert masks.matched(store, ("heart", "left lung")) == (3, 1)
    assert masks.matched(store, ("heart", "clavicle")) == (3, 0)
    with pytest.raises(SpcxrError, match="show left lung, right lung, heart, and the model finds"):
        masks.matched(store, ("lung",))
    truth, turned = store.masks([0, 2]), masks.true_masks(store, np.array([0, 2]), ("heart", "x"))
    assert ((turned == 1) == (truth == 3)).all()
    assert turned.max() == 1


def test_a_structure_that_the_masks_do_not_show_is_not_measured(work, store):
    trained = load_trained(segmenter(work / "more", ["heart", "clavicle"]))
    test_set = TestSet("all", "here", store, np.arange(COUNT))
    found = predict(trained, test_set, SETTINGS)
    result = judge(trained, test_set, found, SETTINGS)
    assert "The masks do not show clavicle: not measured." in result.section.text
    assert result.overall["dice"] == result.overall["Dice of heart"]
    assert np.isnan(result.overall["Dice of clavicle"].value)
    assert result.predictions[2]["dice clavicle"] == ""
    one = np.ones(COUNT)
    assert float(mean_dice(found)(one)) == pytest.approx(result.overall["dice"].value)


def test_one_structure_is_taken_for_the_other_and_it_is_said(work, tmp_path):
    square = np.zeros((2, SIDE, SIDE), np.uint8)
    square[:, 8:20, 8:20] = 1
    with StoreWriter(tmp_path / "store", Preprocess(size_px=SIDE)) as writer:
        for mask in square:
            writer.add(100 * mask, mask)
        table = {"path": ["a.png", "b.png"], "mask_path": ["m.png", "n.png"]}
        one = writer.finish(Manifest.from_columns(table, root="."))
    trained = load_trained(segmenter(work / "single", ["square"]))
    test_set = TestSet("all", "here", one, np.arange(2))
    result = judge(trained, test_set, predict(trained, test_set, SETTINGS), SETTINGS)
    assert "Their masks of lung are taken to show square." in result.section.text
    assert "no distance in millimetres" in result.section.text
    assert "Dice of square" not in result.overall
    assert [t.caption for t in result.section.tables] == ["By structure"]


def test_on_real_masks(work, tmp_path, shared_data):
    """A few children of the open set: masks compared with themselves moved by three columns."""
    with (shared_data / "seg_manifest.csv").open(newline="") as stream:
        rows = [r for r in csv.DictReader(stream) if "Kermany" in r["source"]][:6]
    with (tmp_path / "few.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["path", "mask_path"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    real = Store.open(
        prepare.run(
            prepare.PrepareConfig(
                sources=(str(tmp_path / "few.csv"),), root=str(shared_data),
                out=str(tmp_path / "store"), size_px=128,
            )
        )
    )  # fmt: skip
    everyone = np.arange(len(real))
    moved = [(everyone, np.roll(real.masks(everyone), 3, axis=2))]
    found = masks.figures(real, moved, real.structures, masks.pixel_mm(real))
    named = dict(zip(FIGURES, found[:, 0].T, strict=True))
    assert (named["dice"] > 0.85).all()
    assert (named["hd_px"] <= 3).all()
    assert (named["asd_px"] > 0.5).all()
    assert np.isnan(named["hd_mm"]).all()  # JPEG files: nothing is known of their pixels
