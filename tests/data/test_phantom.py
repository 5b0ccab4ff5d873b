"""Phantoms: repeatable, marked as drawings, readable as DICOM, and neither trivial nor hopeless."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from spcxr.data.phantom import LABELS, NOTICE, Series, draw, patient_of, plan, write
from spcxr.data.phantom_canvas import Canvas
from spcxr.data.phantom_vessels import solid
from spcxr.errors import SpcxrError

KINDS = [("site-a", False), ("site-b", False), ("site-a", True), ("site-b", True)]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A folder of 48 small phantoms."""
    folder = tmp_path_factory.mktemp("phantoms")
    assert write(folder, Series(count=48, size_px=96)) == folder / "manifest.csv"
    return folder


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "manifest.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_an_image_depends_on_seed_and_index_alone():
    first, again = draw(5, seed=3, size_px=96), draw(5, seed=3, size_px=96)
    assert np.array_equal(first.pixels, again.pixels)
    assert np.array_equal(first.lung_mask, again.lung_mask)
    for other in (draw(6, seed=3, size_px=96), draw(5, seed=4, size_px=96)):
        assert not np.array_equal(first.pixels, other.pixels)


def test_a_written_file_holds_the_drawn_image(written):
    row = rows_of(written)[7]
    site, _, label, child = plan(7)
    phantom = draw(7, site=site, label=label, child=child, size_px=96)
    data = pydicom.dcmread(written / row["path"])
    stored = data.pixel_array
    shown = 4095 - stored if data.PhotometricInterpretation == "MONOCHROME1" else stored
    assert np.array_equal(shown, phantom.pixels)
    assert np.array_equal(np.asarray(Image.open(written / row["mask_path"])) > 0, phantom.lung_mask)


@pytest.mark.parametrize(("site", "child"), KINDS)
@pytest.mark.parametrize("size_px", [64, 200, 512])
def test_pixels_and_masks(site, child, size_px):
    phantom = draw(2, seed=1, site=site, child=child, size_px=size_px)
    pixels, lung, heart = phantom.pixels, phantom.lung_mask, phantom.heart_mask
    aspect = 1.1 if site == "site-a" else 1.2
    assert pixels.shape == lung.shape == heart.shape == (round(size_px * aspect), size_px)
    assert (pixels.dtype, lung.dtype, heart.dtype) == (np.uint16, bool, bool)
    assert pixels.max() <= 4095
    assert np.ptp(np.percentile(pixels, (1, 99))) > 2500, "flat: the range is not used"
    assert not (lung & heart).any()


@pytest.mark.parametrize(("site", "child"), KINDS)
def test_lungs_are_two_large_dark_regions(site, child):
    for index in range(3, 39, 4):
        phantom = draw(index, seed=2, site=site, child=child, size_px=128)
        lung, heart, pixels = phantom.lung_mask, phantom.heart_mask, phantom.pixels
        assert 0.15 < lung.mean() < 0.5
        parts, count = ndimage.label(lung)
        sizes = np.sort(ndimage.sum_labels(lung, parts, np.arange(1, count + 1)))[::-1]
        assert count >= 2
        assert sizes[1] > 0.3 * sizes[0], "one lung is missing or both run together"
        assert sizes[:2].sum() > 0.98 * lung.sum()
        # The right lung (left on the image) is the larger one; the heart is on the other side.
        columns = np.arange(lung.shape[1])[None]
        middle = (lung * columns).sum() / lung.sum()
        assert (heart * columns).sum() / heart.sum() > middle
        assert np.median(pixels[lung]) + 500 < np.median(pixels[heart])


def test_the_right_dome_is_the_higher():
    higher = []
    for index in range(0, 40, 4):
        lung = draw(index, size_px=128).lung_mask
        columns = np.arange(lung.shape[1])[None]
        middle = round(float((lung * columns).sum() / lung.sum()))
        lowest = [np.nonzero(half.any(1))[0] for half in (lung[:, :middle], lung[:, middle:])]
        area = [half.sum() for half in (lung[:, :middle], lung[:, middle:])]
        higher.append(area[0] > area[1])
        assert abs(int(lowest[0][0]) - int(lowest[1][0])) < 20, "the apices are not level"
    assert np.mean(higher) >= 0.7, "the right lung is to be the larger, as the heart is left"


