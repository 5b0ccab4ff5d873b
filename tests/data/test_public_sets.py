"""The sets that are tables of their own: labels, patients, splits and masks as they stand there."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from public_sets import (
    CHEXPERT,
    CHEXPERT_VALID,
    COVIDX,
    COVIDX_TEST,
    MAKERS,
    RSNA,
    SIIM,
    UUID,
    chexpert,
    covidx,
    draw,
    jsrt,
    mimic,
    rsna,
    siim,
    touch,
    vindr,
)

from spcxr.data import sources
from spcxr.data.sources.nih import FINDINGS
from spcxr.data.sources.siim import decode
from spcxr.data.store import Store
from spcxr.errors import SpcxrError
from spcxr.recipes import prepare

NAN = np.nan


def cells(manifest, *names):
    return [manifest.column(name) for name in names]


def test_chexpert(tmp_path):
    manifest = sources.index(chexpert(tmp_path))
    views, ages, sexes = cells(manifest, "view", "age", "sex")
    assert views == ["AP", "PA", "LATERAL", "AP"]
    assert ages == [68, 87, 87, 73]
    assert sexes == ["F", "M", "M", "M"]
    people = ["00001", "00002", "00002", "64541"]
    assert manifest.column("patient_id") == [f"chexpert-patient{number}" for number in people]
    labels = ["No Finding", "Cardiomegaly", "Pneumothorax"]
    expected = [[1, NAN, 0], [NAN, -1, NAN], [NAN, -1, NAN], [0, 1, 0]]
    np.testing.assert_array_equal(manifest.label_matrix(labels), expected)
    splits = manifest.column("split")
    assert splits[3] == "test"
    assert splits[1] == splits[2]
    assert set(splits[:3]) <= {"train", "val"}
    assert manifest.notes == (
        "chexpert: 1 images of the table are not on disk",
        "chexpert: no test.csv, so valid.csv is the split test",
    )


def test_chexpert_in_batches_and_with_its_test_set(tmp_path):
    root = chexpert(tmp_path)
    (root / "train").rename(root / "CheXpert-v1.0 batch 2 (train 1)")
    row = CHEXPERT_VALID[0].replace("valid/patient64541", "test/patient64741")
    touch(root, "test.csv", text=f"{CHEXPERT}\n{row}\n")
    touch(root, "test/patient64741/study1/view1_frontal.jpg")
    manifest = sources.index(root)
    assert manifest.column("split") == ["train"] * 3 + ["val", "test"]
    assert manifest.column("path")[0].startswith("CheXpert-v1.0 batch 2 (train 1)/patient00001")
    # CheXlocalize's table of the same images: path and labels alone.
    (root / "test.csv").unlink()
    path, *rest = row.split(",")
    header = ",".join(["Path", *CHEXPERT.split(",")[5:]])
    touch(root, "test_labels.csv", text=f"{header}\n{','.join([path, *rest[4:]])}\n")
    other = sources.index(root)
    assert other.column("split") == manifest.column("split")
    assert other.column("view")[4] == "FRONTAL"
    np.testing.assert_array_equal(other.label_matrix(), manifest.label_matrix())


def test_mimic(tmp_path):
    manifest = sources.index(mimic(tmp_path))
    splits, views, patients = cells(manifest, "split", "view", "patient_id")
    assert splits == ["train", "train", "val", "test"]
    assert views == ["PA", "LATERAL", "AP", "LATERAL"]
    assert patients == [f"mimic-p{p}" for p in ("10000032", "10000032", "10000764", "10001217")]
    found = manifest.label_matrix(["No Finding", "Pneumonia", "Edema"])
    expected = [[1, NAN, NAN], [1, NAN, NAN], [NAN, -1, 0], [NAN, NAN, NAN]]
    np.testing.assert_array_equal(found, expected)
    assert manifest.notes[0] == "mimic: 1 images of the table are not on disk"


def test_mimic_without_a_labeller_or_a_split(tmp_path):
    root = mimic(tmp_path)
    table = root / "mimic-cxr-2.0.0-split.csv.gz"
    torn = gzip.decompress(table.read_bytes()).splitlines()[:-2]
    table.write_bytes(gzip.compress(b"\n".join(torn)))
    with pytest.raises(SpcxrError, match=r"split.csv.gz: no split .* of e084de3b"):
        sources.index(root)
    table.write_bytes(table.read_bytes()[:40])
    with pytest.raises(SpcxrError, match=r"split.csv.gz: cannot be read \(Compressed file ended"):
        sources.index(root)
    (root / "mimic-cxr-2.0.0-chexpert.csv.gz").unlink()
    with pytest.raises(SpcxrError, match=r"no mimic-cxr-.*-chexpert.csv.gz"):
        sources.index(root)


def test_rsna(tmp_path):
    manifest = sources.index(rsna(tmp_path))
    assert manifest.labels == ("Lung Opacity", "No Lung Opacity / Not Normal", "Normal")
    assert manifest.label_matrix().tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    boxes = "264.0 152.0 213.0 379.0|562.0 152.0 256.0 453.0"
    assert manifest.column("boxes") == ["", boxes, ""]
    assert "1 images of the table are not on disk" in manifest.notes[0]
    assert "each image counts as a patient of its own" in manifest.notes[1]


def test_rsna_by_its_boxes_alone_and_with_tables_that_disagree(tmp_path):
    root = rsna(tmp_path, classes=False)
    manifest = sources.index(root)
    assert manifest.labels == ("Lung Opacity",)
    assert manifest.label_matrix()[:, 0].tolist() == [0, 1, 0]
    text = "patientId,class\n" + "".join(f"{image},Normal\n" for image in RSNA)
    touch(root, "stage_2_detailed_class_info.csv", text=text)
    with pytest.raises(SpcxrError, match="class' of 00436515 is 'Normal', but its Target"):
        sources.index(root)
    table = root / "stage_2_train_labels.csv"
    table.write_text(table.read_text() + "00436515,,,,,0\n")
    with pytest.raises(SpcxrError, match="row 7, column 'Target' holds '0'; an image is 1 or 0"):
        sources.index(root)


def test_rsna_knows_nihs_patients_by_its_list(tmp_path):
    root = rsna(tmp_path)
    names = [{"subset_img_id": RSNA[0], "img_id": "00000007_000.png", "SOPInstanceUID": "1"}]
    names.append({"subset_img_id": RSNA[1], "img_id": "00000007_003.png"})
    file = root / "pneumonia-challenge-dataset-mappings_2018.json"
    file.write_text(json.dumps(names))
    expected = ["nih-00000007", "nih-00000007", "rsna-000db696"]
    assert sources.index(root).column("patient_id") == expected
    file.write_text(json.dumps({"a": 1}))
    with pytest.raises(SpcxrError, match=r"mappings_2018.json: no list of entries"):
        sources.index(root)


def test_siim_unites_masks(tmp_path):
    manifest = sources.index(siim(tmp_path))
    assert manifest.label_matrix()[:, 0].tolist() == [1, 0]
    masks = [np.asarray(Image.open(tmp_path / path)) for path in manifest.column("mask_path")]
    assert masks[0].shape == (1024, 1024)
    # 1025 on: column 1, row 1; the next run begins 1021 pixels after the end of the first.
    expected = np.zeros((1024, 1024), np.uint8)
    expected[1:4, 1] = expected[1:3, 2] = expected[0, 0] = 255
    np.testing.assert_array_equal(masks[0], expected)
    assert masks[1].max() == 0
    again = (tmp_path / manifest.column("mask_path")[0]).stat().st_mtime_ns
    assert sources.index(tmp_path).table.equals(manifest.table)
    assert (tmp_path / manifest.column("mask_path")[0]).stat().st_mtime_ns == again


def test_a_set_that_cannot_be_written_to_is_one_line(tmp_path):
    root = siim(tmp_path)
    (root / "spcxr-made").write_text("in the way")
    with pytest.raises(SpcxrError, match=r"mask-.*png: cannot be written .* make its folder writ"):
        sources.index(root)


@pytest.mark.parametrize("cell", ["", "1", "1 2 3", "a 1", "1048575 2", "0 1 1048576 1"])
def test_siim_runs_that_are_none(tmp_path, cell):
    root = siim(tmp_path)
    table = root / "train-rle.csv"
    table.write_text(table.read_text() + f"{1.5}, {cell}\n")
    with pytest.raises(SpcxrError, match=r"train-rle.csv: row 6: column 'EncodedPixels'"):
        sources.index(root)


def test_siim_runs_fill_the_image():
    assert decode(f"0 {4 * 4}", side=4).all()
    assert decode("15 1", side=4).tolist() == [[0] * 4, [0] * 4, [0] * 4, [0, 0, 0, 1]]


def test_vindr_by_vote(tmp_path):
    manifest = sources.index(vindr(tmp_path))
    assert manifest.labels == ("Aortic enlargement", "Cardiomegaly", "No finding")
    # One of three drew an aorta: uncertain. Two drew the heart, one of them twice.
    assert manifest.label_matrix().tolist() == [[0, 0, 1], [-1, 1, -1]]
    assert set(manifest.column("split")) <= {"train", "val"}


def test_vindr_of_physionet(tmp_path):
    header = "image_id,rad_id,Cardiomegaly,Other diseases,No finding"
    rows = ["a,R1,1,0,0", "a,R2,1,0,0", "a,R3,0,0,1", "b,R1,0,1,0", "b,R2,0,0,1", "b,R3,0,0,1"]
    touch(tmp_path, "annotations/image_labels_train.csv", text="\n".join([header, *rows, ""]))
    test = "image_id,Cardiomegaly,Other disease,No finding\nc,0.0,1.0,0.0\n"
    touch(tmp_path, "annotations/image_labels_test.csv", text=test)
    touch(tmp_path, "train/a.dicom", "train/b.dicom", "test/c.dicom")
    assert sources.detect(tmp_path) == "vindr"
    manifest = sources.index(tmp_path)
    assert manifest.labels == ("Cardiomegaly", "No finding", "Other diseases")
    assert manifest.label_matrix().tolist() == [[1, -1, 0], [0, 1, -1], [0, 0, 1]]
    assert manifest.column("split")[2] == "test"
    touch(tmp_path, "annotations/image_labels_test.csv", text=test.replace("1.0", "yes"))
    with pytest.raises(SpcxrError, match="row 2, column 'Other disease' holds 'yes'"):
        sources.index(tmp_path)


def test_covidx(tmp_path):
    manifest = sources.index(covidx(tmp_path))
    assert manifest.labels == ("COVID-19", "normal", "pneumonia")
    assert manifest.label_matrix().tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert manifest.column("site") == ["covidx-cohen", "covidx-fig1", "covidx-ricord"]
    assert manifest.column("patient_id")[0] == "covid-chestxray-3"  # as that set's own reader
    assert manifest.column("split")[2] == "test"
    assert manifest.notes == ("covidx: 1 images of the table are not on disk",)


def test_covidx_lines_without_a_source_and_lines_twice(tmp_path):
    """As in the official lists: COVIDx3 to 7A name no source of RSNA's, COVIDx9 misspells it."""
    root = covidx(tmp_path)
    test, train = root / "labels/test_COVIDx9A.txt", root / "labels/train_COVIDx9A.txt"
    test.write_text(f"{UUID} {UUID}.png normal\n" + test.read_text())
    train.write_text(f"{UUID[:-1]}0 b.png normal rnsa\n" + COVIDX[0] + "\n" + train.read_text())
    touch(root, f"test/{UUID}.png", "train/b.png")
    manifest = sources.index(root)
    assert len(manifest) == 5
    by_path = dict(zip(manifest.column("path"), manifest.column("site"), strict=True))
    assert by_path[f"test/{UUID}.png"] == by_path["train/b.png"] == "covidx-rsna"
    assert f"rsna-{UUID}" in manifest.column("patient_id")


