"""The learning curve reads what runs of `segment` and `classify` write, and draws it."""

import json

import pytest

from spcxr.errors import SpcxrError
from spcxr.recipes.learning_curve import learning_curve_section, read_point


def write_run(folder, labelled, tested=4, **structures):
    folder.mkdir(parents=True)
    test = {name: {"dice": {"value": value}} for name, value in structures.items()}
    facts = {"rows": {"train": labelled, "val": 4, "test": tested}, "test": test}
    (folder / "metrics.json").write_text(json.dumps(facts))
    return folder


def test_runs_of_several_seeds_are_so_many_points(tmp_path):
    for seed, value in enumerate((0.8, 0.9)):
        write_run(tmp_path / "few" / f"seed-{seed}", 5, lung=value)
    many = write_run(tmp_path / "many", 50, lung=0.95)
    scratch = write_run(tmp_path / "scratch", 5, lung=0.4)
    made = learning_curve_section({"pretrained": [tmp_path / "few", many], "scratch": [scratch]})
    (table,) = made.tables
    assert table.columns == ["labelled", "pretrained", "scratch"]
    assert table.rows[0] == ["5", "0.850 (0.800 to 0.900, 2 runs)", "0.400 (1 run)"]
    assert table.rows[1] == ["50", "0.950 (1 run)", None]
    (picture,) = made.pictures
    assert "pretrained: 0.850 with 5, 0.950 with 50; scratch: 0.400 with 5" in picture.alt
    assert "labelled training images" in picture.svg


def test_the_mean_over_structures_and_of_classes(tmp_path):
    assert read_point(write_run(tmp_path / "a", 7, lung=0.5, heart=0.7), "dice").value == 0.6
    folder = write_run(tmp_path / "b", 7)
    facts = {"rows": {"train": 7, "test": 4}, "test": {"overall": {"macro_auroc": {"value": 0.8}}}}
    (folder / "metrics.json").write_text(json.dumps(facts))
    assert read_point(folder, "macro_auroc").value == 0.8


def test_runs_that_cannot_be_read_are_one_line(tmp_path):
    with pytest.raises(SpcxrError, match="give the folders of finished runs"):
        learning_curve_section({"pretrained": [tmp_path / "nowhere"]})
    run = write_run(tmp_path / "run", 5, lung=0.5)
    with pytest.raises(SpcxrError, match="no figure 'auroc'; it has dice"):
        learning_curve_section({"pretrained": [run]}, "auroc")
    (run / "metrics.json").write_text('{"rows": {"train": 5, "test": 0}}')
    with pytest.raises(SpcxrError, match="no figures of test rows"):
        learning_curve_section({"pretrained": [run]})
    fewer = write_run(tmp_path / "fewer", 5, 3, lung=0.5)
    more = write_run(tmp_path / "more", 5, lung=0.5)
    with pytest.raises(SpcxrError, match="tested on 3 and 4 rows"):
        learning_curve_section({"pretrained": [fewer], "scratch": [more]})
    with pytest.raises(SpcxrError, match="a series without a run"):
        learning_curve_section({"pretrained": []})