def test_children_are_smaller_and_have_wider_hearts():
    def measures(child: bool) -> tuple[float, float, float]:
        made = [draw(index, size_px=128, child=child) for index in range(0, 64, 4)]
        ages = [p.age for p in made]
        assert (max(ages) < 12) if child else (min(ages) >= 18)
        ratio = [np.ptp(p.heart_mask.any(0).nonzero()) / np.ptp(p.lung_mask.any(0).nonzero())
                 for p in made]  # fmt: skip
        width = [np.ptp(p.lung_mask.any(0).nonzero()) * p.spacing_mm[1] for p in made]
        height = [np.ptp(p.lung_mask.any(1).nonzero()) * p.spacing_mm[0] for p in made]
        return np.mean(ratio), np.mean(width), np.mean(height) / np.mean(width)

    adult, child = measures(False), measures(True)
    assert 0.42 < adult[0] < 0.56, f"adults' cardiothoracic ratio {adult[0]:.2f}"
    assert adult[0] + 0.02 < child[0] < 0.64, f"children's cardiothoracic ratio {child[0]:.2f}"
    assert 225 < adult[1] < 310, "an adult's chest is about 27 cm wide inside"
    assert child[1] < 0.75 * adult[1]
    assert child[2] < adult[2], "a child's chest is rounder"


def test_sites_look_different():
    """The other site's lungs are blurred and flat: what a model must bear there."""
    detail, contrast = {}, {}
    for site in ("site-a", "site-b"):
        made = [draw(index, site=site, size_px=256) for index in range(0, 24, 4)]
        inside = [(p.pixels / 4095, p.lung_mask) for p in made]
        detail[site] = np.mean([np.abs(np.diff(x, axis=1))[m[:, 1:]].mean() for x, m in inside])
        contrast[site] = np.mean([np.ptp(np.quantile(x[m], (0.05, 0.95))) for x, m in inside])
    assert detail["site-a"] > 1.15 * detail["site-b"]
    assert contrast["site-a"] > 1.1 * contrast["site-b"]


def test_labels_change_the_lungs_where_they_should():
    """Same seed and index, another label: the same patient with something in the lungs."""
    brighter, sides = {"pneumonia": [], "covid": []}, {"pneumonia": [], "covid": []}
    for index in range(0, 80, 4):
        normal = draw(index, seed=9, size_px=96)
        lung = normal.lung_mask
        right = np.arange(lung.shape[1])[None] < lung.shape[1] / 2
        for label in brighter:
            sick = draw(index, seed=9, label=label, size_px=96)
            assert np.array_equal(sick.lung_mask, lung)
            change = sick.pixels.astype(float) - normal.pixels
            change = ndimage.gaussian_filter(change, 3)
            halves = [np.clip(change, 150, None)[lung & side].mean() for side in (right, ~right)]
            brighter[label].append(change[lung].mean())
            sides[label].append(min(halves) / max(halves))
    for label, values in brighter.items():
        assert np.mean(values) > 60, label
    assert np.mean(sides["covid"]) > np.mean(sides["pneumonia"]) + 0.1, "covid is two-sided"


def test_severity_varies_down_to_subtle():
    for label in ("pneumonia", "covid"):
        change = []
        for index in range(0, 120, 4):
            normal, sick = (draw(index, seed=9, label=k, size_px=64) for k in ("normal", label))
            lung = normal.lung_mask
            change.append(np.mean(sick.pixels[lung]) - np.mean(normal.pixels[lung]))
        low, high = np.quantile(change, (0.1, 0.9))
        assert high > 2 * low > 0, f"{label}, all alike: {low:.0f} to {high:.0f}"
        assert low < 120 < high < 800, f"{label}: {low:.0f} to {high:.0f} of 4095"