def test_covidx_of_two_classes_with_a_list_for_validation(tmp_path):
    def lists(name, rows):
        text = "\n".join(rows).replace("COVID-19 ", "positive ")
        text = text.replace("pneumonia ", "negative ").replace("normal ", "negative ")
        touch(tmp_path, name, text=text)

    lists("train.txt", COVIDX[:2])
    lists("val.txt", COVIDX[2:])
    lists("test.txt", COVIDX_TEST)
    touch(tmp_path, *(row.split()[1] for row in [*COVIDX, *COVIDX_TEST]))
    manifest = sources.index(tmp_path)
    assert manifest.column("split") == ["train", "train", "val", "test"]
    assert manifest.labels == ("COVID-19",)
    assert manifest.label_matrix()[:, 0].tolist() == [0, 1, 0, 1]
    touch(tmp_path, "labels/train_COVIDx9A.txt", text="\n".join(COVIDX))
    with pytest.raises(SpcxrError, match=r"train.txt and labels/train_COVIDx9A.txt are two train"):
        sources.index(tmp_path)
    (tmp_path / "train.txt").unlink()
    with pytest.raises(SpcxrError, match="lists of A and B"):
        sources.index(tmp_path)
    touch(tmp_path, "labels/train_COVIDx9A.txt", text=COVIDX[0] + "\n17 b.png covid\n")
    with pytest.raises(SpcxrError, match=r"train_COVIDx9A.txt: line 2 is not 'patientid filename"):
        sources.index(tmp_path)


