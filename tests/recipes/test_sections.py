"""The page's sections about a model and its data: from the log, the weights, the store."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from spcxr.data.presets import Preprocess
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.evaluate.report import Report, render
from spcxr.infer.predict import load_trained
from spcxr.models.heads import ClassificationHead
from spcxr.models.vit import VisionTransformer
from spcxr.models.weights import save_model_folder
from spcxr.recipes import prepare
from spcxr.recipes.card import card_section
from spcxr.recipes.cases import cases_section
from spcxr.recipes.history import curve, curves_section
from spcxr.recipes.inventory import shares, summary_section
from spcxr.recipes.measure import TestSet
from spcxr.train.model_card import STATEMENTS, write_model_card

NAMES = ("square", "plain")


def save(folder, encoder, size_px, provenance):
    torch.manual_seed(1)
    return save_model_folder(
        folder,
        encoder,
        preprocess=Preprocess(size_px=size_px).to_dict(),
        mean=0.3,
        std=0.25,
        task={"kind": "classify", "labels": list(NAMES), "multilabel": True},
        head=ClassificationHead(width=encoder.width, classes=len(NAMES)),
        provenance=provenance,
    )


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(0)
    encoder = VisionTransformer(image_px=32, patch_px=8, width=24, depth=2, heads=3)
    facts = {"recipe": "classify", "training_rows": 32, "phantoms": False, "init": "scratch"}
    facts["validation"] = {"macro_auroc": 0.98765}
    return load_trained(save(tmp_path / "run" / "model", encoder, 32, facts))


def log(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


EPOCHS = [
    {"step": 1, "kind": "train", "loss": 1.0},
    {"step": 2, "kind": "train", "loss": 0.8},
    {"step": 2, "kind": "val", "loss": 0.7, "macro_auroc": 0.6},
    {"step": 3, "kind": "train", "loss": None},  # it was not finite
    {"step": 4, "kind": "train", "loss": 0.4},
    {"step": 4, "kind": "val", "loss": 0.5, "macro_auroc": 0.9},
    {"step": 5, "kind": "train", "loss": 0.2},  # stopped here
]


def test_curves_are_the_logs_figures_by_epoch(tmp_path):
    log(tmp_path / "run", EPOCHS)
    made = curve(tmp_path / "run", "train", "loss", "training")
    assert made.x.tolist() == [1, 2, 3]
    np.testing.assert_allclose(made.y, [0.9, 0.4, 0.2])
    section = curves_section(tmp_path / "run" / "model")
    loss, scores = section.pictures
    assert "training from 0.900 to 0.200 over 3 epochs" in loss.alt
    assert "validation from 0.700 to 0.500 over 2 epochs" in loss.alt
    assert "mean AUROC from 0.600 to 0.900" in scores.alt
    assert section.pictures == curves_section(tmp_path / "run").pictures


def test_curves_of_a_log_whose_records_name_their_epoch(tmp_path):
    """Pretraining may judge every second epoch; a record's own word counts."""
    lines = [{"step": s, "kind": "train", "loss": float(s)} for s in range(1, 9)]
    lines += [{"step": 4, "kind": "val", "loss": 1.0, "epoch": 2}]
    log(tmp_path / "run", lines)
    made = curve(tmp_path / "run", "train", "loss", "training")
    assert (made.x.tolist(), made.y.tolist()) == ([1, 2, 3, 4], [1.5, 3.5, 5.5, 7.5])


