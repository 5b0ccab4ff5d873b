"""Manifests as people write them: what is understood, and what is refused with row and remedy."""

import csv
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spcxr.data.manifest import Manifest, concatenate
from spcxr.data.splits import fill_splits, hash_split
from spcxr.errors import SpcxrError


def written(folder, text, name="m.csv", encoding="utf-8"):
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def test_the_fields_quirks_are_understood(tmp_path):
    """Byte-order mark, CRLF, spaces round names and cells, blank line, quoted comma, last comma."""
    text = (
        "\ufeffpath , patient_id,split,age, covid ,note,\r\n"
        'a.png, p1 ,train, 61 ,1,"one, two",\r\n'
        "\r\n"
        "b.png,p2,val,,-1,,\r\n"
        "c.png,p2,val,7.5,,,\r\n"
    )
    manifest = Manifest.read(written(tmp_path, text))
    assert manifest.labels == ("covid",)
    np.testing.assert_array_equal(manifest.label_matrix(), [[1], [-1], [np.nan]])
    assert manifest.label_matrix().dtype == np.float32
    assert manifest.column("age") == [61, None, 7.5]
    assert manifest.column("note") == ["one, two", "", ""]
    assert manifest.patients.tolist() == ["p1", "p2", "p2"]
    assert manifest.rows("val").tolist() == [1, 2]
    assert manifest.rows(("val", "train")).dtype == np.int64


def test_parquet_reads_as_the_csv_does(tmp_path):
    table = {"path": ["a.png", "b.png"], "patient_id": [17, 4], "covid": [1.0, None]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    from_parquet = Manifest.read(tmp_path / "m.parquet")
    csv_text = "path,patient_id,covid\na.png,17,1\nb.png,4,\n"
    from_csv = Manifest.read(written(tmp_path, csv_text))
    assert from_parquet.table.equals(from_csv.table)


def test_text_label_becomes_one_column_a_value(tmp_path):
    manifest = Manifest.read(
        written(tmp_path, "path,label\na,covid\nb,normal\nc,\nd,covid|edema\n")
    )
    assert manifest.labels == ("covid", "edema", "normal")
    nan = np.nan
    expected = [[1, 0, 0], [0, 0, 1], [nan, nan, nan], [1, 1, 0]]
    np.testing.assert_array_equal(manifest.label_matrix(), expected)
    named = Manifest.read(tmp_path / "m.csv", labels=("normal", "covid"))
    assert named.labels == ("normal", "covid")


def test_ages_that_are_none_are_unknown_and_said(tmp_path):
    text = "path,age\na,90+\nb,old\nc,018M\nd,999\ne,120\nf,121Y\n"
    manifest = Manifest.read(written(tmp_path, text))
    assert manifest.column("age") == [90, None, 1.5, None, 120, None]
    assert "3 cells of column 'age' are no age up to 120: unknown" in manifest.notes[0]


def test_free_text_and_numbers_are_no_labels(tmp_path):
    manifest = Manifest.read(written(tmp_path, "path,width,empty,x\na,512,,0\nb,1,,1\n"))
    assert manifest.labels == ("x",)


REFUSED = {
    "image,label\na,1\n": "no column 'path'; rename one of its columns: image, label",
    "path;label\na;1\n": "separated by semicolons; save it with commas",
    "path\tlabel\na\t1\n": "separated by tabs; save it with commas",
    "path,x\n": "no rows below the header",
    "": "no rows below the header",
    "path,x\na,1\nb,1,2\n": "row 3 has 3 cells, the header 2",
    "path,x,x\na,1,1\n": "column 'x' stands twice",
    "path,,x\na,q,1\n": "column 2 has no name",
    "path,x\na,1\n,0\n": "row 3 has no path",
    "path,x\na,1\n../b,0\n": "row 3, column 'path': ../b leaves the root",
    "path,x\n/etc/passwd,0\n": "row 2, column 'path': /etc/passwd leaves the root",
    "path,mask_path\na,../m.png\n": "row 2, column 'mask_path': ../m.png leaves the root",
    "path,x\na,1\nb,0\na,1\n": "rows 2 and 4 are the same image",
    "path,x\na,1\n./a,1\n": "rows 2 and 3 are the same image",
    "path,box_top\na,1\n": "'box_top' is one that prepare writes",
    "path,label,covid\na,covid,1\nb,x,0\n": "'covid' is both a column and a value of 'label'",
    "path,label\na,flu\nb,Edema\nc,x|edema\n": "differ in case only: 'Edema' (row 3) and 'edema'",
}


@pytest.mark.parametrize("text", REFUSED, ids=list(REFUSED.values()))
def test_refusals_name_row_and_remedy(tmp_path, text):
    with pytest.raises(SpcxrError) as caught:
        Manifest.read(written(tmp_path, text))
    assert REFUSED[text] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "m.csv") in str(caught.value)