def test_jsrt_films_become_bright_bone(tmp_path):
    manifest = sources.index(jsrt(tmp_path))
    ages, sexes = cells(manifest, "age", "sex")
    assert (ages, sexes) == ([53, None, 55], ["M", "F", "F"])
    assert manifest.label_matrix().tolist() == [[1, 1], [1, 0], [0, 0]]
    pixels = np.asarray(Image.open(tmp_path / manifest.column("path")[0]))
    assert (pixels[0, 1], pixels[-1, 0], pixels.shape) == (65535, 0, (2048, 2048))
    mask = np.asarray(Image.open(tmp_path / manifest.column("mask_path")[2]))
    assert mask.shape == (2048, 2048)
    assert (mask == 255).sum() == 2 * (400 * 200) * 4
    assert manifest.column("mask_path")[:2] == ["", ""]


def test_jsrt_that_is_torn(tmp_path):
    root = jsrt(tmp_path)
    (root / "All247images/JPCLN002.IMG").write_bytes(b"\0" * 100)
    with pytest.raises(SpcxrError, match=r"JPCLN002.IMG: not 2048 x 2048 pixels"):
        sources.index(root)
    (root / "All247images/JPCLN002.IMG").unlink()
    (root / "scratch/fold1/masks/left lung/JPCNN001.gif").unlink()
    with pytest.raises(SpcxrError, match="JPCNN001 has 1 lung masks; add both"):
        sources.index(root)


