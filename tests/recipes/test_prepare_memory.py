"""What prepare's own process holds for each file: columns, and no objects."""

import os
import tracemalloc

import numpy as np
from PIL import Image

from spcxr.data import pieces
from spcxr.data.pieces import Task, plan
from spcxr.data.presets import Preprocess
from spcxr.recipes.prepare import PrepareConfig, run

MOST_BYTES_A_FILE = 200


def folder_of(count, folder):
    folder.mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(folder / "0.png")
    for i in range(1, count):
        os.link(folder / "0.png", folder / f"{i:06d}.png")
    return folder


def peak(count, place):
    source = folder_of(count, place / f"in{count}")
    config = PrepareConfig(
        sources=(str(source),), out=str(place / f"s{count}"), size_px=8, workers=0
    )
    tracemalloc.start()
    try:
        run(config)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_little_more_than_the_path_of_a_file(tmp_path, monkeypatch):
    """Python's part; Arrow's columns beside it are some 150 bytes a file."""
    row = pieces.prepare_one(
        Task(str(folder_of(1, tmp_path / "one")), "0.png"), Preprocess(size_px=8)
    )
    monkeypatch.setattr(pieces, "prepare_one", lambda *rest: row)
    peak(16, tmp_path)  # what is loaded once
    few, many = peak(300, tmp_path), peak(1300, tmp_path)
    assert (many - few) / 1000 < MOST_BYTES_A_FILE


def test_a_plan_holds_a_byte_a_file(tmp_path):
    class Endless:
        def __len__(self):
            return 20_000

        def __getitem__(self, part):
            return [Task("/", f"{i}.png") for i in range(*part.indices(len(self)))]

    tracemalloc.start()
    made = plan(Endless(), Preprocess(size_px=8), tmp_path)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 3 * len(Endless())
    assert [task.path for task in made[1249].tasks] == [f"{i}.png" for i in range(19_984, 20_000)]
