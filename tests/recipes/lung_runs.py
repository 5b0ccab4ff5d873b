"""Runs that read the lungs alone, for the tests of that: their labels, settings and a store."""

import numpy as np
import torch

from spcxr.data.manifest import Manifest
from spcxr.data.presets import Preprocess
from spcxr.data.store import StoreWriter
from spcxr.recipes.classify import ClassifyConfig
from spcxr.train.device import Compute

CPU = Compute(8, torch.device("cpu"), "fp32")


def side_of_square(there):
    """A label of every image, whatever it shows: odd ones are sick."""
    return {"label": [("well", "sick")[i // 8 % 2] for i in range(len(there))]}


def config(store, init, out, **settings):
    made = {"epochs": 2, "batch_size": 8, "device": "cpu", "precision": "fp32", "attend": "lungs"}
    return ClassifyConfig(data=str(store.path), init=str(init), out=str(out), **(made | settings))


def write_store(path, masked):
    """Noise with a bright square in each image, and its mask where ``masked`` says so."""
    count, rng = len(masked), np.random.default_rng(0)
    text = {
        "path": [f"{i}.png" for i in range(count)],
        "patient_id": [f"p{i}" for i in range(count)],
        "split": [("train", "train", "val", "test")[i % 4] for i in range(count)],
        "label": ["ab"[i // 4 % 2] for i in range(count)],
        "mask_path": [f"m{i}.png" if there else "" for i, there in enumerate(masked)],
    }
    with StoreWriter(path, Preprocess(size_px=32)) as writer:
        for there in masked:
            image = rng.integers(0, 90, (32, 32)).astype(np.uint8)
            mask = np.zeros_like(image)
            top, left = rng.integers(2, 18, 2)
            image[top : top + 12, left : left + 12] = 240
            mask[top : top + 12, left : left + 12] = 1
            writer.add(image, mask if there else None)
        return writer.finish(Manifest.from_columns(text, root=path.parent))
