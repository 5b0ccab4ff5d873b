"""``--attend lungs``: whole runs on tiny stores, by masks and by a segmenter; what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from lung_runs import CPU, config, side_of_square, write_store

from spcxr.config import ConfigError
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.infer.predict import forward_batches, load_trained, predict_classes, probabilities
from spcxr.infer.regions import StoredLungs
from spcxr.models.regions import LungFinder, patches_touched
from spcxr.recipes import evaluate, prepare
from spcxr.recipes.attend import KnownLungs, SharesRead, find_lungs, shares_of
from spcxr.recipes.classify import build, choose_cohort, run
from spcxr.recipes.finetune import Cohort, begin
from spcxr.recipes.fitting import augmented
from spcxr.train.distributed import World


def written(folder):
    with (folder / "predictions.csv").open() as file:
        return {row["path"]: row for row in csv.DictReader(file)}


def predicted(trained, store, rows, told=None):
    logits = predict_classes(trained.model, store, rows, trained.normalisation, CPU, told=told)
    return probabilities(logits, multilabel=False)


@pytest.fixture
def store(make_store):
    return make_store(side_of_square, masked=True)


# --- whole runs -----------------------------------------------------------------------------


def test_by_masks_the_export_predicts_the_same_and_says_what_was_read(store, tiny_init, tmp_path):
    folder = run(config(store, tiny_init, tmp_path / "run"))
    trained = load_trained(folder)
    assert trained.config["task"]["attend"] == "lungs"
    assert trained.config["task"]["lungs_from"] == "masks"
    rows, read = store.manifest.rows("test"), SharesRead()
    expected, found = predicted(trained, store, rows, read), written(folder)
    for row, (sick, _), share in zip(rows, expected, read.shares, strict=True):
        cells = found[store.manifest.column("path")[row]]
        assert float(cells["p_sick"]) == pytest.approx(sick, abs=1e-5)
        assert float(cells["patches_read"]) == pytest.approx(share, abs=1e-5)
    # Half of the masks are empty: those images are read whole, and the log says so.
    empty = ~(store.masks(rows) == 1).any((1, 2))
    assert (read.shares == 1).tolist() == empty.tolist()
    assert (
        "NO LUNG FOUND in 32 of 64 images"
        in json.loads((folder / "metrics.json").read_text())["task"]
    )


def test_with_a_segmenter_the_model_stands_by_itself(store, segmenter, tiny_init, tmp_path):
    """The run's model folder alone, elsewhere, on data without masks: evaluate works unchanged."""
    folder = run(config(store, tiny_init, tmp_path / "run", lungs_from=str(segmenter)))
    moved = shutil.copytree(folder / "model", tmp_path / "moved")
    (moved / "calibration.json").unlink()  # the run's predictions are not tempered
    shutil.rmtree(segmenter)
    trained = load_trained(moved)
    assert isinstance(trained.model.lungs, LungFinder)
    assert trained.config["task"]["lungs_from"] == "model"
    settings = evaluate.EvaluateConfig(
        run=str(moved),
        data=(str(store.path),),
        out=str(tmp_path / "evaluated"),
        n_bootstrap=100,
        device="cpu",
        precision="fp32",
    )
    evaluate.run(settings)
    ours, theirs = written(folder), written(tmp_path / "evaluated")
    assert len(theirs) == 16
    for path, cells in theirs.items():
        assert float(cells["p sick"]) == pytest.approx(float(ours[path]["p_sick"]), abs=1e-4)
        assert cells["patches read"] == f"{float(ours[path]['patches_read']):.4g}"
    assert len({cells["patches read"] for cells in theirs.values()}) > 2
    page = (tmp_path / "evaluated" / "report.html").read_text()
    assert "lungs&#39; patches" in page or "lungs' patches" in page