def test_no_log_and_a_log_that_is_none(tmp_path, trained):
    assert curves_section(trained.folder) is None
    log(tmp_path / "run", [])
    assert curves_section(trained.folder) is None
    (tmp_path / "run" / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(SpcxrError, match=r"metrics.jsonl: a line is no record"):
        curves_section(trained.folder)


def test_the_card_says_what_model_card_md_says(tmp_path, trained):
    facts = card_section(trained).facts
    assert facts["training images"] == "32"
    assert facts["drawn phantoms among them"] == "no"
    assert facts["best validation"] == "macro_auroc 0.9877"
    assert facts["encoder"] == "vision transformer of 2 blocks, width 24, 3 heads, patches of 8 px"
    assert facts["task"] == "several findings an image"
    assert "training patients" not in facts  # nobody wrote it, so it is not there
    card = write_model_card(tmp_path, "t", {}).read_text()
    for heading, text in STATEMENTS.items():
        assert facts[heading] == text
        assert f"## {heading}\n\n{text}\n" in card
    page = render(Report("t", "s", sections=[card_section(trained)]))
    assert "<dt>Intended use</dt>" in page


def test_summary_counts_what_the_store_holds(make_store):
    def columns(there):
        n = len(there)
        square = ["1" if t else "0" for t in there]
        square[3], square[7] = "-1", ""
        return {
            "square": square,
            "age": ["", *(str(20 + i % 40) for i in range(1, n))],
            "sex": ["F" if i % 3 else "M" for i in range(n)],
            "view": ["PA"] * n,
            "site": [f"s{i % 6}" for i in range(n)],
        }

    store = make_store(columns)
    rows = store.manifest.rows("test")
    sets = [TestSet("a: test", "a", store, rows), TestSet("all", "a", store, np.arange(64))]
    facts, labels = summary_section(sets, NAMES).tables
    assert facts.columns == ["", "a: test", "all"]
    found = {row[0]: row[1:] for row in facts.rows}
    assert found["images"] == [16, 64]
    assert found["patients"] == [16, 64]
    ages = [20 + i % 40 for i in range(1, 64)]
    assert found["age in years"][1] == f"{np.median(ages):.0f} (20–59), 1 unknown"
    assert found["sex"][1] == "F 42, M 22"
    assert found["site"][1].endswith("2 others 20")
    assert found["view"] == ["PA 16", "PA 64"]
    assert found["size in pixels"][0] == "stored 32 x 32"
    truth = np.arange(64) // 4 % 2 == 0
    yes, no = truth.sum() - 1, (~truth).sum() - 1
    assert {row[0]: row[2] for row in labels.rows} == {"square": f"{yes} / {no} / 2", "plain": "–"}
    assert shares(["a"] * 3 + [""]) == "a 3, unknown 1"


def test_cases_show_the_stores_images_and_the_encoders_attention(make_store, trained):
    # Without positions: where a patch is looked at is told by what it shows, not by where it lies.
    torch.nn.init.zeros_(trained.model.encoder.pos_embed)
    store = make_store({})
    test_set = TestSet("store: test", "s", store, store.manifest.rows("test"))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (16, 2)).astype(float)
    scores = rng.random((16, 2))
    section = cases_section(trained, test_set, labels, scores)
    assert [p.alt.split(",")[0] for p in section.pictures] == [
        "Radiographs of square",
        "Radiographs of plain",
    ]
    assert "no reason for a score" in section.text
    asked = []

    def visible(grey, rows):
        """The left half is read."""
        assert 0 <= grey.min() < grey.max() <= 1
        asked.append(store.manifest.column("split")[rows[0]])
        shown = torch.zeros(1, 4, 4, dtype=torch.bool)
        shown[:, :, :2] = True
        return shown

    again = cases_section(trained, test_set, labels, scores, visible=visible)
    assert len(again.pictures) == 2
    assert asked == ["test"] * 6  # best, missed, alarm of two labels
    whole, half = (
        np.asarray(Image.open(io.BytesIO(section.pictures[0].png)).convert("RGB"), float)
        for section in (section, again)
    )
    tile = slice(22 + 224 + 6, 22 + 2 * 224 + 6)  # the overlays, below the images
    colour = [np.ptp(sheet[tile, 150:224], axis=2).mean() for sheet in (whole, half)]
    assert colour[1] < 0.5 < 5 < colour[0]  # grey where no patch was read
    nothing = cases_section(trained, test_set, np.full((16, 2), np.nan), rng.random((16, 2)))
    assert nothing.pictures == ()
    assert "no case to show" in nothing.text


@pytest.mark.shared
def test_real_cases_and_what_the_set_holds(tmp_path, shared_data, trained):
    """Real radiographs: the picture shows the store's pixels, the table what the manifest says."""
    with (shared_data / "cls_manifest.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "test"][::12][:10]
    chosen = ["path", "patient_id", "split", "view", "age", "sex", "label"]
    with (tmp_path / "few.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, chosen, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    config = prepare.PrepareConfig(
        sources=(str(tmp_path / "few.csv"),),
        out=str(tmp_path / "store"),
        root=str(shared_data),
        size_px=224,
        workers=0,
    )
    store = Store.open(prepare.run(config))
    test_set = TestSet("real", "few.csv", store, np.arange(len(store)))
    labels = np.stack([np.arange(10) % 2, np.arange(10) < 1], 1).astype(float)
    scores = np.linspace(0.1, 0.9, 20).reshape(10, 2)
    section = cases_section(trained, test_set, labels, scores)
    sheet = np.asarray(Image.open(io.BytesIO(section.pictures[0].png)).convert("L"), float)
    assert sheet.shape[1] == 3 * 224 + 12
    best = store.images(np.array([9]))[0]  # a label in every second row, the last scored highest
    assert np.abs(sheet[22 : 22 + 224, :224] - best).mean() < 4
    found = {
        row[0]: row[1] for row in summary_section([test_set], store.manifest.labels).tables[0].rows
    }
    assert found["images"] == 10
    widths = [
        int(n) for n in found["size in pixels"].split(",")[0].replace(" to ", " x ").split(" x ")
    ]
    assert all(100 < side <= 4096 for side in widths)