def test_splats_are_path_lengths():
    """Through the middle of a tube of radius r the path is 2r, and its volume is kept."""
    canvas = Canvas((120, 120), scale=100.0, angle=0.3, origin=(0.0, 0.0), turn=0.0)
    path = np.stack([np.linspace(-0.3, 0.3, 61), np.zeros(61)], -1)[None].astype(np.float32)
    normal = np.broadcast_to(np.float32([0, 1]), path.shape)
    tube = solid(canvas, path, normal, np.full((1, 61), 0.1), np.full((1, 1), 0.01))
    drawn = canvas.splat([tube])
    assert drawn[55:65, 55:65].max() == pytest.approx(0.2, rel=0.08)
    assert drawn.sum() / canvas.scale**2 == pytest.approx(np.pi * 0.1**2 * 0.61, rel=0.02)


def test_tags_say_it_is_a_drawing(written):
    for row in rows_of(written):
        data = pydicom.dcmread(written / row["path"])
        assert str(data.PatientName).startswith("PHANTOM^")
        assert data.PatientID == row["patient_id"]
        assert data.PatientID.startswith("PHANTOM-")
        for tag in ("SeriesDescription", "StudyDescription", "ImageComments", "PatientComments"):
            assert data[tag].value == NOTICE
        assert data.BurnedInAnnotation == "NO"
        assert data.StudyDate == data.PatientBirthDate == ""
        assert data.PatientAge == f"{int(row['age']):03d}Y"
        assert (data.PatientSex, data.ViewPosition) == (row["sex"], row["view"])
        assert data.ImageType[0] == "DERIVED"
    assert NOTICE in (written / "README.txt").read_text()


def test_dicom_is_valid_and_each_site_stores_its_own_way(written):
    uids, seen = set(), set()
    for row in rows_of(written):
        data = pydicom.dcmread(written / row["path"])
        seen.add((row["site"], data.Modality, data.PhotometricInterpretation))
        assert (data.BitsAllocated, data.BitsStored, data.HighBit) == (16, 12, 11)
        assert data.pixel_array.dtype == np.uint16
        uids.add(data.SOPInstanceUID)
        for uid in (data.SOPInstanceUID, data.StudyInstanceUID, data.SeriesInstanceUID):
            assert uid.is_valid
            assert uid.startswith("2.25.")
        if data.Modality == "DX":
            assert data.PresentationIntentType == "FOR PRESENTATION"
            assert data.AnatomicRegionSequence[0].CodeMeaning == "Chest"
            assert data.ViewCodeSequence[0].CodeMeaning
        assert 0.5 < float(data.ImagerPixelSpacing[0]) < 5
    assert len(uids) == 48
    assert seen == {("site-a", "DX", "MONOCHROME2"), ("site-b", "CR", "MONOCHROME1")}


def test_monochrome1_is_inverted_in_the_file(written):
    """Lungs are dark on the film: low values in MONOCHROME2, high ones in MONOCHROME1."""
    for row in rows_of(written):
        data = pydicom.dcmread(written / row["path"])
        lung = np.asarray(Image.open(written / row["mask_path"])) == 255
        inside, below = (
            np.median(data.pixel_array[lung]),
            np.median(data.pixel_array[-20:-8, 40:56]),
        )
        assert (inside > below) == (data.PhotometricInterpretation == "MONOCHROME1")


@pytest.mark.parametrize("compression", ["deflated", "rle", "jpeg2000"])
def test_compressed_copies_hold_the_same_pixels(tmp_path, compression):
    if compression == "jpeg2000":
        pytest.importorskip("openjpeg", reason="JPEG 2000 needs spcxr[dicom]")
    write(tmp_path / "plain", Series(count=2, size_px=64))
    write(tmp_path / "packed", Series(count=2, size_px=64, compression=compression))
    for index in range(2):
        name = f"dicom/phantom-{index:05d}.dcm"
        plain, packed = (pydicom.dcmread(tmp_path / k / name) for k in ("plain", "packed"))
        assert np.array_equal(plain.pixel_array, packed.pixel_array)
        assert packed.file_meta.TransferSyntaxUID != plain.file_meta.TransferSyntaxUID
        assert packed.SOPInstanceUID == plain.SOPInstanceUID


