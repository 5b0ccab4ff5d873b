"""Prepare on real files of many kinds: rejects, resumes, joins, never loses or half-writes."""

import csv
import os
import shutil
import signal
import time

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from spcxr.config import ConfigError
from spcxr.data import pool
from spcxr.data.pieces import FILES_PER_PIECE
from spcxr.data.presets import Preprocess
from spcxr.data.store import Store
from spcxr.data.study import read_study
from spcxr.errors import Interrupted, NothingDone, SpcxrError
from spcxr.recipes import prepare
from spcxr.recipes.prepare import PrepareConfig, parse_shard, run

SIZE = 16


def picture(file, seed, shape=(24, 40)):
    """A smooth image with many grey levels, different for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]]
    waves = np.sin(x / (2 + rng.random() * 9)) + np.cos(y / (2 + rng.random() * 9))
    pixels = ((waves + 2) / 4 * 255).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return pixels


def dicom(file, patient="p", view="PA", shape=(24, 40)):
    pixels = (np.arange(shape[0] * shape[1]).reshape(shape) * 4 % 4096).astype(np.uint16)
    made = pydicom.Dataset()
    made.SOPClassUID, made.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    made.Modality, made.BodyPartExamined, made.ViewPosition = "DX", "CHEST", view
    made.PatientID, made.PatientAge, made.PatientSex = patient, "061Y", "F"
    made.set_pixel_data(pixels, "MONOCHROME2", 12)
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(file, enforce_file_format=True)


def config(source, out, **settings):
    given = {"size_px": SIZE, "workers": 0, **settings}
    sources = (str(source),) if not isinstance(source, (list, tuple)) else tuple(map(str, source))
    return PrepareConfig(sources=sources, out=str(out), **given)


def rejected(store):
    with (store / "rejected.csv").open(newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["path", "reason"]
    return {os.path.basename(path): reason for path, reason in rows}


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of three pieces of images (the last one short)."""
    monkeypatch.setattr("spcxr.data.pieces.PIECES", 1)
    for i in range(2 * FILES_PER_PIECE + 5):
        picture(tmp_path / "in" / f"{i:03d}.png", i)
    return tmp_path / "in"


def test_a_folder_of_everything(tmp_path):
    """DICOM, PNG and JPEG get in; what is none of them gets a row and a reason, and no more."""
    source = tmp_path / "in"
    picture(source / "a.png", 1)
    picture(source / "b.jpg", 2)
    dicom(source / "c", patient="77", view="AP")
    (source / "zero.dcm").touch()
    (source / "text.png").write_text("not an image")
    (source / "short.png").write_bytes((source / "a.png").read_bytes()[:200])
    whole = (source / "c").read_bytes()
    (source / "short.dcm").write_bytes(whole[:-500])
    store = Store.open(run(config(source, tmp_path / "store")))
    assert store.manifest.column("path") == ["a.png", "b.jpg", "c"]
    assert store.manifest.column("patient_id") == ["", "", "77"]
    assert store.manifest.column("age") == [None, None, 61]
    assert store.manifest.column("view") == ["", "", "AP"]
    assert store.manifest.column("image_width_px") == [40, 40, 40]
    assert set(rejected(store.path)) == {"zero.dcm", "text.png", "short.png", "short.dcm"}
    expected = Preprocess(size_px=SIZE)(read_study(source / "b.jpg"))
    np.testing.assert_array_equal(store.images([1])[0], expected.pixels)
    assert [store.manifest.column(f"box_{n}")[1] for n in ("top", "height")] == [3, 10]
    assert store.facts["rejected"] == 4
    assert not (tmp_path / "store.partial").exists()


def test_one_result_whatever_the_workers(many, tmp_path):
    hashes = []
    for workers in (0, 1, 3):
        out = run(config(many, tmp_path / f"s{workers}", workers=workers))
        hashes.append(Store.open(out).facts["content_hash"])
    assert len(set(hashes)) == 1


