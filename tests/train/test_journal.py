import json
import logging

import pytest

from spcxr.train.journal import Journal, cut_records, read_records


def write(folder, steps, start=0):
    with Journal(folder, step=start, images_done=0, images_total=100, quiet=True) as journal:
        for step in steps:
            journal.record("train", step, {"loss": 1 / step})
            journal.advance(4, {"loss": 1 / step})
        journal.say("a line")


def test_each_step_stands_once_after_a_resume(tmp_path):
    write(tmp_path, range(1, 8))
    write(tmp_path, range(6, 10), start=5)
    assert [r["step"] for r in read_records(tmp_path)] == list(range(1, 10))
    assert (tmp_path / "train.log").read_text().count("a line") == 2
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, [1, 2])
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "ki')
    assert [r["step"] for r in read_records(tmp_path)] == [1, 2]
    cut_records(file, 2)
    assert file.read_text().endswith("}\n")


def test_records_are_on_file_at_once(tmp_path):
    with Journal(tmp_path, step=0, images_done=0, images_total=1, quiet=True) as journal:
        journal.record("val", 3, {"loss": 0.25})
        assert read_records(tmp_path) == [{"step": 3, "kind": "val", "loss": 0.25}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_null(tmp_path, value):
    with Journal(tmp_path, step=0, images_done=0, images_total=1, quiet=True) as journal:
        journal.record("train", 1, {"loss": value})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None


def test_the_logger_is_left_as_it_was(tmp_path):
    logger = logging.getLogger("spcxr")
    before = (list(logger.handlers), logger.level)
    write(tmp_path, [1])
    assert (list(logger.handlers), logger.level) == before


def test_the_bar_shows_rate_and_time_left(tmp_path, capsys):
    with Journal(tmp_path, step=5, images_done=50, images_total=100) as journal:
        journal.say("begun")
        journal.advance(50, {"loss": 0.5})
    shown = capsys.readouterr().err
    assert "begun" in shown
    assert "100/100" in shown
    assert "img/s" in shown