def test_nih_by_lists_with_labels_alone(tmp_path):
    cells = {"00000001_000.png": "0 1" + " 0" * 12, "00000002_000.png": "0 " * 13 + "1"}
    for name, (image, labels) in zip(("train", "test"), cells.items(), strict=True):
        touch(tmp_path, f"{name}_official.txt", text=f"{image} {labels}\n")
        touch(tmp_path, f"images/{image}")
    manifest = sources.index(tmp_path)
    assert sources.detect(tmp_path) == "nih"
    found = [[FINDINGS[k] for k in np.flatnonzero(row)] for row in manifest.label_matrix()]
    assert found == [["Cardiomegaly"], ["Hernia"]]
    assert manifest.column("split") == ["train", "test"]
    assert manifest.column("patient_id") == ["nih-00000001", "nih-00000002"]
    touch(tmp_path, "val_official.txt", text="00000003_000.png 1 0\n")
    with pytest.raises(SpcxrError, match=r"gives 00000003_000.png 2 labels"):
        sources.index(tmp_path)


@pytest.mark.parametrize(
    ("name", "table", "column"),
    [
        ("chexpert", "train.csv", "Frontal/Lateral"),
        ("mimic", "mimic-cxr-2.0.0-metadata.csv.gz", "ViewPosition"),
        ("mimic", "mimic-cxr-2.0.0-chexpert.csv.gz", "Pneumonia"),
        ("rsna", "stage_2_train_labels.csv", "Target"),
        ("rsna", "stage_2_detailed_class_info.csv", "class"),
        ("siim", "train-rle.csv", "EncodedPixels"),
        ("vindr", "train.csv", "rad_id"),
        ("nih", "Data_Entry_2017_v2020.csv", "View Position"),
        ("covid-chestxray", "metadata.csv", "finding"),
    ],
)
def test_a_missing_column_is_named_with_its_file(tmp_path, name, table, column):
    root = MAKERS[name](tmp_path)
    file = root / table
    packed = file.suffix == ".gz"
    text = (gzip.decompress(file.read_bytes()) if packed else file.read_bytes()).decode()
    head, _, rest = text.partition("\n")
    assert column in head
    made = (head.replace(column, "renamed") + "\n" + rest).encode()
    file.write_bytes(gzip.compress(made) if packed else made)
    with pytest.raises(SpcxrError, match=f"{table}: no column '{column}'"):
        sources.index(root, name)