def test_shards_join_to_the_same_store(many, tmp_path):
    (many / "zzz.png").touch()
    whole = Store.open(run(config(many, tmp_path / "whole")))
    parts = [run(config(many, tmp_path / "s", shard=f"{i}/3")) for i in (1, 2, 3)]
    assert [p.name for p in parts] == [f"s.shard-{i}-of-3" for i in (1, 2, 3)]
    joined = Store.open(run(config(parts[::-1], tmp_path / "s")))
    assert joined.facts["content_hash"] == whole.facts["content_hash"]
    assert (joined.mean, joined.std) == (whole.mean, whole.std)
    assert rejected(joined.path) == rejected(whole.path)
    before = (joined.path / "store.json").stat()
    assert run(config(parts, tmp_path / "s")) == joined.path  # already complete
    assert (joined.path / "store.json").stat() == before
    with pytest.raises(SpcxrError, match=r"other settings \(sources\)"):
        run(config(whole.path, tmp_path / "s"))
    with pytest.raises(SpcxrError, match="joining needs each of the 3 parts once"):
        run(config(parts[:2], tmp_path / "t"))
    with pytest.raises(ConfigError, match="i/n with i from 1 to n"):
        parse_shard("0/3")


def test_a_shard_does_not_split_a_patient_who_stands_in_another(tmp_path):
    """Known from the table, from the headers of both, and from neither."""
    source = tmp_path / "in"
    lines = ["path,patient_id,split,label"]
    for i in range(12):
        dicom(source / f"{i:02d}", patient=f"header{i % 3}")
        patient = f"table{i}" if i in (4, 9) else ""
        lines.append(f"{i:02d},{patient},{'drift' if i in (2, 4) else ''},x")
    lines[6] = "05,,drift,x"  # header2 as row 2
    (source / "manifest.csv").write_text("\n".join(lines).replace("table9", "table4"))
    table, settings = source / "manifest.csv", {"seed": 5, "split_ratios": (0.5, 0.5, 0)}
    whole = Store.open(run(config(table, tmp_path / "whole", **settings)))
    parts = [run(config(table, tmp_path / "s", shard=f"{i}/2", **settings)) for i in (1, 2)]
    joined = Store.open(run(config(parts, tmp_path / "s")))
    assert joined.manifest.table.equals(whole.manifest.table)
    assert [joined.manifest.column("split")[i] for i in (2, 5, 8, 11, 4, 9)] == ["drift"] * 6
    assert joined.facts["content_hash"] == whole.facts["content_hash"]
    assert sorted(joined.manifest.notes) == sorted(whole.manifest.notes)
    assert (joined.mean, joined.std) == (whole.mean, whole.std)
    with pytest.raises(SpcxrError, match="join those first"):
        run(config([parts[0], whole.path], tmp_path / "t"))
    other = run(config(table, tmp_path / "s", shard="2/2", seed=6, overwrite=True))
    with pytest.raises(SpcxrError, match="the parts differ in --split-ratios or --seed"):
        run(config([parts[0], other], tmp_path / "t"))


def test_a_folder_without_labels_is_all_for_training_unless_told_otherwise(tmp_path, capsys):
    source = tmp_path / "in"
    for i in range(20):
        picture(source / f"{i:02d}.png", i)
    store = Store.open(run(config(source, tmp_path / "s")))
    assert store.facts["splits"] == {"train": 20}
    assert "give --split-ratios to hold some out" in capsys.readouterr().err
    told = Store.open(run(config(source, tmp_path / "t", split_ratios=(0.5, 0.25, 0.25))))
    assert set(told.manifest.splits) == {"train", "val", "test"}


def test_a_store_is_not_joined_with_itself_or_a_copy(many, tmp_path):
    """Every image would count twice."""
    store = run(config(many, tmp_path / "a"))
    shutil.copytree(store, tmp_path / "b")
    for twin in (store, tmp_path / "b"):
        with pytest.raises(SpcxrError, match=r"the same images as .*a; give each store once"):
            run(config([store, twin], tmp_path / "s"))
    assert not list(tmp_path.glob("s*"))


def test_joined_stores_must_be_alike(many, tmp_path):
    a = run(config(many, tmp_path / "a"))
    b = run(config(many, tmp_path / "b", size_px=32))
    with pytest.raises(SpcxrError, match="prepared otherwise than"):
        run(config([a, b], tmp_path / "c"))


def masked(folder, mask):
    picture(folder / "a.png", 1)
    picture(folder / "b.png", 2)
    Image.fromarray(mask).save(folder / "m.png")
    (folder / "manifest.csv").write_text("path,mask_path,label\na.png,m.png,x\nb.png,,y\n")


