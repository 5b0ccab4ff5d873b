"""`evaluate` refuses what would be measured twice, against itself, or not at all."""

import re

import numpy as np
import pytest

from spcxr.errors import SpcxrError
from spcxr.infer.predict import load_trained
from spcxr.recipes.evaluate import EvaluateConfig, run
from spcxr.recipes.measure import TestSet, true_labels


def squares(there):
    return {"square": [str(int(t) ^ (i % 5 == 0)) for i, t in enumerate(there)]}


def config(model, out, *data, **given):
    given = {"n_bootstrap": 100, "device": "cpu", "precision": "fp32", "splits": ("all",), **given}
    return EvaluateConfig(run=str(model), data=tuple(map(str, data)), out=str(out), **given)


@pytest.mark.parametrize("written", ["store", "./store", "store/"])
def test_data_named_twice_would_be_one_set_of_twice_the_rows(tmp_path, monkeypatch, written):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpcxrError, match=r"data names .*store twice; name each once"):
        config("run", "out", "store", "other", written)


def test_a_split_named_twice_is_refused():
    with pytest.raises(SpcxrError, match="splits names test twice"):
        config("run", "out", "store", splits=("test", "val", "test"))


def test_the_run_is_no_rival_of_its_own_model_folder(make_store, task_model, tmp_path):
    store, model = make_store(squares), task_model("run", ["square"])
    with pytest.raises(SpcxrError, match=r"run/model: is the model of .*run itself"):
        run(config(model, tmp_path / "out", store.path, against=str(model / "model")))


def test_a_split_that_no_data_have_is_refused(make_store, task_model, tmp_path):
    store, model = make_store(squares), task_model("run", ["square"])
    with pytest.raises(SpcxrError, match="no data have a row in split drift; leave it out"):
        run(config(model, tmp_path / "out", store.path, splits=("test", "drift")))


@pytest.mark.parametrize("labels", [("empty", "square"), ()])
def test_a_threshold_that_nothing_would_read_is_refused(make_store, task_model, tmp_path, labels):
    model = task_model("run", labels, multilabel=False)
    store = make_store(lambda there: {"label": ["empty", "square"] * 32}, masked=True)
    with pytest.raises(SpcxrError, match="leave out --threshold"):
        run(config(model, tmp_path / "out", store.path, threshold=0.3))


def test_a_column_of_a_labels_name_with_other_cells_is_named(make_store, task_model, tmp_path):
    """Not taken for a label for its ``yes``, it would be called lacking, or absent from all."""
    cells = {"square": ["1", "0"] * 32, "old": ["1", "yes"] * 32}
    model, store = task_model("run", ["square", "old"]), make_store(cells)
    assert store.manifest.labels == ("square",)
    said = "column 'old' holds 'yes' for 001.png; a label is 1, 0, -1 (uncertain) or blank"
    with pytest.raises(SpcxrError, match=re.escape(said)):
        run(config(model, tmp_path / "out", store.path))


def test_a_label_column_left_out_of_the_store_is_unknown(make_store, task_model, monkeypatch):
    """Its cells are labels; who prepared the images chose others."""
    cells = {"square": ["1", "0"] * 32, "old": ["1", "", "-1", "0"] * 16}
    model, store = task_model("run", ["square", "old"]), make_store(cells)
    monkeypatch.setattr(store, "manifest", store.manifest.with_labels(["square"]))
    found = true_labels(TestSet("all", "here", store, np.arange(64)), load_trained(model))
    assert np.isnan(found[:, 1]).all()
    assert found[:2, 0].tolist() == [1, 0]


def test_a_remedy_of_prepare_is_said_to_be_one(task_model, tmp_path):
    (tmp_path / "sheet").mkdir()
    table = tmp_path / "sheet" / "a.csv"
    table.write_text("path,label\n../a.png,square\n")
    model = task_model("run", ["square"])
    with pytest.raises(SpcxrError, match="--root: of spcxr-train prepare, whose store can be"):
        run(config(model, tmp_path / "out", table))