def test_other_processes_write_the_same_files(tmp_path):
    for name, workers in (("alone", 0), ("shared", 2)):
        write(tmp_path / name, Series(count=5, size_px=64), workers=workers)
    files = sorted(p.relative_to(tmp_path / "alone") for p in tmp_path.glob("alone/**/*.*"))
    assert len(files) == 5 + 5 + 2
    for file in files:
        pair = [(tmp_path / name / file).read_bytes() for name in ("alone", "shared")]
        assert pair[0] == pair[1], file


def test_no_patient_stands_in_two_splits(written):
    splits: dict[str, set[str]] = {}
    for row in rows_of(written):
        splits.setdefault(row["patient_id"], set()).add(row["split"])
        assert (row["split"] == "drift") == (row["site"] == "site-b")
    assert all(len(found) == 1 for found in splits.values())
    assert len(splits) == 36, "of every four images, two are one patient's"


def test_follow_ups_show_the_same_patient():
    first, second = draw(2, size_px=96), draw(3, size_px=96)
    assert patient_of(2)[0] == patient_of(3)[0]
    assert (first.patient_id, first.age, first.sex) == (second.patient_id, second.age, second.sex)
    assert not np.array_equal(first.pixels, second.pixels)


def test_plan_keeps_label_apart_from_site_split_and_age():
    count = 720
    plans = [plan(index) for index in range(count)]
    assert set(Counter(p[2] for p in plans)) == set(LABELS)
    for part in (0, 1, 3):
        for value in {p[part] for p in plans}:
            labels = Counter(p[2] for p in plans if p[part] == value)
            assert max(labels.values()) < 1.35 * min(labels.values()), f"{value}: {labels}"
    shares = Counter(p[1] for p in plans)
    assert shares["drift"] / count == pytest.approx(0.25, abs=0.02)
    assert shares["train"] / count == pytest.approx(0.45, abs=0.02)
    assert sum(p[3] for p in plans) / count == pytest.approx(0.25, abs=0.03)
    assert set(Counter(p[1] for p in plans[:20])) == {"train", "val", "test", "drift"}
    assert all(p[0] == "site-a" for p in (plan(i, drift_ratio=0.0) for i in range(60)))
    assert all(p[1] == "drift" for p in (plan(i, drift_ratio=1.0) for i in range(60)))


def test_a_linear_model_of_thumbnails_neither_fails_nor_solves_it():
    """16x16 thumbnails, 240 to learn from: AUROC 0.6 to 0.97 a label (seen: 0.75 to 0.93)."""
    thumbs, labels = [], []
    for index in range(360):
        phantom = draw(index, seed=3, label=LABELS[patient_of(index)[0] % 3], size_px=64)
        thumb = Image.fromarray((phantom.pixels >> 4).astype(np.uint8)).resize((16, 16), Image.BOX)
        thumbs.append(np.asarray(thumb, np.float32).ravel())
        labels.append(phantom.label)
    x, y = np.array(thumbs), np.array(labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    model.fit(x[:240], y[:240])
    scores = model.predict_proba(x[240:])
    for column, label in enumerate(model.classes_):
        area = roc_auc_score(y[240:] == label, scores[:, column])
        assert 0.6 < area < 0.97, f"{label}: AUROC {area:.3f}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"count": 0}, "count 0"),
        ({"size_px": 32}, "size_px 32"),
        ({"drift_ratio": 1.5}, "drift_ratio 1.5"),
        ({"child_ratio": -1}, "child_ratio -1"),
        ({"compression": "zip"}, "compression 'zip': choose one of none"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_arguments_name_themselves(tmp_path, arguments, words):
    with pytest.raises(SpcxrError, match=words):
        write(tmp_path / "out", Series(**{"count": 1, "size_px": 64} | arguments))
    assert not (tmp_path / "out" / "manifest.csv").exists()


@pytest.mark.parametrize(("name", "value"), [("site", "site-c"), ("label", "tuberculosis")])
def test_unknown_kinds_are_refused(name, value):
    with pytest.raises(SpcxrError, match=f"{name} '{value}': choose one of"):
        draw(0, size_px=64, **{name: value})


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SpcxrError, match="not empty"):
        write(tmp_path, Series(count=1, size_px=64))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