def test_outside_the_lungs_nothing_is_read(store, segmenter, tiny_init, tmp_path):
    """What is painted outside the lungs changes a whole-image model, not the restricted one."""
    restricted = run(config(store, tiny_init, tmp_path / "run", lungs_from=str(segmenter)))
    whole = run(config(store, tiny_init, tmp_path / "whole", attend="image"))
    seen = SharesRead()
    trained = load_trained(restricted)
    rows = store.manifest.rows(("train", "val", "test"))
    predicted(trained, store, rows, seen)
    rows = rows[seen.shares < 0.6]
    assert len(rows) > 10

    def paint(grey, _):
        """Dark grey noise becomes another dark grey, where no patch is read."""
        visible = patches_touched(trained.model.lungs.masks(grey), 8)
        hidden = ~visible.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
        return torch.where(hidden, grey * 0.6, grey)

    def answers(folder, change):
        model = load_trained(folder)
        batches = forward_batches(model.model, store, rows, model.normalisation, CPU, change)
        return torch.cat([logits for _, logits in batches])

    moved = [(answers(f, paint) - answers(f, None)).abs().amax(1) for f in (restricted, whole)]
    # The segmenter looks at the painted image: where it still finds the same patches, all is equal.
    assert (moved[0] < 1e-5).float().mean() > 0.7
    assert (moved[1] > 1e-3).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "linear"},
        {"method": "knn"},
        {"ema": 0.9},
        {"freeze": True},
        {"equalise": True},
        {"equalise": True, "method": "linear"},
    ],
)
def test_every_way_to_fit_a_head_reads_the_lungs(settings, store, segmenter, tiny_init, tmp_path):
    """What the run wrote of its rows is what the exported model makes of the lungs' patches."""
    made = config(store, tiny_init, tmp_path / "run", lungs_from=str(segmenter), **settings)
    folder = run(made)
    rows, read, trained = store.manifest.rows("test"), SharesRead(), load_trained(folder)
    expected, found = predicted(trained, store, rows, read), written(folder)
    assert read.shares.min() < 0.8
    for row, (sick, _) in zip(rows, expected, strict=True):
        cells = found[store.manifest.column("path")[row]]
        assert float(cells["p_sick"]) == pytest.approx(sick, abs=1e-4)


# --- the training side ----------------------------------------------------------------------


def test_lungs_go_through_the_warps_of_their_images(store, tiny_init, tmp_path):
    strong = {"crop_scale": (0.4, 1.0), "rotation_deg": 40.0, "flip_p": 0.5, "brightness": 0.0}
    settings = config(store, tiny_init, tmp_path / "run", contrast=0.0, **strong)
    start = begin(settings, tmp_path)
    cohort, alone = choose_cohort(settings, start.store), World(torch.device("cpu"))
    course, task = build(settings, tmp_path, start, cohort, alone)
    rows = course.rows[(store.masks(course.rows) == 1).any((1, 2))]
    images, warps = augmented(course, rows, store.images(rows), epoch=0)
    bright = images[:, 0] > (150 / 255 - 0.25) / 0.25
    shown, found = task.lungs.warped(images, rows, warps)
    assert shown is images
    agree = found == patches_touched(bright, 8)
    assert agree.float().mean() > 0.97
    unmoved = task.lungs.masks(images, rows)
    assert (patches_touched(unmoved, 8) == found).float().mean() < 0.9


def test_masks_are_kept_as_they_are_in_bits(store, tiny_init, tmp_path):
    settings = config(store, tiny_init, tmp_path / "run", image_px=64)
    start = begin(settings, tmp_path)
    rows = np.arange(len(store))
    known = find_lungs(start, Cohort(rows[:32], rows[32:48], rows[48:]), CPU, None)
    some = np.array([40, 3, 11])
    wanted = torch.from_numpy(store.masks(some) == 1)
    wanted = wanted.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(known.masks(torch.empty(0), some), wanted)
    assert known.bits.nbytes == 64 * 64 * 64 // 8
    with pytest.raises(IndexError, match="lungs were looked for in"):
        known.masks(torch.empty(0), np.array([3, 64]))