@pytest.mark.parametrize("name", ["chexpert", "mimic", "rsna", "siim", "vindr", "covidx", "jsrt"])
def test_prepare(tmp_path, radiographs, name):
    """From the set as downloaded to a store whose splits cross no patient."""
    root = MAKERS[name](tmp_path / "set")
    draw(
        root,
        lambda pixels, file: radiographs.make(pixels, PatientID=file.stem).save_as(
            file, enforce_file_format=False
        ),
        side=1024 if name == "siim" else 64,
    )
    if name == "siim":  # half of the pixels, counted down the columns: the left half
        (root / "train-rle.csv").write_text(f"ImageId, EncodedPixels\n{SIIM[0]}, 0 {1024 * 512}\n")
    config = prepare.PrepareConfig(
        sources=(str(root),), out=str(tmp_path / "store"), size_px=32, workers=0
    )
    store = Store.open(prepare.run(config))
    manifest = store.manifest
    index = sources.index(root, name)
    assert len(store) == len(index)
    assert manifest.labels == index.labels
    assert all(manifest.column("patient_id"))
    pairs = set(zip(manifest.patients, manifest.column("split"), strict=True))
    assert len(pairs) == len(np.unique(manifest.patients))
    assert not (Path(store.path) / "rejected.csv").read_text().splitlines()[1:]
    if name == "siim":
        assert store.masks(np.array([0]))[0].tolist() == [[1] * 16 + [0] * 16] * 32
    if name == "jsrt":
        assert store.images(np.array([0]))[0, 0, 0] > 245  # white above, as on the film
        assert store.masks(np.array([2]))[0].mean() == pytest.approx(
            2 * 400 * 200 / 1024**2, abs=0.02
        )


@pytest.mark.shared
def test_rsna_with_a_real_file(tmp_path, shared_data):
    """Who was imaged and how comes from the file's own header."""
    image = "16d7f894-55d7-4d95-8957-d18987f0e981"
    text = f"patientId,x,y,width,height,Target\n{image},100,200,300,400,1\n"
    touch(tmp_path, "set/stage_2_train_labels.csv", text=text)
    touch(tmp_path, f"set/stage_2_train_images/{image}.dcm")
    real = (shared_data / "dicom" / "rsna_pa_txrv.dcm").read_bytes()
    (tmp_path / "set" / f"stage_2_train_images/{image}.dcm").write_bytes(real)
    config = prepare.PrepareConfig(
        sources=(str(tmp_path / "set"),), out=str(tmp_path / "store"), size_px=64, workers=0
    )
    manifest = Store.open(prepare.run(config)).manifest
    assert cells(manifest, "view", "sex", "age") == [["PA"], ["M"], [62.0]]
    assert manifest.column("patient_id") == [f"rsna-{image}"]
    assert manifest.label_matrix(["Lung Opacity"]).tolist() == [[1]]
    assert manifest.column("boxes") == ["100 200 300 400"]
