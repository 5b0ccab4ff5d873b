import os
import subprocess
import sys

import pytest

from spcxr.errors import SpcxrError
from spcxr.train.run_folder import open_run

SETTINGS = {"out": "a", "epochs": 2, "scale": (0.5, 1.0), "init": None, "resume": "auto"}


def begin(folder, settings=SETTINGS, recipe="pretrain", resume="auto"):
    with open_run(folder, settings, recipe=recipe, resume=resume) as made:
        (made / "metrics.jsonl").touch()
    return made


def test_the_settings_are_written_as_a_config_file(tmp_path):
    text = (begin(tmp_path / "deep" / "a") / "config.yaml").read_text()
    assert text.splitlines()[:3] == ["# spcxr-train pretrain", "out: a", "epochs: 2"]


def test_the_same_run_is_gone_on_with(tmp_path):
    begin(tmp_path / "a")
    moved = {**SETTINGS, "out": "elsewhere/a", "scale": [0.5, 1.0]}
    assert begin(tmp_path / "a", moved) == tmp_path / "a"


@pytest.mark.parametrize(
    ("settings", "recipe", "resume", "said"),
    [
        ({**SETTINGS, "epochs": 3}, "pretrain", "auto", r"other settings \(epochs 2, now 3\)"),
        ({**SETTINGS, "new": 1}, "pretrain", "auto", "new unset, now 1"),
        (SETTINGS, "classify", "auto", "holds a 'pretrain' run, not a 'classify' run"),
        (SETTINGS, "pretrain", "never", "holds a run; choose another --out, or --resume auto"),
    ],
)
def test_another_run_is_refused_and_left_alone(tmp_path, settings, recipe, resume, said):
    begin(tmp_path / "a")
    before = (tmp_path / "a" / "config.yaml").read_text()
    with pytest.raises(SpcxrError, match=said) as caught:
        begin(tmp_path / "a", settings, recipe, resume)
    assert str(tmp_path / "a") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a" / "config.yaml").read_text() == before


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SpcxrError, match=r"holds 'notes.txt' and no run; choose another --out"):
        begin(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(SpcxrError, match="is a file"):
        begin(tmp_path / "notes.txt")


def test_a_config_yaml_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("services:\n  web: {}\n")
    (tmp_path / "data").mkdir()
    with pytest.raises(SpcxrError, match=r"a config\.yaml that is no run's"):
        begin(tmp_path)
    (tmp_path / "config.yaml").write_text("# spcxr-train pretrain\na: [")
    with pytest.raises(SpcxrError, match="not readable as YAML"):
        begin(tmp_path)


def test_a_run_refused_at_once_leaves_no_folder(tmp_path):
    with (
        pytest.raises(SpcxrError, match="no such store"),
        open_run(tmp_path / "a", SETTINGS, recipe="pretrain"),
    ):
        raise SpcxrError("no such store")
    assert not (tmp_path / "a").exists()
    begin(tmp_path / "a", {**SETTINGS, "epochs": 7})


def test_a_run_killed_at_once_does_not_block_its_place(tmp_path):
    made = begin(tmp_path / "a")
    (made / "metrics.jsonl").unlink()
    begin(tmp_path / "a", {**SETTINGS, "epochs": 7})
    assert "epochs: 7" in (made / "config.yaml").read_text()


@pytest.mark.parametrize("store", ["store", "store.partial", "store-0", "store-12.partial"])
def test_prepared_images_do_not_fix_the_settings_and_are_kept(tmp_path, store):
    for epochs in (2, 7):
        settings = {**SETTINGS, "epochs": epochs}
        made = tmp_path / "a"
        with open_run(made, settings, recipe="pretrain"):
            (made / store).mkdir(exist_ok=True)
            (made / store / "images").touch()
        assert (made / store / "images").exists()
        assert f"epochs: {epochs}" in (made / "config.yaml").read_text()
    begin(tmp_path / "a", {**SETTINGS, "epochs": 3})
    with pytest.raises(SpcxrError, match="other settings"):
        begin(tmp_path / "a", {**SETTINGS, "epochs": 4})


def test_a_config_yaml_of_somebody_else_alone_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("services: {}\n")
    with pytest.raises(SpcxrError, match=r"a config\.yaml that is no run's"):
        begin(tmp_path)
    assert (tmp_path / "config.yaml").read_text() == "services: {}\n"


def test_two_processes_do_not_share_a_run(tmp_path):
    code = (
        "from spcxr.train.run_folder import open_run\n"
        f"with open_run({str(tmp_path / 'a')!r}, {{'x': 1}}, recipe='pretrain'): pass"
    )
    with open_run(tmp_path / "a", {"x": 1}, recipe="pretrain"):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode == 1
    assert "another process is at work on this run" in other.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        begin(tmp_path / "a")