def test_labels_that_differ_in_case_only_are_noted(tmp_path):
    """Two columns may be two readings (NIH's Pneumonia, ours); of both named nothing is said."""
    text = "path,label,Flu,FLU,x\na,edema,1,0,1\nb,flu,0,0,0\n"
    file = written(tmp_path, text)
    assert Manifest.read(file).notes == (
        f"{file}: labels 'Flu' and 'FLU' and 'flu' differ in case only and are learned as 3; "
        "choose with --labels, or rename one",
    )
    assert Manifest.read(file, labels=("Flu", "flu")).notes == ()
    one, two = (
        Manifest.from_columns({"path": [name], name: ["1"]}, root=".") for name in ("a", "A")
    )
    assert concatenate([one, one]).notes == ()
    assert "labels 'a' and 'A' differ" in concatenate([one, two]).notes[0]


def test_a_class_spelt_two_ways_is_no_matter_where_it_is_not_learned(tmp_path):
    file = written(tmp_path, "path,label,covid\na,Flu,1\nb,flu,0\n")
    assert Manifest.read(file, labels=("covid",)).labels == ("covid",)
    for named in ("label", "flu"):
        with pytest.raises(SpcxrError, match=r"'Flu' \(row 2\) and 'flu' \(row 3\); spell"):
            Manifest.read(file, labels=(named,))


def test_free_text_is_no_class_even_when_it_is_named(tmp_path):
    rows = "\n".join(f"{i}.png,text {i},{i % 2}" for i in range(201))
    file = written(tmp_path, f"path,label,covid\n{rows}\n")
    for named in ((), ("label",), ("text 7",)):
        with pytest.raises(SpcxrError, match="'label' holds 201 different values; name other"):
            Manifest.read(file, labels=named)
    assert Manifest.read(file, labels=("covid",)).labels == ("covid",)


def test_a_label_cell_that_is_none_is_refused_when_the_column_is_named(tmp_path):
    file = written(tmp_path, "path,covid\na,1\nb,yes\n")
    assert Manifest.read(file).labels == ()
    with pytest.raises(SpcxrError, match="row 3, column 'covid' holds 'yes'; a label is 1, 0, -1"):
        Manifest.read(file, labels=("covid",))
    with pytest.raises(SpcxrError, match="no label column 'flu'; columns that could be: covid"):
        Manifest.read(file, labels=("flu",))


