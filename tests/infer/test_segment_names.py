"""`spcxr segment | predict | embed`: odd and equal names of files; results beside their inputs."""

import csv
import os
from pathlib import Path

import pytest

from spcxr.errors import SpcxrError
from spcxr.infer.embed_files import embed_files
from spcxr.infer.predict_files import predict_files
from spcxr.infer.segment_files import Wanted, segment_files


def rows(out):
    with (out / "segment.csv").open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_files_of_one_name_do_not_overwrite_each_other(drawing, png, compute, tmp_path):
    first, second = png("x/a.png"), png("y/a.png")
    model, out = drawing("lung"), tmp_path / "out"
    segment_files(model, [first], out, Wanted(overlay=False), compute)
    segment_files(model, [second], out, Wanted(overlay=False), compute)
    assert [row["name"] for row in rows(out)] == ["a", "a-2"]
    assert len(list((out / "masks").iterdir())) == 2
    assert not (out / "overlays").exists()


def test_a_row_torn_inside_a_name_of_two_lines_is_dropped(drawing, png, compute, tmp_path):
    files = [png("a.png"), png("b\nc.png")]
    model, out = drawing("lung"), tmp_path / "out"
    segment_files(model, files, out, Wanted(), compute)
    table = out / "segment.csv"
    whole = table.read_text()
    table.write_text(whole[: whole.rindex("\nc.png") + 3])
    assert segment_files(model, files, out, Wanted(), compute).done == 2
    assert table.read_text() == whole


def test_a_row_torn_behind_a_name_that_is_no_utf8(drawing, png, compute, tmp_path):
    plain = png("a.png")
    odd = Path(os.fsdecode(os.fsencode(plain.parent) + b"/caf\xe9.png"))
    plain.rename(odd)
    model, out = drawing("lung"), tmp_path / "out"
    segment_files(model, [odd], out, Wanted(), compute)
    table = out / "segment.csv"
    whole = table.read_bytes()
    table.write_bytes(whole + b"torn")
    assert segment_files(model, [odd], out, Wanted(), compute).done == 1
    assert table.read_bytes() == whole


@pytest.mark.parametrize("out", ["predict.csv", "predict.json", "embed.npz", "embed.parquet"])
def test_a_table_among_the_inputs_is_none(out, untrained, png, compute):
    """Nor is what is written beside it; a file of another suffix is."""
    folder = png(f"{Path(out).stem}.png").parent
    tool = {"predict": predict_files, "embed": embed_files}[Path(out).stem]
    for _ in range(2 if out.endswith(".csv") else 1):  # the second time, all results are there
        counts = tool(untrained(), [folder], folder / out, compute)
        assert (counts.done, counts.rejected) == (1, 0)


def test_results_among_the_inputs_are_no_inputs(drawing, png, compute, tmp_path):
    folder = png("a.png").parent
    model, out = drawing("lung"), folder / "masks of a"
    for _ in range(2):  # the second time, all results are there
        assert segment_files(model, [folder], out, Wanted(), compute).done == 1
    assert [row["name"] for row in rows(out)] == ["a"]
    with pytest.raises(SpcxrError, match=r"in: is an input, too; choose another --out"):
        segment_files(model, [folder], folder, Wanted(), compute)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        (b"caf\xe9.png", "caf"),  # Latin-1, on a file system of today
        (b"\xff.png", "_"),
        (b"m" * 255, "m" * 240),
        (b"1.2.840.10008.77", "1.2.840.10008.77"),
        (b'two\nlines, and "quotes".png', 'two\nlines, and "quotes"'),
        ("\u80f8\u90e8 \u00fc.png".encode(), "\u80f8\u90e8 \u00fc"),
    ],
)
def test_odd_names(drawing, png, compute, tmp_path, name, called):
    """Twice: a table with such a name is read again, and the name is not done again."""
    plain = png("a.png")
    odd = Path(os.fsdecode(os.fsencode(plain.parent) + b"/" + name))
    plain.rename(odd)
    model, out = drawing("lung"), tmp_path / "out"
    for _ in range(2):
        assert segment_files(model, [odd], out, Wanted(overlay=False), compute).done == 1
    (row,) = rows(out)
    assert (row["path"], row["name"]) == (str(odd), called)
    assert (out / row["mask"]).is_file()


def test_one_file_by_two_ways_is_one(drawing, png, compute, tmp_path):
    file = png("a.png")
    given = [file, file.parent / ".." / "in" / "a.png"]
    assert segment_files(drawing("lung"), given, tmp_path / "out", Wanted(), compute).done == 1


def test_inputs_that_are_not_there_leave_nothing(untrained, tmp_path, compute):
    with pytest.raises(SpcxrError, match="no such file or folder"):
        predict_files(untrained(), [tmp_path / "no.png"], tmp_path / "out" / "o.csv", compute)
    assert list((tmp_path / "out").iterdir()) == []
