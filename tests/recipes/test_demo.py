"""The demo, as small as it can be: every chapter runs, and the page holds what it promises."""

import json

import pytest

from spcxr.config import ConfigError
from spcxr.recipes.demo import DemoConfig, run

SMALL = {
    "phantom_count": 60,
    "drawn_px": 128,
    "image_px": 32,
    "pretrain_epochs": 2,
    "classify_epochs": 2,
    "segment_epochs": 2,
    "n_bootstrap": 100,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert run(DemoConfig(out=str(folder), **SMALL)) == folder / "report.html"
    return folder


def test_the_page_holds_every_part(demo):
    page = (demo / "report.html").read_text()
    for promised in (
        "Drawn phantoms, not patients",
        "pretrained against scratch",
        "Reconstruction loss",
        "original, corrupted, reconstructed, mask",
        "training loss",
        "ROC of",
        "95 % intervals",
        "Confusion matrix",
        "Outlines of lung",
        "the other site",
        "Seconds on this machine",
    ):
        assert promised in page, promised
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script" not in page


def test_the_summary_is_whole(demo):
    summary = json.loads((demo / "summary.json").read_text())
    assert summary["phantoms"] is True
    for task, metric in (("classify", "macro_auroc"), ("segment", "dice")):
        for start in ("pretrained", "scratch"):
            for found in summary["results"][task][start].values():
                assert 0 <= found[metric]["low"] <= found[metric]["high"] <= 1
        assert set(summary["results"][task]["gain"]) == {"the training site", "the other site"}
    assert summary["seconds"]["pretrain"] > 0


def test_a_finished_demo_does_nothing_twice(demo):
    before = (demo / "pretrain" / "metrics.jsonl").read_bytes()
    run(DemoConfig(out=str(demo), **SMALL))
    assert (demo / "pretrain" / "metrics.jsonl").read_bytes() == before


def test_settings_that_cannot_be_are_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ConfigError, match="image_px 100"):
        DemoConfig(out=str(tmp_path / "demo"), image_px=100)
    assert not (tmp_path / "demo").exists()
