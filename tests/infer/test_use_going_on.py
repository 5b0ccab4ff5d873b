"""What `spcxr predict`, `embed` and `explain` promise alike: going on, and flags."""

import csv
import errno
import fcntl
import os
import signal
import threading

import click
import pytest
from use_calls import COMMANDS, OUT, call, rows

from spcxr.cli import use
from spcxr.evaluate.thresholds import RULES
from spcxr.infer import reading, result_parts, result_table
from spcxr.infer.operating import RULE


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stopped_command_goes_on(command, untrained, png, tmp_path, monkeypatch):
    files = [png(f"{name}.png") for name in "abcdefghijkl"]
    model, out = untrained(), tmp_path / OUT[command]
    whole = tmp_path / "whole" / OUT[command]
    whole.parent.mkdir()
    flags = ("--batch-size", "1")
    assert call(command, model, files, whole, *flags).exit_code == 0
    read, real = [], reading.read_study

    def stopping(path):
        read.append(path)
        if len(read) == 4:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        return real(path)

    monkeypatch.setattr(reading, "read_study", stopping)
    run = call(command, model, files, out, *flags)
    assert run.exit_code == 130, run.output
    assert "stopped by SIGTERM with " in run.output
    assert "of 12 images done; the same command goes on from there" in run.output
    assert run.stdout == ""
    before = len(read)
    run = call(command, model, files, out, *flags)
    assert run.exit_code == 0, run.output
    assert 0 < len(read) - before < 12
    assert rows(out) == rows(whole)


@pytest.mark.parametrize(("command", "out"), [("predict", "o.csv"), ("embed", "o.csv")])
def test_a_name_may_hold_what_ends_a_line(command, out, untrained, png, tmp_path):
    names = ["a\rb.png", "c\nd.png", "e\r\nf.png"]
    files = [png(name) for name in names]
    out = tmp_path / out
    for _ in range(2 if command == "predict" else 1):  # the second time it is gone on with
        assert call(command, untrained(), files, out).exit_code == 0
        with out.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert [row["path"] for row in found] == [str(file) for file in files]
        assert all(row["status"] == "done" for row in found)


@pytest.mark.parametrize("command", COMMANDS)
def test_other_settings_are_refused(command, untrained, png, tmp_path):
    out = tmp_path / OUT[command]
    first = png("a.png")
    if command == "embed":  # finished, it is there already
        parts = out.with_name("out.parquet.parts")
        parts.mkdir()
        (parts / "settings.json").write_text("{}")
        names = "model, preprocess, mean, std, heads, precision, shapes, with_ids"
        said = f"other settings ({names}); choose another --out"
    else:
        assert call(command, untrained(), [first], out).exit_code == 0
        said = "other settings (model); choose another --out"
    model = untrained(name="other")
    config = model / "model" / "config.json"
    config.write_text(config.read_text().replace('"provenance": {}', '"provenance": {"seed": 1}'))
    run = call(command, model, [first], out)
    assert run.exit_code == 2
    assert said in run.output


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_line(command, untrained, png, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for kind in (result_table.Table, result_parts.Parts):
        monkeypatch.setattr(kind, "add", full)
    out = tmp_path / OUT[command]
    run = call(command, untrained(), [png("a.png")], out)
    assert run.exit_code == 2
    assert f"error: {out}: No space left on device; free some space\n" in run.output


@pytest.mark.parametrize(
    ("command", "out", "held"),
    [
        ("embed", "o.npz", "o.npz.parts/lock"),
        ("predict", "o.csv", "o.csv"),
        ("predict", "o.json", "o.json.parts/lock"),
        ("explain", "o", "o/explain.csv"),
    ],
)
def test_two_at_once_are_refused(command, out, held, untrained, png, tmp_path):
    lock = tmp_path / held
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        run = call(command, untrained(), [png("a.png")], tmp_path / out)
    assert run.exit_code == 2
    assert f"error: {tmp_path / out}" in run.output
    assert "another process writes here; choose another --out" in run.output


@pytest.mark.parametrize("command", ["predict", "explain"])
def test_the_rules_offered_are_those_that_are_known(command):
    (rule,) = (p for p in use.commands[command].params if p.name == "threshold_rule")
    assert set(rule.type.choices) == set(RULES)
    assert rule.default == RULE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_help(command):
    assert use.commands[command].help
    for parameter in use.commands[command].params:
        assert isinstance(parameter, click.Argument) or parameter.help, parameter.name