def test_masks_follow_the_image(tmp_path):
    mask = np.zeros((24, 40), np.uint8)
    mask[:, :20] = 255
    (tmp_path / "in").mkdir()
    masked(tmp_path / "in", mask)
    store = Store.open(run(config(tmp_path / "in", tmp_path / "store")))
    got = store.masks([0, 1])
    assert (got[1] == 255).all()
    expected = Preprocess(size_px=SIZE).mask((mask > 0).astype(np.uint8))
    np.testing.assert_array_equal(got[0], expected)
    assert set(np.unique(got[0])) == {0, 1}


def test_a_mask_of_another_size_rejects_its_image(tmp_path):
    (tmp_path / "in").mkdir()
    masked(tmp_path / "in", np.zeros((24, 41), np.uint8))
    store = Store.open(run(config(tmp_path / "in", tmp_path / "store")))
    assert rejected(store.path) == {
        "a.png": "its mask m.png is 41 x 24 pixels and the image 40 x 24"
    }
    assert store.manifest.column("path") == ["b.png"]


def test_two_masks_of_one_image_become_one(tmp_path):
    sides = np.zeros((2, 24, 40), np.uint8)
    sides[0, :, :10], sides[1, :, 30:] = 255, 255
    (tmp_path / "in").mkdir()
    masked(tmp_path / "in", sides[0])
    Image.fromarray(sides[1]).save(tmp_path / "in" / "n.png")
    (tmp_path / "in" / "manifest.csv").write_text("path,mask_path\na.png,m.png|n.png\n")
    store = Store.open(run(config(tmp_path / "in", tmp_path / "store")))
    expected = Preprocess(size_px=SIZE).mask(sides.max(axis=0) // 255)
    np.testing.assert_array_equal(store.masks([0])[0], expected)


def test_an_interrupted_run_goes_on_where_it_was(many, tmp_path, monkeypatch):
    read = []

    def breaking(piece, *rest):
        if len(read) == 2 and not resumed:
            raise KeyboardInterrupt
        read.append(piece)
        original(piece, *rest)

    original, resumed = pool.make_piece, False
    monkeypatch.setattr(pool, "make_piece", breaking)
    settings = config(many, tmp_path / "s")
    with pytest.raises(Interrupted, match=r"stopped with 32 of 37 images read; the same command"):
        run(settings)
    assert not (tmp_path / "s").exists()
    with pytest.raises(SpcxrError, match="an unfinished store; run the same prepare again"):
        Store.open(tmp_path / "s.partial")
    with pytest.raises(SpcxrError, match=r"begun with other settings \(size_px\)"):
        run(config(many, tmp_path / "s", size_px=32))
    picture(many / "003.png", 99, shape=(30, 30))  # of the first piece: it must be read again
    resumed = True
    store = Store.open(run(settings))
    assert [int(p.file.name.split("-")[1]) for p in read] == [0, 1, 0, 2]
    fresh = Store.open(run(config(many, tmp_path / "fresh")))
    assert store.facts["content_hash"] == fresh.facts["content_hash"]
    assert store.manifest.column("image_height_px")[3] == 30


def test_sigterm_is_a_clean_stop(many, tmp_path, monkeypatch):
    def ask_to_stop(*rest):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(pool, "make_piece", ask_to_stop)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped with 0 of 37 images read"):
        run(config(many, tmp_path / "s"))
    assert signal.getsignal(signal.SIGTERM) is before


def test_running_it_again_does_nothing_twice(many, tmp_path, monkeypatch, capsys):
    settings = config(many, tmp_path / "s")
    run(settings)
    monkeypatch.setattr(prepare, "make_pieces", lambda *rest: pytest.fail("read again"))
    assert run(settings) == tmp_path / "s"
    assert "already complete, 37 images" in capsys.readouterr().err
    with pytest.raises(SpcxrError, match=r"made from other settings \(size_px\)"):
        run(config(many, tmp_path / "s", size_px=32))
    picture(many / "001.png", 77)
    with pytest.raises(SpcxrError, match=r"made from files that have changed since"):
        run(settings)
    assert len(Store.open(tmp_path / "s")) == 37
    assert not (tmp_path / "s.partial").exists()


def test_overwrite_replaces_a_store_and_nothing_else(many, tmp_path):
    out = run(config(many, tmp_path / "s"))
    run(config(many, out, size_px=32, overwrite=True))
    assert Store.open(out).preprocess.size_px == 32
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.yaml").write_text("model: vit_tiny\n")
    with pytest.raises(SpcxrError, match="holds something that is no store; choose another out"):
        run(config(many, other, overwrite=True))
    assert (other / "config.yaml").read_text() == "model: vit_tiny\n"


def test_bad_requests_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    picture(tmp_path / "in" / "a.png", 1)
    cases = {
        "no files in this folder": (tmp_path / "empty", tmp_path / "s", {}),
        "no such file or folder": (tmp_path / "absent", tmp_path / "s", {}),
        "cannot be written": (tmp_path / "in", tmp_path / "file" / "s", {}),
        "a file stands there": (tmp_path / "in", tmp_path / "file", {}),
        "no label 'flu'": (tmp_path / "in", tmp_path / "s", {"labels": ("flu",)}),
    }
    for message, (source, out, settings) in cases.items():
        with pytest.raises(SpcxrError, match=message) as caught:
            run(config(source, out, **settings))
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "in"]