def test_not_text_at_all(tmp_path):
    with pytest.raises(SpcxrError, match="not a UTF-8 CSV"):
        Manifest.read(written(tmp_path, "path,é\na,1\n", encoding="latin-1"))
    (tmp_path / "m.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(SpcxrError, match="not a readable Parquet file"):
        Manifest.read(tmp_path / "m.parquet")
    with pytest.raises(SpcxrError, match="no such file"):
        Manifest.read(tmp_path / "absent.csv")


def test_a_patient_on_both_sides_is_refused_without_a_name(tmp_path):
    file = written(tmp_path, "path,patient_id,split\na,Smith,train\nb,Lee,val\nc,Smith,val\n")
    with pytest.raises(SpcxrError, match="rows 2 and 4 are one patient in two splits") as caught:
        Manifest.read(file)
    assert "Smith" not in str(caught.value)


def test_training_splits_may_share_a_patient(tmp_path):
    text = "path,patient_id,split\na,p,train\nb,p,pretrain\nc,p,extra_train\nd,p,dev\n"
    assert len(Manifest.read(written(tmp_path, text))) == 4


@pytest.mark.parametrize("split", ["test_of_training", "holdout", "external_train", "Validation"])
def test_a_split_is_held_out_by_how_its_name_begins(tmp_path, split):
    text = f"path,patient_id,split\na,p,dev\nb,p,{split}\n"
    with pytest.raises(SpcxrError, match="one patient in two splits"):
        Manifest.read(written(tmp_path, text))


def test_links_that_leave_the_root_are_refused(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    (outside / "secret.png").touch()
    (inside / "real.png").touch()
    os.symlink(outside / "secret.png", inside / "file.png")
    os.symlink(outside, inside / "folder")
    os.symlink(inside / "real.png", inside / "alias.png")
    for path in ("file.png", "folder/secret.png"):
        with pytest.raises(SpcxrError, match="leaves the root"):
            Manifest.read(written(inside, f"path\n{path}\n"))
    absolute = f"path\nalias.png\n{inside / 'real.png'}\n"
    assert Manifest.read(written(inside, absolute)).column("path") == ["alias.png", "real.png"]
    elsewhere = written(outside, "path\nreal.png\n")
    moved = Manifest.read(elsewhere, root=inside)
    assert moved.column("source_root") == [str(inside)]


def test_two_masks_of_one_image_are_two_rows(tmp_path):
    manifest = Manifest.read(written(tmp_path, "path,mask_path\na,m1.png\na,m2.png\n"))
    assert manifest.column("mask_path") == ["m1.png", "m2.png"]


def test_splits_by_hash_depend_on_the_patient_alone():
    patients = [f"p{i}" for i in range(4000)]
    splits = fill_splits(patients, [""] * 4000).to_pylist()
    shares = [splits.count(name) / 4000 for name in ("train", "val", "test")]
    np.testing.assert_allclose(shares, (0.7, 0.15, 0.15), atol=0.02)
    assert fill_splits(patients[::-1], [""] * 4000).to_pylist()[::-1] == splits
    assert fill_splits(patients, [""] * 4000, seed=1).to_pylist() != splits
    with pytest.raises(SpcxrError, match="sum to 1"):
        hash_split("p", (0.5, 0.5, 0.5))


def test_settled_keeps_given_splits_and_says_what_it_did():
    columns = {"path": ["a", "b", "c"], "patient_id": ["p", "p", ""], "split": ["test", "", ""]}
    manifest = Manifest.from_columns(columns, root=".").settled((1, 0, 0), seed=3)
    assert manifest.column("split") == ["test", "test", "train"]
    assert manifest.notes == (
        "2 rows had no split: train/val/test 1/0/0 by patient hash, seed 3",
        "1 rows have no patient_id: each counts as a patient of its own",
    )


def test_with_nothing_to_test_on_all_rows_are_for_training():
    columns = {"path": [f"{i}" for i in range(40)]}
    blank = {**columns, "covid": [""] * 40}
    for bare in (columns, blank):
        labels = ["covid"] if "covid" in bare else []
        made = Manifest.from_columns(bare, root=".", labels=labels).settled()
        assert made.splits == ("train",)
        assert "all 40 rows are in split train; give --split-ratios" in made.notes[0]
        told = Manifest.from_columns(bare, root=".").settled((0.5, 0.25, 0.25))
        assert set(told.splits) == {"train", "val", "test"}
    for name, cell in (("covid", "1"), ("mask_path", "m.png"), ("split", "train")):
        one = Manifest.from_columns({**columns, name: [""] * 39 + [cell]}, root=".").settled()
        assert set(one.splits) == {"train", "val", "test"}


def test_files_of_one_name_in_two_sources_are_two_patients(tmp_path):
    sides = []
    for name, split in (("x", "train"), ("y", "test")):
        (tmp_path / name).mkdir()
        columns = {"path": ["1.png"], "split": [split]}
        sides.append(Manifest.from_columns(columns, root=tmp_path / name))
    assert concatenate(sides).settled().column("split") == ["train", "test"]


def test_concatenate_refuses_a_label_that_is_text_elsewhere(tmp_path):
    a = Manifest.from_columns({"path": ["a"], "stage": ["1"]}, root=".")
    b = Manifest.from_columns({"path": ["b"], "stage": ["late"]}, root=".")
    with pytest.raises(SpcxrError, match="'stage' is a label in one source and text in another"):
        concatenate([a, b])


def test_select_write_read_round_trip(tmp_path):
    columns = {"path": ["a", "b", "c"], "covid": ["1", "", "-1"], "extra": ["x", "y", "z"]}
    manifest = Manifest.from_columns(columns, root=tmp_path).select([2, 0])
    manifest.write(tmp_path / "m.parquet")
    again = Manifest.read_stored(tmp_path / "m.parquet")
    assert again.labels == ("covid",)
    assert again.column("extra") == ["z", "x"]
    np.testing.assert_array_equal(again.label_matrix(["covid"]), [[-1], [1]])
    with pytest.raises(SpcxrError, match="no label 'flu'; the manifest's labels: covid"):
        again.label_matrix(["flu"])
    with pytest.raises(SpcxrError, match="column 'extra' holds 'z' for c: a label is 1, 0, -1"):
        again.label_matrix(["extra"])
    flu = Manifest.from_columns(columns | {"flu": ["1", "0", ""]}, root=tmp_path, labels=["covid"])
    with pytest.raises(SpcxrError, match=r"column 'flu' was left out: .* with --labels"):
        flu.label_matrix(["flu"])


def test_the_real_manifests(shared_data):
    """Row counts, labels and splits of the project's own tables, against the csv module."""
    labels = {
        "cls": {"covid", "normal", "pneumonia"},
        "seg": {"ARDS", "covid", "normal", "pneumonia", "tuberculosis"},
        "ped": {"normal", "pneumonia"},
        "drift": {"covid", "normal", "pneumonia"},
        "unlabeled": {"covid", "normal", "pneumonia"},
    }
    for name, expected in labels.items():
        file = shared_data / f"{name}_manifest.csv"
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = list(csv.DictReader(stream))
        manifest = Manifest.read(file)
        assert len(manifest) == len(rows), name
        assert expected <= set(manifest.labels), name
        covid = [float(r["label"] == "covid") if r["label"] else np.nan for r in rows]
        if "covid" in expected:
            np.testing.assert_array_equal(manifest.label_matrix(["covid"])[:, 0], covid)
    multi = Manifest.read(shared_data / "multilabel_manifest.csv")
    nih = {name for name in multi.labels if name[0].isupper()}
    assert len(nih) == 14
    assert multi.label_matrix(["Hernia"]).mean() < 0.1


def test_a_column_that_is_almost_a_label_is_noted(tmp_path):
    """One typing error among labels is said; free text, measures and named labels are not."""
    rows = [f"{i}.png,{i % 2},{i % 7},{'some text' if i % 5 else '1'}" for i in range(20)]
    rows[13] = "13.png,O,1,x"
    file = written(tmp_path, "path,covid,count,note\n" + "\n".join(rows))
    manifest = Manifest.read(file)
    assert manifest.labels == ()
    assert manifest.notes == (
        f"{file}: column 'covid' is not taken as a label: row 15 holds 'O' "
        "(19 of 20 cells are 1, 0 or -1); mend its cells if it is one",
    )
    with pytest.raises(SpcxrError, match="row 15, column 'covid' holds 'O'"):
        Manifest.read(file, labels=("covid",))


def test_names_of_splits_are_read_in_lower_case(tmp_path):
    file = written(tmp_path, "path,split\na,Train\nb,test\nc,TEST\nd,\n")
    manifest = Manifest.read(file)
    assert manifest.column("split") == ["train", "test", "test", ""]
    assert manifest.notes == (f"{file}: names of splits are read in lower case",)
    assert manifest.rows("Test").tolist() == [1, 2]
    assert Manifest.read(written(tmp_path, "path,split\na,test\n")).notes == ()


def test_backslashes_in_paths_are_refused_unless_a_file_is_called_so(tmp_path):
    for text, column in (
        ("path\na\\b.png\n", "path"),
        ("path,mask_path\na,m\\a.png\n", "mask_path"),
    ):
        with pytest.raises(SpcxrError, match=f"row 2, column '{column}': .* has backslashes"):
            Manifest.read(written(tmp_path, text))
    (tmp_path / "a\\b.png").touch()
    assert Manifest.read(written(tmp_path, "path\na\\b.png\n")).column("path") == ["a\\b.png"]


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """A manifest of 50 rows in row groups of 8, and the same as it is read from its file."""
    rng = np.random.default_rng(0)
    columns = {
        "path": [f"{i}.png" for i in range(50)],
        "patient_id": [f"{'x' if i == 31 else 'p'}{i}" for i in range(50)],
        "split": [["", "train", "val-a", "Test"][i] for i in rng.integers(0, 4, 50)],
        "site": [f"site {i // 20}" for i in range(50)],
        "covid": [["1", "0", ""][i] for i in rng.integers(0, 3, 50)],
    }
    made = Manifest.from_columns(columns, root=tmp_path)
    monkeypatch.setattr("spcxr.data.manifest.ROWS_IN_A_GROUP", 8)
    monkeypatch.setattr("spcxr.data.stored_table.ROWS_AT_ONCE", 7)
    made.write(tmp_path / "m.parquet")
    return made, Manifest.read_stored(tmp_path / "m.parquet")


def test_a_stored_manifest_answers_as_the_one_in_memory(stored):
    made, read = stored
    assert len(read) == len(made) == 50
    assert read.splits == made.splits
    assert read.labels == made.labels
    for splits in ("train", "VAL-A", ["test", ""], "none"):
        rows = made.rows(splits)
        np.testing.assert_array_equal(
            rows, np.flatnonzero(np.isin(made.column("split"), list_of(splits)))
        )
        np.testing.assert_array_equal(read.rows(splits), rows)
        np.testing.assert_array_equal(read.row_set(splits)[np.arange(len(rows))], rows)
    np.testing.assert_array_equal(read.label_matrix(), made.label_matrix())
    np.testing.assert_array_equal(read.patients, made.patients)
    assert read.rows_of_patients("x").tolist() == made.rows_of_patients("x").tolist() == [31]
    assert read.column("path") == made.column("path")
    assert read.select([7, 3]).column("path") == ["7.png", "3.png"]
    assert read.table.equals(made.table)


def list_of(splits):
    return [name.lower() for name in ([splits] if isinstance(splits, str) else splits)]


def test_row_sets_part_the_rows_by_site(stored):
    made, read = stored
    for manifest in (made, read):
        parts = manifest.row_sets("train", by="site")
        sites = np.array(made.column("site"))
        for name, part in parts.items():
            expected = [row for row in made.rows("train").tolist() if sites[row] == name]
            assert part[np.arange(len(part))].tolist() == expected
        assert sum(map(len, parts.values())) == len(made.rows("train"))


def test_a_stored_manifest_reads_only_the_columns_that_are_asked_for(stored, monkeypatch):
    _, read = stored
    asked = []
    whole = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda self, **o: asked.append(o["columns"]) or whole(self, **o),
    )
    monkeypatch.setattr(pq.ParquetFile, "read", None)
    len(read), read.splits, read.rows("train"), read.row_set("train"), read.rows_of_patients("x")
    assert asked == [["split"], ["split"], ["split"], ["patient_id"]]