@pytest.mark.shared
def test_on_real_lungs_corners_are_never_read(shared_data, tmp_path):
    """Half of a radiograph or less is read, and nothing of its four corners."""
    table = tmp_path / "some.csv"
    with (shared_data / "seg_manifest.csv").open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))[::40]
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    settings = prepare.PrepareConfig(
        sources=(str(table),),
        out=str(tmp_path / "s"),
        size_px=112,
        root=str(shared_data),
        workers=0,
    )
    store = Store.open(prepare.run(settings))
    masks = StoredLungs().masks(torch.empty(0, 1, 112, 112), np.arange(len(store)), store)
    visible = patches_touched(masks, 8)
    shares = shares_of(visible)
    assert len(store) > 15
    assert 0.3 < shares.mean() < 0.55
    assert shares.max() < 1
    assert not visible[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()
    inside = masks.unflatten(1, (14, 8)).unflatten(3, (14, 8)).any(4).any(2)
    assert visible[inside].float().mean() > 0.95  # and hardly any lung is left out


# --- refusals -------------------------------------------------------------------------------


def test_lungs_from_without_attend_is_refused(store, tiny_init, tmp_path):
    with pytest.raises(ConfigError, match="add --attend lungs"):
        config(store, tiny_init, tmp_path / "run", attend="image", lungs_from="somewhere")


def test_data_without_masks_need_a_segment_run(make_store, tiny_init, tmp_path):
    store = make_store(side_of_square)
    with pytest.raises(SpcxrError, match=r"no row has a mask .*--lungs-from a segment run"):
        run(config(store, tiny_init, tmp_path / "run"))


def test_a_model_that_reads_by_masks_refuses_data_without(make_store, tiny_init, tmp_path):
    folder = run(config(make_store(side_of_square, masked=True), tiny_init, tmp_path / "run"))
    bare = make_store(side_of_square, name="bare")
    trained = load_trained(folder)
    with pytest.raises(SpcxrError, match=r"bare: row 5 has no mask.*--lungs-from"):
        predicted(trained, bare, np.array([5, 6]))


def test_data_that_are_mostly_without_lungs_are_refused(make_store, tiny_init, tmp_path):
    """Read whole they would be, and the model be called one that reads the lungs alone."""
    store = make_store(side_of_square, masked=True)
    start = begin(config(store, tiny_init, tmp_path / "run"), tmp_path)
    cohort = Cohort(np.array([0, 4, 5]), np.array([1, 12]), np.array([13]))
    with pytest.raises(SpcxrError, match=r"store: no lungs in 4 of 6 images; .*--lungs-from"):
        find_lungs(start, cohort, CPU, None)
    find_lungs(start, Cohort(np.array([0, 4]), np.array([1]), np.array([13])), CPU, None)
    full = KnownLungs(np.arange(2), np.full((2, 32 * 32 // 8), 255, np.uint8), (32, 32), 8)
    assert full.without_lungs() == 0  # lungs that fill the image are lungs


def test_rows_without_a_mask_are_named(tiny_init, tmp_path):
    store = write_store(tmp_path / "store", [i != 9 for i in range(16)])
    with pytest.raises(SpcxrError, match="row 9 has no mask"):
        run(config(store, tiny_init, tmp_path / "run"))


def test_a_run_that_segments_no_lungs_is_refused(store, tiny_init, tmp_path):
    labels = run(config(store, tiny_init, tmp_path / "labels", attend="image"))
    with pytest.raises(SpcxrError, match="finds sick, well, not lungs; give a run of segment"):
        run(config(store, tiny_init, tmp_path / "run", lungs_from=str(labels)))


def test_a_segmenter_of_other_images_is_refused(store, segmenter, tiny_init, tmp_path):
    facts = segmenter / "model" / "config.json"
    told = json.loads(facts.read_text())
    told["preprocess"]["fit"] = "crop"
    facts.write_text(json.dumps(told))
    with pytest.raises(SpcxrError, match=r"prepared otherwise than .*segment was trained on"):
        run(config(store, tiny_init, tmp_path / "run", lungs_from=str(segmenter)))


def test_a_model_that_lost_its_segmenter_is_refused(store, segmenter, tiny_init, tmp_path):
    folder = run(config(store, tiny_init, tmp_path / "run", lungs_from=str(segmenter)))
    shutil.rmtree(folder / "model" / "lungs")
    with pytest.raises(SpcxrError, match=r"lungs/ .* is not there; copy the whole model folder"):
        load_trained(folder)
