"""Label columns of a tiny store, and the settings of a run on it, that several tests share."""

import signal

import numpy as np
from PIL import Image

from spcxr.recipes import fitting
from spcxr.recipes.classify import ClassifyConfig
from spcxr.train.journal import read_records


def one_label(there):
    return {"label": ["square" if t else "empty" for t in there]}


def findings(there):
    """Two findings that hold together with the square, some unknown, some uncertain."""
    first = ["1" if t else "0" for t in there]
    second = ["1" if t else "0" for t in there]
    first[0], first[8], second[1], second[16] = "", "-1", "", "-1"
    return {"nodule": first, "mass": second}


def config(store, init, out, **settings):
    made = {"epochs": 3, "batch_size": 8, "device": "cpu", "precision": "fp32"} | settings
    return ClassifyConfig(data=str(store.path), init=str(init), out=str(out), **made)


def train_losses(folder):
    return [r["loss"] for r in read_records(folder) if r["kind"] == "train"]


def three_classes(there):
    """Empty, square, and every fifth row of a third class."""
    return {"label": ["other" if i % 5 == 4 else "ab"[int(t)] for i, t in enumerate(there)]}


def write_table(folder):
    """Twelve radiographs and a manifest of them; its path."""
    rng = np.random.default_rng(0)
    lines = ["path,split,label"]
    for i in range(12):
        pixels = rng.integers(0, 255, (40, 50)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{('train', 'val', 'test')[i % 3]},{'ab'[i // 3 % 2]}")
    table = folder / "labels.csv"
    table.write_text("\n".join(lines))
    return table


class Stop:
    """Sends SIGTERM to this process in the n-th step."""

    def __init__(self, at, monkeypatch):
        self.at, self.count, self.real = at, 0, fitting.take_step
        monkeypatch.setattr(fitting, "take_step", self)

    def __call__(self, *arguments, **settings):
        self.count += 1
        if self.count == self.at:
            signal.raise_signal(signal.SIGTERM)
        return self.real(*arguments, **settings)