def test_all_rejected_is_exit_code_1_and_is_tried_anew(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.png").write_text("no image")
    with pytest.raises(
        NothingDone, match=r"all 1 files were rejected, .*a.png because: "
    ) as caught:
        run(config(source, tmp_path / "s"))
    assert caught.value.exit_code == 1
    assert not (tmp_path / "s").exists()
    partial = tmp_path / "s.partial"
    assert {file.name for file in partial.rglob("*")} == {"lock", "store", "rejected.csv"}
    picture(source / "a.png", 1)
    # Other settings are welcome: there is nothing to go on from.
    assert len(Store.open(run(config(source, tmp_path / "s", size_px=32)))) == 1
    assert not partial.exists()


def test_a_patient_of_the_headers_in_two_splits_is_refused(tmp_path):
    """The table has no patients; the DICOM headers do, and they show the leak."""
    for name in ("a", "b"):
        dicom(tmp_path / "in" / name, patient="Smith")
    manifest = tmp_path / "in" / "manifest.csv"
    manifest.write_text("path,split\na,train\nb,test\n")
    with pytest.raises(SpcxrError, match="rows 2 and 3 are one patient in two splits") as caught:
        run(config(manifest, tmp_path / "s"))
    assert "Smith" not in str(caught.value)
    assert not (tmp_path / "s").exists()
    manifest.write_text("path,split\na,test\nb,\n")
    store = Store.open(run(config(manifest, tmp_path / "s")))
    assert store.manifest.column("split") == ["test", "test"]


def test_two_prepares_at_once_are_refused(many, tmp_path, monkeypatch):
    def second(*rest):
        with pytest.raises(SpcxrError, match="another prepare is at work here"):
            run(config(many, tmp_path / "s"))
        return original(*rest)

    original = prepare.make_pieces
    monkeypatch.setattr(prepare, "make_pieces", second)
    run(config(many, tmp_path / "s"))


def test_a_damaged_piece_is_made_anew(many, tmp_path, monkeypatch):
    def damaging(piece, *rest):
        original(piece, *rest)
        if "piece-000001-" in piece.file.name:
            content = bytearray(piece.file.read_bytes())
            content[len(content) // 2] ^= 0xFF
            piece.file.write_bytes(content)

    original = pool.make_piece
    with monkeypatch.context() as patch:
        patch.setattr(pool, "make_piece", damaging)
        with pytest.raises(SpcxrError, match="damaged and removed; run the same prepare again"):
            run(config(many, tmp_path / "s"))
    assert not (tmp_path / "s").exists()
    assert len(Store.open(run(config(many, tmp_path / "s")))) == 37


def test_the_real_lungs(shared_data, tmp_path):
    """Every image and mask of the project's table: sizes match, none is lost without a reason."""
    table = tmp_path / "some.csv"
    with (shared_data / "seg_manifest.csv").open(newline="", encoding="utf-8-sig") as stream:
        rows = list(csv.DictReader(stream))[::40]
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    out = run(config(table, tmp_path / "s", size_px=64, root=str(shared_data)))
    store = Store.open(out)
    assert len(store) + len(rejected(out)) == len(rows)
    assert len(store) >= len(rows) - 2
    inside = (store.masks(range(len(store))) == 1).mean(axis=(1, 2))
    assert inside.min() > 0.05
    assert inside.max() < 0.7
